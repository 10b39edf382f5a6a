"""Central and random windows of images, against torchvision's transforms of Pillow images."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import PIL_Image, as_tensor, random_pixels, write_parquet

from batchkern.data import Feed, StreamedImages, TensorImages, decode, load, load_pair, match_shape
from batchkern.data.crops import random_window, resized_windows, window_numbers
from batchkern.description import describe_data
from batchkern.errors import UserError

transforms = pytest.importorskip("torchvision.transforms.v2")
functional = pytest.importorskip("torchvision.transforms.v2.functional")
SIZES = [(37, 61), (61, 37), (40, 40), (300, 201), (20, 33), (27, 200), (28, 27)]
PHOTOS = [random_pixels(1, height, width, seed=i)[0] for i, (height, width) in enumerate(SIZES)]
LABELS = [0, 1, 0, 1, 0, 1, 0]
MANY = 3000


def photos(folder: Path, pixels: list[Any] = PHOTOS) -> str:
    return write_parquet(folder / "photos.parquet", pixels, LABELS)


def feed_of(data: Any, augment: str, seed: int = 0) -> Feed:
    """Whose pixels are those of the images."""
    channels = data.shape[0]
    return Feed(
        data, mean=torch.zeros(channels), std=torch.full((channels,), 1 / 255), device="cpu", augment=augment, seed=seed
    )


# --- the centre -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [24, 32, 45])  # of 27, 37 and 51: one margin is odd, and 36.57 is no whole number
def test_the_centre_is_torchvisions(tmp_path: Path, size: int, channels: int) -> None:
    pixels = PHOTOS if channels == 3 else [image[:, :, 0] for image in PHOTOS]
    usual = transforms.Compose([transforms.Resize(round(size / 0.875)), transforms.CenterCrop(size)])
    expected = torch.cat([as_tensor(np.array(usual(PIL_Image.fromarray(image)))[None]) for image in pixels])
    train, test = load_pair(photos(tmp_path, pixels), photos(tmp_path, pixels), image_size=size, center_crop=True)
    assert isinstance(train, StreamedImages)
    assert isinstance(test, TensorImages)
    assert torch.equal(train.rows(torch.arange(7)), expected)
    assert torch.equal(test.images, expected)
    assert torch.equal(feed_of(train, "crop").batch(torch.tensor([3, 1]), None)[0].round(), expected[[3, 1]].float())


@pytest.mark.parametrize(("height", "width"), [(7, 150), (150, 7)])
def test_of_a_very_long_image_no_more_is_resized_than_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, height: int, width: int
) -> None:
    made: list[int] = []
    resize = PIL_Image.Image.resize

    def noted(self: Any, size: tuple[int, int], *args: Any, **options: Any) -> Any:
        made.append(size[0] * size[1])
        return resize(self, size, *args, **options)

    image = random_pixels(1, height, width)[0]
    usual = transforms.Compose([transforms.Resize(37), transforms.CenterCrop(32)])
    expected = as_tensor(np.array(usual(PIL_Image.fromarray(image)))[None])[0]
    monkeypatch.setattr(PIL_Image.Image, "resize", noted)
    got = load(photos(tmp_path, [image] * 7), image_size=32, center_crop=True).rows(torch.tensor([1]))[0]
    assert int((got.int() - expected.int()).abs().max()) <= 1
    assert made == [32 * 32]


def test_which_sets_are_streamed(tmp_path: Path) -> None:
    path = photos(tmp_path)
    for crop in (True, False):
        assert isinstance(load(path, image_size=24, center_crop=crop), StreamedImages) == crop
    test = load_pair(path, path, image_size=24, center_crop=True, memory_limit=100)[1]
    assert isinstance(test, StreamedImages)
    assert test.cells.crop


def test_another_shape_keeps_the_centre_where_it_is_square(tmp_path: Path) -> None:
    data = load(photos(tmp_path), image_size=24, center_crop=True)
    small = load(photos(tmp_path), image_size=16, center_crop=True)
    rows = torch.arange(7)
    assert torch.equal(match_shape(data, (3, 16, 16)).rows(rows), small.rows(rows))
    squeezed = load(photos(tmp_path), image_size=24, memory_limit=0)
    assert torch.equal(match_shape(data, (1, 8, 16)).rows(rows), match_shape(squeezed, (1, 8, 16)).rows(rows))


def test_the_centre_of_built_in_images_is_torchvisions_of_tensors() -> None:
    whole = load("photo-patches")
    assert isinstance(whole, TensorImages)
    data = load("photo-patches", image_size=24, center_crop=True)
    usual = transforms.Compose([transforms.Resize(27), transforms.CenterCrop(24)])
    assert torch.equal(data.rows(torch.arange(9)), usual(whole.images[:9]))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            {"center_crop": True},
            r"center_crop cuts a square out of each image: image_size \(--image-size\) must say how",
        ),
        ({"center_crop": 1, "image_size": 8}, "center_crop must be True or False, not 1"),
        ({"center_crop": "yes"}, "center_crop must be True or False, not 'yes'"),
    ],
)
def test_crops_that_are_none(arguments: dict[str, Any], said: str) -> None:
    for function in (load, load_pair):
        with pytest.raises(UserError, match=said):
            function("no such data", **arguments)


def test_a_training_knows_whether_its_images_are_cut(tmp_path: Path) -> None:
    cut = load(photos(tmp_path), image_size=24, center_crop=True)
    squeezed = load(photos(tmp_path), image_size=24, memory_limit=0)
    assert describe_data(cut) == describe_data(squeezed) | {"center_crop": True}


# --- a random window --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(90, 160), (160, 120), (500, 500)])
def test_windows_are_distributed_as_torchvisions(height: int, width: int) -> None:
    ks_2samp = pytest.importorskip("scipy.stats").ks_2samp
    image = PIL_Image.new("L", (width, height))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        make = transforms.RandomResizedCrop(8).make_params
        theirs = [make([image]) for _ in range(MANY)]
    theirs = [(p["top"], p["left"], p["height"], p["width"]) for p in theirs]
    ours = [random_window(own, height, width) for own in window_numbers(0, 0, MANY).tolist()]
    for figure in (
        lambda top, left, h, w: h * w,
        lambda top, left, h, w: math.log(w / h),
        lambda top, left, h, w: top / max(height - h, 1),
        lambda top, left, h, w: left / max(width - w, 1),
        lambda top, left, h, w: top,
        lambda top, left, h, w: left + w,
    ):
        # The seeds are fixed; one in ten thousand would be as far apart by chance.
        assert ks_2samp([figure(*one) for one in ours], [figure(*one) for one in theirs]).pvalue > 1e-4


@pytest.mark.parametrize("aspect", [0.0, 1.0])
@pytest.mark.parametrize(("height", "width"), [(2, 100), (100, 2), (3, 7), (1000, 20)])
def test_where_no_window_fits_it_is_the_central_one(height: int, width: int, aspect: float) -> None:
    never_fits = transforms.RandomResizedCrop(8, scale=(50, 50))
    expected = never_fits.make_params([torch.zeros(1, height, width)])
    got = random_window([[1.0, aspect, 0.9, 0.9]] * 10, height, width)
    assert got._asdict() == expected


def test_the_first_window_that_fits_is_taken() -> None:
    too_high, fits, other = [1.0, 0.0, 0.9, 0.9], [0.0, 0.5, 0.5, 0.0], [0.0, 0.5, 0.0, 0.0]
    # 0.08 of 10 x 100 pixels are a square of 8.9 a side, at the middle of three places from the top.
    assert random_window([too_high, fits, *[other] * 8], 10, 100) == (1, 0, 9, 9)


def test_every_window_lies_in_the_image() -> None:
    numbers = window_numbers(3, 1, 200)
    numbers[:40] = numbers[:40].round()  # both ends
    numbers[:40].clamp_(max=1 - 2**-53)
    for height, width in ((1, 7), (8, 8), (5, 40), (31, 17)):
        for own in numbers.tolist():
            top, left, h, w = random_window(own, height, width)
            assert min(top, left) >= 0
            assert min(h, w) >= 1
            assert top + h <= height
            assert left + w <= width


@pytest.mark.parametrize("crop", [True, False])
def test_windows_of_streamed_images_are_cut_from_the_file(tmp_path: Path, crop: bool) -> None:
    data = load(photos(tmp_path), image_size=24, center_crop=crop, memory_limit=0)
    indices = torch.tensor([5, 0, 3, 3, 6, 1, 2, 4])
    got = feed_of(data, "resized-crop", seed=2).batch(indices, 7)[0].round().to(torch.uint8)
    for row, (image, own) in enumerate(zip(indices.tolist(), window_numbers(2, 7, 8).tolist(), strict=True)):
        window = random_window(own, *SIZES[image])
        expected = functional.resized_crop(PIL_Image.fromarray(PHOTOS[image]), *window, [24, 24])
        assert torch.equal(got[row], as_tensor(np.array(expected)[None])[0])
    assert not torch.equal(got[2], got[3])  # one image, two windows


@pytest.mark.parametrize(("height", "width"), [(32, 32), (9, 40)])
def test_windows_of_images_in_memory_are_pillows(height: int, width: int) -> None:
    pixels = random_pixels(40, height, width)
    windows = [random_window(own, height, width) for own in window_numbers(0, 0, 40).tolist()]
    got = resized_windows(as_tensor(pixels), windows)
    worst, differ = 0, 0
    for row, image, window in zip(got, pixels, windows, strict=True):
        expected = functional.resized_crop(PIL_Image.fromarray(image), *window, [height, width])
        far = (row.int() - as_tensor(np.array(expected)[None])[0].int()).abs()
        worst, differ = max(worst, int(far.max())), differ + int((far > 0).sum())
    # Pillow rounds once between the directions: half a level, which the last rounding makes one at times.
    assert worst <= 1
    assert differ < 0.3 * got.numel()


@pytest.mark.parametrize("memory_limit", [0, 1 << 30], ids=["streamed", "memory"])
def test_windows_are_a_function_of_seed_update_and_place(tmp_path: Path, memory_limit: int) -> None:
    data = load(photos(tmp_path), image_size=24, memory_limit=memory_limit)
    indices, positions = torch.tensor([1, 2, 3, 4, 0, 6]), torch.tensor([4, 0, 5])

    def drawn(step: int | None, seed: int = 0, positions: torch.Tensor | None = None) -> torch.Tensor:
        torch.rand(3)  # the global generator has no part in it
        return feed_of(data, "resized-crop", seed).batch(indices, step, positions)[0]

    first = drawn(10)
    assert torch.equal(first, drawn(10))
    assert torch.equal(first[positions], drawn(10, positions=positions))
    assert not torch.equal(first, drawn(11))
    assert not torch.equal(first, drawn(10, 1))
    assert torch.equal(drawn(None).round(), data.rows(indices).float())


@pytest.mark.parametrize("memory_limit", [0, 1 << 30], ids=["streamed", "memory"])
def test_windows_are_flipped_every_second_time(tmp_path: Path, memory_limit: int) -> None:
    data = load(photos(tmp_path), image_size=24, memory_limit=memory_limit)
    indices = torch.arange(7).repeat(8)
    plain, flipped = (feed_of(data, f"resized-crop{also}").batch(indices, 3)[0] for also in ("", "+flip"))
    which = [(torch.equal(b, a), torch.equal(b, a.flip(2))) for a, b in zip(plain, flipped, strict=True)]
    assert all(one != other for one, other in which)
    assert 14 < sum(one for one, _ in which) < 42


def test_windows_are_decoded_ahead_for_their_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_LARGE", 0)
    data = load(photos(tmp_path), image_size=24, center_crop=True)
    ours, plain, indices = feed_of(data, "resized-crop"), feed_of(data, "resized-crop"), torch.tensor([6, 1, 3])
    positions = torch.tensor([2, 0])
    for hinted, due in ((4, 5), (None, 5), (5, None)):
        ours.prepare(indices, hinted, positions)
        assert torch.equal(ours.batch(indices, due, positions)[0], plain.batch(indices, due, positions)[0])
    expected = plain.batch(indices, 5, positions)[0]
    ours.prepare(indices, 5, positions)
    ours._ahead[0].result()
    monkeypatch.setattr(decode.Cells, "images", None)
    assert torch.equal(ours.batch(indices, 5, positions)[0], expected)


def test_a_broken_image_is_named_whatever_is_cut_from_it(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    PIL_Image.fromarray(PHOTOS[3]).save(buffer, "PNG")
    half = {"bytes": buffer.getvalue()[:5000], "path": None}
    data = load(photos(tmp_path, [*PHOTOS[:3], half, *PHOTOS[4:]]), image_size=24, center_crop=True)
    with pytest.raises(UserError, match=r"photos\.parquet: row 3 is not a readable image"):
        feed_of(data, "resized-crop").batch(torch.tensor([0, 3]), 1)
