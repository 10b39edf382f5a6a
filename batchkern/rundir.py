"""The directory of a run: its files, how they are written so that a kill at any moment loses nothing, and the rules for
when they may be written."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from batchkern._version import __version__
from batchkern.errors import UserError, require
from batchkern.files import (
    append_line,
    check_place,
    contents,
    lock,
    make_directory,
    read_file,
    remove_parts,
    unlock,
    write_file,
)

CONFIG, METRICS, CHECKPOINT, PREVIOUS, PREPROCESSING, WEIGHTS, BEST, SAMPLES, CURVES, TENSORBOARD = (
    "config.json",
    "metrics.jsonl",
    "checkpoint.pt",
    "checkpoint.previous.pt",
    "preprocessing.json",
    "model.safetensors",
    "best.safetensors",
    "samples.safetensors",
    "curves.png",
    "tensorboard",
)
RUN_FILES = (CONFIG, METRICS, CHECKPOINT, PREVIOUS, PREPROCESSING, WEIGHTS, BEST, SAMPLES, CURVES)

FORMAT = 3
"""The format of checkpoints; raised when their contents change in an incompatible way."""
_SEAL = re.compile(rb"batchkern (\S{1,40}) checkpoint ([0-9]{1,9}) blake2b ([0-9a-f]{32})")


class RunDirectory:
    """Opens ``path`` for a new run, or for a run that is resumed.

    Args:
        path: created with its parents.
        settings: everything that affects the result of the training, as JSON.
        environment: information that does not affect it: versions, device.
        overwrite: replace the files of an earlier run here, and no other files.
        resume: continue from the checkpoint here, whose settings must equal these; there may be more epochs.

    Attributes:
        identifier: a different text for each run, which stays the same when the run is resumed.
        epochs_before: if a run is resumed for more epochs, the earlier number of epochs; else ``None``.

    Raises:
        UserError: the directory holds a run but neither ``overwrite`` nor ``resume`` is given, holds something else,
            cannot be written, or cannot be resumed.
    """

    def __init__(
        self, path: Path, settings: dict[str, Any], environment: dict[str, Any], *, overwrite: bool, resume: bool
    ) -> None:
        self.path = path
        lasting = identity(settings | {"epochs": None})  # the number of epochs may grow
        self._run = hashlib.blake2b(json.dumps(lasting).encode(), digest_size=16).hexdigest()
        self.identifier = secrets.token_hex(8)
        self.epochs_before: int | None = None
        self._config: dict[str, Any] = {}
        self._lock: int | None = None
        self._left: list[Any] | None = None
        """The state of the files when this process last held the lock."""
        if overwrite and resume:
            raise UserError("overwrite and resume exclude each other; give one of them")
        for module in ("matplotlib.figure", "msgspec", "safetensors.torch"):
            require(module, "train")  # now, and not after the training
        if not resume:
            make_directory(self.path)
        elif not path.is_dir():
            raise self._nothing_to_resume()
        with self.held():
            if resume:
                self._check_same(settings)
                return
            self._claim(overwrite)
            self._write_config({"settings": settings, "environment": environment | {"run": self.identifier}})
            self._write(METRICS, b"")

    # --- whose it is -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        self.lock()
        try:
            yield
        finally:
            self.unlock()

    def lock(self) -> None:
        """Prevents other processes from writing here until :meth:`unlock`. Between the construction of a trainer and
        its training the directory is not locked, since the training may never start.

        Raises:
            UserError: the directory is in use, or its files have changed since this process unlocked it.
        """
        self._lock = lock(self.path)
        if self._left is not None and self._left != self._files():
            unlock(self._lock)
            self._lock = None
            raise UserError(
                f"{self.path} was written by another training since this one was created; resume it, or give another "
                "directory"
            )

    def unlock(self) -> None:
        """Releases the lock; does nothing on ranks that do not write."""
        if self._lock is not None:
            self._left = self._files()
            unlock(self._lock)
            self._lock = None

    def _files(self) -> list[Any]:
        """Properties of the files that change when they are written."""
        found: list[Any] = []
        for name in (CONFIG, METRICS, CHECKPOINT):
            with contextlib.suppress(OSError):
                status = (self.path / name).stat()
                found.append((name, status.st_ino, status.st_size, status.st_mtime_ns))
        return found

    def _claim(self, overwrite: bool) -> None:
        try:
            # A kill during the very first write leaves only a partial file, which counts as an empty directory.
            found = contents(self.path, RUN_FILES)
            if found and not self._is_run():
                raise UserError(f"{self.path} exists and is not a batchkern run; give another output directory")
            if found and not overwrite:
                raise UserError(f"{self.path} already holds a run; resume it, overwrite it, or give another directory")
            remove_parts(self.path, RUN_FILES)
            for name in RUN_FILES[2:]:
                (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}") from None

    def _is_run(self) -> bool:
        """Whether config.json was written by batchkern; models of the Hugging Face hub have a file of the same name."""
        from batchkern.records import read_json

        try:
            return "batchkern" in read_json(self.path / CONFIG)["environment"]
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _nothing_to_resume(self) -> UserError:
        return UserError(f"{self.path} holds no run to resume: {CONFIG} is missing or unreadable")

    def _check_same(self, settings: dict[str, Any]) -> None:
        from batchkern.records import read_json

        try:
            config = read_json(self.path / CONFIG, dict[str, Any])
            recorded, environment = config["settings"], config["environment"]
        except (OSError, ValueError, KeyError):
            raise self._nothing_to_resume() from None
        if isinstance(run := environment.get("run"), str):
            self.identifier = run
        asked = json.loads(json.dumps(settings))
        was, now = identity(recorded), identity(settings)
        before = was.get("epochs")
        if isinstance(before, int) and before < now["epochs"]:
            self.epochs_before, was["epochs"] = before, now["epochs"]
            self._config = config | {"settings": asked}
        changed = [
            f"{key} was {recorded.get(key)!r}, now {asked.get(key)!r}"
            for key in sorted(was.keys() | now.keys())
            if was.get(key) != now.get(key)
        ]
        if changed:
            raise UserError(f"{self.path} was trained with other settings and cannot be resumed: {'; '.join(changed)}")

    def _write_config(self, config: dict[str, Any]) -> None:
        self._write(CONFIG, json.dumps(config, indent=2).encode())

    def _write(self, name: str, content: bytes) -> None:
        self._check_place()
        write_file(self.path / name, content)

    def _check_place(self) -> None:
        if self._lock is not None:
            check_place(self.path, self._lock)

    # --- metrics and checkpoints -------------------------------------------------------------------------------

    def append_metrics(self, row: dict[str, Any]) -> None:
        self._check_place()
        append_line(self.path / METRICS, json.dumps(row))  # before the checkpoint, which needs this row

    def metrics(self, rows: int | None = None) -> list[dict[str, Any]]:
        """All rows, or the first ``rows``. The rows after them were written after the checkpoint, and may be incomplete
        after a kill."""
        from batchkern.records import read_metrics

        file = self.path / METRICS
        try:
            return read_metrics(file, rows)
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise UserError(f"{file} is damaged: {error}") from None

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Saves a checkpoint and keeps the previous one beside it, in case the disk loses the new one."""
        check_readable(state)
        self._check_place()
        # Written to memory first: on a full disk, torch's own writer fails with an error that hides the reason.
        buffer = io.BytesIO()
        torch.save(state | {"run": self._run}, buffer)
        write_file(self.path / CHECKPOINT, sealed(buffer.getvalue()), previous=self.path / PREVIOUS)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint; ``None`` if the run was killed before the first one. Later rows of the metrics are
        removed."""
        with self.held():
            if os.path.lexists(self.path / CHECKPOINT):  # also true for a link whose target is missing
                state, rows = self._read(CHECKPOINT)
            elif left := self._whole_one(CHECKPOINT):
                raise UserError(f"{self.path / CHECKPOINT} is missing{left}")
            else:
                state, rows = None, []
            remove_parts(self.path, RUN_FILES)
            self._write(METRICS, "".join(json.dumps(row) + "\n" for row in rows).encode())
            return state

    def extend(self, trained: int) -> None:
        """Records in config.json that a run gets more epochs, after ``trained`` finished ones."""
        extended = [*self._config.get("extended", []), {"epochs": self.epochs_before, "trained": trained}]
        with self.held():
            self._write_config(self._config | {"extended": extended})

    def _read(self, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """A checkpoint, and the metrics of its epochs."""
        file = self.path / name
        try:
            state = torch.load(io.BytesIO(unsealed(read_file(file))), map_location="cpu", weights_only=True)
            done = state["epochs_done"]
            if not isinstance(done, int) or done < 0:
                raise ValueError(f"epochs_done is {done!r}")
            if state.pop("run", None) != self._run:
                raise ValueError("it belongs to a run with other settings")
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}{self._whole_one(name)}") from None
        except Exception as error:
            # torch's own message would suggest to load it with code execution
            reason = error if type(error) is ValueError else "it is not a checkpoint"
            raise UserError(f"{file} cannot be read: {reason}{self._whole_one(name)}") from None
        try:
            return state, self.metrics(done)
        except UserError as error:
            raise UserError(f"{error}{self._whole_one(name)}") from None

    def _whole_one(self, name: str) -> str:
        """Advice for a lost checkpoint: the end of an error message, empty if the previous one is not intact."""
        if name == PREVIOUS or not (self.path / PREVIOUS).exists():
            return ""
        try:
            state, _ = self._read(PREVIOUS)
        except UserError:
            return ""
        return f"; {PREVIOUS} beside it, of epoch {state['epochs_done']}, is intact: rename it to continue from there"

    def save_preprocessing(self, content: bytes) -> None:
        self._write(PREPROCESSING, content)

    def save_tensors(self, file: str, tensors: dict[str, torch.Tensor]) -> None:
        save = require("safetensors.torch", "train").save
        # Cloned, because safetensors rejects tensors that share memory, such as tied weights.
        self._write(file, save({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}))


def identity(settings: dict[str, Any]) -> dict[str, Any]:
    """``settings`` as read from JSON, without the names of data and weights that have a checksum of their contents: the
    same file may have different paths."""
    plain: dict[str, Any] = json.loads(json.dumps(settings, sort_keys=True))
    for value in plain.values():
        if isinstance(value, dict) and any(
            value.get(key) is not None for key in ("images_crc32", "inputs_crc32", "crc32")
        ):
            value.pop("name", None)
    return plain


def check_saved(model: nn.Module) -> None:
    """Checks that the weights can be saved.

    Raises:
        UserError: the weights could not be saved at the end of the training.
    """
    save = require("safetensors.torch", "train").save
    for name, value in model.state_dict().items():
        try:
            save({name: value.detach().flatten()[:0].contiguous().clone()})
        except Exception as error:
            kind = f"{value.layout} {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise UserError(
                f"the model's state holds {name!r} ({kind}), but {WEIGHTS} can hold only dense tensors; keep it out of "
                "the state, for example by persistent=False, or train without an output directory"
            ) from error
        if isinstance(value, torch.Tensor) and 0 in value.stride() and value.numel() > 1:
            raise UserError(f"the model's state holds {name!r}, whose elements share memory, as after expand: clone it")


def check_readable(state: dict[str, Any]) -> None:
    """Checks that a checkpoint of ``state`` can be written and read again.

    Raises:
        UserError: it cannot, because the optimizer or the model holds something other than plain tensors and Python
            values.
    """
    plain = (torch.Tensor, torch.nn.Parameter)
    small = tree_map(lambda x: torch.empty(0, dtype=x.dtype) if type(x) in plain else x, state)
    try:
        buffer = io.BytesIO()
        torch.save(small, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"an object of {found[1]}" if found else str(error).partition("\n")[0]
        raise UserError(
            f"a checkpoint of this training could not be read again ({what}): the states of model and optimizer must "
            "be plain tensors and Python's values; or train without an output directory"
        ) from error


def sealed(checkpoint: bytes) -> bytes:
    """``checkpoint`` with its checksum in the comment of the zip archive, which torch ignores.

    Torch does not verify the checksums of the single tensors in the archive.
    """
    seal = f"batchkern {__version__} checkpoint {FORMAT} blake2b ".encode()
    content = (
        checkpoint[:-2] + (len(seal) + 32).to_bytes(2, "little") + seal
    )  # the length of the comment, then the comment
    return content + _digest(content)


def unsealed(checkpoint: bytes) -> bytes:
    """Returns ``checkpoint`` if its checksum is correct.

    Raises:
        ValueError: it has no checksum or a wrong one, or a format that this version does not read.
    """
    found = list(_SEAL.finditer(checkpoint, max(0, len(checkpoint) - 200)))
    if not found or found[-1].end() != len(checkpoint):
        raise ValueError("it ends without its checksum, so it is incomplete or not a checkpoint of batchkern")
    version, format, digest = found[-1][1].decode(), found[-1][2].decode(), found[-1][3]
    if int(format) != FORMAT:
        raise ValueError(f"batchkern {version} wrote it in format {format}, and {__version__} reads format {FORMAT}")
    if digest != _digest(checkpoint[:-32]):
        raise ValueError("it is damaged: its checksum is wrong")
    return checkpoint


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).hexdigest().encode()
