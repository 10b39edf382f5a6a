"""Checks of the settings and the data of a training: each raises one clear error."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from batchkern.data import DatasetData, ImageData, Labelled
from batchkern.errors import UserError, whole

AMP_TYPES: dict[str, torch.dtype | None] = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_counts(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None:
            count(name, value)


def count(name: str, value: int, least: int | None = 1) -> int:
    """``value``, which may be a NumPy number, as a Python number."""
    number = whole(value)
    if number is None or (least is not None and not least <= number < 2**63):
        limit = "" if least is None else f" of at least {least}"
        limit += " and below 2**63" if number is not None and number >= 2**63 else ""
        raise UserError(f"{name} must be a whole number{limit}, got {value!r}")
    return number


def check_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> float:
    """``value``, which may be a NumPy number, as a Python number."""
    number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    if not (math.isfinite(number) and low <= number <= high):
        raise UserError(f"{name} must be in {'(' if open_low else '['}{low:g}, {high:g}], got {value!r}")
    if open_low and number == low:
        raise UserError(f"{name} must be above {low:g}, got {value!r}")
    return number


def check_number(name: str, value: Any) -> float:
    """``value``; a number that is neither ``int`` nor ``float``, such as one of NumPy, as ``float``."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        number = float(value) if real else math.nan
    except OverflowError:  # an integer with about 300 digits
        number = math.nan
    if math.isnan(number):
        raise UserError(f"{name} must be a number, got {value!r:.60}")
    return value if type(value) in (int, float) else number


def check_choice(name: str, value: object, allowed: Iterable[str], *, function: bool = False) -> None:
    if not (isinstance(value, str) and value in allowed):
        raise UserError(f"{name} must be one of {', '.join(allowed)}{' or a function' * function}, got {value!r:.60}")


def check_kind(name: str, value: object, kind: Any, what: str) -> None:
    """``kind`` is the second argument of isinstance."""
    if not isinstance(value, kind):
        raise UserError(f"{name} must be {what}, got {value!r:.60}")


def check_flags(**flags: bool) -> None:
    for name, value in flags.items():
        check_kind(name, value, bool, "True or False")


def check_one_process() -> None:
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1":
        raise UserError(
            f"WORLD_SIZE is {world}: a comparison runs in one process, and its jobs side by side; "
            "torchrun is for batchkern train"
        )


def check_same_kind(name: str, data: Labelled, train: Labelled) -> None:
    """Checks that data are of the same kind as the training set; images are normalised, and other inputs are not."""
    if isinstance(data, ImageData) != isinstance(train, ImageData):
        kinds = ["uint8 images" if isinstance(part, ImageData) else "other inputs" for part in (data, train)]
        raise UserError(f"{name} has {kinds[0]}, but the training set has {kinds[1]}: both must be of one kind")
    if isinstance(data, DatasetData):
        check_standardized(name, data, train.statistics() is not None)
    places = [places_of(part) for part in (data, train)]
    if places[0] != places[1]:
        shapes = [f"({', '.join(map(str, ('N', *part)))}{',' * (not part)})" for part in places]
        raise UserError(f"{name} has labels of shape {shapes[0]}, but those of the training set are {shapes[1]}")


def check_standardized(name: str, data: Labelled, standardized: bool) -> None:
    """Rejects a dataset, whose rows are not changed, if the training set was standardised."""
    if standardized and isinstance(data, DatasetData):
        raise UserError(
            f"{name} is the dataset {data.name}, whose rows are taken as they are, but the training set is "
            "standardised: give a pair of tensors in place of the dataset"
        )


def places_of(data: Labelled) -> tuple[int, ...]:
    """Shape of one target: () for a label, or the shape of a mask."""
    if isinstance(data, DatasetData):
        return data.places
    return () if data.labels is None else tuple(data.labels.shape[1:])


def check_data(train: Labelled, test: Labelled, batch_size: int) -> None:
    check_same_kind("test", test, train)
    if test.shape != train.shape:
        what = "images" if isinstance(test, ImageData) else "inputs"
        raise UserError(f"test {what} are of shape {test.shape}, training {what} of shape {train.shape}")
    if test.classes != train.classes:
        counts = [len(data.classes) if data.classes else "no named" for data in (test, train)]
        raise UserError(f"test data have {counts[0]} classes that are not the {counts[1]} of training")
    if len(train) < batch_size:
        raise UserError(
            f"batch_size is {batch_size}, but {train.name} has {len(train)} samples; it must be at most that"
        )


def pick_device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise UserError(f"device must be cpu, cuda or cuda:N, got {device!r:.60}") from None
    if picked.type not in ("cpu", "cuda"):
        raise UserError(f"device must be cpu, cuda or cuda:N, got {str(device)!r}")
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device is {device}, but this torch ({torch.__version__}) sees no CUDA device")
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device is {device}, but torch sees {torch.cuda.device_count()} CUDA devices, counted from 0")
    return picked


def check_knobs(
    max_grad_norm: float | None, ema_decay: float | None, compile: str | None, model: nn.Module | str
) -> tuple[float | None, float | None]:
    """Checks these settings; returns the first two as Python numbers."""
    most = torch.finfo(torch.float32).max
    if max_grad_norm is not None:
        max_grad_norm = check_range("max_grad_norm", max_grad_norm, 0, most, open_low=True)
    if ema_decay is not None:
        ema_decay = check_range("ema_decay", ema_decay, 0, 1, open_low=True)
        if ema_decay == 1:
            raise UserError("ema_decay must be below 1, where the average would stay what it was, got 1")
    if hasattr(model, "_orig_mod"):  # its keys have another prefix
        raise UserError("model is already compiled: give the module itself, and compile='inductor'")
    if compile is not None and compile not in torch.compiler.list_backends(()):
        shown = ", ".join(torch.compiler.list_backends())
        raise UserError(f"compile must be a backend of torch.compile, such as {shown}, got {compile!r:.60}")
    return max_grad_norm, ema_decay
