"""Systems: multilevel programs that a config can name, a folder each.

=================  =================================================================================
``levels.py``      the levels, as the paper has them; a reader starts here
``wiring.py``      ``build``: data, networks, levels, and the engine with its stages
``settings.py``    what a config says of them
``records.py``     what a run leaves behind besides every run's records
``losses.py``      losses that this system alone has
``networks``       networks that this system alone has, a file or a folder
=================  =================================================================================

The folder's ``__init__.py`` imports what registers itself. A system of one level can be a file, as
``supervised.py`` is; one may lie anywhere else when it is named by dotted path; and each is deleted
by removing its folder, with its tests and configs.
"""

from mlseg._checkout import require_part

require_part(__name__, __file__)
