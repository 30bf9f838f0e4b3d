"""All that a prediction is, as one module of plain torch, for programs without mlseg.

Images of any size go in as bytes, probabilities and masks of that size come out: resizing or
padding, normalisation, windows, softmax and threshold are inside. It can be exported and traced
with the sizes left open: sizes enter as tensors alone, and the network sees one size only.

Images are made smaller as Pillow does it for a prediction, so that the bytes that the network sees
are the same: a triangle filter whose weights are whole multiples of 2^-22, along rows and along
columns, each pass rounded to bytes (``precompute_coeffs`` and ``ImagingResampleHorizontal_8bpc`` of
Pillow's ``Resample.c``). Older releases begin with the rows; newer ones with the columns where
these lose more than twice as many pixels, which is seen by trying.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from mlseg.precision import full
from mlseg.segmentation.data import PADDING
from mlseg.segmentation.data.given import resized
from mlseg.segmentation.nets import class_probabilities, decide
from mlseg.segmentation.scoring import windows
from mlseg.segmentation.trained import Ensemble

_UNIT = float(2**22)
"""Of Pillow's whole-numbered weights."""


class Pipeline(nn.Module):
    """A segmentor, or an ensemble, with what stands around it.

    Args:
        ensemble: runs whose networks compute in float32.
    """

    def __init__(self, ensemble: Ensemble) -> None:
        super().__init__()
        first = ensemble.first
        self.networks = nn.ModuleList(member.module for member in ensemble.members)
        # By what a chosen temperature changes the network's own.
        self.factors = [
            None if member.temperature is None else member.own_k / member.temperature
            for member in ensemble.members
        ]
        self.size, self.window, self.fit = first.image_size, first.window, first.fit
        self.threshold = ensemble.threshold
        self.chooses = _chooses()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, h, w) uint8 of any size -> (B, K, h, w) probabilities, (B, h, w) uint8 mask."""
        rows, columns = _numbers(image[0, 0, :, 0]), _numbers(image[0, 0, 0, :])
        height, width = self._placed(rows, columns)
        small = self._resized(image.to(torch.float64), rows, columns, height, width)
        if self.fit == "pad":
            inside = torch.logical_and(
                (_upto(self.size[0], image) < height).unsqueeze(1),
                _upto(self.size[1], image) < width,
            )
            small = torch.where(inside, small, float(PADDING))
        found = self._probabilities(small.to(torch.float32) / 127.5 - 1.0)
        found = _enlarged(found.transpose(-1, -2), rows, height).transpose(-1, -2)
        found = _enlarged(found, columns, width)
        return found, decide(found, self.threshold).to(torch.uint8)

    def _resized(
        self, image: Tensor, rows: Tensor, columns: Tensor, height: Tensor, width: Tensor
    ) -> Tensor:
        """(..., h, w) bytes to (..., H, W), the image in the first ``height`` and ``width``."""

        def along(image: Tensor) -> Tensor:
            return _smaller(image, columns, width, self.size[1])

        def down(image: Tensor) -> Tensor:
            turned = _smaller(image.transpose(-1, -2), rows, height, self.size[0])
            return turned.transpose(-1, -2)

        if not self.chooses:
            return down(along(image))
        lost = _count(rows) - height
        down_first = torch.logical_and(lost > 0, lost > 2.0 * (_count(columns) - width))
        return torch.where(down_first, along(down(image)), down(along(image)))

    def _placed(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Where an image lies among the network's pixels: height and width, see ``placed``."""
        size = rows.new_tensor(self.size)
        if self.fit == "stretch":
            return size[0], size[1]
        own = torch.stack([_count(rows), _count(columns)])
        scale = (size / own).min().clamp(max=1.0)
        placed = (own * scale).round().clamp(min=1.0)
        return placed[0], placed[1]

    def _probabilities(self, image: Tensor) -> Tensor:
        total = None
        for network, factor in zip(self.networks, self.factors, strict=True):
            logits = self._logits(network, image)
            logits = logits if factor is None else logits * factor
            one = class_probabilities(network, logits)
            total = one if total is None else total + one
        assert total is not None
        return total / len(self.networks)

    def _logits(self, network: nn.Module, image: Tensor) -> Tensor:
        """As ``predict_logits``, with all windows in one batch."""
        if self.window is None or self.window == self.size:
            return full(network(image))
        places = windows(self.size, self.window)
        parts = torch.cat([image[..., rows, columns] for rows, columns in places])
        logits = full(network(parts)).unflatten(0, (len(places), -1))
        total = torch.zeros_like(logits[0, :, :, :1, :1]).expand(-1, -1, *self.size).clone()
        number = torch.zeros(self.size, device=image.device)
        for index, (rows, columns) in enumerate(places):
            total[..., rows, columns] += logits[index]
            number[rows, columns] += 1
        return total / number


def _chooses() -> bool:
    """Whether this Pillow begins with the columns where they lose more; else always with the rows.

    A picture shows it whose bytes differ between the two orders.
    """
    rows, columns = np.mgrid[:40, :20]
    board = ((37 * rows * rows + 101 * rows * columns + 59 * columns) % 256).astype(np.uint8)[None]
    whole = resized(board, (10, 15))
    by_rows = resized(resized(board, (40, 15)), (10, 15))
    by_columns = resized(resized(board, (10, 20)), (10, 15))
    assert (by_rows != by_columns).any()
    return bool((whole == by_columns).all())


def _numbers(line: Tensor) -> Tensor:
    """0, 1, 2, ... in float64, as many as the line has pixels."""
    return torch.ones_like(line, dtype=torch.float64).cumsum(0) - 1.0


def _count(numbers: Tensor) -> Tensor:
    return numbers[-1] + 1.0


def _upto(number: int, like: Tensor) -> Tensor:
    return torch.arange(number, dtype=torch.float64, device=like.device)


def _smaller(image: Tensor, places: Tensor, length: Tensor, room: int) -> Tensor:
    """(..., w) bytes to (..., room): the first ``length`` of them, the rest 0."""
    scale = _count(places) / length
    wide = scale.clamp(min=1.0)
    target = _upto(room, image)
    centre = (target + 0.5) * scale
    weights = (1.0 - ((places - centre.unsqueeze(1) + 0.5) * (1.0 / wide)).abs()).clamp(min=0.0)
    total = weights.sum(1, keepdim=True)
    weights = weights / torch.where(total > 0, total, torch.ones_like(total))
    weights = (weights * _UNIT + 0.5).floor()
    weights = torch.where((target < length).unsqueeze(1), weights, torch.zeros_like(weights))
    summed = torch.matmul(image, weights.transpose(0, 1))  # whole numbers: exact
    return ((summed + _UNIT / 2) / _UNIT).floor().clamp(0.0, 255.0)


def _enlarged(found: Tensor, places: Tensor, length: Tensor) -> Tensor:
    """The first ``length`` of (..., W), interpolated at each of the places.

    As ``interpolate(mode="bilinear")`` does it, positions in float32 included.
    """
    scale = length.to(torch.float32) / _count(places).to(torch.float32)
    position = ((places.to(torch.float32) + 0.5) * scale - 0.5).clamp(min=0.0)
    before = torch.minimum(position.floor(), length.to(torch.float32) - 1.0)
    after = torch.minimum(before + 1.0, length.to(torch.float32) - 1.0)
    share = (position - before).clamp(0.0, 1.0)
    left = found.index_select(-1, before.to(torch.int64))
    right = found.index_select(-1, after.to(torch.int64))
    return left * (1.0 - share) + right * share
