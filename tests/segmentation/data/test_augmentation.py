import itertools
import math
from typing import Any

import pydantic
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from mlseg.errors import UserError
from mlseg.segmentation.data import Augmentation, AugmentationSettings
from mlseg.segmentation.data.augmentation import PRESETS, Draw, compose, jitter, to_theta


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth_image(batch: int = 3, height: int = 24, width: int = 32) -> torch.Tensor:
    coarse = torch.rand(batch, 3, 5, 5, generator=seeded(1)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(-1, 1)


def label_map(batch: int = 3, height: int = 24, width: int = 32) -> torch.Tensor:
    coarse = torch.randint(0, 5, (batch, 1, 6, 8), generator=seeded(2)).float()
    return torch.nn.functional.interpolate(coarse, (height, width)).long().squeeze(1)


def matrix(
    angle: float = 0.0,
    translate: tuple[float, float] = (0.0, 0.0),
    scale: float = 1.0,
    shear: float = 0.0,
) -> torch.Tensor:
    """Source to output: shear, scale, turn, then shift."""
    a, s = math.radians(angle), math.radians(shear)
    turn = torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
    found = torch.eye(3, dtype=torch.float64)
    found[:2, :2] = turn.double() @ torch.tensor([[1.0, -math.tan(s)], [0.0, 1.0]]).double() * scale
    found[:2, 2] = torch.tensor(translate)
    return found[None]


@pytest.mark.parametrize(
    "parameters",
    [
        {"angle": 30.0},
        {"translate": (5, -3)},
        {"scale": 1.25},
        {"shear": 12.0},
        {"angle": -20.0, "translate": (2, 4), "scale": 0.8, "shear": -8.0},
    ],
)
def test_agrees_with_torchvision(parameters: dict[str, Any]) -> None:
    given: dict[str, Any] = {
        "angle": 0.0,
        "translate": (0, 0),
        "scale": 1.0,
        "shear": 0.0,
    } | parameters
    image, mask = smooth_image(), label_map()
    theta = to_theta(matrix(**given), 24, 32).expand(3, 2, 3)
    found, found_mask = Augmentation(AugmentationSettings()).apply(image, mask, Draw(theta, None))
    arguments = {**given, "translate": list(given["translate"]), "shear": [given["shear"], 0.0]}
    # Outside is -1 here; torchvision fills with zeros, or blends its own fill at the edge.
    expected = tv.affine(image + 1, **arguments, interpolation=InterpolationMode.BILINEAR) - 1
    expected_mask = tv.affine(mask.float()[:, None], **arguments)[:, 0].long()
    assert (found - expected).abs().max() < 1e-4
    assert (found_mask != expected_mask).float().mean() < 0.005  # ties between two pixels


def test_flips_agree_with_torch() -> None:
    image, mask = smooth_image(), label_map()
    settings = AugmentationSettings(flip_horizontal=1.0)
    found, found_mask = Augmentation(settings)(image, mask, seeded())
    assert torch.equal(found_mask, mask.flip(-1))
    assert (found - image.flip(-1)).abs().max() < 1e-5
    settings = AugmentationSettings(flip_vertical=1.0)
    _, found_mask = Augmentation(settings)(None, mask, seeded())
    assert torch.equal(found_mask, mask.flip(-2))


def test_composition_is_one_of_the_orders_and_all_orders_come() -> None:
    operations = torch.stack([matrix(angle=40), matrix(translate=(3, 1)), matrix(scale=1.5)], 1)
    possible = [a @ b @ c for a, b, c in itertools.permutations(operations[0])]
    # A scale about the centre and a turn commute: four products differ.
    found = compose(operations.expand(200, 3, 3, 3), seeded())
    hits = [[torch.allclose(one, product) for product in possible] for one in found]
    assert all(any(hit) for hit in hits)
    assert all(any(column) for column in zip(*hits, strict=True))


def test_composition_equals_doing_one_after_the_other() -> None:
    """One resampling of the product moves each pixel where two resamplings would."""
    mask = torch.zeros(1, 40, 40, dtype=torch.int64)
    mask[0, 8:20, 10:25] = 1
    once = Augmentation(AugmentationSettings())
    first, second = matrix(translate=(4, 2)), matrix(angle=90)

    def apply(value: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return once.apply(None, value, Draw(to_theta(step, 40, 40), None))[1]

    assert torch.equal(apply(apply(mask, first), second), apply(mask, second @ first))


def test_masks_keep_their_values_and_their_type() -> None:
    mask = label_map(8) * 2 + 3  # 3, 5, 7, 9, 11: a bilinear filter would make even values
    settings = AugmentationSettings.preset("genseg")
    for dtype in (torch.int64, torch.uint8, torch.float32):
        _, found = Augmentation(settings)(None, mask.to(dtype), seeded())
        assert found.dtype == dtype
        assert set(found.unique().tolist()) <= {0, 3, 5, 7, 9, 11}
    _, found = Augmentation(settings, ignore_index=11)(None, mask, seeded())
    assert set(found.unique().tolist()) <= {3, 5, 7, 9, 11}


@pytest.mark.parametrize("fill", ["black", "border", "reflection"])
def test_image_and_mask_move_together(fill: str) -> None:
    """An image that shows its own mask still shows it after augmentation."""
    mask = torch.nn.functional.interpolate(label_map(16).clamp(max=1)[:, None].float(), (96, 128))
    mask = mask[:, 0].long()
    image = (mask * 2.0 - 1)[:, None].repeat(1, 3, 1, 1)
    settings = AugmentationSettings.model_validate({"preset": "genseg", "fill": fill})
    found, found_mask = Augmentation(settings)(image, mask, seeded())
    shown = (found[:, 0] > 0).long()
    assert (shown != found_mask).float().mean() < 0.01
    assert (found_mask != mask).float().mean() > 0.05


def test_a_kept_draw_can_be_applied_again_and_seeds_decide() -> None:
    augmentation = Augmentation(AugmentationSettings.preset("genseg"))
    mask = label_map()
    draw = augmentation.draw(3, 24, 32, seeded(5))
    _, first = augmentation.apply(None, mask, draw)
    _, again = augmentation.apply(None, mask, draw)
    _, called = augmentation(None, mask, seeded(5))
    _, other = augmentation(None, mask, seeded(6))
    assert torch.equal(first, again)
    assert torch.equal(first, called)
    assert not torch.equal(first, other)


def test_global_generators_are_left_alone() -> None:
    state = torch.get_rng_state()
    augmentation = Augmentation(AugmentationSettings(rotate=30, hue=0.1))
    augmentation(smooth_image(), label_map(), seeded())
    assert torch.equal(torch.get_rng_state(), state)


def drawn(settings: AugmentationSettings, height: int = 24, seed: int = 0) -> torch.Tensor:
    """4000 draws of theta for images 32 wide."""
    theta = Augmentation(settings).draw(4000, height, 32, seeded(seed)).theta
    assert theta is not None
    return theta


def test_draws_stay_within_their_ranges() -> None:
    shift = drawn(AugmentationSettings(translate=0.1))
    assert 0.19 < shift[:, :, 2].abs().max() <= 0.2 + 1e-6  # of a width of 2
    turn = drawn(AugmentationSettings(rotate=15), height=32)
    angle = torch.atan2(turn[:, 0, 1], turn[:, 0, 0]).rad2deg()
    assert 14.9 < angle.abs().max() <= 15 + 1e-3
    assert abs(angle.mean()) < 1
    flip = drawn(AugmentationSettings(flip_horizontal=0.3))
    assert abs((flip[:, 0, 0] < 0).float().mean() - 0.3) < 0.03


def test_a_crop_shows_the_window_at_full_size() -> None:
    """With both sides' draws known, the kept window's edges land on the image's edges."""
    crop = drawn(AugmentationSettings(crop=0.2), seed=3)
    edges = crop[:, 0, 0, None] * torch.tensor([-1.0, 1.0]) + crop[:, 0, 2, None]
    left, right = (edges[:, 0] + 1) / 2, (1 - edges[:, 1]) / 2
    for side in (left, right):
        assert -0.2 - 1e-6 <= side.min() < -0.19
        assert 0.19 < side.max() <= 0.2 + 1e-6
    assert abs(torch.corrcoef(torch.stack([left, right]))[0, 1]) < 0.15


def test_a_rotation_of_a_rectangle_stays_a_rotation() -> None:
    mask = torch.zeros(1, 60, 120)
    mask[0, 20:40, 50:70] = 1  # a square of 20 in the middle of a wide image
    theta = to_theta(matrix(angle=45), 60, 120)
    _, found = Augmentation(AugmentationSettings()).apply(None, mask, Draw(theta, None))
    height = found.amax(2).sum()
    width = found.amax(1).sum()
    assert abs(height - width) <= 1
    assert abs(height - 20 * math.sqrt(2)) <= 2


def test_off_is_the_identity() -> None:
    image, mask = smooth_image(), label_map()
    found, found_mask = Augmentation(AugmentationSettings.off())(image, mask, seeded())
    assert found is image
    assert found_mask is mask


def test_gradients_reach_the_image() -> None:
    image = smooth_image().requires_grad_()
    augmentation = Augmentation(AugmentationSettings(rotate=20, brightness=0.2))
    found, _ = augmentation(image, label_map(), seeded())
    found.sum().backward()
    assert image.grad is not None
    assert image.grad.abs().sum() > 0


def colours(
    brightness: float = 1.0, contrast: float = 1.0, saturation: float = 1.0, hue: float = 0.0
) -> torch.Tensor:
    return torch.tensor([[brightness, contrast, saturation, hue]]).repeat(3, 1)


def test_colour_agrees_with_torchvision() -> None:
    image = smooth_image() * 0.5
    unit = (image + 1) / 2
    for found, expected in (
        (jitter(image, colours(brightness=0.8)), tv.adjust_brightness(unit, 0.8)),
        (jitter(image, colours(contrast=0.7)), tv.adjust_contrast(unit, 0.7)),
        (jitter(image, colours(saturation=1.3)), tv.adjust_saturation(unit, 1.3)),
    ):
        # torchvision rounds BT.601's weights.
        assert ((found + 1) / 2 - expected).abs().max() < 2e-3
    assert (jitter(image, colours()) - image).abs().max() < 1e-5


def test_hue_turns_colours_and_keeps_grey_and_luma() -> None:
    grey = torch.full((3, 3, 4, 4), 0.2)
    assert torch.allclose(jitter(grey, colours(hue=1.0)), grey, atol=1e-5)
    image = smooth_image() * 0.3
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    turned = jitter(image, colours(hue=2.0))
    assert torch.allclose((turned * luma).sum(1), (image * luma).sum(1), atol=1e-4)
    back = jitter(turned, colours(hue=2 * math.pi - 2.0))
    assert (turned - image).abs().max() > 0.05
    assert torch.allclose(back, image, atol=1e-3)


def test_colour_leaves_masks_and_grey_images_work() -> None:
    settings = AugmentationSettings(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.2)
    mask = label_map()
    image, found = Augmentation(settings)(smooth_image()[:, :1], mask, seeded())
    assert image.shape == (3, 1, 24, 32)
    assert image.abs().max() <= 1
    assert torch.equal(found, mask)
    assert Augmentation(settings)(None, mask, seeded())[0] is None


def test_a_window_is_cut_out_of_image_and_mask_at_one_place() -> None:
    """Every pixel of the image says where it is."""
    height, width = 6, 7
    places = torch.arange(height * width).reshape(height, width)
    image = (places / 42).expand(500, 1, height, width)
    mask = places.expand(500, height, width)
    augmentation = Augmentation(AugmentationSettings(window=[4, 5]))
    cut, labels = augmentation(image, mask, seeded())
    assert labels.shape == (500, 4, 5)
    torch.testing.assert_close(cut[:, 0] * 42, labels.float())
    corners = labels[:, 0, 0]
    expected = corners[:, None, None] + places[:4, :5]
    assert torch.equal(labels, expected)
    counts = torch.bincount(corners, minlength=42)
    assert set(counts.nonzero().flatten().tolist()) == {0, 1, 2, 7, 8, 9, 14, 15, 16}
    assert int(counts[counts > 0].min()) > 500 / 9 / 2, "every place, about as often"


def test_a_window_comes_before_all_else() -> None:
    image, mask = smooth_image(height=24, width=32), label_map(height=24, width=32)
    plain = AugmentationSettings(window=16)
    flipped = AugmentationSettings(window=16, flip_horizontal=1.0)
    (cut, labels), (turned, other) = (
        Augmentation(s)(image, mask, seeded()) for s in (plain, flipped)
    )
    torch.testing.assert_close(turned, cut.flip(3))
    assert torch.equal(other, labels.flip(2))
    draw = Augmentation(flipped).draw(3, 24, 32, seeded())
    again, _ = Augmentation(flipped).apply(image, mask, draw)
    assert torch.equal(again, turned)
    masks_alone = Augmentation(flipped)(None, mask, seeded())[1]
    assert torch.equal(masks_alone, other)


def test_a_window_of_the_images_size_is_the_image() -> None:
    image, mask = smooth_image(), label_map()
    same, labels = Augmentation(AugmentationSettings(window=[24, 32]))(image, mask, seeded())
    assert torch.equal(same, image)
    assert torch.equal(labels, mask)


def test_a_window_that_is_too_large_or_no_size() -> None:
    settings = AugmentationSettings(window=[30, 20])
    with pytest.raises(UserError, match=r"augmentation.window: 30x20 pixels don't fit into"):
        Augmentation(settings)(smooth_image(), label_map(), seeded())
    assert settings.output_size((30, 40)) == (30, 20)
    assert AugmentationSettings().output_size((30, 40)) == (30, 40)
    for wrong in (0, [3, 4, 5], [], [8, 0]):
        with pytest.raises(pydantic.ValidationError):
            AugmentationSettings.model_validate({"window": wrong})


def test_presets() -> None:
    assert AugmentationSettings.preset("genseg").scale == [0.8, 1.2]
    changed = AugmentationSettings.model_validate({"preset": "paper", "flip_vertical": 0.5})
    assert changed.rotate == AugmentationSettings.preset("paper").rotate
    assert changed.flip_vertical == 0.5
    for name in PRESETS:
        settings = AugmentationSettings.preset(name)
        assert AugmentationSettings.model_validate(settings.model_dump()) == settings
    with pytest.raises(pydantic.ValidationError, match="no preset 'papr'"):
        AugmentationSettings.model_validate("papr")
    with pytest.raises(pydantic.ValidationError, match="the lower first"):
        AugmentationSettings(scale=[1.2, 0.8])
