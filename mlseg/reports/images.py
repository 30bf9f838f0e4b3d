"""What a page shows of a run's images: how scores spread, the worst and best, calibration."""

from __future__ import annotations

from collections.abc import Mapping

from mlseg.reports.charts import histogram, reliability, swatches
from mlseg.reports.figures import FIRST, headline, of_images, plain
from mlseg.reports.parts import (
    Cell,
    Drawing,
    Fold,
    Grid,
    Headline,
    Image,
    Part,
    Section,
    Table,
    Text,
    cell,
)
from mlseg.reports.pictures import last_validation
from mlseg.reports.reading import Run, at, mapping, number, numbers

_ROWS = 400
"""Images in the table; of more those that went worst and best."""
_MOST_BYTES = 4 * 2**20
"""Of all pictures."""


def image_table(run: Run, prefix: str) -> Section | None:
    """The images: how scores are spread, the worst and the best, a table of all.

    Args:
        prefix: of the places on the page, which others have as well.
    """
    found = headline(run)
    if found is None or not run.evaluation.get("scores"):
        sheet = last_validation(run.recorded.directory)
        return None if sheet is None else Section("Images", [sheet])
    weights, split, metric = found
    own = mapping(at(run.evaluation, "scores", weights, split))
    if not of_images(run, weights, split, metric):
        metric = next((m for m in FIRST if of_images(run, weights, split, m)), metric)
    values = of_images(run, weights, split, metric)
    if not values:
        return None
    sizes = numbers(own.get("size"))
    shares = dict(zip(values, sizes, strict=True)) if len(sizes) == len(values) else {}
    names = [n for n in ("jaccard", "dice", "hd95") if n != metric]
    columns = {name: of_images(run, weights, split, name) for name in names}
    pictures, anchors = _pictures(run, weights, split, values, prefix)
    ranked = sorted(values, key=lambda name: values[name])
    left_out = max(0, len(ranked) - _ROWS)
    if left_out:
        ranked = [*ranked[: _ROWS // 2], *ranked[-_ROWS // 2 :]]
    rows = [
        [
            Cell(name, link=anchors.get(name, "")),
            cell(values[name]),
            *(cell(columns[n].get(name), 2 if n == "hd95" else 4) for n in names),
            *([cell(shares.get(name))] if shares else []),
        ]
        for name in ranked
    ]
    head = ["image", plain(metric), *map(plain, names)]
    head += ["size (share of the image)"] if shares else []
    caption = f"Images of the {split} split, {weights} weights, worst first"
    if left_out:
        caption += f"; {left_out} between the worst and the best {_ROWS // 2} are left out"
    low, high = min(values.values()), max(values.values())
    low, high = (0.0, 1.0) if low >= 0 and high <= 1 else (low, max(high, low + 1e-9))
    title = f"Images by {plain(metric)}"
    drawn = histogram(list(values.values()), title, plain(metric), low, high)
    parts: list[Part] = [Grid([Drawing(title, drawn)]), *pictures]
    return Section("Images", [*parts, Table(caption, head, rows, sortable=True)])


def _pictures(
    run: Run, weights: str, split: str, values: Mapping[str, float], prefix: str
) -> tuple[list[Part], dict[str, str]]:
    """Those of ``evaluation.json``, worst and best, and where on the page each image has one."""
    own = mapping(run.evaluation.get("pictures"))
    made = mapping(own.get("of"))
    if own.get("weights") != weights or own.get("split") != split or not made:
        return [], {}
    shown = own.get("heads")
    heads = ", ".join(map(str, shown)) if isinstance(shown, list) else ""
    ranked = sorted((n for n in made if n in values), key=lambda name: values[name])
    images: dict[str, Image] = {}
    anchors: dict[str, str] = {}
    spent = 0
    for name in ranked:
        data = made[name]
        if not isinstance(data, str) or spent + len(data) > _MOST_BYTES or not _base64(data):
            continue
        spent += len(data)
        anchors[name] = f"{prefix}image-{len(anchors)}"
        title = f"{name}: {values[name]:.4f}"
        uri, about = f"data:image/jpeg;base64,{data}", f"{name}: {heads}"
        images[name] = Image(title, uri, about, anchors[name])
    half = (len(images) + 1) // 2
    several = len(values) > len(images)
    groups = [("Worst", list(images.values())[:half]), ("Best", list(images.values())[half:][::-1])]
    if not several:
        groups = [("All images, worst first", list(images.values()))]
    parts: list[Part] = [Text(f"Each picture, from left to right: {heads}.")] if images else []
    shades = _shades(run, weights, split)
    if images and len(shades) > 2:
        parts.append(Drawing("Classes", swatches(shades)))
    for title, group in groups:
        if group:
            parts += [Text(title), Grid(group)]
    return parts, anchors


def _shades(run: Run, weights: str, split: str) -> dict[str, tuple[int, int, int]]:
    """The colour of each class, where both are known."""
    names = list(mapping(at(run.evaluation, "scores", weights, split, "classes")))
    palette = run.evaluation.get("palette")
    if not isinstance(palette, list) or len(palette) < len(names):
        return {}
    found: dict[str, tuple[int, int, int]] = {}
    for name, shade in zip(names, palette, strict=False):
        if not isinstance(shade, list) or len(shade) != 3:
            return {}
        if not all(type(value) is int and 0 <= value <= 255 for value in shade):
            return {}
        found[name] = (shade[0], shade[1], shade[2])
    return found


def _base64(text: str) -> bool:
    return text.isascii() and all(c.isalnum() or c in "+/=" for c in text)


def calibration(run: Run) -> Section | None:
    """Whether probabilities are what they say."""
    found = headline(run)
    if found is None:
        return None
    weights, split, _ = found
    own = mapping(at(run.evaluation, "scores", weights, split, "reliability"))
    confidence, accuracy = own.get("confidence"), own.get("accuracy")
    pixels, error = numbers(own.get("pixels")), number(own.get("ece"))
    if error is None or not isinstance(confidence, list) or not isinstance(accuracy, list):
        return None
    if not len(confidence) == len(accuracy) == len(pixels):
        return None
    rows = [
        [_bin(place, len(pixels)), cell(count, 0), cell(number(mean)), cell(number(right))]
        for place, (count, mean, right) in enumerate(zip(pixels, confidence, accuracy, strict=True))
        if count
    ]
    drawn = reliability([number(c) for c in confidence], [number(a) for a in accuracy])
    head = ["probability", "pixels", "mean probability", "share that is right"]
    about = f"{weights} weights, {split} split, {len(pixels)} bins"
    said = "On the dashed line probabilities are what they say."
    return Section(
        "Calibration",
        [
            Headline(f"{error:.4f}", "expected calibration error", about),
            Text(said),
            Grid([Drawing("Reliability", drawn)]),
            Fold("Figures", [Table("Pixels by the probability of their class", head, rows)]),
        ],
    )


def _bin(place: int, number_of_bins: int) -> Cell:
    low, high = place / number_of_bins, (place + 1) / number_of_bins
    return Cell(f"{low:.2f} to {high:.2f}", low)
