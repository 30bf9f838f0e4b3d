"""One image of any size through trained segmentors: what predict, load and export share."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlseg.errors import UserError
from mlseg.segmentation.data import PADDING, Fit, padded, placed, to_float
from mlseg.segmentation.data.given import resized
from mlseg.segmentation.scoring import at_native, label_map
from mlseg.segmentation.trained import Ensemble


def brought(image_CHW: NDArray[np.uint8], size: tuple[int, int], fit: Fit) -> NDArray[np.uint8]:
    """An image at the size that networks were trained at, as in training.

    Bilinear, antialiased; stretched or padded.

    Args:
        image_CHW: uint8, at its own size.
        size: (H, W).
    """
    native = image_CHW.shape[1], image_CHW.shape[2]
    return padded(resized(image_CHW, placed(native, size, fit)), size, PADDING)


def probabilities(ensemble: Ensemble, image_CHW: NDArray[np.uint8], name: str = "image") -> Tensor:
    """(1, K, H, W) class probabilities of one image, at the networks' size.

    Args:
        image_CHW: uint8, at its own size.
        name: of the image, for errors.

    Raises:
        UserError: they are NaN or infinite.
    """
    device = next(ensemble.first.module.parameters()).device
    tensor = torch.from_numpy(brought(image_CHW, ensemble.first.image_size, ensemble.first.fit))
    found = ensemble.probabilities(to_float(tensor.unsqueeze(0).to(device)))
    if not found.isfinite().all():
        raise UserError(f"{name}: its class probabilities by {ensemble.first.run} are not finite")
    return found


def decided(ensemble: Ensemble, found_1KHW: Tensor, native: tuple[int, ...]) -> NDArray[np.uint8]:
    """The label map that :func:`probabilities` mean at an image's own size, (H', W')."""
    size, fit = (native[0], native[1]), ensemble.first.fit
    return label_map(found_1KHW, size, fit, ensemble.threshold).cpu().numpy()


def enlarged(
    ensemble: Ensemble, found_1KHW: Tensor, native: tuple[int, ...]
) -> NDArray[np.float32]:
    """:func:`probabilities` at an image's own size: (K, H', W') float32."""
    found = at_native(found_1KHW, (native[0], native[1]), ensemble.first.fit)
    return found[0].float().cpu().numpy()
