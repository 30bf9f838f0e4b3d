"""Predictions counted against masks, at the network's size or at each mask's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlseg import parallel
from mlseg.errors import RunError
from mlseg.precision import full
from mlseg.segmentation.data import Fit, Samples, placed, to_float
from mlseg.segmentation.metrics import SegmentationMetrics
from mlseg.segmentation.nets import decide

SCORING_BATCH = 16
_AT_ONCE = 2**27
"""Probabilities of one image that are held at once: 512 MiB."""

Predict = Callable[[Tensor], Tensor]
"""(B, C, H, W) images in [-1, 1] to (B, K, H, W) class probabilities."""

Seen = Callable[[Tensor, Tensor, Tensor], None]
"""Told of (B, K, H, W) class probabilities, the (B, H, W) labels chosen by them, and the masks."""


@torch.no_grad()
def predict_logits(
    segmentor: nn.Module,
    image_BCHW: Tensor,
    window: tuple[int, int] | None = None,
    autocast: bool = False,
) -> Tensor:
    """Logits by a network as it is, (B, K, H, W), in float32 or wider.

    A network that was trained on windows of its images has only ever seen that size, and does badly
    on another. Larger images pass in as few windows as cover
    them, evenly spaced; where these overlap, their logits are averaged.

    Args:
        image_BCHW: in [-1, 1].
        window: (h, w) in pixels, no larger than the image; None: the whole image at once.
        autocast: run in bfloat16 where that is safe.
    """

    def passed(part: Tensor) -> Tensor:
        with torch.autocast(part.device.type, torch.bfloat16, enabled=autocast):
            logits = segmentor(part)
        return full(logits)

    height, width = image_BCHW.shape[-2:]
    if window is None or window == (height, width):
        return passed(image_BCHW)
    total: Tensor | None = None
    number = torch.zeros(height, width, device=image_BCHW.device)
    for rows, columns in windows((height, width), window):
        logits = passed(image_BCHW[..., rows, columns])
        if total is None:
            total = logits.new_zeros(*logits.shape[:2], height, width)
        total[..., rows, columns] += logits
        number[rows, columns] += 1
    assert total is not None
    return total / number


def windows(size: tuple[int, int], window: tuple[int, int]) -> list[tuple[slice, slice]]:
    """Rows and columns of the fewest windows that cover an image, evenly spaced."""
    return [
        (slice(top, top + window[0]), slice(left, left + window[1]))
        for top in _starts(size[0], window[0])
        for left in _starts(size[1], window[1])
    ]


def _starts(side: int, window: int) -> list[int]:
    """First pixels of the fewest windows that cover a side."""
    last = -(-side // window) - 1
    return [round(index * (side - window) / max(last, 1)) for index in range(last + 1)]


@contextmanager
def evaluating(segmentor: nn.Module) -> Iterator[None]:
    """Within this block the network is in evaluation mode; its mode is put back."""
    mode = segmentor.training
    segmentor.eval()
    try:
        yield
    finally:
        segmentor.train(mode)


def at_native(probabilities_BKHW: Tensor, native: tuple[int, int], fit: Fit) -> Tensor:
    """Class probabilities at an image's own size: before a decision, not after.

    What predicts padding is cut away first; the rest is resized bilinearly.

    Args:
        native: (H', W') in pixels, of the image or its mask.
        fit: how the image was brought to the size of the probabilities.

    Returns:
        (B, K, H', W').
    """
    size = probabilities_BKHW.shape[-2], probabilities_BKHW.shape[-1]
    height, width = placed(native, size, fit)
    found = probabilities_BKHW[..., :height, :width]
    if (height, width) == native:
        return found
    return functional.interpolate(found, native, mode="bilinear", align_corners=False)


def label_map(
    probabilities_1KHW: Tensor, native: tuple[int, int], fit: Fit, threshold: float
) -> Tensor:
    """The decision about one image at its own size: ``decide(at_native(...))``.

    Of a large image class by class, in memory for two of them; that may differ in the last place of
    probabilities, and so where two classes are as probable.

    Args:
        native, fit: as of :func:`at_native`.
        threshold: as of :func:`decide`.

    Returns:
        (H', W') uint8 class indices.
    """
    if probabilities_1KHW.shape[1] * native[0] * native[1] <= _AT_ONCE:
        return decide(at_native(probabilities_1KHW, native, fit), threshold)[0].to(torch.uint8)
    if probabilities_1KHW.shape[1] == 2:
        foreground = at_native(probabilities_1KHW[:, 1:], native, fit)[0, 0]
        return (foreground > threshold).to(torch.uint8)
    highest = at_native(probabilities_1KHW[:, :1], native, fit)[0, 0]
    found = torch.zeros(native, dtype=torch.uint8, device=highest.device)
    for index in range(1, probabilities_1KHW.shape[1]):
        other = at_native(probabilities_1KHW[:, index : index + 1], native, fit)[0, 0]
        found[other > highest] = index
        highest = torch.maximum(highest, other)
    return found


def predictions(
    by: Predict, samples: Samples, device: torch.device, batch_size: int = SCORING_BATCH
) -> Iterator[tuple[slice, Tensor]]:
    """Class probabilities of all samples at their size, batch by batch, and which they are of.

    Of several processes each has its part of the samples.

    Raises:
        RunError: after the last batch, some were NaN or infinite: a class is no answer to that.
    """
    total = torch.zeros((), device=device)
    own = parallel.part(len(samples))
    for start in range(own.start, own.stop, batch_size):
        span = slice(start, min(start + batch_size, own.stop))
        found = by(to_float(samples.images[span].to(device)))
        total = total + found.sum()
        yield span, found
    if not all(parallel.gather(bool(total.isfinite()))):
        raise RunError(
            f"the network's class probabilities for images of {samples.spec.name} are not finite; "
            "try a lower learning rate, or precision: fp32"
        )


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
    seen: Seen | None = None,
) -> SegmentationMetrics:
    """Count predictions over ``samples``; several processes share them out, and all get the whole.

    Args:
        by: what predicts.
        samples: at least one example.
        threshold: of the foreground's probability; see ``decide``.
        native: count at the size of each mask's file: probabilities are upsampled, then decided.
            Otherwise at the samples' size, against masks resized to it.
        distances: measure HD95 too, in pixels of the size that is counted at.
        seen: told of everything that is counted, at that size.
    """
    device = torch.device(device)
    spec = samples.spec
    metrics = SegmentationMetrics(spec.num_classes, spec.ignore_index, spec.classes, distances)
    masks = None
    if native and samples.native_mask is not None:
        own = parallel.part(len(samples))
        there = samples.subset(range(*own[:2])) if parallel.several() else samples
        masks = there.native_masks()

    def count(probabilities: Tensor, mask: Tensor, ids: list[str]) -> None:
        labels = decide(probabilities, threshold)
        metrics.update(labels, mask, ids)
        if seen is not None:
            seen(probabilities, labels, mask)

    for span, found in predictions(by, samples, device, batch_size):
        ids = samples.ids[span]
        if masks is None:
            count(found, samples.masks[span].to(device), ids)
            continue
        for name, own in zip(ids, found, strict=True):
            mask = next(masks).to(device)
            upsampled = at_native(own[None], (mask.shape[0], mask.shape[1]), samples.fit)
            count(upsampled, mask[None], [name])
    metrics.join()
    return metrics
