"""Mask augmentation whose ranges are learned: the masks themselves, and a run that learns them."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from mlseg import run
from mlseg.parallel import Part
from mlseg.problems.e2eaug.learned_masks import ALWAYS, LearnedMasks, starting_values
from mlseg.problems.e2eaug.masks import encode
from mlseg.segmentation.data import AugmentationSettings
from mlseg.segmentation.data.augmentation import to_theta

ALL = {
    "rotate": 20.0,
    "translate": 0.1,
    "scale": [0.8, 1.3],
    "flip_horizontal": 0.5,
    "flip_vertical": 0.25,
}
BATCH, HEIGHT, WIDTH = 3, 12, 20
CERTAIN, NEVER = 100.0, -100.0  # of a logit: to float64's last place


def learned(
    changes: dict[str, Any], classes: int = 2, ignore: int | None = None, temperature: float = 0.2
) -> LearnedMasks:
    settings = AugmentationSettings.model_validate(changes)
    return LearnedMasks(settings, classes, ignore, temperature)


def masks(classes: int = 2) -> Tensor:
    return torch.randint(
        classes, (BATCH, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(1)
    )


def set_logit(module: LearnedMasks, name: str, value: float) -> None:
    with torch.no_grad():
        module.logits[module.names.index(name)] = value


def numbers(module: LearnedMasks, mask: Tensor, seed: int = 0) -> Tensor:
    return module.draw(mask, torch.Generator().manual_seed(seed))


pytestmark = pytest.mark.usefixtures("double")


def test_it_begins_at_the_configs_values() -> None:
    found = {name: value.item() for name, value in learned(ALL).values().items()}
    expected = {k: v for k, v in ALL.items() if k != "scale"}
    expected |= {"scale_low": 0.8, "scale_high": 1.3}
    expected |= {f"{op}_probability": ALWAYS for op in ("rotate", "translate", "scale")}
    assert found == pytest.approx(expected)


def test_what_the_config_has_off_stays_off() -> None:
    module = learned({"flip_horizontal": 0.5})
    assert module.names == ["flip_horizontal"]
    mask = masks()
    for logit, expected in ((NEVER, mask), (CERTAIN, mask.flip(-1))):
        set_logit(module, "flip_horizontal", logit)
        label, target = module(mask, numbers(module, mask))
        assert torch.equal(target, expected)
        assert torch.equal(label, encode(expected, 2))


def matrix(*entries: float) -> Tensor:
    return torch.tensor([*entries, 0.0, 0.0, 1.0]).view(1, 3, 3)


@pytest.mark.parametrize("operation", ["rotate", "translate", "scale"])
def test_each_operation_is_the_map_of_its_range(operation: str) -> None:
    """Against its matrix in pixels, and torch's own inverse; images aren't square."""
    module = learned({operation: ALL[operation]})
    set_logit(module, f"{operation}_probability", CERTAIN)
    mask = masks()
    drawn = numbers(module, mask)
    label, target = module(mask, drawn)
    inside = (mask == 1).double().unsqueeze(1)
    for index in range(BATCH):
        angle, x, y, wide, tall = drawn[index, 5:10].tolist()
        if operation == "rotate":
            turn = math.radians(20.0 * (2 * angle - 1))
            cos, sin = math.cos(turn), math.sin(turn)
            own = matrix(cos, -sin, 0, sin, cos, 0)
        elif operation == "translate":
            own = matrix(1, 0, 0.1 * (2 * x - 1) * WIDTH, 0, 1, 0.1 * (2 * y - 1) * HEIGHT)
        else:
            own = matrix(0.8 + 0.5 * wide, 0, 0, 0, 0.8 + 0.5 * tall, 0)
        theta = to_theta(own, HEIGHT, WIDTH).double()
        grid = functional.affine_grid(theta, [1, 1, HEIGHT, WIDTH], align_corners=False)
        expected = functional.grid_sample(inside[index : index + 1], grid, align_corners=False)
        # theta is in float32: 1e-7 of a side of 20 pixels, whose neighbours differ by 1.
        torch.testing.assert_close(label[index], 2 * expected[0] - 1, rtol=0, atol=1e-4)
        clear = (expected[0, 0] - 0.5).abs() > 1e-4
        assert torch.equal(target[index][clear], (expected[0, 0] > 0.5).long()[clear])


def test_an_operation_that_does_not_happen_leaves_masks_as_they_are() -> None:
    module = learned(ALL)
    for name in module.names:
        if name.endswith("probability") or name.startswith("flip"):
            set_logit(module, name, NEVER)
    mask = masks()
    label, target = module(mask, numbers(module, mask))
    torch.testing.assert_close(label, encode(mask, 2))
    assert torch.equal(target, mask)


def test_operations_happen_as_often_as_their_probability_says() -> None:
    """P(z > 1/2) = p at any temperature: Maddison et al. (2017), proposition 1 (b)."""
    module = learned({"flip_horizontal": 0.3})
    mask = torch.tensor([[[0, 1]]]).expand(20_000, -1, -1)
    _, target = module(mask, numbers(module, mask))
    share = float((target[:, 0, 0] == 1).double().mean())
    assert abs(share - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 20_000)


@pytest.mark.parametrize(("classes", "ignore"), [(2, None), (2, 255), (4, None), (4, 255)])
def test_what_comes_in_is_background_or_ignored(classes: int, ignore: int | None) -> None:
    module = learned({"translate": 0.4}, classes, ignore)
    set_logit(module, "translate_probability", CERTAIN)
    mask = torch.ones(BATCH, HEIGHT, WIDTH, dtype=torch.long)
    if ignore is not None:
        mask[:, :, ::5] = ignore
    drawn = numbers(module, mask)
    drawn[:, 6] = 1.0  # to the right, by 8 of 20 pixels, and not down
    drawn[:, 7] = 0.5
    label, target = module(mask, drawn)
    outside = 0 if ignore is None else ignore
    expected = torch.cat([torch.full_like(mask[..., :8], outside), mask[..., :-8]], -1)
    assert torch.equal(target, expected)
    torch.testing.assert_close(label, encode(expected, classes))


@pytest.mark.parametrize("fill", ["black", "border", "reflection"])
def test_soft_masks_are_differentiable_by_every_value(fill: str) -> None:
    # Bilinear shares have kinks where a pixel meets a line of the grid: none within 1e-7 here.
    module = learned({**ALL, "fill": fill}, temperature=0.5)
    mask = masks()
    drawn = numbers(module, mask)
    weight = torch.randn(BATCH, 1, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(2))

    def figure(logits: Tensor) -> Tensor:
        label, _ = functional_call(module, {"logits": logits}, (mask, drawn))
        return (label * weight).sum()

    logits = module.logits.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(figure, (logits,), eps=1e-7, atol=1e-4)
    (gradient,) = torch.autograd.grad(figure(logits), logits)
    assert (gradient != 0).all()


def test_targets_are_the_hard_masks_of_the_soft_ones() -> None:
    module = learned(ALL)
    label, target = module(masks(), numbers(module, masks()))
    assert not target.requires_grad
    assert torch.equal(target, (label[:, 0] > 0).long())
    assert float(label.detach().abs().max()) <= 1 + 1e-12


def test_the_same_numbers_however_a_batch_is_shared_out() -> None:
    module = learned(ALL)
    whole = numbers(module, masks())
    parts = [
        module.draw(masks()[span], torch.Generator().manual_seed(0), Part(span.start, span.stop, 3))
        for span in (slice(0, 2), slice(2, 3))
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_a_draw_of_zero_has_no_nan() -> None:
    module = learned(ALL)
    drawn = numbers(module, masks())
    drawn[:, :5] = -math.inf
    label, _ = module(masks(), drawn)
    (gradient,) = torch.autograd.grad(label.sum(), module.logits)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "has no rotation"),
        ({"rotate": 5.0, "shear": 3.0}, "mask_augmentation.shear to 0"),
        ({"crop": 0.1}, "mask_augmentation.crop to 0"),
        ({"rotate": 180.0}, "mask_augmentation.rotate begins at the end"),
        ({"translate": 0.5}, "keep it below 0.5"),
        ({"scale": [0.5, 1.1]}, "keep it above 0.5"),
        ({"scale": [1.1, 1.2]}, "a range about 1"),
        ({"flip_vertical": 1.0}, "mask_augmentation.flip_vertical begins at the end"),
    ],
)
def test_what_cannot_be_learned_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="mask_augmentation") as caught:
        starting_values(AugmentationSettings.model_validate(changes))
    assert words in str(caught.value)


LEARNED: dict[str, Any] = {"level3.mask_augmentation": True, "mask_augmentation": ALL}


def test_a_run_moves_ranges_and_keeps_their_course(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    changes = {**LEARNED, "gan.pretrain": 0, "problems.architecture.optimizer.lr": 0.3}
    engine = tiny.build("e2eaug", {**changes, "engine.samples": 1}, tmp_path)
    steps: list[list[Tensor]] = []
    tiny.gradients_of(engine.architecture, steps)
    module = engine.architecture.module
    held = [p for group in engine.architecture.optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(module.alphas), id(module.masks.logits)]
    engine.run()
    engine.results()
    assert all(g.isfinite().all() and g.any() for step in steps for g in step)
    history = json.loads((tmp_path / "architecture.json").read_text())["history"]
    assert history[0]["mask_rotate"] == pytest.approx(20.0)
    for name in module.masks.names:
        assert history[-1][f"mask_{name}"] != history[0][f"mask_{name}"], name
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert all("mask_rotate" in line for line in lines if line["problem"] == "architecture")


@pytest.mark.parametrize("data", ["isic2018", "synthetic_scenes"])
def test_it_runs_by_command(
    data: str, real: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On real images, and on several classes."""
    torch.set_default_dtype(torch.float32)
    given: dict[str, Any] = {"name": data, "image_size": 32, "train": 6, "val": 4, "test": 3}
    if data == "isic2018":
        given |= {"root": str(real(data)), "when_missing": "error"}
    config = tiny.write_config(tmp_path / "c.yaml", "e2eaug", {**LEARNED, "data": given})
    out = tmp_path / "run"
    assert run.main([str(config), "--dry-run"]) == 0
    assert "not counted" not in capsys.readouterr().out
    assert run.main([str(config), "engine.samples=1", "--out", str(out)]) == 0
    assert (out / "architecture.json").exists()
    assert "mask_rotate" in (out / "report.html").read_text()
