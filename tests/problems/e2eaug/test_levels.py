"""E2EAug's traps, one test each, and every row of its tables that is a setting."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from e2eaug_generators import GENERATORS, OTHERS
from torch import Tensor, nn

from mlseg import checkpoint
from mlseg.config import load
from mlseg.engines.segmentation import Segmentation
from mlseg.errors import UserError
from mlseg.problems.e2eaug.masks import encode
from mlseg.problems.e2eaug.networks.pix2pix import Generator
from mlseg.problems.systems import load_system, parse_run

pytestmark = pytest.mark.slow

NOW = {"gan.pretrain": 0}
"""Start with the three levels at once."""


# -------------------------------------------------------------------------- the traps


@pytest.mark.parametrize(
    "changes", [{}, {"generator.search": "decoder"}, *map(GENERATORS.get, OTHERS)]
)
def test_1_the_first_iteration_moves_the_alphas(changes: dict[str, Any]) -> None:
    engine = tiny.build("e2eaug", {**NOW, **changes})
    architecture = engine.architecture
    steps: list[list[Tensor]] = []
    tiny.gradients_of(architecture, steps)
    before = architecture.module.alphas.detach().clone()
    engine.iterate()
    ((gradient,),) = steps
    assert gradient.isfinite().all()
    assert (gradient.abs().sum(1) > 0).all()  # in every cell
    for path in ("via_segmentor", "via_generator"):
        assert float(architecture.metrics[f"hypergradient/{path}"]) > 0
    held = [p for group in architecture.optimizer.param_groups for p in group["params"]]
    assert len(held) == 1
    assert held[0] is architecture.module.alphas
    assert (architecture.module.alphas != before).all()
    # They are the tensors that the generator uses: its image depends on them.
    assert engine.generator.selection() is not None
    label = torch.ones(1, 1, 32, 32)
    (through,) = torch.autograd.grad(engine.generator(label).sum(), architecture.module.alphas)
    assert through.abs().sum() > 0
    assert not any(p is held[0] for p in engine.generator.module.parameters())


@pytest.mark.parametrize("generator", GENERATORS)
def test_2_a_hypergradient_leaves_the_networks_bit_identical(generator: str) -> None:
    """Weights and buffers: running statistics, spectral vectors."""
    engine = tiny.build("e2eaug", {**NOW, **GENERATORS[generator]})
    seen = tiny.around_gradients(engine, engine.architecture)
    engine.iterate()
    engine.iterate()
    assert len(seen) == 4
    assert tiny.same(seen[0], seen[1])
    assert tiny.same(seen[2], seen[3])
    assert not tiny.same(seen[1], seen[2])


def test_3_no_gradient_from_validation_data_reaches_the_lower_levels() -> None:
    """Other validation images give the same networks as long as the alphas stand still."""
    ends = []
    for flip in (False, True):
        changes = {**NOW, "problems.architecture.optimizer.lr": 1e-30}
        engine = tiny.build("e2eaug", changes)
        if flip:
            engine.hook(Segmentation).data.val.images.sub_(255).neg_()
        for _ in range(3):
            engine.iterate()
            for name in ("generator", "discriminator", "segmentor"):
                assert all(p.grad is None for p in getattr(engine, name).module.parameters())
        ends.append(tiny.weights(engine))
    first, second = ends
    assert tiny.same(first, second)


def test_5_lambda_zero_is_the_baseline_step_for_step() -> None:
    """The same segmentor at each validation, with the GAN pre-trained beside it or not."""
    ours = tiny.build("e2eaug", {"synthetic_weight": 0.0, "engine.iterations": 7})
    plain = tiny.build("supervised", {"engine.iterations": 7})
    losses: dict[str, list[float]] = {"ours": [], "plain": []}
    for name, engine in (("ours", ours), ("plain", plain)):
        log = engine._log

        def note(name: str = name, engine: Any = engine, log: Any = log) -> None:
            if "loss" in engine.segmentor.metrics:
                losses[name].append(float(engine.segmentor.metrics["loss"]))
            log()

        engine._log = note  # type: ignore[method-assign]
        engine.run()
    assert len(losses["plain"]) == 7
    assert losses["ours"] == losses["plain"]
    assert tiny.same(
        dict(ours.segmentor.module.state_dict()), dict(plain.segmentor.module.state_dict())
    )
    assert ours.last_validation == plain.last_validation


@pytest.mark.parametrize(
    "changes",
    [
        {"data.train": 1, "data.val": 1, "data.test": 1},
        {"problems.segmentor.batch_size": 1, "problems.generator.batch_size": 1},
        {"data.train": 3, "problems.segmentor.batch_size": 8},
        {"data.image_size": [27, 34], "discriminator.layers": 1},
        {"data.name": "jsrt", "data.root": "/nowhere", "data.when_missing": "synthetic"},
    ],
    ids=["one image", "batch of one", "fewer than a batch", "odd size", "grey"],
)
def test_6_small_and_odd_data(changes: dict[str, Any]) -> None:
    engine = tiny.build("e2eaug", {"gan.pretrain": 1, "engine.iterations": 2, **changes})
    engine.run()
    assert engine.global_step == 3
    assert all(v.isfinite().all() for v in tiny.weights(engine).values())


def test_6_no_test_images_at_all() -> None:
    engine = tiny.build("e2eaug", {**NOW, "engine.iterations": 1, "data.test": 0})
    engine.run()
    assert set(engine.results()["scores"]["last"]) == {"val"}


def test_6_an_image_too_small_for_the_critic_is_one_clear_line() -> None:
    with pytest.raises(UserError, match=r"discriminator.layers: 4 need images of 48 pixels"):
        tiny.build("e2eaug", {"discriminator.layers": 4})


# -------------------------------------------------------------------- stages and the GAN


def test_the_networks_know_only_what_they_should() -> None:
    """E steps on detached fakes, the segmentor alone on its loss, in the stage's own graph."""
    engine = tiny.build("e2eaug")
    assert [s.name for s in engine.stages] == ["pretraining", "search"]
    before = tiny.weights(engine)
    engine.iterate()
    moved = {
        name.split("/")[0]
        for name, v in tiny.weights(engine).items()
        if not tiny.same(v, before[name])
    }
    assert moved == {"generator", "discriminator"}
    engine.enter_stage(1)
    before = tiny.weights(engine)
    engine.iterate()
    moved = {
        name.split("/")[0]
        for name, v in tiny.weights(engine).items()
        if not tiny.same(v, before[name])
    }
    assert moved == {"generator", "discriminator", "segmentor", "architecture"}


def test_pretraining_has_a_rate_of_its_own_and_the_optimizers_start_afresh() -> None:
    engine = tiny.build("e2eaug", {"gan.pretrain_lr": 0.25})
    generator = engine.generator
    rates = {"before": generator.optimizer.param_groups[0]["lr"]}
    for _ in range(3):
        engine.iterate()
    engine.next_stage()
    rates["after"] = generator.optimizer.param_groups[0]["lr"]
    assert rates == {"before": 0.25, "after": 1e-3}
    assert not generator.optimizer.state


def test_a_pretrained_gan_is_reused(tmp_path: Path) -> None:
    first = tiny.build("e2eaug", out=tmp_path / "first")
    first.run()
    saved = tmp_path / "first" / "checkpoints" / "gan.pt"
    second = tiny.build("e2eaug", {"gan.pretrained": str(saved), "engine.iterations": 4})
    assert [s.name for s in second.stages] == ["search"]
    state = checkpoint.load(saved)
    for name in ("generator", "discriminator"):
        assert tiny.same(state[name], dict(getattr(second, name).module.state_dict()))
    second.run()
    # Nothing else distinguishes the two runs.
    assert second.global_step == 4
    with pytest.raises(UserError, match=r"gan.pretrained: .* has generator .*pre-train anew"):
        tiny.build("e2eaug", {"gan.pretrained": str(saved), "generator.channels": 5})
    with pytest.raises(UserError, match="no such checkpoint"):
        tiny.build("e2eaug", {"gan.pretrained": str(tmp_path / "none.pt")})
    # One from before generators and discriminators had names.
    for part in ("generator", "discriminator"):
        del state["shape"][part]["name"]
    older = tmp_path / "older.pt"
    checkpoint.save(older, {k: v for k, v in state.items() if k != "format"})
    tiny.build("e2eaug", {"gan.pretrained": str(older)})
    with pytest.raises(UserError, match=r"gan.pretrained: .* has generator"):
        tiny.build("e2eaug", {"gan.pretrained": str(older), **GENERATORS["spade"]})


# ------------------------------------------------------------------------------- rows

ROWS: dict[str, dict[str, Any]] = {
    "ours": {},
    "GAN": {"generator.search": "none", "gan.frozen": True},
    "separate": {"gan.frozen": True},
    "frozen alphas": {"architecture.mode": "frozen"},
    "random alphas": {"architecture.mode": "random"},
    "vanilla generator, trained on": {"generator.search": "none", "architecture.mode": "frozen"},
    "decoder only": {"generator.search": "decoder"},
    "sigmoid": {"architecture.selection": "sigmoid"},
    "genseg": {"preset": "genseg"},
    "scenes": {"data.name": "synthetic_scenes", "data.image_size": 48},
    "bfloat16": {"precision": "bf16"},
    "SPADE": GENERATORS["spade"],
    "ASAP-Net": GENERATORS["asapnet"],
    "SPADE, frozen": {
        "generator": {**GENERATORS["spade"]["generator"], "search": "none"},
        "gan.frozen": True,
    },
    "ASAP-Net, separate": {**GENERATORS["asapnet"], "gan.frozen": True},
    "SPADE on scenes": {
        **GENERATORS["spade"],
        "data.name": "synthetic_scenes",
        "data.image_size": [32, 48],
    },
    "hinge on patches": {"gan.adversarial": "hinge"},
    "SPADE, bfloat16": {**GENERATORS["spade"], "precision": "bf16"},
    "augmented pairs": {"augmentation": "combine", "gan.augmentation": "flip"},
}
MOVING = {
    "ours": {"generator", "discriminator", "segmentor", "architecture"},
    "GAN": {"segmentor"},
    "separate": {"segmentor"},
    "frozen alphas": {"generator", "discriminator", "segmentor"},
    "random alphas": {"generator", "discriminator", "segmentor"},
    "vanilla generator, trained on": {"generator", "discriminator", "segmentor"},
    "SPADE, frozen": {"segmentor"},
    "ASAP-Net, separate": {"segmentor"},
}


@pytest.mark.parametrize("row", ROWS)
def test_rows(row: str) -> None:
    engine = tiny.build("e2eaug", {"gan.pretrain": 1, "engine.iterations": 2, **ROWS[row]})
    engine.iterate()
    engine.next_stage()
    before = {p.name: [q.detach().clone() for q in p.module.parameters()] for p in engine.problems}
    for _ in range(2):
        engine.iterate()
    engine.validate()
    moved = {
        p.name
        for p in engine.problems
        if not tiny.same(before[p.name], [q.detach() for q in p.module.parameters()])
    }
    assert moved == MOVING.get(row, MOVING["ours"])
    assert all(v.isfinite().all() for v in tiny.weights(engine).values())


def test_random_alphas_are_random_and_frozen_ones_uniform() -> None:
    spreads = {}
    for mode in ("frozen", "random"):
        module = tiny.build("e2eaug", {**NOW, "architecture.mode": mode}).architecture.module
        spreads[mode] = float(module().detach().std())
    assert spreads["frozen"] < 1e-3
    assert spreads["random"] > 0.1


def test_deeplab_as_segmentor() -> None:
    changes = {**NOW, "segmentor": {"name": "deeplabv3"}, "problems.segmentor.batch_size": 1}
    engine = tiny.build("e2eaug", {**changes, "problems.architecture.batch_size": 1})
    engine.iterate()
    assert float(engine.architecture.metrics["hypergradient/via_segmentor"]) > 0


def settings(**changes: Any) -> Any:
    values = {"system": "e2eaug", "data": {"name": "synthetic_lesions"}, "problems": {}}
    return load_system("e2eaug").settings.model_validate(values | changes)


def test_a_generators_own_discriminator_and_losses_fill_in_what_the_config_leaves_open() -> None:
    pix2pix, spade = settings(), settings(generator={"name": "spade"})
    assert (pix2pix.discriminator.name, pix2pix.gan.adversarial) == ("patchgan", "vanilla")
    assert (spade.discriminator.name, spade.gan.adversarial) == ("multiscale", "hinge")
    assert (spade.gan.feature_matching, spade.gan.l1) == (10.0, 0.0)
    own = settings(
        generator={"name": "asapnet"},
        discriminator={"name": "patchgan"},
        gan={"feature_matching": 0.0, "l1": 100.0},
    )
    assert own.discriminator.layers == 3
    assert (own.gan.adversarial, own.gan.l1) == ("hinge", 100.0)


def test_the_presets() -> None:
    paper, genseg = settings(), settings(preset="genseg")
    assert paper.generator.search == "both"
    assert paper.loss.jaccard == 0
    assert paper.problems.segmentor.optimizer.name == "rmsprop"
    assert paper.problems.segmentor.optimizer.lr == 1e-5
    assert paper.problems.segmentor.scheduler.step == "validation"
    assert genseg.generator.search == "decoder"
    assert genseg.loss.jaccard == 1
    assert genseg.mask_augmentation.shear == 8
    assert genseg.problems.architecture.optimizer.lr == 1e-6
    # What the config says stands; naming another optimizer drops the preset's settings of it.
    own = settings(
        preset="genseg",
        loss={"dice": 1.0},
        problems={"segmentor": {"optimizer": {"name": "sgd", "lr": 0.1}}},
    )
    assert own.loss.dice == 1
    assert own.loss.jaccard == 1
    assert own.problems.segmentor.optimizer.model_dump() == {
        "lr": 0.1,
        "weight_decay": 0.0,
        "name": "sgd",
        "momentum": 0.0,
        "nesterov": False,
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gan.frozen": True, "gan.pretrain": 0}, "gan.frozen: an untrained generator"),
        (
            {"problems.generator.scheduler": {"name": "exponential", "factor": 0.5}},
            "the GAN's rate is not scheduled",
        ),
        ({"problems.segmentor.hypergradient": {"method": "identiy"}}, "did you mean 'identity'"),
        ({"problems.segmentor.optimizer": {"name": "adm", "lr": 0.1}}, "adm"),
    ],
)
def test_mistakes_in_the_config_are_one_line(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = tiny.write_config(tmp_path / "c.yaml", "e2eaug", changes)
    with pytest.raises(UserError) as caught:
        parse_run(load(path))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------- parts and records


def test_label_maps_as_the_generators_input() -> None:
    mask = torch.tensor([[[0, 1], [1, 255]]])
    assert encode(mask, 2).tolist() == [[[[-1, 1], [1, -1]]]]
    mask = torch.tensor([[[0, 2], [1, 255]]])
    expected = [[[1, -1], [-1, -1]], [[-1, -1], [1, -1]], [[-1, 1], [-1, -1]]]
    assert encode(mask, 3).tolist() == [expected]


def test_the_run_directory(tmp_path: Path) -> None:
    engine = tiny.build("e2eaug", {"engine.samples": 2, "engine.tensorboard": True}, tmp_path)
    engine.run()
    engine.results()
    names = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert {
        "architecture.json",
        "metrics.jsonl",
        "events.jsonl",
        "checkpoints/last.pt",
        "checkpoints/best.pt",
        "checkpoints/gan.pt",
        "checkpoints/generator.pt",
        "samples/validation_000005.png",
        "samples/synthetic_000005.png",
    } <= names
    assert any(name.startswith("tensorboard/") for name in names)

    record = json.loads((tmp_path / "architecture.json").read_text())
    assert [entry["step"] for entry in record["history"]] == [0, 5, 7]
    assert len(record["cells"]) == len(record["choice"]) == len(record["moved"]) == 6
    assert all(m > 0 for row in record["moved"] for m in row)
    for row in record["history"][-1]["weights"]:
        assert sum(row) == pytest.approx(1.0, abs=1e-6)


def test_the_exported_generator_is_the_trained_one(tmp_path: Path) -> None:
    engine = tiny.build("e2eaug", {"engine.iterations": 2}, tmp_path)
    engine.run()
    engine.results()
    saved = checkpoint.load(tmp_path / "checkpoints" / "generator.pt")
    exported: nn.Module = Generator(**saved["settings"])
    exported.load_state_dict(saved["module"])
    label = torch.randn(2, 1, 32, 32)
    engine.generator.module.eval()
    with torch.no_grad():
        expected = engine.generator(label)
        found = exported.eval()(label)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_pictures_change_nothing(tmp_path: Path) -> None:
    """Neither weights nor buffers nor what is drawn later."""
    ends = []
    for samples in (0, 2):
        engine = tiny.build("e2eaug", {"engine.samples": samples}, tmp_path / str(samples))
        engine.run()
        ends.append(tiny.weights(engine))
    assert tiny.same(*ends)
