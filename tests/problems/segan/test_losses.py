"""The loss of SegAN's game by its definitions."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mlseg.problems.segan.losses import dice_of_maps, multi_scale_l1
from mlseg.segmentation.losses import LossSettings, build_loss


def features(seed: int) -> list[Tensor]:
    """Seven maps of two images, as the critic gives them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 8, 8), (4, 4, 4), (8, 2, 2), (8, 1, 1), (8, 1, 1), (8, 1, 1), (8, 1, 1)]
    return [torch.randn(2, *s, generator=generator, dtype=torch.float64) for s in shapes]


def test_multi_scale_l1_by_its_three_definitions() -> None:
    a, b = features(0), features(1)
    absolute = [(x - y).abs().flatten(1).numpy() for x, y in zip(a, b, strict=True)]
    assert float(multi_scale_l1(a, b)) == pytest.approx(sum(layer.mean() for layer in absolute) / 7)
    # Equation 2 to the letter: a norm, divided by L; equation 1: the mean over images.
    by_image = [sum(layer[n].sum() for layer in absolute) / 7 for n in range(2)]
    assert float(multi_scale_l1(a, b, "sum")) == pytest.approx(sum(by_image) / 2)
    # The public code: weighted features side by side, one mean.
    weights = (1, 1, 2, 2, 2, 2, 4)

    def joined(maps: list[Tensor]) -> Tensor:
        return torch.cat([w * f.flatten(1) for w, f in zip(weights, maps, strict=True)], 1)

    expected = functional.l1_loss(joined(a), joined(b))
    assert float(multi_scale_l1(a, b, "concat")) == pytest.approx(float(expected))


@pytest.mark.parametrize("reduction", ["layer_mean", "concat", "sum"])
def test_multi_scale_l1_is_a_distance(reduction: Any) -> None:
    a, b = features(0), features(1)
    assert float(multi_scale_l1(a, a, reduction)) == 0
    assert float(multi_scale_l1(a, b, reduction)) == float(multi_scale_l1(b, a, reduction)) > 0
    half = [x.bfloat16() for x in a]
    assert multi_scale_l1(half, half, reduction).dtype == torch.float32
    assert float(multi_scale_l1(a[:3], b[:3], reduction)) > 0


def test_dice_of_maps() -> None:
    label = (torch.rand(2, 3, 6, 5, generator=torch.Generator().manual_seed(0)) > 0.5).double()
    assert float(dice_of_maps(label, label)) == pytest.approx(0, abs=1e-12)
    maps = torch.rand(2, 3, 6, 5, dtype=torch.float64)
    expected = []
    for m in range(3):
        p, t = maps[:, m], label[:, m]
        expected.append(1 - float((2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)))
    assert float(dice_of_maps(maps, label)) == pytest.approx(sum(expected) / 3)
    # Of one map it is the Dice of the two-class loss without its background.
    logits = torch.randn(2, 2, 6, 5, dtype=torch.float64)
    settings = LossSettings(cross_entropy=0, dice=1, background=False)
    whole = build_loss(settings)(logits, label[:, 0].long())
    found = dice_of_maps(logits.softmax(1)[:, 1:], label[:, :1])
    assert float(found) == pytest.approx(float(whole))
