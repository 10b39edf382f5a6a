"""Initial weights of a training from a file or an earlier run, instead of random ones."""

from __future__ import annotations

import os
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batchkern.errors import UserError, require
from batchkern.files import read_file
from batchkern.models import find_classifier
from batchkern.rundir import WEIGHTS

PRETRAINED = "pretrained"
"""A word in place of a file: the pretrained weights of a timm model."""


def describe_weights(weights: str | os.PathLike[str] | None) -> Any:
    """The description of initial weights in config.json: for a file, its name and the checksum of its contents.

    Raises:
        UserError: the file cannot be read.
    """
    if weights is None or weights == PRETRAINED:
        return weights
    path = _file(weights)
    return {"name": os.fspath(weights), "crc32": zlib.crc32(_read(path))}


def check_outside(weights: str | os.PathLike[str] | None, out: str | os.PathLike[str]) -> None:
    """Checks that the weights are not in the output directory, where they might be replaced.

    Raises:
        UserError: they are.
    """
    if weights is None or weights == PRETRAINED:
        return
    path = Path(os.path.expanduser(os.fspath(weights)))
    if path.resolve().is_relative_to(Path(out).resolve()):
        raise UserError(
            f"weights are {path}, in {os.fspath(out)}, whose files are written: give another output directory"
        )


def load_weights(model: nn.Module, weights: str | os.PathLike[str], classifier: str | None = None) -> None:
    """Loads the weights of a file into ``model``.

    If the number of classes differs from the file, the classifier keeps its own weights, with a warning.

    Args:
        weights: a safetensors file with all entries of ``model.state_dict()``, under the same names; or the directory
            of a finished run, which has such a file, model.safetensors.
        classifier: name of the model's last linear layer, if it cannot be found.

    Raises:
        UserError: there is no such file; it is not a safetensors file; or it has other names, shapes or kinds of
            numbers than the model, or values that are not finite.
    """
    path = _file(weights)
    found, own = _tensors(path), model.state_dict()
    left = _of_another_classifier(model, own, found, classifier)
    _take(model, path, found, left)
    if left:
        warnings.warn(
            f"weights: the classifier of {path} has {len(found[left[0]])} classes; this one has {len(own[left[0]])}, "
            "and starts from random weights",
            stacklevel=3,
        )


def load_all_weights(model: nn.Module, weights: str | os.PathLike[str]) -> None:
    """Loads all weights; a classifier with another number of classes is an error, too."""
    path = _file(weights)
    _take(model, path, _tensors(path), [])


def _tensors(path: Path) -> dict[str, Tensor]:
    content = _read(path)
    try:
        found: dict[str, Tensor] = require("safetensors.torch", "train").load(content)
    except UserError:
        raise
    except Exception as error:  # a class of Rust's
        raise UserError(
            f"weights: {path} is no file of safetensors ({error}); torch's own files run code when they are read: "
            "load yours, and save it with safetensors.torch.save_file(model.state_dict(), ...)"
        ) from error
    return found


def _take(model: nn.Module, path: Path, found: dict[str, Tensor], left: list[str]) -> None:
    """Loads all tensors of a file, except those with the names ``left``, after checking them."""
    own = model.state_dict()
    _check_names(path, own, found)
    for name, tensor in found.items():
        if name in left:
            continue
        if tensor.shape != own[name].shape:
            raise UserError(
                f"weights: {name} in {path} is of shape {tuple(tensor.shape)}, in the model {tuple(own[name].shape)}"
            )
        if tensor.is_floating_point() != own[name].is_floating_point() or tensor.is_complex():
            raise UserError(f"weights: {name} in {path} is {tensor.dtype}, in the model {own[name].dtype}")
        if not torch.isfinite(tensor).all():
            raise UserError(f"weights: {name} in {path} has values that are not finite")
    model.load_state_dict({**own, **{name: tensor for name, tensor in found.items() if name not in left}})


def _of_another_classifier(
    model: nn.Module, own: dict[str, Tensor], found: dict[str, Tensor], classifier: str | None
) -> list[str]:
    """The names of the classifier's tensors, if the file has another number of classes; else an empty list."""
    try:
        name, layer = find_classifier(model, classifier)
    except UserError:
        return []
    names = [f"{name}.{part}" for part, _ in layer.named_parameters()]
    if not all(part in found and found[part].shape[1:] == own[part].shape[1:] for part in names):
        return []
    return names if any(found[part].shape != own[part].shape for part in names) else []


def _check_names(path: Path, own: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    missing = [name for name in own if name not in found]
    unknown = [name for name in found if name not in own]
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"has {unknown[0]}"
        raise UserError(
            f"weights: {path} {what}, {'which the model has' if missing else 'which the model has not'} "
            f"({len(missing)} "
            f"names are missing, {len(unknown)} unknown): it must be of the same network"
        )


def _file(weights: str | os.PathLike[str]) -> Path:
    path = Path(os.path.expanduser(os.fspath(weights)))
    if not path.is_dir():
        return path
    if not (path / WEIGHTS).exists():
        raise UserError(f"weights: the directory {path} has no {WEIGHTS}, as a run has that has ended")
    return path / WEIGHTS


def _read(path: Path) -> bytes:
    try:
        return read_file(path)
    except (OSError, ValueError) as error:  # ValueError: the name has a null character
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"weights: {path} cannot be read: {reason}") from None
