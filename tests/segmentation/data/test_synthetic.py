import time
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mlseg.segmentation.data import (
    BatchLoader,
    Samples,
    synthetic_lesions,
    synthetic_scenes,
    to_float,
)
from mlseg.segmentation.data.entry import data_set

pytestmark = pytest.mark.slow  # reads or trains for seconds

Maker = Callable[..., tuple[torch.Tensor, torch.Tensor]]
CLASSES = data_set("synthetic_scenes").spec.classes


def scenes(
    indices: Sequence[int],
    size: tuple[int, int],
    seed: int = 0,
    channels: int = 3,
    ignore_index: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return synthetic_scenes(indices, size, CLASSES, ignore_index, seed, channels)


@pytest.mark.parametrize("make", [synthetic_lesions, scenes])
def test_an_image_depends_on_its_seed_and_number_only(make: Maker) -> None:
    images, masks = make(range(6), (24, 32), seed=3)
    assert images.shape == (6, 3, 24, 32)
    assert images.dtype == masks.dtype == torch.uint8
    alone, its_mask = make([4], (24, 32), seed=3)
    assert torch.equal(alone[0], images[4])
    assert torch.equal(its_mask[0], masks[4])
    other, _ = make([4], (24, 32), seed=4)
    assert not torch.equal(other[0], images[4])
    grey, same = make(range(6), (24, 32), seed=3, channels=1)
    assert grey.shape == (6, 1, 24, 32)
    assert torch.equal(same, masks)


@pytest.mark.parametrize("make", [synthetic_lesions, scenes])
def test_another_size_shows_the_same_scene(make: Maker) -> None:
    _, small = make(range(20), (32, 32))
    _, large = make(range(20), (96, 96))
    shrunk = large[:, 1::3, 1::3]
    assert (small == shrunk).float().mean() > 0.9


def test_lesions_vary_in_size_place_and_contrast() -> None:
    images, masks = synthetic_lesions(range(300), (48, 48))
    area = masks.float().mean((1, 2))
    assert set(masks.unique().tolist()) == {0, 1}
    assert area.min() > 0
    assert area.quantile(0.1) < 0.06
    assert area.quantile(0.9) > 0.35
    places = masks.nonzero().float()
    centres = torch.stack([places[places[:, 0] == n, 1:].mean(0) for n in range(300)])
    assert centres.std(0).min() > 2
    grey = images.float().mean(1)
    inside = (grey * masks).sum((1, 2)) / masks.sum((1, 2))
    outside = (grey * (1 - masks)).sum((1, 2)) / (1 - masks.float()).sum((1, 2))
    contrast = outside - inside
    assert (contrast > 0).float().mean() > 0.85  # nearly always darker than the skin
    assert contrast.quantile(0.2) < 20  # often hardly
    assert contrast.quantile(0.8) > 40


def test_no_threshold_on_brightness_finds_the_lesions() -> None:
    images, masks = synthetic_lesions(range(100), (32, 32))
    grey = images.float().mean(1)
    scores = [jaccard(grey < cut, masks.bool()) for cut in range(30, 220, 10)]
    assert max(scores) < 0.45


def test_scenes_hold_every_class_and_mark_borders_if_asked() -> None:
    _, masks = scenes(range(30), (48, 64))
    share = torch.bincount(masks.flatten().long(), minlength=len(CLASSES)) / masks.numel()
    assert share.min() > 0.003
    assert share.max() < 0.6
    _, marked = scenes(range(30), (48, 64), ignore_index=255)
    assert 0 < (marked == 255).float().mean() < 0.2
    assert torch.equal(marked[marked != 255], masks[marked != 255])


@pytest.mark.parametrize("classes", [("a", "b", "c"), tuple(f"c{n}" for n in range(30))])
def test_scenes_of_unknown_classes(classes: tuple[str, ...]) -> None:
    images, masks = synthetic_scenes(range(40), (24, 24), classes)
    assert images.shape == (40, 3, 24, 24)
    assert masks.unique().tolist() == list(range(len(classes)))


def test_seven_hundred_images_take_seconds() -> None:
    start = time.process_time()
    synthetic_lesions(range(140), (64, 64))
    assert 5 * (time.process_time() - start) < 20


def jaccard(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean over images; (N, H, W) booleans."""
    union = (found | truth).sum((1, 2)).clamp(min=1)
    return float(((found & truth).sum((1, 2)) / union).mean())


class SmallUNet(nn.Module):
    def __init__(self, width: int = 12):
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for channels in (inputs, outputs):
                layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False)]
                layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
            return nn.Sequential(*layers)

        self.down = nn.ModuleList(
            [block(3, width), block(width, 2 * width), block(2 * width, 4 * width)]
        )
        self.up = nn.ModuleList([block(6 * width, 2 * width), block(3 * width, width)])
        self.out = nn.Conv2d(width, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.down[0](x)
        second = self.down[1](F.max_pool2d(first, 2))
        x = self.down[2](F.max_pool2d(second, 2))
        for block, skip in zip(self.up, (second, first), strict=True):
            x = block(torch.cat([F.interpolate(x, scale_factor=2), skip], 1))
        return self.out(x)


def test_a_small_unet_learns_the_lesions_but_not_perfectly() -> None:
    torch.manual_seed(0)
    size, spec = (40, 40), data_set("synthetic_lesions").spec
    images, masks = synthetic_lesions(range(32 + 150), size)
    samples = Samples([str(n) for n in range(len(images))], images, masks, spec)
    train, test = samples.subset(range(32)), samples.subset(range(32, 182))
    net = SmallUNet()
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    loader = BatchLoader(train, 8)
    for _ in range(30):
        for image, mask in loader:
            optimizer.zero_grad()
            F.cross_entropy(net(image), mask).backward()
            optimizer.step()
    net.eval()
    truth = test.masks.bool()
    with torch.no_grad():
        score = jaccard(net(to_float(test.images)).argmax(1).bool(), truth)
    constant = jaccard(torch.ones_like(truth), truth)
    assert constant < 0.3
    assert constant + 0.2 < score < 0.9
    assert score > 0.5
