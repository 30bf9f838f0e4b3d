"""The alphas' gradient on the real system, in float64, against full double backward.

The reference is written out for E2EAug: one update of the generator, one of the segmentor, each a
differentiable function of the alphas, then the validation loss. Nothing of the library's
hypergradients has a part in it, only the networks and the losses.
"""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import tiny
import torch
from e2eaug_generators import GENERATORS, OTHERS
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from mlseg.problems.e2eaug.losses import feature_matching, gan_loss
from mlseg.problems.e2eaug.masks import encode
from mlseg.testing import updates

LEARNED_MASKS = {
    "level3.mask_augmentation": True,
    "mask_augmentation": {"preset": "paper", "scale": [0.8, 1.2], "flip_vertical": 0.3},
}
PATHS = {"direct": ["segmentor"], "through G": ["generator"], "sum": ["generator", "segmentor"]}
"""The lower levels whose paths the architecture's gradient takes."""
SGD = {
    "problems.generator.optimizer": {"name": "sgd", "lr": 1e-2},
    "problems.segmentor.optimizer": {"name": "sgd", "lr": 1e-2},
}
SMOOTH = {
    # Adversarial loss and cross-entropy, nothing else.
    "without": 0.0,
    # The reconstruction loss sqrt(1 + e^2) - 1 in place of |e|.
    "pseudo-Huber": 100.0,
}


pytestmark = pytest.mark.usefixtures("double")


def pseudo_huber(input: Tensor, target: Tensor) -> Tensor:
    return (((input - target) ** 2 + 1).sqrt() - 1).mean()


class Watched:
    """E2EAug after some iterations, and what each level's last step started from."""

    def __init__(self, path: str, changes: Mapping[str, Any], iterations: int) -> None:
        self.engine = tiny.build("e2eaug", {"gan.pretrain": 0, **changes})
        engine = self.engine
        stage = engine.stages[0]
        stage.u2l = {engine.architecture: [getattr(engine, name) for name in PATHS[path]]}
        engine.enter_stage(0)
        for problem in (engine.generator, engine.segmentor, engine.architecture):
            problem.set_train_data_loader(tiny.Doubled(problem.train_data_loader[0]))
        self.before: dict[str, dict[str, Tensor]] = {}
        self.optimizers: dict[str, dict[str, Any]] = {}
        self.random: dict[str, Tensor] = {}
        for problem in engine.problems:
            self._watch(problem)
        gradients: list[list[Tensor]] = []
        tiny.gradients_of(engine.architecture, gradients)
        for _ in range(iterations):
            engine.iterate()
        self.gradients = gradients[-1]
        self.gradient = self.gradients[0]

    def _watch(self, problem: Any) -> None:
        former = problem.training_step

        def training_step(batch: Any) -> Any:
            if not problem.replaying:
                name = problem.name
                self.random[name] = torch.get_rng_state()
                self.before[name] = {
                    n: p.detach().clone() for n, p in problem.module.named_parameters()
                }
                self.optimizers[name] = copy.deepcopy(problem.optimizer.state_dict())
            return former(batch)

        problem.training_step = training_step


def reference(
    watched: Watched, path: str, update: Mapping[str, updates.Update], of: str = "alphas"
) -> Tensor:
    """d L_val / d alphas through the paths in ``path``; or by another of level three's parameters.

    A guide of the generator's steps counts as constant.
    """
    engine = watched.engine
    generator, segmentor = engine.generator, engine.segmentor
    alphas = watched.before["architecture"]["alphas"].clone().requires_grad_()
    free = {"alphas": alphas}
    factor = torch.tensor(segmentor.synthetic_weight)
    if segmentor.learns_weight:
        log_weight = watched.before["architecture"]["log_synthetic_weight"].clone()
        free["log_synthetic_weight"] = log_weight.requires_grad_()
        factor = log_weight.exp()
    weights, constant = alphas.softmax(1), alphas.detach().softmax(1)
    through_g, direct = (name in PATHS[path] for name in ("generator", "segmentor"))

    def stepped(problem: Any, loss: Tensor, point: dict[str, Tensor]) -> dict[str, Tensor]:
        name = problem.name
        grads = torch.autograd.grad(loss, list(point.values()), create_graph=True)
        after = {}
        for index, (key, g) in enumerate(zip(point, grads, strict=True)):
            before = watched.before[name][key]
            after[key] = update[name](problem.optimizer, watched.optimizers[name], index, before, g)
            present = dict(problem.module.named_parameters())[key]
            torch.testing.assert_close(after[key], present, rtol=1e-9, atol=1e-12)
        return after

    def leaves(name: str) -> dict[str, Tensor]:
        return {k: p.clone().requires_grad_() for k, p in watched.before[name].items()}

    # Level 1: G' = G - step(dL_gan/dG), with the discriminator as it was then.
    image, mask = generator.cur_batch
    label = encode(mask, generator.num_classes)
    torch.set_rng_state(watched.random["generator"])
    point = leaves("generator")
    fake = call(generator.module, point, label, weights)
    critic = watched.before["discriminator"]
    judged = call(engine.discriminator.module, critic, torch.cat([label, fake], 1))
    loss = generator.l1 * pseudo_huber(fake, image)
    if generator.adversarial == "hinge":
        real = call(engine.discriminator.module, critic, torch.cat([label, image], 1))
        loss = loss - sum(scale[-1].mean() for scale in judged) / len(judged)
        loss = loss + generator.feature_matching * feature_matching(judged, real)
    else:
        loss = loss + gan_loss(judged, real=True)
    made = stepped(generator, loss, point)
    if not through_g:
        made = {k: p.detach() for k, p in made.items()}

    # Level 2: W' = W - step(dL_seg/dW), on real pairs and on images made by G'.
    image, mask, drawn = segmentor.cur_batch
    if engine.architecture.module.masks is None:
        augmented = drawn
        label = encode(augmented, generator.num_classes)
    else:
        logits = watched.before["architecture"]["masks.logits"].clone()
        free["masks.logits"] = logits.requires_grad_()
        point = {"logits": logits if direct else logits.detach()}
        label, augmented = functional_call(segmentor.masks, point, (mask, drawn))
    torch.set_rng_state(watched.random["segmentor"])
    synthetic = call(generator.module, made, label, weights if direct else constant)
    point = leaves("segmentor")
    loss = factor * segmentor.criterion(call(segmentor.module, point, synthetic), augmented)
    loss = loss + segmentor.criterion(call(segmentor.module, point, image), mask)
    after = stepped(segmentor, loss, point)

    # Level 3: L_val(W'), in evaluation mode.
    image, mask = engine.architecture.cur_batch
    segmentor.module.eval()
    loss = engine.architecture.criterion(call(segmentor.module, after, image), mask)
    segmentor.module.train()
    (gradient,) = torch.autograd.grad(loss, free[of], materialize_grads=True)
    return gradient


def call(module: nn.Module, parameters: dict[str, Tensor], *inputs: Tensor) -> Any:
    """``module`` with other parameters and a copy of its buffers."""
    buffers = {n: b.clone() for n, b in module.named_buffers()}
    return functional_call(module, {**parameters, **buffers}, inputs)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def method(**spec: Any) -> dict[str, Any]:
    return {f"problems.{name}.hypergradient": spec for name in ("generator", "segmentor")}


EXACT: dict[str, tuple[dict[str, Any], float]] = {
    "identity": ({"method": "identity", "linearise": "before_step"}, 1e-9),
    # Networks of ReLU and max-pooling have gradients that jump: the step must be so small that no
    # unit changes sides. In float32 there is no such step. In float64 rounding is 1e-16 over the
    # step, 1e-7, times a condition: of 100 at most.
    "finite_difference": (
        {"method": "finite_difference", "linearise": "before_step", "epsilon": 1e-9},
        1e-5,
    ),
}
"""Settings, and the relative error allowed: agreement far beyond a cosine of 0.99."""


@pytest.mark.parametrize("loss", SMOOTH)
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("path", PATHS)
def test_one_step_of_descent(
    path: str, name: str, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functional, "l1_loss", pseudo_huber)
    spec, allowed = EXACT[name]
    watched = Watched(path, {**SGD, "gan.l1": SMOOTH[loss], **method(**spec)}, iterations=2)
    true = reference(watched, path, {"generator": updates.sgd, "segmentor": updates.sgd})
    assert cosine(watched.gradient, true) > 0.99
    assert error(watched.gradient, true) < allowed


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("path", PATHS)
def test_the_papers_optimizers(path: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam and RMSprop at the scale of their own steps."""
    monkeypatch.setattr(functional, "l1_loss", pseudo_huber)
    spec, allowed = EXACT[name]
    watched = Watched(path, method(**spec, scale="optimizer"), iterations=3)
    own = {"generator": updates.adam, "segmentor": updates.rmsprop}
    true = reference(watched, path, own)
    assert cosine(watched.gradient, true) > 0.99
    assert error(watched.gradient, true) < allowed


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("generator", OTHERS)
def test_through_spade_and_asapnet(
    generator: str, path: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spectral and instance normalisation, hinge and feature matching in the place of pix2pix's."""
    monkeypatch.setattr(functional, "l1_loss", pseudo_huber)
    spec, allowed = EXACT[name]
    changes = {**SGD, **GENERATORS[generator], **method(**spec)}
    watched = Watched(path, changes, iterations=2)
    assert watched.engine.generator.feature_matching == 10.0
    true = reference(watched, path, {"generator": updates.sgd, "segmentor": updates.sgd})
    assert cosine(watched.gradient, true) > 0.99
    assert error(watched.gradient, true) < allowed


@pytest.mark.parametrize("generator", OTHERS)
def test_the_papers_optimizers_through_spade_and_asapnet(
    generator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functional, "l1_loss", pseudo_huber)
    spec, allowed = EXACT["identity"]
    changes = {**GENERATORS[generator], **method(**spec, scale="optimizer")}
    watched = Watched("sum", changes, iterations=3)
    own = {"generator": updates.adam, "segmentor": updates.rmsprop}
    assert error(watched.gradient, reference(watched, "sum", own)) < allowed


@pytest.mark.parametrize("name", EXACT)
def test_a_learned_lambda(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It enters the segmentor's step alone; the alphas' gradient is what it was."""
    monkeypatch.setattr(functional, "l1_loss", pseudo_huber)
    spec, allowed = EXACT[name]
    changes = {"level3.synthetic_weight": True, "synthetic_weight": 0.7}
    watched = Watched("sum", {**SGD, **method(**spec), **changes}, iterations=2)
    update = {"generator": updates.sgd, "segmentor": updates.sgd}
    for found, of in zip(watched.gradients, ("alphas", "log_synthetic_weight"), strict=True):
        true = reference(watched, "sum", update, of)
        assert true.norm() > 0
        assert error(found, true) < allowed


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("generator", GENERATORS)
def test_learned_ranges_of_mask_augmentation(
    generator: str, path: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the soft mask and the generator, whose own step has no part in them."""
    monkeypatch.setattr(functional, "l1_loss", pseudo_huber)
    spec, allowed = EXACT[name]
    changes = {**SGD, **GENERATORS[generator], **method(**spec), **LEARNED_MASKS}
    watched = Watched(path, changes, iterations=2)
    update = {"generator": updates.sgd, "segmentor": updates.sgd}
    found = dict(zip(("alphas", "masks.logits"), watched.gradients, strict=True))
    for of, gradient in found.items():
        true = reference(watched, path, update, of)
        if of == "masks.logits" and path == "through G":
            assert not gradient.any()
            assert not true.any()
            continue
        assert (true != 0).all()
        assert cosine(gradient, true) > 0.99
        assert error(gradient, true) < allowed


@pytest.mark.parametrize("generator", ["pix2pix", "spade"])
def test_through_cells_of_different_operators(
    generator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functional, "l1_loss", pseudo_huber)
    spec, allowed = EXACT["identity"]
    network = {**GENERATORS[generator]["generator"], "candidates": "rich"}
    watched = Watched("sum", {**SGD, **method(**spec), "generator": network}, iterations=2)
    assert watched.gradient.shape[1] == 5
    true = reference(watched, "sum", {"generator": updates.sgd, "segmentor": updates.sgd})
    assert error(watched.gradient, true) < allowed


def test_both_paths_have_a_part_in_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "l1_loss", pseudo_huber)
    spec, _ = EXACT["identity"]
    # One iteration: afterwards the alphas have moved along different gradients.
    parts = {path: Watched(path, {**SGD, **method(**spec)}, 1).gradient for path in PATHS}
    torch.testing.assert_close(parts["sum"], parts["direct"] + parts["through G"])
    for path in ("direct", "through G"):
        assert parts[path].norm() > 1e-3 * parts["sum"].norm()
