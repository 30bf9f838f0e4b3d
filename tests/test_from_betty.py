"""``docs/from-betty.md``: its blocks run in this order, and its tables hold every setting."""

import re
from pathlib import Path
from typing import Any

import betty.configs
import pytest
import tiny
import torch
from betty.hypergradient import jvp_fn_mapping

from mlseg.hypergradients import names
from mlseg.multilevel.betty_tables import BETTYS
from mlseg.multilevel.config import Config

PAGE = Path(__file__).parent.parent / "docs" / "from-betty.md"
TEXT = PAGE.read_text(encoding="utf-8")


def rows(section: str) -> list[list[str]]:
    """The cells of the tables of a section, without their heads."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    bodies = [line for line, after in zip(lines, [*lines[1:], ""], strict=True)
              if not line.startswith("|---") and not after.startswith("|---")]  # fmt: skip
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in bodies]


def test_the_steps_of_the_move() -> None:
    ran: dict[str, Any] = {"__name__": "from_betty"}
    for match in re.finditer(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE):
        line = TEXT[: match.start(1)].count("\n")
        exec(compile("\n" * line + match.group(1), str(PAGE), "exec"), ran)
    plain, derived, moved = (tiny.weights(ran[name]) for name in ("plain", "derived", "moved"))
    for name, value in plain.items():
        # Single precision over a step of 1e-2, which Adam may turn into the sign of a gradient.
        torch.testing.assert_close(derived[name], value, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(moved[name], value, rtol=2e-2, atol=2e-3)
    assert float((plain["outer/weight"] - tiny.weights(ran["program"](
        ran["Inner"], ran["Outer"], betty.configs.Config()
    ))["outer/weight"]).norm()) > 0.1, "it has been trained"  # fmt: skip
    assert "hypergradient/via_inner" in ran["report"]


def test_every_method_of_bettys_has_its_row() -> None:
    said = {row[0].strip("`") for row in rows("Methods")}
    assert said == {*BETTYS, "IterativeProblem"}
    assert BETTYS.keys() <= jvp_fn_mapping.keys()
    for _, here, _ in rows("Methods"):
        assert re.match(r"`(\w+)`", here)[1] in names()  # type: ignore[index]


def test_every_setting_of_bettys_has_its_row() -> None:
    said = [row[0].strip("`") for row in rows("Settings")]
    fields = [
        *betty.configs.Config.__dataclass_fields__,
        *betty.configs.EngineConfig.__dataclass_fields__,
    ]
    assert sorted(said) == sorted(fields)


@pytest.mark.parametrize("row", rows("Settings"), ids=lambda row: row[0])
def test_what_is_refused_is_refused(row: list[str]) -> None:
    """In our ``Config``, and nothing else is."""
    name = row[0].strip("`")
    field = betty.configs.Config.__dataclass_fields__.get(name)
    if field is None or name in ("type", "precision"):
        return
    other = not field.default if isinstance(field.default, bool) else field.default + 1
    if row[2].startswith("refused"):
        with pytest.raises(ValueError, match=name):
            Config(**{name: other})
    else:
        Config(**{name: other})


def test_the_readme_leads_here() -> None:
    assert "(docs/from-betty.md)" in (PAGE.parent.parent / "README.md").read_text(encoding="utf-8")
