"""Typed configs: YAML files that inherit, overrides, errors that name the key.

:mod:`mlseg.config.loading` says how files, their bases and a command line are merged;
:mod:`mlseg.config.registry` finds by name what a config names.
"""

from mlseg.config.loading import (
    Override,
    Settings,
    Tree,
    differences,
    dump,
    load,
    override,
    parse,
    read_overrides,
    require_names,
)

__all__ = [
    "Override",
    "Settings",
    "Tree",
    "differences",
    "dump",
    "load",
    "override",
    "parse",
    "read_overrides",
    "require_names",
]
