"""The generator of a finished run as a file for other programs: a mask in, an image out."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pydantic
import torch
from torch import Tensor, nn

from mlseg import checkpoint
from mlseg.config import Settings, Tree, parse
from mlseg.errors import UserError
from mlseg.problems.e2eaug.levels import encode, label_channels
from mlseg.problems.e2eaug.networks.pix2pix import Generator
from mlseg.segmentation.exporting import EXPORTS, Exportable, Ran, Source
from mlseg.segmentation.trained import load_trained

Kernel = Annotated[int, pydantic.Field(ge=4, le=8)]


class Shape(Settings):
    """What ``checkpoints/generator.pt`` says of its network."""

    in_channels: Annotated[int, pydantic.Field(ge=1, le=256)]
    out_channels: Annotated[int, pydantic.Field(ge=1, le=256)]
    levels: Annotated[int, pydantic.Field(ge=2, le=16)]
    channels: Annotated[int, pydantic.Field(ge=1, le=1024)]
    dropout: Annotated[float, pydantic.Field(ge=0, le=1)]
    kernels: list[Kernel]


class Images(nn.Module):
    """Masks to images, by a merged generator.

    Args:
        generator: of label maps in [-1, 1].
        num_classes: K.
    """

    def __init__(self, generator: Generator, num_classes: int) -> None:
        super().__init__()
        self.generator = generator
        self.num_classes = num_classes

    def forward(self, mask: Tensor) -> Tensor:
        """(B, H, W) uint8 class numbers -> (B, C, H, W) float32 in [0, 1]."""
        return self.generator(encode(mask, self.num_classes).to(torch.float32)) * 0.5 + 0.5


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
    made = _made(path, spec.num_classes)
    wanted = label_channels(spec.num_classes), spec.channels
    if (made.generator.in_channels, made.generator.out_channels) != wanted:
        raise UserError(f"{path}: its generator is of other data than the run's segmentor")
    draw = torch.Generator().manual_seed(0)
    examples = [
        torch.randint(spec.num_classes, (number, height // 4 + 1, width // 4 + 1), generator=draw)
        .to(torch.uint8)
        .repeat_interleave(4, 1)
        .repeat_interleave(4, 2)[:, :height, :width]
        .contiguous()
        for number in (2, 1, 3)
    ]
    return Exportable(
        module=made,
        input="mask",
        outputs=["image"],
        open={0: "batch"},
        examples=examples,
        expected=[_ran(made, mask) for mask in examples],
        facts={
            "input": f"(batch, {height}, {width}) uint8 class numbers",
            "outputs": {"image": f"(batch, {spec.channels}, {height}, {width}) float32, 0 to 1"},
            "inside": {"label map": "1 inside, -1 outside; one channel a class beyond two"},
            "mode": "evaluation: without the dropout that is the noise of training",
            "classes": list(spec.classes),
            "trained_on": spec.name,
        },
        state={key: state[key] for key in ("settings", "module")},
        again=lambda file: _reader(file, spec.num_classes),
    )


def _made(path: Path, num_classes: int) -> Images:
    state: dict[str, Any] = checkpoint.load(path)
    if (kind := state.get("name", "pix2pix")) != "pix2pix":
        raise UserError(f"{path}: pix2pix generators can be exported, this one is {kind!r}")
    with checkpoint.taking(f"{path}: its generator", "name another run"):
        shape = parse(Shape, Tree(dict(state["settings"]), source=f"{path}: settings"))
        if len(shape.kernels) != 2 * shape.levels:
            raise ValueError(f"{len(shape.kernels)} kernels for {shape.levels} levels")
        made = Generator(**shape.model_dump())
        checkpoint.load_module(made, state["module"])
    return Images(made, num_classes).eval()


def _reader(path: Path, num_classes: int) -> Ran:
    return partial(_ran, _made(path, num_classes))


@torch.no_grad()
def _ran(made: Images, mask: Tensor) -> Tensor:
    """By the code of training, in evaluation mode."""
    found: Tensor = made.generator(encode(mask.long(), made.num_classes))
    return (found + 1.0) / 2.0
