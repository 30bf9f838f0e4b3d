"""The version, for whoever mustn't import the rest."""

__version__ = "0.1.0"
