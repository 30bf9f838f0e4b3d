"""Layer and group normalisation, with their double backward in few passes.

Over a group of elements: ``h = (x - mean) r`` with ``r = 1 / sqrt(var + eps)``, and ``y = gamma h +
beta`` with a ``gamma`` per element or channel. With ``g`` the cotangent of ``y`` the gradients are,
``m`` being the mean over the group and sums going over all that a ``gamma`` serves,

    gx = B(g gamma),  B(u) = r (u - m(u) - h m(u h)),    gw = sum g h,    gb = sum g

``B`` is torch's own backward kernel, and symmetric. With ``v``, ``vw``, ``vb`` the cotangents of
``gx``, ``gw``, ``gb``:

    by g:      gamma B(v) + vw h + vb
    by gamma:  sum g B(v)
    by x:      -r (m(v h) gx + m(g gamma h) B(v) + h m(v gx)) + B(g vw)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from mlseg.hypergradients.second_order.functions import apply_to, by_arithmetic, normalised, wanted

aten = torch.ops.aten


class _Kind(Protocol):
    """A normalisation's kernels and sums, for one shape of input."""

    def arranged(self, x: Tensor) -> Tensor:
        """In the memory layout that the kernels take."""

    def forward(self, x: Tensor, w: Tensor | None, b: Tensor | None) -> tuple[Tensor, ...]:
        """The result, means and ``r`` per group."""

    def backward(
        self, g: Tensor, x: Tensor, mean: Tensor, r: Tensor, w: Tensor | None, mask: list[bool]
    ) -> tuple[Tensor, ...]:
        """The gradients by x, gamma and beta."""

    def of_group(self, numbers: Tensor) -> Tensor:
        """Numbers per group, to be multiplied with elements."""

    def of_weight(self, numbers: Tensor) -> Tensor:
        """Numbers per gamma, to be multiplied with elements."""

    def mean(self, values: Tensor) -> Tensor:
        """Over each group, as :meth:`of_group` gives it."""

    def total(self, values: Tensor) -> Tensor:
        """Over all elements that a gamma serves."""

    def by_arithmetic(self, x: Tensor, w: Tensor | None, b: Tensor) -> Tensor:
        """The result, of sums and products."""


class _Layer:
    """Over the last dimensions; a gamma per element of these."""

    def __init__(self, shape: Sequence[int], dims: int, eps: float) -> None:
        self.shape, self.eps = list(shape), eps
        self._axes = list(range(dims - len(self.shape), dims))
        self._others = list(range(dims - len(self.shape)))

    def arranged(self, x: Tensor) -> Tensor:
        return x.contiguous()

    def forward(self, x: Tensor, w: Tensor | None, b: Tensor | None) -> tuple[Tensor, ...]:
        return aten.native_layer_norm(x, self.shape, w, b, self.eps)

    def backward(
        self, g: Tensor, x: Tensor, mean: Tensor, r: Tensor, w: Tensor | None, mask: list[bool]
    ) -> tuple[Tensor, ...]:
        return aten.native_layer_norm_backward(g, x, self.shape, mean, r, w, w, mask)

    def of_group(self, numbers: Tensor) -> Tensor:
        return numbers

    def of_weight(self, numbers: Tensor) -> Tensor:
        return numbers

    def mean(self, values: Tensor) -> Tensor:
        return values.mean(self._axes, keepdim=True)

    def total(self, values: Tensor) -> Tensor:
        return values.sum(self._others) if self._others else values

    def by_arithmetic(self, x: Tensor, w: Tensor | None, b: Tensor) -> Tensor:
        h = normalised(x, self._axes, self.eps)
        return (h if w is None else h * w) + b


class _Group:
    """Over groups of channels, and space; a gamma per channel."""

    def __init__(self, x: Tensor, groups: int, eps: float) -> None:
        self.groups, self.eps = groups, eps
        self.batch, self.channels = x.shape[:2]
        self.pixels = math.prod(x.shape[2:])
        self._ones = (1,) * (x.dim() - 2)
        self._space = list(range(2, x.dim()))
        self._sizes = (self.batch, self.channels, self.pixels, groups)

    def arranged(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=_format(x))

    def forward(self, x: Tensor, w: Tensor | None, b: Tensor | None) -> tuple[Tensor, ...]:
        return aten.native_group_norm(x, w, b, *self._sizes, self.eps)

    def backward(
        self, g: Tensor, x: Tensor, mean: Tensor, r: Tensor, w: Tensor | None, mask: list[bool]
    ) -> tuple[Tensor, ...]:
        return aten.native_group_norm_backward(g, x, mean, r, w, *self._sizes, mask)

    def of_group(self, numbers: Tensor) -> Tensor:
        spread = numbers.view(self.batch, self.groups, 1)
        spread = spread.expand(-1, -1, self.channels // self.groups)
        return spread.reshape(self.batch, self.channels, *self._ones)

    def of_weight(self, numbers: Tensor) -> Tensor:
        return numbers.view(-1, *self._ones)

    def mean(self, values: Tensor) -> Tensor:
        channels = values.sum(self._space) if self._space else values
        return self.of_group(channels.view(self.batch, self.groups, -1).mean(2) / self.pixels)

    def total(self, values: Tensor) -> Tensor:
        return values.sum([0, *self._space])

    def by_arithmetic(self, x: Tensor, w: Tensor | None, b: Tensor) -> Tensor:
        h = normalised(x.reshape(self.batch, self.groups, -1), [2], self.eps).view(x.shape)
        return (h if w is None else h * self.of_weight(w)) + self.of_weight(b)


def _format(x: Tensor) -> torch.memory_format:
    """Its own on the CPU; other devices' kernels take channels first alone."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if x.device.type != "cpu" or last is None or x.is_contiguous():
        return torch.contiguous_format
    return last if x.is_contiguous(memory_format=last) else torch.contiguous_format


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor | None, b: Tensor | None, kind: _Kind) -> Tensor:
        y, mean, r = kind.forward(x, w, b)
        ctx.save_for_backward(x, w, mean, r)
        ctx.kind, ctx.given = kind, (True, w is not None, b is not None)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, w, mean, r = ctx.saved_tensors
        mask, g = wanted(ctx, 3), _like(g, x)
        if torch.is_grad_enabled():
            found = _Backward.apply(g, x, w, mean, r, ctx.kind, mask)
        else:
            found = ctx.kind.backward(g, x, mean, r, w, mask)
        gradients = [t if asked else None for t, asked in zip(found, mask, strict=True)]
        return *gradients, None


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        x: Tensor,
        w: Tensor | None,
        mean: Tensor,
        r: Tensor,
        kind: _Kind,
        mask: list[bool],
    ) -> tuple[Tensor | None, ...]:
        # The double backward wants the gradient by x, too.
        gx, gw, gb = kind.backward(g, x, mean, r, w, [True, *mask[1:]])
        ctx.save_for_backward(g, x, w, mean, r, gx)
        ctx.kind, ctx.given = kind, (True, True, w is not None)
        ctx.set_materialize_grads(False)
        return gx, gw, gb

    @staticmethod
    def backward(
        ctx: Any, v: Tensor | None, vw: Tensor | None, vb: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        g, x, w, mean, r, gx = ctx.saved_tensors
        kind: _Kind = ctx.kind
        rest = (None,) * 4
        if torch.is_grad_enabled():
            return *_again(kind, g, x, w, (v, vw, vb)), *rest
        by_g, by_x, by_w = wanted(ctx, 3)
        rate = kind.of_group(r)
        h = (x - kind.of_group(mean)).mul_(rate)
        g_bar = x_bar = w_bar = None
        if v is not None:
            v = _like(v, x)
            bv = kind.backward(v, x, mean, r, None, [True, False, False])[0]
            w_bar = kind.total(g * bv) if by_w else None
            if by_x:
                gh = g * h if w is None else (g * h).mul_(kind.of_weight(w))
                x_bar = gx * (kind.mean(v * h) * -rate)
                x_bar.addcmul_(bv, kind.mean(gh) * -rate)
                x_bar.addcmul_(h, kind.mean(v * gx) * -rate)
            if by_g:
                g_bar = bv if w is None else bv.mul_(kind.of_weight(w))
        if vw is not None and by_x:
            more = kind.backward(g, x, mean, r, vw.contiguous(), [True, False, False])[0]
            x_bar = more if x_bar is None else x_bar.add_(more)
        if by_g:
            for shift in (
                None if vw is None else h.mul_(kind.of_weight(vw)),
                None if vb is None else kind.of_weight(vb).expand_as(x),
            ):
                if shift is not None:
                    g_bar = shift if g_bar is None else g_bar + shift
        return g_bar, x_bar, w_bar, *rest


def _like(g: Tensor, x: Tensor) -> Tensor:
    """In the memory layout of ``x``."""
    return g.contiguous(memory_format=_format(x))


def _again(
    kind: _Kind, g: Tensor, x: Tensor, w: Tensor | None, cotangents: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """The same for a third derivative."""
    v, vw, vb = cotangents
    shape = kind.total(x.detach()).shape
    b = x.new_zeros(shape).requires_grad_()
    return by_arithmetic(kind.by_arithmetic, (x, w, b), g, (v, vw, vb))[:3]


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor | None:
    """As ``torch.nn.functional.layer_norm``; None where that is to be taken itself."""
    shape = list(normalized_shape)
    if not shape or list(input.shape[-len(shape) :]) != shape or not apply_to(input, weight, bias):
        return None
    kind = _Layer(shape, input.dim(), eps)
    return _Norm.apply(kind.arranged(input), weight, bias, kind)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor | None:
    """As ``torch.nn.functional.group_norm``; None where that is to be taken itself."""
    if input.dim() < 2 or num_groups < 1 or input.shape[1] % num_groups:
        return None
    if input[:1].numel() == num_groups or not apply_to(input, weight, bias):
        return None
    kind = _Group(input, num_groups, eps)
    return _Norm.apply(kind.arranged(input), weight, bias, kind)


HANDLERS: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    functional.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    functional.group_norm: group_norm,
    torch.group_norm: group_norm,
}
"""What stands in for torch's functions; None as their result: take torch's own."""
