"""What is known of an optimizer, in one class: its settings, its step as a differentiable map.

A step takes a parameter ``w``, its gradient ``g`` and the optimizer's moments to the next ``w`` and
moments. The maps are those of ``torch.optim``, operation for operation, but out of place and safe
where a second moment is zero: the derivative of the square root is infinite there, that of the
second moment by the gradient zero, and their product, which torch would give as NaN, is taken to be
zero.

Sources: the update rules in the documentation of ``torch.optim``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from mlseg.config import Settings
from mlseg.config.registry import Registry

Moments = dict[str, Tensor]
Hold = Callable[[str, Tensor], Tensor]
"""What a map does with the value of a second moment, or of the count, that it has found: see
:func:`free` and :func:`constant`."""

COUNT = "step"
"""The moment that counts steps; nothing is differentiated by it."""


def free(key: str, value: Tensor) -> Tensor:
    """Second moments depend on the gradient."""
    return value


def constant(key: str, value: Tensor) -> Tensor:
    """Second moments are taken for constants."""
    return value.detach()


class Optimizer(Settings):
    """An optimizer of torch. Subclass it in a file beside this one and decorate it with
    :func:`register`; its fields are its settings in a config, those of the torch class.

    Attributes:
        lr: learning rate.
        weight_decay: as the torch class takes it.
    """

    name: str
    lr: PositiveFloat
    weight_decay: NonNegativeFloat = 0.0

    torch_class: ClassVar[type[torch.optim.Optimizer]]
    fused: ClassVar[bool] = False
    """Whether one kernel may step all parameters, on the CPU as well."""

    def build(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """The torch optimizer over ``parameters``, with these settings."""
        values = self.model_dump(exclude={"name"})
        if self.fused:
            values["fused"] = True
        made: Any = self.torch_class
        return made(parameters, **values)

    @staticmethod
    @abstractmethod
    def step(
        w: Tensor, g: Tensor, moments: Moments, group: Mapping[str, Any], hold: Hold
    ) -> tuple[Tensor, Moments]:
        """The next ``w`` and moments, all in the shape of ``w``; element by element.

        Args:
            moments: by their names in torch's state; empty before the first step.
            group: the settings of ``w``'s parameter group.
            hold: to be called with each second moment's name and value, and with the count's.
        """

    @classmethod
    def scaled(cls, v: Tensor, w: Tensor, moments: Moments, group: Mapping[str, Any]) -> Tensor:
        """``v`` times minus the derivative of the last step by its gradient.

        Second moments and count are held at their present values. This follows from :meth:`step`;
        override it where a formula is faster.

        Args:
            moments: as the last step left them.
        """
        g = torch.zeros_like(w, requires_grad=True)
        with torch.enable_grad():
            after, _ = cls.step(
                w.detach(), g, moments, group, lambda key, value: moments[key].to(value.dtype)
            )
        (slope,) = torch.autograd.grad(after, g, grad_outputs=v)
        return slope.neg_()

    @classmethod
    def decay(cls, p: Tensor, moments: Moments, group: Mapping[str, Any]) -> Tensor | float:
        """The diagonal that weight decay adds to the Hessian of what is descended.

        An L2 decay adds itself. A decay that is decoupled from the gradient (AdamW's) has steps
        that vanish where ``g + decay (sqrt(v) + eps) w`` does, with ``v`` the debiased second
        moment, which counts here at its present value; before the first step there is none.
        """
        decay = group.get("weight_decay", 0.0)
        if not decay or not group.get("decoupled_weight_decay"):
            return decay
        if not moments:
            return 0.0
        second = moments["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"]
        correction = 1.0 - group["betas"][1] ** count_of(moments)
        return decay * ((second / correction).sqrt().to(p.dtype) + group["eps"])


class Diagonal(Optimizer):
    """An optimizer with a formula for its diagonal, of many parameters at once.

    A network has dozens of parameters and a formula a handful of operations: one by one they take
    a device longer to be told than to do.
    """

    @classmethod
    def scaled(cls, v: Tensor, w: Tensor, moments: Moments, group: Mapping[str, Any]) -> Tensor:
        """See :meth:`scaled_together`."""
        (result,) = cls.scaled_together([v], [moments], group)
        return result

    @classmethod
    @abstractmethod
    def scaled_together(
        cls, v: list[Tensor], moments: Sequence[Moments], group: Mapping[str, Any]
    ) -> list[Tensor]:
        """:meth:`Optimizer.scaled` of parameters of one group, device and dtype."""


OPTIMIZERS: Registry[Any] = Registry(
    "optimizer",
    base=(Settings, torch.optim.Optimizer),
    packages=["mlseg.hypergradients.optimizers"],
    example="my_package.optim:Lion",
)
"""By name: an :class:`Optimizer`; or a class derived from ``torch.optim.Optimizer``, whose
signature says its settings, and of which no more is known."""

_O = TypeVar("_O", bound=Optimizer)


def register(cls: type[_O]) -> type[_O]:
    """Class decorator: make an :class:`Optimizer` known by its name and its torch class."""
    return OPTIMIZERS.register(cls.model_fields["name"].default)(cls)


def registered() -> dict[type[torch.optim.Optimizer], type[Optimizer]]:
    """All of them, by torch class."""
    found = OPTIMIZERS.registered(plugins=False).values()
    kinds = [cls for cls in found if issubclass(cls, Optimizer)]
    return {kind.torch_class: kind for kind in kinds}


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root with derivative 0 at 0 (and 0, with derivative 0, below: rounding's doing)."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def descent(w: Tensor, g: Tensor, group: Mapping[str, Any]) -> Tensor:
    """The gradient of what is descended: of the negated loss if maximised, plus L2 decay."""
    g = -g if group.get("maximize") else g
    return g + group["weight_decay"] * w if group["weight_decay"] else g


def sign_of(group: Mapping[str, Any]) -> int:
    """1 for a group that descends, -1 for one that ascends."""
    return -1 if group.get("maximize") else 1


def count_of(moments: Moments) -> Tensor:
    """Steps taken: on the host, or on the device for a fused optimizer there; never read.

    In double precision, as in torch's own update: ``1 - beta^t`` cancels in single precision.
    """
    return torch.as_tensor(moments.get(COUNT, 0.0)).to(torch.float64)


def counts_of(moments: Sequence[Moments], group: Mapping[str, Any]) -> Tensor:
    """(n,) :func:`count_of` several parameters of one group and device, in one operation; on the
    device of a learning rate that is a tensor."""
    counts, rate = [torch.as_tensor(m.get(COUNT, 0.0)) for m in moments], group["lr"]
    if isinstance(rate, Tensor) and rate.device != counts[0].device:
        # A host's number goes along with an operation there; (n,) of them would be refused.
        zero = torch.zeros((), dtype=torch.float64, device=rate.device)
        counts = [zero + count for count in counts]
    return torch.stack(counts).to(torch.float64)


def each(values: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """(n,) values as scalars for operations with tensors like that, one for each parameter.

    Those that have stepped together have the same ones, but only the device may know it. As a list:
    one number that is a tensor is read by ``torch._foreach_add_``.
    """
    narrow = like.dtype in (torch.bfloat16, torch.float16)
    return values.to(torch.float32 if narrow else like.dtype).unbind()


def factors(factor: Any, count: int) -> Any:
    """A factor of so many tensors as ``torch._foreach_mul`` takes it.

    One number that is a tensor must be of their dtype there; in a list it may be of any.
    """
    return [factor] * count if isinstance(factor, Tensor) else factor
