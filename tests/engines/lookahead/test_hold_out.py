"""The mIoU after every update: the same as the final scores', at one synchronisation."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlseg.engines.lookahead.hold_out import HoldOut, hold_out_indices, require_every_class
from mlseg.errors import UserError
from mlseg.segmentation.data import DatasetSpec, Samples, synthetic_scenes, to_float
from mlseg.segmentation.metrics import SegmentationMetrics

CLASSES = ("sky", "building", "road", "tree", "car")
CPU = torch.device("cpu")


def samples(ignore: int | None, count: int = 7) -> Samples:
    spec = DatasetSpec("scenes", 3, CLASSES, ignore, palette=((0, 0, 0),) * 5)
    images, masks = synthetic_scenes(range(count), (24, 32), CLASSES, ignore)
    return Samples([f"s{n}" for n in range(count)], images, masks, spec)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1))


@pytest.mark.parametrize("ignore", [None, 11, 255])
@pytest.mark.parametrize("batch", [1, 3, 7, 50])
def test_the_miou_is_that_of_the_metrics(ignore: int | None, batch: int) -> None:
    held, module = samples(ignore), network()
    metrics = SegmentationMetrics(5, ignore, CLASSES)
    module.eval()
    with torch.no_grad():
        metrics.update(module(to_float(held.images)).argmax(1), held.masks)
    found = HoldOut(held, CPU, batch).miou(module)
    assert found == pytest.approx(metrics.compute()["miou"], rel=1e-12)
    assert metrics.compute()["miou"] == pytest.approx(metrics.compute()["pooled_jaccard"])


def test_of_two_classes_the_background_is_one() -> None:
    spec = DatasetSpec("two", 3, ("background", "lesion"))
    images, masks = synthetic_scenes(range(5), (24, 32), CLASSES, None)
    held = Samples([f"s{n}" for n in range(5)], images, (masks > 1).to(torch.uint8), spec)
    torch.manual_seed(0)
    module = nn.Conv2d(3, 2, 3, padding=1).eval()
    metrics = SegmentationMetrics(2)
    with torch.no_grad():
        metrics.update(module(to_float(held.images)).argmax(1), held.masks)
    figures, found = metrics.compute(), HoldOut(held, CPU).miou(module)
    assert found == pytest.approx(figures["miou"], rel=1e-12)
    assert found == pytest.approx((figures["iou_0"] + figures["iou_1"]) / 2)
    assert found != pytest.approx(figures["pooled_jaccard"], rel=0.01)


def test_statistics_are_left_alone() -> None:
    module = network().train()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    HoldOut(samples(11), CPU).miou(module)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_one_transfer_per_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    for name in ("cpu", "item", "tolist", "__bool__", "__int__"):
        original = getattr(Tensor, name)

        def read(self: Tensor, *args: Any, _name: str = name, _original: Any = original) -> Any:
            reads.append(_name)
            return _original(self, *args)

        monkeypatch.setattr(Tensor, name, read)
    held = HoldOut(samples(11), CPU, 2)
    module = network()
    del reads[:]
    held.miou(module)
    assert reads == ["cpu"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_are_not_a_number(value: float) -> None:
    module: Any = network()
    with torch.no_grad():
        module[2].bias[1] = value
    assert HoldOut(samples(11), CPU).miou(module) != HoldOut(samples(11), CPU).miou(module)


class Greedy(nn.Module):
    """Runs out of memory for more than two images at once."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, image: Tensor) -> Tensor:
        if len(image) > 2:
            raise torch.OutOfMemoryError("too many")
        return self.inner(image)


def test_the_largest_batch_that_fits_is_found_once() -> None:
    held = HoldOut(samples(11), CPU, 7)
    held._halve = True  # as on a GPU without a given size
    module = Greedy()
    assert held.miou(module) == pytest.approx(HoldOut(samples(11), CPU).miou(module.inner))
    assert held.batch_size == 2
    given = HoldOut(samples(11), CPU, 7)
    with pytest.raises(torch.OutOfMemoryError):
        given.miou(module)


def test_maps_and_dry_runs_find_it_too() -> None:
    module, images = Greedy(), samples(11).images
    held = HoldOut(samples(11), CPU, 7)
    held._halve = True
    assert torch.equal(
        held.maps(module, images), HoldOut(samples(11), CPU).maps(module.inner, images)
    )
    assert held.batch_size == 2
    held = HoldOut(samples(11), CPU, 7)
    held._halve = True
    held.find_batch_size(module)
    assert held.batch_size == 2


def test_large_images_pass_a_few_at_once() -> None:
    assert HoldOut(samples(None, 20), CPU).batch_size == 16
    held = samples(None, 4)
    wide = [torch.zeros(4, *shape, dtype=torch.uint8) for shape in ((3, 513, 513), (513, 513))]
    large = replace(held, images=wide[0], masks=wide[1])
    assert HoldOut(large, CPU).batch_size == 3


def test_which_images() -> None:
    ids = [f"image {n}" for n in range(40)]
    some, more = (set(hold_out_indices(ids, share, 0)) for share in (0.3, 0.5))
    assert len(some) == 12
    assert some < more, "a larger share has the images of a smaller one"
    assert set(hold_out_indices(ids, 0.3, 1)) != some
    assert hold_out_indices(ids, 1.0, 0) == list(range(40))
    assert len(hold_out_indices(ids[:2], 0.1, 0)) == 1


def test_a_class_that_is_missing_is_named() -> None:
    held = samples(11, 30)
    require_every_class(held, "hold_out.fraction")
    held.masks[held.masks == 4] = 11
    with pytest.raises(UserError, match=r"hold_out\.fraction: .* no pixel of 'car'"):
        require_every_class(held, "hold_out.fraction")
    held.masks[0, 0, 0] = 9
    with pytest.raises(UserError, match="label 9 is none of the 5 classes"):
        require_every_class(held, "hold_out.fraction")
