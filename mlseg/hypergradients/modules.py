"""Walks over a program's modules.

A step takes dozens of them, and torch's own, generators within generators, cost as much as a small
network's kernels.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def submodules(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules and all below them, each once, in the order of ``nn.Module.modules``."""
    found: dict[int, nn.Module] = {}

    def visit(module: nn.Module) -> None:
        if type(module).named_modules is not nn.Module.named_modules:
            # It has another notion of what its modules are, which torch asks for, too.
            found.update((id(m), m) for _, m in module.named_modules() if id(m) not in found)
        elif id(module) not in found:
            found[id(module)] = module
            for child in module._modules.values():
                if child is not None:
                    visit(child)

    for module in modules:
        visit(module)
    return list(found.values())


def parameters_of(module: nn.Module) -> list[nn.Parameter]:
    """``list(module.parameters())``."""
    cls = type(module)
    own = cls.parameters, cls.named_parameters
    if own != (nn.Module.parameters, nn.Module.named_parameters):
        return list(module.parameters())  # it has another notion of what its parameters are
    found = {
        id(p): p
        for holder in submodules([module])
        for p in holder._parameters.values()
        if p is not None
    }
    return list(found.values())
