"""Which classes the masks of a data set hold."""

from collections.abc import Mapping

import torch

from mlseg.errors import UserError
from mlseg.segmentation.data.placement import Fit
from mlseg.segmentation.data.samples import DatasetSpec, Samples


def classes_missing(splits: Mapping[str, Samples], spec: DatasetSpec) -> list[str]:
    """What to say of classes that no example holds that is trained on.

    Args:
        splits: by name, one of them "train".

    Raises:
        UserError: pixels are ignored, and all that count, in every split, are of one class.
    """
    held = {name: held_values(samples, spec) for name, samples in splits.items()}
    require_two_classes(set().union(*held.values()), spec, splits["train"].fit)
    missing = [index for index in range(spec.num_classes) if index not in held["train"]]
    if not missing:
        return []
    names = ", ".join(f"{index} ({spec.classes[index]})" for index in missing)
    return [f"No training example holds class {names}."]


def require_two_classes(held: set[int], spec: DatasetSpec, fit: Fit) -> None:
    """Raise UserError where the ignore index has taken what was to be learned.

    What padding ignores says nothing; of more than two classes few may be met.
    """
    missing = [index for index in range(spec.num_classes) if index not in held]
    if spec.ignore_index not in held or len(missing) < spec.num_classes - 1:
        return
    if fit == "stretch" or spec.num_classes == 2:
        raise UserError(
            f"{spec.name}: no example of any split holds class {missing[0]} "
            f"({spec.classes[missing[0]]}), while {spec.ignore_index} is ignored; with an ignore "
            "index (data.ignore_index) masks hold class numbers, 0 and 1, not 0 and 255"
        )


def held_values(samples: Samples, spec: DatasetSpec) -> set[int]:
    """The values that masks hold, until every class is met."""
    found: set[int] = set()
    classes = set(range(spec.num_classes))
    for mask in samples.masks:
        found.update(torch.bincount(mask.flatten(), minlength=256).nonzero().flatten().tolist())
        if classes <= found:
            break
    return found
