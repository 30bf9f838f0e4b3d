"""The notebooks run from top to bottom, in a kernel of their own, and hold no outputs."""

from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

pytestmark = pytest.mark.slow  # trains for seconds

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def said(cell: Any) -> str:
    """What a cell has printed on standard output."""
    return "".join(o["text"] for o in cell["outputs"] if o.get("name") == "stdout")


@pytest.fixture
def ran(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A notebook's cells after they ran, as a user without data has them."""
    monkeypatch.setenv("MLSEG_DATA", "")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = read(EXAMPLES / f"{request.param}.ipynb")
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(EXAMPLES)}}
    ).execute()
    return notebook["cells"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_outputs_are_kept(path: Path) -> None:
    cells = [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)


@pytest.mark.parametrize("ran", ["quick_start"], indirect=True)
def test_quick_start(ran: Any) -> None:
    text = "".join(said(cell) for cell in ran if cell["cell_type"] == "code")
    assert "synthetic data" in text
    accuracy = float(text.rpartition("accuracy on clean examples ")[2])
    assert accuracy > 0.85, "the second level mends what mislabelled examples do"


@pytest.mark.parametrize("ran", ["comparing_hypergradients"], indirect=True)
def test_comparing_hypergradients(ran: Any) -> None:
    shown = [o for cell in ran if cell["cell_type"] == "code" for o in cell["outputs"]]
    kinds = {kind for output in shown for kind in output.get("data", {})}
    assert {"text/html", "image/png", "text/markdown"} <= kinds
