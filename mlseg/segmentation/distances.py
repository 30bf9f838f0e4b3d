"""Exact Euclidean distances in a label map, on its device, without reading anything back.

Source: Felzenszwalb and Huttenlocher, Distance transforms of sampled functions, Theory of Computing
2012, section 2: the transform of a row of squared column distances, here by trying every shift, a
pass over the image each, which suits a GPU.
"""

import torch
from torch import Tensor


@torch.no_grad()
def squared_distance(inside_NHW: Tensor) -> Tensor:
    """(N, H, W) float32: squared distance of each pixel to the nearest that is set, in pixels.

    Infinite throughout an image in which none is set.

    Args:
        inside_NHW: bool.
    """
    height, width = inside_NHW.shape[-2:]
    along_HW = torch.arange(height, device=inside_NHW.device, dtype=torch.float32)[:, None]
    far = float("inf")
    above = torch.where(inside_NHW, along_HW, -far).cummax(-2).values
    below = torch.where(inside_NHW, along_HW, far).flip(-2).cummin(-2).values.flip(-2)
    column = torch.minimum(along_HW - above, below - along_HW).square()
    found = column.clone()
    for shift in range(1, width):
        moved = column + float(shift * shift)
        found[..., shift:] = torch.minimum(found[..., shift:], moved[..., :-shift])
        found[..., :-shift] = torch.minimum(found[..., :-shift], moved[..., shift:])
    return found


@torch.no_grad()
def signed_distance(label_BHW: Tensor, num_classes: int) -> Tensor:
    """(B, K, H, W) float32: distance of each pixel to each class's region, in pixels.

    Outside the region the distance to its nearest pixel; inside, minus the distance to the nearest
    pixel outside, plus one, so that the region's rim is at 0. Where an image doesn't show a class,
    or shows nothing else, 0 throughout.

    Args:
        label_BHW: (B, H, W) int64; other values than 0..K-1 belong to no class.
    """
    classes = torch.arange(num_classes, device=label_BHW.device)
    inside = label_BHW[:, None] == classes[:, None, None]
    flat = inside.flatten(0, 1)
    outer, inner = (squared_distance(region).sqrt() for region in (flat, ~flat))
    signed = torch.where(flat, 1.0 - inner, outer)
    return torch.where(signed.isfinite(), signed, 0.0).unflatten(0, inside.shape[:2])
