"""Two levels: how much is each training image worth, where many masks are wrong?

    python examples/reweighting.py               # about half a minute on one core

Of 64 training images 38 have the mask of another image. Sixteen more are known to be right. The
lower level trains a segmentor on all 64, each with a weight; the upper level learns the weights,
such that the segmentor does well on the sixteen:

    min_v  L(clean; W*)                            weights
    s.t.   W* = argmin_W sum_n s(v_n) L_n(W)       segmentor

The upper loss doesn't contain the weights: its gradient by them goes through a step of the
segmentor, which is what mlseg calls a hypergradient. Printed are both losses, the mean weight of
right and of wrong masks (no level is told which is which), and the Jaccard index on test images; at
the end beside segmentors that gave all images the same weight, and that saw the right ones alone.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.data import DataLoader, TensorDataset

from mlseg import Config, Engine, EngineSettings, Problem

# ------------------------------------------------------------------------------- the defaults

SEED = 0
SIZE = 32  # pixels a side; a multiple of 4, which the segmentor pools over
TRAIN, WRONG = 64, 38  # images, and how many of them have the mask of another one
CLEAN, TEST = 16, 200
BATCH = 16  # of the lower level; the upper one sees all of the clean images in each step
ITERATIONS = 200  # steps of each level
SHOW = 40  # iterations between two printed lines
CHANNELS = 8  # of the segmentor
RATE = 3e-3  # of the segmentor's Adam
WEIGHT_RATE = 0.2  # of the weights': a logit has to move by some units within 200 steps
HYPERGRADIENT = {"method": "identity", "scale": "optimizer"}
# One step of the lower level's optimizer, differentiated by double backward; exact for that step,
# which is what the next one of the upper level can still change. ``scale: optimizer`` takes Adam's
# step per unit of gradient into account. docs/how-to-choose.md has the alternatives.

# ---------------------------------------------------------------------------------- the data


def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ellipses on a ground: (N, 3, H, W) images in [-1, 1], (N, 1, H, W) masks of 0 and 1."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(count, channels, 1, 1, generator=generator)

    line = torch.linspace(-1.0, 1.0, SIZE)
    y, x = torch.meshgrid(line, line, indexing="ij")
    angle, dx, dy = uniform(0.0, 3.1416), x - uniform(-0.4, 0.4), y - uniform(-0.4, 0.4)
    along = (dx * angle.cos() + dy * angle.sin()) / uniform(0.25, 0.6)
    across = (dy * angle.cos() - dx * angle.sin()) / uniform(0.25, 0.6)
    mask = (along**2 + across**2 < 1.0).float()
    skin = uniform(-0.1, 0.5, 3)
    lesion = skin - uniform(0.1, 0.5, 3)
    light = uniform(-0.4, 0.4) * x + uniform(-0.4, 0.4) * y
    noise = 0.15 * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return (skin + (lesion - skin) * mask + light + noise).clamp(-1.0, 1.0), mask


def training_data() -> TensorDataset:
    """Image, mask and number of each; the first ``WRONG`` have each other's masks."""
    images, masks = draw(TRAIN, 1)
    masks[:WRONG] = masks[:WRONG].roll(1, 0)
    return TensorDataset(images, masks, torch.arange(TRAIN))


# -------------------------------------------------------------------------------- the networks


def block(inputs: int, outputs: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(nn.Module):
    """The segmentor: (B, 3, H, W) images to (B, 1, H, W) logits, over two sizes."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.wide, self.deep = block(3, c), nn.Sequential(block(c, 4 * c), block(4 * c, 4 * c))
        self.out = nn.Sequential(block(5 * c, c), nn.Conv2d(c, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        x = self.wide(image)
        deep = F.interpolate(self.deep(F.max_pool2d(x, 4)), scale_factor=4)
        return self.out(torch.cat([x, deep], 1))


class ImageWeights(nn.Module):
    """A weight in [0, 1] per training image, 1/2 at first."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(count))

    def forward(self, numbers: Tensor) -> Tensor:
        return self.logits[numbers].sigmoid()


# ------------------------------------------------- the levels: each sees the others by their names


class Plain(Problem):
    """The lower level by itself, every image alike: the control."""

    def training_step(self, batch: Any) -> Any:
        return self.losses(batch).mean()

    def losses(self, batch: Any) -> Tensor:
        """(B,) cross-entropy of each image."""
        image, mask, _ = batch
        pixels = F.binary_cross_entropy_with_logits(self(image), mask, reduction="none")
        return pixels.mean((1, 2, 3))


class Segmentor(Plain):
    """The lower level, weighted."""

    def training_step(self, batch: Any) -> Any:
        weights = self.weights(batch[2])  # a batch of little weight still makes a whole step
        return (weights * self.losses(batch)).sum() / weights.sum()


class Weights(Problem):
    """The upper level."""

    def training_step(self, batch: Any) -> Any:
        image, mask = batch
        return F.binary_cross_entropy_with_logits(self.segmentor(image), mask)


# -------------------------------------------------------------------------------- the programs


def lower_level(cls: type[Plain], data: Any) -> Plain:
    """Of every program, from the same weights and in the same order of images."""
    torch.manual_seed(SEED)
    unet = UNet(CHANNELS)
    adam = Adam(unet.parameters(), lr=RATE)
    loader = DataLoader(data, BATCH, shuffle=True)
    return cls("segmentor", unet, adam, loader, Config(hypergradient=HYPERGRADIENT))


def jaccard(unet: nn.Module, images: Tensor, masks: Tensor) -> float:
    """Mean over images of intersection by union (no mask here is empty)."""
    unet.eval()
    with torch.no_grad():
        predicted, truth = unet(images) > 0.0, masks > 0.5
    unet.train()
    return float(((predicted & truth).sum((1, 2, 3)) / (predicted | truth).sum((1, 2, 3))).mean())


def one_level(data: Any, test: tuple[Tensor, Tensor]) -> float:
    """As many steps, all images of ``data`` alike."""
    plain = lower_level(Plain, data)
    Engine([plain], EngineSettings(iterations=ITERATIONS), device="cpu", quiet=True).run()
    return jaccard(plain.module, *test)


def two_levels(test: tuple[Tensor, Tensor]) -> float:
    """The weights learned, one step of each level in turn."""
    segmentor = lower_level(Segmentor, training_data())
    values = ImageWeights(TRAIN)
    weights = Weights(
        "weights", values, Adam(values.parameters(), lr=WEIGHT_RATE), [draw(CLEAN, 2)]
    )

    def show() -> dict[str, float]:
        score = jaccard(segmentor.module, *test)
        now = values(torch.arange(TRAIN))
        print(
            f"{engine.global_step:9d}  {segmentor.metrics['loss']:10.3f}  "
            f"{weights.metrics['loss']:10.3f}  {now[WRONG:].mean():12.3f}  "
            f"{now[:WRONG].mean():12.3f}  {score:7.3f}"
        )
        return {"jaccard": score}

    engine = Engine(
        [segmentor, weights],
        EngineSettings(iterations=ITERATIONS, validate_every=SHOW),
        l2u={segmentor: [weights]},  # the weights step after the segmentor
        u2l={weights: [segmentor]},  # in whose loss they stand
        validation=show,
        device="cpu",
        quiet=True,
    )
    engine.run()
    return jaccard(segmentor.module, *test)


def main() -> None:
    torch.set_num_threads(1)  # such small networks gain nothing from more
    test = draw(TEST, 3)
    print("iteration  lower loss  upper loss  right weighs  wrong weighs  Jaccard")
    learned = two_levels(test)
    data = training_data()
    right = torch.utils.data.Subset(data, range(WRONG, TRAIN))
    print(f"test Jaccard after {ITERATIONS} steps, {WRONG} of {TRAIN} masks wrong:")
    print(f"  all alike        {one_level(data, test):.3f}")
    print(f"  weights learned  {learned:.3f}")
    print(f"  right ones only  {one_level(right, test):.3f}")


if __name__ == "__main__":
    main()
