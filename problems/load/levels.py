"""LoAd: lookahead adversarial learning for semantic segmentation.

    stage 1    min_G  CE(Y, G(X))
    stage 2    min_G  - log D(X, G(X))                      generator: one update, then evaluate
               min_D  BCE(D(X, Y), 1) + BCE(D(X, B), 0)     discriminator: to early stopping

In stage 2 a controller (:mod:`mlseg.engines.lookahead.controller`) lets the generator run ahead
against a fixed discriminator, watches its mIoU on a hold-out after every update, and takes it back
to the best model when it diverges or the patience is over. The label maps of where it ended go into
the buffer B; on these and the truth the discriminator is trained before the next cycle.

What the paper leaves open, and how it is closed here:

* The discriminator learns on hard maps; the generator gives it soft ones, or what else
  ``adversarial.relaxation`` offers. While the generator steps the discriminator is frozen and in
  evaluation mode: batches of fakes alone would shift its BatchNorm statistics.
* It is never rolled back, starts each training from the weights of the one before, with a fresh
  optimizer. The generator's optimizer is rolled back with its weights.
* BatchNorm statistics of the generator stay those of stage 1 (``adversarial.freeze_batch_norm``).
* Pixels with the ignore index are zero in real and fake maps alike.

Source: LoAd (Jamali-Rad, Szabo and Presutto, arXiv:2006.11227), sections 2 to 4; its workshop
version (ICML 2020 workshop on uncertainty and robustness in deep learning).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlseg import checkpoint
from mlseg.engines.lookahead.controller import Lookahead, StraightAhead
from mlseg.engines.lookahead.discriminator_training import Batch, DiscriminatorTraining
from mlseg.engines.lookahead.engine import LOOKAHEAD, METRIC, LookaheadEngine
from mlseg.engines.lookahead.hold_out import HoldOut, hold_out_indices, require_every_class
from mlseg.engines.lookahead.map_buffer import MapBuffer
from mlseg.engines.segmentation import require_validation
from mlseg.engines.settings import Stage
from mlseg.errors import UserError, one_line
from mlseg.machine import choose_device
from mlseg.multilevel.problem import Problem
from mlseg.problems.load import records
from mlseg.problems.load.losses import balanced_cross_entropy, fooling_loss, relax
from mlseg.problems.load.networks import Discriminator as DiscriminatorNetwork
from mlseg.problems.load.networks import one_hot, require_input_size
from mlseg.problems.load.settings import AdversarialSettings, LoadSettings
from mlseg.problems.systems import system
from mlseg.randomness import derived, seeded
from mlseg.segmentation.data import Augmentation, BatchLoader, Samples, load_data
from mlseg.segmentation.nets import build_segmentor
from mlseg.segmentation.nets.layers import freeze_batch_norm

# --------------------------------------------------------------------------- the problems


class Pretraining(Problem):
    """Stage 1, and the control: cross-entropy, at first weighted by class."""

    ignore_index: int | None
    weighted_steps: int
    mean_pixels: Tensor
    """(K,) pixels of each class in a training image, on average."""

    def training_step(self, batch: Any) -> Tensor:
        """``CE(Y, G(X))``."""
        image, mask = batch
        self.module.train()  # an evaluation may have come between
        logits = self(image)
        if self.count <= self.weighted_steps:
            return balanced_cross_entropy(logits, mask, self.mean_pixels, self.ignore_index)
        ignore = -100 if self.ignore_index is None else self.ignore_index
        loss = functional.cross_entropy(logits.float(), mask, ignore_index=ignore, reduction="sum")
        # A batch of windows may lie in the padding, whole.
        return loss / (mask != ignore).sum().clamp_min(1)


class Generator(Problem):
    """The segmentor against a discriminator that stands still."""

    settings: AdversarialSettings
    ignore_index: int | None

    def training_step(self, batch: Any) -> dict[str, Tensor]:
        """``- log D(X, G(X))``, or ``log(1 - D(X, G(X)))``."""
        image, mask = batch
        self.module.train()
        if self.settings.freeze_batch_norm:
            freeze_batch_norm(self.module)
        maps = relax(self(image), self.settings.relaxation, self.settings.temperature)
        if self.ignore_index is not None:
            maps = maps * (mask != self.ignore_index).unsqueeze(1)
        logits = self.discriminator.judge(image, maps)
        loss = fooling_loss(logits, self.settings.loss == "saturating")
        return {"loss": loss, "fooled": (logits > 0).float().mean()}


class Discriminator(Problem):
    """Tells drawn label maps from generated ones, given the image."""

    num_classes: int
    source: Callable[[], Batch]

    def get_batch(self) -> Batch:
        """What its training hands out."""
        return self.source()

    def training_step(self, batch: Batch) -> dict[str, Tensor]:
        """Binary cross-entropy; real and fake maps have half of the weight each."""
        self.module.train()
        logits, loss = self._loss(batch)
        right = ((logits > 0) == (batch[2] > 0)).float().mean()
        return {"loss": loss / len(logits), "accuracy": right}

    @torch.no_grad()
    def verdict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits and the sum of the loss, in evaluation mode."""
        self.module.eval()
        logits, loss = self._in_precision(self._loss, batch)
        return logits.float(), loss

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        image, label, real, weight = batch
        logits = self(image, one_hot(label, self.num_classes))
        loss = functional.binary_cross_entropy_with_logits(
            logits.float(), real, weight, reduction="sum"
        )
        return logits, loss

    def judge(self, image: Tensor, maps_BKHW: Tensor) -> Tensor:
        """(B,) logits, differentiable in the maps; weights and statistics stand still."""
        self.module.eval()
        # Whether a weight gets a gradient is settled in the forward pass.
        self.module.requires_grad_(False)
        try:
            return self(image, maps_BKHW)
        finally:
            self.module.requires_grad_(True)


# ------------------------------------------------------------------------------- wiring


@system("load", LoadSettings, "a segmentor against a discriminator, with lookahead and rollback")
def build(settings: LoadSettings, out: Path | None) -> LookaheadEngine:
    """Data, networks, the three problems, the controller, and the engine that obeys it."""
    data, device = load_data(settings.data), choose_device(settings.device)
    require_validation(data)
    spec, levels = data.spec, settings.problems
    chosen = hold_out_indices(data.val.ids, settings.hold_out.fraction, settings.hold_out.seed)
    held = data.val.subset(chosen)
    require_every_class(held, "hold_out.fraction")

    with seeded(settings.seed, "segmentor"):
        network = build_segmentor(settings.segmentor, spec.channels, spec.num_classes)
    network.to(memory_format=torch.channels_last)  # the layout CPUs and tensor cores like
    start: dict[str, Any] = {}
    if settings.start is not None:
        path = Path(settings.start)
        # A run that goes on has it in its own checkpoint.
        resumed = out is not None and (out / "checkpoints" / "last.pt").exists()
        if path.exists() or not resumed:
            start = load_start(network, path, spec.num_classes)
    with seeded(settings.seed, "discriminator"):
        critic = DiscriminatorNetwork(settings.discriminator, spec.channels, spec.num_classes)
    critic.to(memory_format=torch.channels_last)

    augmentation = Augmentation(settings.augmentation, spec.ignore_index)
    size = settings.augmentation.output_size(data.train.image_size)
    require_input_size(settings.discriminator, size)

    def problem(cls: type[Problem], name: str, module: nn.Module, with_loader: bool = True) -> Any:
        level = getattr(levels, name)
        optimizer, scheduler = level.build(module.parameters(), settings.engine.mode)
        loader = None
        if with_loader:
            seed = derived(settings.seed, name)
            loader = BatchLoader(
                data.train, level.batch_size, device, seed=seed, augmentation=augmentation
            )
        config = level.config(settings.precision)
        return cls(name, module, optimizer, loader, config, scheduler)

    pretraining = problem(Pretraining, "pretraining", network)
    generator = problem(Generator, "generator", network)
    discriminator = problem(Discriminator, "discriminator", critic, with_loader=False)
    epoch = len(pretraining.train_data_loader)
    pretraining.ignore_index = generator.ignore_index = spec.ignore_index
    pretraining.weighted_steps = 0
    stages = [Stage(LOOKAHEAD, settings.engine.iterations, [generator, discriminator])]
    if settings.start is None:
        pretraining.weighted_steps = settings.pretraining.weighted_epochs * epoch
        length = pretraining.weighted_steps + settings.pretraining.epochs * epoch
        stages.insert(0, Stage("cross_entropy", length, [pretraining]))
    pretraining.mean_pixels = mean_pixels(data.train, size).to(device)
    generator.settings = settings.adversarial
    discriminator.num_classes = spec.num_classes

    buffer = training = None
    controller: Lookahead | StraightAhead
    if settings.control is not None:
        controller, stepper = StraightAhead(settings.control), pretraining
        go_on(pretraining, start)
    else:
        controller, stepper = Lookahead(settings.lookahead), generator
        buffer = MapBuffer(
            (len(data.train) + len(held), *data.train.image_size),
            settings.lookahead.buffer_size,
            None if out is None else out / "buffer",
            settings.buffer_limit_mib,
        )
        training = DiscriminatorTraining(
            discriminator,
            data.train,
            held,
            buffer,
            settings.discriminator_training,
            batch_size=levels.discriminator.batch_size,
            augmentation=augmentation,
            device=device,
            seed=derived(settings.seed, "label maps"),
        )
    engine = LookaheadEngine(
        [pretraining, generator, discriminator],
        settings.engine.model_copy(update={"metric": METRIC}),
        controller=controller,
        stepper=stepper,
        hold_out=HoldOut(held, device, settings.hold_out.batch_size, settings.precision == "bf16"),
        buffer=buffer,
        training=training,
        start_state=lambda: {"pretraining": training_state(pretraining)},
        segmentor=generator,
        architecture=settings.segmentor,
        data=data,
        device=device,
        out=out,
        stages=stages,
    )
    records.attach(engine, settings.pictures)
    return engine


def mean_pixels(samples: Samples, size: tuple[int, int]) -> Tensor:
    """(K,) float: pixels of each class in an image, mean over all images.

    Args:
        size: (h, w) of what training sees of an image: all of it, or a window, which on average
            shows its share.
    """
    counts = torch.bincount(samples.masks.flatten(), minlength=256)
    share = math.prod(size) / math.prod(samples.image_size)
    return counts[: samples.spec.num_classes].float() * share / len(samples)


def load_start(network: nn.Module, path: Path, num_classes: int) -> dict[str, Any]:
    """Load the segmentor of another run; returns the whole checkpoint.

    Args:
        path: its ``checkpoints/best.pt``, ``last.pt`` or ``start.pt``.

    Raises:
        UserError: no checkpoint, one without a segmentor, or of other classes or another shape.
    """
    state = checkpoint.load(path)
    description = state.get("segmentor")
    if description is None:
        raise UserError(f"start: {path} has no segmentor; name a run's checkpoints/best.pt")
    if description["num_classes"] != num_classes:
        raise UserError(
            f"start: {path} has {description['num_classes']} classes, the data have {num_classes}; "
            "name a model of the same classes, or train one (start=null)"
        )
    try:
        network.load_state_dict(state["problems"][description["problem"]]["module"])
    except RuntimeError as error:
        raise UserError(
            f"start: {path} doesn't fit the segmentor of this config "
            f"({description['settings']}); use the same segmentor settings "
            f"[{one_line(error)}]"
        ) from None
    return state


def go_on(pretraining: Problem, start: dict[str, Any]) -> None:
    """Let the control go on with stage 1's optimizer and rate, if the start model brings them.

    A fresh optimizer would take its first steps without averages, at the rate that stage 1 began
    with: worse steps than a run that had simply gone on would take.

    Raises:
        UserError: the optimizer or the scheduler is of another kind.
    """
    if "pretraining" not in start:
        return
    saved, optimizer, scheduler = start["pretraining"], pretraining.optimizer, pretraining.scheduler
    kinds = {
        "optimizer": (optimizer.param_groups[0], saved["optimizer"]["param_groups"][0]),
        "scheduler": (scheduler.state_dict() if scheduler else {}, saved["scheduler"] or {}),
    }
    for key, (mine, its) in kinds.items():
        # A scheduler leaves its mark on the optimizer's groups.
        if set(mine) - {"initial_lr"} != set(its) - {"initial_lr"}:
            raise UserError(
                f"problems.pretraining.{key}: the start model was trained with another kind; use "
                "the same for the control to go on from it"
            )
    optimizer.load_state_dict(saved["optimizer"])
    if scheduler is not None:
        scheduler.load_state_dict(saved["scheduler"])


def training_state(problem: Problem) -> dict[str, Any]:
    """Of its optimizer and its scheduler, if it has one: what :func:`go_on` needs."""
    scheduler = problem.scheduler
    return {
        "optimizer": problem.optimizer.state_dict(),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
    }
