"""What methods say of themselves, as tables in Markdown.

A page has a table between two comments, which :func:`rewritten` fills anew:

    <!-- methods: situations -->
    <!-- end -->

``python -m mlseg.hypergradients PAGE`` does that to a file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import get_args

from mlseg.hypergradients.base import BestResponse, Method
from mlseg.hypergradients.registry import classes


def situations() -> str:
    """Which method when."""
    rows = [(f"`{name}`", cls.situation, cls.because) for name, cls in _grouped()]
    alone = ", ".join(f"`{name}`" for name, cls in _grouped() if cls.first_derivatives_alone)
    return (
        f"{_table(('take', 'when', 'because'), rows)}\n\n"
        "Operations without a second derivative (own kernels): "
        f"{alone} take first derivatives alone."
    )


def best_responses() -> str:
    """What each method takes for the best response."""
    groups: dict[str, list[str]] = {}
    for name, cls in _grouped():
        groups.setdefault(cls.best_response, []).append(f"`{name}`")
    return _table(("`w*`", "methods"), [(k, ", ".join(v)) for k, v in groups.items()])


def costs() -> str:
    """What a hop costs, in evaluations and products, with the settings' defaults."""
    rows = []
    for name, cls in _grouped():
        letters = ", ".join(
            f"{letter} `{setting}` ({cls.model_fields[setting].default})"
            for letter, setting in cls.symbols.items()
        )
        formula = f"{cls.cost}, {letters}" if letters else cls.cost
        rows.append(
            (f"`{name}`", "; ".join(part for part in (formula, cls.cost_note) if part), cls.memory)
        )
    return _table(("method", "cost", "beside the graph of the loss, memory"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "situations": situations,
    "best responses": best_responses,
    "costs": costs,
}


def rewritten(page: str) -> str:
    """The page with its tables made anew.

    Raises:
        KeyError: it has a table of another name.
    """

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[4]}"

    return re.sub(r"(<!-- methods: ([a-z ]+) -->)\n(.*?)(<!-- end -->)", fill, page, flags=re.S)


def _grouped() -> list[tuple[str, type[Method]]]:
    """All methods that describe themselves, by best response."""
    order = get_args(BestResponse)
    known = [(name, cls) for name, cls in classes().items() if cls.situation]
    return sorted(known, key=lambda item: order.index(item[1].best_response))


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [f"| {' | '.join(line)} |" for line in (head, *rows)]
    lines.insert(1, "|---" * len(head) + "|")
    return "\n".join(lines).replace("``", "`")
