"""The generator that a run ended with, made again of ``checkpoints/generator.pt``.

The file holds the generator's name in a config, what its class takes, and its weights. It is data
and may come from a stranger: nothing is allocated before its tensors are those of such a network.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlseg import checkpoint
from mlseg.config import Tree, parse
from mlseg.config.components import signature_settings
from mlseg.errors import UserError
from mlseg.problems.e2eaug.networks.generator import GENERATORS, Fixed, MaskToImage
from mlseg.randomness import replayed

DEEPEST, LARGEST = 32, 2**16
"""What settings say at most: of levels, which are counted through, and of any other number."""


def finished(path: Path, in_channels: int, out_channels: int) -> nn.Module:
    """A finished generator, label map in, image out, on the processor and in training mode.

    Any registered one, or one of a user's own: merged into plain operators, or as :class:`Fixed`
    where its cells' operators can't be merged. No random number is drawn.

    Args:
        path: of the file.
        in_channels, out_channels: of the run's label maps and images.

    Raises:
        UserError: there is no such file; it is damaged, or of other data; or its class isn't known
            here, isn't trusted, or doesn't say what its merged network is.
    """
    state = checkpoint.load(path)
    try:
        with checkpoint.taking("its generator", "put the file back, or name another run"):
            made, found = _again(state)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if found != (in_channels, out_channels):
        raise UserError(
            f"{path}: its generator makes {found[1]} channels of {found[0]}, and the run's data "
            f"have {out_channels} and {in_channels}; put the file back, or name another run"
        )
    return made


def _again(state: Mapping[str, Any]) -> tuple[nn.Module, tuple[int, int]]:
    """The network, and the channels of what goes in and comes out."""
    name = str(state.get("name", "pix2pix"))
    cls = GENERATORS.get(name)
    settings, tensors = dict(state["settings"]), dict(state["module"])
    fixed = "weights" in tensors and all(
        key == "weights" or key.startswith("generator.") for key in tensors
    )
    if not fixed and cls.plain is None:
        raise UserError(
            f"{name} doesn't say what its merged network is; give its class the attribute plain, "
            "the class of what merged() returns"
        )
    called: Any = cls if fixed else cls.plain
    values = dict(parse(signature_settings(called), Tree(settings, source="settings")))
    _check_sizes(values)
    with torch.device("meta"):
        _check_shapes(_made(called, values, fixed).state_dict(), tensors)
    with replayed(None):
        made = _made(called, values, fixed)
    checkpoint.load_module(made, tensors)
    return made, (values["in_channels"], values["out_channels"])


def _made(called: Any, values: dict[str, Any], fixed: bool) -> nn.Module:
    network: nn.Module = called(**values)
    if not fixed:
        return network
    assert isinstance(network, MaskToImage)
    return Fixed(network, torch.zeros(network.num_cells, len(network.candidates)), values)


def _check_sizes(values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        most = DEEPEST if key == "levels" else LARGEST
        for number in value if isinstance(value, list | tuple) else (value,):
            if isinstance(number, int) and not 0 <= number <= most:
                raise ValueError(f"{key} is {number}, and no more than {most} is known")


def _check_shapes(own: Mapping[str, Tensor], given: Mapping[Any, Any]) -> None:
    for name in [*own, *given]:
        if name not in own or name not in given:
            raise ValueError(f"{str(name)[:80]} is {'missing' if name in own else 'too much'}")
        shape = getattr(given[name], "shape", None)
        if shape != own[name].shape:
            raise ValueError(f"{name} has the shape {shape}, not {tuple(own[name].shape)}")
