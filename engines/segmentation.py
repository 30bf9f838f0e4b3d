"""The engine of a program that trains a segmentor: scores, pictures, final results."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from torch import nn

from mlseg import checkpoint
from mlseg.data import Samples, SegmentationData, to_float
from mlseg.engines.base import Engine
from mlseg.engines.pictures import comparison
from mlseg.engines.recording import write_json
from mlseg.engines.settings import EngineSettings, choose_device
from mlseg.errors import UserError
from mlseg.metrics import SCORES, SegmentationMetrics
from mlseg.nets import SegmentorSettings
from mlseg.problems.base import Problem

SCORING_BATCH = 16
SPLITS = "splits.json"


def require_validation(data: SegmentationData) -> None:
    """Raise UserError for data without a validation split."""
    if len(data.val) == 0:
        raise UserError("data.val: 0 examples; validation chooses the weights, give at least 1")


@torch.no_grad()
def score(
    segmentor: nn.Module,
    samples: Samples,
    device: torch.device | str,
    batch_size: int = SCORING_BATCH,
    autocast: bool = False,
) -> SegmentationMetrics:
    """Count a segmentor's predictions over ``samples``, at their size, in evaluation mode.

    Args:
        segmentor: (B, C, H, W) in [-1, 1] to (B, K, H, W) logits; its mode is put back.
        samples: at least one example.
        autocast: run in bfloat16 where that is safe.
    """
    device = torch.device(device)
    spec = samples.spec
    metrics = SegmentationMetrics(spec.num_classes, spec.ignore_index, spec.classes)
    mode = segmentor.training
    segmentor.eval()
    try:
        for start in range(0, len(samples), batch_size):
            span = slice(start, start + batch_size)
            image = to_float(samples.images[span].to(device))
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                logits = segmentor(image)
            metrics.update(logits.argmax(1), samples.masks[span].to(device), samples.ids[span])
    finally:
        segmentor.train(mode)
    return metrics


class SegmentationEngine(Engine):
    """Validates, illustrates and scores the segmentor that its problems train.

    Checkpoints describe the segmentor: ``mlseg.evaluate`` and ``mlseg.predict`` need nothing but
    ``best.pt``.

    Args:
        problems, config, stages: as for :class:`Engine`.
        segmentor: the problem whose module is validated.
        architecture: the settings that the module was built from.
        data: its splits.
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
        device: str | torch.device = "auto",
        summaries: Sequence[Callable[[], RenderableType]] = (),
        on_finish: Sequence[Callable[[], None]] = (),
        **options: Any,
    ) -> None:
        require_validation(data)
        self.data = data
        self.segmentor_problem = segmentor
        self.summaries = list(summaries)
        self.on_finish = list(on_finish)
        if config.metric is None:
            config = config.model_copy(update={"metric": data.spec.metric})
        spec = data.spec
        description = {
            "settings": architecture.model_dump(mode="json", exclude_none=True),
            "in_channels": spec.channels,
            "num_classes": spec.num_classes,
            "image_size": list(data.val.images.shape[-2:]),
            "classes": list(spec.classes),
            "ignore_index": spec.ignore_index,
            "palette": [list(colour) for colour in spec.palette],
            "metric": spec.metric,
            "problem": segmentor.name,
            "precision": segmentor.precision,
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
        figures = self._score(self.data.val)
        names = [self.settings.metric or SCORES[0], *SCORES, "pooled_jaccard"]
        return {name: figures[name] for name in dict.fromkeys(names)}

    def _score(self, samples: Samples) -> dict[str, float]:
        autocast = self.segmentor_problem.precision == "bf16"
        return score(self.segmentor_module, samples, self.device, autocast=autocast).compute()

    @torch.no_grad()
    def _illustrate(self, figures: Mapping[str, float]) -> None:
        count = min(self.settings.samples, len(self.data.val))
        if count == 0 or self.recorder.directory is None:
            return
        images = self.data.val.images[:count]
        module = self.segmentor_module
        module.eval()
        predictions = module(to_float(images.to(self.device))).argmax(1).to("cpu", torch.uint8)
        module.train()
        picture = comparison(images, self.data.val.masks[:count], predictions, self.data.spec)
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
        scores = {"last": {name: self._score(s) for name, s in self.splits().items()}}
        directory = self.recorder.directory
        if directory is not None and (directory / "checkpoints" / "best.pt").exists():
            last = {k: v.clone() for k, v in self.segmentor_module.state_dict().items()}
            state = checkpoint.load(directory / "checkpoints" / "best.pt")
            self.segmentor_module.load_state_dict(
                state["problems"][self.segmentor_problem.name]["module"]
            )
            scores["best"] = {name: self._score(s) for name, s in self.splits().items()}
            self.segmentor_module.load_state_dict(last)
        for write in self.on_finish:
            write()
        return {
            **super().results(),
            "metric": self.settings.metric,
            "scores": scores,
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
        raise UserError(f"{path}: can't be read ({checkpoint.one_line(error)})") from None
    now = data.manifest["hash"]
    if before != now:
        raise UserError(
            f"{path}: the data are not those of the run ({data.spec.name}, {data.provenance}; "
            f"split hash {now[:12]}, was {before[:12]}); check data.root and $MLSEG_DATA"
        )
