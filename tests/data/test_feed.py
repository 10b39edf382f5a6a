"""Batches that are decoded ahead, and the memory of large ones: the same as without, whatever is asked for next."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from image_files import as_tensor, random_pixels, write_parquet

from batchkern.data import Feed, StreamedImages, TensorImages, decode, feed, load
from batchkern.errors import UserError

PIXELS = random_pixels(21, 140, 130)
ORDERS = torch.randperm(21, generator=torch.Generator().manual_seed(0)).split(6)


@pytest.fixture
def streamed(tmp_path: Path) -> StreamedImages:
    data = load(write_parquet(tmp_path / "a.parquet", PIXELS, [0, 1, 1] * 7), memory_limit=1)
    assert isinstance(data, StreamedImages)
    return data


def feed_of(data: Any, augment: str = "none") -> Feed:
    return Feed(data, mean=torch.full((3,), 0.4), std=torch.tensor([0.2, 0.3, 0.25]), device="cpu", augment=augment)


def in_memory(data: Any) -> TensorImages:
    return TensorImages(as_tensor(PIXELS).contiguous(), data.labels, data.classes, name="memory")


def same(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]) -> bool:
    return torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each batch that is read, whether it had been prepared."""
    found: list[bool] = []
    read = Feed._read

    def noted(self: Feed, indices: torch.Tensor, numbers: torch.Tensor | None) -> torch.Tensor:
        found.append(any(ahead.gives(indices.tolist(), numbers) for ahead in self._ahead))
        return read(self, indices, numbers)

    monkeypatch.setattr(Feed, "_read", noted)
    return found


def test_batches_in_order_are_those_of_images_in_memory(streamed: StreamedImages, taken: list[bool]) -> None:
    ours, theirs = feed_of(streamed, "crop+flip"), feed_of(in_memory(streamed), "crop+flip")
    for step, indices in enumerate(ORDERS):
        if step + 1 < len(ORDERS):
            for each in (ours, theirs):
                each.prepare(indices, step)  # which it is already, but for the first
                each.prepare(ORDERS[step + 1], step + 1)
            assert len(ours._ahead) == 2
        assert same(ours.batch(indices, step), theirs.batch(indices, step))
    assert taken == [True] * len(ORDERS)
    assert ours._ahead == theirs._ahead == []


def test_a_batch_is_decoded_once_however_often_it_is_named(streamed: StreamedImages) -> None:
    ours = feed_of(streamed)
    ours.prepare(ORDERS[0], None)
    ours.prepare(ORDERS[1], None)
    first, second = ours._ahead
    ours.prepare(ORDERS[0], None)
    assert ours._ahead == [first, second]
    ours.prepare(ORDERS[2], None)
    assert ours._ahead[0] is second
    assert first._dropped
    assert not second._dropped


def test_what_was_prepared_is_not_decoded_again(streamed: StreamedImages, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, positions = feed_of(streamed), torch.tensor([4, 0, 2])
    expected = ours.batch(ORDERS[0], None, positions)
    ours.prepare(ORDERS[0], None, positions)
    ours._ahead[0].result()
    monkeypatch.setattr(decode.Cells, "images", None)
    assert same(ours.batch(ORDERS[0], None, positions), expected)


def test_a_hint_that_is_not_followed_is_harmless(streamed: StreamedImages, taken: list[bool]) -> None:
    ours, theirs = feed_of(streamed, "flip"), feed_of(in_memory(streamed), "flip")
    asked = [(ORDERS[1], None), (ORDERS[0].flip(0), None), (ORDERS[0], torch.tensor([1])), (ORDERS[0][[3, 3]], None)]
    for step, (indices, positions) in enumerate(asked):
        ours.prepare(ORDERS[0], step)
        (wrong,) = ours._ahead
        assert same(ours.batch(indices, step, positions), theirs.batch(indices, step, positions))
        assert wrong._dropped
        assert not ours._ahead
    ours.prepare(ORDERS[1], 9)  # which nobody asks for
    ours.prepare(ORDERS[2], 9)
    assert same(ours.batch(ORDERS[2], 9), theirs.batch(ORDERS[2], 9))
    assert taken == [False] * 4 + [True]


def test_a_broken_image_is_told_when_its_batch_is_due(tmp_path: Path) -> None:
    cells = [*PIXELS[:5], {"bytes": b"junk", "path": "a\n.png"}, *PIXELS[6:9]]
    ours = feed_of(load(write_parquet(tmp_path / "a.parquet", cells, [0, 1, 1] * 3), memory_limit=1))
    broken, whole = torch.tensor([1, 5, 2]), torch.tensor([8, 0])
    ours.prepare(broken, None)
    assert torch.equal(ours.batch(whole, None)[1], torch.tensor([1, 0]))
    ours.prepare(broken, None)
    with pytest.raises(UserError, match=r"a\.parquet: row 5 \(a\\n\.png\) is not a readable image: its format is unkn"):
        ours.batch(broken, None)
    assert ours.batch(whole, None)[1].tolist() == [1, 0]


def test_small_images_are_decoded_when_they_are_due(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", random_pixels(6), [0, 1] * 3)
    for size, ahead in ((None, False), (8, False), (128, False), (129, True)):
        ours = feed_of(load(path, image_size=size, memory_limit=1))
        ours.prepare(torch.arange(4), None)
        assert bool(ours._ahead) == ahead
        ours.forget()
        assert not ours._ahead


def test_what_is_given_up_is_not_decoded(streamed: StreamedImages, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    one = decode.Cells._decode_one

    def slow(self: Any, row: int, *args: Any) -> Any:
        decoded.append(row)
        time.sleep(0.02)
        return one(self, row, *args)

    monkeypatch.setattr(decode.Cells, "_decode_one", slow)
    ours = feed_of(streamed)
    ours.prepare(torch.arange(21), None)
    (given_up,) = ours._ahead
    ours.forget()
    for block in given_up._blocks:
        block.result(timeout=20)
    assert len(decoded) < 21


def test_a_process_that_ends_waits_for_nothing_and_says_nothing(tmp_path: Path) -> None:
    """Nor does a fork of it, which has the hint and not the threads."""
    path = write_parquet(tmp_path / "a.parquet", PIXELS, [0, 1, 1] * 7)
    code = (
        "import os, signal, sys, torch, datasets\n"
        "from batchkern.data import Feed, load\n"
        "datasets.config.HF_DATASETS_CACHE = sys.argv[2]\n"
        "data = load(sys.argv[1], memory_limit=1)\n"
        "torch.set_num_threads(1)\n"  # libgomp has no threads in a fork either
        "feed = Feed(data, mean=torch.zeros(3), std=torch.ones(3), device='cpu')\n"
        "rows = torch.arange(21)\n"
        "expected = feed.batch(rows, None)[0]\n"
        "feed.prepare(rows, None)\n"
        "child = os.fork()\n"
        "signal.alarm(20)\n"
        "if child == 0:\n"
        "    os._exit(0 if feed.batch(rows, None)[0].equal(expected) else 3)\n"
        "assert os.waitpid(child, 0)[1] == 0, 'the child hangs, or decodes something else'\n"
        "assert feed.batch(rows, None)[0].equal(expected)\n"
        "feed.prepare(rows, None)\n"
    )
    command = [sys.executable, "-c", code, path, str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


# --- memory of large batches ------------------------------------------------------------------------------------------


@pytest.fixture
def every_batch_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "_KEPT_BY_MALLOC", 0)


def test_numpy_normalises_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    ours = feed_of(TensorImages(pixels, torch.tensor([0, 1]), "ab", name="all values"))
    expected = ours.batch(torch.tensor([1, 0]), None)[0]
    monkeypatch.setattr(feed, "_KEPT_BY_MALLOC", 0)
    assert torch.equal(ours.batch(torch.tensor([1, 0]), None)[0], expected)


@pytest.mark.usefixtures("every_batch_is_large")
def test_a_batch_that_somebody_holds_stays_as_it_is(streamed: StreamedImages) -> None:
    ours = feed_of(in_memory(streamed))
    held = [ours.batch(indices, None)[0] for indices in ORDERS[:3]]
    corner = held[0][:, 2, 3:5, 7]  # shares the memory
    copies = [batch.clone() for batch in held]
    assert all(torch.equal(batch, as_normalised(ours, i)) for batch, i in zip(held, ORDERS, strict=False))
    del held[0]
    for indices in ORDERS[:3]:
        ours.batch(indices.flip(0), None)
    assert torch.equal(corner, copies[0][:, 2, 3:5, 7])
    assert torch.equal(held[0], copies[1])


def as_normalised(ours: Feed, indices: torch.Tensor) -> torch.Tensor:
    return as_tensor(PIXELS)[indices].float().mul_(ours._scale).add_(ours._shift)


@pytest.mark.usefixtures("every_batch_is_large")
def test_batches_in_turn_use_the_same_memory(streamed: StreamedImages) -> None:
    ours = feed_of(in_memory(streamed))
    places = set()
    for _ in range(5):
        for indices in ORDERS[:3]:
            images, _ = ours.batch(indices, None)  # the one before is held until this one is there
            places.add(images.data_ptr())
    assert len(places) == 2
    assert len(ours._memory._lent) == 2
    assert ours.batch(ORDERS[3], None)[0].shape[0] == 3  # a last batch that is smaller
    ours.forget()
    assert not ours._memory._lent
