"""Whether probabilities are what they say: how often the chosen class is right, by its probability.

Source: Guo, Pleiss, Sun and Weinberger, "On calibration of modern neural networks", ICML 2017,
section 2 (reliability diagrams, expected calibration error), with pixels as examples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlseg import parallel

BINS = 20
_SCALE = 2**20
"""Probabilities are summed as whole numbers: the sum doesn't depend on the order."""
_PIXELS = 2**18
"""Of an image that are counted at most, evenly spaced: a photograph has many million."""


class Reliability:
    """Counts pixels by the probability of the class that was chosen for them, on their device.

    Args:
        ignore_index: label of pixels that don't count, or None.
    """

    def __init__(self, ignore_index: int | None = None) -> None:
        self.ignore_index = ignore_index
        self._sums: Tensor | None = None

    @torch.no_grad()
    def update(self, probabilities_BKHW: Tensor, labels_BHW: Tensor, target_BHW: Tensor) -> None:
        """Count a batch, without host synchronisation.

        Args:
            probabilities_BKHW: (B, K, H, W) class probabilities.
            labels_BHW: (B, H, W) the class chosen by them.
            target_BHW: (B, H, W) class indices or the ignore index.
        """
        height, width = labels_BHW.shape[-2:]
        step = 1
        while -(-height // step) * -(-width // step) > _PIXELS:
            step += 1
        found, labels, target = (
            each[..., ::step, ::step] for each in (probabilities_BKHW, labels_BHW, target_BHW)
        )
        labels = labels.long()
        own = found.gather(1, labels[:, None])[:, 0].float().clamp(0, 1)
        index = (own * BINS).long().clamp(max=BINS - 1)
        if self.ignore_index is not None:  # one spare bin for what doesn't count
            index = torch.where(target == self.ignore_index, BINS, index)
        rows = torch.stack(
            [torch.ones_like(index), (own * _SCALE).round().long(), (labels == target).long()]
        ).flatten(1)
        if self._sums is None:
            self._sums = torch.zeros(3, BINS + 1, dtype=torch.int64, device=labels.device)
        self._sums.scatter_add_(1, index.flatten().expand(3, -1), rows)

    def join(self) -> None:
        """Add up what several processes have counted."""
        if parallel.several():
            found = parallel.gather(None if self._sums is None else self._sums.cpu())
            counted = [sums for sums in found if sums is not None]
            self._sums = torch.stack(counted).sum(0) if counted else None

    def compute(self) -> dict[str, Any]:
        """Of each bin pixels, mean probability and the share that is right; and the error.

        Returns:
            "pixels", "confidence", "accuracy": `BINS` figures each, the latter two None in an empty
            bin; "ece": sum over bins of their share of the pixels times |confidence - accuracy|,
            None without a pixel.
        """
        sums = [[0] * BINS] * 3 if self._sums is None else self._sums[:, :BINS].tolist()
        rows = list(zip(*sums, strict=True))
        confidence = [total / _SCALE / n if n else None for n, total, _ in rows]
        accuracy = [right / n if n else None for n, _, right in rows]
        total = sum(sums[0])
        gaps = sum(abs(summed / _SCALE - right) for _, summed, right in rows)
        return {
            "pixels": sums[0],
            "confidence": confidence,
            "accuracy": accuracy,
            "ece": gaps / total if total else None,
        }
