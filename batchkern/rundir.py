"""The directory of a run: what it holds, how it is written so that a kill at any moment loses nothing, and when it may
be written at all."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import torch

from batchkern.errors import UserError, require

CONFIG, METRICS, CHECKPOINT, WEIGHTS, SAMPLES, CURVES = (
    "config.json",
    "metrics.jsonl",
    "checkpoint.pt",
    "model.safetensors",
    "samples.safetensors",
    "curves.png",
)
RUN_FILES = (CONFIG, METRICS, CHECKPOINT, WEIGHTS, SAMPLES, CURVES)


def write_file(path: Path, content: bytes) -> None:
    """All of ``content`` or, after a kill, the old file: never a part."""
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


class RunDirectory:
    """Opens ``path`` for a new run, or for a run that goes on.

    Args:
        path: created with its parents.
        settings: what decides the result of the training, as JSON.
        environment: what does not: versions, device.
        overwrite: replace the files of an earlier run here, and nothing else.
        resume: go on from the checkpoint here, whose settings must equal these.

    Raises:
        UserError: the directory holds a run and neither is asked for, holds something else, cannot be written, or
            cannot be resumed.
    """

    def __init__(
        self, path: Path, settings: dict[str, Any], environment: dict[str, Any], *, overwrite: bool, resume: bool
    ) -> None:
        self.path = path
        if overwrite and resume:
            raise UserError("overwrite and resume exclude each other; give one of them")
        if resume:
            self._check_same(settings)
            return
        self._claim(overwrite)
        self._write(CONFIG, json.dumps({"settings": settings, "environment": environment}, indent=2).encode())
        self._write(METRICS, b"")

    def _claim(self, overwrite: bool) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # A kill during the first write of all leaves a part of it, which is no more than an empty directory.
            contents = {entry.name for entry in self.path.iterdir()} - {CONFIG + ".part"}
            if contents and not self._is_run():
                raise UserError(f"{self.path} exists and is not a batchkern run; give another output directory")
            if contents and not overwrite:
                raise UserError(f"{self.path} holds a run already; resume it, overwrite it, or give another directory")
            for name in (CHECKPOINT, WEIGHTS, SAMPLES, CURVES):
                (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}") from None

    def _is_run(self) -> bool:
        """Whether config.json is ours: a model of the Hugging Face hub has a file of that name, beside its weights."""
        try:
            return "batchkern" in json.loads((self.path / CONFIG).read_text())["environment"]
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _check_same(self, settings: dict[str, Any]) -> None:
        try:
            recorded = json.loads((self.path / CONFIG).read_text())["settings"]
            recorded.keys()
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{self.path} holds no run to resume: {CONFIG} is missing or unreadable") from None
        if "ranks" in settings:
            recorded.setdefault("ranks", 1)  # runs of before there were more
        asked = json.loads(json.dumps(settings))
        changed = [
            f"{key} was {recorded.get(key)!r}, now {asked.get(key)!r}"
            for key in sorted(recorded.keys() | asked.keys())
            if recorded.get(key) != asked.get(key)
        ]
        if changed:
            raise UserError(f"{self.path} was trained with other settings and cannot be resumed: {'; '.join(changed)}")

    def _write(self, name: str, content: bytes) -> None:
        write_file(self.path / name, content)

    def append_metrics(self, row: dict[str, Any]) -> None:
        try:
            with open(self.path / METRICS, "a") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())  # before the checkpoint that counts on this row
        except OSError as error:
            raise UserError(f"{self.path / METRICS} cannot be written: {error.strerror}") from None

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / METRICS).read_text().splitlines()]

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        # By way of memory: on a full disk torch's own writer fails with an error that hides the reason.
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self._write(CHECKPOINT, buffer.getvalue())

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint, and the metrics cut back to it; ``None`` where the run was killed before the first."""
        file = self.path / CHECKPOINT
        rows: list[dict[str, Any]] = []
        state: dict[str, Any] | None = None
        if file.exists():
            try:
                state = torch.load(file, map_location="cpu", weights_only=True)
                assert state is not None
                # What follows these lines was written after the checkpoint; a kill may have cut it short.
                lines = (self.path / METRICS).read_text().splitlines()[: state["epochs_done"]]
                rows = [json.loads(line) for line in lines]
            except OSError as error:
                raise UserError(f"{file} cannot be read: {error.strerror}") from None
            except Exception:  # torch would say that it should be loaded with its code executed
                raise UserError(f"{file} cannot be read: it or {METRICS} beside it is damaged") from None
            if len(rows) < state["epochs_done"]:
                done = state["epochs_done"]
                raise UserError(f"{self.path / METRICS} has {len(rows)} rows, but {file} was saved after {done} epochs")
        self._write(METRICS, "".join(json.dumps(row) + "\n" for row in rows).encode())
        return state

    def save_tensors(self, file: str, tensors: dict[str, torch.Tensor]) -> None:
        save = require("safetensors.torch", "train").save
        # Cloned, because safetensors refuses tensors that share memory, as tied weights do.
        self._write(file, save({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}))
