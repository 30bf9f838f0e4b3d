"""BatchNorm by the statistics of a whole batch, of which several processes have a share each.

torch's ``SyncBatchNorm`` is for GPUs alone and can be differentiated once; this one is made of
operations that can be differentiated any number of times, on every device.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mlseg import parallel
from mlseg.errors import UserError
from mlseg.precision import full

_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class _Synchronised(nn.modules.batchnorm._BatchNorm):
    """Two collectives forward and two backward: the mean, and the variance around it."""

    def forward(self, input: Tensor) -> Tensor:
        """As BatchNorm's, by the statistics of all processes' shares."""
        tracked = self.training and self.track_running_stats and self.running_mean is not None
        if not (self.training or self.running_mean is None) or not parallel.several():
            return super().forward(input)
        self._check_input_dim(input)
        x = full(input)
        over = [0, *range(2, x.dim())]
        shape = [1, -1, *(1 for _ in over[1:])]
        count = x.numel() // x.shape[1] * parallel.size()
        mean = parallel.summed(x.sum(over)) / count
        centred = x - mean.view(shape)
        variance = parallel.summed((centred * centred).sum(over)) / count
        if tracked:
            self._track(mean.detach(), variance.detach() * (count / max(count - 1, 1)))
        scale = (variance + self.eps).rsqrt()
        if self.affine:
            scale = scale * self.weight
        result = centred * scale.view(shape)
        if self.affine:
            result = result + self.bias.view(shape)
        return result.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        share: Any = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if share is None:
                share = 1.0 / self.num_batches_tracked.to(mean.dtype)
        for running, found in ((self.running_mean, mean), (self.running_var, variance)):
            assert running is not None
            running.mul_(1 - share).add_(found * share)


@cache
def _synchronised(cls: Any) -> Any:
    """The same layer, by whole batches; UserError where it is more than torch's."""
    own = cls.forward is not nn.BatchNorm2d.forward
    if own and cls.__module__.split(".")[0] != "mlseg":
        raise UserError(
            f"sync_batchnorm: {cls.__module__}.{cls.__name__} has a forward of its own, which "
            "isn't known to go by whole batches; take torch's BatchNorm, or set it to false"
        )
    return type(f"Synchronised{cls.__name__}", (_Synchronised, cls), {})


def follow(module: nn.Module, other: nn.Module) -> None:
    """Have the layers of a network go by whole batches if those of ``other`` do."""
    if any(isinstance(layer, _Synchronised) for layer in other.modules()):
        synchronise([module])


def synchronise(modules: Iterable[nn.Module]) -> None:
    """Have the BatchNorm layers of some networks go by whole batches.

    The layers stay the objects that they are, with their parameters and buffers. One process by
    itself has nothing to synchronise, and keeps torch's own.

    Raises:
        UserError: a layer normalises in a way of its own.
    """
    if not parallel.several():
        return
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, _KINDS) and not isinstance(layer, _Synchronised):
                kind: Any = type(layer)
                layer.__class__ = _synchronised(kind)
