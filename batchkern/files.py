"""Files that are written completely or not at all and read without blocking, and locks of directories."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from batchkern.errors import UserError

_PART = re.compile(r"(.+)\.[0-9a-f]{8}\.part")


def slug(text: str) -> str:
    """``text`` as the name of a file."""
    return re.sub(r"[^\w.]+", "-", text).strip("-.")


def write_file(path: Path, content: bytes, *, previous: Path | None = None) -> None:
    """Writes all of ``content``, or after a kill leaves the old file. A link at ``path`` is replaced, not followed.

    Args:
        previous: where the old file is kept; an earlier file there is replaced.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        # O_EXCL: an existing file, link or pipe of this name is never opened.
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None:
            _keep(path, previous)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _keep(path: Path, previous: Path) -> None:
    previous.unlink(missing_ok=True)
    if path.exists():
        try:
            os.link(path, previous)
        except OSError:  # a file system without hard links
            write_file(previous, read_file(path))


def read_file(path: Path) -> bytes:
    """The contents of a regular file.

    Raises:
        OSError: it cannot be read, or is not a regular file; reading a pipe or a device may never end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file")
    with open(descriptor, "rb") as file:
        return file.read()


def append_line(path: Path, line: str) -> None:
    """Appends a line to a file that is not a link, and flushes it to the disk."""
    try:
        with open(
            os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666), "a"
        ) as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def make_directory(path: Path) -> None:
    """Creates a directory and its parents; an existing one is left as it is."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except ValueError:  # a null character
        raise UserError(f"{str(path)!r} cannot be the path of a directory; give another output directory") from None
    except FileExistsError:
        raise UserError(f"{path} is not a directory; give another output directory") from None
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def contents(directory: Path, written: Iterable[str]) -> set[str]:
    """The names in ``directory``, without partial files of ``written`` that a kill left there."""
    return {entry.name for entry in directory.iterdir() if _part_of(entry) not in set(written)}


def remove_parts(directory: Path, written: Iterable[str]) -> None:
    """Removes partial files of ``written`` that a kill left there."""
    for entry in directory.iterdir():
        if _part_of(entry) in set(written):
            entry.unlink(missing_ok=True)


def _part_of(entry: Path) -> str | None:
    match = _PART.fullmatch(entry.name)
    return match[1] if match else None


def lock(directory: Path) -> int:
    """Locks ``directory``; returns a descriptor. Until it is closed, neither this process nor others can lock it again.

    Raises:
        UserError: it is already locked, or cannot be opened.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"{directory} is in use by another training or comparison; wait for it, or give another directory"
        ) from None
    except OSError as error:
        warnings.warn(
            f"{directory} cannot be locked ({error.strerror}): nothing keeps another training from writing there, too",
            stacklevel=2,
        )
    return descriptor


def unlock(descriptor: int) -> None:
    """Releases a lock, even if a process that was forked in the meantime still has the descriptor."""
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def check_place(directory: Path, descriptor: int) -> None:
    """Checks that ``directory`` is still the one that was locked.

    Raises:
        UserError: it was moved, or replaced by another one.
    """
    try:
        same = os.path.samestat(os.stat(directory), os.fstat(descriptor))
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror}") from None
    if not same:
        raise UserError(
            f"{directory} is not the directory that this began in, which was moved; its files are left alone"
        )


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[int]:
    descriptor = lock(directory)
    try:
        yield descriptor
    finally:
        unlock(descriptor)
