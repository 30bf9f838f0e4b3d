"""Kronecker factors of a level's curvature, layer by layer.

The block of the curvature that belongs to the weight (d_out, d_in) of a layer is taken for

    A (x) G,    A = sum a a^T / R,    G = N sum g g^T

over all ``R`` places where the layer is applied (examples, and positions in an image), ``a``
(d_in,) its input there, with a one for the bias, ``g`` (d_out,) the derivative of the loss by its
output there, ``N`` examples in the batch. That is the empirical Fisher matrix of a loss that is a
mean over the batch, where inputs and derivatives are independent of each other and positions of one
another.

Layers are ``nn.Linear`` and ``nn.Conv2d`` (of one group) whose weight nothing else shares; for all
other parameters the factor is a multiple of the identity, the mean curvature of the layers.

Sources: Martens and Grosse: Optimizing neural networks with Kronecker-factored approximate
curvature, ICML 2015, sections 3 (factors), 5 (exponential average), 6.3 (factored damping);
convolutions: Grosse and Martens: A Kronecker-factored approximate Fisher matrix for convolution
layers, ICML 2016, section 3. For hypergradients Liao, Dangel, Yu: Efficient bilevel optimization
with KFAC-based hypergradients, AISTATS 2026.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional

from mlseg import parallel
from mlseg.config import Settings
from mlseg.hypergradients.hop import Hop
from mlseg.hypergradients.level import Level
from mlseg.hypergradients.vectors import flatten, unflatten

Decay = Annotated[float, Field(ge=0.0, lt=1.0)]


class Kronecker(Settings):
    """Kronecker factors as a preconditioner.

    Attributes:
        damping: added to the curvature's diagonal, through both factors.
        decay: of the factors' exponential average over hops; at the start it is less, so that no
            hop counts for more than another.
        every: hops for which factorised factors are kept.
    """

    damping: PositiveFloat = 1e-3
    decay: Decay = 0.95
    every: PositiveInt = 1


@dataclass
class Layer:
    """One layer and what its factors are made of.

    Attributes:
        module: the layer.
        parameters: its weight, and its bias where that is trained.
        inputs: sum of ``a a^T`` so far.
        places: ``R`` so far.
        examples: ``N``.
        edges: in the graph, of its outputs, with the shape of rows to bring a derivative to.
    """

    module: nn.Linear | nn.Conv2d
    parameters: list[Tensor]
    inputs: Tensor | None = None
    places: int = 0
    examples: int = 1
    edges: list[Any] = field(default_factory=list)

    def see(self, x: Tensor, output: Tensor) -> None:
        """It has been applied."""
        if not output.requires_grad:
            return
        with torch.no_grad():
            rows = _rows(self.module, x.detach())
            if len(self.parameters) == 2:
                rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
            square = rows.T @ rows
        self.inputs = square if self.inputs is None else self.inputs + square
        self.places += len(rows)
        self.examples = len(x) if x.dim() > 1 else 1
        # The edge, not the output, which a ReLU may change in place.
        self.edges.append(get_gradient_edge(output))

    def derivatives(self, parts: Sequence[Tensor | None]) -> Tensor:
        """(d_out, d_out) ``sum g g^T`` of derivatives by the outputs."""
        d_out = self.module.weight.shape[0]
        total = self.module.weight.new_zeros(d_out, d_out)
        for g in parts:
            if g is not None:
                conv = isinstance(self.module, nn.Conv2d)
                rows = (g.movedim(-3, -1) if conv else g).reshape(-1, d_out)
                total = total + rows.T @ rows
        return total


def layers_of(module: nn.Module, parameters: Sequence[Tensor]) -> list[Layer]:
    """Those of a module that have factors, of the parameters given."""
    given = {id(p) for p in parameters}
    holders: dict[int, int] = {}
    for m in module.modules():
        for p in m._parameters.values():
            if p is not None:
                holders[id(p)] = holders.get(id(p), 0) + 1
    found = []
    for m in module.modules():
        known = type(m).forward in (nn.Linear.forward, nn.Conv2d.forward)
        if not known or getattr(m, "groups", 1) != 1:
            continue
        weight, bias = m._parameters.get("weight"), m._parameters.get("bias")
        if weight is None or id(weight) not in given or holders[id(weight)] != 1:
            continue
        own: list[Tensor] = [weight]
        if bias is not None and id(bias) in given and holders[id(bias)] == 1:
            own.append(bias)
        assert isinstance(m, (nn.Linear, nn.Conv2d))
        found.append(Layer(m, own))
    return found


def without_factors(level: Level) -> str | None:
    """A sentence on the parameters of a level for which the identity is taken; None: on none."""
    parameters = level.meta_trainable_parameters()
    layers = layers_of(level.again.modules()[0], parameters)
    total = sum(p.numel() for p in parameters)
    covered = sum(p.numel() for layer in layers for p in layer.parameters)
    if covered == total:
        return None
    return (
        f"Kronecker factors cover {covered} of the {total} parameters of {level.name!r}, those of "
        f"its {len(layers)} linear and convolutional layers (nn.Linear, nn.Conv2d of one group, no "
        "weight shared); for the others the identity is taken"
    )


@contextmanager
def watched(layers: Sequence[Layer]) -> Iterator[None]:
    """Within this block the layers take note of what they are applied to."""

    def hook(layer: Layer) -> Callable[..., None]:
        return lambda module, inputs, output: layer.see(inputs[0], output)

    handles = [layer.module.register_forward_hook(hook(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_PREFIX = "kfac/"


def _key(which: str, layer: int) -> str:
    """Of a factor in a hop's memory: ``A``, ``G``, or of the Cholesky factor of one."""
    return f"{_PREFIX}{which}{layer}"


class Factors:
    """The factors of a hop's level, averaged over hops; they lie in the hop's memory.

    Args:
        hop: whose level.
        settings: see :class:`Kronecker`.
    """

    def __init__(self, hop: Hop, settings: Kronecker) -> None:
        self.hop, self.settings = hop, settings
        self.layers = layers_of(hop.level.again.modules()[0], hop.parameters)
        self._parameters: list[Tensor] = []
        self._whole: list[bool] = []

    def evaluated(self, loss: Callable[[], Tensor]) -> Tensor:
        """The loss, with its graph; the factors count this batch in."""
        with watched(self.layers):
            value = loss()
        self.layers = [layer for layer in self.layers if layer.edges]
        edges = [edge for layer in self.layers for edge in layer.edges]
        if edges:
            parts = iter(torch.autograd.grad(value, edges, retain_graph=True, allow_unused=True))
            self._count_in([[next(parts) for _ in layer.edges] for layer in self.layers])
        return value

    def _count_in(self, derivatives: Sequence[Sequence[Tensor | None]]) -> None:
        memory = self.hop.memory
        a_new, g_new = [], []
        for layer, parts in zip(self.layers, derivatives, strict=True):
            assert layer.inputs is not None
            a_new.append(layer.inputs / layer.places)
            g_new.append(layer.derivatives(parts) * layer.examples)
        # Means over the examples of a share: in several processes those of the batch are theirs.
        found = iter(parallel.average([*a_new, *g_new]))
        fresh = {_key("A", i): next(found) for i in range(len(a_new))}
        fresh |= {_key("G", i): next(found) for i in range(len(g_new))}
        count = _PREFIX + "hops"
        shapes = {k: v.shape for k, v in fresh.items()} | {count: torch.Size()}
        known = {k: v.shape for k, v in memory.items() if k.startswith(_PREFIX)}
        if {k: v for k, v in known.items() if "C" not in k} != shapes:
            for key in known:
                del memory[key]
            memory.update({k: torch.zeros_like(v) for k, v in fresh.items()})
            memory[count] = torch.zeros_like(a_new[0][0, 0])
        # Like a mean at first: Martens and Grosse, section 5. A batch with a NaN doesn't count.
        counts = torch.stack([value.isfinite().all() for value in fresh.values()]).all()
        memory[count] = memory[count] + counts
        keep = (1.0 - 1.0 / memory[count].clamp_min(1.0)).clamp(max=self.settings.decay)
        for key, value in fresh.items():
            average = keep * memory[key] + (1.0 - keep) * value
            memory[key] = torch.where(counts, average, memory[key])
        level = self.hop.level
        hops = level.count // (level.unroll_steps * level.stepping.batches)
        if hops % self.settings.every == 0 or _key("CA", 0) not in memory:
            self._factorise()

    def _factorise(self) -> None:
        """Cholesky factors of the damped factors."""
        memory, root = self.hop.memory, self.settings.damping**0.5
        for i in range(len(self.layers)):
            a, g = memory[_key("A", i)], memory[_key("G", i)]
            sizes = a.diagonal().mean(), g.diagonal().mean()
            tiny = torch.finfo(a.dtype).tiny
            positive = (sizes[0] > 0) & (sizes[1] > 0)
            ratio = torch.where(positive, sizes[0] / sizes[1].clamp_min(tiny), 1.0).sqrt()
            for key, factor, shift in (("A", a, ratio * root), ("G", g, root / ratio)):
                damped = factor + shift * torch.eye(len(factor), dtype=a.dtype, device=a.device)
                memory[_key(f"C{key}", i)] = torch.linalg.cholesky_ex(damped).L

    # ---------------------------------------------------------------------------- products

    def over(self, parameters: Sequence[Tensor]) -> Factors:
        """For flat vectors over these parameters."""
        self._parameters = list(parameters)
        kept = {id(p) for p in parameters}
        # A layer of which a part doesn't respond goes with the rest.
        self._whole = [all(id(p) in kept for p in layer.parameters) for layer in self.layers]
        return self

    def inverse(self, v: Tensor) -> Tensor:
        """``(A (x) G + damping)^-1 v``, nearly: both factors are damped by themselves."""

        def product(i: int, m: Tensor) -> Tensor:
            left = torch.cholesky_solve(m, self.hop.memory[_key("CG", i)])
            return torch.cholesky_solve(left.T, self.hop.memory[_key("CA", i)]).T

        return self._apply(v, product, 1.0)

    def root(self, v: Tensor) -> Tensor:
        """``L v``, where ``L L^T`` is the inverse."""
        return self._apply(v, lambda i, m: self._triangular(i, m, transposed=True), 0.5)

    def root_transposed(self, v: Tensor) -> Tensor:
        """``L^T v``."""
        return self._apply(v, lambda i, m: self._triangular(i, m, transposed=False), 0.5)

    def root_inverse(self, v: Tensor) -> Tensor:
        """``L^-1 v``."""
        memory = self.hop.memory
        return self._apply(
            v, lambda i, m: memory[_key("CG", i)].T @ m @ memory[_key("CA", i)], -0.5
        )

    def _triangular(self, i: int, m: Tensor, transposed: bool) -> Tensor:
        c_a, c_g = self.hop.memory[_key("CA", i)], self.hop.memory[_key("CG", i)]
        solve = torch.linalg.solve_triangular
        if transposed:
            return solve(c_a, solve(c_g.T, m, upper=True), upper=False, left=False)
        return solve(c_a.T, solve(c_g, m, upper=False), upper=True, left=False)

    def _apply(self, v: Tensor, product: Callable[[int, Tensor], Tensor], power: float) -> Tensor:
        """Layer by layer; ``power`` of the inverse mean curvature for the rest."""
        parts = {
            id(p): part
            for p, part in zip(self._parameters, unflatten(v, self._parameters), strict=True)
        }
        rest = self._rest_scale() ** power
        result = {key: part * rest for key, part in parts.items()}
        for i, layer in enumerate(self.layers):
            if not self._whole[i]:
                continue
            weight, *bias = layer.parameters
            columns = [parts[id(weight)].reshape(len(weight), -1)]
            columns += [parts[id(b)][:, None] for b in bias]
            m = product(i, torch.cat(columns, dim=1))
            width = columns[0].shape[1]
            result[id(weight)] = m[:, :width].reshape(weight.shape)
            for b in bias:
                result[id(b)] = m[:, width]
        return flatten([result[id(p)] for p in self._parameters])

    def _rest_scale(self) -> Tensor | float:
        """The inverse of the layers' mean damped curvature; 1 without layers."""
        if not self.layers:
            return 1.0
        memory = self.hop.memory
        traces, sizes = [], 0
        for i in range(len(self.layers)):
            a, g = memory[_key("A", i)], memory[_key("G", i)]
            traces.append(a.diagonal().sum() * g.diagonal().sum())
            sizes += len(a) * len(g)
        return 1.0 / (torch.stack(traces).sum() / sizes + self.settings.damping)


def _rows(module: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """(R, d_in) what the layer's weight is multiplied with, place by place."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, module.in_features)
    x = x if x.dim() == 4 else x[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    patches = functional.unfold(
        x, module.kernel_size, dilation=module.dilation, stride=module.stride
    )
    return patches.movedim(1, 2).reshape(-1, patches.shape[1])
