"""Predictions counted against masks, at the network's size or at each mask's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlseg.data import Samples, to_float
from mlseg.metrics import SegmentationMetrics
from mlseg.nets import class_probabilities, decide

SCORING_BATCH = 16

Predict = Callable[[Tensor], Tensor]
"""(B, C, H, W) images in [-1, 1] to (B, K, H, W) class probabilities."""


@torch.no_grad()
def predict(segmentor: nn.Module, image_BCHW: Tensor, autocast: bool = False) -> Tensor:
    """Class probabilities by a network as it is, in float32.

    Args:
        autocast: run in bfloat16 where that is safe.
    """
    with torch.autocast(image_BCHW.device.type, torch.bfloat16, enabled=autocast):
        logits = segmentor(image_BCHW)
    return class_probabilities(segmentor, logits)


@contextmanager
def evaluating(segmentor: nn.Module) -> Iterator[None]:
    """Within this block the network is in evaluation mode; its mode is put back."""
    mode = segmentor.training
    segmentor.eval()
    try:
        yield
    finally:
        segmentor.train(mode)


def resized(probabilities_BKHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Class probabilities at another size, (H', W'), bilinearly: before a decision, not after."""
    if tuple(probabilities_BKHW.shape[-2:]) == size:
        return probabilities_BKHW
    return functional.interpolate(probabilities_BKHW, size, mode="bilinear", align_corners=False)


def predictions(
    by: Predict, samples: Samples, device: torch.device, batch_size: int = SCORING_BATCH
) -> Iterator[tuple[slice, Tensor]]:
    """Class probabilities of all samples at their size, batch by batch, and which they are of."""
    for start in range(0, len(samples), batch_size):
        span = slice(start, start + batch_size)
        yield span, by(to_float(samples.images[span].to(device)))


@torch.no_grad()
def score(
    by: Predict,
    samples: Samples,
    device: torch.device | str,
    *,
    threshold: float = 0.5,
    native: bool = False,
    distances: bool = False,
    batch_size: int = SCORING_BATCH,
) -> SegmentationMetrics:
    """Count predictions over ``samples``.

    Args:
        by: what predicts.
        samples: at least one example.
        threshold: of the foreground's probability; see ``decide``.
        native: count at the size of each mask's file: probabilities are upsampled, then decided.
            Otherwise at the samples' size, against masks resized to it.
        distances: measure HD95 too, in pixels of the size that is counted at.
    """
    device = torch.device(device)
    spec = samples.spec
    metrics = SegmentationMetrics(spec.num_classes, spec.ignore_index, spec.classes, distances)
    masks = samples.native_masks() if native and samples.native_mask is not None else None
    for span, found in predictions(by, samples, device, batch_size):
        ids = samples.ids[span]
        if masks is None:
            metrics.update(decide(found, threshold), samples.masks[span].to(device), ids)
            continue
        for name, own in zip(ids, found, strict=True):
            mask = next(masks).to(device)
            at_size = resized(own[None], (mask.shape[0], mask.shape[1]))
            metrics.update(decide(at_size, threshold), mask[None], [name])
    return metrics
