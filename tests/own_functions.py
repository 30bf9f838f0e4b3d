"""Whether a tensor came about by an autograd function of Python's."""

import torch
from torch import Tensor


def own(y: Tensor) -> bool:
    """Whether a function of Python's stands in its graph."""
    nodes = [y.grad_fn]
    while nodes:
        node = nodes.pop()
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return True
        nodes += [] if node is None else [following for following, _ in node.next_functions]
    return False
