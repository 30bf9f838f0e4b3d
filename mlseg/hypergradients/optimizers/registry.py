"""The table of optimizers."""

from typing import Any

import torch

from mlseg.config import Settings
from mlseg.config.registry import Registry

OPTIMIZERS: Registry[Any] = Registry(
    "optimizer",
    base=(Settings, torch.optim.Optimizer),
    packages=["mlseg.hypergradients.optimizers", "mlseg.multilevel.settings"],
    example="my_package.optim:Lion",
)
"""By name: a class derived from ``torch.optim.Optimizer``, whose signature says its settings; or a
class of settings with a method ``build(parameters)``."""
