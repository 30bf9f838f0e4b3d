"""Which numbers a computation is in."""

import torch
from torch import Tensor


def full(tensor: Tensor) -> Tensor:
    """What autocast computed in half precision as float32; float32 and wider as it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
