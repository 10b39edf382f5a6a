"""Parquet files and folders of images, as tests write them: random pixels in PNG, which come back byte by byte."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

datasets = pytest.importorskip("datasets")
PIL_Image = pytest.importorskip("PIL.Image")


def random_pixels(count, height=8, width=8, channels=3, seed=0):
    shape = (count, height, width) if channels == 1 else (count, height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(pixels, kind="PNG"):
    buffer = io.BytesIO()
    PIL_Image.fromarray(pixels).save(buffer, kind)
    return {"bytes": buffer.getvalue(), "path": None}


def write_parquet(path, images, labels, *, names=None, column="label", label_type=None, extra=None):
    """A parquet file in datasets' image layout; `images` are arrays or ready cells."""
    cells = [image if isinstance(image, dict) or image is None else encoded(image) for image in images]
    kind = label_type or (datasets.ClassLabel(names=names) if names else datasets.Value("int64"))
    features = {"image": datasets.Image(), column: kind}
    content = {"image": cells, column: labels}
    for key, (feature, values) in (extra or {}).items():
        features[key], content[key] = feature, values
    table = datasets.Dataset.from_dict(content, features=datasets.Features(features))
    table.to_parquet(str(path))
    return str(path)


def write_folder(root, pixels, labels, names):
    for index, (image, label) in enumerate(zip(pixels, labels)):
        folder = root / names[label]
        folder.mkdir(parents=True, exist_ok=True)
        PIL_Image.fromarray(image).save(folder / f"{index:04}.png")
    return str(root)


def as_tensor(pixels):
    """(N, H, W[, C]) -> (N, C, H, W)."""
    tensor = torch.from_numpy(pixels)
    return tensor[:, None] if tensor.dim() == 3 else tensor.permute(0, 3, 1, 2)
