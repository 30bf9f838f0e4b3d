"""Models to start from: weights that others have published, or that another run has learned.

``segmentor.weights`` is a file with the state dict of a whole segmentor
(segmentation-models-pytorch, torchvision, a run of mlseg, any network of the same tensors), and
``segmentor.encoder_weights`` one of an encoder alone, or the name under which the library that
knows the encoder downloads it. Names of tensors may have another prefix than here (``module.``,
``model.``, ``encoder.``); what the tensors are doesn't follow from names alone, but from their
shapes as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlseg import checkpoint
from mlseg.errors import UserError, printable
from mlseg.files import reachable
from mlseg.randomness import replayed
from mlseg.segmentation.nets.segmentor import SegmentorSettings, build_segmentor
from mlseg.segmentation.nets.weights import Weights, downloaded, encoder_of, read

LEAST = 0.5
"""Of a network's tensors that have to be in a file: with fewer it is a file of something else."""


@dataclass(frozen=True)
class Started:
    """What a network has taken over, as ``results.json`` holds it.

    Attributes:
        source: where from.
        loaded: how many of the network's tensors.
        tensors: how many it has.
        new: those that are as a fresh network has them.
        unused: those of the file that the network has no place for.
        notes: what else there is to know, in words.
        digest: SHA-256 of names, types and values of what was in the file.
    """

    source: str
    loaded: int
    tensors: int
    new: list[str]
    unused: list[str]
    digest: str
    notes: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def said(record: Mapping[str, Any]) -> str:
    """A line about what :meth:`Started.record` gives."""
    line = f"Starts from {record['source']}: {record['loaded']} of {record['tensors']} tensors"
    for what, names in (("new", record["new"]), ("not used", record["unused"])):
        if names:
            line += f"; {what}: {listed(names)}"
    return "; ".join([line, *record["notes"]])


@dataclass(frozen=True)
class Outputs:
    """What a segmentor's outputs mean.

    Attributes:
        classes: their names, in their order.
        heads: names of the tensors whose first dimension they are.
    """

    classes: tuple[str, ...]
    heads: tuple[str, ...]


def outputs_of(
    network: nn.Module, settings: SegmentorSettings, in_channels: int, classes: Sequence[str]
) -> Outputs:
    """The outputs of a segmentor: those tensors that have another shape with a class more."""
    wider = build_segmentor(settings, in_channels, len(classes) + 1).state_dict()
    own = network.state_dict()
    heads = [name for name in own if own[name].shape != wider[name].shape]
    return Outputs(tuple(classes), tuple(heads))


def start(
    network: nn.Module, settings: SegmentorSettings, in_channels: int, classes: Sequence[str]
) -> Started | None:
    """Give a fresh segmentor the weights that its settings name; None where they name none.

    Args:
        in_channels: of the data's images.
        classes: the data's, in their order.

    Raises:
        UserError: there is no such file, it holds something else, or it can't be downloaded.
    """
    with replayed(None):  # whatever a library draws
        named = settings.said("weights")
        if named is not None:
            weights = read(named, "segmentor.weights", settings)
            if settings.said("weights_classes"):
                names = tuple(settings.said("weights_classes"))
                weights = Weights(weights.source, weights.tensors, names, weights.pixels)
            if weights.pixels not in (None, settings.normalised):
                raise UserError(
                    f"segmentor.normalise: {named} has learned from pixels as {weights.pixels} "
                    f"gives them, not {settings.normalised}; set normalise to {weights.pixels}"
                )
            outputs = outputs_of(network, settings, in_channels, classes)
            return take(network, weights, "segmentor.weights", outputs)
        named = settings.said("encoder_weights")
        if named is None:
            return None
        encoder = encoder_of(network, settings.name)
        if reachable(named).is_file() or "/" in named or Path(named).suffix:
            weights = read(named, "segmentor.encoder_weights", settings)
        else:
            weights = downloaded(network, settings, named)
        return take(encoder, weights, "segmentor.encoder_weights")


def take(network: nn.Module, weights: Weights, key: str, outputs: Outputs | None = None) -> Started:
    """Give a network the tensors of a file that are its own.

    Args:
        network: a segmentor, or a part of one; tensors that it doesn't find stay as they are.
        key: of the config, for errors.
        outputs: of a segmentor; None: the network is a part of one that gives no classes.

    Raises:
        UserError: most of the network's tensors aren't in the file, or not in that shape.
    """
    own = {name: t for name, t in network.state_dict().items() if isinstance(t, Tensor)}
    names = _matched(own, weights.tensors)
    taken = {
        name: weights.tensors[its]
        for name, its in names.items()
        if own[name].shape == weights.tensors[its].shape
    }
    notes = [
        None if outputs is None else _match_classes(own, names, weights, outputs, taken),
        _match_channels(own, names, weights, taken),
    ]
    counted = [name for name in own if not name.endswith("num_batches_tracked")]
    found = sum(name in taken for name in counted)
    if found < LEAST * len(counted):
        example = next((name for name in counted if name not in taken), "")
        raise UserError(
            f"{key}: {weights.source} holds {found} of the {len(counted)} tensors of this network "
            f"({example[:80]} isn't there, or has another shape): weights of another network; name "
            "the network and settings that they are of"
        )
    try:
        checkpoint.load_module(network, {**network.state_dict(), **taken})
    except Exception as error:  # a network may check more than shapes
        reason = printable(" ".join(str(error).split()), 160)
        raise UserError(
            f"{key}: {weights.source} doesn't fit the network ({reason}); name another file"
        ) from error
    used = {names[name] for name in taken}
    return Started(
        source=weights.source,
        loaded=found,
        tensors=len(counted),
        new=[name for name in counted if name not in taken],
        unused=[name for name in weights.tensors if name not in used],
        digest=checkpoint.fingerprint(weights.tensors),
        notes=[note for note in notes if note],
    )


def _matched(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, str]:
    """Names in the file by names here: with the prefixes under which most tensors fit."""

    def fitting(here: str, there: str) -> dict[str, str]:
        moved = ((name, there + name[len(here) :]) for name in own if name.startswith(here))
        return {name: its for name, its in moved if its in given}

    def fit(pair: tuple[str, str]) -> tuple[int, int]:
        found = fitting(*pair)
        same = sum(own[name].shape == given[its].shape for name, its in found.items())
        return same, -len(pair[0]) - len(pair[1])

    pairs = [(here, there) for here in _prefixes(own, shared=True) for there in _prefixes(given)]
    return fitting(*max(pairs, key=fit))


def _prefixes(names: Mapping[str, Tensor], shared: bool = False) -> list[str]:
    """What names begin with, up to three parts; ``shared``: all of them."""
    found = {""}
    for name in names:
        parts = name.split(".")[:-1][:3]
        found.update(".".join(parts[:n]) + "." for n in range(1, len(parts) + 1))
    if shared:
        found = {prefix for prefix in found if all(name.startswith(prefix) for name in names)}
    return sorted(found)


def _match_classes(
    own: Mapping[str, Tensor],
    names: Mapping[str, str],
    weights: Weights,
    outputs: Outputs,
    taken: dict[str, Tensor],
) -> str | None:
    """Take the layers that give the classes over as far as these are the same; says what was done.

    Where they aren't, such a layer stays new.
    """
    known, wanted = weights.classes, outputs.classes
    numbers = {
        weights.tensors[names[name]].shape[0]
        for name in outputs.heads
        if name in names and weights.tensors[names[name]].dim() == own[name].dim()
    }
    if not numbers:
        return None  # the file holds no such layer, and the report says that it is new
    (number, *more) = numbers
    if not more and all(own[name].shape[0] == number == 1 for name in outputs.heads):
        return None  # both have one output for the foreground
    if number == 1 and len(wanted) == 2 and not more:
        for name in outputs.heads:
            # One logit z against 0: the softmax of (0, z) is z's sigmoid.
            row = weights.tensors[names[name]]
            if row.shape[1:] == own[name].shape[1:]:
                taken[name] = torch.cat([torch.zeros_like(row), row])
        return "its one output is the foreground's, against 0 for the background"
    if number != len(wanted) or more:
        return f"new head: {number} classes in the file, {len(wanted)} in the data"
    if known is None:
        return (
            f"its {number} classes are taken for those of the data, in their order "
            "(segmentor.weights_classes says otherwise)"
        )
    if len(known) != number:
        raise UserError(
            f"segmentor.weights_classes: {len(known)} names, and {weights.source} has {number} "
            "classes; name each, in the file's order"
        )
    if known == wanted:
        return None
    heads = [name for name in outputs.heads if name in taken]
    if sorted(known) == sorted(wanted):
        for name in heads:
            taken[name] = taken[name][[known.index(one) for one in wanted]]
        return "classes brought from the file's order into the data's"
    for name in heads:
        del taken[name]
    return f"new head: the file's classes are others ({listed(known)})"


def _match_channels(
    own: Mapping[str, Tensor], names: Mapping[str, str], weights: Weights, taken: dict[str, Tensor]
) -> str | None:
    """Let the first layer see grey where it has learned from colours; says what was done.

    Summed over its channels, a convolution's kernel gives for grey what it gave for three channels
    that all hold it. For other channels the layer stays new.
    """
    said = None
    for name, its in names.items():
        mine, given = own[name], weights.tensors[its]
        if name in taken or mine.dim() != 4 or given.dim() != 4 or given.shape[1] != 3:
            continue
        if (mine.shape[0], mine.shape[2:]) != (given.shape[0], given.shape[2:]):
            continue
        if mine.shape[1] == 1:
            taken[name] = given.sum(1, keepdim=True)
            said = f"{name} summed over the file's 3 channels"
    return said


def listed(names: Sequence[str], most: int = 3) -> str:
    """Some names, and how many more there are."""
    shown = ", ".join(printable(name, 80) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
