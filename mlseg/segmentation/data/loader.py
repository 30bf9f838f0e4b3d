"""Batches, assembled and augmented on the device; an order that can be saved and resumed."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mlseg import parallel
from mlseg.checkpoint import require_form
from mlseg.errors import UserError
from mlseg.segmentation.data.augmentation import Augmentation
from mlseg.segmentation.data.samples import Samples, to_float
from mlseg.transfer import to_device


class BatchLoader:
    """Batches of (image, mask); one pass is one epoch.

    ``for image_BCHW, mask_BHW in loader`` gives float32 images in [-1, 1] and int64 class indices
    on `device`. The uint8 examples lie on the device and a batch is an index into them, so that no
    worker processes are needed; memory-mapped examples are gathered on the host and copied. On
    CUDA nothing waits for the device.

    Order and augmentation draw from a CPU generator of the loader's own: they are the same on every
    device, and independent of what else draws random numbers. `state_dict` after the k-th batch of
    an epoch and `load_state_dict` into a new loader give batch k + 1 and all later ones exactly.

    Several processes draw the same order and the same augmentation, and each gives its share of
    every batch: `batch_size` is that of all of them.

    Each ``iter()`` starts a new epoch and ends the one before, except the first after
    `load_state_dict`, which goes on where the state was taken (after an epoch's last batch: it ends
    at once, as the iterator of the saved run would have done next).

    Args:
        samples: at least one example.
        batch_size: more than there are examples means batches of all examples.
        device: where the batches are wanted.
        shuffle: a new order in each epoch; False keeps the order of `samples`.
        seed: of order and augmentation.
        augmentation: drawn anew for each example of each batch.
        drop_last: leave out a last batch smaller than the others; by default when shuffling (in
            training, where a batch of one upsets batch statistics), never in evaluation.

    Raises:
        UserError: no examples; a batch size below 1; batches that several processes can't share
            equally.
    """

    shared_out = True

    def __init__(
        self,
        samples: Samples,
        batch_size: int,
        device: torch.device | str = "cpu",
        shuffle: bool = True,
        seed: int = 0,
        augmentation: Augmentation | None = None,
        drop_last: bool | None = None,
    ) -> None:
        if len(samples) == 0:
            raise UserError(f"{samples.spec.name}: no examples to make batches of")
        if batch_size < 1:
            raise UserError(f"batch size must be at least 1, got {batch_size}")
        self.samples = samples
        self.batch_size = min(batch_size, len(samples))
        self.device = torch.device(device)
        self.shuffle = shuffle
        self.augmentation = augmentation
        self.drop_last = shuffle if drop_last is None else drop_last
        parallel.require_equal_parts(self.batch_size, f"{samples.spec.name}: the batch size")
        if not self.drop_last:
            rest = len(samples) % self.batch_size
            parallel.require_equal_parts(rest, f"{samples.spec.name}: the last batch")
        self.generator = torch.Generator().manual_seed(seed)
        self.epoch = 0  # of the running pass, counted from 1
        self._order = torch.arange(len(samples))
        self._position = 0  # examples of this epoch already given out
        self._go_on = False

    def __len__(self) -> int:
        """Batches per epoch."""
        whole, left = divmod(len(self.samples), self.batch_size)
        return whole if self.drop_last or not left else whole + 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if not self._go_on:
            self.epoch += 1
            self._position = 0
            self._order = (
                torch.randperm(len(self.samples), generator=self.generator)
                if self.shuffle
                else torch.arange(len(self.samples))
            )
        self._go_on = False
        return self._batches(self.epoch)

    def sibling(self) -> "BatchLoader":
        """Another loader of the same examples, in an order of its own that this seed implies."""
        made = copy.copy(self)
        made.generator = torch.Generator().manual_seed(self.generator.initial_seed() ^ 1)
        made.epoch, made._position, made._go_on = 0, 0, False
        return made

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        end = len(self) * self.batch_size if self.drop_last else len(self.samples)
        while self._position < end:
            assert epoch == self.epoch, "a later iter() of this loader has ended this epoch"
            indices = self._order[self._position : self._position + self.batch_size]
            self._position += len(indices)
            yield self._batch(indices)

    def _batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        part = parallel.part(len(indices))
        indices = indices[part.span]
        if self.samples.mapped:
            image = to_device(self.samples.images[indices], self.device)
            mask = to_device(self.samples.masks[indices], self.device)
        else:
            images, masks = self.samples.on(self.device)
            on_device = to_device(indices, self.device)
            image, mask = images[on_device], masks[on_device]
        image, mask = to_float(image), mask.to(torch.int64)
        if self.augmentation is not None:
            image, mask = self.augmentation(image, mask, self.generator, part)
        return image, mask

    def state_dict(self) -> dict[str, Any]:
        """Order, position and generator; tensors and integers only."""
        return {
            "examples": len(self.samples),
            "batch_size": self.batch_size,
            "epoch": self.epoch,
            "order": self._order.clone(),
            "position": self._position,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            UserError: the state is of a loader with other examples or another batch size.
        """
        for key, mine in (("examples", len(self.samples)), ("batch_size", self.batch_size)):
            if state[key] != mine:
                raise UserError(
                    f"{self.samples.spec.name}: the saved data order has {key} = {state[key]}, "
                    f"this run has {mine}; resume with the config of the saved run"
                )
        for key in ("epoch", "position"):
            require_form(0, state[key], key)
        require_form(self._order, state["order"], "order")
        if not state["order"].sort().values.equal(torch.arange(len(self.samples))):
            raise UserError(
                f"{self.samples.spec.name}: the saved data order is none of "
                f"{len(self.samples)} examples; start the run again"
            )
        self.epoch = state["epoch"]
        self._order = state["order"].cpu().clone()
        self._position = state["position"]
        self.generator.set_state(state["generator"].cpu())
        self._go_on = self.epoch > 0  # a loader saved before its first epoch has nothing to go on
