"""Images that are made by hand, and what is made from them."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from image_files import random_pixels, write_parquet

from batchkern.data import Feed, TensorImages, load, match_shape, subset, with_label_noise
from batchkern.description import describe_data
from batchkern.errors import UserError

IMAGES = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1] * 3)


def made(images: Any = IMAGES, labels: Any = LABELS, classes: Any = "ab") -> TensorImages:
    return TensorImages(images, labels, classes, name="it")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            {"images": IMAGES[:0], "labels": LABELS[:0]},
            r"it: 0 images of shape \(3, 8, 8\) have no pixel; at least one",
        ),
        ({"images": IMAGES[:, :, :0]}, r"it: 6 images of shape \(3, 0, 8\) have no pixel; at least one is needed"),
        ({"images": IMAGES.numpy()}, r"images must be a dense tensor on the CPU, not numpy\.ndarray"),
        ({"images": None}, "images must be a dense tensor on the CPU, not builtins.NoneType"),
        ({"images": IMAGES.to("meta")}, "images must be a dense tensor on the CPU, not one of layout .* on meta"),
        ({"images": IMAGES.float()}, "images must be uint8"),
        ({"labels": [0, 1] * 3}, "labels must be a dense tensor on the CPU, not builtins.list"),
        ({"labels": LABELS.to("meta")}, "labels must be a dense tensor on the CPU, not one of layout .* on meta"),
        (
            {"labels": LABELS.to_sparse()},
            "labels must be a dense tensor on the CPU, not one of layout torch.sparse_coo",
        ),
        *(({"labels": LABELS.to(kind)}, f"labels must be int64 .*, not {kind}") for kind in (torch.int32, torch.bool)),
        ({"labels": LABELS.double()}, "labels must be int64 .*, not torch.float64"),
        ({"labels": LABELS[:, None]}, r"labels must be int64 \(6,\), not torch.int64 \(6, 1\)"),
        ({"labels": LABELS - 1}, r"labels\[0\] is -1; it must be in 0\.\.1"),
        ({"labels": LABELS * 2}, r"labels\[1\] is 2; it must be in 0\.\.1"),
        ({"classes": []}, r"it: classes must be the names of at least two classes, not \[\]"),
        (
            {"classes": ["a"], "labels": LABELS * 0},
            r"it: classes must be the names of at least two classes, not \['a'\]",
        ),
        ({"classes": 2}, "it: classes must be the names of at least two classes, not 2"),
        ({"classes": None}, "it: classes must be the names of at least two classes, not None"),
        ({"classes": [0, 1]}, r"it: classes must be the names of at least two classes, not \[0, 1\]"),
        ({"classes": ["a", "b", "b"]}, "it: classes must have different names, but 'b' is there 2 times"),
    ],
)
def test_images_that_are_none(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        made(**arguments)


def test_no_images_are_selected() -> None:
    with pytest.raises(UserError, match="it: 0 images"):
        made().select(torch.tensor([], dtype=torch.int64))


@pytest.mark.parametrize(
    "images",
    [
        IMAGES.contiguous(memory_format=torch.channels_last),
        IMAGES.permute(0, 1, 3, 2),
        IMAGES[:1].expand(6, -1, -1, -1),
        IMAGES.repeat(2, 1, 1, 1)[::2],
    ],
)
def test_images_and_labels_as_they_lie_in_memory(images: torch.Tensor) -> None:
    scattered, whole = made(images, LABELS.repeat_interleave(2)[::2]), made(images.contiguous(), LABELS)
    assert describe_data(scattered) == describe_data(whole)
    assert describe_data(scattered.relabelled(LABELS.repeat_interleave(2)[::2], clean=None)) == describe_data(whole)
    for data in (scattered, whole):
        assert torch.equal(data.rows(torch.tensor([3, 0])), images[[3, 0]])
    assert torch.equal(match_shape(scattered, (1, 4, 4)).rows(LABELS), match_shape(whole, (1, 4, 4)).rows(LABELS))
    for one, other in zip(scattered.statistics(), whole.statistics(), strict=True):
        assert torch.equal(one, other)


INT = np.int64


@pytest.mark.parametrize(
    "shape",
    [(INT(3), INT(4), np.uint8(4)), [3, 4, 4], torch.Size((3, 4, 4)), torch.tensor([3, 4, 4]), np.array([3, 4, 4])],
)
def test_shapes(shape: Any) -> None:
    data = match_shape(made(), shape)
    assert data.shape == (3, 4, 4)
    assert {type(size) for size in data.shape} == {int}


@pytest.mark.parametrize(
    "shape",
    [
        *(None, 3, "344", (3, 4), (3, 4, 4, 4), (True, 4, 4), (0, 4, 4), (2, 4, 4), np.array([3.0, 4.0, 4.0])),
        *((3, height, 4) for height in (4.0, "4", float("nan"), True, None, 0, -1)),
    ],
)
def test_shapes_that_are_none(shape: Any) -> None:
    with pytest.raises(UserError, match=r"shape must be \(C, H, W\) with C = 1 or 3 and H, W >= 1, not "):
        match_shape(made(), shape)


def test_another_shape_keeps_the_clean_labels() -> None:
    noisy = with_label_noise(made(), 0.5, seed=0)
    for shape in ((1, 4, 4), noisy.shape):
        small = match_shape(noisy, shape)
        assert small.clean_labels is not None
        assert torch.equal(small.clean_labels, LABELS)
        assert torch.equal(small.labels, noisy.labels)


@pytest.mark.parametrize("kind", [int, np.int64, np.int8, np.uint64, torch.tensor])
def test_counts_of_every_type(kind: Any) -> None:
    assert torch.equal(subset(made(), kind(4)).images, subset(made(), 4).images)
    noisy = with_label_noise(made(), 0.5, seed=kind(3))
    assert torch.equal(noisy.labels, with_label_noise(made(), 0.5, seed=3).labels)


@pytest.mark.parametrize(
    "rows", [4.0, np.float64(4), True, np.True_, float("nan"), "4", None, np.array([4, 4]), 10**30]
)
def test_counts_that_are_none(rows: Any) -> None:
    with pytest.raises(UserError, match=r"it: a part of it must have 2 \(its classes\) to 6 rows, got "):
        subset(made(), rows)


@pytest.mark.parametrize("fraction", [0.5, np.float64(0.5), np.float32(0.5), np.float16(0.5), Fraction(1, 2)])
def test_fractions_of_every_type(fraction: Any) -> None:
    assert torch.equal(with_label_noise(made(), fraction, 0).labels, with_label_noise(made(), 0.5, 0).labels)
    assert torch.equal(with_label_noise(made(), type(fraction)(0), 0).labels, LABELS)


@pytest.mark.parametrize(
    "fraction", [np.int64(1), True, False, float("nan"), float("inf"), None, torch.tensor(0.5), 1j]
)
def test_fractions_that_are_none(fraction: Any) -> None:
    with pytest.raises(UserError, match=r"noise must be in \[0, 1\), got "):
        with_label_noise(made(), fraction, 0)


@pytest.mark.parametrize("seed", [3.0, "3", None, True, float("nan")])
def test_seeds_that_are_none(seed: Any) -> None:
    mean, std = made().statistics()
    with pytest.raises(UserError, match="seed must be a whole number, got "):
        Feed(made(), mean=mean, std=std, device="cpu", seed=seed)
    with pytest.raises(UserError, match="seed must be a whole number, got "):
        with_label_noise(made(), 0.5, seed)


# --- torch.set_default_dtype ------------------------------------------------------------------------------------------


@pytest.fixture
def restored() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_type_of_numbers_changes_nothing(tmp_path: Any, dtype: torch.dtype) -> None:
    path = write_parquet(tmp_path / "a.parquet", random_pixels(6), [0, 1] * 3)

    def everything() -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        for data in (made(), load(path, memory_limit=1)):
            mean, std = data.statistics()
            feed = Feed(data, mean=mean, std=std, device="cpu", augment="crop+flip", seed=5)
            images, labels = feed.batch(torch.arange(6), 3)
            assert mean.dtype == std.dtype == images.dtype == torch.float32
            rows = torch.arange(4)
            shapes = [match_shape(data, (channels, 5, 5)).rows(rows) for channels in (1, 3)]
            noisy = with_label_noise(data, 0.5, 0).labels
            found += [mean, std, images, labels, noisy, subset(data, 4).rows(rows), *shapes]
        return found

    expected = everything()
    torch.set_default_dtype(dtype)
    for one, other in zip(expected, everything(), strict=True):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype
