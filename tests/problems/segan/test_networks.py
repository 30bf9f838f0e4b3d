"""SegAN's networks against figure 1, and the adaptive logistic against equation 3."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mlseg.errors import UserError
from mlseg.problems.segan.networks.critic import ClassCritics, Critic
from mlseg.problems.segan.networks.segmentor import AdaptiveLogistic, GlobalConvolution, SegAN
from mlseg.segmentation.nets import SegmentorSettings, build_segmentor, class_probabilities, decide


def millions(network: nn.Module) -> float:
    return round(sum(p.numel() for p in network.parameters()) / 1e6, 1)


def shapes(blocks: Any, run: Any) -> list[tuple[int, ...]]:
    """(C, H, W) of what each block gives."""
    found: list[tuple[int, ...]] = []
    for block in blocks:
        block.register_forward_hook(lambda m, i, out: found.append(tuple(out.shape[1:])))
    run()
    return found


# ------------------------------------------------------------------------------ figure 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 102.4),
        ({"expansion": 2.0}, 374.6),
        # The caption's rule, by which the decoder's two 7x7 convolutions are whole ones.
        ({"global_kernel": 9}, 143.6),
    ],
)
def test_sizes_of_the_segmentor(settings: dict[str, Any], expected: float) -> None:
    with torch.device("meta"):
        assert millions(SegAN(3, 2, **settings)) == expected


def test_size_of_the_critic() -> None:
    with torch.device("meta"):
        assert millions(Critic(3)) == 15.4


def test_feature_maps_of_the_segmentor() -> None:
    with torch.device("meta"):
        network, image = SegAN(3, 2), torch.zeros(2, 3, 128, 128)
    found = shapes([*network.encoder, *network.decoder, network.head], lambda: network(image))
    assert found == [
        (64, 64, 64), (128, 32, 32), (256, 16, 16), (512, 8, 8), (1024, 4, 4), (2048, 2, 2),
        (1024, 4, 4), (512, 8, 8), (256, 16, 16), (128, 32, 32), (64, 64, 64), (64, 128, 128),
        (1, 128, 128),
    ]  # fmt: skip


def test_feature_maps_of_the_critic() -> None:
    with torch.device("meta"):
        features = Critic(3)(torch.zeros(2, 3, 128, 128))
    assert [tuple(f.shape[1:]) for f in features] == [
        (3, 128, 128), (64, 64, 64), (128, 32, 32), (256, 16, 16), (512, 8, 8), (512, 4, 4),
        (512, 2, 2),
    ]  # fmt: skip


def kernels(block: Any) -> list[tuple[int, ...]]:
    first = block[0]
    convolutions = [m for m in first.modules() if isinstance(m, nn.Conv2d)]
    return [c.kernel_size for c in convolutions]


def test_kernels_and_norms() -> None:
    with torch.device("meta"):
        network: Any = SegAN(3, 2, global_kernel=9)
        critic: Any = Critic(3)
    assert [kernels(b) for b in network.encoder] == [[(k, k)] for k in (7, 5, 5, 5, 5, 4)]

    def crossed(k: int) -> list[tuple[int, ...]]:
        return [(k, 1), (1, k), (1, k), (k, 1)]

    expected = [[(3, 3)], [(7, 7)], [(7, 7)], crossed(9), crossed(9), crossed(11)]
    assert [kernels(b) for b in network.decoder] == expected
    expected = [crossed(13), crossed(11), crossed(9), [(7, 7)], [(4, 4)], [(3, 3)]]
    assert [kernels(b) for b in critic.blocks] == expected
    assert network.head.kernel_size == (5, 5)
    for blocks in (network.encoder, critic.blocks):
        normed = [isinstance(block[1], nn.BatchNorm2d) for block in blocks]
        assert normed == [False, True, True, True, True, True]
    assert all(isinstance(block[1], nn.BatchNorm2d) for block in network.decoder)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_global_convolution_is_two_separable_ones(stride: int) -> None:
    """Each pair is the convolution with the product of its kernels."""
    made = GlobalConvolution(2, 3, 9, stride).double()
    image = torch.randn(1, 2, 12, 16, dtype=torch.float64)

    def whole(pair: nn.Sequential) -> Tensor:
        first, second = pair
        assert isinstance(first, nn.Conv2d)
        assert isinstance(second, nn.Conv2d)
        return torch.einsum("mchw,omkl->ochwkl", first.weight, second.weight)

    tall = whole(made.tall_wide)[:, :, :, 0, 0, :]
    wide = whole(made.wide_tall)[:, :, 0, :, :, 0].transpose(2, 3)
    expected = functional.conv2d(image, tall + wide, stride=stride, padding=4)
    torch.testing.assert_close(made(image), expected)


def test_the_public_codes_critic_has_whole_kernels() -> None:
    with torch.device("meta"):
        assert [kernels(b) for b in Critic(3, global_kernel=None).blocks] == [
            [(k, k)] for k in (13, 11, 9, 7, 4, 3)
        ]


# ---------------------------------------------------------------------------- the logistic


def test_the_logistic_is_equation_3() -> None:
    logistic = AdaptiveLogistic()
    z = torch.linspace(-4, 4, 33, dtype=torch.float64)
    for k in (1.0, 0.3):
        logistic.k.fill_(k)
        expected = torch.tensor([1 / (1 + math.exp(-v / k)) for v in z.tolist()])
        torch.testing.assert_close(logistic(z).sigmoid().float(), expected)
    # The paper's threshold at its k: a logit of -0.1216.
    assert math.isclose(0.3 * math.log(0.4 / 0.6), -0.1216, abs_tol=5e-5)


def test_k_is_annealed_by_the_formula_and_stops_at_its_floor() -> None:
    logistic = AdaptiveLogistic()
    found = {}
    for epoch in range(1, 351):
        logistic.end_epoch(decay=0.9, every=25, floor=0.3)
        found[epoch] = float(logistic.k)
        assert found[epoch] == pytest.approx(max(0.3, 0.9 ** (epoch // 25)), rel=1e-6)
    assert found[24] == 1.0
    assert found[25] == pytest.approx(0.9)
    assert found[299] > 0.3
    assert found[300] == found[350] == pytest.approx(0.3)


def test_the_annealing_is_part_of_the_models_state() -> None:
    network = SegAN(3, 2, channels=4, levels=2)
    for _ in range(5):
        network.logistic.end_epoch(0.9, 2, 0.3)
    other = SegAN(3, 2, channels=4, levels=2)
    other.load_state_dict(network.state_dict())
    assert float(other.logistic.k) == float(network.logistic.k) == pytest.approx(0.81)
    image = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(other.eval()(image), network.eval()(image))
    other.logistic.end_epoch(0.9, 2, 0.3)
    assert float(other.logistic.k) == pytest.approx(0.9**3)


# --------------------------------------------------------------------------- the contract


@pytest.mark.parametrize(("classes", "maps"), [(2, 1), (5, 5)])
def test_any_size_trains_and_gives_label_maps(classes: int, maps: int) -> None:
    values = {"name": "segan", "channels": 4, "levels": 3}
    settings = SegmentorSettings.model_validate(values)
    network: Any = build_segmentor(settings, 1, classes)
    network.logistic.k.fill_(0.5)
    logits = network(torch.rand(2, 1, 37, 50) * 2 - 1)
    assert logits.shape == (2, classes, 37, 50)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    found = class_probabilities(network, logits)
    if maps == 1:
        torch.testing.assert_close(found.sum(1), torch.ones(2, 37, 50))
        torch.testing.assert_close(found[:, 1], logits[:, 1].sigmoid())
        assert torch.equal(decide(found), logits.argmax(1))
        assert decide(found, 0.2).sum() > decide(found, 0.8).sum()
    else:
        torch.testing.assert_close(found, logits.sigmoid())
        assert torch.equal(decide(found, 0.9), logits.argmax(1))


@pytest.mark.parametrize("levels", [2, 4, 6])
def test_fewer_levels_leave_out_the_deepest(levels: int) -> None:
    network = SegAN(3, 2, channels=2, levels=levels)
    assert kernels(network.encoder[-1]) == [(4, 4)]
    assert kernels(network.decoder[-1])[0] == (11, 1)
    assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 2, 64, 64)


@pytest.mark.parametrize("levels", [1, 7])
def test_levels_out_of_range(levels: int) -> None:
    with pytest.raises(ValueError, match=r"levels: from 2 to 6"):
        SegAN(3, 2, levels=levels)


# ----------------------------------------------------------------------------- the critics


@pytest.mark.parametrize(("stacked", "critics", "channels"), [(False, 4, 3), (True, 1, 12)])
def test_one_critic_per_class_or_one_for_all(stacked: bool, critics: int, channels: int) -> None:
    made = ClassCritics(3, 4, stacked, channels=4, layers=2)
    image, maps = torch.randn(2, 3, 16, 16), torch.rand(2, 4, 16, 16)
    features = made(image, maps)
    assert len(features) == critics
    assert [len(f) for f in features] == [3] * critics
    assert [f[0].shape[1] for f in features] == [channels] * critics
    # The pixel level is the image times its map, channel by channel.
    pixels = torch.cat([f[0] for f in features], 1).reshape(2, 4, 3, 16, 16)
    for n, m, c in ((0, 0, 0), (1, 3, 2)):
        torch.testing.assert_close(pixels[n, m, c], image[n, c] * maps[n, m])


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 16, 16), (3, 1, 16, 8), (2, 1, 16, 16)])
def test_3_a_label_that_would_broadcast_is_refused(shape: tuple[int, ...]) -> None:
    made = ClassCritics(3, 1, False, channels=2, layers=2)
    with pytest.raises(UserError, match="label maps of shape") as caught:
        made(torch.zeros(3, 3, 16, 16), torch.zeros(shape))
    assert "\n" not in str(caught.value)


def test_layers_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"layers: from 1 to 6, not 7"):
        Critic(3, layers=7)
