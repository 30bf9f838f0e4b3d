"""A run's segmentor, rebuilt from its checkpoint alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlseg import checkpoint
from mlseg.errors import UserError
from mlseg.nets import SegmentorSettings, build_segmentor


@dataclass(frozen=True)
class Trained:
    """A trained segmentor and what is known of it.

    Attributes:
        module: (B, C, H, W) in [-1, 1] to (B, K, H, W) logits, in evaluation mode.
        in_channels: C.
        classes: K names.
        palette: an RGB triple per class.
        image_size: (H, W) it was trained at, pixels.
        ignore_index: of its training data, or None.
        metric: headline metric of its training data.
        data: name of its training data.
        step: at which the weights were taken.
        autocast: whether the run computed in bfloat16.
    """

    module: nn.Module
    in_channels: int
    classes: list[str]
    palette: list[list[int]]
    image_size: tuple[int, int]
    ignore_index: int | None
    metric: str
    data: str
    step: int
    autocast: bool

    @torch.no_grad()
    def probabilities(self, image: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Class probabilities of images, at their size or another.

        Args:
            image: (B, C, H, W) in [-1, 1].
            size: (H', W') to upsample the probabilities to, bilinearly.

        Returns:
            (B, K, H', W').
        """
        found = self.module(image).float().softmax(1)
        if size is None or tuple(found.shape[-2:]) == tuple(size):
            return found
        return functional.interpolate(found, size, mode="bilinear", align_corners=False)


def load_trained(run: Path, device: torch.device, weights: str = "best") -> Trained:
    """The segmentor of a run directory.

    Args:
        run: the directory.
        weights: ``best`` (chosen on validation data) or ``last``.

    Raises:
        UserError: no such run, no such checkpoint, or one of a run without a segmentor.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such run directory")
    path = run / "checkpoints" / f"{weights}.pt"
    state = checkpoint.load(path)
    description: dict[str, Any] | None = state.get("segmentor")
    if description is None:
        raise UserError(f"{path}: this run has no segmentor to load")
    settings = SegmentorSettings.model_validate(description["settings"])
    module = build_segmentor(settings, description["in_channels"], description["num_classes"])
    module.load_state_dict(state["problems"][description["problem"]]["module"])
    height, width = description["image_size"]
    return Trained(
        module.to(device).eval(),
        description["in_channels"],
        description["classes"],
        description["palette"],
        (height, width),
        description["ignore_index"],
        description["metric"],
        state["data"],
        state["engine"]["global_step"],
        description["precision"] == "bf16",
    )
