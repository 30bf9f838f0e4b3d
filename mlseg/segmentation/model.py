"""A trained model as a function: images in any form in, masks or probabilities out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from mlseg.config.registry import strangers
from mlseg.errors import UserError
from mlseg.files import reachable
from mlseg.machine import choose_device
from mlseg.segmentation.calibration import calibrated
from mlseg.segmentation.data.given import as_image
from mlseg.segmentation.segmenting import decided, enlarged, probabilities
from mlseg.segmentation.trained import Ensemble, load_runs, run_threads

Given = str | PathLike[str] | Image.Image | NDArray[Any] | Tensor


class Model:
    """One or more trained segmentors, called with images.

    ::

        model = mlseg.load("runs/try")
        mask = model("photograph.jpg")                             # (H, W) uint8 class numbers
        chances = model("photograph.jpg", probabilities=True)      # (K, H, W) float32

    Made by :func:`load`. Masks are those that ``mlseg.predict`` writes, bit for bit (for two
    classes it writes 255 for 1).

    Attributes:
        ensemble: the segmentors, their temperature and threshold.
        threads: of the processor, while it computes.
    """

    def __init__(self, ensemble: Ensemble, threads: int) -> None:
        self.ensemble = ensemble
        self.threads = threads

    @property
    def runs(self) -> tuple[Path, ...]:
        """The run directories."""
        return tuple(member.run for member in self.ensemble.members)

    @property
    def class_names(self) -> tuple[str, ...]:
        """By class number."""
        return self.ensemble.first.spec.classes

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """A colour (red, green, blue; 0 to 255) by class number."""
        return self.ensemble.first.spec.palette

    @property
    def channels(self) -> int:
        """Of images, as the networks see them: 3 (RGB) or 1 (grey)."""
        return self.ensemble.first.spec.channels

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) that images are brought to, pixels."""
        return self.ensemble.first.image_size

    @property
    def threshold(self) -> float:
        """Of two classes, the foreground is where its probability exceeds this."""
        return self.ensemble.threshold

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.modules[0].parameters()).device

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The networks, one a run; see :attr:`module`."""
        return tuple(member.module for member in self.ensemble.members)

    @property
    def module(self) -> nn.Module:
        """The network of one run, plain torch, in evaluation mode, as it was trained.

        (B, C, H, W) images in [-1, 1] to (B, K, H, W) logits: without the resizing, normalisation,
        windows and softmax that a call goes through.

        Raises:
            UserError: there are several; see :attr:`modules`.
        """
        if len(self.modules) > 1:
            raise UserError(
                f"module: this is an ensemble of {len(self.modules)} networks; take them from "
                "model.modules"
            )
        return self.modules[0]

    def __call__(self, image: Given | Sequence[Given], *, probabilities: bool = False) -> Any:
        """Segment an image, or several.

        Args:
            image: a path; a PIL image; an array (H, W) or (H, W, 3); a tensor (C, H, W); a batch
                (B, C, H, W); or a list of any of these. Arrays and tensors are uint8, uint16, or
                floats from 0 to 1. Grey and colour are turned into what the networks see. Images
                pass one by one, so that a batch gives what each of its images gives.
            probabilities: of the classes, instead of the decision.

        Returns:
            (H, W) uint8 class numbers at the image's own size, or (K, H, W) float32 probabilities,
            which add up to 1 unless the network says otherwise (SegAN's classes are judged each by
            itself). (B, H, W) or (B, K, H, W) of a batch, a list of a list.

        Raises:
            UserError: in one line: no image, an unreadable one, a shape, type or range that is none
                of an image's.
        """
        how = self._probabilities if probabilities else self._mask
        with _computing_with(self.threads):
            if isinstance(image, list | tuple):
                return [self._one(part, how, f"image {n}") for n, part in enumerate(image)]
            if isinstance(image, Tensor) and image.ndim == 4:
                if not len(image):
                    raise UserError(f"a batch without images (its shape is {tuple(image.shape)})")
                return np.stack(
                    [self._one(part, how, f"image {n}") for n, part in enumerate(image)]
                )
            return self._one(image, how, "the image")

    def __repr__(self) -> str:
        runs, names = ", ".join(map(str, self.runs)), ", ".join(self.class_names)
        return f"Model({runs}: {names}; on {self.device})"

    def _one(
        self, given: Any, how: Callable[[NDArray[np.uint8], str], NDArray[Any]], name: str
    ) -> NDArray[Any]:
        name = str(given) if isinstance(given, str | PathLike) else name
        return how(as_image(given, self.channels, name), name)

    def _mask(self, image_CHW: NDArray[np.uint8], name: str) -> NDArray[Any]:
        found = probabilities(self.ensemble, image_CHW, name)
        return decided(self.ensemble, found, image_CHW.shape[1:])

    def _probabilities(self, image_CHW: NDArray[np.uint8], name: str) -> NDArray[Any]:
        found = probabilities(self.ensemble, image_CHW, name)
        return enlarged(self.ensemble, found, image_CHW.shape[1:])


def load(
    runs: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    weights: str = "best",
    device: str | torch.device = "auto",
    k: float | None = None,
    threshold: float | None = None,
    tta: str | None = None,
    threads: int | None = None,
    trust: bool = False,
) -> Model:
    """A trained model from a run directory, or an ensemble from several.

    As ``mlseg.predict`` does it: an ensemble averages probabilities, and what ``mlseg.calibrate``
    chose for exactly these weights is used.

    Args:
        runs: a directory, or a list of them, of runs with the same classes and image size.
        weights: ``best`` (chosen on validation data) or ``last``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        k: temperature; None: the calibrated or the run's own.
        threshold: of the foreground's probability; None: the same.
        tta: ``flips`` averages over the eight flips and quarter turns of each image.
        threads: of the processor; None: what the environment says, or else as many as the first run
            began with, as the command has it. Torch's own number is put back after each call.
        trust: import the modules that the runs name; without, a run that needs any is refused.

    Raises:
        UserError: in one line: no such run, one without a segmentor or without these weights, a
            damaged one, or runs that don't fit together.
    """
    named = [runs] if isinstance(runs, str | PathLike) else list(runs)
    if not named:
        raise UserError("load: no run is named; give a run directory or a list of them")
    for entry in named:
        if not isinstance(entry, str | PathLike):
            raise UserError(f"load: {entry!r} is no path; give a run directory or a list of them")
    if weights not in ("best", "last"):
        raise UserError(f"load: weights: {weights!r} is neither best nor last")
    if tta not in (None, "flips"):
        raise UserError(f"load: tta: {tta!r} is neither flips nor None")
    if k is not None and not 0 < k < float("inf"):
        raise UserError(f"load: k: {k} isn't above 0")
    if threshold is not None and not 0 < threshold < 1:
        raise UserError(f"load: threshold: {threshold} doesn't lie between 0 and 1")
    paths = [reachable(Path(entry)) for entry in named]
    try:
        with strangers(trust):
            ensemble = load_runs(paths, choose_device(device), weights)
            chosen = run_threads(paths[0], threads)
        made = replace(calibrated(ensemble, k, threshold), flips=tta == "flips")
        return Model(made, chosen.number)
    except UserError as error:
        text = str(error)
        for flag, argument in _ARGUMENTS.items():
            text = text.replace(flag, argument)
        raise UserError(text) from None


_ARGUMENTS = {
    "--weights last": 'weights="last"',
    "--trust, which": "trust=True, which",
    "--threshold": "threshold=",
}
"""What mends of commands are called here."""


@contextmanager
def _computing_with(threads: int) -> Iterator[None]:
    """Within this block torch has as many threads of the processor."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
