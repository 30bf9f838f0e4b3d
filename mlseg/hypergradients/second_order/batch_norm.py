"""Batch normalisation over the batch's statistics, with its double backward in few passes.

Per channel, over ``n`` elements: ``h = (x - mean) r`` with ``r = 1 / sqrt(var + eps)``, and
``y = gamma h + beta``. With ``g`` the cotangent of ``y``, the gradients are

    gx = gamma r (g - m(g) - h c),    gw = n c,    gb = n m(g),    c = m(g h)

with ``m`` the mean. With ``v``, ``vw``, ``vb`` their cotangents, ``d = m(v h)`` and
``q = m(v (g - m(g))) - c d``:

    by g:      gamma r (v - m(v) - h d) + vw h + vb
    by gamma:  n r q
    by x:      -gamma r^2 [d (g - m(g)) + c (v - m(v)) + h (q - 2 c d)] + r vw (g - m(g) - h c)

Each result is a combination of g, v and x with numbers per channel. Sums come from torch's own
backward kernel, which subtracts the means before it multiplies, and on CUDA makes none without a
weight, so that it is given ones. ``e (x - mean) + k`` is its forward kernel in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mlseg.hypergradients.second_order.functions import apply_to, by_arithmetic, normalised, wanted

aten = torch.ops.aten


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor | None,
        b: Tensor | None,
        running: tuple[Tensor | None, Tensor | None],
        momentum: float,
        eps: float,
    ) -> Tensor:
        y, mean, r, reserve, kernel = aten._batch_norm_impl_index(
            x, w, b, *running, True, momentum, eps, torch.backends.cudnn.enabled
        )
        ctx.save_for_backward(x, w, mean, r, reserve)
        ctx.kernel, ctx.eps, ctx.given = kernel, eps, (True, w is not None, b is not None)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        mask = wanted(ctx, 3)
        take: Any = _Backward.apply if torch.is_grad_enabled() else _gradients
        found = take(g, *ctx.saved_tensors, ctx.kernel, ctx.eps, mask)
        gradients = [t if asked else None for t, asked in zip(found, mask, strict=True)]
        return *gradients, None, None, None


def _gradients(
    g: Tensor,
    x: Tensor,
    w: Tensor | None,
    mean: Tensor,
    r: Tensor,
    reserve: Tensor,
    kernel: int,
    eps: float,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    if w is None and (mask[1] or mask[2]):
        w = torch.ones_like(r)
    return aten._batch_norm_impl_index_backward(
        kernel, x, g, w, None, None, mean, r, True, eps, mask, reserve
    )


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        x: Tensor,
        w: Tensor | None,
        mean: Tensor,
        r: Tensor,
        reserve: Tensor,
        kernel: int,
        eps: float,
        mask: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The sums come for nothing, and the double backward wants them.
        gx, gw, gb = _gradients(g, x, w, mean, r, reserve, kernel, eps, [mask[0], True, True])
        # Not the gradients themselves: optimizers over lists of tensors may write into them.
        n = x.numel() // x.shape[1]
        ctx.save_for_backward(g, x, w, mean, r, gw / n, gb / n)
        ctx.eps, ctx.given = eps, (True, True, w is not None)
        ctx.set_materialize_grads(False)
        return gx, gw, gb

    @staticmethod
    def backward(
        ctx: Any, v: Tensor | None, vw: Tensor | None, vb: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        g, x, w, mean, r, c, g_mean = ctx.saved_tensors
        rest = (None,) * 6
        if torch.is_grad_enabled():
            return *_again(g, x, w, (v, vw, vb), ctx.eps), *rest
        by_g, by_x, by_w = wanted(ctx, 3)
        n = x.numel() // x.shape[1]
        scale = r if w is None else w * r
        zero = torch.zeros_like(r)
        d = v_mean = q = b = zero
        if v is not None:
            one = torch.ones_like(r)
            _, dn, vn = aten.native_batch_norm_backward(
                v, x, one, None, None, mean, r, True, ctx.eps, [False, True, True]
            )
            d, v_mean = dn / n, vn / n
            if by_x or by_w:
                _, gvn, _ = aten.native_batch_norm_backward(
                    v, g, one, None, None, g_mean, one, True, ctx.eps, [False, True, False]
                )
                q = gvn / n - c * d
        vw = zero if vw is None else vw
        vb = zero if vb is None else vb
        g_bar = x_bar = None
        if by_g:
            g_bar = _affine(x, mean, (vw - scale * d) * r, vb - scale * v_mean)
            if v is not None:
                g_bar.addcmul_(v, _along(scale, x))
        if by_x:
            scale = scale * r
            a, b = r * vw - scale * d, -scale * c
            e = r * (scale * (2.0 * c * d - q) - r * vw * c)
            x_bar = _affine(x, mean, e, -(a * g_mean + b * v_mean)).addcmul_(g, _along(a, x))
            if v is not None:
                x_bar.addcmul_(v, _along(b, x))
        return g_bar, x_bar, n * r * q if by_w else None, *rest


def _affine(x: Tensor, mean: Tensor, slope: Tensor, shift: Tensor) -> Tensor:
    """``slope (x - mean) + shift`` per channel."""
    one = torch.ones_like(mean)
    return aten.native_batch_norm(x, slope, shift, mean, one, False, 0.0, 0.0)[0]


def _along(numbers: Tensor, x: Tensor) -> Tensor:
    return numbers.view(-1, *(1,) * (x.dim() - 2))


def _again(
    g: Tensor,
    x: Tensor,
    w: Tensor | None,
    cotangents: tuple[Tensor | None, ...],
    eps: float,
) -> list[Tensor | None]:
    """The same for a third derivative."""
    b = x.new_zeros(x.shape[1]).requires_grad_()
    axes = [0, *range(2, x.dim())]

    def operation(x: Tensor, w: Tensor | None, b: Tensor) -> Tensor:
        h = normalised(x, axes, eps)
        return (h if w is None else h * _along(w, x)) + _along(b, x)

    v, vw, vb = cotangents
    return by_arithmetic(operation, (x, w, b), g, (v, None if w is None else vw, vb))[:3]


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """As ``torch.nn.functional.batch_norm``; None where that is to be taken itself."""
    usual = training and input.dim() > 1 and input.numel() > input.shape[1] and eps > 0.0
    if not usual or not apply_to(input, weight, bias):
        return None
    return _BatchNorm.apply(input, weight, bias, (running_mean, running_var), momentum, eps)


def _of_torch(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor | None:
    return batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """As ``torch.nn.functional.instance_norm``, which is a batch norm of a batch of one."""
    usual = use_input_stats and input.dim() > 2 and input[0, 0].numel() > 1 and eps > 0.0
    if not usual or not apply_to(input, weight, bias):
        return None
    batch, channels = input.shape[:2]

    def repeated(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.repeat(batch)

    means, variances = repeated(running_mean), repeated(running_var)
    flat = input.contiguous().view(1, batch * channels, *input.shape[2:])
    y = _BatchNorm.apply(flat, repeated(weight), repeated(bias), (means, variances), momentum, eps)
    for running, new in ((running_mean, means), (running_var, variances)):
        if running is not None and new is not None:
            running.copy_(new.view(batch, channels).mean(0))
    return y.view(input.shape)


def _instance_of_torch(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor | None:
    return instance_norm(
        input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )


HANDLERS: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    functional.batch_norm: batch_norm,
    torch.batch_norm: _of_torch,
    functional.instance_norm: instance_norm,
    torch.instance_norm: _instance_of_torch,
}
"""What stands in for torch's functions; None as their result: take torch's own."""
