"""Hypergradient methods, a file each."""
