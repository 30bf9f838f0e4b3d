"""A segmentor that starts from what another run has learned: ``init: RUN_OR_FILE``.

Tensors of the same name and shape are taken over. Where the classes are others, whatever gives one
output per class is new. It is for the config's own segmentor, which has to be the run's. What fits
in parts, under other names, with classes in another order or of another library is
``segmentor.weights`` (:mod:`~mlseg.segmentation.nets.starting`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from mlseg import checkpoint
from mlseg.errors import UserError, printable
from mlseg.files import reachable
from mlseg.segmentation.nets.segmentor import SegmentorSettings
from mlseg.segmentation.nets.starting import LEAST, listed, outputs_of
from mlseg.segmentation.nets.weights import learned
from mlseg.segmentation.trained import weights_of


@dataclass(frozen=True)
class Taken:
    """What a network has taken over.

    Attributes:
        source: the checkpoint.
        digest: of its weights; see ``checkpoint.fingerprint``.
        loaded: how many of the network's tensors.
        tensors: how many it has.
        new: those that are as a fresh network has them.
        unused: those that the network has no place for.
        classes: of the run that is gone on from, where they are others.
    """

    source: str
    digest: str
    loaded: int
    tensors: int
    new: list[str]
    unused: list[str]
    classes: list[str] | None = None

    @staticmethod
    def of(record: Mapping[str, Any]) -> Taken:
        """What :meth:`record` has given, from a file that may hold anything.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        names = {key: [str(name) for name in record[key]] for key in ("new", "unused")}
        classes = record["classes"]
        return Taken(
            source=str(record["source"]),
            digest=str(record["digest"]),
            loaded=int(record["loaded"]),
            tensors=int(record["tensors"]),
            classes=None if classes is None else [str(name) for name in classes],
            **names,
        )

    def record(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def said(record: Mapping[str, Any]) -> str:
    """A line about what :meth:`Taken.record` gives."""
    line = (
        f"init: {record['loaded']} of {record['tensors']} tensors are those of {record['source']}"
    )
    if record["classes"] is not None:
        line += f"; new head: its classes are others ({listed(record['classes'], 4)})"
    for what, names in (("new", record["new"]), ("not used", record["unused"])):
        if names:
            line += f"; {what}: {listed(names, 4)}"
    return line


def start_from(
    named: str,
    network: nn.Module,
    settings: SegmentorSettings,
    in_channels: int,
    classes: Sequence[str],
) -> Taken:
    """Give a fresh segmentor the weights of a run, or of a file of ``export --format torch``.

    Nothing that the run names is imported; its weights alone are read.

    Args:
        named: the run's directory, whose best weights are taken, or a file.
        settings: of the network.
        in_channels: of the data's images.
        classes: the data's, in their order.

    Raises:
        UserError: there is no such run, or its weights are another network's, or have learned
            from pixels in another range.
    """
    try:
        path = weights_of(reachable(named))
        state = checkpoint.load(path)
    except UserError as error:
        raise UserError(f"init: {error}") from None
    if not isinstance(state.get("segmentor"), Mapping):
        raise UserError(f"init: {path}: no segmentor in it; name a run or a file of mlseg.export")
    with checkpoint.taking(f"init: {path}: its segmentor", "name another run or file"):
        weights, its = learned(state, path, settings), dict(state["segmentor"]["settings"])
    own, tensors = network.state_dict(), weights.tensors
    same = weights.classes == tuple(classes)
    heads = () if same else outputs_of(network, settings, in_channels, classes).heads
    taken = {
        name: tensors[name]
        for name, tensor in own.items()
        if name in tensors and name not in heads and tensors[name].shape == tensor.shape
    }
    if len(taken) < LEAST * len(own):
        first = next(name for name in own if name not in taken)
        raise UserError(
            f"init: {path} has {len(taken)} of the {len(own)} tensors of this segmentor ({first} "
            "isn't there, or has another shape): it is another network's; name its settings under "
            f"segmentor ({printable(', '.join(f'{k}: {v}' for k, v in its.items()), 200)})"
        )
    if weights.pixels != settings.normalised:
        raise UserError(
            f"init: {path} has learned from pixels as segmentor.normalise={weights.pixels} gives "
            f"them, not {settings.normalised}; set segmentor.normalise to {weights.pixels}"
        )
    with checkpoint.taking(f"init: {path}: its weights", "name another run or file"):
        checkpoint.load_module(network, {**own, **taken})
    return Taken(
        source=str(path),
        digest=checkpoint.fingerprint(tensors),
        loaded=len(taken),
        tensors=len(own),
        new=[name for name in own if name not in taken],
        unused=[name for name in tensors if name not in taken],
        classes=None if same else list(weights.classes or ()),
    )
