"""A page in a real browser, where there is one."""

from pathlib import Path

import browser
import numpy as np
import pytest
import tiny
from PIL import Image

from mlseg import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.program() is None, reason="needs Chromium"),
]

COLUMN = """[...document.querySelectorAll("table.sortable")]
    .find(t => t.caption.textContent.startsWith("Images of"))"""
VALUES = f"[...{COLUMN}.tBodies[0].rows].map(r => Number(r.cells[1].dataset.value))"
PRESS = f"{COLUMN}.tHead.rows[0].cells[1].querySelector('button').click()"
SORTED = f"{COLUMN}.tHead.rows[0].cells[1].getAttribute('aria-sort')"


def test_a_page_is_shown_and_its_tables_are_sorted(tmp_path: Path) -> None:
    config, out = tiny.write_config(tmp_path / "tiny.yaml"), tmp_path / "run"
    assert run.main([str(config), "--out", str(out)]) == 0
    grounds = {}

    async def visit(tab: browser.Tab) -> None:
        for width in (400, 1600):
            for dark in (False, True):
                await tab.open(out / "report.html", width, 900, dark)
                assert await tab.run("document.documentElement.scrollWidth") == width
                assert await tab.run("[...document.images].every(i => i.naturalWidth > 100)")
                before = await tab.run(VALUES)
                await tab.run(PRESS)
                assert await tab.run(SORTED) == "ascending"
                assert await tab.run(VALUES) == sorted(before)
                await tab.run(PRESS)
                assert await tab.run(SORTED) == "descending"
                assert await tab.run(VALUES) == sorted(before, reverse=True)
                shot = tmp_path / f"{width}_{dark}.png"
                await tab.shoot(shot)
                grounds[width, dark] = np.asarray(Image.open(shot))[2, 2, :3].mean()
        assert tab.errors == []
        assert set(tab.requests) == {(out / "report.html").as_uri()}

    browser.browse(visit, tmp_path)
    assert all((ground < 64) == dark for (_, dark), ground in grounds.items())
