"""The README's program runs as it stands there."""

import re
from pathlib import Path

import torch

README = Path(__file__).parent.parent / "README.md"


def test_the_program_learns_to_reweight() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {"__name__": "readme"}
    exec(compile(block.replace("iterations=500", "iterations=200"), str(README), "exec"), names)
    net, x, y = names["net"], names["x"], names["y"]
    assert isinstance(net, torch.nn.Module)
    assert isinstance(x, torch.Tensor)
    assert isinstance(y, torch.Tensor)
    assert (net(x[100:]).argmax(1) == y[100:]).float().mean() > 0.75
    # The upper level tells right labels from wrong ones: it has moved, and it weighs them apart.
    small = names["small"]
    assert isinstance(small, torch.nn.Module)
    right = torch.cat([x[:100], torch.nn.functional.one_hot(y[:100], 2)], 1)
    wrong = torch.cat([x[:100], torch.nn.functional.one_hot(1 - y[:100], 2)], 1)
    assert small(right).mean() != small(wrong).mean()
