"""Who may import whom: the rooms of the house, and the one direction between them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GROUND = (
    "errors",
    "files",
    "randomness",
    "signals",
    "checkpoint",
    "compiling",
    "machine",
    "parallel",
    "precision",
    "threads",
    "transfer",
    "values",
    "_betty",
    "_checkout",
    "_distribution",
    "_version",
    "workers",
)
CORE = {"ground", "config", "hypergradients", "multilevel"}
MAY_IMPORT = {
    "ground": set(),
    "config": {"ground"},
    "hypergradients": {"ground", "config"},
    "multilevel": {"ground", "config", "hypergradients"},
    "segmentation": {"ground", "config"},
    "engines": CORE | {"segmentation"},
    "testing": CORE | {"engines"},
    "comparison": CORE | {"engines", "testing"},
    "problems": CORE | {"engines", "segmentation", "testing", "comparison"},
    "reports": CORE | {"engines", "segmentation", "problems"},
    "sweeps": CORE | {"engines", "segmentation", "problems", "commands"},
    "commands": CORE
    | {"engines", "segmentation", "testing", "comparison", "problems", "reports", "sweeps"},
}
"""By room; each also itself."""


def modules() -> dict[str, Path]:
    """Every module of the library, by name."""
    found = {}
    for top, prefix in (
        ("mlseg", "mlseg"),
        ("problems", "mlseg.problems"),
        ("engines", "mlseg.engines"),
    ):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT / top).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((prefix, *parts))] = path
    return found


def room(module: str) -> str:
    """The room that a module stands in."""
    parts = module.split(".")
    if len(parts) == 1:
        return "front"
    if parts[1] in GROUND:
        return "ground"
    return parts[1] if parts[1] in MAY_IMPORT else "commands"


def imports(path: Path, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """Modules of the library that a file imports anywhere, also late or for its types alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                yield (deeper if deeper in known else node.module), node.lineno


ALL = modules()


@pytest.mark.parametrize("name", ALL)
def test_imports_point_one_way(name: str) -> None:
    here = room(name)
    if here == "front":
        return  # mlseg/__init__.py names what is public
    wrong = [
        f"{ALL[name].relative_to(ROOT)}:{line}: {here} imports {target} ({room(target)})"
        for target, line in imports(ALL[name], ALL)
        if target.startswith("mlseg.") and room(target) not in MAY_IMPORT[here] | {here}
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ALL)
def test_a_system_knows_no_other(name: str) -> None:
    """So that each can be removed with its folder; LoAd takes its part of the engines along."""
    systems = {
        p.stem for p in (ROOT / "problems").iterdir() if p.is_dir() or p.stem == "supervised"
    }
    systems -= {"__pycache__"}
    parts = name.split(".")
    own = parts[2] if parts[:2] == ["mlseg", "problems"] and len(parts) > 2 else None
    for target, line in imports(ALL[name], ALL):
        to = target.split(".")
        if to[:2] == ["mlseg", "problems"] and len(to) > 2 and to[2] in systems:
            assert to[2] == own, f"{name}:{line} knows the system {to[2]}"
        if to[:3] == ["mlseg", "engines", "lookahead"]:
            assert own == "load" or parts[:3] == to[:3], f"{name}:{line} knows the lookahead"


def test_every_name_of_the_ground_is_there() -> None:
    found = {name.split(".")[1] for name in modules() if "." in name}
    assert set(GROUND) <= found
