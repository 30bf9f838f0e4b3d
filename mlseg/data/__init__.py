"""Data sets, splits, caches, augmentation, synthetic stand-ins.

    data = load_data(settings)              # SegmentationData: train, val, test, and what they are
    loader = BatchLoader(data.train, 4, "cuda", augmentation=Augmentation(augmentation_settings))
    for image_BCHW, mask_BHW in loader: ...

A data set is one entry of `mlseg.data.catalog`; `python -m mlseg.data` lists and fetches them.
"""

from mlseg.data.augmentation import Augmentation, AugmentationSettings
from mlseg.data.decode import read_image, read_mask
from mlseg.data.loader import BatchLoader
from mlseg.data.placement import PADDING, Fit, padded, placed
from mlseg.data.prepare import SegmentationData, load_data, load_examples
from mlseg.data.samples import DatasetSpec, Samples, to_float, to_uint8
from mlseg.data.scenes import synthetic_scenes
from mlseg.data.settings import DataSettings
from mlseg.data.synthetic import synthetic_lesions

__all__ = [
    "PADDING",
    "Augmentation",
    "AugmentationSettings",
    "BatchLoader",
    "DataSettings",
    "DatasetSpec",
    "Fit",
    "Samples",
    "SegmentationData",
    "load_data",
    "load_examples",
    "padded",
    "placed",
    "read_image",
    "read_mask",
    "synthetic_lesions",
    "synthetic_scenes",
    "to_float",
    "to_uint8",
]
