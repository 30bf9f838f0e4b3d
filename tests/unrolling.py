"""A level to unroll, and the truth of it by ``torch.optim``'s differentiable optimizers.

The reference takes the same steps with ``differentiable=True`` on copies of the weights that carry
their history, batch by batch and draw by draw, and differentiates the outer loss through all of it.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mlseg.engines.base import Engine
from mlseg.engines.settings import EngineSettings
from mlseg.problems.base import Problem
from mlseg.problems.config import Config

FEATURES, WEIGHTS = 3, 4
Optimizers = Callable[[Sequence[Tensor]], torch.optim.Optimizer]


class Net(nn.Module):
    """BatchNorm, dropout, two layers with the same weights, a frozen and an unused one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, FEATURES)
        self.norm = nn.BatchNorm1d(FEATURES)
        self.again = nn.Linear(FEATURES, FEATURES)
        self.again.weight = self.first.weight
        self.frozen = nn.Linear(FEATURES, FEATURES)
        self.unused = nn.Linear(2, 2)
        self.dropout = nn.Dropout(0.2)
        self.last = nn.Linear(FEATURES, 1)
        self.frozen.requires_grad_(False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.first(x)))
        hidden = torch.tanh(self.again(self.dropout(hidden)))
        return self.last(self.frozen(hidden)).squeeze(1)


class PlainNet(nn.Sequential):
    """What TorchOpt takes as well: (B, 3) to (B,), each parameter used once and trained."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(FEATURES, 4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 1), nn.Flatten(0)
        )


class Scales(nn.Module):
    """Logarithms of the weights of residuals, and of a learning rate."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        draw = torch.randn(WEIGHTS, generator=generator, dtype=torch.float64)
        self.scales = nn.Parameter(0.3 * draw)


def lower_loss(predict: Callable[[Tensor], Tensor], scales: Tensor, batch: Any) -> Tensor:
    x, y, group = batch
    return (scales.exp()[group] * (predict(x) - y) ** 2).mean()


def upper_loss(predict: Callable[[Tensor], Tensor], batch: Any) -> Tensor:
    x, y, _ = batch
    return ((predict(x) - y) ** 2).mean()


class Low(Problem):
    """Notes what each of its steps started from."""

    notes: list[dict[str, Any]]
    with_rate = False

    def training_step(self, batch: Any) -> Tensor:
        if not self.replaying:
            self.notes.append(
                {
                    "batch": batch,
                    "random": torch.get_rng_state(),
                    "weights": {n: p.detach().clone() for n, p in self.module.named_parameters()},
                    "optimizer": copy.deepcopy(self.optimizer.state_dict()),
                }
            )
        return lower_loss(self.module, self.top.module.scales, batch)

    def learning_rates(self) -> list[Tensor] | None:
        if not self.with_rate:
            return None
        return [0.05 * self.top.module.scales[-1].exp() for _ in self.optimizer.param_groups]


class Top(Problem):
    gradients: list[Tensor]

    def training_step(self, batch: Any) -> Tensor:
        self.low.module.eval()
        loss = upper_loss(self.low.module, batch)
        self.low.module.train()
        return loss

    def grad_callback(self) -> None:
        self.gradients.append(self.module.scales.grad.clone())


def batches(seed: int, count: int) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    group = torch.arange(8) % WEIGHTS
    return [(draw(8, FEATURES), 2.0 * draw(8), group) for _ in range(count)]


def program(
    method: Any,
    optimizer: Optimizers,
    unroll: int = 3,
    with_rate: bool = False,
    plain: bool = False,
    device: str = "cpu",
    **config: Any,
) -> Any:
    torch.manual_seed(4)
    net, scales = PlainNet() if plain else Net(), Scales()
    made = Config(hypergradient=method, unroll_steps=unroll, **config)
    low = Low(
        "low", net, optimizer([p for p in net.parameters() if p.requires_grad]), batches(0, 5), made
    )
    low.notes, low.with_rate = [], with_rate
    top = Top("top", scales, torch.optim.SGD(scales.parameters(), 0.01), batches(1, 3), Config())
    top.gradients = []
    return Engine(
        [low, top],
        EngineSettings(tensorboard=False),
        u2l={top: [low]},
        l2u={low: [top]},
        device=device,
        quiet=True,
    )


def sgd(**settings: Any) -> Optimizers:
    return lambda params: torch.optim.SGD(params, **{"lr": 0.05, **settings})


def reference(engine: Any, steps: int, accumulate: int = 1, clip: float = 0.0) -> Tensor:
    """Through the last ``steps`` steps, at the values that the top level had before its own."""
    low, top = engine.low, engine.top
    scales = engine.scales_before.clone().requires_grad_()
    notes = low.notes[-steps * accumulate :]
    named = [(n, p) for n, p in low.module.named_parameters() if p.requires_grad]
    weights = {n: notes[0]["weights"][n].clone().requires_grad_() for n, _ in named}
    moving = {n: w.clone() for n, w in weights.items()}
    settings = {k: v for k, v in low.optimizer.param_groups[0].items() if k != "params"}
    settings = {k: v for k, v in settings.items() if k in low.optimizer.defaults}
    settings = {k: v for k, v in settings.items() if k not in ("fused", "decoupled_weight_decay")}
    settings |= {"differentiable": True, "foreach": None}
    optimizer = type(low.optimizer)(list(moving.values()), **settings)
    for state in notes[0]["optimizer"]["state"].values():
        for key, value in state.items():
            state[key] = value.clone() if isinstance(value, Tensor) else value
    optimizer.load_state_dict(
        {**notes[0]["optimizer"], "param_groups": optimizer.state_dict()["param_groups"]}
    )
    if low.with_rate:
        optimizer.param_groups[0]["lr"] = 0.05 * scales[-1].exp()
    present = torch.get_rng_state()
    for index in range(steps):
        total: list[Any] = [None] * len(moving)
        for note in notes[index * accumulate : (index + 1) * accumulate]:
            torch.set_rng_state(note["random"])
            used = {n: w.clone() for n, w in moving.items()}  # the step writes into its own
            loss = lower_loss(_call(low.module, used), scales, note["batch"]) / accumulate
            found = torch.autograd.grad(
                loss, list(used.values()), create_graph=True, allow_unused=True
            )
            total = [f if t is None else t + f for t, f in zip(total, found, strict=True)]
        if clip:
            size = torch.stack([g.norm() for g in total if g is not None]).norm()
            total = [
                None if g is None else g * (clip / (size + 1e-6)).clamp(max=1.0) for g in total
            ]
        for w, g in zip(moving.values(), total, strict=True):
            w.grad = g
        optimizer.step()
    torch.set_rng_state(present)
    for n, p in named:
        torch.testing.assert_close(moving[n], p, rtol=1e-7, atol=1e-9)
    module = copy.deepcopy(low.module).eval()
    loss = upper_loss(_call(module, moving), top.cur_batch)
    return torch.autograd.grad(loss, scales)[0]


def by_difference(engine: Any, make: Callable[[Any], Any]) -> Tensor:
    """Central differences of the outer loss over whole first windows, taken anew.

    At the buffers and on the batch of ``engine``: a hypergradient doesn't count how BatchNorm's
    running statistics came about.
    """
    shift, slopes = 1e-5, []
    evaluation = copy.deepcopy(engine.low.module).eval()
    for index in range(WEIGHTS):
        losses = []
        for sign in (1.0, -1.0):
            again = make({"method": "identity"})
            with torch.no_grad():
                again.top.module.scales[index] += sign * shift
            run(again, 1)
            weights = {n: p.detach() for n, p in again.low.module.named_parameters()}
            losses.append(upper_loss(_call(evaluation, weights), engine.top.cur_batch))
        slopes.append((losses[0] - losses[1]) / (2.0 * shift))
    return torch.stack(slopes).detach()


def _call(module: nn.Module, weights: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    buffers = {n: b.clone() for n, b in module.named_buffers()}
    return lambda x: functional_call(module, {**weights, **buffers}, (x,))


def run(engine: Any, uppers: int) -> Tensor:
    """The ``uppers``-th gradient of the top level; keeps its weights before that step."""
    torch.manual_seed(uppers)  # programs that are compared see the same draws
    while len(engine.top.gradients) < uppers:
        engine.scales_before = engine.top.module.scales.detach().clone()
        engine.iterate()
    return engine.top.gradients[-1]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


OPTIMIZERS: dict[str, Optimizers] = {
    "sgd": sgd(weight_decay=1e-2),
    "sgd momentum": sgd(momentum=0.9),
    "sgd nesterov": sgd(momentum=0.9, nesterov=True),
    "sgd dampening": sgd(momentum=0.9, dampening=0.3),
    "adam": lambda p: torch.optim.Adam(p, 0.05, betas=(0.5, 0.9), weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.05, momentum=0.9, weight_decay=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1, lr_decay=0.1),
}
NOT_BY_TORCH: dict[str, Optimizers] = {
    "adam amsgrad": lambda p: torch.optim.Adam(p, 0.05, betas=(0.5, 0.2), amsgrad=True),
    "rmsprop centred": lambda p: torch.optim.RMSprop(p, 0.05, alpha=0.9, centered=True),
}
