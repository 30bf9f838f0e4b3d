"""Decoded examples as two uint8 tensors, in memory or memory-mapped."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mlseg.segmentation.data.placement import Fit


@dataclass(frozen=True)
class DatasetSpec:
    """What a data set is, apart from its files.

    Attributes:
        name: as in a config.
        channels: 3 (RGB) or 1 (grey).
        classes: names in the order of their indices; for a binary task background, foreground.
        ignore_index: value in masks that neither losses nor metrics count, or None.
        metric: "jaccard" or "dice", the figure that is usually reported for this set.
        palette: an RGB triple, 0 to 255, for each class, for pictures.
    """

    name: str
    channels: int
    classes: tuple[str, ...]
    ignore_index: int | None = None
    metric: str = "jaccard"
    palette: tuple[tuple[int, int, int], ...] = ((0, 0, 0), (255, 255, 255))

    @property
    def num_classes(self) -> int:
        return len(self.classes)


_SHAPES_ALONE: ContextVar[bool] = ContextVar("_SHAPES_ALONE", default=False)


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Within this block no image is read or drawn: :func:`blank` ones stand in for all."""
    token = _SHAPES_ALONE.set(True)
    try:
        yield
    finally:
        _SHAPES_ALONE.reset(token)


def wants_shapes_alone() -> bool:
    """Whether the shapes of images are all that is asked for."""
    return _SHAPES_ALONE.get()


@dataclass(frozen=True)
class Samples:
    """Image and mask pairs of one size.

    Attributes:
        ids: N names.
        images: (N, C, H, W) uint8, 0 to 255.
        masks: (N, H, W) uint8, class indices or the ignore index.
        spec: of the data set they come from.
        mapped: whether the tensors are memory-mapped files, larger than should be held in memory.
        fit: how files of other shapes were, or would be, brought to that size.
        native_mask: reads the mask of one example, by its place, at its own size, (H', W') uint8;
            None where the masks have no other size than that of `masks`.
    """

    ids: list[str]
    images: Tensor
    masks: Tensor
    spec: DatasetSpec
    mapped: bool = False
    fit: Fit = "stretch"
    native_mask: Callable[[int], Tensor] | None = field(default=None, repr=False, compare=False)
    _copies: dict[torch.device, tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        assert self.images.dtype == self.masks.dtype == torch.uint8
        assert len(self.ids) == len(self.images) == len(self.masks)
        assert self.images.shape[1] == self.spec.channels
        assert self.images.shape[2:] == self.masks.shape[1:]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.images.shape[2], self.images.shape[3]

    def subset(self, indices: Sequence[int]) -> "Samples":
        """The examples at `indices`, copied, in that order."""
        chosen = torch.as_tensor(list(indices), dtype=torch.int64)
        places = chosen.tolist()
        read = self.native_mask
        return replace(
            self,
            ids=[self.ids[index] for index in places],
            images=self.images[chosen],
            masks=self.masks[chosen],
            mapped=False,
            native_mask=None if read is None else lambda index: read(places[index]),
        )

    def native_masks(self) -> Iterator[Tensor]:
        """The masks at their own sizes, in order, (H', W') uint8; read ahead on several threads.

        Raises:
            UserError: a file can't be read any more.
        """
        if self.native_mask is None:
            yield from self.masks
            return
        workers = min(8, os.cpu_count() or 1)
        waiting: deque[Future[Tensor]] = deque()
        with ThreadPoolExecutor(workers) as pool:
            for index in range(len(self)):
                waiting.append(pool.submit(self.native_mask, index))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`images` and `masks` on a device; copied there once, however many loaders share them."""
        if device.type == "cpu":
            return self.images, self.masks
        if device not in self._copies:
            self._copies[device] = self.images.to(device), self.masks.to(device)
        return self._copies[device]


def to_float(images: Tensor) -> Tensor:
    """uint8, 0 to 255, to float32 in [-1, 1]: the range of every image that a network sees."""
    return images.to(torch.float32).div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """The inverse of `to_float`, rounding, for files and pictures; clips what lies outside."""
    return images.detach().add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def blank(ids: Sequence[str], spec: DatasetSpec, size: tuple[int, int], fit: Fit) -> Samples:
    """Black images with stripes of all classes for masks, all of them in the memory of one."""
    height, width = size
    image = torch.zeros((1, spec.channels, height, width), dtype=torch.uint8)
    mask = (torch.arange(height * width) % spec.num_classes).to(torch.uint8)
    count = len(ids)
    return Samples(
        list(ids),
        image.expand(count, -1, -1, -1),
        mask.view(1, height, width).expand(count, -1, -1),
        spec,
        fit=fit,
    )
