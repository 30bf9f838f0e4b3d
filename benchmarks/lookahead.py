"""What LoAd's machinery costs beside the networks: evaluation, snapshots, label maps.

    python benchmarks/lookahead.py                                  # as configured, on the CPU
    python benchmarks/lookahead.py --device cuda configs/load_voc.yaml

Prints, as medians of alternating repetitions in one process:

- an evaluation on the hold-out against its bare forward passes (the same batches, converted
  beforehand, nothing counted);
- a snapshot and a roll-back, weights and momentum, against one plain copy of the same tensors;
- an update of the generator;
- how much memory the process keeps for itself while ``--gib`` GiB of label maps in files are
  written, read at random and flushed.

The networks have random weights and the data are drawn (sizes count here, not figures), unless the
config's data are there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from turns import take_turns

from mlseg import command_line, config, machine
from mlseg.commands import as_script
from mlseg.engines.lookahead.loop import LookaheadLoop
from mlseg.engines.lookahead.map_buffer import MapBuffer
from mlseg.errors import UserError
from mlseg.problems.systems import parse_run
from mlseg.segmentation.data import to_float

MIB = 2**20


def evaluation(engine: Any, repeats: int) -> dict[str, float]:
    """Seconds of an evaluation and of its forward passes."""
    held, module = engine.hook(LookaheadLoop).hold_out, engine.generator.module
    held.miou(module)  # finds the batch size
    images = to_float(held.samples.images.to(engine.device))
    batches = images.split(held.batch_size)

    @torch.no_grad()
    def bare() -> None:
        module.eval()
        for batch in batches:
            module(batch)

    operations = {"bare": bare, "evaluation": lambda: held.miou(module)}
    return take_turns(operations, repeats, torch.get_num_threads())


def snapshots(engine: Any, repeats: int) -> dict[str, float]:
    """Seconds of a snapshot, of a roll-back, and of one plain copy of as many tensors."""
    engine.generator.step_normal()  # so that there is momentum
    snapshot = engine.hook(LookaheadLoop).snapshots["start"]
    snapshot.take()
    optimizer = engine.generator.optimizer
    live: list[Tensor] = list(engine.generator.module.state_dict().values())
    live += [t for slot in optimizer.state.values() for t in slot.values() if torch.is_tensor(t)]
    copies = [tensor.clone() for tensor in live]

    def plain() -> None:
        for copy, tensor in zip(copies, live, strict=True):
            copy.copy_(tensor)

    with torch.no_grad():
        operations = {"copy": plain, "snapshot": snapshot.take, "roll-back": snapshot.restore}
        return take_turns(operations, repeats, torch.get_num_threads())


def own_memory() -> int:
    """KiB that belong to this process alone; pages of mapped files are not among them (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1])
    raise UserError("--gib: /proc/self/status has no RssAnon; use --gib 0")


def mapped_memory(gib: float, side: int = 513, entries: int = 3) -> tuple[float, float]:
    """GiB of label maps, and MiB of own memory that were added while they were worked on."""
    count = int(gib * 2**30 / entries / side**2)
    with tempfile.TemporaryDirectory() as folder:
        buffer = MapBuffer((count, side, side), entries, Path(folder), 0.0)
        assert buffer.mapped
        batch = torch.randint(21, (16, side, side), dtype=torch.uint8)
        before = highest = own_memory()
        generator = torch.Generator().manual_seed(0)
        for entry in range(entries + 1):  # the last after a flush
            if entry == entries:
                buffer.flush([0])
            position = len(buffer)
            buffer.open(f"g{entry}", position)
            for start in range(0, count - 15, 16):
                buffer.write(position, start, batch)
            for _ in range(50):
                images = torch.randint(count, (16,), generator=generator)
                which = torch.randint(len(buffer), (16,), generator=generator)
                buffer.gather(which, images)
                highest = max(highest, own_memory())
            buffer.collect()
        return entries * count * side**2 / 2**30, (highest - before) / 1024


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", default="configs/load_camvid_small.yaml")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--gib", type=float, default=2.0, help="of label maps; 0: leave that out")
    arguments = command_line.parse(parser, argv)
    try:
        tree = config.load(arguments.config, [*arguments.overrides, f"device={arguments.device}"])
        settings, build = parse_run(tree)
        engine = build(settings, None)
        device = engine.device
        print(machine.head(machine.describe(device)))
        print(f"- config: {arguments.config} {' '.join(arguments.overrides)}")
        held = engine.hook(LookaheadLoop).hold_out
        engine.train()
        found = evaluation(engine, arguments.repeats)
        size = "x".join(map(str, held.samples.image_size))
        print(f"- hold-out: {len(held)} images of {size}, {held.batch_size} at once")
        ratio = found["evaluation"] / found["bare"]
        print(
            f"- evaluation: {1e3 * found['evaluation']:.1f} ms, {ratio:.3f} of its forward passes"
        )
        found = snapshots(engine, 4 * arguments.repeats)
        for name in ("snapshot", "roll-back"):
            share = found[name] / found["copy"]
            print(f"- {name}: {1e3 * found[name]:.2f} ms, {share:.3f} of a plain copy")
        step = {"update": lambda: engine.generator.step_normal()}
        found = take_turns(step, arguments.repeats, torch.get_num_threads())
        print(f"- update: {1e3 * found['update']:.1f} ms")
        if arguments.gib:
            gib, added = mapped_memory(arguments.gib)
            print(f"- {gib:.2f} GiB of label maps in files: {added:.0f} MiB of own memory")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(as_script(main))
