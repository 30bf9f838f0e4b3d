"""The architecture A of E2EAug: the alphas, as a module of their own."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlseg.errors import UserError
from mlseg.problems.e2eaug.learned_masks import LearnedMasks
from mlseg.problems.e2eaug.networks.cells import CANDIDATES

_DECIDED = 120.0
"""Of an alpha: in single precision the weights of all other candidates are exactly 0. Less would
make their gradients subnormal numbers, with which a CPU calculates many times as slowly."""

Selection = Literal["softmax", "sigmoid"]


class Architecture(nn.Module):
    """Selection weights of a searchable generator: a function of free parameters, cell by cell.

    Args:
        num_cells: number of cells, `SearchableGenerator.num_cells`.
        scale: standard deviation of the initial alphas. The default 1e-3 (the public code's) starts
            every candidate at 1/K; larger values draw a random architecture.
        selection: "softmax", a cell's weights sum to 1 (Liu, Simonyan, Yang: DARTS, ICLR 2019,
            equation 2); "sigmoid", each lies in [0, 1] by itself (E2EAug, section 3.2).
        generator: random generator for the initial alphas.
        candidates: names of the K operators of a cell.
        synthetic_weight: initial value of lambda, where that is learned with the alphas.
        masks: of ranges that are learned with them.

    `alphas` (num_cells, K) is its only parameter, but for `log_synthetic_weight` and those of
    `masks` where they are asked for, so this problem's optimizer holds nothing else.
    """

    def __init__(
        self,
        num_cells: int,
        scale: float = 1e-3,
        selection: Selection = "softmax",
        generator: torch.Generator | None = None,
        candidates: Sequence[str] = CANDIDATES,
        synthetic_weight: float | None = None,
        masks: LearnedMasks | None = None,
    ) -> None:
        super().__init__()
        self.selection = selection
        self.candidates = tuple(candidates)
        alphas = scale * torch.randn(num_cells, len(self.candidates), generator=generator)
        self.alphas = nn.Parameter(alphas)
        self.log_synthetic_weight: nn.Parameter | None = None
        if synthetic_weight is not None:
            self.log_synthetic_weight = nn.Parameter(torch.tensor(math.log(synthetic_weight)))
        self.masks = masks

    def forward(self) -> Tensor:
        """(cells, K) selection weights in [0, 1]; by softmax each row sums to 1."""
        return self.alphas.sigmoid() if self.selection == "sigmoid" else self.alphas.softmax(1)

    def synthetic_weight(self) -> Tensor | None:
        """Lambda, above zero whatever its parameter is; None where it isn't learned."""
        return None if self.log_synthetic_weight is None else self.log_synthetic_weight.exp()

    def besides(self) -> dict[str, Tensor]:
        """What is learned besides the alphas, by name."""
        weight = self.synthetic_weight()
        found = {} if weight is None else {"synthetic_weight": weight}
        if self.masks is not None:
            found |= {f"mask_{name}": value for name, value in self.masks.values().items()}
        return found

    @torch.no_grad()
    def choose(self, candidate: str) -> None:
        """Give every cell one candidate alone: the others' weights are below any rounding.

        Raises:
            UserError: there is none of that name.
        """
        if candidate not in self.candidates:
            raise UserError(
                f"architecture.choice: no candidate {candidate!r}; there are "
                f"{', '.join(self.candidates)}"
            )
        self.alphas.fill_(-_DECIDED)
        self.alphas[:, self.candidates.index(candidate)] = _DECIDED

    def entropy(self) -> Tensor:
        """(cells,) entropy of each cell's weights in nats: log K if undecided, 0 if decided.

        Weights that don't sum to 1 are taken relative to their sum.
        """
        if self.selection == "sigmoid":
            log_weights = functional.logsigmoid(self.alphas).log_softmax(1)
        else:
            log_weights = self.alphas.log_softmax(1)
        return -(log_weights.exp() * log_weights).sum(1)

    def choices(self) -> list[str]:
        """The strongest candidate of each cell by name, such as "4-2-1".

        Reads from the device; not for use inside a training step.
        """
        return [self.candidates[index] for index in self.alphas.argmax(1).tolist()]
