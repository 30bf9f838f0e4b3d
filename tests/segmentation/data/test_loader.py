import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import waiting

from mlseg.errors import UserError
from mlseg.segmentation.data import (
    Augmentation,
    AugmentationSettings,
    BatchLoader,
    Samples,
    to_float,
    to_uint8,
)


def which(image: torch.Tensor) -> list[int]:
    """Numbers of the examples in a batch of the fixture `samples`."""
    return (to_uint8(image)[:, 0, 0, 0] // 20).tolist()


def test_range_and_types(samples: Samples) -> None:
    image, mask = next(iter(BatchLoader(samples, 4, shuffle=False)))
    assert image.shape == (4, 3, 8, 6)
    assert image.dtype == torch.float32
    assert mask.shape == (4, 8, 6)
    assert mask.dtype == torch.int64
    everything = torch.arange(256, dtype=torch.uint8)
    low, high = to_float(everything).aminmax()
    assert (low.item(), high.item()) == (-1.0, 1.0)
    assert torch.equal(to_uint8(to_float(everything)), everything)


def test_an_epoch_gives_each_example_once_with_its_own_mask(samples: Samples) -> None:
    loader = BatchLoader(samples, 5, seed=1)
    seen = []
    for image, mask in loader:
        numbers = which(image)
        assert mask[:, 0, 0].tolist() == [number % 2 for number in numbers]
        seen += numbers
    assert sorted(seen) == list(range(10))
    again = [number for image, _ in loader for number in which(image)]
    assert sorted(again) == list(range(10))
    assert again != seen
    assert loader.epoch == 2


@pytest.mark.parametrize(
    ("batch", "shuffle", "sizes"),
    [(4, True, [4, 4]), (4, False, [4, 4, 2]), (5, True, [5, 5]), (64, True, [10]), (1, True, 10)],
)
def test_batch_sizes(samples: Samples, batch: int, shuffle: bool, sizes: list[int] | int) -> None:
    loader = BatchLoader(samples, batch, shuffle=shuffle)
    found = [len(mask) for _, mask in loader]
    assert found == (sizes if isinstance(sizes, list) else [1] * sizes)
    assert len(loader) == len(found)


def test_without_shuffling_the_order_is_that_of_the_samples(samples: Samples) -> None:
    loader = BatchLoader(samples, 3, shuffle=False)
    for _ in range(2):
        assert [number for image, _ in loader for number in which(image)] == list(range(10))


@pytest.mark.parametrize("taken", [0, 1, 2, 3, 4])
def test_resumes_exactly_wherever_it_was_stopped(samples: Samples, taken: int) -> None:
    def loader(seed: int) -> BatchLoader:
        augmentation = Augmentation(AugmentationSettings(rotate=90, brightness=0.3))
        return BatchLoader(samples, 4, seed=seed, augmentation=augmentation)

    def endless(batches: BatchLoader) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield from batches

    first = loader(0)
    stream = endless(first)
    for _ in range(taken):
        next(stream)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    expected = [next(stream) for _ in range(5)]

    buffer.seek(0)
    resumed = loader(99)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    for (image, mask), (image_2, mask_2) in zip(expected, endless(resumed), strict=False):
        assert torch.equal(image, image_2)
        assert torch.equal(mask, mask_2)


def test_state_of_other_data_is_refused(samples: Samples) -> None:
    state = BatchLoader(samples, 4).state_dict()
    with pytest.raises(UserError, match="examples = 10, this run has 3"):
        BatchLoader(samples.subset(range(3)), 3).load_state_dict(state)
    with pytest.raises(UserError, match="batch_size = 4, this run has 5"):
        BatchLoader(samples, 5).load_state_dict(state)


def test_other_random_numbers_do_not_matter(samples: Samples) -> None:
    first = [which(image) for image, _ in BatchLoader(samples, 2, seed=3)]
    torch.manual_seed(1234)
    second = []
    for image, _ in BatchLoader(samples, 2, seed=3):
        torch.rand(5)
        second.append(which(image))
    assert first == second


def test_the_samples_stay_as_they_are(samples: Samples) -> None:
    before = samples.images.clone()
    for image, mask in BatchLoader(samples, 4):
        image.zero_()
        mask.zero_()
    assert torch.equal(samples.images, before)


def test_memory_mapped_samples_give_the_same_batches(samples: Samples, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", samples.images.numpy())
    mapped = Samples(
        samples.ids,
        torch.from_numpy(np.load(tmp_path / "images.npy", mmap_mode="c")),
        samples.masks,
        samples.spec,
        mapped=True,
    )
    for (image, mask), (image_2, mask_2) in zip(
        BatchLoader(samples, 3), BatchLoader(mapped, 3), strict=True
    ):
        assert torch.equal(image, image_2)
        assert torch.equal(mask, mask_2)


def test_no_examples_and_no_batch(samples: Samples) -> None:
    with pytest.raises(UserError, match="no examples"):
        BatchLoader(samples.subset([]), 2)
    with pytest.raises(UserError, match="at least 1"):
        BatchLoader(samples, 0)


@waiting.needs_gpu
@pytest.mark.parametrize("mapped", [False, True])
def test_on_cuda_batches_are_the_same_and_nothing_waits(samples: Samples, mapped: bool) -> None:
    samples = Samples(samples.ids, samples.images, samples.masks, samples.spec, mapped)
    settings = AugmentationSettings.model_validate({"preset": "genseg", "hue": 0.1})
    augmentation = Augmentation(settings)
    expected = list(BatchLoader(samples, 4, augmentation=augmentation))
    loader = BatchLoader(samples, 4, "cuda", augmentation=augmentation)
    samples.on(torch.device("cuda"))  # the one copy of the whole set may wait
    with waiting.forbidden():
        found = list(loader)
    for (image, mask), (image_2, mask_2) in zip(expected, found, strict=True):
        assert (image - image_2.cpu()).abs().max() < 1e-3
        assert (mask != mask_2.cpu()).float().mean() < 0.02  # a nearest pixel may tip over
