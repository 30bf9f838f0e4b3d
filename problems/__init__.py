"""Systems: multilevel programs that a config can name, a folder each.

A folder holds the levels and the ``build`` that wires them into an engine (``levels.py``), what a
config says of them (``settings.py``), what a run leaves behind (``records.py``) and networks. A
system may lie anywhere else when it is named by dotted path, and is deleted by removing its folder.
"""
