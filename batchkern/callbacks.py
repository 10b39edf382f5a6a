"""Callbacks of a training, which get the row of metrics.jsonl after each epoch.

The run directory has all figures. A logger shows the same figures elsewhere, so nothing is lost if it fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from batchkern.errors import UserError, only_warned, require
from batchkern.rundir import TENSORBOARD

if TYPE_CHECKING:
    from batchkern.trainer import Trainer

__all__ = ["Callback", "TensorBoard", "WeightsAndBiases"]

Row = Mapping[str, Any]


class Callback:
    """Methods that :class:`batchkern.trainer.Trainer` calls, only in the first process; override those you need.

    Examples:
        >>> import torch
        >>> from batchkern.callbacks import Callback
        >>> from batchkern.trainer import Trainer
        >>> class Stop(Callback):
        ...     def on_epoch_end(self, row):
        ...         return row["epoch"] == 1  # counted from 0
        >>> data = torch.linspace(-1, 1, 64).view(64, 1), torch.arange(64) // 32
        >>> trainer = Trainer("mlp", data, data, epochs=5, callbacks=[Stop()])
        >>> _ = trainer.fit()
        >>> len(trainer.history)
        2
    """

    def on_train_begin(self, trainer: Trainer) -> None:
        """Called before the first update of :meth:`Trainer.fit`, also for a resumed run: ``trainer.history`` has its
        rows so far, and ``trainer.settings`` has the settings in config.json."""

    def on_epoch_end(self, row: Row) -> bool | None:
        """Called after each epoch, when its row and its checkpoint are written. If it returns ``True``, the training
        ends here, as for early stopping: weights, figures and plots are those of this epoch. A resumed run continues,
        and the state of callbacks is not part of its checkpoint."""

    def on_train_end(self) -> None:
        """Called after the last update, and if an error or Ctrl-C ends the training."""


class TensorBoard(Callback):
    """Writes every figure that is a number to ``<out>/tensorboard``, at the number of the epoch, counted from 1.

    A run that is resumed replaces what was written after its checkpoint.

    Examples:
        >>> import os, torch
        >>> from batchkern.callbacks import TensorBoard
        >>> from batchkern.trainer import Trainer
        >>> data = torch.linspace(-1, 1, 64).view(64, 1), torch.arange(64) // 32
        >>> _ = Trainer("mlp", data, data, epochs=2, out="run", callbacks=[TensorBoard()]).fit()
        >>> len(os.listdir("run/tensorboard"))  # a file of events: tensorboard --logdir run
        1
    """

    def __init__(self) -> None:
        require("tensorboard", "log")
        self._writer: Any = None

    def on_train_begin(self, trainer: Trainer) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if trainer.directory is None:
            raise UserError("TensorBoard() writes into the run's directory, but out is None")
        directory = str(trainer.directory.path / TENSORBOARD)
        with only_warned("nothing is shown in TensorBoard"):
            self._writer = SummaryWriter(directory, purge_step=len(trainer.history) + 1)

    def on_epoch_end(self, row: Row) -> None:
        if self._writer is None:
            return
        with only_warned(f"epoch {row['epoch'] + 1} is not shown in TensorBoard"):
            for name, value in _numbers(row).items():
                self._writer.add_scalar(name, value, row["epoch"] + 1)
            self._writer.flush()

    def on_train_end(self) -> None:
        if self._writer is not None:
            with only_warned("TensorBoard's file is not closed"):
                self._writer.close()


class WeightsAndBiases(Callback):
    """Logs every figure that is a number to https://wandb.ai, or with ``WANDB_MODE=offline`` to ``<out>/wandb``.

    Other settings are read from ``WANDB_PROJECT`` and wandb's other variables. A resumed run continues the same wandb
    run.

    Examples:
        >>> import torch
        >>> from batchkern.callbacks import WeightsAndBiases
        >>> from batchkern.trainer import Trainer
        >>> data = torch.linspace(-1, 1, 64).view(64, 1), torch.arange(64) // 32
        >>> trainer = Trainer("mlp", data, data, epochs=2, out="run", callbacks=[WeightsAndBiases()])
        >>> trainer.fit()["epoch"]  # doctest: +SKIP
        1
    """

    def __init__(self) -> None:
        self._wandb = require("wandb", "log")
        self._run: Any = None

    def on_train_begin(self, trainer: Trainer) -> None:
        if trainer.directory is None:
            raise UserError("WeightsAndBiases() writes into the run's directory, but out is None")
        path, identifier = trainer.directory.path, trainer.directory.identifier
        with only_warned("nothing is logged by wandb"):
            self._run = self._wandb.init(
                dir=str(path), name=path.name, id=identifier, resume="allow", config=trainer.settings
            )

    def on_epoch_end(self, row: Row) -> None:
        if self._run is None:
            return
        with only_warned(f"epoch {row['epoch'] + 1} is not logged by wandb"):
            self._run.log(_numbers(row), step=row["epoch"] + 1)

    def on_train_end(self) -> None:
        if self._run is not None:
            with only_warned("wandb's run is not finished"):
                self._run.finish()


LOGGERS: dict[str, Callable[[], Callback]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def loggers(names: str | None) -> list[Callback]:
    """The callbacks of these names.

    Args:
        names: names of ``LOGGERS``, joined by commas; ``None`` gives no callbacks.

    Raises:
        UserError: a name is not in ``LOGGERS``, or its library is missing.

    Examples:
        >>> from batchkern.callbacks import loggers
        >>> [type(logger).__name__ for logger in loggers("tensorboard")]
        ['TensorBoard']
        >>> loggers(None)
        []
    """
    chosen = [name.strip() for name in (names or "").split(",") if name.strip()]
    for name in chosen:
        if name not in LOGGERS:
            raise UserError(f"log must be {' or '.join(LOGGERS)}, or both joined by a comma, got {name!r:.60}")
    return [LOGGERS[name]() for name in dict.fromkeys(chosen)]


def _numbers(row: Row) -> dict[str, float]:
    return {name: value for name, value in row.items() if isinstance(value, int | float)}


def checked_callbacks(callbacks: Sequence[Any]) -> list[Any]:
    """The callbacks as a list.

    Args:
        callbacks: a list or a tuple of objects with a method ``on_epoch_end(row)``, or one such object.

    Raises:
        UserError: one of them has no such method, or is a class.

    Examples:
        >>> from batchkern.callbacks import Callback, checked_callbacks
        >>> callback = Callback()
        >>> checked_callbacks(callback) == checked_callbacks((callback,)) == [callback]
        True
    """
    found = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]
    for callback in found:
        if isinstance(callback, type) or not callable(getattr(callback, "on_epoch_end", None)):
            raise UserError(f"callbacks must be objects with a method on_epoch_end(row), got {callback!r:.60}")
    return found
