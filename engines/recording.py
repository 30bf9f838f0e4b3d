"""What a run leaves behind: figures, events, curves and pictures in its directory."""

from __future__ import annotations

import io
import json
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, SupportsFloat

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mlseg import parallel
from mlseg.checkpoint import require_form
from mlseg.engines.progress import Progress
from mlseg.engines.several import mean_figures
from mlseg.errors import UserError
from mlseg.files import replacing, writing
from mlseg.machine import peak_memory

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from mlseg.engines.engine import Engine
    from mlseg.engines.settings import EngineSettings

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
TIMES = "times.jsonl"
"""What steps took, and the memory at its most: of the machine, not of the run's course."""


class Recorder:
    """Writes ``metrics.jsonl``, ``events.jsonl``, ``tensorboard/``, ``samples/``; shows progress.

    Tensors that are handed to :meth:`log` are read in one transfer per device. The position in both
    files is part of a checkpoint; a resumed run cuts off what an interrupted one wrote after it, so
    that the files read as if nothing had happened.

    Args:
        directory: the run directory, or None to write nothing, as in all processes but the first.
        settings: the engine's.
        quiet: no progress display.
    """

    def __init__(self, directory: Path | None, settings: EngineSettings, quiet: bool) -> None:
        self.directory = directory
        self.settings = settings
        self.progress = Progress(quiet)
        self._files: dict[str, IO[str]] = {}
        self._curves: SummaryWriter | None = None
        self._offsets: dict[str, int] = {METRICS: 0, EVENTS: 0}
        self._resumed_at = 0
        self._diverged: set[str] = set()
        self._device = torch.device("cpu")
        self._timed: tuple[int, float] = (0, 0.0)

    @contextmanager
    def opened(self, engine: Engine) -> Iterator[None]:
        """Open the files and the display for the length of a run."""
        with _one_report_of_a_failure():
            if self.directory is not None:
                self._open()
            self._device = torch.device(engine.device)
            self._timed = (engine.global_step, time.monotonic())
            self.progress.start(engine)
            try:
                yield
            finally:
                self.progress.stop()
                self._close()

    def _open(self) -> None:
        assert self.directory is not None
        with writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            for name, offset in self._offsets.items():
                path = self.directory / name
                path.touch()
                os.truncate(path, _end_of_lines(path, offset))
                self._files[name] = path.open("a", encoding="utf-8")
            path = self.directory / TIMES
            if path.exists():
                _keep_up_to(path, self._resumed_at)
            self._files[TIMES] = path.open("a", encoding="utf-8")
        if self.settings.tensorboard:
            # Here, since it is slow to import.
            from torch.utils.tensorboard import SummaryWriter

            from mlseg.engines.curves import cut_off

            folder = self.directory / "tensorboard"
            with writing(folder):
                cut_off(folder, self._resumed_at)
                self._curves = SummaryWriter(str(folder))

    def _close(self) -> None:
        if self.directory is None:
            return
        files, curves = self._files, self._curves
        self._files, self._curves = {}, None
        with writing(self.directory), ExitStack() as closing:
            if curves is not None:
                closing.callback(curves.close)
            for file in files.values():
                closing.callback(file.close)
        for name in self._offsets:
            if name in files:
                self._offsets[name] = self._path(name).stat().st_size

    # ------------------------------------------------------------------- entries

    def log(
        self, step: int, figures: Mapping[str, Mapping[str, Any]], rates: Mapping[str, float]
    ) -> Mapping[str, Mapping[str, float]]:
        """Write a line per problem; the one place where training waits for the device.

        Returns:
            the figures, read.
        """
        read = read_scalars({(p, k): v for p, group in figures.items() for k, v in group.items()})
        values = mean_figures(read)
        lines: dict[str, dict[str, float]] = {}
        for (problem, key), value in values.items():
            lines.setdefault(problem, {})[str(key)] = value
        for problem, line in lines.items():
            self._warn_of_divergence(step, problem, line)
            if problem in rates:
                line["learning_rate"] = rates[problem]
            self._write(METRICS, {"step": step, "problem": problem}, line)
            self._curve(problem, line, step)
        self._time(step)
        self.progress.update(step, {p: line["loss"] for p, line in lines.items() if "loss" in line})
        return lines

    def _time(self, step: int) -> None:
        """Note what the steps since the last time took; host and device have just synchronised."""
        before, at = self._timed
        now = time.monotonic()
        if step <= before:
            return
        self._timed = (step, now)
        seconds = round((now - at) / (step - before), 6)
        mib = round(peak_memory(self._device) / 2**20, 1)
        self._write(TIMES, {"step": step}, {"seconds_per_step": seconds, "peak_memory_mib": mib})

    def _warn_of_divergence(self, step: int, problem: str, line: Mapping[str, float]) -> None:
        """Say of each hop once that its method's series or iteration has diverged."""
        for key, value in line.items():
            name = f"{problem}/{key}"
            if key.endswith("_diverged") and value > 0.0 and self.is_new(name):
                level = key.removeprefix("hypergradient/").removesuffix("_diverged")
                self.event("hypergradient_diverged", step, problem=problem, level=level)

    def is_new(self, name: str) -> bool:
        """Whether this is asked for the first time in this run; for what is said once."""
        new = name not in self._diverged
        self._diverged.add(name)
        return new

    def validation(self, step: int, figures: Mapping[str, float]) -> None:
        """A validation's figures, as a line, as an event and as curves."""
        self._write(METRICS, {"step": step, "problem": "validation"}, figures)
        self.event("validation", step, **figures)
        self._curve("validation", figures, step)
        self.progress.validated(step, figures)

    def event(self, kind: str, step: int, /, **values: Any) -> None:
        """Something that the engine decided."""
        self._write(EVENTS, {"event": kind, "step": step}, values)
        if parallel.is_first():
            self.progress.event(kind, step, values)

    def picture(self, name: str, step: int, image_HWC: np.ndarray) -> None:
        """Write ``samples/<name>_<step>.png`` and show it in TensorBoard.

        Args:
            image_HWC: uint8, (H, W, 3).
        """
        if self.directory is None:
            return
        folder = self.directory / "samples"
        encoded = io.BytesIO()
        Image.fromarray(image_HWC).save(encoded, "png")
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}_{step:06d}.png").write_bytes(encoded.getvalue())
        if self._curves is not None:
            from mlseg.engines.curves import picture

            with writing(self.directory / "tensorboard"):
                writer: Any = self._curves.file_writer  # None once it is closed
                writer.add_summary(picture(name, encoded.getvalue(), image_HWC.shape), step)

    def flush(self) -> None:
        """Bring everything written so far to the file system."""
        for name, file in self._files.items():
            with writing(self._path(name)):
                file.flush()
        if self._curves is not None:
            with writing(self._path("tensorboard")):
                self._curves.flush()

    def _write(self, name: str, place: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """A line; a figure that is named like a part of its place gets an underscore behind it."""
        file = self._files.get(name)
        if file is None:
            return
        entry = {**place, **{f"{k}_" if k in place else str(k): v for k, v in values.items()}}
        with writing(self._path(name)):
            file.write(json.dumps({k: _json(v) for k, v in entry.items()}) + "\n")
            if name == EVENTS:
                file.flush()

    def _curve(self, tag: str, figures: Mapping[str, float], step: int) -> None:
        if self._curves is not None:
            with writing(self._path("tensorboard")):
                for key, value in figures.items():
                    self._curves.add_scalar(f"{tag}/{key}", value, step)

    def _path(self, name: str) -> Path:
        assert self.directory is not None
        return self.directory / name

    # --------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Where the files end, and when."""
        for name, file in self._files.items():
            file.flush()
            if name in self._offsets:
                self._offsets[name] = file.tell()
        diverged = sorted(self._diverged)
        return {"offsets": dict(self._offsets), "step": self.progress.step, "diverged": diverged}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on writing where :meth:`state_dict` was taken.

        Raises:
            UserError: it names files that no recorder has, or no place in them.
        """
        offsets = dict(state["offsets"])
        # Data from a file, which may not say what else is cut off where.
        for name, offset in offsets.items():
            if name not in self._offsets or not isinstance(offset, int) or offset < 0:
                raise UserError(
                    f"the checkpoint's records.offsets has {str(name)[:80]!r}: {str(offset)[:20]}, "
                    f"which no run writes ({METRICS} and {EVENTS}, 0 or more); start the run again"
                )
        require_form(0, state["step"], "step")
        if not all(isinstance(name, str) for name in state["diverged"]):
            raise ValueError("diverged holds what is no name")
        self._offsets |= offsets
        self._resumed_at = state["step"]
        self._diverged = set(state["diverged"])


@contextmanager
def _one_report_of_a_failure() -> Iterator[None]:
    """Within this block TensorBoard's thread doesn't print the error that it hands on as well."""
    former = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        if not type(failure.thread).__module__.startswith("tensorboard."):
            former(failure)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = former


def _end_of_lines(path: Path, offset: int) -> int:
    """Where the last whole line ends at or before ``offset``: a power cut may have lost a part."""
    with path.open("rb") as file:
        end = min(offset, file.seek(0, os.SEEK_END))
        while end > 0:
            start = max(0, end - 2**16)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def _keep_up_to(path: Path, step: int) -> None:
    """Cut off the lines after a step, and what is none: times are no part of a run's state."""
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    with replacing(path) as temporary:
        temporary.write_bytes(b"".join(line + b"\n" for line in kept))


def _json(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_scalars(values: Mapping[Any, Any]) -> dict[Any, float]:
    """All scalars as Python floats, with one transfer per device.

    Args:
        values: numbers (anything that makes a float, such as a stretch of time that is over), and
            tensors of one element; what is neither is left out.
    """
    tensors = {k: v.detach() for k, v in values.items() if isinstance(v, Tensor) and v.numel() == 1}
    result = {
        k: float(v)
        for k, v in values.items()
        if isinstance(v, SupportsFloat) and getattr(v, "size", 1) == 1 and not isinstance(v, Tensor)
    }
    for device in {t.device for t in tensors.values()}:
        keys = [k for k, t in tensors.items() if t.device == device]
        stacked = torch.stack([tensors[k].reshape(()).to(torch.float64) for k in keys])
        result.update(zip(keys, stacked.tolist(), strict=True))
    return {k: result[k] for k in values if k in result}
