"""From settings to data: find or replace, split, decode."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from mlseg.errors import UserError
from mlseg.files import reachable
from mlseg.segmentation.data import contents, splits
from mlseg.segmentation.data.availability import absent, available, missing
from mlseg.segmentation.data.beside import fitting, images_without, other_sets, parts_used, scored
from mlseg.segmentation.data.decode import limit_pixels
from mlseg.segmentation.data.entry import Entry, Example, Part, data_set
from mlseg.segmentation.data.examples import decode
from mlseg.segmentation.data.layout import MAX_FILES, find_examples
from mlseg.segmentation.data.placement import Fit
from mlseg.segmentation.data.presence import classes_missing, held_values, require_two_classes
from mlseg.segmentation.data.samples import DatasetSpec, Samples, blank, wants_shapes_alone
from mlseg.segmentation.data.settings import (
    OWN_DATA,
    DataSettings,
    check_fit,
    resolve_root,
)
from mlseg.segmentation.data.standins import COUNTS, POOL, draw_synthetic, shifted, synthetic_ids

Provenance = Literal["real", "synthetic"]


@dataclass(frozen=True)
class SegmentationData:
    """What a run trains and tests on.

    Attributes:
        train, val, test: disjoint; val and test may be empty.
        unlabelled: images beside them whose masks haven't been read: background everywhere, or the
            ignore index in padding; None where none were asked for.
        out_of_distribution: test-only sets by name.
        spec: of train, val and test.
        provenance: "real", or "synthetic" for stand-ins.
        manifest: what ``splits.json`` holds; see `mlseg.segmentation.data.splits.manifest`.
        notice: a line that a command must show at the start and at the end, or None.
        files: of every example; empty for drawn ones.
        digests: how much of a file its digest is of; see ``DataSettings.digests``.
    """

    train: Samples
    val: Samples
    test: Samples
    out_of_distribution: dict[str, Samples]
    spec: DatasetSpec
    provenance: Provenance
    manifest: dict[str, Any]
    notice: str | None = None
    files: contents.Files = field(default_factory=dict, repr=False)
    digests: contents.How = "sample"
    unlabelled: Samples | None = None

    @property
    def split_hash(self) -> str:
        """Over which example trains, validates and tests; images without masks don't matter."""
        return str(self.manifest.get("labelled_hash", self.manifest["hash"]))

    def contents(self) -> dict[str, Any]:
        """Digests of all files, for ``splits.json``."""
        return contents.record(self.files, self.digests)

    def changed(self, stored: Mapping[str, Any]) -> list[Path]:
        """The files that are no longer what they were when ``stored`` was made."""
        return contents.changed(self.files, stored)


def load_data(settings: DataSettings, unlabelled: bool = True) -> SegmentationData:
    """Load, or make, the data that `settings` name.

    Args:
        unlabelled: whether images without masks are decoded too, if `settings` want any; scoring
            has no use for them. Their ids belong to the manifest in any case.

    Raises:
        UserError: data are missing, bad, or fewer than asked for; one line that names the file.
        RunError: a download or the cache failed.
    """
    entry = settings.entry
    root = resolve_root(entry.spec.name, settings.root)
    limit_pixels(settings.max_megapixels)
    if entry.synthetic or not available(entry, root, settings):
        return _synthetic(entry, root, settings, unlabelled)

    own_unlabelled = settings.unlabelled > 0 and settings.unlabelled_from is None
    everything = find_examples(entry, root, settings.max_files, unmasked=own_unlabelled)
    parts = {name: [e for e in found if e.masks] for name, found in everything.items()}
    split, how = _split(entry, parts, settings, root)
    chosen = {(e.id): e for examples in parts_used(parts, how).values() for e in examples}
    others, left_out = other_sets(entry, split, settings)
    tested = [e.image for _, examples in others.values() for e in examples]
    # Not Path.resolve, which raises at links in a circle: what reads the image says it better.
    used = {os.path.realpath(p) for p in [*tested, *(chosen[id].image for id in split.ids)]}
    source, without = images_without(entry, everything, how, split, settings, root, used)
    wanted: dict[str, tuple[Entry, list[Example]]] = {
        name: (entry, [chosen[id] for id in ids]) for name, ids in split.as_dict().items()
    }
    wanted |= {f"other {name}": found for name, found in others.items()}
    if without and unlabelled:
        wanted["unlabelled"] = source, without
    number = sum(len(examples) for _, examples in wanted.values())
    height, width = settings.size
    mib = number * (entry.spec.channels + 1) * height * width / 2**20
    cache = _cache(settings, mib)

    def decoded(key: str) -> Samples:
        of, examples = wanted[key]
        if wants_shapes_alone():
            return blank([e.id for e in examples], of.spec, settings.size, settings.fit)
        return decode(examples, of, of.spec, settings.size, cache, settings.fit)

    made = {name: decoded(name) for name in splits.SPLITS}
    notices = [] if wants_shapes_alone() else classes_missing(made, entry.spec, root)
    if left_out:
        notices.append(f"Not tested on, because missing: {'; '.join(left_out)}.")
    return SegmentationData(
        **made,
        out_of_distribution={name: decoded(f"other {name}") for name in others},
        spec=entry.spec,
        provenance="real",
        manifest=splits.manifest(
            split,
            dataset=settings.name,
            how=how,
            seed=settings.split_seed,
            provenance="real",
            out_of_distribution={n: [e.id for e in found] for n, (_, found) in others.items()},
            unlabelled=[e.id for e in without],
        ),
        notice=" ".join(notices) or None,
        files={
            "data": {id: _paths(chosen[id]) for ids in split.as_dict().values() for id in ids},
            **{name: {e.id: _paths(e) for e in found} for name, (_, found) in others.items()},
            **({"unlabelled images": {e.id: _paths(e) for e in without}} if without else {}),
        },
        digests=settings.digests,
        unlabelled=decoded("unlabelled") if "unlabelled" in wanted else None,
    )


def _paths(example: Example) -> tuple[Path, ...]:
    return (example.image, *example.masks)


def load_examples(
    name: str,
    root: str | None,
    size: tuple[int, int],
    spec: DatasetSpec,
    fit: Fit = "stretch",
    max_files: int = MAX_FILES,
    layout: Part | None = None,
) -> Samples:
    """All examples of a data set, for scoring a trained model on it.

    Args:
        name: registered, or a dotted path. Of a set with official parts the test part, or else the
            training part; the validation part where the test part's labels are not public.
        root: as `DataSettings.root`.
        size: (H, W) in pixels.
        spec: of the data the model was trained on; classes and channels must fit.
        fit: as `DataSettings.fit`.
        max_files: as `DataSettings.max_files`.
        layout: of an own folder, see `folder_layout`.

    Raises:
        UserError: data are missing, bad, of other classes, or can't be padded.
    """
    try:
        entry = fitting(_as_trained(data_set(name), spec), spec)
        if layout is not None:
            entry = replace(entry, layouts=({"all": layout},))
        check_fit(fit, entry, "a model of padded images can only be scored on sets that have one")
    except ValueError as error:
        raise UserError(str(error)) from None
    folder = resolve_root(entry.spec.name, root)
    if entry.synthetic:
        ids = synthetic_ids(COUNTS["test"])
        return draw_synthetic(entry.spec, ids, size, fit, 0)
    if absent(folder):
        raise missing(entry, folder)
    examples = scored(entry, find_examples(entry, folder, max_files))
    samples = decode(examples, entry, entry.spec, size, fit=fit)
    if fit == "stretch":  # padding is ignored in images of healthy people too
        require_two_classes(held_values(samples, spec), spec, fit)
    return samples


def _split(
    entry: Entry, parts: dict[str, list[Example]], settings: DataSettings, root: Path
) -> tuple[splits.Split, str]:
    """The split and how it was made: `DataSettings.splits`, or the set's default of it."""
    name = f"{entry.spec.name} in {root}"
    by_default = entry.official or (entry.spec.name == "pairs" and "all" not in parts)
    how = settings.splits or ("official" if by_default else "drawn")
    counts = settings.train, settings.val, settings.test, settings.split_seed
    if how.startswith("official"):
        if "all" in parts:
            raise UserError(f"{name}: comes without an official split; set data.splits to drawn")
        ids = {part: [e.id for e in examples] for part, examples in parts.items()}
        if entry.withheld_test:
            if settings.test:
                raise UserError(
                    f"data.test: the test labels of {entry.spec.name} are not public; set it to 0 "
                    "or leave it out, and test on the validation split or the benchmark's server"
                )
            ids = {part: found for part, found in ids.items() if part != "test"} | {"test": []}
        if how == "official_test":
            ids.pop("val", None)  # drawn from the training part, then
        return splits.official(ids, *counts, name), how
    (pool,) = parts_used(parts, how).values()
    if not pool:
        raise UserError(f"{name}: the training part is missing; expected {entry.expected[0]}")
    return splits.draw([e.id for e in pool], *counts, name), how


def _as_trained(entry: Entry, spec: DatasetSpec) -> Entry:
    """Own data have the classes of the data that the model was trained on."""
    if entry.spec.name not in OWN_DATA:
        return entry
    binary = spec.num_classes == 2 and spec.ignore_index is None
    own = replace(spec, name=entry.spec.name)
    return replace(entry, spec=own, masks="binary" if binary else "index")


def _cache(settings: DataSettings, mib: float) -> Path | None:
    if settings.cache_dir is not None:
        return reachable(settings.cache_dir)
    if mib <= settings.memory_limit_mib:
        return None
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mlseg"


def _synthetic(
    entry: Entry, root: Path, settings: DataSettings, unlabelled: bool
) -> SegmentationData:
    """A stand-in, or a synthetic set asked for by its name."""
    counts = {key: getattr(settings, key) for key in COUNTS}
    counts = {k: COUNTS[k] if v is None else v for k, v in counts.items()}
    name = entry.spec.name
    split = splits.draw(
        synthetic_ids(POOL), **counts, seed=settings.split_seed, name=f"synthetic {name}"
    )
    train, val, test = (
        draw_synthetic(entry.spec, ids, settings.size, settings.fit, 0)
        for ids in split.as_dict().values()
    )
    pool = synthetic_ids(POOL)
    ids_without = splits.draw_unlabelled(
        pool, split, settings.unlabelled, settings.split_seed, f"synthetic {name}"
    )
    without = None
    if ids_without and unlabelled:
        drawn = draw_synthetic(entry.spec, ids_without, settings.size, settings.fit, 0)
        without = replace(drawn, masks=torch.zeros_like(drawn.masks[:1]).expand_as(drawn.masks))
    others = {}
    for number, other in enumerate(settings.out_of_distribution, 1):
        spec = fitting(data_set(other), entry.spec).spec
        ids = synthetic_ids(COUNTS["test"])
        drawn = draw_synthetic(spec, ids, settings.size, settings.fit, number)
        others[other] = shifted(drawn)
    if entry.synthetic:
        notice = f"SYNTHETIC DATA: {name} is drawn by mlseg"
    else:
        notice = (
            f"SYNTHETIC DATA: no data of {name} in {root}, so images drawn by mlseg stand in for "
            f"them (real ones: {entry.source})"
        )
    return SegmentationData(
        train,
        val,
        test,
        others,
        entry.spec,
        "synthetic",
        splits.manifest(
            split,
            dataset=settings.name,
            how="drawn",
            seed=settings.split_seed,
            provenance="synthetic",
            out_of_distribution={name: samples.ids for name, samples in others.items()},
            unlabelled=ids_without,
        ),
        notice + ". Its figures can't be compared with published ones.",
        unlabelled=without,
    )
