"""Sources by path, by odd names, and what is none."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import as_tensor, datasets, encoded, random_pixels, write_folder, write_parquet

from batchkern.data import load, load_pair
from batchkern.data.sources import _digest
from batchkern.errors import UserError
from batchkern.strategies import PassiveInjection


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In an empty folder, without the hub; what hangs is killed."""

    def hangs(*_: Any) -> None:
        raise TimeoutError("it hangs")

    def no_hub(*arguments: Any, **options: Any) -> Any:
        if arguments[0] != "parquet":
            raise ConnectionError("there is no network")
        return load_dataset(*arguments, **options)

    load_dataset = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", no_hub)
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


class Place:
    """A path object of somebody's own."""

    def __init__(self, path: Any) -> None:
        self.path = path

    def __fspath__(self) -> Any:
        return self.path


@pytest.mark.parametrize("kind", [Path, Place])
def test_paths_in_every_form(kind: Callable[[str], Any]) -> None:
    pixels = random_pixels(6)
    write_parquet("a.parquet", pixels, [0, 1] * 3)
    write_folder(Path("folder"), pixels, [0, 0, 0, 1, 1, 1], "ab")
    for place in ("a.parquet", "./a.parquet", "folder", "folder/", os.path.abspath("folder")):
        data = load(kind(place))
        assert torch.equal(data.rows(torch.arange(6)), as_tensor(pixels))
        assert data.name == os.fspath(kind(place))
        train, test = load_pair(kind(place), kind("a.parquet"))
        assert (train.name, test.name, len(test)) == (data.name, os.fspath(kind("a.parquet")), 6)
    strategy = PassiveInjection(passive=kind("a.parquet"))
    assert strategy.describe()["passive"] == "a.parquet"


def test_a_path_object_is_no_name_of_a_data_set() -> None:
    with pytest.raises(UserError, match="'digits' is not a file or folder, as a path must be; give the name"):
        load(Path("./digits"))
    write_folder(Path("digits"), random_pixels(4), [0, 0, 1, 1], "ab")
    assert load(Path("./digits")).classes == ("a", "b")
    assert len(load("digits")) == 1438


@pytest.mark.parametrize("source", [3, 3.5, True, b"digits", b"a.parquet", ["a"], object, Place(b"a.parquet")])
def test_sources_that_are_no_text(source: Any) -> None:
    for call in (lambda: load(source), lambda: load_pair(source), lambda: load_pair("digits", source)):
        with pytest.raises(UserError, match="a data set must be given by its name or its path, not by"):
            call()
    with pytest.raises(UserError, match="a data set must be given by its name or its path, not by None"):
        load(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("", "'' is no file or folder"),
        (".", r"^\.: '\./broken' is a link that cannot be followed; remove it, or repair it"),
        ("/", "^/: no images in one sub-folder per class, as in class/image.png: none in '"),
        ("~nobody/x", "'~nobody/x' is no file or folder"),
        ("a\0b", r"'a\\x00b' is no file or folder"),
        ("digits\0", r"'digits\\x00' is no file or folder"),
        ("\x1b[2J", r"'\\x1b\[2J' is no file or folder"),
        ("\udcff", r"'\\udcff' is no file or folder"),
        ("x" * 5000, "' is no local file or folder, and cannot be loaded from the hub: ConnectionError"),
        ("x" * 5000 + ".parquet", "' is no file or folder, and neither"),
        ("a/" * 2500, "' is no file or folder, and neither"),
        ("nothing", "'nothing' is no local file or folder, and cannot be loaded from the hub"),
        ("plain.txt", r"plain\.txt: not a readable parquet file: ArrowInvalid"),
        ("plain.txt/", "'plain.txt/' is no file or folder"),
        ("empty.parquet", r"empty\.parquet: not a readable parquet file: ArrowInvalid"),
        ("broken", "'broken' is neither a file nor a folder, but a link that leads to no file"),
        ("broken.parquet", "'broken.parquet' is neither a file nor a folder, but a link that leads to no file"),
        ("round", "'round' is neither a file nor a folder, but a link that leads to no file"),
        ("pipe", "'pipe' is neither a file nor a folder, but a device or a pipe"),
        ("socket", "'socket' is neither a file nor a folder, but a device or a pipe"),
        ("/dev/zero", "'/dev/zero' is neither a file nor a folder, but a device or a pipe"),
        ("/dev/null", "'/dev/null' is neither a file nor a folder, but a device or a pipe"),
    ],
)
def test_sources_that_are_none(source: str, said: str) -> None:
    Path("plain.txt").write_text("x")
    Path("empty.parquet").touch()
    for link, target in (("broken", "nowhere"), ("broken.parquet", "nowhere"), ("round", "round")):
        os.symlink(target, link)
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as open_socket:
        open_socket.bind("socket")
        with pytest.raises(UserError, match=said):
            load(source)
        with pytest.raises(UserError, match=said):
            load_pair("digits", source)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"image_size": 8.0}, "image_size must be a whole number of pixels, not 8.0"),
        ({"image_size": "8"}, "image_size must be a whole number of pixels, not '8'"),
        ({"image_size": 10**20}, f"image_size must be 4 to 16384 pixels, not {10**20}"),
        ({"image_size": True}, "image_size must be a whole number of pixels, not True"),
        ({"image_size": float("nan")}, "image_size must be a whole number of pixels, not nan"),
        ({"image_size": -1}, "image_size must be 4 to 16384 pixels, not -1"),
        ({"memory_limit": "8"}, "memory_limit must be a number of bytes, not '8'"),
        ({"memory_limit": None}, "memory_limit must be a number of bytes, not None"),
        ({"memory_limit": float("nan")}, "memory_limit must be a number of bytes, not nan"),
        ({"split": None}, "digits: no split None; it has train, test"),
        ({"split": ["train"]}, r"digits: no split \['train'\]; it has train, test"),
    ],
)
def test_options_that_are_none(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load("digits", **options)
    if "split" not in options:
        with pytest.raises(UserError, match=said):
            load_pair("digits", **options)


# --- folders of images ------------------------------------------------------------------------------------------------


IMAGE = encoded(random_pixels(1)[0])["bytes"]


def write(*places: bytes | str, content: bytes = IMAGE) -> None:
    for place in map(os.fsencode, places):
        os.makedirs(os.path.dirname(place), exist_ok=True)
        Path(os.fsdecode(place)).write_bytes(content)


def test_names_that_would_steer_a_terminal() -> None:
    write("in/a\x1b[2J/x\ny.png", "in/a\x1b[2J/z\x1b[2J.png", "in/b\nc/\u202e.png")
    for limit in (1 << 30, 1):
        data = load("in", memory_limit=limit)
        assert data.classes == ("a\x1b[2J", "b\nc")
        assert data.rows(torch.arange(3)).shape == (3, 3, 8, 8)
    write_parquet("x\ny.parquet", random_pixels(4), [0, 1, 0, 1])
    assert load("x\ny.parquet").name == r"x\ny.parquet"


@pytest.mark.parametrize(
    ("places", "said"),
    [
        (["in/a\x1b/0.png"], r"in: all 1 images are of one class, 'a\\x1b'"),
        (["in/a\x1b/0.png", "in/b/junk\u202e.png"], r"in: row 1 \(.*/in/b/junk\\u202e\.png\) is not a readable image"),
        (["in/train/a\x1b/0.png", "in/test/b\n/0.png"], r"in/test: its sub-folder 'b\\n' is no class of .*: a\\x1b$"),
        (["in/a/0.png", b"in/b\xff\n/0.txt"], r"in: the sub-folder 'b\\udcff\\n' has no image"),
        (["in/a/0.png", b"in/b\xff/0.png"], r"in: the path '.*/in/b\\udcff/0\.png' is not valid UTF-8"),
        (["in/a/0.png", b"in/b/\x1b\xff.png"], r"in: the path '.*/in/b/\\x1b\\udcff\.png' is not valid UTF-8"),
        (["in\x1b/a/0.png"], r"in\\x1b: all 1 images are of one class, 'a'"),
        ([b"in\xff\n/a/0.png"], r"in\\udcff\\n: the path '.*/in\\udcff\\n/a/0\.png' is not valid UTF-8"),
    ],
)
def test_sentences_about_odd_names_can_be_printed(places: list[bytes | str], said: str) -> None:
    for place in places:
        write(place, content=b"junk" if "junk" in str(place) else IMAGE)
    source = os.fsdecode(os.fsencode(places[0]).split(b"/")[0])
    with pytest.raises(UserError, match=said) as caught:
        load_pair(source) if os.path.exists(f"{source}/test") else load(source)
    assert str(caught.value).isprintable()


def test_a_parquet_file_whose_name_is_no_text() -> None:
    write_parquet("a.parquet", random_pixels(4), [0, 1, 0, 1])
    os.rename("a.parquet", b"\xff\x1b.parquet")
    with pytest.raises(UserError, match=r"\\udcff\\x1b\.parquet: not a readable parquet file: Unicode") as caught:
        load(os.fsdecode(b"\xff\x1b.parquet"))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_images_that_are_no_files(kind: str) -> None:
    write("in/a/0.png", "in/b/0.png", "in/b/notes.txt")
    if kind == "pipe":
        os.mkfifo("in/b/1.png")
    else:
        os.symlink("1.png", "in/b/1.png")
    with pytest.raises(UserError, match=r"in: '.*/in/b/1\.png' is neither a file nor a folder, but a (device|link)"):
        load("in")


def test_links_that_lead_nowhere_and_are_no_images() -> None:
    write("in/a/0.png", "in/b/0.png", "in/b/1.png/2.png")
    os.symlink("notes.txt", "in/b/notes.txt")
    os.symlink("nowhere", "in/.hidden")
    assert load("in").labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize("link", ["in/c", "in/b/more"])
@pytest.mark.parametrize("to", ["itself", "nowhere"])
def test_a_link_behind_which_a_class_may_lie_is_refused(link: str, to: str) -> None:
    write("in/a/0.png", "in/b/0.png")
    os.symlink(os.path.basename(link) if to == "itself" else "gone", link)
    with pytest.raises(UserError, match=rf"{re.escape(link)}' is a link that cannot be followed; remove it, or repair"):
        load("in")


def test_linked_folders_of_a_class_are_walked() -> None:
    write("in/a/0.png", "in/b/0.png", "more/1.png", "more/2.png")
    os.symlink(os.path.abspath("more"), "in/a/more")
    assert load("in").labels.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("training", "other"), [("train", "valid"), ("Training", "Testing"), ("Train", "Test"), ("TRAIN", "dev")]
)
def test_usual_names_of_splits(training: str, other: str) -> None:
    write(*(f"in/{split}/{kind}/{number}.png" for split in (training, other) for kind in "ab" for number in range(2)))
    train, test = load_pair("in")
    assert (train.classes, len(train), len(test)) == (("a", "b"), 4, 4)


@pytest.mark.parametrize(
    ("folders", "said"),
    [
        (("train", "test", "unlabeled"), "its sub-folders train, test are splits, and unlabeled none"),
        (("train", "val", "valid"), "of its sub-folders train, val, valid two are names of the same split"),
        (("test", "val"), "of splits it has test, val, but no train"),
    ],
)
def test_splits_that_cannot_be_told(folders: tuple[str, ...], said: str) -> None:
    write(*(f"in/{split}/{kind}/0.png" for split in folders for kind in "ab"))
    with pytest.raises(UserError, match=f"in: {said}"):
        load_pair("in")


def test_a_class_may_have_the_name_of_a_split() -> None:
    write("in/bus/0.png", "in/train/0.png", "in/test/0.png")
    with pytest.raises(UserError, match="its sub-folders train, test are splits, and bus none"):
        load("in")
    os.rename("in/test", "in/car")
    assert load("in").classes == ("bus", "car", "train")


def test_a_parquet_file_whose_path_looks_like_an_address() -> None:
    os.makedirs("s3:")
    for path in ("s3:/a.parquet", "cifar:v2.parquet"):
        write_parquet(path, random_pixels(4), [0, 1, 0, 1])
        assert load(path.replace("s3:/", "s3://")).labels.tolist() == [0, 1, 0, 1]


def test_a_local_file_is_read_without_the_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = pytest.importorskip("datasets").config
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    asked: list[Any] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **options: asked.append(address) or [])
    write_parquet(tmp_path / "a.parquet", random_pixels(4), [0, 1, 0, 1])
    load(str(tmp_path / "a.parquet"))
    assert not asked
    assert config.HF_UPDATE_DOWNLOAD_COUNTS is True


def test_the_digest_of_a_file_is_of_its_size_its_head_its_tail_and_its_footer() -> None:
    content = bytearray(np.random.default_rng(0).bytes(4 << 20))
    content[-8:-4] = (2 << 20).to_bytes(4, "little")  # of the footer
    digests = set()
    for place in (None, 0, (1 << 20) - 1, (2 << 20) - 8, (4 << 20) - 9, (4 << 20) - 1):
        changed = bytearray(content)
        if place is not None:
            changed[place] ^= 1
        Path("a.parquet").write_bytes(changed)
        digests.add(_digest("a.parquet"))
    Path("a.parquet").write_bytes(content[:100] + content)
    digests.add(_digest("a.parquet"))
    assert len(digests) == 7
