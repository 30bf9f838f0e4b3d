"""What a run of E2EAug keeps beside every run's records: the GAN, the alphas, synthetic pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from mlseg import checkpoint, parallel
from mlseg.engines.engine import Engine
from mlseg.engines.hooks import Hooks
from mlseg.engines.nan_guard import check_states
from mlseg.engines.settings import Stage
from mlseg.errors import UserError
from mlseg.files import reachable, write_json
from mlseg.multilevel.problem import Problem
from mlseg.problems.e2eaug.masks import encode
from mlseg.problems.e2eaug.settings import (
    DiscriminatorSettings,
    E2EAugSettings,
    GeneratorSettings,
)
from mlseg.segmentation.data import Samples, SegmentationData, to_float, to_uint8
from mlseg.segmentation.pictures import Row, colour, legend, sheet, to_rgb

PRETRAINING = "pretraining"
PICTURED = 4


_COMPONENTS = {"generator": GeneratorSettings, "discriminator": DiscriminatorSettings}


def _alphas(settings: E2EAugSettings) -> str:
    """Of what kind the alphas are that a GAN is pre-trained with."""
    wanted = settings.architecture
    if wanted.choice is not None:
        return wanted.choice
    if wanted.mode != "random":
        return "uniform"
    return "random" if wanted.draw is None else f"random draw {wanted.draw}"


class Pretraining(Hooks):
    """Pre-training of the GAN: its learning rate, its end, and the file that makes it reusable.

    ``checkpoints/gan.pt`` holds generator, discriminator and alphas as they were when pre-training
    ended, with the settings they were built from. Once made, the GAN is a pre-trained one, or has
    the rate of pre-training.

    Raises:
        UserError: the file of a pre-trained one is missing, damaged, or of another shape.
    """

    def __init__(
        self,
        settings: E2EAugSettings,
        generator: Problem,
        discriminator: Problem,
        architecture: Problem | None,
        out: Path | None,
    ) -> None:
        self._settings = settings
        self._players = (generator, discriminator)
        parts = {"generator": generator, "discriminator": discriminator}
        self._parts = {**parts, "architecture": architecture} if architecture else parts
        self._channels = (generator.module.in_channels, generator.module.out_channels)
        gan = settings.gan
        if out is not None and (out / "checkpoints" / "last.pt").exists():
            return  # a resumed run, whose checkpoint holds all of it
        if gan.pretrained is not None:
            self._load(reachable(gan.pretrained))
        elif gan.pretrain:
            self._set_rates(gan.pretrain_lr)

    @property
    def _shape(self) -> dict[str, Any]:
        settings = self._settings
        return {
            "generator": settings.generator.model_dump(mode="json"),
            "discriminator": settings.discriminator.model_dump(mode="json"),
            "image_size": settings.data.image_size,
            "channels": list(self._channels),
            "alphas": _alphas(settings),
            "selection": settings.architecture.selection,
        }

    def stage_end(self, engine: Engine, stage: Stage) -> None:
        """End pre-training: write ``gan.pt``; the optimizers start afresh at their own rates."""
        if stage.name != PRETRAINING:
            return
        if engine.directory is not None:
            state = {name: part.module.state_dict() for name, part in self._parts.items()}
            if "architecture" in state:  # lambda is no part of a GAN
                state["architecture"] = {"alphas": state["architecture"]["alphas"]}
            check_states(engine, {name: {"module": own} for name, own in state.items()})
        if engine.recorder.directory is not None:
            checkpoint.save(engine.checkpoint_path("gan"), {**state, "shape": self._shape})
        for player in self._players:
            player.optimizer.state.clear()
        self._set_rates(None)

    def _set_rates(self, rate: float | None) -> None:
        for player in self._players:
            own = getattr(self._settings.problems, player.name).optimizer.lr
            for group in player.optimizer.param_groups:
                group["lr"] = own if rate is None else rate

    def _load(self, path: Path) -> None:
        try:
            state = checkpoint.load(path)
        except UserError as error:
            raise UserError(f"gan.pretrained: {error}") from error
        if "shape" not in state:
            raise UserError(f"gan.pretrained: {path} is no GAN; name a run's checkpoints/gan.pt")
        mend = "name another run's checkpoints/gan.pt, or pre-train anew (gan.pretrained=null)"
        with checkpoint.taking(f"gan.pretrained: {path}", mend):
            for key, value in self._shape.items():
                # A file without the key is from before there was a choice.
                found = state["shape"].get(key, "softmax" if key == "selection" else value)
                if key in _COMPONENTS:  # nor has one a name
                    found = _COMPONENTS[key].model_validate(found).model_dump(mode="json")
                if found != value:
                    raise UserError(
                        f"gan.pretrained: {path} has {key} {found}, this config {value}; use the "
                        "same, or pre-train anew (gan.pretrained=null)"
                    )
            for name, part in self._parts.items():
                if name != "architecture" or self._settings.architecture.mode != "learned":
                    checkpoint.load_module(part.module, state[name])


class ArchitectureRecord(Hooks):
    """The alphas over time, in ``architecture.json``, written at each validation.

    The history is saved with the run, so that a resumed one goes on with it.
    """

    name = "architecture"

    def __init__(self, generator: Problem, architecture: Problem) -> None:
        self._generator = generator
        self._architecture = architecture
        self.history: list[dict[str, Any]] = []
        self._note(0)

    def state_dict(self) -> dict[str, Any]:
        """The history so far."""
        return {"history": self.history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        if not state["history"]:
            raise ValueError("its history is empty")
        for index, entry in enumerate(state["history"]):
            checkpoint.require_form(self.history[0], entry, f"history.{index}")
        self.history = list(state["history"])

    def validated(self, engine: Engine, figures: Mapping[str, float]) -> None:
        """Note the present alphas."""
        self._note(engine.global_step)
        self.write(engine)

    def results(self, engine: Engine, report: Mapping[str, Any]) -> dict[str, Any]:
        """Write the file once more, also where nothing was validated."""
        self.write(engine)
        return {}

    def _note(self, step: int) -> None:
        if self.history and self.history[-1]["step"] >= step:
            return
        module = self._architecture.module
        with torch.no_grad():
            entry = {
                "step": step,
                "alphas": module.alphas.tolist(),
                "weights": module().tolist(),
                "entropy": module.entropy().tolist(),
            }
            entry |= {name: float(value) for name, value in module.besides().items()}
            self.history.append(entry)

    def write(self, engine: Engine) -> None:
        """Write the file; does nothing for a run without directory."""
        directory = engine.recorder.directory
        if directory is None:
            return
        first, last = self.history[0], self.history[-1]
        candidates = list(self._architecture.module.candidates)
        moved = [
            [abs(a - b) for a, b in zip(new, old, strict=True)]
            for new, old in zip(last["weights"], first["weights"], strict=True)
        ]
        write_json(
            directory / "architecture.json",
            {
                "cells": self._generator.module.cell_names,
                "candidates": candidates,
                "choice": self._architecture.module.choices(),
                "entropy": sum(last["entropy"]) / len(last["entropy"]),
                "entropy_unit": f"nats, mean over cells; undecided is log {len(candidates)} = "
                f"{math.log(len(candidates)):.4f}",
                "moved": moved,
                "history": self.history,
            },
        )

    def summary(self, engine: Engine) -> Table:
        """The final weights, cell by cell."""
        candidates = self._architecture.module.candidates
        table = Table("cell", *candidates, "choice", title="Architecture: selection weights")
        weights = self.history[-1]["weights"]
        names = self._generator.module.cell_names
        for name, row, choice in zip(
            names, weights, self._architecture.module.choices(), strict=True
        ):
            table.add_row(name, *(f"{value:.3f}" for value in row), choice)
        return table


class SyntheticPictures(Hooks):
    """Augmented masks and the images made of them, at each validation."""

    def __init__(self, data: SegmentationData, generator: Problem, segmentor: Problem) -> None:
        self._data = data
        self._generator = generator
        self._segmentor = segmentor

    @torch.no_grad()
    def validated(self, engine: Engine, figures: Mapping[str, float]) -> None:
        """Write a row of pairs: real image, its mask, the mask augmented, the image made of it."""
        segmentor, spec = self._segmentor, self._data.spec
        data = self._data.train
        count = min(PICTURED, engine.settings.samples, len(data))
        if count == 0 or engine.recorder.directory is None or not segmentor.synthetic_weight:
            return
        masks = data.masks[:count].to(engine.device).long()
        draw = torch.Generator().manual_seed(0)  # the same augmentations in every picture
        alone = parallel.Part(0, count, count)
        label, augmented = segmentor.masks(masks, segmentor.masks.draw(masks, draw, alone))
        with self._generator.again.untraced():
            made = self._generator(label)
        palette = spec.palette
        rows = [
            Row(
                [
                    to_rgb(data.images[i]),
                    colour(data.masks[i].numpy(), palette),
                    colour(augmented[i].to("cpu", torch.uint8).numpy(), palette),
                    to_rgb(to_uint8(made[i])),
                ],
                data.ids[i],
            )
            for i in range(count)
        ]
        heads = ("image", "its mask", "mask augmented", "image made of that")
        picture = sheet(heads, rows, legend(spec, data.masks[:count], tinted=False))
        engine.recorder.picture("synthetic", engine.global_step, picture)


class ExportedGenerator(Hooks):
    """The generator in ``checkpoints/generator.pt``, merged into plain operators; how good it is.

    Beside the weights stand what the class takes, and the generator's name in a config.
    """

    def __init__(self, generator: Problem, name: str, data: SegmentationData) -> None:
        self._generator = generator
        self._name = name
        self._data = data

    def results(self, engine: Engine, report: Mapping[str, Any]) -> dict[str, Any]:
        """Write the file; ``generated`` says how near its images come to the real ones."""
        plain = self._generator.export()
        if engine.recorder.directory is not None:
            checkpoint.save(
                engine.checkpoint_path("generator"),
                {"name": self._name, "settings": plain.settings(), "module": plain.state_dict()},
            )
        return {"generated": likeness(plain, self._data.val, engine.device)}


_AT_ONCE = 8
_SMALLEST = 11
"""Pixels of a side of SSIM's window."""


@torch.no_grad()
def likeness(
    generator: nn.Module, samples: Samples, device: torch.device
) -> dict[str, float | int | None]:
    """How near the images that a generator makes of real masks come to their real images.

    Args:
        generator: of label maps in [-1, 1], in evaluation mode: without the dropout that is the
            noise of training.

    Returns:
        "psnr" in dB, None where it is infinite, and "ssim", None where its window doesn't fit in:
            means over images of the network's size, in [0, 1], by torchmetrics; "images", their
            number.
    """
    from torchmetrics.functional import image as likenesses

    was_training = generator.training
    generator.eval()
    psnr, ssim = [], []
    for start in range(0, len(samples), _AT_ONCE):
        span = slice(start, start + _AT_ONCE)
        label = encode(samples.masks[span].to(device).long(), samples.spec.num_classes)
        real = to_float(samples.images[span].to(device)) * 0.5 + 0.5
        made = (generator(label) * 0.5 + 0.5).to(real.dtype)
        psnr.append(
            likenesses.peak_signal_noise_ratio(
                made, real, data_range=(0.0, 1.0), reduction="none", dim=(1, 2, 3)
            )
        )
        if min(real.shape[-2:]) >= _SMALLEST:
            found = likenesses.structural_similarity_index_measure(
                made, real, data_range=(0.0, 1.0), reduction="none"
            )
            assert isinstance(found, torch.Tensor)
            ssim.append(found.reshape(-1))
    generator.train(was_training)
    decibels = float(torch.cat(psnr).mean())
    return {
        "psnr": decibels if math.isfinite(decibels) else None,  # infinite of the very images
        "ssim": float(torch.cat(ssim).mean()) if ssim else None,
        "images": len(samples),
    }


def perceptual_path(out: Path) -> Path:
    """Where a run keeps the network of its perceptual loss."""
    return out / "checkpoints" / "perceptual.pt"


class PerceptualRecord(Hooks):
    """The network of the perceptual loss, in ``checkpoints/perceptual.pt``, from the start."""

    def __init__(self, features: nn.Module) -> None:
        self._features = features

    def start(self, engine: Engine) -> None:
        """Write the file, unless the run has it."""
        directory = engine.recorder.directory
        if directory is not None and not perceptual_path(directory).exists():
            state = {"module": self._features.state_dict()}
            checkpoint.save(perceptual_path(directory), state)
