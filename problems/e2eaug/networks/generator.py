"""What every mask-to-image generator of E2EAug is: a network whose operators the alphas weight.

A generator is a class ``Net(in_channels, out_channels, image_size, *, its settings)`` derived from
`MaskToImage`. Where it is defined it registers itself.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlseg.config.registry import Registry
from mlseg.problems.e2eaug.networks import rich_cell
from mlseg.problems.e2eaug.networks.cells import CANDIDATES, Cell
from mlseg.problems.e2eaug.networks.rich_cell import RichCell

Candidates = Literal["aligned", "rich"]
"""Operators of a cell: the paper's three, which are nested, or five different ones."""

OPERATORS = {"aligned": CANDIDATES, "rich": rich_cell.CANDIDATES}

AnyCell = Cell | RichCell


def cell(
    candidates: Candidates,
    in_channels: int,
    out_channels: int,
    transposed: bool,
    bias: bool = False,
) -> AnyCell:
    """A cell of these candidates."""
    kind = RichCell if candidates == "rich" else Cell
    return kind(in_channels, out_channels, transposed, bias)


class MaskToImage(nn.Module, ABC):
    """A searchable generator.

    The selection weights are an input of ``forward``, not parameters: they belong to a problem of
    their own (see `Architecture`), and gradients flow through them.

    Attributes:
        candidates: names of the operators among which a cell chooses.
        plain: class of what :meth:`merged` makes of operators that can be merged; what it takes
            says how a finished generator is made again (see :mod:`.finished`).
    """

    candidates: tuple[str, ...] = CANDIDATES
    plain: type[nn.Module] | None = None

    @property
    @abstractmethod
    def cell_names(self) -> list[str]:
        """Names of the cells, in the order of the rows of ``weights``."""

    @property
    def num_cells(self) -> int:
        """Number of cells: rows of ``weights``. 0 for a plain generator."""
        return len(self.cell_names)

    @abstractmethod
    def merged(self, weights: Tensor | None) -> nn.Module:
        """The same function for fixed (cells, K) weights, as a copy that takes the label map alone.

        It has a method ``settings()``: what its class has to be called with to make another.
        """

    def check_weights(self, weights: Tensor | None) -> None:
        """Raise ValueError unless ``weights`` are (cells, K); a plain generator ignores them."""
        wanted = (self.num_cells, len(self.candidates))
        if self.num_cells and (weights is None or tuple(weights.shape) != wanted):
            shape = None if weights is None else tuple(weights.shape)
            raise ValueError(f"selection weights must be {wanted}, not {shape}")

    def rows(self, weights: Tensor | None) -> Sequence[Tensor] | None:
        """Each cell's weights, checked, taken apart at once: see :func:`~.cells.mix`."""
        self.check_weights(weights)
        return None if weights is None else weights.unbind()


GENERATORS: Registry[type[MaskToImage]] = Registry(
    "generator",
    base=MaskToImage,
    packages=["mlseg.problems.e2eaug.networks"],
    example="my_package.nets:MyGenerator",
)


class Fixed(nn.Module):
    """A searchable generator at selection weights that no longer change, as a copy.

    Args:
        generator: copied.
        weights: (cells, K).
        made_with: what its class is called with.
    """

    weights: Tensor

    def __init__(self, generator: MaskToImage, weights: Tensor, made_with: dict[str, Any]) -> None:
        super().__init__()
        self.generator = copy.deepcopy(generator)
        self.made_with = made_with
        self.register_buffer("weights", weights.detach().clone())

    def settings(self) -> dict[str, Any]:
        """What the generator's class has to be called with to make another of this shape."""
        return self.made_with

    def forward(self, label_BCHW: Tensor) -> Tensor:
        """Label map to image."""
        image: Tensor = self.generator(label_BCHW, self.weights)
        return image


class OfCells(MaskToImage):
    """A generator that can be of cells; its operators at a place are cells or plain ones.

    Attributes:
        search: where cells stand, as its class was told.
        kind: of which candidates.
    """

    plain: type[nn.Module]
    search: str
    kind: Candidates

    def choose(self, search: str, candidates: Candidates, image_size: int | Sequence[int]) -> None:
        """Take note of what the class was called with."""
        self.search = search
        self.kind, self.candidates = candidates, OPERATORS[candidates]
        self._image_size = list(sides(image_size))

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What its class takes, beside :meth:`choose`'s arguments, and ``plain`` takes as well."""

    @abstractmethod
    def of_plain(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """What ``plain`` takes besides, for a network of these tensors."""

    @torch.no_grad()
    def merged(self, weights: Tensor | None) -> Any:
        """The same function for fixed (cells, K) weights: ``plain``, each cell one 8x8 convolution.

        Every tensor is copied. Cells of different operators stay as they are, in a
        :class:`Fixed`.
        """
        self.check_weights(weights)
        if self.kind == "rich" and weights is not None and self.num_cells:
            more = {"search": self.search, "candidates": self.kind, "image_size": self._image_size}
            return Fixed(self, weights, {**self.settings(), **more})
        state = export_state(self, weights)
        made = rebuilt(self.plain, {**self.settings(), **self.of_plain(state)}, state)
        return made.train(self.training)


def sides(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of an image size: one number, or both."""
    if isinstance(image_size, int):
        return image_size, image_size
    height, width = image_size
    return int(height), int(width)


def xavier(module: nn.Module) -> None:
    """Xavier's normal distribution times 0.02, as SPADE initialises, and biases of 0."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.xavier_normal_(module.weight, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def reflect(x_BCHW: Tensor, rows: int, columns: int) -> Tensor:
    """Reflection padding by ``rows`` above and below and ``columns`` at either side.

    By slices and ``cat``, whose gradients are deterministic on every device; a side must be longer
    than its padding.
    """
    for dim, amount in ((-2, rows), (-1, columns)):
        if not amount:
            continue
        length = x_BCHW.shape[dim]
        before = x_BCHW.narrow(dim, 1, amount).flip(dim)
        after = x_BCHW.narrow(dim, length - 1 - amount, amount).flip(dim)
        x_BCHW = torch.cat([before, x_BCHW, after], dim)
    return x_BCHW


def export_state(generator: nn.Module, weights: Tensor | None) -> dict[str, Tensor]:
    """A generator's state with every cell's kernels merged into one operator's, all of it copied.

    ``weights`` has a row for each cell, in the order in which the cells are submodules.
    """
    state = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    rows = iter(()) if weights is None else iter(weights.detach())
    for path, module in generator.named_modules():
        if isinstance(module, Cell):
            for name in module.state_dict():
                del state[f"{path}.{name}"]
            kernel, bias = module.merged(next(rows))
            state[f"{path}.weight"] = kernel
            if bias is not None:
                state[f"{path}.bias"] = bias
    return state


def rebuilt(cls: Any, settings: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    """A network of ``cls`` that has these very tensors; no random number is drawn for it."""
    with torch.device("meta"):
        network: nn.Module = cls(**settings)
    network.load_state_dict(state, assign=True)
    return network


def nearest(label_BCHW: Tensor, size: Sequence[int]) -> Tensor:
    """The label map at another size, (B, C, h, w), by the nearest pixel."""
    if tuple(label_BCHW.shape[-2:]) == tuple(size):
        return label_BCHW
    return functional.interpolate(label_BCHW, (int(size[0]), int(size[1])), mode="nearest")
