"""The mIoU on the hold-out after every update, at little more than the cost of its forward passes.

Also the label maps of many images, a batch at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from mlseg import parallel
from mlseg.errors import UserError
from mlseg.segmentation.data import Samples, to_float
from mlseg.segmentation.data.splits import seeded_order

T = TypeVar("T")

CPU_BATCH, CPU_PIXELS = 16, 2**20
"""Most images, and most pixels of them, at once on a CPU, where more of them save no time."""
CUDA_LOGITS = 2**31 // 2
"""Most logits at once on CUDA: kernels count in 32 bits, and networks pad their input."""


def hold_out_indices(ids: list[str], fraction: float, seed: int) -> list[int]:
    """A share of examples, as the hold-out is of those to validate on; drawn as splits are.

    Args:
        ids: of the examples.
        fraction: above 0, at most 1.
        seed: of the draw.

    Returns:
        indices in ascending order, at least one.
    """
    count = max(1, round(fraction * len(ids)))
    chosen = set(seeded_order(ids, seed)[:count])
    return [index for index, name in enumerate(ids) if name in chosen]


def require_every_class(samples: Samples, key: str) -> None:
    """Raise UserError if ``samples`` lack a class, or hold labels that are none.

    Args:
        key: the setting to name.
    """
    spec = samples.spec
    counts = torch.bincount(samples.masks.flatten(), minlength=256)
    strange = counts.clone()
    strange[: spec.num_classes] = 0
    if spec.ignore_index is not None:
        strange[spec.ignore_index] = 0
    if strange.any():
        raise UserError(
            f"{spec.name}: label {int(strange.nonzero()[0])} is none of the {spec.num_classes} "
            "classes; check the data set's classes and ignore_index"
        )
    missing = [spec.classes[k] for k in range(spec.num_classes) if not counts[k]]
    if missing:
        raise UserError(
            f"{key}: the hold-out of {len(samples)} images has no pixel of "
            f"{', '.join(repr(name) for name in missing)}, so its mIoU would leave that out; take "
            "a larger share, another seed or a larger image_size"
        )


class HoldOut:
    """Scores a segmentor on a fixed set of images that stay on the device.

    One pass: the forward passes, one maximum over the classes, one addition into a confusion matrix
    on the device; then the matrix is read, which is the only synchronisation. Several processes
    share the images out, and sum their matrices.

    Args:
        samples: at least one example.
        device: where the segmentor is.
        batch_size: images at once; None: on CUDA as many as fit, found by halving, else up to
            ``CPU_BATCH`` or ``CPU_PIXELS``.
        autocast: run in bfloat16 where that is safe.
    """

    def __init__(
        self,
        samples: Samples,
        device: torch.device,
        batch_size: int | None = None,
        autocast: bool = False,
    ) -> None:
        self.spec = samples.spec
        self.samples = samples
        self.device = device
        self.autocast = autocast
        self._halve = batch_size is None and device.type == "cuda"
        classes, pixels = self.spec.num_classes, math.prod(samples.image_size)
        on_cpu = min(CPU_BATCH, CPU_PIXELS // pixels)
        default = CUDA_LOGITS // (classes * pixels) if self._halve else on_cpu
        self.batch_size = min(batch_size or max(1, default), len(samples))
        self._images, masks = samples.on(device)
        # Truth K + prediction is a cell of the matrix; ignored pixels land in K spare cells.
        row = masks.to(torch.int32)
        ignored = row >= classes if self.spec.ignore_index is None else row == self._ignore
        self._rows = torch.where(ignored, classes, row) * classes
        self._one = torch.ones(1, dtype=torch.int64, device=device)

    @property
    def _ignore(self) -> int:
        assert self.spec.ignore_index is not None
        return self.spec.ignore_index

    def __len__(self) -> int:
        return len(self._images)

    @torch.no_grad()
    def miou(self, module: nn.Module) -> float:
        """Mean over the classes of the IoU pooled over the hold-out, as a fraction.

        NaN where the network's output isn't finite. The module is left in evaluation mode.
        """
        return self._as_fits(lambda: self._miou(module))

    def _as_fits(self, once: Callable[[], T]) -> T:
        """What ``once`` gives with the largest batches that fit."""
        while True:
            try:
                return once()
            except torch.OutOfMemoryError:
                if not self._halve or self.batch_size == 1:
                    raise
                self.batch_size = (self.batch_size + 1) // 2

    def _miou(self, module: nn.Module) -> float:
        module.eval()
        classes = self.spec.num_classes
        cells = torch.zeros((classes + 1) * classes, dtype=torch.int64, device=self.device)
        doubt = torch.zeros((), device=self.device)
        own = parallel.part(len(self))
        for start in range(own.start, own.stop, self.batch_size):
            highest = self.count(module, start, cells, own.stop)
            doubt += highest.float().mean()
        # One transfer for both: NaN and infinity in the outputs survive every sum.
        figures = parallel.summed(torch.cat([cells.double(), doubt.double()[None]])).cpu()
        if not math.isfinite(float(figures[-1])):
            return math.nan
        matrix = figures[: classes * classes].reshape(classes, classes)
        hit = matrix.diagonal()
        union = matrix.sum(0) + matrix.sum(1) - hit
        return float((hit / union.clamp_min(1)).mean())

    def count(
        self, module: nn.Module, start: int, cells: Tensor, stop: int | None = None
    ) -> Tensor:
        """Add one batch, up to ``stop``, to ``cells``; returns its highest logits (B, H, W)."""
        end = start + self.batch_size
        span = slice(start, end if stop is None else min(end, stop))
        highest, found = self._logits(module, self._images[span].to(self.device)).max(1)
        index = found.add_(self._rows[span].to(self.device)).flatten()
        cells.scatter_add_(0, index, self._one.expand(len(index)))
        return highest

    def _logits(self, module: nn.Module, images: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return module(to_float(images))

    @torch.no_grad()
    def maps(self, module: nn.Module, images: Tensor) -> Tensor:
        """Hard label maps of (B, C, H, W) uint8 images, (B, H, W) uint8, in evaluation mode."""
        module.eval()

        def once() -> Tensor:
            parts = images.split(self.batch_size)
            return torch.cat([self._logits(module, x.to(self.device)).argmax(1) for x in parts])

        return self._as_fits(once).to(torch.uint8)

    def maps_of_parts(self, module: nn.Module, images: Tensor) -> Tensor:
        """:meth:`maps`, shared out between several processes; all get the whole, on the CPU."""
        own = images[parallel.part(len(images)).span]
        if len(own):
            return parallel.join(self.maps(module, own))
        return parallel.join(torch.empty((0, *images.shape[-2:]), dtype=torch.uint8))

    def agree(self) -> None:
        """Several processes take the smallest of their batch sizes."""
        self.batch_size = min(parallel.gather(self.batch_size))

    def find_batch_size(self, module: nn.Module) -> None:
        """Settle ``batch_size``, which otherwise the first pass does."""
        self.maps(module, self.samples.images[: self.batch_size])
