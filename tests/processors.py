"""The numerical tests with the kernels of other processors, a row of a table per setting.

    python tests/processors.py                  every setting, one after another
    python tests/processors.py --other          the first whose kernels are not this machine's own
    python tests/processors.py --quick          without the tests that are marked as slow
    python tests/processors.py --whole          with the tests that compute nothing: hours
    python tests/processors.py -k cells         further arguments are pytest's

PyTorch chooses its own kernels by ATEN_CPU_CAPABILITY, oneDNN by ONEDNN_MAX_CPU_ISA, MKL (which
multiplies matrices, and convolves in float64) by MKL_ENABLE_INSTRUCTIONS; each takes what the
processor offers where its variable isn't set. Exit code 1 if a test failed in any setting.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

REPOSITORY = Path(__file__).resolve().parents[1]
LOGS = REPOSITORY / "build" / "processors"
VARIABLES = {
    "aten": "ATEN_CPU_CAPABILITY",
    "onednn": "ONEDNN_MAX_CPU_ISA",
    "mkl": "MKL_ENABLE_INSTRUCTIONS",
}
PROBE = """
import torch
torch.conv2d(torch.ones(4, 8, 64, 64), torch.ones(8, 8, 3, 3))  # large enough for oneDNN
print("aten:" + torch.backends.cpu.get_cpu_capability())
"""
"""Names the kernels that are used: oneDNN by itself, under ONEDNN_VERBOSE."""


@dataclass(frozen=True)
class Setting:
    """Kernels, each library's own choice where None, and a number of threads."""

    aten: str | None = None
    onednn: str | None = None
    mkl: str | None = None
    threads: int = 1

    def __str__(self) -> str:
        given = [f"{key}={value}" for key in VARIABLES if (value := getattr(self, key))]
        return " ".join([*(given or ["the machine's own"]), f"threads={self.threads}"])

    def environment(self) -> dict[str, str]:
        """This process's, with the setting's variables and no other of their kind."""
        kept = {k: v for k, v in os.environ.items() if k not in VARIABLES.values()}
        given = {v: getattr(self, k) for k, v in VARIABLES.items() if getattr(self, k)}
        # Threads that wait by spinning would keep a busy machine's cores from the others.
        waiting = {"OMP_WAIT_POLICY": "PASSIVE"} if self.threads > 1 else {}
        return {**kept, **given, **waiting, "OMP_NUM_THREADS": str(self.threads)}


SETTINGS = [
    Setting(),
    *(Setting(aten, onednn) for aten in ("default", "avx2") for onednn in ("SSE41", "AVX2", None)),
    Setting("default", "SSE41", "SSE4_2"),
]
SETTINGS += [Setting(s.aten, s.onednn, s.mkl, threads=2) for s in SETTINGS]


@dataclass(frozen=True)
class Row:
    """What came of a setting; ``failures`` are the names of tests."""

    setting: Setting
    passed: int
    failures: list[str]
    seconds: float


def kernels(setting: Setting) -> tuple[str, str]:
    """What PyTorch and oneDNN use in a setting."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROBE],
        env={**setting.environment(), "ONEDNN_VERBOSE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    aten, onednn = (re.search(rf"{key}:(.*)", done.stdout) for key in ("aten", "cpu,isa"))
    return aten[1] if aten else "", onednn[1] if onednn else ""


def possible(settings: Sequence[Setting]) -> list[Setting]:
    """Those that this machine can run: it would stop at an instruction that it doesn't have."""
    has_avx2 = kernels(Setting())[0].startswith("AVX")
    return [s for s in settings if has_avx2 or s.aten != "avx2"]


def other(settings: Sequence[Setting]) -> list[Setting]:
    """The first whose kernels aren't the machine's own; else the first with more threads."""
    own = kernels(Setting())
    found = [s for s in settings if kernels(s) != own] if own[0] != "DEFAULT" else []
    return (found or [s for s in settings if s.threads > 1])[:1]


def run(setting: Setting, cores: int, marks: str, arguments: Sequence[str]) -> Row:
    """The tests with ``marks`` under a setting; what pytest says goes to a file of :data:`LOGS`."""
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / (re.sub(r"\W+", "_", str(setting)) + ".txt")
    workers = max(1, cores // setting.threads)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, log.open("w") as said:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", marks]
        command += ["-n", str(workers), "--dist", "worksteal"]
        done = subprocess.run(
            [*command, f"--junitxml={report}", *arguments],
            env=setting.environment(),
            cwd=REPOSITORY,
            stdout=said,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if done.returncode not in (0, 1) or not report.is_file():
            sys.exit(f"pytest gave up with {done.returncode} under {setting}: see {log}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [c for c in cases if c.find("skipped") is not None]
    return Row(
        setting,
        len(cases) - len(failed) - len(skipped),
        [f"{c.get('classname')}::{c.get('name')}" for c in failed],
        time.monotonic() - started,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the settings, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--other", action="store_true", help="one that isn't this machine's own")
    chosen = parser.add_mutually_exclusive_group()
    for option, marks, text in (
        ("--quick", "numerical and not slow", "without those marked as slow"),
        ("--whole", "", "with those that compute nothing"),
    ):
        chosen.add_argument(option, dest="marks", action="store_const", const=marks, help=text)
    parser.set_defaults(marks="numerical")
    parser.add_argument("--cores", type=int, default=2, help="workers times threads")
    given, for_pytest = parser.parse_known_args(arguments)
    settings = possible(SETTINGS)
    settings = other(settings) if given.other else settings
    width = max(len(str(setting)) for setting in settings)
    print(f"{'setting':{width}}  passed  failed  seconds  kernels", flush=True)
    rows = []
    for setting in settings:
        row = run(setting, given.cores, given.marks, for_pytest)
        counts = f"{row.passed:6}  {len(row.failures):6}  {row.seconds:7.0f}"
        print(f"{setting!s:{width}}  {counts}  {', '.join(kernels(setting))}", flush=True)
        for name in row.failures:
            print(f"    {name}", flush=True)
        rows.append(row)
    return int(any(row.failures or not row.passed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
