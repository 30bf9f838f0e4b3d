"""What goes to a device, and how."""

import torch
import waiting

from mlseg.transfer import to_device


@waiting.needs_gpu
def test_to_a_gpu_nothing_waits() -> None:
    for tensor in (torch.arange(6).view(2, 3).T, torch.empty(0), torch.tensor(2.0)):
        with waiting.forbidden():
            found = to_device(tensor, "cuda")
        assert torch.equal(found.cpu(), tensor)
        assert to_device(found, "cuda") is found
