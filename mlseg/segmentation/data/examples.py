"""All examples of a data set, decoded: two arrays, in memory or mapped from a cache."""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.progress import track

from mlseg.errors import UserError
from mlseg.segmentation.data import labels, medical
from mlseg.segmentation.data.cache import kept
from mlseg.segmentation.data.decode import image_size, read_image, read_mask
from mlseg.segmentation.data.entry import Entry, Example
from mlseg.segmentation.data.pixels import unreadable
from mlseg.segmentation.data.placement import PADDING, Fit, padded, placed
from mlseg.segmentation.data.samples import DatasetSpec, Samples

CACHE_FORMAT = 2


def decode(
    examples: Sequence[Example],
    entry: Entry,
    spec: DatasetSpec,
    size: tuple[int, int],
    cache: Path | None = None,
    fit: Fit = "stretch",
) -> Samples:
    """Decode all examples, in their order, on several threads.

    Args:
        size: (H, W) of the arrays.
        fit: how images of other shapes get there; "pad" fills them with grey, and the masks with
            the ignore index, which `spec` must have.
        cache: a folder for memory-mapped files; what is there already, was made from the same
            files and isn't damaged is used. None: in memory.

    Raises:
        UserError: a file is unreadable, image and mask differ in size, a mask has wrong values.
        RunError: the cache can't be written, as on a full disk.
    """
    ids = [example.id for example in examples]

    def native(index: int) -> torch.Tensor:
        return torch.from_numpy(_read_masks(examples[index], entry, spec, None))

    def samples(images: NDArray[np.uint8], masks: NDArray[np.uint8], mapped: bool) -> Samples:
        tensors = torch.from_numpy(images), torch.from_numpy(masks)
        return Samples(ids, *tensors, spec, mapped=mapped, fit=fit, native_mask=native)

    fill = partial(_fill, examples, entry, spec, fit)
    shapes = (len(ids), spec.channels, *size), (len(ids), *size)
    if cache is None or not ids:
        images, masks = (np.empty(shape, np.uint8) for shape in shapes)
        fill(images, masks)
        return samples(images, masks, mapped=False)
    folder = cache / f"{spec.name}-{_key(examples, entry, spec, size, fit)}"
    return samples(*kept(folder, shapes, fill), mapped=True)


def _read_masks(
    example: Example, entry: Entry, spec: DatasetSpec, size: tuple[int, int] | None
) -> NDArray[np.uint8]:
    """The union of an example's masks, at `size` or their own; background where it has none."""
    if not example.masks:
        return np.zeros(size or _native_size(example, entry), np.uint8)
    parts = [
        read_mask(path, entry.masks, spec.num_classes, spec.ignore_index, size, entry.remap)
        for path in example.masks
    ]
    return labels.union(parts, example.masks)


def _fill(
    examples: Sequence[Example],
    entry: Entry,
    spec: DatasetSpec,
    fit: Fit,
    images: NDArray[np.uint8],
    masks: NDArray[np.uint8],
) -> None:
    size = images.shape[2], images.shape[3]

    def one(position: int) -> None:
        example = examples[position]
        part = placed(_native_size(example, entry), size, fit)
        image = read_image(example.image, spec.channels, part, entry.raw)
        images[position] = padded(image, size, PADDING)
        masks[position] = padded(_read_masks(example, entry, spec, part), size, spec.ignore_index)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        done: Iterable[None] = pool.map(one, range(len(examples)))
        try:
            console = Console(file=sys.stderr)
            for _ in track(
                done,
                f"decoding {escape(spec.name)}",
                len(examples),
                console=console,
                transient=True,
                disable=not console.is_terminal,
            ):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _native_size(example: Example, entry: Entry) -> tuple[int, int]:
    """(H, W) of an example's image; a UserError if its masks don't fit it."""
    height, width = image_size(example.image, entry.raw)
    for path in example.masks:
        mask_height, mask_width = image_size(path)
        if entry.same_size:
            fits = (height, width) == (mask_height, mask_width)
        else:  # the same shape, up to rounding
            fits = abs(height * mask_width - width * mask_height) <= max(height, width)
        if not fits:
            raise UserError(
                f"{path}: mask of {mask_width}x{mask_height} pixels for the image "
                f"{example.image.name} of {width}x{height}; they must be of one size"
                + (
                    f" ({example.image.name} may be turned by its EXIF data)"
                    if (mask_width, mask_height) == (height, width)
                    else ""
                )
            )
        medical.require_same_axes(example.image, path)
    return height, width


def _key(
    examples: Sequence[Example],
    entry: Entry,
    spec: DatasetSpec,
    size: tuple[int, int],
    fit: Fit,
) -> str:
    """Changes with anything that changes the decoded arrays."""
    files = []
    for example in examples:
        for path in (example.image, *example.masks):
            try:
                state = path.stat()
            except OSError as error:
                raise unreadable(path, error) from None
            files.append([example.id, str(path.resolve()), state.st_size, state.st_mtime_ns])
    remap = sorted((entry.remap or {}).items())
    what = [
        CACHE_FORMAT,
        files,
        entry.masks,
        remap,
        spec.channels,
        spec.num_classes,
        spec.ignore_index,
    ]
    return hashlib.sha256(json.dumps([what, size, fit]).encode()).hexdigest()[:20]
