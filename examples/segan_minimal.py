"""SegAN in one file: a segmentor against a critic, on images that are drawn here.

    python examples/segan_minimal.py             # about half a minute on one core

One loss, two players. The critic sees an image through a label map (the product of the two) and
makes features of it; the loss is how far those through the predicted map lie from those through the
true one, over all layers. The critic raises it, the segmentor lowers it, a step each in turn:

    min_S max_C  mean_n (1/L) sum_i || f_i(x_n o S(x_n)) - f_i(x_n o y_n) ||_1

The segmentor never sees a pixel-wise loss: all that it knows of the truth comes through the critic.
It is printed as they play, with the Jaccard index on test images that neither sees; first for plain
alternation, which is the paper's, then for the Stackelberg game, in which the segmentor's gradient
also takes in how the critic is about to answer (a hypergradient through the critic's step).

The whole system: ``python -m mlseg.run configs/segan_isic_small.yaml``. Source: Xue, Xu and Huang,
SegAN, section 2.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.data import DataLoader, TensorDataset

from mlseg import Config, Engine, EngineSettings, Problem

# ------------------------------------------------------------------------------- the defaults

SEED = 0
SIZE = 32  # pixels a side; a multiple of 8, since both networks halve them three times
TRAIN, TEST = 64, 200  # images
BATCH = 8  # BatchNorm needs some images, one core few
ITERATIONS = 200  # steps of each player
SHOW = 40  # iterations between two printed lines
CHANNELS = 8  # of each network's first layer; the paper's have 64
RATE = 3e-3  # Adam's, the paper's
CLAMP = 0.05  # every critic parameter stays within: the paper's. It bounds the critic's slope
DECAY, EVERY, FLOOR = 0.9, 10, 0.3  # of the logistic's k: the paper's, by iterations here
THRESHOLD = 0.4  # on the label map, the paper's
HYPERGRADIENT = {"method": "finite_difference", "scale": "optimizer"}
# Of the Stackelberg game: how the critic's next step would change, by two evaluations of its loss;
# ``scale: optimizer`` gives it the size of a step of Adam.

# ---------------------------------------------------------------------------------- the data


def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ellipses on a ground: (N, 3, H, W) images in [0, 1], (N, 1, H, W) masks of 0 and 1.

    Not in [-1, 1]: a product with a label map has to mean "nothing" where the map is 0.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(count, channels, 1, 1, generator=generator)

    line = torch.linspace(-1.0, 1.0, SIZE)
    y, x = torch.meshgrid(line, line, indexing="ij")
    angle, dx, dy = uniform(0.0, 3.1416), x - uniform(-0.4, 0.4), y - uniform(-0.4, 0.4)
    along = (dx * angle.cos() + dy * angle.sin()) / uniform(0.25, 0.6)
    across = (dy * angle.cos() - dx * angle.sin()) / uniform(0.25, 0.6)
    mask = (along**2 + across**2 < 1.0).float()
    skin = uniform(0.45, 0.75, 3)
    lesion = skin - uniform(0.05, 0.3, 3)
    light = uniform(-0.2, 0.2) * x + uniform(-0.2, 0.2) * y
    noise = 0.07 * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return (skin + (lesion - skin) * mask + light + noise).clamp(0.0, 1.0), mask


# -------------------------------------------------------------------------------- the networks


class SegmentorNet(nn.Module):
    """Three convolutions down, three up with skips, and the adaptive logistic.

    f(z) = sigmoid(z / k): k falls from 1 to ``FLOOR``, and label maps become crisp.
    """

    k: Tensor

    def __init__(self, c: int) -> None:
        super().__init__()
        down, up = pairwise((3, c, 2 * c, 4 * c)), ((4 * c, 2 * c), (4 * c, c), (2 * c, c))
        self.down = nn.ModuleList(nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in down)
        self.up = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in up)  # with skips
        self.norms = nn.ModuleList(map(nn.BatchNorm2d, (2 * c, 4 * c, 2 * c, c, c)))
        self.out = nn.Conv2d(c, 1, 5, padding=2)
        self.register_buffer("k", torch.ones(()))

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) to a label map (B, 1, H, W) in [0, 1]."""
        norms, skips = iter(self.norms), []
        x = F.leaky_relu(self.down[0](image), 0.2)  # no BatchNorm in the first, as in the paper
        for layer in self.down[1:]:
            skips.append(x)
            x = F.leaky_relu(next(norms)(layer(x)), 0.2)
        for layer in self.up:
            x = next(norms)(layer(F.interpolate(x, scale_factor=2))).relu()
            x = torch.cat([x, skips.pop()], 1) if skips else x
        return (self.out(x) / self.k).sigmoid()


class CriticNet(nn.Module):
    """Features of a masked image, the masked image itself among them, from pixels to the whole."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(3, c, 7, stride=2, padding=3),
                nn.Sequential(nn.Conv2d(c, 2 * c, 5, 2, 2), nn.BatchNorm2d(2 * c)),
                nn.Sequential(nn.Conv2d(2 * c, 4 * c, 3, 2, 1), nn.BatchNorm2d(4 * c)),
            ]
        )

    def forward(self, image: Tensor, label_map: Tensor) -> list[Tensor]:
        features = [image * label_map]
        for layer in self.layers:
            features.append(F.leaky_relu(layer(features[-1]), 0.2))
        return features


# ---------------------------------------------- the players: each sees the other by its name


def distance(critic: Any, image: Tensor, predicted: Tensor, true: Tensor) -> Tensor:
    """The multi-scale L1 loss: mean over a layer's entries, then over layers.

    Two passes, each by its own BatchNorm statistics: the critic mustn't tell the two kinds of map
    apart by being shown both at once.
    """
    pairs = zip(critic(image, predicted), critic(image, true), strict=True)
    return torch.stack([(p - t).abs().mean() for p, t in pairs]).mean()


class Critic(Problem):
    """The lower level."""

    def training_step(self, batch: Any) -> Any:
        """Minus the loss, by a label map that serves the segmentor's step as well."""
        image, mask = batch
        predicted = self.segmentor(image)
        if not self.replaying:  # a hypergradient evaluates the step again: no by-products then
            self.predicted = predicted
        # Where the segmentor leads, the gradient of this step's change reaches it by here.
        seen = predicted if self.is_differentiated else predicted.detach()
        return -distance(self, image, seen, mask)

    def param_callback(self) -> None:
        """After each step (Betty's hook)."""
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.clamp_(-CLAMP, CLAMP)


class Segmentor(Problem):
    """The upper level: steps after the critic, on the same batch."""

    def get_batch(self) -> Any:
        return self.critic.cur_batch

    def training_step(self, batch: Any) -> Any:
        image, mask = batch
        return distance(self.critic, image, self.critic.predicted, mask)

    def param_callback(self) -> None:
        """Let k fall, here by the number of steps."""
        if self.count % EVERY == 0:
            self.module.k.mul_(DECAY).clamp_(min=FLOOR)


# ------------------------------------------------------------------------------------ the games


def jaccard(segmentor: nn.Module, images: Tensor, masks: Tensor) -> float:
    """Mean over images of intersection by union (no mask here is empty)."""
    segmentor.eval()
    with torch.no_grad():
        predicted, truth = segmentor(images) > THRESHOLD, masks > 0.5
    segmentor.train()
    return float(((predicted & truth).sum((1, 2, 3)) / (predicted | truth).sum((1, 2, 3))).mean())


def play(stackelberg: bool, test: tuple[Tensor, Tensor]) -> float:
    """One game from the start; the last test Jaccard index."""
    torch.manual_seed(SEED)
    segmentor_net, critic_net = SegmentorNet(CHANNELS), CriticNet(CHANNELS)
    loader = DataLoader(TensorDataset(*draw(TRAIN, 1)), BATCH, shuffle=True, drop_last=True)
    adam = Adam(critic_net.parameters(), lr=RATE)
    critic = Critic("critic", critic_net, adam, loader, Config(hypergradient=HYPERGRADIENT))
    adam = Adam(segmentor_net.parameters(), lr=RATE)
    segmentor = Segmentor("segmentor", segmentor_net, adam)

    def show() -> dict[str, float]:
        score, figures = jaccard(segmentor_net, *test), segmentor.metrics
        through = figures.get("hypergradient/via_critic")
        print(
            f"{engine.global_step:9d}  {figures['loss']:8.5f}  {score:7.3f}  {segmentor_net.k:4.2f}"
            + (f"  {through:13.1e}" if stackelberg else "")
        )
        return {"jaccard": score}

    engine = Engine(
        [critic, segmentor],
        EngineSettings(iterations=ITERATIONS, validate_every=SHOW),
        l2u={critic: [segmentor]},  # the segmentor steps after the critic
        u2l={segmentor: [critic]} if stackelberg else {},  # and looks through its step, or doesn't
        validation=show,
        device="cpu",
        quiet=True,
    )
    engine.run()
    return jaccard(segmentor_net, *test)


def main() -> None:
    torch.set_num_threads(1)  # such small networks gain nothing from more
    test = draw(TEST, 2)
    print("plain alternation\niteration      loss  Jaccard     k")
    plain = play(False, test)
    print("Stackelberg game\niteration      loss  Jaccard     k  |via critic|")
    leading = play(True, test)
    everywhere = float(test[1].mean((1, 2, 3)).mean())
    print(f"test Jaccard after {ITERATIONS} steps of each player, {TRAIN} training images:")
    print(f"  lesion everywhere  {everywhere:.3f}")  # what no learning at all would get
    print(f"  plain alternation  {plain:.3f}")
    print(f"  Stackelberg game   {leading:.3f}")


if __name__ == "__main__":
    main()
