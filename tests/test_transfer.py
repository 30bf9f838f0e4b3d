"""What goes to a device, and how."""

from typing import Any

import pytest
import torch
import waiting

from mlseg.hypergradients.trajectory import Keeps, Trajectory
from mlseg.transfer import state_to_device, to_device

SETTINGS: dict[str, dict[str, Any]] = {
    "cpu": {"fused": None, "capturable": False},
    "meta": {"fused": True},
    "meta, capturable": {"capturable": True},
}
"""Where ``step`` belongs, with the settings of a group that say so."""


@pytest.mark.parametrize("where", SETTINGS)
def test_steps_are_counted_where_the_optimizer_does(where: str) -> None:
    group, count = SETTINGS[where], torch.tensor(3.0)
    found = state_to_device("step", count, group, "meta").device.type
    assert found == where.split(",")[0]
    assert state_to_device("exp_avg", count, group, "meta").device.type == "meta"


@pytest.mark.parametrize("fused", [False, True])
def test_so_they_are_in_recorded_steps_that_are_restored(fused: bool) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight], 0.1, fused=fused)
    weight.grad = torch.ones(2)
    optimizer.step()
    recorded = Trajectory(Keeps(steps=1, moments=True))
    recorded.begin([weight], optimizer)
    recorded.see(None, None)
    recorded.end([weight], clipped_later=False)
    restored = Trajectory(Keeps(steps=1, moments=True))
    restored.load_state_dict(recorded.state_dict(), "meta")
    (moments,) = restored.steps[0].moments
    devices = {key: value.device.type for key, value in moments.items()}
    assert devices == {"step": "meta" if fused else "cpu", "exp_avg": "meta", "exp_avg_sq": "meta"}


@waiting.needs_gpu
def test_to_a_gpu_nothing_waits() -> None:
    for tensor in (torch.arange(6).view(2, 3).T, torch.empty(0), torch.tensor(2.0)):
        with waiting.forbidden():
            found = to_device(tensor, "cuda")
        assert torch.equal(found.cpu(), tensor)
        assert to_device(found, "cuda") is found
