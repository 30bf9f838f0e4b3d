"""Drawn examples that stand in for a data set, or are one of their own."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch

from mlseg.segmentation.data.placement import Fit
from mlseg.segmentation.data.samples import DatasetSpec, Samples, blank, wants_shapes_alone
from mlseg.segmentation.data.scenes import synthetic_scenes
from mlseg.segmentation.data.synthetic import synthetic_lesions

# Synthetic examples are drawn, as others are, from a set of ids: the same for every run.
POOL = 10_000
COUNTS = {"train": 160, "val": 40, "test": 200}


def synthetic_ids(number: int) -> list[str]:
    return [f"synthetic-{index:05d}" for index in range(number)]


def draw_synthetic(
    spec: DatasetSpec, ids: Sequence[str], size: tuple[int, int], fit: Fit, seed: int
) -> Samples:
    """Lesions for two classes, scenes for more, with the channels of `spec`."""
    if wants_shapes_alone():
        return blank(ids, spec, size, fit)
    numbers = [int(name.rpartition("-")[2]) for name in ids]
    if spec.num_classes == 2 and spec.ignore_index is None:
        images, masks = synthetic_lesions(numbers, size, seed, spec.channels)
    else:
        images, masks = synthetic_scenes(
            numbers, size, spec.classes, spec.ignore_index, seed, spec.channels
        )
    return Samples(list(ids), images, masks, spec, fit=fit)


def shifted(samples: Samples) -> Samples:
    """A cast and a contrast of its own, so that a stand-in is another distribution."""
    digest = hashlib.sha256(samples.spec.name.encode()).digest()
    gain = torch.tensor([0.75 + digest[c] / 1024 for c in range(samples.spec.channels)])
    images = 20 + samples.images.float() * gain[:, None, None]
    images = images.round().clamp(0, 255).to(torch.uint8)
    return replace(samples, images=images)
