"""Hooks of a run that trains a segmentor: scores, pictures, final results."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlseg import checkpoint
from mlseg.engines import evaluation
from mlseg.engines.engine import Engine
from mlseg.engines.hooks import Hooks
from mlseg.engines.snapshot import Snapshot
from mlseg.errors import UserError, one_line, unharmed
from mlseg.files import write_json
from mlseg.multilevel.problem import Problem
from mlseg.segmentation.data import Samples, SegmentationData, to_float
from mlseg.segmentation.metrics import SCORES, SegmentationMetrics
from mlseg.segmentation.nets import SegmentorSettings, class_probabilities, decide
from mlseg.segmentation.pictures import comparison
from mlseg.segmentation.reliability import Reliability
from mlseg.segmentation.scoring import evaluating, predict_logits, score

SPLITS = "splits.json"


def require_validation(data: SegmentationData) -> None:
    """Raise UserError for data without a validation split."""
    if len(data.val) == 0:
        raise UserError("data.val: 0 examples; validation chooses the weights, give at least 1")


class Segmentation(Hooks):
    """Validates, illustrates and scores the segmentor that an engine's problems train.

    Checkpoints describe the segmentor: ``mlseg.evaluate`` and ``mlseg.predict`` need nothing but
    ``best.pt``.

    Args:
        segmentor: the problem whose module is validated.
        architecture: the settings that the module was built from.
        data: its splits; validation needs an example.
        threshold: of the foreground's probability, for two classes.
        window: (H, W) of what the segmentor is trained on; None: whole images.
        scored: names of the weights that are scored at the end: ``last`` are those that training
            ended with, any other name is that of a checkpoint, if there is one.
        parts: of a split, scored by themselves at the end: name of the part, the split, its ids.
    """

    def __init__(
        self,
        segmentor: Problem,
        architecture: SegmentorSettings,
        data: SegmentationData,
        *,
        threshold: float = 0.5,
        window: tuple[int, int] | None = None,
        scored: Sequence[str] = ("last", "best"),
        parts: Mapping[str, tuple[str, Collection[str]]] | None = None,
    ) -> None:
        require_validation(data)
        self.problem = segmentor
        self.architecture = architecture
        self.data = data
        self.threshold = threshold
        self.window = window
        self.scored = scored
        self.checkpoints = [name for name in scored if name != "last"]
        self.parts = parts or {}
        self.metric = data.spec.metric
        self.notice = data.notice
        self.counted = "at {}x{}".format(*data.val.image_size)
        self._resumed = False
        self.counts: dict[str, dict[str, SegmentationMetrics]] = {}
        """What the final scores were computed from: by weights and split."""
        self._reliability: dict[str, dict[str, Reliability]] = {}
        self._pictures: dict[str, Any] = {}

    def description(self, engine: Engine) -> dict[str, Any]:
        """The segmentor, such that it can be built again."""
        spec = self.data.spec
        segmentor = {
            **self.architecture.describe(),
            "in_channels": spec.channels,
            "num_classes": spec.num_classes,
            "image_size": list(self.data.val.images.shape[-2:]),
            "fit": self.data.val.fit,
            "classes": list(spec.classes),
            "ignore_index": spec.ignore_index,
            "palette": [list(colour) for colour in spec.palette],
            "metric": spec.metric,
            "problem": self.problem.name,
            "precision": self.problem.precision,
            "threshold": self.threshold,
            "window": None if self.window is None else list(self.window),
            "scoring": engine.settings.scoring,
        }
        return {"segmentor": segmentor, "data": spec.name, "provenance": self.data.provenance}

    def resume(self, engine: Engine, directory: Path) -> None:
        """Refuse data that are not the run's: split in another way, or of other contents."""
        check_same_data(directory, self.data)
        self._resumed = True

    def start(self, engine: Engine) -> None:
        """Write ``splits.json``: ids per split, seed, hash, digests of the files."""
        if engine.recorder.directory is not None and not self._resumed:
            path = engine.recorder.directory / SPLITS
            write_json(path, {**self.data.manifest, "contents": self.data.contents()})

    # ---------------------------------------------------------------------- validation

    def validate(self, engine: Engine) -> dict[str, float]:
        """Scores on the validation split, the headline metric first."""
        with evaluating(self.problem.module):
            figures = score(
                self.predict, self.data.val, engine.device, threshold=self.threshold
            ).compute()
        names = [engine.metric or SCORES[0], *SCORES, "pooled_jaccard"]
        return {name: figures[name] for name in dict.fromkeys(names) if name in figures}

    def predict(self, image_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) images in [-1, 1] to (B, K, H, W) class probabilities."""
        module, autocast = self.problem.module, self.problem.precision == "bf16"
        return class_probabilities(
            module, predict_logits(module, image_BCHW, self.window, autocast)
        )

    @torch.no_grad()
    def validated(self, engine: Engine, figures: Mapping[str, float]) -> None:
        """A picture of images, truth and prediction."""
        count = min(engine.settings.samples, len(self.data.val))
        if count == 0 or engine.recorder.directory is None:
            return
        spec, ids = self.data.spec, self.data.val.ids[:count]
        images, masks = self.data.val.images[:count], self.data.val.masks[:count]
        with evaluating(self.problem.module):
            found = self.predict(to_float(images.to(engine.device)))
        labels = decide(found, self.threshold).to("cpu", torch.uint8)
        metrics = SegmentationMetrics(spec.num_classes, spec.ignore_index, spec.classes)
        metrics.update(labels, masks, ids)
        scores = metrics.per_image()
        words = [f"{name}   {spec.metric} {scores[name][spec.metric]:.3f}" for name in ids]
        picture = comparison(images, masks, labels, spec, words, found)
        engine.recorder.picture("validation", engine.global_step, picture)

    def best_state(self, engine: Engine, state: dict[str, Any]) -> dict[str, Any]:
        """What predicting needs: the segmentor and its description."""
        return {**state, "problems": {self.problem.name: state["problems"][self.problem.name]}}

    # ------------------------------------------------------------------------- the end

    def splits(self) -> dict[str, Samples]:
        """Everything that can be scored: val, test (if any) and the sets of other distribution."""
        named = {"val": self.data.val, "test": self.data.test, **self.data.out_of_distribution}
        return {name: samples for name, samples in named.items() if len(samples)}

    def results(self, engine: Engine, report: Mapping[str, Any]) -> dict[str, Any]:
        """Scores of the wanted weights on every split, and where the data come from.

        The weights of ``best.pt`` were chosen on validation data alone.
        """
        lost = {}
        for name in self.scored:
            if name == "last":
                self._count(engine, name)
                continue
            try:
                with self.weights(engine, name) as found:
                    if found:
                        self._count(engine, name)
                    elif engine.best is not None and engine.directory is not None:
                        lost[name] = f"{engine.checkpoint_path(name)}: missing"
            except UserError as error:  # damaged while the run went on
                lost[name] = str(error)
        intervals = self._write_evaluation(engine)
        return {
            "metric": engine.metric,
            "scored_at": engine.settings.scoring,
            "scores": {
                name: {split: metrics.compute() for split, metrics in counts.items()}
                for name, counts in self.counts.items()
            },
            **({"intervals": intervals} if intervals else {}),
            "data": self.data.spec.name,
            "provenance": self.data.provenance,
            "split_hash": self.data.split_hash,
            **({"lost": lost} if lost else {}),
            **({"best": None} if "best" in lost else {}),
        }

    def _count(self, engine: Engine, weights: str) -> None:
        """Every split by the present weights, at the size that the config says."""
        counts: dict[str, SegmentationMetrics] = {}
        self._reliability[weights] = {}
        with evaluating(self.problem.module):
            for name, samples in self.splits().items():
                reliability = Reliability(samples.spec.ignore_index)
                counts[name] = score(
                    self.predict,
                    samples,
                    engine.device,
                    threshold=self.threshold,
                    native=engine.settings.scoring == "native",
                    distances=True,
                    seen=reliability.update,
                )
                reliability.join()
                self._reliability[weights][name] = reliability
            self.counts[weights] = counts | {
                part: counts[split].only(ids) for part, (split, ids) in self.parts.items() if ids
            }
            if weights == self._shown(engine):
                self._draw(engine, weights)

    def _shown(self, engine: Engine) -> str:
        """The weights whose images are shown: the selected ones, where there are any."""
        chosen = engine.directory is not None and "best" in self.scored
        return "best" if chosen and engine.checkpoint_path("best").exists() else "last"

    def _draw(self, engine: Engine, weights: str) -> None:
        """Pictures of the images that went worst and best: of the test split, or of validation."""
        if engine.recorder.directory is None:
            return
        split = "test" if "test" in self.splits() else "val"
        samples = self.splits()[split]
        with unharmed("pictures of its images"):
            scores = self.counts[weights][split].per_image()
            metric = engine.metric if engine.metric in next(iter(scores.values())) else SCORES[0]
            values = {image: own[str(metric)] for image, own in scores.items()}
            made = evaluation.pictures(self.predict, samples, values, engine.device, self.threshold)
            self._pictures = {
                "weights": weights,
                "split": split,
                "metric": metric,
                "heads": evaluation.heads(samples.spec),
                "of": made,
            }

    def _write_evaluation(self, engine: Engine) -> dict[str, Any]:
        """``evaluation.json``: what the page of a run shows of its images.

        Returns:
            its intervals, by weights and split.
        """
        found: dict[str, Any] = {}
        if engine.recorder.directory is None:
            return found
        with unharmed(evaluation.EVALUATION):
            for weights, counts in self.counts.items():
                found[weights] = {
                    split: evaluation.figures(metrics, self._reliability[weights].get(split))
                    for split, metrics in counts.items()
                }
            spec = self.data.spec
            evaluation.write(
                engine.recorder.directory,
                {
                    "metric": engine.metric,
                    "scored_at": engine.settings.scoring,
                    "palette": [list(shade) for shade in spec.palette],
                    "scores": found,
                    "pictures": self._pictures,
                },
            )
        return {
            weights: {split: own["intervals"] for split, own in splits.items()}
            for weights, splits in found.items()
        }

    @contextmanager
    def weights(self, engine: Engine, name: str) -> Iterator[bool]:
        """Within this block the segmentor has the weights of a checkpoint, if there is such a file.

        Args:
            name: of the checkpoint, such as ``best``.

        Yields:
            whether there is.

        Raises:
            UserError: it is damaged, or of another step than the run's best.
        """
        module = self.problem.module
        if engine.directory is None or not engine.checkpoint_path(name).exists():
            yield False
            return
        path = engine.checkpoint_path(name)
        state = checkpoint.load(path)
        kept = Snapshot(module)
        kept.take()
        try:
            with checkpoint.taking(f"{path}: its segmentor", "put the file back"):
                if name == "best" and engine.best is not None:
                    step = state["engine"]["global_step"]
                    if step != engine.best["step"]:
                        raise ValueError(f"of step {step}, the best is of {engine.best['step']}")
                checkpoint.load_module(module, state["problems"][self.problem.name]["module"])
            yield True
        finally:
            kept.restore()


def check_same_data(run: Path, data: SegmentationData) -> None:
    """Check that ``data`` are those of a run: split as they were, of the contents that they had.

    Otherwise examples that the run was trained on could be tested on; or, where the real data are
    gone, a stand-in would silently take their place. Where the files lie, and when they were
    written, doesn't matter.

    Raises:
        UserError: they aren't, or the run has no (readable) ``splits.json``.
    """
    path = run / SPLITS
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        before, contents = stored["hash"], stored.get("contents")  # older runs have no contents
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: can't be read ({one_line(error)})") from None
    now = data.manifest["hash"]
    if before != now:
        raise UserError(
            f"{path}: the data are not those of the run ({data.spec.name}, {data.provenance}; "
            f"split hash {now[:12]}, was {str(before)[:12]}); check data.root and $MLSEG_DATA"
        )
    if contents is None:
        return
    try:
        changed = data.changed(contents)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: its contents can't be read ({one_line(error)})") from None
    if changed:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UserError(
            f"{changed[0]}: not what it was when the run {run} began{more}; put the "
            f"{data.spec.name} data back as they were, or start a new run"
        )
