"""Scripts of mIoU for LoAd's controller, and the label maps that its buffer then holds."""

from typing import Any

from mlseg.engines.engine import Engine
from mlseg.engines.lookahead.controller import LookaheadSettings
from mlseg.engines.lookahead.loop import LookaheadLoop

UNIT = 128
"""Percents are given over 128, so that sums of mIoU and beta are exact."""


def loop(engine: Engine) -> Any:
    """The engine's :class:`LookaheadLoop`; untyped, for tests replace its methods."""
    return engine.hook(LookaheadLoop)


def settings(**changes: Any) -> LookaheadSettings:
    """Those of the tables below: beta_l 5, beta_u 1, B_max 3."""
    values: dict[str, Any] = {"beta_l": 5 / UNIT, "beta_u": 1 / UNIT, "buffer_size": 3}
    return LookaheadSettings.model_validate(values | changes)


def numbers(script: str) -> list[list[float]]:
    """Cycles between slashes, numbers between commas; ``49 x4`` is four of them."""
    cycles = []
    for cycle in script.split("/"):
        found: list[float] = []
        for text in cycle.split(","):
            number, _, times = text.strip().partition(" x")
            found += [float(number) / UNIT] * int(times or 1)
        cycles.append(found)
    return cycles


TABLE: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "falls, patience": (
        {"cycles": 2, "patience": 4},
        "49 x4 / 48 x4",
        ["g0,g4", "g0,g4,g8"],
    ),
    "falls, divergence at once where it equals the floor": (
        {"cycles": 2, "patience": 4},
        "46, 45 / 44",
        ["g0,g2", "g0,g2,g3"],
    ),
    "a peak, then none": (
        {"cycles": 2, "patience": 4},
        "52,51,50,49 / 48,47 / 47",
        ["g1,g4", "g1,g4,g6", "g1,g6,g7"],
    ),
    "what equals the upper threshold is no peak": (
        {"cycles": 2, "patience": 4},
        "51,50.5,51,50 / 49 x4",
        ["g0,g4", "g0,g4,g8"],
    ),
    "the oldest ending model leaves a full buffer": (
        {"cycles": 4, "patience": 4},
        "49 x4 / 49 x4 / 49 x4 / 49 x4",
        ["g0,g4", "g0,g4,g8", "g0,g8,g12", "g0,g12,g16"],
    ),
    "figure 1": (
        {"cycles": 3, "patience": 2},
        "49,48/53,52/51,47/56,55/54,53/54,53/54,53",
        ["g0,g2", "g3,g4", "g3,g4,g6", "g7,g8", "g7,g8,g10", "g7,g10,g12", "g7,g12,g14"],
    ),
    "restarts": (
        {"cycles": 2, "patience": 4, "peak_patience": 1},
        "52,53,54,55,56,57,58,58,58 / 58,58,40 / 40",
        ["g6,g9", "g6,g9,g12", "g6,g12,g13"],
    ),
    "restart below the peak": (
        {"cycles": 2, "patience": 4, "peak_patience": 1},
        "60,52,52.5,50,50,50 / 50 / 50",
        ["g1,g6", "g1,g6,g7", "g1,g7,g8"],
    ),
    "Omega of Gamma - 1 or more is none": (
        {"cycles": 1, "patience": 4, "peak_patience": 3},
        "52,53,54,55 / 54 x4",
        ["g4,g4", "g4,g4,g8"],
    ),
    "Omega below Gamma - 1 restarts": (
        {"cycles": 1, "patience": 4, "peak_patience": 2},
        "52,53,54,55,54,54,54 / 54 x4",
        ["g4,g7", "g4,g7,g11"],
    ),
    "earlier peaks are retained, endings leave": (
        {"cycles": 2, "patience": 2, "on_peak": "retain"},
        "52,51 / 54,53 / 53,52 / 53,52",
        ["g1,g0,g2", "g3,g1,g4", "g3,g1,g6", "g3,g1,g8"],
    ),
}
"""By name: settings, scripts in per cent with cycles between slashes, buffers after each cycle."""
