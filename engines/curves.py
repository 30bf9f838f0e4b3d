"""TensorBoard's files of a run that goes on: each step once, in order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from mlseg.files import replacing

KEPT = "events.out.tfevents.0000000000.kept"
"""TensorBoard reads files in the order of their names, which are those of seconds on some clock."""


def picture(tag: str, png: bytes, shape: tuple[int, ...]) -> Summary:
    """What ``SummaryWriter.add_image`` writes, of a picture that is encoded already.

    Args:
        shape: (H, W, C).
    """
    height, width, channels = shape
    image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=png)
    return Summary(value=[Summary.Value(tag=tag, image=image)])


def cut_off(folder: Path, step: int) -> None:
    """Leave only what was written up to a step, in one file that is read before all later ones.

    TensorBoard's own way, ``purge_step``, relies on clocks, and knows nothing of a run that starts
    anew in its folder.

    Args:
        folder: of event files; may be missing.
        step: 0 removes all.

    Raises:
        OSError: it can't be written.
    """
    files = sorted(file for file in folder.glob("*tfevents*") if file.name[0] != ".")
    if not files:
        return
    kept = folder / KEPT
    if step > 0:
        with replacing(kept) as temporary, temporary.open("wb") as file:
            writer = RecordWriter(file)
            for event in _up_to(step, files):
                writer.write(event.SerializeToString())
    for path in files:
        if path != kept or step <= 0:
            path.unlink()


def _up_to(step: int, files: list[Path]) -> Iterator[Event]:
    """The files' events, of each tag and step one; a cut record ends its file."""
    yield Event(file_version="brain.Event:2")
    seen: set[tuple[str, int]] = set()
    for path in files:
        for event in LegacyEventFileLoader(str(path)).Load():
            if event.step > step:
                continue
            if not event.summary.value:
                continue  # the file's own head
            new = [v for v in event.summary.value if (v.tag, event.step) not in seen]
            seen.update((value.tag, event.step) for value in new)
            if len(new) == len(event.summary.value):
                yield event
            elif new:
                yield Event(wall_time=event.wall_time, step=event.step, summary={"value": new})
