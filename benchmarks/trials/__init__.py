"""What ``faults.py`` tries: a module per kind, and what they share.

``child`` starts commands that may die, ``judge`` says what became of them, ``mutations`` damages
files and values, ``fixtures`` holds what the trials start from.
"""
