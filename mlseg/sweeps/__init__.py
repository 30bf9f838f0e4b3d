"""Grids of runs: cells, where they are run, and the tables and pictures of what has finished."""
