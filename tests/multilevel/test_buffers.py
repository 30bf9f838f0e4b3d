"""Buffers of a program's modules, wherever they have come to be."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from mlseg.multilevel.buffers import ProgramBuffers, put_back


def test_a_table_that_has_replaced_another_is_looked_up() -> None:
    norm: Any = nn.BatchNorm1d(2)
    problem: Any = SimpleNamespace(name="level", module=nn.Sequential(norm))
    buffers = ProgramBuffers(lambda: [problem])
    put_back(buffers.contents())
    noted = buffers.copies(statistics=True)
    norm._buffers = {name: value.clone() for name, value in norm._buffers.items()}
    norm.running_mean.fill_(3.0)
    contents = buffers.contents()
    buffers.set(noted)
    assert torch.equal(norm.running_mean, torch.zeros(2))
    put_back(contents)
    assert torch.equal(norm.running_mean, torch.full((2,), 3.0))


def test_buffers_of_every_kind_are_put_back() -> None:
    """In one operation per kind: of several dtypes and layouts, tied, empty or none."""
    module: Any = nn.Module()
    kept: dict[str, Any] = {
        "whole": torch.arange(3),
        "turned": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "narrow": torch.randn(3, dtype=torch.bfloat16),
        "empty": torch.zeros(0),
        "none": None,
    }
    for name, value in kept.items():
        module.register_buffer(name, value)
    module.register_buffer("tied", kept["whole"])
    problem: Any = SimpleNamespace(name="level", module=module)
    buffers = ProgramBuffers(lambda: [problem])
    before = {n: v if v is None else v.clone() for n, v in module._buffers.items()}
    contents, own = buffers.contents(), dict(module._buffers)
    for value in own.values():
        if value is not None:
            value.add_(1)
    module.none, module.empty = torch.ones(1), None
    put_back(contents)
    for name, value in before.items():
        now = module._buffers[name]
        assert now is own[name]
        assert value is None or torch.equal(now, value)
