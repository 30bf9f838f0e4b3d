"""Weights to start from, where they lie: in a file, a run's directory, or a library."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlseg import checkpoint
from mlseg.errors import UserError, one_line
from mlseg.files import reachable, require_file
from mlseg.segmentation.data.palettes import VOC_CLASSES
from mlseg.segmentation.nets.segmentor import SegmentorSettings

_HOLDERS = ("state_dict", "model_state_dict", "model_state", "model", "module", "network", "net")
"""Keys under which training scripts save a network's weights beside other things."""


@dataclass(frozen=True)
class Weights:
    """What is in a file.

    Attributes:
        source: the file, or the name of what was downloaded.
        tensors: by name.
        classes: names of its classes, where they are known.
        pixels: what its network saw of pixels, where that is known; see ``normalise``.
    """

    source: str
    tensors: Mapping[str, Tensor]
    classes: tuple[str, ...] | None = None
    pixels: str | None = None


def read(named: str, key: str, settings: SegmentorSettings) -> Weights:
    """The weights in a file of torch or of safetensors, or in a run's directory.

    Nothing that a file holds is executed (``weights_only``).

    Args:
        key: of the config, for errors.
        settings: of the network that is to have them.

    Raises:
        UserError: it can't be read, or holds no tensors by name.
    """
    path = reachable(named)
    if path.is_dir() and (path / "checkpoints").is_dir():
        path = path / "checkpoints" / checkpoint.BEST
    if not path.is_file():
        raise UserError(f"{key}: {path}: no such file of weights")
    try:
        require_file(path)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            held: Any = load_file(path)
        else:
            if zipfile.is_zipfile(path):
                checkpoint.verify(path)
            held = torch.load(path, map_location="cpu", weights_only=True)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    except Exception as error:  # whatever a file may hold makes the unpickler fail in any way
        raise UserError(
            f"{key}: {path}: no file of weights, or one of a whole module, which would run code as "
            "it is read; save its state dict, torch.save(model.state_dict(), FILE) "
            f"[{one_line(error)}]"
        ) from error
    return _described(held, path, key, settings)


def _described(held: Any, path: Path, key: str, settings: SegmentorSettings) -> Weights:
    if isinstance(held, Mapping) and isinstance(held.get("segmentor"), Mapping):
        with checkpoint.taking(f"{key}: {path}: its segmentor", "name another run's checkpoint"):
            return learned(held, path, settings)
    tensors = _tensors(held)
    for holder in _HOLDERS:
        if tensors or not isinstance(held, Mapping):
            break
        tensors = _tensors(held.get(holder))
    if not tensors:
        raise UserError(f"{key}: {path}: it holds no tensors by name; name a state dict")
    name = checkpoint.first_not_finite(tensors)
    if name is not None:
        raise UserError(f"{key}: {path}: {name[:80]} is not finite; name another file")
    published = tensors.get("classifier.4.bias")  # torchvision's DeepLabV3
    known = published is not None and published.shape == (len(VOC_CLASSES),)
    return Weights(str(path), tensors, tuple(VOC_CLASSES) if known else None)


def learned(state: Mapping[str, Any], path: Path, settings: SegmentorSettings) -> Weights:
    """The segmentor's weights in a run's checkpoint, or a file of ``export --format torch``.

    Raises:
        KeyError, TypeError, ValueError: it holds something else.
    """
    about = state["segmentor"]
    return Weights(
        str(path),
        _tensors(dict(state["problems"][about["problem"]]["module"])),
        tuple(map(str, about["classes"])),
        settings.seen_by(dict(about["settings"])),
    )


def _tensors(held: Any) -> dict[str, Tensor]:
    if not isinstance(held, Mapping):
        return {}
    return {k: t for k, t in held.items() if isinstance(k, str) and isinstance(t, Tensor)}


def encoder_of(network: nn.Module, name: str) -> nn.Module:
    """The encoder of a network; UserError where it has none, ``name`` being the network's."""
    for owner in (network, getattr(network, "network", None), getattr(network, "model", None)):
        for part in ("encoder", "backbone"):
            found = getattr(owner, part, None)
            if isinstance(found, nn.Module):
                return found
    raise UserError(
        f"segmentor.encoder_weights: {name!r} has no part called encoder or backbone; give the "
        "weights of all of it (segmentor.weights), or take a network with an encoder, such as "
        "{name: unetplusplus, encoder: resnet34}"
    )


def downloaded(network: nn.Module, settings: SegmentorSettings, name: str) -> Weights:
    """The weights of a network's encoder that its library publishes under a name."""
    published: Callable[[str, str], Mapping[str, Tensor]] | None
    published = getattr(network, "published_encoder", None)
    if published is None:
        raise UserError(
            f"segmentor.encoder_weights: nothing is published under {name!r} for "
            f"{settings.name!r}; name a file, or take a network of segmentation-models-pytorch, "
            "such as {name: unetplusplus, encoder: resnet34}"
        )
    try:
        with _quietly():
            tensors = published(name, settings.normalised)
    except UserError as error:
        raise UserError(f"segmentor.encoder_weights: {error}") from None
    except Exception as error:  # of any of the libraries between here and there
        raise UserError(
            f"segmentor.encoder_weights: {name} can't be downloaded here "
            f"({type(error).__name__}: {one_line(error, 100)}); download it where there is a "
            "network and name the file"
        ) from error
    encoder = (settings.model_extra or {}).get("encoder") or settings.name
    return Weights(f"{name} ({encoder})", tensors)


@contextmanager
def _quietly() -> Iterator[None]:
    """Within this block what libraries log of their attempts isn't shown: their last word is."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
