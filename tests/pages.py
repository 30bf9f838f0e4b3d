"""A page of a run as tests read it."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any


def read(path: Path) -> Any:
    """A JSON file of the run."""
    return json.loads(path.read_text(encoding="utf-8"))


class Page(HTMLParser):
    """What a page holds: tables by caption as rows of (text, value), text, tags, attributes."""

    VOID = {"meta", "link", "br", "img"}

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = ""
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[tuple[str, float | None]]]] = {}
        self._open: list[str] = []
        self._caption = ""
        self._row: list[tuple[str, float | None]] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == "caption":
            self._caption = ""
        if tag == "tr":
            self._row = []
        if tag in ("td", "th"):
            value = found.get("data-value")
            self._row.append(("", None if value is None else float(value)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "caption":
            self.tables[self._caption] = []
        if tag == "tr":
            self.tables[self._caption].append(self._row)

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] in ("style", "script"):
            return
        self.text += data
        if "caption" in self._open:
            self._caption += data.strip()
        elif self._open[-1] in ("td", "th", "a", "button") and "tr" in self._open:
            text, value = self._row[-1]
            self._row[-1] = (text + data.strip(), value)

    def table(self, beginning: str) -> list[list[tuple[str, float | None]]]:
        return next(rows for name, rows in self.tables.items() if name.startswith(beginning))
