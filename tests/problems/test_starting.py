"""Runs that start from weights of others: what is said, what is kept, what a resumed run needs."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from commanding import one_line

from mlseg import evaluate, run
from mlseg.checkpoint import load
from mlseg.errors import UserError
from mlseg.problems.load.settings import LoadSettings

WIDE = {"segmentor": {"name": "unet", "channels": 6, "levels": 1}, "engine.samples": 0}


def command(tmp_path: Path, out: str, *overrides: str) -> int:
    config = tiny.write_config(tmp_path / "tiny.yaml", changes=WIDE)
    return run.main([str(config), *overrides, "--out", str(tmp_path / out)])


def test_from_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(tmp_path, "first") == 0
    first = load(tmp_path / "first/checkpoints/best.pt")["problems"]["segmentor"]["module"]
    capsys.readouterr()
    more = [f"segmentor.weights={tmp_path / 'first'}", "segmentor.normalise=none"]
    rate = "problems.segmentor.optimizer={name: sgd, lr: 1.0e-20}"  # it stays where it starts
    assert command(tmp_path, "second", *more, rate, "seed=8") == 0
    said = capsys.readouterr()
    assert said.err.count("Starts from") == 1 + 1  # at the start and at the end
    second = load(tmp_path / "second/checkpoints/best.pt")["problems"]["segmentor"]["module"]
    names = [name for name, _ in tiny.build("supervised", WIDE).segmentor.module.named_parameters()]
    assert all(torch.equal(first[name], second[name]) for name in names)
    results = json.loads((tmp_path / "second/results.json").read_text())
    (begun,) = results["started_from"].values()
    assert begun["loaded"] == begun["tensors"] > len(names)
    assert (begun["new"], begun["unused"]) == ([], [])
    # Neither going on nor evaluating asks for the file.
    (tmp_path / "first").rename(tmp_path / "gone")
    assert evaluate.main([str(tmp_path / "second")]) == 0
    assert run.main(["--resume", str(tmp_path / "second"), "engine.iterations=6"]) == 0
    after = json.loads((tmp_path / "second/results.json").read_text())
    assert (after["steps"], after["started_from"]) == (6, results["started_from"])
    capsys.readouterr()
    assert command(tmp_path, "third", *more) == 2
    assert "segmentor.weights" in one_line(capsys)


def test_a_run_that_saw_other_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(tmp_path, "first") == 0
    capsys.readouterr()
    assert command(tmp_path, "second", f"segmentor.weights={tmp_path / 'first'}") == 2
    assert "set normalise to none" in one_line(capsys)


@pytest.mark.parametrize("system", ["supervised", "segan", "e2eaug", "load", "semi_supervised"])
def test_every_system_starts_from_them(tmp_path: Path, system: str) -> None:
    """Without a step taken, its segmentor has the weights that were named."""
    plain = tiny.build(system)
    module = next(p.module for p in plain.problems if p.name in ("segmentor", "generator"))
    if system == "e2eaug":
        module = plain.segmentor.module
    given = module.state_dict()
    given |= {name: p.detach() + 0.25 for name, p in module.named_parameters()}
    torch.save(given, tmp_path / "weights.pt")
    engine = tiny.build(
        system, {"segmentor.weights": str(tmp_path / "weights.pt"), "segmentor.normalise": "unit"}
    )
    problem = engine.generator if system == "load" else engine.segmentor
    found = problem.module.state_dict()
    assert all(torch.equal(found[name], given[name]) for name, _ in module.named_parameters())
    image = torch.rand(2, 3, 32, 32)
    module.load_state_dict(given)
    with torch.no_grad():
        torch.testing.assert_close(
            problem.module.eval()(image * 2 - 1), module.eval()(image), rtol=1e-4, atol=1e-5
        )
    assert any("Starts from" in line for line in engine.notices)


def test_load_has_one_start() -> None:
    values = tiny.values("load", {"start": "a.pt", "segmentor.weights": "b.pt"})
    with pytest.raises((UserError, ValueError), match="start: it brings all weights"):
        LoadSettings.model_validate(values)


def test_a_directory_of_the_user_is_his_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    module = tiny.build("supervised").segmentor.module
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    engine = tiny.build("supervised", {"segmentor.weights": "~/weights.pt"})
    assert tiny.same(
        dict(engine.segmentor.module.named_parameters()), dict(module.named_parameters())
    )


def test_a_second_network_has_weights_of_its_own(tmp_path: Path) -> None:
    """The partner's are said, are no business of the segmentor's, and a resumed run needs none."""
    network = {"name": "unet", "channels": 4, "levels": 2}
    changes: dict[str, object] = {"method": "dct", "partner": network}
    plain = tiny.build("semi_supervised", changes)
    given = dict(plain.partner.module.state_dict())
    given |= {name: p.detach() + 0.25 for name, p in plain.partner.module.named_parameters()}
    path = tmp_path / "weights.pt"
    torch.save(given, path)
    changes["partner"] = {**network, "weights": str(path), "normalise": "none"}
    out = tmp_path / "run"
    config = tiny.write_config(tmp_path / "c.yaml", "semi_supervised", changes)
    engine = tiny.build("semi_supervised", changes)
    assert tiny.same(dict(engine.partner.module.state_dict()), given)
    assert tiny.same(
        dict(engine.segmentor.module.state_dict()), dict(plain.segmentor.module.state_dict())
    )
    assert run.main([str(config), "--out", str(out)]) == 0
    path.unlink()
    assert run.main(["--resume", str(out), "engine.iterations=6"]) == 0
    begun = json.loads((out / "results.json").read_text())["started_from"]
    assert list(begun) == ["partner"]
    assert begun["partner"]["loaded"] == begun["partner"]["tensors"]


def test_a_second_network_names_its_own_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    partner = {"name": "unet", "channels": 4, "levels": 2, "weights": "missing.pt"}
    changes = {"method": "dct", "partner": partner}
    config = tiny.write_config(tmp_path / "c.yaml", "semi_supervised", changes)
    assert run.main([str(config), "--out", str(tmp_path / "run")]) == 2
    assert "partner.weights: missing.pt: no such file" in one_line(capsys)
