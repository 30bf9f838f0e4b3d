"""Choose the temperature k and the threshold of finished runs on their validation images.

    python -m mlseg.calibrate runs/try
    python -m mlseg.calibrate runs/a runs/b runs/c           the mean of their probabilities
    python -m mlseg.calibrate runs/try --k 0.2 0.3 0.4 --thresholds 0.3 0.4 0.5 --metric dice

A grid search, as SegAN chose k = 0.3 and threshold 0.4 (section 3 of the paper): the logits are
divided by k, the probabilities averaged over the runs, brought to each mask's own size, and cut at
the threshold. The choice is stored in every run's ``calibration.json``, from where evaluate and
predict take it for exactly these weights; the grid is printed, and written beside it as
``calibration_grid*.csv`` and ``.png``, and every run's ``report.html`` says what was chosen. No
test image is looked at. A run that names code from outside mlseg needs ``--trust``.

For one network at its own size k and the threshold t are one number, since a probability above t
is a logit z > k log(t / (1 - t)); what k adds shows when probabilities are averaged or upsampled
first.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mlseg import signals, threads

if __name__ == "__main__":
    threads.bound_spinning()  # before torch is loaded
    signals.end_at_once()

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from mlseg.commands import guarded, make_console, named, print_whole
from mlseg.errors import UserError
from mlseg.evaluate import above_zero, add_trust, choose_threads, own_data, probability
from mlseg.files import replacing, require_writable, write_text, writing
from mlseg.machine import choose_device
from mlseg.reports.keeping import refresh
from mlseg.segmentation import calibration, intervals
from mlseg.segmentation.data import Samples, to_float
from mlseg.segmentation.metrics import SCORES, confusion_by_threshold, image_scores
from mlseg.segmentation.nets import class_probabilities
from mlseg.segmentation.scoring import SCORING_BATCH, at_native, score
from mlseg.segmentation.trained import Ensemble, load_runs

KS = [round(0.1 * step, 1) for step in range(1, 11)]
THRESHOLDS = [round(0.05 * step, 2) for step in range(4, 17)]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    return guarded(_run, parser().parse_args(argv))


def parser() -> argparse.ArgumentParser:
    """Its arguments."""
    made = argparse.ArgumentParser(
        prog="mlseg calibrate", description="Choose k and threshold on validation images."
    )
    made.add_argument("runs", type=named, nargs="+", metavar="RUN", help="run directories")
    made.add_argument("--k", type=above_zero, nargs="+", default=KS, help="0.1 to 1")
    made.add_argument(
        "--thresholds", type=probability, nargs="+", default=THRESHOLDS, help="0.2 to 0.8"
    )
    made.add_argument("--metric", choices=SCORES, help="default: the data set's headline one")
    made.add_argument("--scale", choices=("native", "trained"), help="default: the run's own")
    made.add_argument("--weights", choices=("best", "last"), default="best")
    made.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add_trust(made)
    threads.add_flag(made)
    return made


def _run(arguments: argparse.Namespace) -> int:
    for run in arguments.runs:
        if run.is_file():
            raise UserError(f"{run}: a file of weights; calibrate the run that it was taken from")
    device = choose_device(arguments.device)
    ensemble = load_runs(arguments.runs, device, arguments.weights)
    choose_threads(arguments).use()
    trained = ensemble.first
    if trained.spec.num_classes != 2:
        raise UserError(
            f"{trained.run}: {trained.spec.num_classes} classes; the most probable one is taken, "
            "there is no threshold to choose"
        )
    for run in arguments.runs:
        require_writable(run, "RUN")
    samples = own_data(arguments.runs, trained.config).val
    native = (arguments.scale or trained.scoring) == "native"
    metric = arguments.metric or trained.spec.metric
    ks, thresholds = sorted(set(arguments.k)), sorted(set(arguments.thresholds))
    values, choice, before = chosen(ensemble, samples, device, ks, thresholds, native, metric)
    grid = values.mean(2)
    console = make_console()
    print_whole(console, table(grid, ks, thresholds, choice))
    now = values[ks.index(choice.k), thresholds.index(choice.threshold)].tolist()
    console.print(
        f"k {choice.k:g}, threshold {choice.threshold:g}: {metric} {choice.value:.4f}{_span(now)}; "
        f"with {calibration.describe(ensemble)} it was {choice.before:.4f}{_span(before)}",
        soft_wrap=True,
    )
    for remark in at_the_edge(grid, ks, thresholds, choice):
        console.print(remark)
    number = len(ensemble.members)
    stem = "calibration_grid" if number == 1 else f"calibration_grid_{number}_runs"
    for member in ensemble.members:
        write_grid(member.run / f"{stem}.csv", grid, ks, thresholds)
        draw(member.run / f"{stem}.png", grid, ks, thresholds, choice)
    for path in calibration.keep(ensemble, choice):
        console.print(f"Stored in {path}")
    for member in ensemble.members:
        refresh(member.run)
    return 0


def chosen(
    ensemble: Ensemble,
    samples: Samples,
    device: torch.device,
    ks: Sequence[float],
    thresholds: Sequence[float],
    native: bool,
    metric: str,
) -> tuple[Tensor, calibration.Choice, list[float]]:
    """The values of :func:`by_image`, the best of their means, and each image's without it."""
    values = by_image(ensemble, samples, device, ks, thresholds, native, metric)
    grid = values.mean(2)
    before = score(ensemble, samples, device, threshold=ensemble.threshold, native=native)
    row, column = best_cell(grid, ks, thresholds)
    choice = calibration.Choice(
        k=ks[row],
        threshold=thresholds[column],
        metric=metric,
        value=float(grid[row, column]),
        before=before.compute()[metric],
        images=len(samples),
        scored_at="native" if native else "trained",
        runs=[member.run.resolve().name for member in ensemble.members],
        checkpoints=calibration.digests(ensemble),
    )
    return values, choice, [own[metric] for own in before.per_image().values()]


@torch.no_grad()
def by_image(
    ensemble: Ensemble,
    samples: Samples,
    device: torch.device,
    ks: Sequence[float],
    thresholds: Sequence[float],
    native: bool,
    metric: str,
) -> Tensor:
    """The metric of each image that has one, for every k and threshold.

    Every image passes every network once; for each k one count of its pixels serves all thresholds.

    Args:
        thresholds: in ascending order.

    Returns:
        (len(ks), len(thresholds), N) float64, on the CPU.

    Raises:
        UserError: there is no validation image.
    """
    if len(samples) == 0:
        raise UserError(f"{ensemble.first.run}: no validation images to calibrate on")
    cuts = torch.tensor(thresholds, device=device)
    counts: list[Tensor] = []
    masks = samples.native_masks() if native else iter(samples.masks)
    for start in range(0, len(samples), SCORING_BATCH):
        span = slice(start, start + SCORING_BATCH)
        image = to_float(samples.images[span].to(device))
        # Each network's logits as they are before its own division.
        logits = [member.logits(image) * member.own_k for member in ensemble.members]
        means = []
        for k in ks:
            found = [
                class_probabilities(member.module, z / k)
                for member, z in zip(ensemble.members, logits, strict=True)
            ]
            means.append(torch.stack(found).mean(0)[:, 1])
        for own in torch.stack(means, 1):  # (len(ks), H, W)
            mask = next(masks).to(device)
            native_size = mask.shape[0], mask.shape[1]
            foreground = at_native(own[None], native_size, samples.fit)[0]
            ignore = samples.spec.ignore_index
            counts.append(
                torch.stack(
                    [confusion_by_threshold(p, mask, cuts, ignore) for p in foreground]
                ).cpu()
            )
    confusion = torch.stack(counts, 2)  # (len(ks), len(thresholds), N, 2, 2)
    scored = confusion[0, 0].sum((1, 2)) > 0
    if not bool(scored.any()):
        raise UserError("no image to score: every pixel has the ignore index")
    confusion = confusion[:, :, scored]
    flat = image_scores(confusion.flatten(0, 2))[metric]
    return flat.reshape(confusion.shape[:3])


def _span(values: Sequence[float]) -> str:
    found = intervals.of_mean(values)
    return "" if found is None else " (95 % over images: {:.3f} to {:.3f})".format(*found)


def best_cell(grid: Tensor, ks: Sequence[float], thresholds: Sequence[float]) -> tuple[int, int]:
    """Row and column of the highest value; of several the largest k, then the nearest to 0.5."""
    cells = [(row, column) for row in range(len(ks)) for column in range(len(thresholds))]
    return max(cells, key=lambda c: (float(grid[c]), ks[c[0]], -abs(thresholds[c[1]] - 0.5)))


def at_the_edge(
    grid: Tensor, ks: Sequence[float], thresholds: Sequence[float], choice: calibration.Choice
) -> list[str]:
    """What to say where the best value of an axis is its first or last: a better may lie beyond.

    Nothing where the value before it serves as well: then there is no slope to follow.
    """
    row, column = ks.index(choice.k), thresholds.index(choice.threshold)
    axes = (
        ("k", "--k", ks, row, grid[:, column].tolist()),
        ("threshold", "--thresholds", thresholds, column, grid[row].tolist()),
    )
    remarks = []
    for name, flag, values, place, scores in axes:
        inner = {0: 1, len(values) - 1: len(values) - 2}.get(place)
        if len(values) < 2 or inner is None or scores[inner] >= scores[place]:
            continue
        end, way = ("lowest", "smaller") if place == 0 else ("highest", "larger")
        remarks.append(
            f"{name} {values[place]:g} is the {end} of the grid: a better one may lie beyond; try "
            f"{way} values with {flag}"
        )
    return remarks


def table(
    grid: Tensor, ks: Sequence[float], thresholds: Sequence[float], choice: calibration.Choice
) -> Table:
    """The grid, the chosen cell in bold."""
    title = f"{choice.metric} of {choice.images} validation images, {choice.scored_at} size"
    made = Table("k", *(f"t {t:g}" for t in thresholds), title=title)
    for k, row in zip(ks, grid.tolist(), strict=True):
        cells = [
            Text(f"{value:.4f}", style="bold" if (k, t) == (choice.k, choice.threshold) else "")
            for t, value in zip(thresholds, row, strict=True)
        ]
        made.add_row(f"{k:g}", *cells)
    return made


def write_grid(path: Path, grid: Tensor, ks: Sequence[float], thresholds: Sequence[float]) -> None:
    """The grid as CSV: a row per k, a column per threshold.

    Raises:
        RunError: it can't be written.
    """
    lines = [",".join(["k", *(f"{t:g}" for t in thresholds)])]
    for k, row in zip(ks, grid.tolist(), strict=True):
        lines.append(",".join([f"{k:g}", *(f"{value:.6f}" for value in row)]))
    write_text(path, "\n".join(lines) + "\n")


def draw(
    path: Path,
    grid: Tensor,
    ks: Sequence[float],
    thresholds: Sequence[float],
    choice: calibration.Choice,
) -> None:
    """The grid as a picture, the chosen cell framed.

    Raises:
        RunError: it can't be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid.numpy(), origin="lower", aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(thresholds)), [f"{t:g}" for t in thresholds])
    axes.set_yticks(range(len(ks)), [f"{k:g}" for k in ks])
    axes.set_xlabel("threshold")
    axes.set_ylabel("k")
    row, column = ks.index(choice.k), thresholds.index(choice.threshold)
    axes.add_patch(
        Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2)
    )
    axes.set_title(
        f"{choice.metric} on {choice.images} validation images: {choice.value:.4f} at "
        f"k {choice.k:g}, threshold {choice.threshold:g}"
    )
    figure.colorbar(image, label=choice.metric)
    with writing(path), replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


if __name__ == "__main__":
    sys.exit(main())
