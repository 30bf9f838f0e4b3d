"""Networks, a file each, and the segmentors by name.

`SegmentorSettings` is what a config says about a segmentor, `build_segmentor` makes it, and
`segmentor_names` lists what can be named; `class_probabilities` and `decide` turn its logits into
a prediction.
"""

from mlseg.segmentation.nets.prediction import class_probabilities, decide, temperature
from mlseg.segmentation.nets.segmentor import (
    SEGMENTORS,
    SegmentorSettings,
    build_segmentor,
    described,
    segmentor_names,
)

__all__ = [
    "SEGMENTORS",
    "SegmentorSettings",
    "build_segmentor",
    "class_probabilities",
    "decide",
    "described",
    "segmentor_names",
    "temperature",
]
