"""Whether everything holds on a GPU, and how fast: one command of under nine minutes.

    make gpu                                    # python benchmarks/gpu.py --out gpu
    python benchmarks/gpu.py --compiled         # E2EAug with `compile`, and with CUDA graphs, alone
    python benchmarks/gpu.py --toy --out gpu    # on the CPU, as small as it goes: does it run?

Each section is a command of its own, which can be given by hand as well; it has a bound in seconds,
and all together have ``--seconds``. What wouldn't end in time is stopped and counts as missing,
never as passed. The sections:

* the tests that need a GPU;
* how many kernels E2EAug launches, and how long they keep the GPU busy;
* an iteration of E2EAug and of SegAN by part, at the papers' scale: in full precision without and
  with TF32, in bf16, at the papers' batch and a larger one, with peak memory; E2EAug's beside the
  same passes in a loop by hand;
* LoAd at the scale of VOC: an update, an evaluation and a roll-back;
* the user's unrolled steps, T = 1, 5, 20, and one hop of every kind, on a U-Net of 31 M parameters,
  beside Betty, higher and TorchOpt, with memory;
* a Hessian-vector product in units of a forward and backward pass;
* the cells of E2EAug's search, merged and not.

Real images are read where MLSEG_DATA names them, else their stand-ins are drawn: figures don't
depend on it. ``report.md`` and ``report.json`` lie in ``--out``, beside what each section printed.
Exit code 1 where a section failed or is missing. It runs from a checkout without git and network,
with what is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mlseg import machine
from mlseg.commands import as_script

ROOT = Path(__file__).resolve().parent.parent
STRICT, TF32 = {"NVIDIA_TF32_OVERRIDE": "0"}, {"NVIDIA_TF32_OVERRIDE": "1"}
"""Whether matrix products and convolutions in float32 round to TF32."""


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        name: its heading, and its file's name.
        command: without the interpreter.
        seconds: that it may take.
        environment: on top of the present one.
    """

    name: str
    command: Sequence[str]
    seconds: int
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """What came of a section: ``passed``, ``failed``, ``out of time`` or ``not begun``."""

    name: str
    outcome: str
    seconds: float
    command: str
    environment: Mapping[str, str]
    note: str = ""


def at_scale(device: str) -> list[Section]:
    """The sections at the papers' scale; the most important first."""
    there = ["--device", device]
    e2eaug = ["benchmarks/iteration.py", "configs/e2eaug_isic.yaml", *there]
    few, images = ["--iterations", "10"], ["data.out_of_distribution=[]", "data.test=8"]
    segan = ["benchmarks/iteration.py", "configs/segan_isic.yaml", *there, *few]
    large = [
        f"problems.{level}.batch_size=8" for level in ("generator", "segmentor", "architecture")
    ]
    unrolled = ["benchmarks/hypergradients.py", *there, "--size", "large", "--rounds", "3"]
    unrolled += ["--entries", "class weights", "--optimizers", "sgd", "--parts", "unrolled"]
    load = ["benchmarks/lookahead.py", *there, "configs/load_voc.yaml", "--repeats", "5"]
    engine = ["benchmarks/engine_overhead.py", *there, "--cases", "e2eaug", "--iterations", "24"]
    engine += ["--blocks", "4", "data.image_size=256", "segmentor.channels=64"]
    engine += ["segmentor.levels=4", "generator.channels=64", "generator.levels=8"]
    engine += ["discriminator.channels=64", "discriminator.layers=3"]
    engine += ["problems.architecture.batch_size=2"]
    return [
        Section("e2eaug fp32", [*e2eaug, *few, *images], 40, STRICT),
        Section("e2eaug TF32 and bf16", [*e2eaug, *few, "--precision", "fp32", "bf16", *images], 55,
                TF32),
        Section("e2eaug batch 8", [*e2eaug, *few, *images, *large], 40, TF32),
        Section("engine", engine, 60, TF32),
        Section("kernels", ["benchmarks/kernels.py", "configs/e2eaug_isic.yaml", *there,
                            *images], 45, TF32),
        Section("segan fp32 and bf16", [*segan, "--precision", "fp32", "bf16", "data.train=100",
                                        "data.val=8"], 45, TF32),
        *(
            Section(f"unrolled T={steps}", [*unrolled, "--steps", str(steps)], seconds, STRICT)
            for steps, seconds in ((1, 25), (5, 40), (20, 80))
        ),
        Section("one hop", ["benchmarks/hypergradients.py", *there, "--size", "large", "--rounds",
                            "5", "--parts", "passes", "one_step", "products"], 70, STRICT),
        Section("load", [*load, "--gib", "0", "data.train=40", "data.val=100", "data.test=8"], 60),
        Section("product", ["benchmarks/second_order.py", *there, "--rounds", "5"], 30, STRICT),
        Section("cells", ["benchmarks/cell.py", *there, "--repeats", "7"], 25),
        # Last: it takes what time is left.
        Section("tests", [*TESTS, "-k", "gpu"], 180),
    ]  # fmt: skip


def compiled(device: str) -> list[Section]:
    """An iteration of E2EAug with compiled networks, most of whose time goes into compiling them.

    By CUDA graphs of torch's own kernels, which spare the host their launches, and by torch's
    default compiler. Beside "e2eaug TF32 and bf16", whose first table is the same uncompiled.
    """
    return [
        Section(
            name,
            ["benchmarks/iteration.py", "configs/e2eaug_isic.yaml", "--device", device,
             "--iterations", "10", "data.out_of_distribution=[]", "data.test=8",
             *(f"problems.{n}.compile={by}" for n in ("generator", "discriminator", "segmentor"))],
            seconds,
            TF32,
        )
        for name, by, seconds in (
            ("e2eaug CUDA graphs", "cudagraphs", 120),
            ("e2eaug compiled", "true", 400),
        )
    ]  # fmt: skip


TESTS = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]


def toy() -> list[Section]:
    """A section of each kind, as small as it goes; on the CPU."""
    lesions = ["data.name=synthetic_lesions", "data.train=4", "data.val=2", "data.test=2"]
    nets = ["data.image_size=32", "segmentor.channels=2", "segmentor.levels=2"]
    gan = ["generator.channels=2", "generator.levels=3", "discriminator.channels=2"]
    return [
        Section("e2eaug fp32", ["benchmarks/iteration.py", "configs/e2eaug_isic_small.yaml",
                                "--iterations", "1", *lesions, *nets, *gan,
                                "discriminator.layers=2"], 120, STRICT),
        Section("product", ["benchmarks/second_order.py", "--sizes", "tiny", "--rounds", "2"], 120,
                STRICT),
        Section("tests", ["-m", "pytest", "-q", "-p", "no:cacheprovider",
                          "tests/multilevel/test_no_synchronisation.py", "-k", "gpu"], 120),
    ]  # fmt: skip


def run(section: Section, out: Path, seconds: float) -> Outcome:
    """Run a section for at most ``seconds``; what it prints goes to a file of its name."""
    words = [sys.executable, *section.command]
    shown = " ".join(f"'{w}'" if re.search(r"[\s\[\]{}]", w) else w for w in section.command)
    result = Outcome(section.name, "not begun", 0.0, f"python {shown}", section.environment)
    if seconds < 5:
        return result
    begun = time.monotonic()
    path = out / f"{section.name.replace(' ', '_')}.txt"
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **section.environment}
    with path.open("w", encoding="utf-8") as file:
        try:
            code = subprocess.run(
                words,
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                check=False,
            ).returncode
            result.outcome = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            result.outcome = "out of time"
    result.seconds = round(time.monotonic() - begun, 1)
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if section.name == "tests" or result.outcome != "passed":
        result.note = lines[-1].strip(" =")[:200] if lines else ""
    return result


def tables_of(text: str) -> str:
    """What a section printed, without its own heading and description of the machine."""
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith("|")), len(lines))
    return "\n".join(line for line in lines[first:] if line.startswith("|") or not line.strip())


def report(outcomes: Sequence[Outcome], described: Mapping[str, str], out: Path) -> str:
    """The report in Markdown."""
    shown = ["# mlseg on a device", "", machine.head(dict(described)), ""]
    shown += ["| section | outcome | s | |", "|---|---|---|---|"]
    shown += [f"| {o.name} | {o.outcome} | {o.seconds:g} | {o.note} |" for o in outcomes]
    for o in outcomes:
        path = out / f"{o.name.replace(' ', '_')}.txt"
        tables = tables_of(path.read_text(errors="replace")) if path.exists() else ""
        settings = " ".join(f"{key}={value}" for key, value in o.environment.items())
        shown += ["", f"## {o.name}", "", f"- command: `{(settings + ' ' + o.command).strip()}`"]
        shown += ["", tables] if tables else []
    return "\n".join(shown) + "\n"


def main() -> int:
    """Run all sections, write the reports, and say whether all passed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    parser.add_argument("--seconds", type=float, default=530.0, help="for all sections together")
    parser.add_argument("--only", nargs="+", help="sections, by the beginning of their names")
    parser.add_argument("--toy", action="store_true", help="on the CPU, as small as it goes")
    parser.add_argument("--compiled", action="store_true", help="E2EAug's compiled networks alone")
    arguments = parser.parse_args()
    device = machine.choose_device("cpu" if arguments.toy else "cuda")
    until = time.monotonic() + arguments.seconds
    sections = toy() if arguments.toy else at_scale(device.type)
    if arguments.compiled:
        sections = compiled(device.type)
    if arguments.only:
        sections = [s for s in sections if s.name.startswith(tuple(arguments.only))]
    arguments.out.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for section in sections:
        outcomes.append(run(section, arguments.out, min(section.seconds, until - time.monotonic())))
        o = outcomes[-1]
        print(f"{o.name}: {o.outcome}, {o.seconds:g} s {o.note}".rstrip(), flush=True)
    described = machine.describe(device)
    values = {"machine": described, "sections": [asdict(o) for o in outcomes]}
    (arguments.out / "report.json").write_text(json.dumps(values, indent=2) + "\n")
    text = report(outcomes, described, arguments.out)
    (arguments.out / "report.md").write_text(text, encoding="utf-8")
    print(f"\n{text}")
    return 0 if outcomes and all(o.outcome == "passed" for o in outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(as_script(main))
