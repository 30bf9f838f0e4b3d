"""What a final evaluation leaves for those who look at a run: ``evaluation.json``.

Of every split and weights the images with their scores and sizes, the classes, intervals, and how
reliable the probabilities are; of the headline ones also pictures of the images that went worst and
best. ``results.json`` has the scores themselves; this file may be missing, or removed.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mlseg.files import write_text
from mlseg.segmentation import intervals
from mlseg.segmentation.data import DatasetSpec, Samples, to_float
from mlseg.segmentation.metrics import SegmentationMetrics, class_scores
from mlseg.segmentation.nets import decide
from mlseg.segmentation.pictures import (
    chosen_probability,
    colour,
    heat,
    overlay,
    probability_of,
    to_rgb,
)
from mlseg.segmentation.reliability import Reliability
from mlseg.segmentation.scoring import Predict

EVALUATION = "evaluation.json"
PICTURED = 24
"""Images with a picture: half of them the worst, half the best."""
SIDE = 192
"""Pixels of a panel's longer side."""
_GAP = 4
_QUALITY = 85
_CLASS_SCORES = ("jaccard", "dice", "sensitivity", "specificity", "precision")


def figures(metrics: SegmentationMetrics, reliability: Reliability | None) -> dict[str, Any]:
    """Of one split by one model: plain values.

    Returns:
        "images": their ids; "size": of each the share of its counted pixels that is no background;
        "scores": of each; "classes": per class its pooled scores and in how many images it is;
        "intervals": of means over images and of the mIoU; "reliability", where it was counted.
    """
    ids, confusion = metrics.counted()
    per_image = metrics.per_image()
    names = list(next(iter(per_image.values())))
    columns = {name: [per_image[image][name] for image in ids] for name in names}
    pixels = confusion.sum((1, 2))
    return {
        "images": ids,
        "size": (1 - confusion[:, 0].sum(1) / pixels).tolist(),
        "scores": columns,
        "classes": classes(confusion, metrics.classes),
        "intervals": spans(metrics),
        **({} if reliability is None else {"reliability": reliability.compute()}),
    }


def spans(metrics: SegmentationMetrics) -> dict[str, list[float]]:
    """95 % intervals of means over images and of the mIoU, by name; of one image there are none."""
    (ids, confusion), per_image = metrics.counted(), metrics.per_image()
    names = next(iter(per_image.values()))
    found = {name: intervals.of_mean([per_image[i][name] for i in ids]) for name in names}
    found["miou"] = intervals.of_pooled_miou(confusion.numpy())
    return {name: list(pair) for name, pair in found.items() if pair is not None}


def classes(confusion_NKK: Tensor, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Scores of every class, pooled over all images, and the images whose truth shows it."""
    pooled = class_scores(confusion_NKK.sum(0)[None])
    shown = (confusion_NKK.sum(2) > 0).sum(0).tolist()
    return {
        name: {
            **{score: float(pooled[score][0, index]) for score in _CLASS_SCORES},
            "images": shown[index],
        }
        for index, name in enumerate(names)
    }


@torch.no_grad()
def pictures(
    by: Predict,
    samples: Samples,
    values: Mapping[str, float],
    device: torch.device | str,
    threshold: float,
) -> dict[str, str]:
    """JPEGs of the worst and the best images, in base64, by id.

    Side by side: the image with the true outline and the prediction, the truth of more classes than
    two, the probabilities.

    Args:
        values: the score of each image, by id.
    """
    places = {name: place for place, name in enumerate(samples.ids)}
    ranked = sorted((name for name in values if name in places), key=lambda name: values[name])
    if len(ranked) > PICTURED:
        ranked = [*ranked[: PICTURED // 2], *ranked[-PICTURED // 2 :]]
    made = {}
    for name in ranked:
        place = places[name]
        image = samples.images[place]
        found = by(to_float(image[None].to(device)))
        labels = decide(found, threshold).to("cpu", torch.uint8)[0]
        shown = chosen_probability(found[0], labels)
        made[name] = _jpeg(_panels(image, samples.masks[place], labels, shown, samples.spec))
    return made


def heads(spec: DatasetSpec) -> list[str]:
    """What the panels of :func:`pictures` show, from left to right."""
    chance = probability_of(spec)
    if spec.num_classes == 2:
        return ["image", "prediction (blue) and outline of the truth (orange)", chance]
    return ["image", "truth", "prediction over the image", chance]


def _panels(
    image_CHW: Tensor, truth_HW: Tensor, labels_HW: Tensor, shown_HW: Any, spec: DatasetSpec
) -> Image.Image:
    rgb, size = to_rgb(image_CHW), _fitted(truth_HW.shape[0], truth_HW.shape[1])
    image = np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BICUBIC))
    truth, labels = (
        np.asarray(Image.fromarray(each.numpy()).resize(size, Image.Resampling.NEAREST))
        for each in (truth_HW, labels_HW)
    )
    warm = Image.fromarray(heat(shown_HW)).resize(size, Image.Resampling.BILINEAR)
    panels = [image]
    if spec.num_classes > 2:
        panels.append(colour(truth, spec.palette))
    panels += [overlay(image, labels, spec.palette, truth, width=2), np.asarray(warm)]
    width, height = size
    sheet = Image.new("RGB", (len(panels) * (width + _GAP) - _GAP, height), "white")
    for index, panel in enumerate(panels):
        sheet.paste(Image.fromarray(panel), (index * (width + _GAP), 0))
    return sheet


def _fitted(height: int, width: int) -> tuple[int, int]:
    """(W, H) whose longer side is `SIDE`."""
    times = SIDE / max(height, width)
    return max(1, round(width * times)), max(1, round(height * times))


def _jpeg(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=_QUALITY)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def write(directory: Path, record: Mapping[str, Any]) -> None:
    """Write the file, whole or not at all.

    Raises:
        RunError: it can't be written.
    """
    write_text(directory / EVALUATION, json.dumps(record) + "\n")
