"""What ``python -m mlseg.compare`` is made of: settings, cells, measuring, figures, report."""
