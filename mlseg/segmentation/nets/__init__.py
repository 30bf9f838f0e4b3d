"""Networks, a file each, and the segmentors by name.

`SegmentorSettings` is what a config says about a segmentor, `build_segmentor` makes it, and
`segmentor_names` lists what can be named; `class_probabilities` and `decide` turn its logits into
a prediction.
"""

import torch
from torch import Tensor, nn

from mlseg.segmentation.nets.segmentor import (
    SEGMENTORS,
    SegmentorSettings,
    build_segmentor,
    described,
    segmentor_names,
)


def class_probabilities(segmentor: nn.Module, logits_BKHW: Tensor) -> Tensor:
    """(B, K, H, W) logits -> probability of every class: the softmax; in float32 or wider.

    A network with a method ``probabilities`` says itself what they are (SegAN's logistic per map).
    """
    own = getattr(segmentor, "probabilities", None)
    logits = logits_BKHW.to(torch.promote_types(logits_BKHW.dtype, torch.float32))
    return logits.softmax(1) if own is None else own(logits)


def decide(probabilities_BKHW: Tensor, threshold: float = 0.5) -> Tensor:
    """(B, K, H, W) class probabilities -> (B, H, W) class indices.

    Two classes: the foreground where its probability exceeds `threshold`. More: the most probable
    one, whatever the threshold.
    """
    if probabilities_BKHW.shape[1] == 2:
        return (probabilities_BKHW[:, 1] > threshold).long()
    return probabilities_BKHW.argmax(1)


__all__ = [
    "SEGMENTORS",
    "SegmentorSettings",
    "build_segmentor",
    "class_probabilities",
    "decide",
    "described",
    "segmentor_names",
]
