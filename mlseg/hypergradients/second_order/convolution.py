"""Convolutions whose double backward is made of convolutions.

With ``y = x * w``, ``g`` the cotangent of ``y``, and ``vx``, ``vw``, ``vb`` those of the gradients
by input, kernel and bias:

    by g:  vx * w + x * vw + vb
    by x:  the gradient by the input, for the kernel vw
    by w:  the gradient by the kernel, for the input vx

All are the ordinary kernels. torch finds the last by a convolution whose kernel is a whole feature
map instead, which no library makes fast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mlseg.hypergradients.second_order.functions import apply_to, wanted

aten = torch.ops.aten
Sizes = int | tuple[int, ...] | list[int]


@dataclass(frozen=True)
class _Geometry:
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int

    def convolve(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """``x * w + b``, to be differentiated where gradients are recorded."""
        return (
            _Convolution.apply(x, w, b, self) if torch.is_grad_enabled() else self.forward(x, w, b)
        )

    def gradients(
        self, g: Tensor, x: Tensor, w: Tensor, mask: list[bool]
    ) -> tuple[Tensor | None, ...]:
        """The gradients by ``x``, ``w`` and the bias; to be differentiated likewise."""
        if torch.is_grad_enabled():
            return _Backward.apply(g, x, w, self, mask)
        return self.backward(g, x, w, mask)

    def forward(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """``x * w + b``."""
        return aten.convolution(
            x,
            w,
            b,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
        )

    def backward(
        self, g: Tensor, x: Tensor, w: Tensor, mask: list[bool]
    ) -> tuple[Tensor | None, ...]:
        """The gradients by ``x``, ``w`` and the bias, None where the mask is false."""
        channels = w.shape[1] * self.groups if self.transposed else w.shape[0]
        if not any(mask):
            return None, None, None
        found = aten.convolution_backward(
            g,
            x,
            w,
            [channels],
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
            mask,
        )
        return tuple(t if asked else None for t, asked in zip(found, mask, strict=True))


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.geometry, ctx.given = geometry, (True, True, b is not None)
        return geometry.forward(x, w, b)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, w = ctx.saved_tensors
        return *ctx.geometry.gradients(g, x, w, wanted(ctx, 3)), None


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, w: Tensor, geometry: _Geometry, mask: list[bool]
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(g, x, w)
        ctx.geometry, ctx.given = geometry, (True, True, True)
        ctx.set_materialize_grads(False)
        return geometry.backward(g, x, w, mask)

    @staticmethod
    def backward(
        ctx: Any, vx: Tensor | None, vw: Tensor | None, vb: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        g, x, w = ctx.saved_tensors
        by_g, by_x, by_w = wanted(ctx, 3)
        geometry: _Geometry = ctx.geometry
        total = None
        if by_g:
            if vx is not None:
                total = geometry.convolve(vx, w, vb)
            if vw is not None:
                more = geometry.convolve(x, vw, vb if vx is None else None)
                total = more if total is None else _add(total, more)
            if total is None and vb is not None:
                total = vb.view(-1, *(1,) * (g.dim() - 2)).expand_as(g)
        # One call: the kernel vw goes with the gradient by x, the input vx with that by w.
        mask = [by_x and vw is not None, by_w and vx is not None, False]
        x_bar, w_bar, _ = geometry.gradients(
            g, x if vx is None else vx, w if vw is None else vw, mask
        )
        return total, x_bar, w_bar, None, None


def _add(total: Tensor, more: Tensor) -> Tensor:
    return total + more if torch.is_grad_enabled() else total.add_(more)


def _plain(dims: int) -> Callable[..., Tensor | None]:
    def handle(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
    ) -> Tensor | None:
        if not _fits(input, weight, bias, dims):
            return None
        dilations = _each(dilation, dims)
        if isinstance(padding, str):
            if padding not in ("same", "valid"):
                return None
            total = [0] * dims
            if padding == "same":
                if any(s != 1 for s in _each(stride, dims)):
                    return None  # torch refuses it
                total = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
            padding = [t // 2 for t in total]
            if any(t % 2 for t in total):  # torch puts the odd one at the end
                odd = [side for t in reversed(total) for side in (0, t % 2)]
                input = functional.pad(input, odd)
        geometry = _Geometry(
            _each(stride, dims), _each(padding, dims), dilations, False, [0] * dims, groups
        )
        return _apply(input, weight, bias, geometry, dims)

    return handle


def _transposed(dims: int) -> Callable[..., Tensor | None]:
    def handle(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Sizes = 1,
        padding: Sizes = 0,
        output_padding: Sizes = 0,
        groups: int = 1,
        dilation: Sizes = 1,
    ) -> Tensor | None:
        if not _fits(input, weight, bias, dims):
            return None
        geometry = _Geometry(
            _each(stride, dims),
            _each(padding, dims),
            _each(dilation, dims),
            True,
            _each(output_padding, dims),
            groups,
        )
        return _apply(input, weight, bias, geometry, dims)

    return handle


def _fits(x: Tensor, w: Tensor, b: Tensor | None, dims: int) -> bool:
    return x.dim() in (dims + 1, dims + 2) and w.dim() == dims + 2 and apply_to(x, w, b)


def _apply(x: Tensor, w: Tensor, b: Tensor | None, geometry: _Geometry, dims: int) -> Tensor:
    if x.dim() == dims + 1:
        return _Convolution.apply(x.unsqueeze(0), w, b, geometry).squeeze(0)
    return _Convolution.apply(x, w, b, geometry)


def _each(sizes: Sizes, dims: int) -> list[int]:
    listed = [sizes] if isinstance(sizes, int) else list(sizes)
    return listed * dims if len(listed) == 1 else listed


HANDLERS: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    functional.conv1d: _plain(1),
    functional.conv2d: _plain(2),
    functional.conv3d: _plain(3),
    functional.conv_transpose1d: _transposed(1),
    functional.conv_transpose2d: _transposed(2),
    functional.conv_transpose3d: _transposed(3),
}
"""What stands in for torch's functions; None as their result: take torch's own."""
