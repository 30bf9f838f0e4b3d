"""Runs' segmentors, rebuilt from their checkpoints alone, by themselves or as an ensemble."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import torch
from torch import Tensor, nn

from mlseg import checkpoint, config, threads
from mlseg.config import Settings, Tree, parse
from mlseg.errors import UserError
from mlseg.segmentation.data import DatasetSpec, Fit
from mlseg.segmentation.nets import (
    build_segmentor,
    class_probabilities,
    described,
    temperature,
)
from mlseg.segmentation.scoring import at_native, predict_logits

Side = Annotated[int, pydantic.Field(ge=1, le=2**14)]
Sides = Annotated[list[Side], pydantic.Field(min_length=2, max_length=2)]
Colour = Annotated[
    list[Annotated[int, pydantic.Field(ge=0, le=255)]], pydantic.Field(min_length=3, max_length=3)
]


class Description(Settings):
    """What a checkpoint says of its segmentor and of the data that it was trained on.

    See ``Segmentation.description``; the network's own settings are checked by the network.
    """

    model_config = pydantic.ConfigDict(extra="ignore")

    settings: dict[str, Any]
    in_channels: Annotated[int, pydantic.Field(ge=1, le=256)]
    num_classes: Annotated[int, pydantic.Field(ge=2, le=255)]
    image_size: Sides
    fit: Fit = "stretch"
    classes: list[str]
    ignore_index: Annotated[int, pydantic.Field(ge=0, le=255)] | None
    palette: list[Colour]
    metric: str
    problem: str
    precision: Literal["fp32", "bf16"]
    threshold: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.5
    temperature: Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)] | None = None
    window: Sides | None = None
    scoring: Literal["native", "trained"] = "native"

    @pydantic.model_validator(mode="after")
    def _of_one_number(self) -> "Description":
        if not len(self.classes) == len(self.palette) == self.num_classes:
            raise ValueError(
                f"{self.num_classes} classes with {len(self.classes)} names and "
                f"{len(self.palette)} colours"
            )
        if self.window and any(w > s for w, s in zip(self.window, self.image_size, strict=True)):
            raise ValueError("window is larger than image_size")
        return self


@dataclass(frozen=True)
class Trained:
    """A trained segmentor and what is known of it.

    Attributes:
        run: its run directory, or the file that it was exported to.
        module: (B, C, H, W) in [-1, 1] to (B, K, H, W) logits, in evaluation mode.
        spec: what its training data were.
        image_size: (H, W) it was trained at, pixels.
        fit: how images were brought to that size; see ``DataSettings``.
        window: (H, W) of the windows that it was trained on; None: whole images.
        step: at which the weights were taken.
        autocast: whether the run computed in bfloat16.
        threshold: of the foreground's probability, as the run's config has it.
        scoring: the size at which the run's config counts scores.
        digest: SHA-256 of the checkpoint file, by which a calibration knows its runs.
        temperature: k, in place of the network's own; see :attr:`k`.
        config: of the run, as plain values; None in checkpoints that don't say.
    """

    run: Path
    module: nn.Module
    spec: DatasetSpec
    image_size: tuple[int, int]
    fit: Fit
    window: tuple[int, int] | None
    step: int
    autocast: bool
    threshold: float
    scoring: Literal["native", "trained"]
    digest: str
    temperature: float | None = None
    config: Any = None

    @property
    def own_k(self) -> float:
        """The network's own temperature; 1 for a network without one."""
        return temperature(self.module)

    @property
    def k(self) -> float:
        """The temperature of :meth:`probabilities`: the one chosen, or else the network's own."""
        return self.own_k if self.temperature is None else self.temperature

    def logits(self, image_BCHW: Tensor, turned: bool = False) -> Tensor:
        """(B, K, H, W) float32, divided by the network's own temperature.

        Args:
            turned: the images lie on their sides, and so do the windows.
        """
        window = self.window[::-1] if turned and self.window is not None else self.window
        return predict_logits(self.module, image_BCHW, window, self.autocast)

    def probabilities(self, image_BCHW: Tensor, turned: bool = False) -> Tensor:
        """Class probabilities of images in [-1, 1], at their size and the temperature :attr:`k`."""
        logits = self.logits(image_BCHW, turned)
        if self.temperature is not None:
            logits = logits * (self.own_k / self.temperature)
        return class_probabilities(self.module, logits)


@dataclass(frozen=True)
class Ensemble:
    """One or more trained segmentors whose class probabilities are averaged.

    Attributes:
        members: of one kind of data, one image size and one fit.
        threshold: of the mean probability.
        flips: average over the eight flips and quarter turns of what the networks see, too.
    """

    members: tuple[Trained, ...]
    threshold: float
    flips: bool = False

    @property
    def first(self) -> Trained:
        """Any member: what they have in common."""
        return self.members[0]

    def with_choice(self, k: float | None, threshold: float | None) -> "Ensemble":
        """The same networks at another temperature k or threshold; None keeps what is there."""
        members = self.members
        if k is not None:
            members = tuple(replace(member, temperature=k) for member in members)
        chosen = self.threshold if threshold is None else threshold
        return replace(self, members=members, threshold=chosen)

    def __call__(self, image_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) images in [-1, 1] to (B, K, H, W) class probabilities."""
        return self.probabilities(image_BCHW)

    @torch.no_grad()
    def probabilities(self, image_BCHW: Tensor, native: tuple[int, int] | None = None) -> Tensor:
        """Mean class probabilities of images, at the size given or that of their file.

        Args:
            image_BCHW: in [-1, 1], brought to the networks' size as they were in training.
            native: (H', W') to bring the probabilities back to; None: (H, W) as they are.

        Returns:
            (B, K, H', W').
        """
        mean = self._flipped(image_BCHW) if self.flips else self._mean(image_BCHW)
        return mean if native is None else at_native(mean, native, self.first.fit)

    def _mean(self, image_BCHW: Tensor, turned: bool = False) -> Tensor:
        total = self.members[0].probabilities(image_BCHW, turned)
        for member in self.members[1:]:
            total = total + member.probabilities(image_BCHW, turned)
        return total / len(self.members)

    def _flipped(self, image_BCHW: Tensor) -> Tensor:
        """The mean over four quarter turns, each as it is and mirrored; turned back, of course."""
        total: Tensor | None = None
        for quarters in range(4):
            turned = image_BCHW.rot90(quarters, (-2, -1))
            for mirrored in (False, True):
                seen = turned.flip(-1) if mirrored else turned
                found = self._mean(seen.contiguous(), turned=quarters % 2 == 1)
                found = (found.flip(-1) if mirrored else found).rot90(-quarters, (-2, -1))
                total = found if total is None else total + found
        assert total is not None
        return total / 8


def load_runs(runs: Sequence[Path], device: torch.device, weights: str = "best") -> Ensemble:
    """The segmentors of one or more run directories, with the first one's threshold.

    Args:
        runs: the directories.
        weights: ``best`` (chosen on validation data), ``last``, or another checkpoint's name.

    Raises:
        UserError: a run can't be loaded, or the runs don't fit together.
    """
    members = tuple(load_trained(run, device, weights) for run in runs)
    first = members[0]
    for other in members[1:]:
        for what, mine, its in (
            ("classes", ", ".join(first.spec.classes), ", ".join(other.spec.classes)),
            ("channels", first.spec.channels, other.spec.channels),
            ("ignore_index", first.spec.ignore_index, other.spec.ignore_index),
            ("image_size", first.image_size, other.image_size),
            ("fit", first.fit, other.fit),
        ):
            if mine != its:
                raise UserError(
                    f"{other.run}: its {what} are {its}, those of {first.run} {mine}; an ensemble "
                    "needs runs of the same kind of data"
                )
    return Ensemble(members, first.threshold)


def load_trained(run: Path, device: torch.device, weights: str = "best") -> Trained:
    """The segmentor of a run directory, or of a file that ``export --format torch`` has written.

    Args:
        run: the directory, or the file.
        weights: ``best`` (chosen on validation data), ``last`` or another checkpoint's name; of a
            directory.

    Raises:
        UserError: no such run, no such checkpoint, or one of a run without a segmentor.
    """
    return _trained(run, weights_of(run, weights), device)


def weights_of(run: Path, weights: str = "best") -> Path:
    """The file that holds the segmentor of a run directory; a file itself.

    Raises:
        UserError: there is nothing of that name.
    """
    if run.is_file():
        return run
    if not run.is_dir():
        raise UserError(f"{run}: no such run directory")
    folder = run / "checkpoints"
    path, last = folder / f"{weights}.pt", folder / checkpoint.LAST
    if not path.exists() and checkpoint.whole(last):
        _require_segmentor(last, checkpoint.load(last))
    return path


def _require_segmentor(path: Path, state: Mapping[str, Any]) -> None:
    if state.get("segmentor") is None:
        raise UserError(f"{path}: this run has no segmentor to load")


def _trained(run: Path, path: Path, device: torch.device) -> Trained:
    state = checkpoint.load(path)
    _require_segmentor(path, state)
    with checkpoint.taking(f"{path}: its segmentor", "name another checkpoint or run"):
        values = dict(state["segmentor"])
        found = parse(Description, Tree(values, source=f"{path}: segmentor"))
        step = state["engine"]["global_step"]
        checkpoint.require_form(0, step, "engine.global_step")
        checkpoint.require_form("", state["data"], "data")
        tensors = state["problems"][found.problem]["module"]
        settings = described(values, str(path))
        module = build_segmentor(settings, found.in_channels, found.num_classes)
    try:
        checkpoint.load_module(module, tensors)
    except Exception as error:  # the file may hold anything
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{path}: its weights don't fit {settings.name!r} as it is now ({reason})"
        ) from error
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    height, width = found.image_size
    window = found.window
    return Trained(
        run=run,
        module=module.to(device).eval(),
        spec=DatasetSpec(
            name=state["data"],
            channels=found.in_channels,
            classes=tuple(found.classes),
            ignore_index=found.ignore_index,
            metric=found.metric,
            palette=tuple((r, g, b) for r, g, b in found.palette),
        ),
        image_size=(height, width),
        fit=found.fit,
        window=None if window is None else (window[0], window[1]),
        step=step,
        autocast=found.precision == "bf16",
        threshold=found.threshold,
        scoring=found.scoring,
        digest=digest,
        temperature=found.temperature,
        config=state.get("config"),
    )


def begun_with(run: Path) -> int:
    """The threads that a run began with; torch's own number for one that hasn't stored it."""
    path = run / "config.yaml"
    stored = config.load(path).values.get("threads") if path.is_file() else None
    return stored if isinstance(stored, int) and stored > 0 else torch.get_num_threads()


def run_threads(run: Path, asked: int | None = None) -> threads.Threads:
    """As many as are asked for, or the environment says, or else as the run was trained with.

    So figures are those that the run reported.
    """
    if asked is not None:
        return threads.Threads(asked, "--threads")
    own = threads.Threads(min(begun_with(run), threads.cores()), "run")
    return threads.by_environment() or own
