"""A config is somebody's file: whatever it holds, it is a config or one line."""

import os
import random
from pathlib import Path
from typing import Any

import pytest

from mlseg.config import load, yaml12
from mlseg.config.loading import MAX_BASES, MAX_BYTES
from mlseg.errors import UserError, printable
from mlseg.files import reachable
from mlseg.problems.systems import parse_run

CONFIGS = Path(__file__).parents[2] / "configs"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{below}'] * 9)}]\n"
    for below, name in zip("abcdefgh", "bcdefghi", strict=True)
)
LADDER = "a0: &a0 x\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 100))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "more than 20000 values"),
        (LADDER, "levels deep, by references"),
        ("a: " + "[" * 300, "more than 50 levels deep"),
        ("{a: " * 300, "more than 50 levels deep"),
        ("- " * 300, "more than 50 levels deep"),
        ("a: !!float ''", "'' can't be read as float"),
        ("a: !!int ''", "'' can't be read as int"),
        ("a: !!float " + "1:" * 999 + "1", "can't be read as float"),
        ("a: " + "9" * 4000, "more than 1000 bits"),
        ("a: 0x" + "f" * 4000, "more than 1000 bits"),
        ("a: " + "x" * 5000, "5000 characters; at most 4096"),
        ("x" * 5000 + ": a", "not valid YAML"),
        (r'a: "\ud800"', r"'\ud800' is not allowed"),
        (r'a: "\U00110000"', "not valid YAML"),
        ("a: '" + "\n" * MAX_BYTES + "'", "0.5 MiB, more than 0.5"),
    ],
)
def test_what_no_config_needs_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("/dev/zero", "a pipe or a device, not a file"),
        ("pipe", "a pipe or a device, not a file"),
        ("loop", "Too many levels of symbolic links"),
        ("~nobody-is-called-so/a.yaml", "no user of that name"),
        ("x" * 300, "File name too long"),
        ('"a\\0b"', "null byte"),
        (".", "Is a directory"),
        ("a.yaml/b.yaml", "a.yaml:1: base:"),
    ],
)
def test_what_is_no_file_is_no_base(
    tmp_path: Path, base: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("loop").symlink_to("loop")
    Path("a.yaml").write_text(f"base: {base}\n")
    with pytest.raises(UserError, match=r"^a\.yaml:1: base: ") as caught:
        load("a.yaml")
    assert said in str(caught.value)
    if not base.startswith('"'):
        with pytest.raises(UserError):
            load(base)


def test_a_long_chain_of_bases(tmp_path: Path) -> None:
    for number in range(MAX_BASES + 2):
        (tmp_path / f"{number}.yaml").write_text(f"base: {number + 1}.yaml\nkey{number}: 1\n")
    with pytest.raises(UserError, match=f"more than {MAX_BASES} files"):
        load(tmp_path / "0.yaml")
    (tmp_path / f"{MAX_BASES - 1}.yaml").write_text("last: 1\n")
    assert len(load(tmp_path / "0.yaml").values) == MAX_BASES


def test_a_key_of_many_parts() -> None:
    with pytest.raises(UserError, match="a key of more than 50 parts"):
        load(CONFIGS / "supervised_isic_small.yaml", [".".join("a" * 2000) + "=1"])


def test_many_keys_over_many_others(tmp_path: Path) -> None:
    lines = "".join(f"key{number}: [1]\n" for number in range(3000))
    (tmp_path / "a.yaml").write_text(lines)
    (tmp_path / "b.yaml").write_text(f"base: a.yaml\n{lines}")
    tree = load(tmp_path / "b.yaml")
    assert tree.where("key77") == f"{tmp_path}/b.yaml:79"


def test_a_message_does_nothing_to_a_terminal() -> None:
    assert printable("a\nb\x1b[2Jé") == r"a\nb\x1b[2Jé"
    assert len(printable("x" * 10**6)) < 2100


def test_a_path_that_is_none() -> None:
    for path, said in (("~no-such-user/x", "no user"), ("a\0b", "null"), ("x" * 300, "too long")):
        with pytest.raises(UserError, match=said):
            reachable(path)
    assert reachable("nothing/there") == Path("nothing/there")


PIECES = (
    "[", "]", "{", "}", ": ", "- ", "? ", "&a ", "*a", "!!float ''", "!!bool x", "!x ", "|\n", "'",
    '"', '"\\0"', "%YAML 1.2\n---\n", "---\n", "#", "\t", "\x1b[2J", "\u2028", "1e999", ".nan",
    "0x" + "f" * 900, "~nobody/x", "/dev/zero", "", "[bold]", "a" * 300, "[" * 99, "{a: " * 99,
    "base: .\n", "os:system", "imports: [no.such]\n", "name: [a]\n", "system: []\n", "data: 3\n",
    "seed: -1\n",
    "\r\n",
    "é",
)  # fmt: skip


def _changed(text: str, draw: random.Random) -> str:
    """A few characters, tokens or lines put in, taken out or doubled."""
    for _ in range(draw.choice((1, 1, 2, 5))):
        lines, place = text.split("\n"), draw.randrange(len(text) + 1)
        line = draw.randrange(len(lines))
        kind = draw.randrange(5)
        if kind == 0:
            text = text[:place] + draw.choice(PIECES) + text[place:]
        elif kind == 1:
            text = text[:place] + text[place + draw.choice((1, 3, 20)) :]
        elif kind == 2:
            text = text[:place] + chr(draw.randrange(0xD800)) + text[place + 1 :]
        elif kind == 3:
            lines[line : line + 1] = [lines[line]] * draw.choice((0, 2, 30))
            text = "\n".join(lines)
        else:
            lines[line] = f"{lines[line].partition(':')[0]}: {draw.choice(PIECES)}"
            text = "\n".join(lines)
    return text


@pytest.mark.parametrize("start", range(0, 300, 50))
def test_a_changed_config_is_a_config_or_one_line(tmp_path: Path, start: int) -> None:
    names = sorted(p for p in CONFIGS.glob("*.yaml") if not p.name.startswith("compare_"))
    for path in names:
        (tmp_path / path.name).write_text(path.read_text())
    outcomes: list[Any] = []
    for seed in range(start, start + 50):
        draw = random.Random(seed)
        text = _changed(draw.choice(names).read_text(), draw)
        (tmp_path / "changed.yaml").write_text(text, newline="")
        try:
            settings, _ = parse_run(load(tmp_path / "changed.yaml"))
            assert yaml12.read(yaml12.write(settings.model_dump(mode="json")), "again")
            outcomes.append(True)
        except UserError as error:
            outcomes.append(str(error))
    refused = [printable(outcome) for outcome in outcomes if outcome is not True]
    assert refused
    assert all(line and "\n" not in line for line in refused)
