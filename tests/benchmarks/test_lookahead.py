"""``benchmarks/lookahead.py`` comes to its end, as small as its flags allow."""

from collections.abc import Callable
from pathlib import Path

import tiny

Script = Callable[..., str]


def test_lookahead(script: Script, tmp_path: Path) -> None:
    config = tiny.write_config(tmp_path / "tiny.yaml", "load")
    shown = script("lookahead", config, "--repeats", 1, "--gib", 0.05)
    for what in ("hold-out", "evaluation", "snapshot", "roll-back", "update", "0.05 GiB of label"):
        assert f"- {what}" in shown
