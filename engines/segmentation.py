"""The engine of a program that trains a segmentor: scores, pictures, final results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from torch import Tensor, nn

from mlseg import checkpoint
from mlseg.engines.engine import Engine
from mlseg.engines.settings import EngineSettings
from mlseg.engines.snapshot import Snapshot
from mlseg.errors import UserError, one_line
from mlseg.files import write_json
from mlseg.machine import choose_device
from mlseg.multilevel.problem import Problem
from mlseg.segmentation.data import Samples, SegmentationData, to_float
from mlseg.segmentation.metrics import SCORES, SegmentationMetrics
from mlseg.segmentation.nets import SegmentorSettings, class_probabilities, decide
from mlseg.segmentation.pictures import comparison
from mlseg.segmentation.scoring import evaluating, predict_logits, score

SPLITS = "splits.json"


def require_validation(data: SegmentationData) -> None:
    """Raise UserError for data without a validation split."""
    if len(data.val) == 0:
        raise UserError("data.val: 0 examples; validation chooses the weights, give at least 1")


class SegmentationEngine(Engine):
    """Validates, illustrates and scores the segmentor that its problems train.

    Checkpoints describe the segmentor: ``mlseg.evaluate`` and ``mlseg.predict`` need nothing but
    ``best.pt``.

    Args:
        problems, config, stages: as for :class:`Engine`.
        segmentor: the problem whose module is validated.
        architecture: the settings that the module was built from.
        data: its splits.
        threshold: of the foreground's probability, for two classes.
        window: (H, W) of what the segmentor is trained on; None: whole images.
        summaries: each gives something to print after the final scores.
        on_finish: each writes something more into the run directory at the end.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        config: EngineSettings,
        *,
        segmentor: Problem,
        architecture: SegmentorSettings,
        data: SegmentationData,
        threshold: float = 0.5,
        window: tuple[int, int] | None = None,
        device: str | torch.device = "auto",
        summaries: Sequence[Callable[[], RenderableType]] = (),
        on_finish: Sequence[Callable[[], None]] = (),
        **options: Any,
    ) -> None:
        require_validation(data)
        self.data = data
        self.segmentor_problem = segmentor
        self.threshold = threshold
        self.window = window
        self.summaries = list(summaries)
        self.on_finish = list(on_finish)
        if config.metric is None:
            config = config.model_copy(update={"metric": data.spec.metric})
        spec = data.spec
        description = {
            **architecture.describe(),
            "in_channels": spec.channels,
            "num_classes": spec.num_classes,
            "image_size": list(data.val.images.shape[-2:]),
            "fit": data.val.fit,
            "classes": list(spec.classes),
            "ignore_index": spec.ignore_index,
            "palette": [list(colour) for colour in spec.palette],
            "metric": spec.metric,
            "problem": segmentor.name,
            "precision": segmentor.precision,
            "threshold": threshold,
            "window": None if window is None else list(window),
            "scoring": config.scoring,
        }
        super().__init__(
            problems,
            config,
            device=choose_device(device),
            meta={"segmentor": description, "data": data.spec.name, "provenance": data.provenance},
            **options,
        )
        self.on_validation.append(self._illustrate)

    @property
    def segmentor_module(self) -> nn.Module:
        """The network under training."""
        return self.segmentor_problem.module

    def validation(self) -> dict[str, float]:
        """Scores on the validation split, the headline metric first."""
        with evaluating(self.segmentor_module):
            figures = score(
                self._predict, self.data.val, self.device, threshold=self.threshold
            ).compute()
        names = [self.settings.metric or SCORES[0], *SCORES, "pooled_jaccard"]
        return {name: figures[name] for name in dict.fromkeys(names)}

    def _predict(self, image_BCHW: Tensor) -> Tensor:
        autocast = self.segmentor_problem.precision == "bf16"
        module = self.segmentor_module
        return class_probabilities(
            module, predict_logits(module, image_BCHW, self.window, autocast)
        )

    def _score_splits(self) -> dict[str, dict[str, float]]:
        """All figures of every split by the present weights."""
        return {name: metrics.compute() for name, metrics in self._count_splits().items()}

    def _count_splits(self) -> dict[str, SegmentationMetrics]:
        """Every split by the present weights, at the size that the config says."""
        native = self.settings.scoring == "native"
        with evaluating(self.segmentor_module):
            return {
                name: score(
                    self._predict,
                    samples,
                    self.device,
                    threshold=self.threshold,
                    native=native,
                    distances=True,
                )
                for name, samples in self.splits().items()
            }

    @torch.no_grad()
    def _illustrate(self, figures: Mapping[str, float]) -> None:
        count = min(self.settings.samples, len(self.data.val))
        if count == 0 or self.recorder.directory is None:
            return
        images = self.data.val.images[:count]
        with evaluating(self.segmentor_module):
            found = self._predict(to_float(images.to(self.device)))
        labels = decide(found, self.threshold).to("cpu", torch.uint8)
        picture = comparison(images, self.data.val.masks[:count], labels, self.data.spec)
        self.recorder.picture("validation", self.global_step, picture)

    def best_state_dict(self) -> dict[str, Any]:
        """What predicting needs: the segmentor and its description."""
        state = super().best_state_dict()
        name = self.segmentor_problem.name
        return {**state, "problems": {name: state["problems"][name]}}

    # ------------------------------------------------------------------ the end

    def splits(self) -> dict[str, Samples]:
        """Everything that can be scored: val, test (if any) and the sets of other distribution."""
        named = {"val": self.data.val, "test": self.data.test, **self.data.out_of_distribution}
        return {name: samples for name, samples in named.items() if len(samples)}

    def results(self) -> dict[str, Any]:
        """Final scores of the last and of the selected weights on every split.

        The selected weights are those of ``best.pt``, chosen on validation data alone.
        """
        scores = {"last": self._score_splits()}
        with self.weights("best") as found:
            if found:
                scores["best"] = self._score_splits()
        for write in self.on_finish:
            write()
        return self._report(scores)

    @contextmanager
    def weights(self, name: str) -> Iterator[bool]:
        """Within this block the segmentor has the weights of a checkpoint, if there is such a file.

        Args:
            name: of the checkpoint, such as ``best``.

        Yields:
            whether there is.
        """
        module = self.segmentor_module
        if self.recorder.directory is None or not self._checkpoint(name).exists():
            yield False
            return
        kept = Snapshot(module)
        kept.take()
        state = checkpoint.load(self._checkpoint(name))
        try:
            module.load_state_dict(state["problems"][self.segmentor_problem.name]["module"])
            yield True
        finally:
            kept.restore()

    def _report(self, scores: Mapping[str, Any]) -> dict[str, Any]:
        """What every such run reports, around its scores."""
        return {
            **super().results(),
            "metric": self.settings.metric,
            "scored_at": self.settings.scoring,
            "scores": dict(scores),
            "data": self.data.spec.name,
            "provenance": self.data.provenance,
            "split_hash": self.data.manifest["hash"],
        }

    def write_splits(self, directory: Path) -> None:
        """Write ``splits.json``: ids per split, seed, hash."""
        write_json(directory / SPLITS, self.data.manifest)


def check_same_data(run: Path, data: SegmentationData) -> None:
    """Check that ``data`` are split as those of a run were.

    Otherwise examples that the run was trained on could be tested on; or, where the real data are
    gone, a stand-in would silently take their place.

    Raises:
        UserError: they aren't, or the run has no (readable) ``splits.json``.
    """
    path = run / SPLITS
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["hash"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: can't be read ({one_line(error)})") from None
    now = data.manifest["hash"]
    if before != now:
        raise UserError(
            f"{path}: the data are not those of the run ({data.spec.name}, {data.provenance}; "
            f"split hash {now[:12]}, was {before[:12]}); check data.root and $MLSEG_DATA"
        )
