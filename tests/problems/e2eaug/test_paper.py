"""The configs against the paper: every value that it gives, and what docs/e2eaug.md says of others.

Source: E2EAug, table 1 and section 4.1.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from mlseg.config import load
from mlseg.problems.systems import load_system, parse_run
from mlseg.segmentation.losses import LossSettings

CONFIGS = Path(__file__).parents[3] / "configs"

# Table 1: training and validation images at the full size, test images.
COUNTS = {
    "isic": (160, 40, 594),
    "jsrt": (140, 35, 72),
    "buid": (80, 20, 230),
    "fpd": (80, 20, 182),
    "kvasir": (480, 120, 200),
}
# Tables 2 and 3: "examples" are those for training and for validation together.
SMALLEST = {"isic": 40, "jsrt": 9}
ELSEWHERE = {"isic": ["ph2", "dermis"], "jsrt": ["nlm_mc", "nlm_sz"]}
NAMES = [f"e2eaug_{name}{kind}" for name in COUNTS for kind in ("", "_deeplab")]
NAMES += ["e2eaug_isic_spade", "e2eaug_isic_asapnet"]


def settings(name: str, *overrides: str) -> Any:
    return parse_run(load(CONFIGS / f"{name}.yaml", list(overrides)))[0]


@pytest.mark.parametrize("name", NAMES)
def test_section_4_1(name: str) -> None:
    run = settings(name)
    assert run.preset == "paper"
    for level in ("generator", "discriminator"):
        optimizer = getattr(run.problems, level).optimizer
        assert optimizer.name == "adam"
        assert list(optimizer.betas) == [0.5, 0.999]
        assert (optimizer.lr, optimizer.weight_decay) == (1e-5, 1e-3)
    assert run.gan.pretrain_lr == 1e-5
    segmentor = run.problems.segmentor
    assert segmentor.optimizer.name == "rmsprop"
    assert (segmentor.optimizer.lr, segmentor.optimizer.momentum) == (1e-5, 0.9)
    assert segmentor.optimizer.weight_decay == 1e-3
    assert segmentor.scheduler.name == "reduce_on_plateau"
    assert run.problems.architecture.optimizer.name == "adam"
    assert run.engine.iterations == 5000
    assert run.synthetic_weight == 1.0  # lambda, section 3.2
    assert run.loss == LossSettings.model_validate({"name": "weighted_sum", "cross_entropy": 1.0})
    masks = run.mask_augmentation.model_dump(exclude_defaults=True)
    assert set(masks) == {"rotate", "flip_horizontal", "translate"}
    assert run.segmentor.name == ("deeplabv3" if name.endswith("_deeplab") else "unet")


@pytest.mark.parametrize("name", ["spade", "asapnet"])
def test_figure_7_differs_in_the_gan_alone(name: str) -> None:
    """Park et al., section 4: hinge, feature matching at 10, two scales."""
    own, pix2pix = settings(f"e2eaug_isic_{name}"), settings("e2eaug_isic")
    for part in ("data", "segmentor", "loss", "engine", "problems", "mask_augmentation", "seed"):
        assert getattr(own, part) == getattr(pix2pix, part), part
    assert (own.generator.name, own.generator.search) == (name, "both")
    assert (own.discriminator.name, own.discriminator.scales) == ("multiscale", 2)
    assert (own.gan.adversarial, own.gan.feature_matching, own.gan.l1) == ("hinge", 10.0, 0.0)
    assert (own.gan.perceptual, own.gan.perceptual_weight) == ("none", 10.0)


@pytest.mark.parametrize("system", ["e2eaug", "supervised"])
@pytest.mark.parametrize("name", COUNTS)
def test_table_1(system: str, name: str) -> None:
    data = settings(f"{system}_{name}").data
    train, val, test = COUNTS[name]
    examples = SMALLEST.get(name, train + val)
    assert data.train + data.val == examples
    # Table 1's proportion, to the whole image.
    assert abs(data.val - examples * val / (train + val)) < 1
    assert data.test == test
    assert data.out_of_distribution == ELSEWHERE.get(name, [])


@pytest.mark.parametrize("name", COUNTS)
def test_the_baselines_differ_in_their_data_alone(name: str) -> None:
    """The same segmentor, optimizer, schedule, steps, selection and split as Ours."""
    ours, baseline = settings(f"e2eaug_{name}"), settings(f"supervised_{name}")
    assert baseline.augmented_pairs == "added"
    for part in ("data", "segmentor", "loss", "engine", "seed"):
        assert getattr(baseline, part) == getattr(ours, part), part
    hop = {"hypergradient"}
    mine, theirs = (run.problems.segmentor.model_dump(exclude=hop) for run in (ours, baseline))
    assert mine == theirs


def test_the_public_codes_config_is_its_preset() -> None:
    """Key by key where the preset says something; the rest is that of the paper's config."""
    values = {"system": "e2eaug", "data": {"name": "isic2018"}, "problems": {}}
    preset = load_system("e2eaug").settings.model_validate({**values, "preset": "genseg"})
    config, paper = settings("e2eaug_isic_genseg"), settings("e2eaug_isic")
    for part in ("loss", "generator", "mask_augmentation"):
        assert getattr(config, part) == getattr(preset, part), part
        assert getattr(config, part) != getattr(paper, part), part
    assert config.gan.pretrain_lr == preset.gan.pretrain_lr == 2e-5
    own, given = config.problems.architecture.optimizer, preset.problems.architecture.optimizer
    assert (own.lr, own.weight_decay) == (given.lr, given.weight_decay) == (1e-6, 1e-5)
    assert config.data == paper.data


@pytest.mark.parametrize(
    ("name", "images", "expected"),
    # The public code's numbers of epochs times images, in batches of 2, an odd rest a batch of one.
    [("isic", 32, 3200), ("isic", 160, 16000), ("jsrt", 7, 700), ("kvasir", 480, 24000)],
)
def test_pretraining_follows_the_number_of_images(name: str, images: int, expected: int) -> None:
    run = settings(f"e2eaug_{name}", f"data.train={images}")
    assert run.gan.pretraining(images, run.problems.generator.batch_size) == expected
    assert settings(f"e2eaug_{name}", "gan.pretrain=9").gan.pretraining(images, 2) == 9


def test_epochs_are_counted_in_the_images_that_there_are() -> None:
    engine = tiny.build("e2eaug", {"gan.pretrain": {"epochs": 3}, "data.train": 5})
    image, _ = engine.generator.get_batch()
    assert engine.stages[0].iterations == math.ceil(3 * 5 / len(image))


def test_a_seed_keeps_the_split() -> None:
    """ "Random initialization of model weights" alone, section 4.1."""
    assert settings("e2eaug_isic", "seed=7").data == settings("e2eaug_isic").data


def test_the_hop_from_the_generator_sees_the_critic_of_its_step() -> None:
    """Why the discriminator steps last: nothing else reads it in between."""
    engine = tiny.build("e2eaug", {"gan.pretrain": 0})
    critic = engine.discriminator
    seen: list[tuple[bool, torch.Tensor]] = []

    def note(*_: Any) -> None:
        weights = torch.cat([p.detach().flatten() for p in critic.module.parameters()])
        seen.append((engine.generator.replaying, weights))

    critic.module.register_forward_pre_hook(note)
    engine.iterate()  # the first step is evaluated once more, to see whether it repeats itself
    seen.clear()
    start = torch.cat([p.detach().flatten() for p in critic.module.parameters()])
    engine.iterate()
    hops = [weights for replaying, weights in seen if replaying]
    assert len(hops) == 2  # the two evaluations of the finite difference
    assert all(torch.equal(weights, start) for _, weights in seen)
    after = torch.cat([p.detach().flatten() for p in critic.module.parameters()])
    assert not torch.equal(after, start)
