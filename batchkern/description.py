"""Data, models and choices as a run's config.json describes them."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from typing import Any

from torch import nn

from batchkern.data import Labelled, StreamedImages, TensorData, TensorImages


def describe_data(data: Labelled) -> dict[str, Any]:
    described = {
        "name": data.name,
        "rows": len(data),
        "classes": len(data.classes) if data.classes else None,
        "shape": list(data.shape) if data.shape is not None else None,
        "labels_crc32": None if data.labels is None else zlib.crc32(data.labels.numpy().data),
        # Streamed images and rows of a dataset are not read, since this would take too long before each training.
        "images_crc32": zlib.crc32(data.images.contiguous().numpy().data) if isinstance(data, TensorImages) else None,
    }
    if isinstance(data, TensorData):
        del described["images_crc32"]
        described |= {"inputs_crc32": zlib.crc32(data.inputs.numpy().data), "standardize": data.standardize}
    if isinstance(data, StreamedImages) and data.cells.crop:
        described["center_crop"] = True
    return described


def describe_model(model: nn.Module | str) -> str:
    if isinstance(model, str):
        return model
    return f"{type(model).__name__} with {sum(p.numel() for p in model.parameters())} parameters"


def describe_choice(choice: str | Callable[..., Any]) -> str:
    """A name, or the name of a function, without its address, which differs in the process that resumes the run."""
    if isinstance(choice, str):
        return choice
    return getattr(choice, "__qualname__", None) or re.sub(r" at 0x[0-9a-fA-F]+", "", repr(choice))
