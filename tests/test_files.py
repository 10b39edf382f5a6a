"""Files that are whole or not there, whatever lies in their place; and one writer for a directory."""

import errno
import os
import subprocess
import sys
import threading

import pytest

from batchkern import files
from batchkern.errors import UserError
from batchkern.files import (
    append_line,
    check_place,
    contents,
    lock,
    locked,
    make_directory,
    read_file,
    remove_parts,
    slug,
    write_file,
)


@pytest.fixture
def fixed_part(monkeypatch):
    """The name of the part of ``config.json`` is known beforehand."""
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "0123abcd")
    return "config.json.0123abcd.part"


def test_a_link_in_place_of_the_file_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "config.json").symlink_to(tmp_path / "precious")
    write_file(tmp_path / "config.json", b"new")
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (tmp_path / "config.json").is_symlink()
    assert (tmp_path / "config.json").read_bytes() == b"new"


@pytest.mark.parametrize("place", ["link", "pipe", "file"])
def test_what_lies_in_place_of_the_part_is_not_opened(tmp_path, fixed_part, place):
    part = tmp_path / fixed_part
    (tmp_path / "precious").write_text("mine")
    if place == "link":
        part.symlink_to(tmp_path / "precious")
    elif place == "pipe":
        os.mkfifo(part)  # whoever opened it would wait for a reader
    else:
        part.write_text("another's")
    with pytest.raises(UserError, match=r"config.json cannot be written: File exists"):
        write_file(tmp_path / "config.json", b"new")
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("place", ["file", "pipe", "link to a file", "link to nothing", "loop"])
def test_a_directory_is_not_made_where_something_else_lies(tmp_path, place):
    out = tmp_path / "out"
    (tmp_path / "precious").write_text("mine")
    if place == "file":
        out.write_text("mine")
    elif place == "pipe":
        os.mkfifo(out)
    else:
        out.symlink_to({"link to a file": "precious", "link to nothing": "absent", "loop": "out"}[place])
    with pytest.raises(UserError, match=r"out is not a directory; give another output directory"):
        make_directory(out)
    assert (tmp_path / "precious").read_text() == "mine"


def test_two_writers_at_once_leave_one_whole_file(tmp_path):
    contents_of = [bytes([letter]) * 300_000 for letter in b"abcd"]
    threads = [
        threading.Thread(target=lambda content=content: [write_file(tmp_path / "file", content) for _ in range(5)])
        for content in contents_of
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file").read_bytes() in contents_of
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("links", [True, False])
def test_the_file_before_is_kept(tmp_path, monkeypatch, links):
    if not links:

        def refuse(*_):
            raise OSError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    file, previous = tmp_path / "file", tmp_path / "previous"
    for content in (b"1", b"2", b"3"):
        write_file(file, content, previous=previous)
    assert (file.read_bytes(), previous.read_bytes()) == (b"3", b"2")
    assert set(os.listdir(tmp_path)) == {"file", "previous"}


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(OSError, match="it is not a regular file"):
            read_file(path)


def test_lines_are_not_added_through_a_link_or_to_a_pipe(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(UserError, match=f"{name} cannot be written"):
            append_line(tmp_path / name, "line")
    assert (tmp_path / "precious").read_text() == "mine"


def test_parts_are_told_from_files_of_the_users(tmp_path):
    names = ["a.0123abcd.part", "a.part", "a.0123abcg.part", "b.0123abcd.part", "a"]
    for name in names:
        (tmp_path / name).write_text("x")
    assert contents(tmp_path, ["a"]) == set(names[1:])
    remove_parts(tmp_path, ["a"])
    assert set(os.listdir(tmp_path)) == set(names[1:])


def test_a_directory_is_locked_for_other_processes_and_for_this_one(tmp_path):
    other = [sys.executable, "-c", f"import fcntl, os; fcntl.flock(os.open({str(tmp_path)!r}, 0), fcntl.LOCK_EX | 4)"]
    with locked(tmp_path):
        with pytest.raises(UserError, match="is in use by another training or comparison; wait for it"):
            lock(tmp_path)
        assert subprocess.run(other, capture_output=True, check=False).returncode == 1
    assert subprocess.run(other, capture_output=True, check=False).returncode == 0
    os.close(lock(tmp_path))


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    os.close(lock(tmp_path))


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    said = r"cannot be locked \(No locks available\): nothing keeps another training from writing there, too"
    with pytest.warns(UserWarning, match=said), locked(tmp_path):
        pass


def test_a_directory_that_was_moved_is_told_from_the_one_in_its_place(tmp_path):
    place = tmp_path / "out"
    place.mkdir()
    with locked(place) as descriptor:
        check_place(place, descriptor)
        place.rename(tmp_path / "moved")
        with pytest.raises(UserError, match="out cannot be written: No such file or directory"):
            check_place(place, descriptor)
        place.mkdir()
        with pytest.raises(UserError, match="out is not the directory that this began in, which was moved"):
            check_place(place, descriptor)


def test_a_slug_is_one_plain_name():
    assert slug("trimming(end=0.3)+passive(passive='a/../b')") == "trimming-end-0.3-passive-passive-a-..-b"
    assert slug("../..") == ""
