"""Configs and command lines that are damaged or say what nobody would."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path
from typing import Any

import yaml

from trials.child import LOGS, Task, call
from trials.fixtures import TOYS, Fixtures
from trials.judge import Outcome, clean, files, unchanged
from trials.mutations import NUMBERS, TEXTS, at, changed, places

NESTED = "[" * 3000 + "]" * 3000
ANCHORS = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
)
ODD_YAML = (
    NESTED, ANCHORS, "a: &a [*a]", "? [1, 2]\n: 3", "{}", "", "---\n---\n", "- 1", "null", "\tx: 1",
    "x: !!python/object/apply:os.mkdir [ran]", "x: !!python/name:os.system", "x: !!float ''",
    "x: !!binary 'a'", "x: !!timestamp '2018-99-99'", "x: !!set {a}", "x: !!int 'x'", "<<: {a: 1}",
    "system: [supervised]", "system: null", "imports: [os, nowhere.to.be]", "base: config.yaml",
    "base: /dev/zero", "base: pipe", "base: .", "base: missing.yaml", "base: loop.yaml", "base: 3",
    "base: ~nobody/x.yaml", "base: 'a\\0b'", "x: \x01", "\ufeffsystem: supervised", "x: 1\r\nx: 2",
    "x: " + "a" * 5_000_000, "x: '" + "\\" * 1000, "%YAML 9.9\n---\na: 1", "x: 0x" + "f" * 9000,
    "x: " + "9" * 9000, "x: 1e" + "9" * 400, "k" * 3000 + ": 1",
)  # fmt: skip


def trial(draw: random.Random, folder: Path, fixtures: Fixtures) -> Outcome:
    """A config, or overrides of a good one, built and run once (``--dry-run``)."""
    place, home = folder / "place", folder / "home"
    home.mkdir()
    config = place / "config.yaml"
    os.mkfifo(place / "pipe")
    (place / "loop.yaml").symlink_to("loop.yaml")
    toy = TOYS / f"{draw.choice([*fixtures.systems, 'supervised'])}.yaml"
    overrides: list[str] = []
    if draw.random() < 0.3:
        config.write_text(f"base: {toy}\n", encoding="utf-8")
        overrides = [_override(draw, toy) for _ in range(draw.choice((1, 1, 2)))]
    else:
        # As bytes: a file may hold what is no UTF-8.
        config.write_bytes(_config(draw, toy))
    arguments = ["config.yaml", *overrides, "--dry-run"]
    if draw.random() < 0.1:
        arguments[-1:] = ["engine.iterations=2", "--out", draw.choice(TEXTS).replace("\0", "0")]
        # So deep that "../" stays within: a folder that the command names is the run's own.
        arguments[-1] = os.path.join(folder / "out/a/b", arguments[-1].lstrip("/"))
    but = (folder / LOGS, folder / "out")
    before = files(folder, but=but)
    environment = {"HOME": str(home), "XDG_CACHE_HOME": str(home)}
    ended = call(Task("run", tuple(arguments), place, environment=environment))
    clean(ended)
    unchanged(before, files(folder, but=but))
    return Outcome("refused" if ended.code else "right")


def _config(draw: random.Random, toy: Path) -> bytes:
    kind = draw.random()
    if kind < 0.15:
        return draw.choice(ODD_YAML).encode("utf-8", "surrogatepass")
    if kind < 0.55:
        values, _ = changed(draw, _values(toy))
        return yaml.safe_dump(values, sort_keys=False).encode("utf-8", "surrogatepass")
    text = yaml.safe_dump(_values(toy), sort_keys=False)
    if kind < 0.7:  # anywhere
        data = bytearray(text.encode())
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.choice((draw.randrange(256), *b"{}[]:,-#&*!|>'"))
        return bytes(data)
    lines = text.splitlines()
    for _ in range(draw.randint(1, 3)):
        _change_line(draw, lines)
    return "\n".join(lines).encode()


def _values(toy: Path) -> dict[str, Any]:
    """A toy's config over its base."""
    own: dict[str, Any] = yaml.safe_load(toy.read_text(encoding="utf-8"))
    base = own.pop("base", None)
    if base is None:
        return own
    values = _values(toy.parent / base)
    for key, value in own.items():
        adds = isinstance(value, dict) and "name" not in value
        values[key] = {**values.get(key, {}), **value} if adds else value
    return values


def _change_line(draw: random.Random, lines: list[str]) -> None:
    number = draw.randrange(len(lines))
    kind = draw.randrange(7)
    if kind == 0:
        lines.insert(draw.randrange(len(lines)), lines[number])
    elif kind == 1 and len(lines) > 1:
        del lines[number]
    elif kind == 2:
        lines[number] = draw.choice((" ", "  ", "\t", "- ", "? ")) + lines[number]
    elif kind == 3:
        lines[number] = lines[number].strip()
    elif kind == 4:
        lines[number] += draw.choice((" &a", " *a", " !!str", " !x", ": 1", " |", " #", "'", '"'))
    elif kind == 5:
        words = re.split(r"(?<=: )", lines[number], maxsplit=1)
        lines[number] = words[0] + draw.choice(("~", "!!float ''", "&a 1", "*a", "[1", "{a: b}"))
    else:
        lines[number] = draw.choice(ODD_YAML[4:30])


def _override(draw: random.Random, toy: Path) -> str:
    values = _values(toy)
    place = draw.choice(places(values))
    key = ".".join(map(str, place))
    if draw.random() < 0.2:
        key = draw.choice((key + "x", key.replace(".", ".."), "." + key, "=", "", *TEXTS[:3]))
    given = draw.choice(
        (draw.choice(NUMBERS), draw.choice(TEXTS), at(values, place), "[1, [2]]", "{a: {b: 1}}",
         "!!python/object/apply:os.mkdir [ran]", "[[[[", "&a [*a]", "xla", "mps", "meta", "cuda:99")
    )  # fmt: skip
    return f"{key}={given}".replace("\0", "")
