"""Two networks that teach each other: their gradients, what isn't looked at, passes, resuming."""

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from resuming import check
from torch import Tensor
from torch.nn import functional

from mlseg.errors import UserError
from mlseg.problems.semi_supervised.losses import squared_dice

pytestmark = pytest.mark.slow

CTBCT: dict[str, Any] = {"method": "ctbct"}
DCT: dict[str, Any] = {"method": "dct", "partner": {"name": "unet", "channels": 4, "levels": 2}}
METHODS = {"ctbct": CTBCT, "dct": DCT}
FULL = {"weight": 1.0, "epochs": 1, "begin": 0, "end": 1}
"""A ramp that an epoch of the whole run leaves at exp(-5)."""


def make(method: str, out: Path | None = None, /, **changes: Any) -> Any:
    return tiny.build("semi_supervised", {**METHODS[method], **changes}, out)


def whole(method: str, /, **changes: Any) -> Any:
    """An engine whose terms have weights of 1 from the first step on."""
    engine = make(method, **changes)
    for peer in engine.problems:
        peer.consistency = lambda steps: 1.0
        peer.adversarial = lambda steps: 1.0
    return engine


def gradients(engine: Any) -> dict[str, list[Tensor]]:
    """Of both problems' first step."""
    found: dict[str, list[list[Tensor]]] = {p.name: [] for p in engine.problems}
    for problem in engine.problems:
        tiny.gradients_of(problem, found[problem.name])
    engine.iterate()
    return {name: steps[0] for name, steps in found.items()}


@pytest.mark.parametrize("method", METHODS)
def test_both_step_along_the_gradient_of_the_papers_sum(method: str) -> None:
    """The whole sum, written out here, differentiated at once by the weights of both networks."""
    engine = whole(method, partner=DCT["partner"])
    found = gradients(engine)
    reference = whole(method, partner=DCT["partner"])
    one, two = (p.module.train() for p in reference.problems)
    total = sum_of_ctbct(reference, one, two) if method == "ctbct" else sum_of_dct(reference)
    expected = torch.autograd.grad(total, [*one.parameters(), *two.parameters()])
    for mine, its in zip([*found["segmentor"], *found["partner"]], expected, strict=True):
        # Sums in another order: rounding of a few hundred float32 additions.
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)


def sum_of_ctbct(engine: Any, one: Any, two: Any) -> Tensor:
    image, mask, _ = engine.segmentor.draw()
    n = len(mask)
    p, q = one(image).softmax(1), two(image).softmax(1)

    def on_masks(p: Tensor) -> Tensor:
        entropy = -p[:n].gather(1, mask[:, None]).log().mean()
        return 0.5 * (entropy + dice(p[:n], mask))

    return (
        on_masks(p)
        + on_masks(q)
        + dice(p[n:], q[n:].argmax(1).detach())
        + dice(q[n:], p[n:].argmax(1).detach())
    )


def dice(p: Tensor, label: Tensor) -> Tensor:
    """The specification's formula, class by class."""
    losses = []
    for c in range(p.shape[1]):
        y = (label == c).float()
        top = 2 * (p[:, c] * y).sum() + 1e-5
        losses.append(1 - top / (p[:, c].square().sum() + y.square().sum() + 1e-5))
    return torch.stack(losses).mean()


def sum_of_dct(engine: Any) -> Tensor:
    (x1, y1), (x2, y2), (u, _) = engine.segmentor.draw()
    one, two = engine.segmentor, engine.partner
    clean = [one(x1).softmax(1), two(x2).softmax(1)]
    others = [one(u).softmax(1), two(u).softmax(1)]
    bad1, bad2 = one.mislead(x1, y1, u), two.mislead(x2, y2, u)
    ce = functional.nll_loss(clean[0].log(), y1) + functional.nll_loss(clean[1].log(), y2)

    def entropy(p: Tensor) -> Tensor:
        return -(p * p.log()).sum(1)

    jsd = (entropy(sum(others) / 2) - (entropy(others[0]) + entropy(others[1])) / 2).mean()

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return functional.kl_div(q.softmax(1).log(), p.detach(), reduction="none").sum(1).mean()

    adversarial = kl(clean[0], two(bad1[0])) + kl(others[0], two(bad1[1]))
    adversarial = adversarial + kl(clean[1], one(bad2[0])) + kl(others[1], one(bad2[1]))
    return ce + jsd + adversarial / 4


@pytest.mark.parametrize("method", METHODS)
def test_no_gradient_passes_through_what_the_other_says(method: str) -> None:
    engine = whole(method)
    segmentor, partner = engine.problems
    loss = segmentor.training_step(segmentor.get_batch())["loss"]
    through = torch.autograd.grad(
        loss, list(partner.module.parameters()), allow_unused=True, retain_graph=True
    )
    assert all(g is None for g in through)


@pytest.mark.parametrize("method", METHODS)
def test_without_weights_it_is_the_supervised_run(method: str) -> None:
    """Bit for bit, network by network: the first one's data order and weights are the same."""
    off: dict[str, Any] = {"consistency.weight": 0.0, "loss": {"name": "weighted_sum"}}
    if method == "dct":
        off["adversarial"] = None
    ends = []
    plain = {"problems.segmentor.optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9}}
    for engine in (make(method, **off), tiny.build("supervised", plain)):
        for _ in range(3):
            engine.iterate()
        ends.append({k: v for k, v in tiny.weights(engine).items() if k.startswith("segm")})
    assert tiny.same(*ends)


@pytest.mark.parametrize("method", METHODS)
def test_masks_of_the_others_are_not_looked_at(method: str) -> None:
    """Whatever their loader gives as masks."""
    ends = []
    for poison in (False, True):
        engine = whole(method)
        if poison:
            loader = engine.segmentor.train_data_loader[1]
            draw = torch.Generator().manual_seed(3)  # the networks draw from the global one
            shape = loader.samples.masks.shape
            random = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)
            object.__setattr__(loader.samples, "masks", random)
        for _ in range(3):
            engine.iterate()
        ends.append(tiny.weights(engine))
    assert tiny.same(*ends)


def test_images_that_mislead() -> None:
    engine = whole("dct")
    partner = engine.partner
    (_, _), (image, mask), (other, _) = engine.segmentor.draw()
    before = tiny.weights(engine)
    moved = partner.mislead(image, mask, other)
    assert tiny.same(tiny.weights(engine), before), "nor do BatchNorm's statistics notice"
    assert partner.module.training
    assert partner.epsilon == 2 * 0.03
    for was, now in zip((image, other), moved, strict=True):
        # The addition may round by half a unit in the last place of numbers up to 2.
        assert (now - was).abs().max() <= partner.epsilon + 2**-23
        assert now.min() >= -1
        assert now.max() <= 1
        assert not torch.equal(now, was)
    with torch.no_grad():
        partner.module.eval()
        worse, clean = (functional.cross_entropy(partner(x), mask) for x in (moved[0], image))
    assert worse > clean


@pytest.mark.parametrize(
    ("method", "weight", "forward", "backward"),
    [("ctbct", 1.0, 1, 1), ("dct", 0.0, 2, 2), ("dct", 1.0, 5, 5)],
)
def test_passes(method: str, weight: float, forward: int, backward: int) -> None:
    engine = whole(method)
    for peer in engine.problems:
        peer.adversarial = lambda steps: weight
    counters = [tiny.Counter(p.module) for p in engine.problems]
    engine.iterate()
    assert [(c.forward, c.backward) for c in counters] == 2 * [(forward, backward)]


@pytest.mark.parametrize("method", METHODS)
def test_resumed_it_is_the_uninterrupted_run(method: str, tmp_path: Path) -> None:
    changes = {
        "engine.iterations": 6,
        "engine.checkpoint_every": 1,
        "augmentation": {"flip_vertical": 0.5, "rotate": 20.0},
        "problems.segmentor.scheduler": {"name": "exponential", "factor": 0.5, "step": "epoch"},
    }
    check(lambda out: make(method, out, **changes), tmp_path, [1, 4], "killed")


def test_the_partners_scheduler_counts_the_segmentors_epochs() -> None:
    engine = make(
        "ctbct",
        **{"problems.segmentor.scheduler": {"name": "exponential", "factor": 0.5, "step": "epoch"}},
    )
    for _ in range(4):  # six images, two a batch: the fourth step begins the second epoch
        engine.iterate()
    rates = [p.optimizer.param_groups[0]["lr"] for p in engine.problems]
    assert rates == [0.025, 0.025]


def test_the_networks_are_two() -> None:
    engine = make("dct")
    one, two = (p.module.state_dict() for p in engine.problems)
    assert not tiny.same(one, two), "of one shape, with weights of their own"
    assert engine.segmentor.optimizer is not engine.partner.optimizer


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.unlabelled": 0}, "data.unlabelled: 0 images without masks"),
        ({"data.unlabelled": -1}, "unlabelled"),
        ({"method": "cbtct"}, "method"),
        ({"adversarial": {"weight": 1, "epochs": 2, "end": 1}}, "adversarial: is a part of dct"),
        ({"problems.partner": {"batch_size": 3}}, "problems.partner.batch_size: the networks step"),
        ({"problems.partner": {"accumulate": 2}}, "problems.partner.accumulate: the networks step"),
        ({"consistency": {"begin": 200}}, "begin must lie before end"),
        ({"consistency": {"end": 201}}, "end within the epochs"),
    ],
)
def test_mistakes(changes: dict[str, Any], said: str) -> None:
    with pytest.raises((UserError, ValueError), match=said):
        tiny.build("semi_supervised", changes)


def test_a_network_that_there_cannot_be_is_named_by_its_key() -> None:
    partner = {"name": "swin_unet", "channels": 10}
    with pytest.raises(UserError, match=r"^partner: .*channels: 10 can't be shared out over 3"):
        tiny.build("semi_supervised", {"partner": partner})


def test_another_system_has_no_use_for_images_without_masks() -> None:
    with pytest.raises(ValueError, match=r"data.unlabelled: system 'supervised' learns nothing"):
        tiny.build("supervised", {"data.unlabelled": 4})


def test_the_ramps_values() -> None:
    """The specification's, and those that the formula gives at its ends."""
    engine = make("ctbct", **{"engine.iterations": 30000})
    weight = engine.segmentor.consistency
    for t, value in ((0, 0.0007), (50, 0.0060), (100, 0.0287), (150, 0.0732), (200, 0.1)):
        assert weight(150 * t) == pytest.approx(value, abs=5e-5)
        assert weight(150 * t + 149) == weight(150 * t), "it changes each 150 steps"
    engine = make("dct", **{"engine.iterations": 24000})
    cot, adversarial = engine.segmentor.consistency, engine.segmentor.adversarial
    assert cot(0) == pytest.approx(0.5 * math.exp(-5))
    assert cot(50 * 200) == cot(24000) == 0.5
    assert adversarial(20 * 200 - 1) == 0
    assert adversarial(20 * 200) == pytest.approx(0.05 * math.exp(-5))
    assert adversarial(50 * 200) == 0.05


def test_dice_of_what_is_certain() -> None:
    label = torch.tensor([[[0, 1], [1, 1]]])
    p = functional.one_hot(label, 2).permute(0, 3, 1, 2).float()
    assert squared_dice(p, label).item() == pytest.approx(0.0, abs=1e-5)
    assert squared_dice(1 - p, label).item() == pytest.approx(1.0, abs=1e-5)
