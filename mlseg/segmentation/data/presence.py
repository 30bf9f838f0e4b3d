"""Which classes the masks of a data set hold."""

from collections.abc import Mapping
from pathlib import Path

import torch

from mlseg.errors import UserError
from mlseg.segmentation.data.placement import Fit
from mlseg.segmentation.data.samples import DatasetSpec, Samples

_CALLED = {"train": "training", "val": "validation", "test": "test"}


def classes_missing(splits: Mapping[str, Samples], spec: DatasetSpec, root: Path) -> list[str]:
    """What to say of classes that no example of a split holds.

    Of those that are trained on each class is looked for; of the others, whether there is more than
    one. A single mask of one class is as good as any.

    Args:
        splits: by name, one of them "train". Images without masks aren't among them.
        root: where they are from, for messages.

    Raises:
        UserError: all pixels that are trained on are of one class.
    """
    held = {name: held_values(samples, spec) for name, samples in splits.items()}
    classes = {name: sorted(found & set(range(spec.num_classes))) for name, found in held.items()}
    require_two_classes(set().union(*held.values()), spec, splits["train"].fit)
    if len(splits["train"]) and len(classes["train"]) < 2:
        others = set().union(*classes.values()) > set(classes["train"])
        mend = ", or train on others (data.train, data.split_seed)" if others else ""
        raise UserError(
            f"{spec.name} in {root}: {_all_of_one('train', splits, classes, spec)}, from which no "
            f"segmentation can be learned; check the masks there{mend}"
        )
    said = []
    missing = [index for index in range(spec.num_classes) if index not in held["train"]]
    if missing:
        names = ", ".join(f"{index} ({spec.classes[index]})" for index in missing)
        said.append(f"No training example holds class {names}.")
    for name in splits:
        if name != "train" and len(splits[name]) and len(classes[name]) < 2:
            what = "choose weights" if name == "val" else "tell how good they are"
            said.append(f"{_all_of_one(name, splits, classes, spec)}: scores there hardly {what}.")
    return [sentence[0].upper() + sentence[1:] for sentence in said]


def _all_of_one(
    name: str,
    splits: Mapping[str, Samples],
    classes: Mapping[str, list[int]],
    spec: DatasetSpec,
) -> str:
    held = [f"class {index} ({spec.classes[index]})" for index in classes[name]]
    what = f"{held[0] if held else 'ignored pixels'} alone"
    if len(splits[name]) == 1:
        return f"the mask of the one {_CALLED[name]} image holds {what}"
    return f"the masks of all {len(splits[name])} {_CALLED[name]} images hold {what}"


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
