"""Optimizers: settings, differentiable maps, their diagonals."""
