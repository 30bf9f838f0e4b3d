"""Products with second derivatives."""
