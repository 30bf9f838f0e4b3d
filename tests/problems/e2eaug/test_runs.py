"""E2EAug as a user runs it: what it leaves, what it says, and which mistakes it names."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import commanding
import pytest
import tiny
import torch
from commanding import one_line
from e2eaug_generators import GENERATORS, OTHERS

from mlseg import checkpoint, run
from mlseg.errors import RunError
from mlseg.problems.e2eaug.networks import asapnet, spade

pytestmark = pytest.mark.slow


train = partial(commanding.train, system="e2eaug")


def test_a_run_leaves_gan_pairs_and_architecture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = train(tmp_path)
    for name in ("last", "best", "gan", "generator"):
        assert (out / "checkpoints" / f"{name}.pt").exists(), name
    pictures = {p.name.partition("_")[0] for p in (out / "samples").iterdir()}
    assert pictures == {"validation", "synthetic"}
    architecture = json.loads((out / "architecture.json").read_text())
    assert len(architecture["cells"]) == len(architecture["choice"]) == 6
    assert [entry["step"] for entry in architecture["history"]] == [0, 5, 7]
    assert min(max(row) for row in architecture["moved"]) > 0, "every cell's weights have moved"
    assert json.loads((out / "results.json").read_text())["steps"] == 7
    assert "encoder.0" in capsys.readouterr().out


@pytest.mark.parametrize("generator", GENERATORS)
def test_a_dry_run_shows_the_path_of_each_hypergradient(
    generator: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.write_config(tmp_path / "tiny.yaml", "e2eaug", GENERATORS[generator])
    assert run.main([str(config), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "architecture → segmentor → generator → architecture" in said
    assert "stage pretraining, 3 iterations" in said
    assert "not counted" not in said


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("gan.pretrained=nowhere.pt", "nowhere.pt"),
        ("discriminator.layers=5", "discriminator.layers"),
        ("generator.search=none", "no architecture to learn"),
        ("augmentation.window=16", "the generator makes images of one size"),
        ("data.val=0", "data.val"),
        ("generator={name: spade, levels: 6}", "generator.levels: spade with 6"),
        ("generator={name: asapnet, grid: 5}", "generator.grid"),
        ("generator={name: spde}", "did you mean 'spade'?"),
        ("generator={name: spade, dropout: 0.5}", "generator.dropout: unknown key"),
        ("generator={name: spade, channels: 0}", "generator.channels"),
        ("architecture={mode: frozen, choice: 5-2-1}", "architecture.choice: no candidate '5-2-1'"),
        ("architecture.choice=4-2-1", "architecture.choice: goes with"),
        ("architecture.draw=1", "architecture.draw: goes with"),
        ("level3={guidance: -1}", "level3.guidance"),
        ("level3={guidance: 1, guidance_steps: 0}", "level3.guidance_steps"),
        ("level3={guidance_steps: 5}", "level3.guidance_steps: goes with"),
        ("level3={mask_augmentation: true, mask_temperature: 0}", "level3.mask_temperature"),
        ("generator.candidates=poor", "generator.candidates"),
        ("gan.feature_matching=10", "gan.feature_matching: patchgan gives no features"),
        (
            "discriminator={name: multiscale, scales: 6}",
            "discriminator.scales: 6 need images of 64",
        ),
    ],
)
def test_mistakes_are_one_line(
    override: str, names: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.write_config(tmp_path / "tiny.yaml", "e2eaug")
    out = tmp_path / "run"
    assert run.main([str(config), override, "--out", str(out)]) == 2
    assert names in one_line(capsys)
    assert not out.exists(), "nothing was done"


@pytest.mark.parametrize(
    "setting",
    ["level3.guidance=1", "level3.synthetic_weight=true", "level3.mask_augmentation=true"],
)
@pytest.mark.parametrize(
    "without", ["synthetic_weight=0", "gan.frozen=true", "architecture.mode=random"]
)
def test_nothing_is_learned_at_level_three_where_there_is_none(
    setting: str, without: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.write_config(tmp_path / "tiny.yaml", "e2eaug")
    assert run.main([str(config), setting, without, "--out", str(tmp_path / "run")]) == 2
    assert setting.partition("=")[0] in one_line(capsys)


@pytest.mark.parametrize("generator", OTHERS)
def test_other_generators_on_real_images(
    generator: str, real: Callable[[str], Path], tmp_path: Path
) -> None:
    root = real("isic2018")
    data = {"name": "isic2018", "root": str(root), "image_size": 32}
    changes = {**GENERATORS[generator], "engine.samples": 1, "gan.perceptual": "random"}
    changes["data"] = {**data, "train": 6, "val": 4, "test": 3, "when_missing": "error"}
    config = tiny.write_config(tmp_path / "c.yaml", "e2eaug", changes)
    out = tmp_path / "run"
    assert run.main([str(config), "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert 0 <= results["scores"]["last"]["test"]["jaccard"] <= 1
    record = json.loads((out / "architecture.json").read_text())
    assert all(m > 0 for row in record["moved"] for m in row)
    saved = checkpoint.load(out / "checkpoints" / "generator.pt")
    assert saved["name"] == generator
    plain = {"spade": spade, "asapnet": asapnet}[generator].Generator(**saved["settings"])
    plain.load_state_dict(saved["module"])


def test_lambda_zero_trains_no_gan(tmp_path: Path) -> None:
    out = train(tmp_path, "synthetic_weight=0")
    assert json.loads((out / "results.json").read_text())["steps"] == 4
    assert not (out / "checkpoints" / "gan.pt").exists()


def test_best_holds_the_segmentor_alone(tmp_path: Path) -> None:
    out = train(tmp_path)
    state = checkpoint.load(out / "checkpoints" / "best.pt")
    assert list(state["problems"]) == ["segmentor"]
    assert list(state["problems"]["segmentor"]) == ["module"]
    everything = checkpoint.load(out / "checkpoints" / "last.pt")
    names = {"generator", "discriminator", "segmentor", "architecture"}
    assert set(everything["problems"]) == names


def test_a_nan_in_pretraining_ends_before_the_next_stage(tmp_path: Path) -> None:
    made = tiny.build("e2eaug", {"gan.pretrain_lr": 1e30, "engine.log_every": 100}, tmp_path)
    with pytest.raises(RunError, match=r"'(generator|discriminator)'"):
        made.run()
    assert not (tmp_path / "checkpoints" / "gan.pt").exists()


def test_a_damaged_gan_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever of it is damaged; nothing of the other network stays as it was made."""
    whole = train(tmp_path) / "checkpoints" / "gan.pt"
    capsys.readouterr()
    state = checkpoint.load(whole)
    state.pop("format", None)
    generator, shape = dict(state["generator"]), dict(state["shape"])
    name = next(name for name, tensor in generator.items() if tensor.is_floating_point())
    endless = {**generator, name: torch.full_like(generator[name], torch.nan)}
    other = {**shape, "generator": {"name": "spade"}}
    cases = {
        "'generator' is missing": {k: v for k, v in state.items() if k != "generator"},
        "'discriminator' is missing": {k: v for k, v in state.items() if k != "discriminator"},
        f"{name} is not finite": {**state, "generator": endless},
        "loading state_dict": {
            **state,
            "generator": {k: v for k, v in generator.items() if k != name},
        },
        "has generator {'name': 'spade'": {**state, "shape": other},
        "doesn't fit the checkpoint": {**state, "shape": 3},
        "is no GAN": {k: v for k, v in state.items() if k != "shape"},
    }
    path = tmp_path / "gan.pt"
    config = str(tmp_path / "tiny.yaml")
    for words, content in cases.items():
        checkpoint.save(path, content)
        out = tmp_path / "again"
        assert run.main([config, f"gan.pretrained={path}", "--out", str(out)]) == 2, words
        said = one_line(capsys)
        assert said.startswith(f"error: gan.pretrained: {path}"), said
        assert words in said, said
        assert not out.exists()
    damaged = bytearray(whole.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    for data in (bytes(damaged), whole.read_bytes()[:1000], b""):
        path.write_bytes(data)
        assert run.main([config, f"gan.pretrained={path}", "--out", str(out)]) == 2
        assert f"gan.pretrained: {path}: truncated or not a checkpoint" in one_line(capsys)


def test_another_generator_is_no_run_that_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = train(tmp_path)
    capsys.readouterr()
    before = (out / "checkpoints" / "last.pt").read_bytes()
    for override in ("generator={name: spade}", "gan.perceptual=random", "level3.guidance=1"):
        assert run.main(["--resume", str(out), override]) == 2
        assert override.partition("=")[0] in one_line(capsys)
    assert (out / "checkpoints" / "last.pt").read_bytes() == before
