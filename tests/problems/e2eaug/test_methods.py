"""Every hypergradient method in E2EAug, by config alone."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from mlseg import config, run
from mlseg.hypergradients import names
from mlseg.problems.systems import parse_run

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {
    "gan.pretrain": 0,
    "data.image_size": 16,
    "segmentor": {"name": "unet", "channels": 1, "levels": 1},
    "generator": {"channels": 2, "levels": 2},
    "discriminator": {"channels": 2, "layers": 1},
}
# Methods whose cost grows with the parameters of a level, or of its sources, take one hop only:
# the segmentor's own parameters are few here, and only the alphas are behind the generator.
PLACES = {"exact": ["segmentor"], "forward": ["generator"]}


@pytest.mark.parametrize("method", names())
def test_by_config(method: str) -> None:
    """The alphas' gradient is finite, comes through both levels, and is told of in the log."""
    places = PLACES.get(method, ["segmentor", "generator"])
    changes = {f"problems.{name}.hypergradient": {"method": method} for name in places}
    engine = tiny.build("e2eaug", {**SMALL, **changes})
    gradients: list[Any] = []
    tiny.gradients_of(engine.architecture, gradients)
    engine.iterate()
    engine.iterate()
    ((alphas,),) = gradients[-1:]
    assert alphas.isfinite().all()
    assert alphas.norm() > 0
    figures = engine.architecture.metrics
    for name in places:
        assert float(figures[f"hypergradient/via_{name}"]) > 0
        assert figures[f"hypergradient/{name}_evaluations"] > 0
        assert float(figures[f"hypergradient/{name}_seconds"]) > 0
    assert not torch.equal(alphas, torch.zeros_like(alphas))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            ["hypergradient.method=cg", "hypergradient.epsilon=0.1"],
            "gradient.epsilon: unknown key",
        ),
        (["hypergradient.method=cgg"], "did you mean 'cg'?"),
        (
            ["hypergradient={method: cg, iterations: 0}"],
            "should be greater than 0",
        ),
        (["hypergradient=exact"], "exact takes up to 4096: raise its limit"),
        (["hypergradient=forward"], "forward takes up to 64: raise its limit"),
    ],
)
def test_what_doesnt_belong_is_refused_before_any_work(
    override: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny.write_config(tmp_path / "c.yaml", "e2eaug", {"segmentor.channels": 8})
    overrides = [f"problems.segmentor.{o}" for o in override]
    code = run.main([str(path), *overrides, "--out", str(tmp_path / "run")])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert code == 2
    assert words in line
    assert "segmentor" in line
    assert not (tmp_path / "run").exists()


def test_the_resolved_config_has_the_methods_settings(tmp_path: Path) -> None:
    """So that a resumed run uses the same."""
    method = {"method": "unrolled", "steps": 1, "mode": "forward_over_reverse"}
    path = tiny.write_config(
        tmp_path / "c.yaml", "e2eaug", {**SMALL, "problems.segmentor.hypergradient": method}
    )
    assert run.main([str(path), "engine.iterations=1", "--out", str(tmp_path / "run")]) == 0
    tree = config.load(tmp_path / "run" / "config.yaml")
    written = tree.values["problems"]["segmentor"]["hypergradient"]
    assert {k: written[k] for k in method} == method
    settings: Any = parse_run(tree)[0]
    assert settings.problems.segmentor.hypergradient.steps == 1
