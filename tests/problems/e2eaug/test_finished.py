"""Finished generators, made again of their file: every one, and no stranger's code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from e2eaug_generators import GENERATORS
from torch import Tensor, nn

from mlseg import checkpoint
from mlseg.config.registry import strangers
from mlseg.errors import UserError
from mlseg.problems.e2eaug import exporting
from mlseg.problems.e2eaug.networks import pix2pix
from mlseg.problems.e2eaug.networks.finished import finished
from mlseg.problems.e2eaug.networks.generator import GENERATORS as NETWORKS
from mlseg.segmentation import exporting as files

WAYS = {"cells": {}, "rich": {"candidates": "rich"}, "none": {"search": "none"}}


def saved(path: Path, name: str, way: str, **more: Any) -> nn.Module:
    """A finished generator as a run writes it."""
    torch.manual_seed(0)
    settings = {k: v for k, v in GENERATORS[name]["generator"].items() if k != "name"}
    cls: Any = NETWORKS.get(name)
    made = cls(1, 3, 32, **{**settings, **WAYS[way], **more})
    # A pass in training: statistics as a run has them.
    weights = torch.rand(made.num_cells, len(made.candidates)) if made.num_cells else None
    made(torch.ones(2, 1, 32, 32), weights)
    plain: Any = made.merged(weights)
    state = {"name": name, "settings": plain.settings(), "module": plain.state_dict()}
    checkpoint.save(path, state)
    evaluating: nn.Module = plain.eval()
    return evaluating


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", GENERATORS)
def test_every_generator_is_what_it_was(name: str, way: str, tmp_path: Path) -> None:
    path = tmp_path / "generator.pt"
    plain = saved(path, name, way)
    before = torch.get_rng_state()
    again = finished(path, 1, 3).eval()
    assert torch.equal(torch.get_rng_state(), before)
    label = torch.ones(2, 1, 32, 32)
    label[:, :, 4:20, 8:30] = -1
    with torch.no_grad():
        assert torch.equal(again(label), plain(label))


def test_every_registered_generator_can_be_made_again() -> None:
    assert set(NETWORKS.registered()) == set(GENERATORS)
    for cls in NETWORKS.registered().values():
        assert cls.plain is not None


def test_a_file_without_a_name_is_of_pix2pix(tmp_path: Path) -> None:
    """As runs wrote them when there was no other."""
    path = tmp_path / "generator.pt"
    saved(path, "pix2pix", "cells")
    state = checkpoint.load(path)
    del state["name"]
    checkpoint.save(path, state)
    assert isinstance(finished(path, 1, 3), pix2pix.Generator)


def _with(**settings: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: state["settings"].update(settings)


def _module(name: str, change: Callable[[Tensor], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda state: state["module"].update({name: change(state["module"][name])})


DAMAGE = {
    "a deep one": ("pix2pix", "cells", _with(levels=10**9)),
    "a wide one": ("pix2pix", "cells", _with(channels=10**12)),
    "a wide one of what is known": ("spade", "cells", _with(channels=2**16)),
    "kernels": ("pix2pix", "cells", _with(kernels=[4])),
    "odd kernels": ("pix2pix", "cells", _with(kernels=[5] * 6)),
    "dropout": ("pix2pix", "cells", _with(dropout=2.0)),
    "words": ("asapnet", "cells", _with(channels="many")),
    "another key": ("asapnet", "rich", _with(colour="red")),
    "an image of no size": ("pix2pix", "rich", _with(image_size=[0, 0])),
    "tiles": ("asapnet", "rich", _with(image_size=[10**9, 10**9])),
    "other data": ("spade", "none", lambda state: state["module"].clear()),
    "no settings": ("spade", "none", lambda state: state.pop("settings")),
    "settings of a list": ("spade", "none", lambda state: state.update(settings=[1])),
    "no such generator": ("spade", "none", lambda state: state.update(name="spase")),
    "code": ("spade", "none", lambda state: state.update(name="os:system")),
    "a number": ("spade", "none", lambda state: state.update(name=3)),
    "NaN": ("spade", "rich", _module("weights", lambda t: t * float("nan"))),
    "weights of a list": ("spade", "rich", _module("weights", lambda t: [1])),
    "whole numbers": ("spade", "rich", _module("weights", lambda t: t.long())),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_strangers_file_is_data(what: str, tmp_path: Path) -> None:
    name, way, damage = DAMAGE[what]
    path = tmp_path / "generator.pt"
    saved(path, name, way)
    state = checkpoint.load(path)
    damage(state)
    checkpoint.save(path, state)
    with strangers(trusted=False), pytest.raises(UserError) as caught:
        finished(path, 1, 3)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_one_of_other_data(tmp_path: Path) -> None:
    path = tmp_path / "generator.pt"
    saved(path, "asapnet", "none")
    with pytest.raises(UserError, match="makes 3 channels of 1, and the run's data have 3 and 4"):
        finished(path, 4, 3)


class Mine(pix2pix.SearchableGenerator):
    """A user's own, which says nothing of what it becomes."""

    plain = None  # type: ignore[assignment]


def test_a_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "generator.pt"
    before = saved(path, "pix2pix", "cells")
    state = checkpoint.load(path)
    checkpoint.save(path, {**state, "name": f"{__name__}:Mine"})
    with pytest.raises(UserError, match="give its class the attribute plain"):
        finished(path, 1, 3)
    monkeypatch.setattr(Mine, "plain", pix2pix.Generator)
    label = torch.ones(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(finished(path, 1, 3).eval()(label), before(label))
    with strangers(trusted=False), pytest.raises(UserError, match="--trust"):
        finished(path, 1, 3)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "torchscript"])
@pytest.mark.parametrize(
    ("name", "way"), [("spade", "cells"), ("asapnet", "none"), ("pix2pix", "rich")]
)
def test_others_can_be_exported(form: str, name: str, way: str, tmp_path: Path) -> None:
    """With the number of masks open."""
    files.require(form)
    path = tmp_path / "generator.pt"
    saved(path, name, way)
    made = exporting.Images(finished(path, 1, 3), 2).eval()
    masks = [torch.randint(2, (n, 32, 32), dtype=torch.uint8) for n in (2, 1, 3)]
    thing = files.Exportable(
        module=made,
        input="mask",
        outputs=["image"],
        open={0: "batch"},
        examples=masks,
        expected=[exporting.ran(made, mask) for mask in masks],
        facts={},
        state={},
        again=lambda file: lambda mask: mask,
    )
    about = files.write(thing, form, tmp_path / "file", tmp_path)
    assert about["checked"]["largest_difference"] <= 1e-5
