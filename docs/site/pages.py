"""Pages of the site that are made when it is built, and links that lead out of ``docs``.

The README and its siblings at the top of the repository become pages; a link to a file of the
repository leads to a page that shows it. Nothing of it is kept beside what it is made from.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from mlseg.config.keys import Key, keys, kinds
from mlseg.problems.systems import RunSettings, all_systems

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
TOP = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
"""Files at the top of the repository, and the pages that they become."""

REFERENCE = {
    "core": (
        "Levels and engines",
        ["mlseg.multilevel", "mlseg.engines", "mlseg.engines.segmentation", "mlseg.errors"],
    ),
    "hypergradients": ("Hypergradients", ["mlseg.hypergradients", "mlseg.hypergradients.methods"]),
    "optimizers": ("Optimizers", ["mlseg.hypergradients.optimizers"]),
    "segmentation": (
        "Segmentation",
        [
            "mlseg.segmentation.data",
            "mlseg.segmentation.nets",
            "mlseg.segmentation.losses",
            "mlseg.segmentation.metrics",
            "mlseg.segmentation.scoring",
            "mlseg.segmentation.model",
            "mlseg.segmentation.trained",
            "mlseg.segmentation.exporting",
            "mlseg.segmentation.pictures",
        ],
    ),
    "systems": (
        "Systems",
        ["mlseg.problems.systems", "mlseg.problems.building", "mlseg.problems.reporting"],
    ),
    "testing": ("Programs with known answers", ["mlseg.testing"]),
}
"""Pages of the API: their titles, and the packages and modules whose public names they show."""

ROLE = re.compile(r":\w+:<code>(~?)([\w.]+)</code>")
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)]*)?\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    texts = {DOCS / f.src_uri: (DOCS / f.src_uri).read_text("utf-8") for f in files if _is_page(f)}
    texts |= {ROOT / name: (ROOT / name).read_text("utf-8") for name in TOP}
    shown = {path for place, text in texts.items() for path in _led_to(place, text)}
    made = {page: (ROOT / name).read_text("utf-8") for name, page in TOP.items()}
    made |= {_source_page(path): _shown(path) for path in sorted(shown)}
    made |= {f"reference/{name}.md": "".join(_api(*of)) for name, of in REFERENCE.items()}
    made["reference/keys.md"] = "".join(_keys())
    for uri, text in made.items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages."""
    uri = page.file.src_uri
    tops = {page: ROOT / name for name, page in TOP.items()}
    place = tops.get(uri, DOCS / uri)

    def turned(match: re.Match[str]) -> str:
        target = _page_of(place, match[2])
        if target is None:
            return match[0]
        return match[1] + os.path.relpath(target, PurePosixPath(uri).parent) + match[3]

    return LINK.sub(turned, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show what a docstring points at, ``:class:`~mlseg.Problem```, by its name."""

    def named(found: re.Match[str]) -> str:
        name = found[2].split(".")[-1] if found[1] else found[2]
        return f"<code>{name}</code>"

    return ROLE.sub(named, html)


def _is_page(file: File) -> bool:
    return file.is_documentation_page() and not file.src_uri.startswith("site/")


def _led_to(place: Path, text: str) -> Iterator[Path]:
    """The files outside ``docs`` to which a page's links lead, that are no pages themselves."""
    for match in LINK.finditer(text):
        path = _file(place, match[2])
        if path is not None and DOCS not in path.parents and path.name not in TOP:
            yield path


def _file(place: Path, link: str) -> Path | None:
    path = (place.parent / link).resolve()
    return path if "://" not in link and path.is_file() else None


def _page_of(place: Path, link: str) -> str | None:
    """The page at which a link to a file of the repository is to lead; None: it stays."""
    path = _file(place, link)
    if path is None:
        return None
    if DOCS in path.parents:
        return path.relative_to(DOCS).as_posix()
    return TOP.get(path.relative_to(ROOT).as_posix()) or _source_page(path)


def _source_page(path: Path) -> str:
    return f"source/{path.relative_to(ROOT).as_posix()}.md"


def _shown(path: Path) -> str:
    name = path.relative_to(ROOT).as_posix()
    language = {".py": "python", ".yaml": "yaml"}.get(path.suffix, "text")
    text = path.read_text("utf-8")
    hidden = "---\nsearch: {exclude: true}\n---\n"
    return f"{hidden}# {name}\n\n```{language}\n{text}```\n"


def _api(title: str, modules: list[str]) -> Iterator[str]:
    yield f"# {title}\n"
    for module in modules:
        for home, name in _public(importlib.import_module(module)):
            yield f"\n::: {home}.{name}\n"


def _public(module: Any) -> Iterator[tuple[str, str]]:
    """The public names of a module or package, each with the module that defines it.

    They are those of its ``__all__``; of a module without one those that it defines itself, and of
    a package without one those of its modules.
    """
    below = Path(module.__path__[0]).glob("[!_]*.py") if hasattr(module, "__path__") else []
    named = getattr(module, "__all__", None)
    if named is None and hasattr(module, "__path__"):
        for path in sorted(below):
            yield from _public(importlib.import_module(f"{module.__name__}.{path.stem}"))
        return
    for name in vars(module) if named is None else named:
        thing = getattr(module, name)
        home = getattr(thing, "__module__", None)
        if name.startswith("_") or not (isinstance(thing, type) or callable(thing)):
            continue
        ours = str(home).split(".")[0] == "mlseg"
        if home is not None and (ours if named is not None else home == module.__name__):
            yield home, name


def _keys() -> Iterator[str]:
    yield (
        "# Keys of a config\n\nMade from the schema, which `python -m mlseg.run --keys SYSTEM` "
        "prints too. `*` stands for any name. A nested key is written `engine.iterations=100` on "
        "the command line, and as a mapping within a mapping in a file.\n"
    )
    yield "\n## Every system\n\n" + _table(keys(RunSettings))
    shared = set(RunSettings.model_fields)
    for system in all_systems():
        own = (key for key in keys(system.settings) if key.path.split(".")[0] not in shared)
        yield f"\n## {system.name}\n\n{system.summary}\n\n" + _table(own)
    named: dict[str, Any] = {}
    for system in all_systems():
        for kind in kinds(system.settings):
            named.setdefault(kind.kind, kind)
    for kind in named.values():
        yield f"\n## What can be named: {kind.kind}\n\nOne of these, or a dotted path such as "
        yield f"`{kind.example}`. The keys stand beside `{kind.key}`.\n"
        for name, own in kind.things.items():
            yield f"\n### {name}\n\n" + (_table(own) if own else "No keys of its own.\n")


def _table(found: Iterator[Key] | Any) -> str:
    rows = [
        f"| `{key.path}` | {_cell(key.type)} | {_cell(key.default)} | {_cell(key.meaning)} |"
        for key in found
    ]
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def _cell(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|").replace("*.", "\\*.")
