"""Data sets, splits, caches, augmentation, synthetic stand-ins.

    data = load_data(settings)              # SegmentationData: train, val, test, and what they are
    loader = BatchLoader(data.train, 4, "cuda", augmentation=Augmentation(augmentation_settings))
    for image_BCHW, mask_BHW in loader: ...

A data set is one entry of `mlseg.data.catalog.CATALOG`; `python -m mlseg.data` lists and fetches
them.
"""

from mlseg.data.augmentation import Augmentation, AugmentationSettings
from mlseg.data.loader import BatchLoader
from mlseg.data.samples import DatasetSpec, Samples, to_float, to_uint8
from mlseg.data.synthetic import synthetic_lesions

__all__ = [
    "Augmentation",
    "AugmentationSettings",
    "BatchLoader",
    "DatasetSpec",
    "Samples",
    "synthetic_lesions",
    "to_float",
    "to_uint8",
]
