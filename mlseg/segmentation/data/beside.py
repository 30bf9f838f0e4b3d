"""What is used beside a split: test-only sets, and images without masks."""

import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from mlseg.errors import UserError
from mlseg.segmentation.data import splits
from mlseg.segmentation.data.availability import available
from mlseg.segmentation.data.entry import Entry, Example, data_set
from mlseg.segmentation.data.layout import find_examples
from mlseg.segmentation.data.samples import DatasetSpec
from mlseg.segmentation.data.settings import DataSettings, resolve_root


def parts_used(parts: dict[str, list[Example]], how: str) -> dict[str, list[Example]]:
    """The parts that a split is made from."""
    if how.startswith("official"):
        return parts
    return {"all": parts["all"] if "all" in parts else parts.get("train", [])}


def other_sets(
    entry: Entry, split: splits.Split, settings: DataSettings
) -> tuple[dict[str, tuple[Entry, list[Example]]], list[str]]:
    """Examples of the test-only sets, and those that are missing and left out."""
    found: dict[str, tuple[Entry, list[Example]]] = {}
    left_out = []
    for name in settings.out_of_distribution:
        if name == settings.name:
            raise UserError(f"data.out_of_distribution: {name!r} is what is trained on")
        other = fitting(data_set(name), entry.spec)
        root = resolve_root(other.spec.name, settings.out_of_distribution_roots.get(name))
        if other.synthetic:
            raise UserError(
                f"data.out_of_distribution: {name!r} is no test of a model of real data"
            )
        if not available(other, root, settings):
            # A drawn stand-in would say nothing about a model that has seen real images.
            left_out.append(f"{name} ({root}; get it from {other.source})")
            continue
        examples = scored(other, find_examples(other, root, settings.max_files))
        shared = {e.id for e in examples} & set(split.train + split.val + split.test)
        if shared and other.ids == entry.ids:
            raise UserError(
                f"{root}: {min(shared)} of {name} is in {settings.name} too ({len(shared)} such "
                f"ids); it can't be an out-of-distribution test"
            )
        found[name] = other, examples
    return found, left_out


def images_without(
    entry: Entry,
    parts: Mapping[str, list[Example]],
    how: str,
    split: splits.Split,
    settings: DataSettings,
    root: Path,
    used: Collection[str],
) -> tuple[Entry, list[Example]]:
    """Images that no split uses, without their masks, and the set that they are of.

    Args:
        parts: examples of ``entry``, also those without a mask.
        used: real paths of the images that train, validate or test, under whatever id.
    """
    if not settings.unlabelled:
        return entry, []
    if settings.unlabelled_from is not None:
        other = data_set(settings.unlabelled_from)
        source = replace(other, spec=replace(entry.spec, name=other.spec.name))
        root = resolve_root(source.spec.name, settings.unlabelled_root)
        if source.synthetic or not available(source, root, settings):
            # Drawn stand-ins would teach a model of real images what isn't there.
            raise UserError(
                f"data.unlabelled_from: no images of {other.spec.name} in {root}; get them from "
                f"{other.source}, or set data.unlabelled_root"
            )
        found = find_examples(source, root, settings.max_files, unmasked=True)
        parts, how = found, "drawn" if "all" in found else "official"
    else:
        source = entry
    left_alone = ("test",) if how.startswith("official") else ()
    pool = {
        e.id: replace(e, masks=())
        for part, examples in (parts if left_alone else parts_used(dict(parts), how)).items()
        if part not in left_alone
        for e in examples
        if os.path.realpath(e.image) not in used
    }
    ids = splits.draw_unlabelled(
        list(pool), split, settings.unlabelled, settings.split_seed, f"{source.spec.name} in {root}"
    )
    return source, [pool[id] for id in ids]


def scored(entry: Entry, parts: dict[str, list[Example]]) -> list[Example]:
    """Of the parts of a test-only set, the one that a model is scored on."""
    order = ("val", "train") if entry.withheld_test else ("all", "test", "train", "val")
    return next(parts[part] for part in order if part in parts)


def fitting(entry: Entry, spec: DatasetSpec) -> Entry:
    """The entry with the channels of the data trained on; its classes must be as many."""
    if entry.spec.num_classes != spec.num_classes:
        raise UserError(
            f"{entry.spec.name} has {entry.spec.num_classes} classes and can't test a model of "
            f"{spec.num_classes} ({spec.name})"
        )
    return replace(entry, spec=replace(entry.spec, channels=spec.channels))
