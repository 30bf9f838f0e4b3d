"""The generator of a finished run as a file for other programs: a mask in, an image out."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mlseg import checkpoint
from mlseg.errors import UserError
from mlseg.problems.e2eaug.masks import encode, label_channels
from mlseg.problems.e2eaug.networks.finished import finished
from mlseg.segmentation.data import DatasetSpec
from mlseg.segmentation.exporting import EXPORTS, Exportable, Source
from mlseg.segmentation.trained import load_trained


class Images(nn.Module):
    """Masks to images, by a merged generator.

    Args:
        generator: of label maps in [-1, 1].
        num_classes: K.
    """

    def __init__(self, generator: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.generator = generator
        self.num_classes = num_classes

    def forward(self, mask: Tensor) -> Tensor:
        """(B, H, W) uint8 class numbers -> (B, C, H, W) float32 in [0, 1]."""
        image: Tensor = self.generator(encode(mask, self.num_classes).to(torch.float32))
        return image * 0.5 + 0.5


@EXPORTS.register("e2eaug.generator")
def generator(source: Source) -> Exportable:
    """The generator that a run ended with, merged into plain operators, in evaluation mode.

    Raises:
        UserError: the run hasn't ended, or its file is damaged.
    """
    path = source.run / "checkpoints" / "generator.pt"
    if not path.exists():
        raise UserError(
            f"{path}: no such file; a run writes its merged generator when it ends (go on with "
            f"--resume {source.run})"
        )
    state = checkpoint.load(path)
    trained = load_trained(source.run, torch.device("cpu"), source.weights)
    spec, (height, width) = trained.spec, trained.image_size
    made = _made(path, spec)
    draw = torch.Generator().manual_seed(0)
    examples = [
        torch.randint(spec.num_classes, (number, height // 4 + 1, width // 4 + 1), generator=draw)
        .to(torch.uint8)
        .repeat_interleave(4, 1)
        .repeat_interleave(4, 2)[:, :height, :width]
        .contiguous()
        for number in (2, 1, 3)
    ]
    with checkpoint.taking(f"{path}: its generator", "put the file back, or name another run"):
        expected = [ran(made, mask) for mask in examples]
    return Exportable(
        module=made,
        input="mask",
        outputs=["image"],
        open={0: "batch"},
        examples=examples,
        expected=expected,
        facts={
            "input": f"(batch, {height}, {width}) uint8 class numbers",
            "outputs": {"image": f"(batch, {spec.channels}, {height}, {width}) float32, 0 to 1"},
            "inside": {"label map": "1 inside, -1 outside; one channel a class beyond two"},
            "mode": "evaluation: without the dropout that is the noise of training",
            "classes": list(spec.classes),
            "trained_on": spec.name,
        },
        state={key: state[key] for key in ("name", "settings", "module") if key in state},
        again=lambda file: partial(ran, _made(file, spec)),
    )


def _made(path: Path, spec: DatasetSpec) -> Images:
    generator = finished(path, label_channels(spec.num_classes), spec.channels)
    return Images(generator, spec.num_classes).eval()


@torch.no_grad()
def ran(made: Images, mask: Tensor) -> Tensor:
    """By the code of training, in evaluation mode."""
    found: Tensor = made.generator(encode(mask.long(), made.num_classes))
    return (found + 1.0) / 2.0
