"""A segmentor that starts from what another run has learned: ``init: RUN_OR_FILE``.

Tensors of the same name and shape are taken over. Where the classes are others, whatever gives one
output per class is new.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from mlseg import checkpoint
from mlseg.errors import UserError, printable
from mlseg.files import reachable
from mlseg.segmentation.nets.segmentor import SegmentorSettings
from mlseg.segmentation.trained import weights_of

LEAST = 0.5
"""Of a network's tensors that have to be there: with fewer it is another network's file."""


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
        line += f"; new head: its classes are others ({_listed(record['classes'])})"
    for what, names in (("new", record["new"]), ("not used", record["unused"])):
        if names:
            line += f"; {what}: {_listed(names)}"
    return line


def start_from(
    named: str,
    network: nn.Module,
    settings: SegmentorSettings,
    classes: Sequence[str],
    wider: Callable[[], nn.Module],
) -> Taken:
    """Give a fresh segmentor the weights of a run, or of a file of ``export --format torch``.

    Nothing that the run names is imported; its weights alone are read.

    Args:
        named: the run's directory, whose best weights are taken, or a file.
        settings: of the network.
        classes: of the data, in their order.
        wider: makes the same network with a class more, which shows what depends on their number.

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
        about = state["segmentor"]
        theirs = [str(name) for name in about["classes"]]
        its = dict(about["settings"])
        pixels = settings.seen_by(its)
        given = state["problems"][about["problem"]]["module"]
        tensors = {k: t for k, t in given.items() if isinstance(k, str) and isinstance(t, Tensor)}
    own, same = network.state_dict(), theirs == list(classes)
    other = {} if same else wider().state_dict()
    heads = {name for name in other if name in own and own[name].shape != other[name].shape}
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
    if pixels != settings.normalised:
        raise UserError(
            f"init: {path} has learned from pixels as segmentor.normalise={pixels} gives them, "
            f"not {settings.normalised}; set segmentor.normalise to {pixels}"
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
        classes=None if same else theirs,
    )


def _listed(names: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(printable(name, 80) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
