"""The README's program runs as it stands there, and its upper level is worth having."""

import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional

pytestmark = pytest.mark.slow  # trains for seconds

README = Path(__file__).parent.parent / "README.md"


def test_the_program_learns_to_weigh_its_examples() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [found for found in blocks if "Engine(" in found]
    names: dict[str, object] = {"__name__": "readme"}
    exec(compile(block, str(README), "exec"), names)
    net, x, y, noisy = names["net"], names["x"], names["y"], names["noisy"]
    assert isinstance(net, torch.nn.Module)
    assert isinstance(x, torch.Tensor)
    assert isinstance(y, torch.Tensor)
    assert isinstance(noisy, torch.Tensor)

    plain = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(plain.parameters(), lr=1.0)
    for _ in range(500):
        optimizer.zero_grad()
        functional.cross_entropy(plain(x[:100]), noisy).backward()
        optimizer.step()

    def accuracy(model: torch.nn.Module) -> float:
        where = next(model.parameters()).device  # the engine's: a GPU, if there is one
        return float((model(x[100:].to(where)).argmax(1).cpu() == y[100:]).float().mean())

    assert accuracy(net) > 0.85
    assert accuracy(plain) < 0.65
