"""E2EAug in one file: three levels, on images that are drawn here.

    python examples/e2eaug_minimal.py            # about half a minute on one core

A generator turns masks into images (level 1, a GAN), a segmentor learns from a few real pairs and
from augmented masks with the images made of them (level 2), and the generator's architecture is
learned from how well the segmentor then does on validation images (level 3):

    min_A  L(validation; W*)                                              architecture
    s.t.   W* = argmin_W L(real; W) + LAMBDA L(synthetic(G*, A); W)       segmentor
           G* = argmin_G max_E L_gan(G, A, E)                             generator, discriminator

It prints, as the levels train together, the validation loss, the Jaccard index on test images that
no level sees, the norms of the two parts of the alphas' gradient, and how far the alphas have come;
at the end the Jaccard index beside that of as many steps on the real pairs alone.

The whole system: ``python -m mlseg.run configs/e2eaug_isic_small.yaml``. Source: E2EAug, section 3.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.data import DataLoader, TensorDataset

from mlseg import Config, Engine, EngineSettings, Problem, Stage

# ------------------------------------------------------------------------------- the defaults

SEED = 0
SIZE = 32  # pixels a side; a multiple of 8, since the generator halves them three times
TRAIN, VALIDATION, TEST = 12, 12, 200  # few pairs to learn from: that is what the method is for
BATCH = 6  # of every level; BatchNorm needs some images, one core few
PRETRAINING = 300  # iterations of the GAN alone: images of noise would teach the segmentor noise
ITERATIONS = 200  # of the three levels together, one step each
SHOW = 40  # iterations between two printed lines
LAMBDA, L1 = 1.0, 100.0  # weights of synthetic pairs (the paper's), of reconstruction (pix2pix's)
CHANNELS = 8  # of each network's first layer; the paper's have 64
GAN_RATE = 2e-3  # ten times pix2pix's, for networks that are so much smaller
SEGMENTOR_RATE = 2e-3
ALPHA_RATE = 2e-2  # the alphas are few and steps are few: they have to get somewhere
HYPERGRADIENT = {"method": "finite_difference", "scale": "optimizer"}
# How the validation loss's gradient passes through a level: by how its next step would change. Two
# evaluations per hop; ``scale: optimizer`` gives each hop the size of Adam's step, so that the
# short path (by the images) and the long one (by the generator's weights) add up in proportion.

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


def augment(mask: Tensor) -> Tensor:
    """Turned by quarters and shifted by up to an eighth, all masks of a batch alike."""
    mask = mask.rot90(int(torch.randint(4, ())), (-2, -1))
    shift = torch.randint(-SIZE // 8, SIZE // 8 + 1, (2,)).tolist()
    return mask.roll(shift, (-2, -1))


# -------------------------------------------------------------------------------- the networks


class Cell(nn.Module):
    """Halves or doubles the sides by a weighted sum of convolutions, kernels 4, 6 and 8."""

    def __init__(self, inputs: int, outputs: int, up: bool = False) -> None:
        super().__init__()
        convolution = nn.ConvTranspose2d if up else nn.Conv2d
        self.candidates = nn.ModuleList(
            convolution(inputs, outputs, kernel, stride=2, padding=kernel // 2 - 1)
            for kernel in (4, 6, 8)
        )

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        terms = [w * f(x) for w, f in zip(weights, self.candidates, strict=True)]
        return torch.stack(terms).sum(0)


class ImageGenerator(nn.Module):
    """A U-Net from mask to image (pix2pix) whose six (de)convolutions are cells."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.down = nn.ModuleList([Cell(1, c), Cell(c, 2 * c), Cell(2 * c, 4 * c)])
        self.up = nn.ModuleList([Cell(4 * c, 2 * c, True), Cell(4 * c, c, True)])
        self.out = Cell(2 * c, 3, True)
        self.norms = nn.ModuleList(map(nn.BatchNorm2d, (c, 2 * c, 4 * c, 2 * c, c)))

    def forward(self, mask: Tensor, weights: Tensor) -> Tensor:
        """(B, 1, H, W) masks of -1 and 1 and (6, 3) selection weights to images in [-1, 1]."""
        w, norms, x, skips = iter(weights), iter(self.norms), mask, []
        for cell in self.down:
            x = F.leaky_relu(next(norms)(cell(x, next(w))), 0.2)
            skips.append(x)
        x = F.dropout(skips.pop(), 0.5, self.training)  # the only noise there is, as in pix2pix
        for cell in self.up:
            x = torch.cat([next(norms)(cell(x, next(w))).relu(), skips.pop()], 1)
        return self.out(x, next(w)).tanh()


class Alphas(nn.Module):
    """The architecture: a softmax over each of six cells' candidates, all alike at first."""

    def __init__(self) -> None:
        super().__init__()
        self.alphas = nn.Parameter(1e-3 * torch.randn(6, 3))

    def forward(self) -> Tensor:
        return self.alphas.softmax(1)


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


def patch_discriminator(c: int) -> nn.Sequential:
    """A logit per patch of mask and image: real or generated (PatchGAN, small)."""
    return nn.Sequential(
        nn.Conv2d(4, 2 * c, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(2 * c, 4 * c, 4, stride=2, padding=1),
        nn.BatchNorm2d(4 * c),
        nn.LeakyReLU(0.2),
        nn.Conv2d(4 * c, 1, 3, padding=1),
    )


# --------------------------------------------- the levels: each sees the others by their names


def says(logits: Tensor, real: bool) -> Tensor:
    """The vanilla GAN loss: cross-entropy with one answer for all patches."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))


class Generator(Problem):
    """Level 1: images of masks, by the discriminator's judgement and the real image."""

    def training_step(self, batch: Any) -> Any:
        image, mask = batch
        fake = self.images_of(mask)
        if not self.replaying:  # a hypergradient evaluates the step again: no by-products then
            self.pair = (mask, image, fake.detach())
        judged = self.discriminator(torch.cat([mask, fake], 1))
        return says(judged, True) + L1 * F.l1_loss(fake, image)

    def images_of(self, mask: Tensor) -> Tensor:
        """By the present weights and the present architecture, differentiable by both."""
        return self.module(2.0 * mask - 1.0, self.architecture())


class Discriminator(Problem):
    """Level 1, the other player; it takes no part in the hypergradient."""

    def get_batch(self) -> Any:
        return self.generator.pair  # the generator's last step: the same images at no further cost

    def training_step(self, batch: Any) -> Any:
        mask, image, fake = batch
        real = says(self(torch.cat([mask, image], 1)), True)
        return 0.5 * (real + says(self(torch.cat([mask, fake], 1)), False))


class RealPairs(Problem):
    """Level 2 without the others: the control."""

    def training_step(self, batch: Any) -> Any:
        return F.binary_cross_entropy_with_logits(self(batch[0]), batch[1])


class Segmentor(RealPairs):
    """Level 2: real pairs and synthetic ones."""

    def get_batch(self) -> Any:
        image, mask = super().get_batch()
        return image, mask, augment(mask)  # the draw is part of the batch: it can be seen again

    def training_step(self, batch: Any) -> Any:
        image, mask, augmented = batch
        synthetic = self.generator.images_of(augmented)  # no detach: A's gradient comes by here
        loss = super().training_step((synthetic, augmented))
        return super().training_step((image, mask)) + LAMBDA * loss


class Architecture(Problem):
    """Level 3. The alphas don't stand in its loss; what level 2 has learned depends on them."""

    def training_step(self, batch: Any) -> Any:
        return F.binary_cross_entropy_with_logits(self.segmentor(batch[0]), batch[1])


# -------------------------------------------------------------------------------- the programs


def batches(count: int, seed: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*draw(count, seed)), BATCH, shuffle=True)


def level_2(cls: type[RealPairs]) -> RealPairs:
    """Of both programs, from the same weights."""
    torch.manual_seed(SEED)
    unet = UNet(CHANNELS)
    adam = Adam(unet.parameters(), lr=SEGMENTOR_RATE)
    return cls("segmentor", unet, adam, batches(TRAIN, 1), Config(hypergradient=HYPERGRADIENT))


def jaccard(unet: nn.Module, images: Tensor, masks: Tensor) -> float:
    """Mean over images of intersection by union (no mask here is empty)."""
    unet.eval()
    with torch.no_grad():
        predicted, truth = unet(images) > 0.0, masks > 0.5
    unet.train()
    return float(((predicted & truth).sum((1, 2, 3)) / (predicted | truth).sum((1, 2, 3))).mean())


def three_levels(test: tuple[Tensor, Tensor]) -> float:
    segmentor = level_2(Segmentor)
    gan, critic, alphas = ImageGenerator(CHANNELS), patch_discriminator(CHANNELS), Alphas()
    betas, config = (0.5, 0.999), Config(hypergradient=HYPERGRADIENT)
    adam = Adam(gan.parameters(), lr=GAN_RATE, betas=betas)
    generator = Generator("generator", gan, adam, batches(TRAIN, 1), config)
    adam = Adam(critic.parameters(), lr=GAN_RATE, betas=betas)
    discriminator = Discriminator("discriminator", critic, adam)
    adam = Adam(alphas.parameters(), lr=ALPHA_RATE)
    architecture = Architecture("architecture", alphas, adam, batches(VALIDATION, 2))

    def show() -> dict[str, float]:
        score, figures = jaccard(segmentor.module, *test), architecture.metrics
        print(
            f"{engine.stage_step:9d}  {figures['loss']:10.3f}  {score:7.3f}  "
            f"{figures['hypergradient/via_segmentor']:13.1e}  "
            f"{figures['hypergradient/via_generator']:13.1e}  "
            f"{alphas().max(1).values.mean():10.3f}"
        )
        return {"jaccard": score}

    then = {generator: [segmentor], segmentor: [architecture]}  # who steps after whom
    enters = {architecture: [segmentor, generator]}  # in whose losses the alphas stand
    pretraining = Stage("pretraining", PRETRAINING, [generator, discriminator])
    search = Stage("search", ITERATIONS, l2u=then, u2l=enters)
    engine = Engine(
        [generator, discriminator, segmentor, architecture],
        EngineSettings(validate_every=SHOW),
        stages=[pretraining, search],
        validation=show,
        device="cpu",
        quiet=True,
    )
    engine.run()
    return jaccard(segmentor.module, *test)


def main() -> None:
    torch.set_num_threads(1)  # such small networks gain nothing from more
    test = draw(TEST, 3)
    print("iteration  validation  Jaccard  |direct path|  |via weights|  mean max A")
    ours = three_levels(test)
    control = level_2(RealPairs)
    Engine([control], EngineSettings(iterations=ITERATIONS), device="cpu", quiet=True).run()
    print(f"test Jaccard after {ITERATIONS} steps of the segmentor, {TRAIN} training pairs:")
    alone = jaccard(control.module, *test)
    print(f"  real pairs alone  {alone:.3f}\n  three levels      {ours:.3f}")


if __name__ == "__main__":
    main()
