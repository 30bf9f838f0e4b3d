"""Real data for tasks: what scikit-learn ships, split and standardised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mlseg.errors import UserError
from mlseg.randomness import derived

MEND = "install it with: uv pip install scikit-learn (or in the checkout: '.[compare]')"
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Splits:
    """Examples of three splits, each (N, D) features in float64 and (N,) targets.

    The test split is the same for every seed, so that no seed learns from what another is tested
    on; the seed draws training and validation data from the rest.
    """

    training: Pair
    validation: Pair
    test: Pair


def load(
    name: Literal["diabetes", "breast_cancer", "digits"],
    seed: int,
    training: int,
    validation: int,
    degree: int = 1,
) -> Splits:
    """Load a data set, features standardised by the training split.

    Args:
        name: ``diabetes`` (442 examples, 10 features, a number), ``breast_cancer`` (569, 30, two
            classes) or ``digits`` (1797, 64, ten classes).
        seed: of training and validation split.
        training, validation: sizes; at least a fifth of all examples is left for testing.
        degree: 2 adds squares and products of features.

    Raises:
        UserError: scikit-learn is missing, or there are fewer examples.
    """
    try:
        from sklearn import datasets
        from sklearn.preprocessing import PolynomialFeatures
    except ImportError:
        raise UserError(f"the data set {name} comes with scikit-learn; {MEND}") from None
    raw, target = getattr(datasets, f"load_{name}")(return_X_y=True)
    x = torch.as_tensor(raw, dtype=torch.float64)
    y = torch.as_tensor(target)
    y = y.to(torch.float64) if name != "digits" else y.to(torch.int64)
    held_out = len(x) // 5
    if training + validation > len(x) - held_out:
        raise UserError(
            f"{name} has {len(x)} examples, of which {held_out} are for testing: lower training + "
            f"validation to {len(x) - held_out} or less"
        )
    if degree > 1:
        # Squares and products of standardised features, or they all but repeat them.
        made = PolynomialFeatures(degree, include_bias=False)
        x = torch.as_tensor(made.fit_transform(((x - x.mean(0)) / x.std(0)).numpy()))
    order = torch.randperm(len(x), generator=_generator(0, f"{name}/test"))
    test, rest = order[:held_out], order[held_out:]
    rest = rest[torch.randperm(len(rest), generator=_generator(seed, f"{name}/training"))]
    own, others = rest[:training], rest[training : training + validation]
    mean, scale = x[own].mean(0), x[own].std(0)
    x = (x - mean) / torch.where(scale > 1e-8, scale, 1.0)
    if name == "diabetes":
        y = (y - y[own].mean()) / y[own].std()
    return Splits(*((x[part], y[part]) for part in (own, others, test)))


def _generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(derived(seed, name))
