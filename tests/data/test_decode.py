"""Image cells of parquet files: what comes out of odd ones, and the sentence for those that cannot be read."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from image_files import PIL_Image, as_tensor, datasets, encoded, random_pixels, write_parquet

from batchkern.data import load
from batchkern.errors import UserError

WHERE = pytest.mark.parametrize("memory_limit", [1 << 30, 1], ids=["memory", "streamed"])
COLOUR = random_pixels(1)[0]
GREY = random_pixels(1, channels=1)[0]
DEEP = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000


def cell(image: Any, kind: str = "PNG", **options: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    (PIL_Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def png(width: int, height: int, depth: int, colour: int, data: bytes) -> dict[str, Any]:
    """A PNG file as Pillow would not write it."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return raw(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b""))


def raw(content: bytes, path: str | None = None) -> dict[str, Any]:
    return {"bytes": content, "path": path}


def last_of(folder: Path, odd: Any, memory_limit: int, *, like: Any = COLOUR, size: int | None = None) -> torch.Tensor:
    """(C, H, W): what becomes of the cell, the last one of four."""
    path = write_parquet(folder / "a.parquet", [like, like, like, odd], [0, 1, 0, 1])
    return load(path, image_size=size, memory_limit=memory_limit).rows(torch.tensor([3]))[0]


def turned() -> Any:
    """EXIF's word for: the camera was held on its side."""
    exif = PIL_Image.Exif()
    exif[0x112] = 6
    return exif


def palette(**options: Any) -> dict[str, Any]:
    return cell(PIL_Image.fromarray(COLOUR).convert("P", palette=PIL_Image.Palette.ADAPTIVE), **options)


def gif(frames: Any) -> dict[str, Any]:
    images = [PIL_Image.fromarray(frame) for frame in frames]
    return cell(images[0], "GIF", save_all=True, append_images=images[1:])


FIRST, *_ = FRAMES = random_pixels(3, channels=1, seed=5)


@WHERE
@pytest.mark.parametrize(
    ("odd", "like", "expected"),
    [
        (cell(DEEP), GREY, DEEP >> 8),
        (cell(DEEP, "TIFF"), GREY, DEEP >> 8),
        (cell(DEEP.astype(np.int32), "TIFF"), GREY, DEEP >> 8),
        (cell(DEEP), COLOUR, DEEP >> 8),  # over three channels
        (png(8, 8, 16, 2, b"".join(b"\0" + b"\7\xff" * 24 for _ in range(8))), COLOUR, np.full((8, 8, 3), 7)),
        (cell(PIL_Image.fromarray(GREY).convert("1")), GREY, np.array(PIL_Image.fromarray(GREY).convert("1")) * 255),
        (cell(PIL_Image.fromarray(GREY).convert("LA")), GREY, GREY),
        (cell(PIL_Image.fromarray(GREY), transparency=0), GREY, GREY),
        (cell(GREY), COLOUR, GREY),
        (cell(np.dstack([COLOUR, GREY])), COLOUR, COLOUR),
        (palette(), COLOUR, COLOUR),
        (palette(transparency=0), COLOUR, COLOUR),
        (palette(transparency=bytes(range(64))), COLOUR, COLOUR),
        (cell(PIL_Image.fromarray(COLOUR).convert("CMYK"), "TIFF"), COLOUR, COLOUR),
        (gif(FRAMES), COLOUR, FIRST),
        (cell(COLOUR, exif=turned()), COLOUR, np.rot90(COLOUR, -1)),
        (raw(cell(COLOUR)["bytes"][:-12]), COLOUR, COLOUR),  # all pixels are there, the end of the file is not
    ],
)
def test_odd_images(tmp_path: Path, odd: Any, like: Any, expected: Any, memory_limit: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = last_of(tmp_path, odd, memory_limit, like=like)
    wanted = as_tensor(np.ascontiguousarray(expected)[None].astype(np.uint8))[0]
    assert torch.equal(got, wanted.expand_as(got))


@WHERE
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 60000), (5000, 1)])
def test_odd_sizes(tmp_path: Path, height: int, width: int, memory_limit: int) -> None:
    image = np.full((height, width, 3), 77, dtype=np.uint8)
    assert torch.equal(last_of(tmp_path, image, memory_limit, size=8), torch.full((3, 8, 8), 77, dtype=torch.uint8))
    assert last_of(tmp_path, image, memory_limit, like=image).shape == (3, height, width)
    with pytest.raises(
        UserError, match=f"row 3 is {height}x{width}, but row 0 is 8x8; resize them all with image_size"
    ):
        last_of(tmp_path, image, memory_limit)


LARGE = random_pixels(1, 64, 64)[0]
PNG, JPEG = cell(LARGE)["bytes"], cell(LARGE, "JPEG")["bytes"]


@WHERE
@pytest.mark.parametrize(
    ("odd", "said"),
    [
        (None, "row 3 is not a readable image: it is missing$"),
        (raw(b""), "row 3 is not a readable image: its format is unknown$"),
        (raw(b"hello, this is text"), "row 3 is not a readable image: its format is unknown$"),
        (raw(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a.svg"), r"row 3 \(a\.svg\) is not a readable image: its"),
        (raw(b"text", "x\x1b[2J\n.png"), r"row 3 \(x\\x1b\[2J\\n\.png\) is not a readable image: its format"),
        *((raw(PNG[:size]), "row 3 is not a readable image: ") for size in (1, 8, 20, 33, 40, 100, len(PNG) // 2)),
        *((raw(JPEG[:size]), "row 3 is not a readable image: ") for size in (2, 20, 100, 300, 700, len(JPEG) - 2)),
        (png(0, 8, 8, 2, b""), "row 3 is not a readable image: its format is unknown$"),
        (raw(b"P6 0 0 255\n"), "row 3 is not a readable image: its format is unknown$"),
        (png(20000, 20000, 1, 0, b""), "DecompressionBombError: Image size .400000000 pixels. exceeds limit"),
        (png(2**31 - 1, 2**31 - 1, 8, 2, b""), "DecompressionBombError: Image size"),
        (cell(np.zeros((8, 8), np.float32), "TIFF"), "its pixels are floating-point numbers of unknown range"),
    ],
)
def test_images_that_cannot_be_read(tmp_path: Path, odd: Any, said: str, memory_limit: int) -> None:
    with pytest.raises(UserError, match=rf"a\.parquet: .*{said}"):
        last_of(tmp_path, odd, memory_limit, size=8)
    with pytest.raises(UserError, match=r"a\.parquet: row 0 "):
        last_of(tmp_path, odd, memory_limit, like=odd)


def test_an_image_large_enough_for_a_warning_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIL_Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.warns(PIL_Image.DecompressionBombWarning):
        assert last_of(tmp_path, random_pixels(1, 10, 12)[0], 1 << 30, size=8).shape == (3, 8, 8)


CELLS = [encoded(pixels) for pixels in random_pixels(4)]
IMAGE = datasets.Features({"image": datasets.Image()}).arrow_schema.field("image").type


@pytest.mark.parametrize(
    ("column", "feature", "expected"),
    [
        (pa.array(CELLS, type=IMAGE), datasets.Image(decode=False), None),
        (pa.array([[one, one] for one in CELLS]), datasets.List(datasets.Image()), r"no image column .*image \(List\)"),
        (pa.array([[one, one] for one in CELLS]), datasets.Image(), r"no image column .*image \(List\)"),
        (pa.array(["a.png"] * 4), datasets.Image(), r"no image column .*image \(string\)"),
        (pa.array([one["bytes"] for one in CELLS]), datasets.Image(), r"no image column .*image \(binary\)"),
        (pa.array([{"bytes": "x", "path": "y"}] * 4), datasets.Image(), r"no image column .*image \(struct\)"),
        (
            pa.array([{"bytes": None, "path": None}] * 4, type=IMAGE),
            datasets.Image(),
            "row 0 has no bytes in its column",
        ),
        (
            pa.array(CELLS, type=IMAGE),
            datasets.Image(mode="none"),
            "row 0 is not a readable image: ValueError: image has",
        ),
    ],
)
def test_columns_of_another_kind(tmp_path: Path, column: Any, feature: Any, expected: str | None) -> None:
    metadata = datasets.Features({"image": feature, "label": datasets.Value("int64")}).arrow_schema.metadata
    table = pa.table([column, pa.array([0, 1, 0, 1])], ["image", "label"])
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "a.parquet")
    if expected is None:
        assert torch.equal(load(tmp_path / "a.parquet").rows(torch.arange(4)), as_tensor(random_pixels(4)))
    else:
        with pytest.raises(UserError, match=rf"a\.parquet: {expected}"):
            load(tmp_path / "a.parquet")


def test_a_forked_child_decodes_with_threads_of_its_own(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", random_pixels(12, 140, 140), [0, 1] * 6)
    code = (
        "import os, signal, sys, torch, datasets\n"
        "from batchkern.data import load\n"
        "datasets.config.HF_DATASETS_CACHE = sys.argv[2]\n"
        "data = load(sys.argv[1], memory_limit=1)\n"
        "assert data.cells.threaded\n"
        "rows = data.rows(torch.arange(12))\n"
        "child = os.fork()\n"
        "signal.alarm(20)\n"
        "if child == 0:\n"
        "    os._exit(0 if data.rows(torch.arange(12)).equal(rows) else 3)\n"
        "assert os.waitpid(child, 0)[1] == 0, 'the child hangs, or decodes something else'\n"
        "assert data.rows(torch.arange(12)).equal(rows), 'the parent has lost its threads'\n"
    )
    command = [sys.executable, "-c", code, path, str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
