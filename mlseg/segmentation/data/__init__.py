"""Data sets, splits, caches, augmentation, synthetic stand-ins.

    data = load_data(settings)              # SegmentationData: train, val, test, and what they are
    loader = BatchLoader(data.train, 4, "cuda", augmentation=Augmentation(augmentation_settings))
    for image_BCHW, mask_BHW in loader: ...

A data set is one `Entry`, in `catalog` or in a module of a user's own; `python -m mlseg.data` lists
and fetches them.
"""

from mlseg.segmentation.data.augmentation import Augmentation, AugmentationSettings
from mlseg.segmentation.data.decode import read_image, read_mask
from mlseg.segmentation.data.entry import DATA_SETS, Archive, Entry, Example, Part, data_set
from mlseg.segmentation.data.loader import BatchLoader
from mlseg.segmentation.data.placement import PADDING, Fit, padded, placed
from mlseg.segmentation.data.prepare import SegmentationData, load_data, load_examples
from mlseg.segmentation.data.samples import DatasetSpec, Samples, to_float, to_uint8
from mlseg.segmentation.data.scenes import synthetic_scenes
from mlseg.segmentation.data.settings import DataSettings
from mlseg.segmentation.data.synthetic import synthetic_lesions

__all__ = [
    "DATA_SETS",
    "PADDING",
    "Archive",
    "Augmentation",
    "AugmentationSettings",
    "BatchLoader",
    "DataSettings",
    "DatasetSpec",
    "Entry",
    "Example",
    "Fit",
    "Part",
    "Samples",
    "SegmentationData",
    "data_set",
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
