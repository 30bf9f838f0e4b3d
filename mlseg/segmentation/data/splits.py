"""Which examples train, validate and test: drawn reproducibly, nested, written down.

**How a split is drawn.** The ids are put in an order that only the seed and the ids decide: sorted
by the SHA-256 digest of ``"<seed>:<id>"``. No random number generator takes part, so that the order
is the same on every machine and with every version of every library, and an added file doesn't
reshuffle the others. From that order

- the test set is the first `test` ids,
- the training set is the next `train` ids, counted from the front of what is left,
- the validation set is the last `val` ids, counted from the back of what is left,
- images without masks are drawn from those in between, in an order of their own.

With the same seed, the same ids and the same test size, a smaller training set is therefore part of
every larger one, a smaller validation set part of every larger one, and so the 40 examples of a
32/8 split lie within the 100 of an 80/20 split and these within the 200 of a 160/40 split. No id
is ever in two sets.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlseg.errors import UserError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Split:
    """Ids of the three sets, disjoint. Each in the order in which it was drawn."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]

    def __post_init__(self) -> None:
        counts = Counter(self.train + self.val + self.test)
        repeated = sorted(name for name, count in counts.items() if count > 1)
        if repeated:
            places = [split for split in SPLITS if repeated[0] in getattr(self, split)]
            raise UserError(
                f"id {repeated[0]!r} is in more than one place ({' and '.join(places)}); "
                f"an example may be in one split only, and once ({len(repeated)} such ids)"
            )

    @property
    def ids(self) -> tuple[str, ...]:
        """All of them."""
        return self.train + self.val + self.test

    def as_dict(self) -> dict[str, tuple[str, ...]]:
        return {name: getattr(self, name) for name in SPLITS}


def seeded_order(ids: Sequence[str], seed: int | str) -> list[str]:
    """The ids in the order described above; the order in which they come doesn't matter."""

    def digest(name: str) -> tuple[bytes, str]:
        return hashlib.sha256(_bytes(f"{seed}:{name}")).digest(), name

    return sorted(ids, key=digest)


def _bytes(name: str) -> bytes:
    """As in the file system, where a name need not be UTF-8."""
    return name.encode("utf-8", "surrogateescape")


def draw(
    ids: Sequence[str],
    train: int | None = None,
    val: int | None = None,
    test: int | None = None,
    seed: int = 0,
    name: str = "the data set",
) -> Split:
    """Draw training, validation and test ids.

    Args:
        ids: all ids, in any order.
        train, val, test: how many of each. Not given: `test` is a fifth of all; `val` is a quarter
            of `train` where that is given and a fifth of what the test set leaves where it isn't;
            `train` is the rest. (A quarter of `train`: the paper's 4 to 1.)
        seed: another seed, another draw.
        name: of the data set, for errors.

    Raises:
        UserError: more examples are asked for than there are; an id comes twice.
    """
    order = seeded_order(ids, seed)
    number = len(order)
    test = round(number / 5) if test is None else test
    left = number - test
    if val is None:
        val = max(1, round(train / 4)) if train is not None else round(left / 5)
    train = max(left - val, 0) if train is None else train
    if test + train + val > number:
        raise UserError(
            f"{name} has {number} examples, but train + val + test = {train} + {val} + {test} = "
            f"{train + val + test}; ask for fewer in data.train, data.val or data.test"
        )
    if train < 1:
        raise UserError(f"{name}: no example is left for training; {number} examples in all")
    rest = order[test:]
    return Split(tuple(rest[:train]), tuple(rest[left - val :]), tuple(order[:test]))


def official(
    parts: Mapping[str, Sequence[str]],
    train: int | None = None,
    val: int | None = None,
    test: int | None = None,
    seed: int = 0,
    name: str = "the data set",
) -> Split:
    """The split that a data set comes with, each part whole or thinned to a nested subset.

    Args:
        parts: ids of "train", "val" and "test". Where there is no "val", validation examples are
            taken from the back of the training part, as `draw` does.
        train, val, test: how many of each; all of the part where not given.

    Raises:
        UserError: a part is missing or smaller than asked for; an id is in two parts.
    """
    if "train" not in parts or "test" not in parts:
        have = ", ".join(parts) or "none"
        raise UserError(f"{name}: an official split needs the parts train and test; found: {have}")
    Split(*(tuple(parts.get(part, ())) for part in SPLITS))  # an id in two parts, before thinning
    if "val" not in parts:
        drawn = draw(parts["train"], train, val, 0, seed, f"{name} (train)")
        chosen = {"train": drawn.train, "val": drawn.val}
    else:
        chosen = {
            part: _first(parts[part], wanted, seed, f"{name} ({part})")
            for part, wanted in (("train", train), ("val", val))
        }
    return Split(**chosen, test=_first(parts["test"], test, seed, f"{name} (test)"))


def _first(ids: Sequence[str], wanted: int | None, seed: int, name: str) -> tuple[str, ...]:
    if wanted is not None and wanted > len(ids):
        raise UserError(f"{name} has {len(ids)} examples, but {wanted} are asked for")
    return tuple(seeded_order(ids, seed)[:wanted])


def draw_unlabelled(
    ids: Sequence[str], used: Split, number: int, seed: int, name: str
) -> list[str]:
    """Images that are to be seen without their masks: a smaller number is part of a larger one.

    Args:
        ids: all that may be drawn.
        used: no id of its sets is drawn.
        name: where they are drawn from, for errors.

    Raises:
        UserError: more are asked for than are left.
    """
    taken = set(used.ids)
    left = [id for id in ids if id not in taken]
    if number > len(left):
        raise UserError(
            f"data.unlabelled: {number} images are asked for, and {name} has {len(left)} that no "
            f"split uses; {f'set it to {len(left)} at most' if left else 'make the splits smaller'}"
            ", or name another set by data.unlabelled_from"
        )
    return seeded_order(left, f"{seed}:unlabelled")[:number]


def fingerprint(sets: Mapping[str, Sequence[str]]) -> str:
    """SHA-256 over which id is in which set: not over paths, order, sizes or the machine."""
    digest = hashlib.sha256()
    for name in sorted(sets):
        for line in (f"[{name}]", *sorted(sets[name])):
            digest.update(_bytes(line) + b"\n")
    return digest.hexdigest()


def manifest(
    split: Split,
    *,
    dataset: str,
    how: str,
    seed: int,
    provenance: str,
    out_of_distribution: Mapping[str, Sequence[str]] | None = None,
    unlabelled: Sequence[str] = (),
) -> dict[str, Any]:
    """What ``splits.json`` holds: ids per split, how they were drawn, a hash over the ids.

    Images without masks are a set beside the splits where there are any: the hash covers them, and
    ``labelled_hash`` is what it would be without them.
    """
    others = out_of_distribution or {}
    sets = {**split.as_dict(), **({"unlabelled": unlabelled} if unlabelled else {})}
    return {
        "format": 1,
        "dataset": dataset,
        "provenance": provenance,
        "how": how,
        "split_seed": seed,
        "hash": fingerprint(sets),
        **({"labelled_hash": fingerprint(split.as_dict())} if unlabelled else {}),
        **{name: list(ids) for name, ids in sets.items()},
        "out_of_distribution": {
            name: {"hash": fingerprint({"test": ids}), "test": list(ids)}
            for name, ids in others.items()
        },
    }
