"""Batches of label maps for LoAd's discriminator: the truth, and what models of the past made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mlseg import parallel
from mlseg.checkpoint import require_form
from mlseg.engines.lookahead.map_buffer import MapBuffer
from mlseg.segmentation.data import (
    Augmentation,
    AugmentationSettings,
    Samples,
    to_float,
)
from mlseg.transfer import to_device

Batch = tuple[Tensor, Tensor, Tensor, Tensor]
"""Images (B, C, H, W) in [-1, 1]; label maps (B, H, W) int64, real or fake, with the ignore index
of the truth in both; 1 for real and 0 for fake, (B,); weights of the examples, (B,)."""


class LabelMapBatches:
    """Passes over |B| + 1 maps of every training image in random order.

    They are the truth and each of the buffer's, with real maps weighted (|B| + 1) / 2 and fake ones
    (|B| + 1) / (2 |B|), so that either side has half of the weight and a mean weight of one; so
    they have where the buffer holds a part of the images alone. An image and its maps are flipped
    together. Where training cuts windows, the hold-out's are cut at places that stay the same.

    Args:
        train, hold_out: examples.
        buffer: label maps of former models: an entry holds those of the training images ``faked``,
            then those of the hold-out.
        batch_size: maps per step.
        augmentation: of image and map together.
        device: where batches go.
        seed: of order and augmentation.
        faked: indices of training images, ascending; None: all. Of the others a pass has the truth
            alone.

    Several processes go through the same passes, and each gives its share of every batch.

    Raises:
        UserError: they can't share the batches equally.
    """

    def __init__(
        self,
        train: Samples,
        hold_out: Samples,
        buffer: MapBuffer,
        batch_size: int,
        augmentation: Augmentation,
        device: torch.device,
        seed: int,
        faked: Sequence[int] | None = None,
    ) -> None:
        chosen = set(range(len(train)) if faked is None else faked)
        key = "problems.discriminator.batch_size"
        parallel.require_equal_parts(batch_size, key)
        least = len(train) + len(chosen)  # maps of a pass with one entry
        if batch_size > least:  # a batch of all maps there are
            what = "data.train" if len(chosen) == len(train) else "data.train and fakes.fraction"
            together = len(train) if len(chosen) == len(train) else least
            parallel.require_equal_parts(together, f"{key} is larger than a pass, {what}")
        rest = [index for index in range(len(train)) if index not in chosen]
        images = torch.tensor([*sorted(chosen), *rest], dtype=torch.int64)
        # Where an entry's maps of them begin, and how many there are: of the first in an order.
        self._parts = {"train": (train, 0), "hold_out": (hold_out, len(chosen))}
        self._faked = {"train": len(chosen), "hold_out": len(hold_out)}
        self._places = {"train": images, "hold_out": torch.arange(len(hold_out))}
        self._buffer = buffer
        self._batch_size = batch_size
        self._augmentation = augmentation
        # The hold-out is seen as training is, in windows of its images where there are such.
        self._window = Augmentation(AugmentationSettings(window=augmentation.settings.window))
        self._device = device
        self._seed = seed
        self._generator = torch.Generator().manual_seed(seed)
        self._order = torch.empty(0, dtype=torch.int64)
        self._position = 0

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        return self._device

    @property
    def per_epoch(self) -> int:
        """Batches of a pass, with the buffer as it is now."""
        return max(1, self._maps("train") // self._size)

    @property
    def exhausted(self) -> bool:
        """Whether the pass is over."""
        # Whole batches alone, as in every training here: a rest of one upsets batch statistics.
        return self._position >= len(self._order) // self._size * self._size

    @property
    def held_out(self) -> int:
        """Maps of the hold-out, real and fake."""
        return self._maps("hold_out")

    @property
    def _size(self) -> int:
        return min(self._batch_size, self._maps("train"))

    def _maps(self, part: str) -> int:
        return len(self._parts[part][0]) + self._faked[part] * len(self._buffer)

    def shuffle(self) -> None:
        """Begin a pass."""
        self._order = torch.randperm(self._maps("train"), generator=self._generator)
        self._position = 0

    def next(self) -> Batch:
        """The next batch of the pass."""
        chosen = self._order[self._position : self._position + self._size]
        self._position += len(chosen)
        part = parallel.part(len(chosen))
        return self._batch("train", chosen, self._augmentation, self._generator, part)

    def of_hold_out(self) -> Iterator[Batch]:
        """All maps of the hold-out, in the same windows every time; this process's part of them."""
        places = torch.Generator().manual_seed(self._seed)
        for chosen in torch.arange(self.held_out).split(self._batch_size):
            part = parallel.part(len(chosen))
            if part.start == part.stop:
                self._window.draw(part.total, *self._parts["hold_out"][0].image_size, places)
            else:
                yield self._batch("hold_out", chosen, self._window, places, part)

    def _batch(
        self,
        split: str,
        batch: Tensor,
        augmentation: Augmentation,
        generator: torch.Generator,
        part: parallel.Part | None = None,
    ) -> Batch:
        """A part of a batch, by number: of an image the truth, then its maps by each entry.

        Args:
            part: None: all of it.
        """
        part = part or parallel.Part(0, len(batch), len(batch))
        samples, offset = self._parts[split]
        faked, images = self._faked[split], self._places[split]
        chosen = batch[part.span]
        sets = len(self._buffer) + 1
        has_maps = chosen < faked * sets
        place = torch.where(has_maps, chosen // sets, chosen - faked * (sets - 1))
        which = torch.where(has_maps, chosen % sets, 0)
        image_index = images[place]
        truth = samples.masks[image_index]
        labels, fake = truth.clone(), which > 0
        if fake.any():
            maps = self._buffer.gather(which[fake] - 1, place[fake] + offset)
            ignore = samples.spec.ignore_index
            # Ignored pixels are ignored on both sides: they mustn't tell real from fake.
            ignored = torch.zeros_like(maps, dtype=torch.bool)
            if ignore is not None:
                ignored = truth[fake] == ignore
            labels[fake] = torch.where(ignored, truth[fake], maps)
        real = (~fake).float()
        maps_in_all, fakes = self._maps(split), max(faked * (sets - 1), 1)
        weights = torch.where(fake, maps_in_all / (2 * fakes), maps_in_all / (2 * len(samples)))
        image = to_float(to_device(samples.images[image_index], self._device))
        label = to_device(labels, self._device).to(torch.int64)
        image, label = augmentation(image, label, generator, part)
        return image, label, to_device(real, self._device), to_device(weights.float(), self._device)

    def state_dict(self) -> dict[str, Any]:
        """Where the pass is."""
        return {
            "order": self._order.clone(),
            "position": self._position,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        require_form(0, state["position"], "position")
        if not isinstance(state["order"], Tensor) or state["order"].dtype != torch.int64:
            raise ValueError("order is no list of places")
        self._order = state["order"]
        self._position = state["position"]
        self._generator.set_state(state["generator"])
