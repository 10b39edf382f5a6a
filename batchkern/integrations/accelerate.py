"""For ``accelerate``: a schedule of ``keep`` whose state is saved in the checkpoints of the accelerator. A loop that
trains on ``model(**batch).loss``, or with ``batchkern.parts``, needs nothing else."""

from __future__ import annotations

from typing import Any

import accelerate
from torch import nn

from batchkern.integrations import set_keep
from batchkern.ops import _checks as check
from batchkern.schedules import EpochSchedule


class KeepSchedule:
    """Sets ``keep`` of a patched model or a trimmed loss; call ``step()`` after each ``optimizer.step()``.

        keep = KeepSchedule(accelerator, model, linear(1.0, 0.2), steps=1000)

    Within ``accelerator.accumulate`` it counts optimizer steps, not batches. ``accelerator.save_state`` saves its state
    and ``load_state`` restores it.

    Args:
        accelerator: the accelerator of the training loop.
        model: the patched model, before or after ``prepare``, or a trimmed loss, whose ``keep`` is set.
        schedule: a function ``f(step, steps)`` that returns keep, such as those in ``batchkern.schedules``; steps count
            from 0.
        steps: number of optimizer steps of the whole training, at least 1.

    Raises:
        ValueError: ``model`` is neither patched nor has a trimmed loss, or the schedule returned a value that is not in
            (0, 1].

    Examples:
        >>> import accelerate
        >>> from batchkern import TrimmedCrossEntropyLoss
        >>> from batchkern.integrations.accelerate import KeepSchedule
        >>> from batchkern.schedules import linear
        >>> criterion = TrimmedCrossEntropyLoss(keep=1.0)
        >>> keep = KeepSchedule(accelerate.Accelerator(cpu=True), criterion, linear(1.0, 0.5), steps=3)
        >>> for step in range(3):
        ...     print(criterion.keep, end=" ")  # the step: accelerator.backward(loss); optimizer.step()
        ...     keep.step()
        1.0 0.75 0.5
    """

    def __init__(
        self, accelerator: accelerate.Accelerator, model: nn.Module, schedule: EpochSchedule, steps: int
    ) -> None:
        check.count("steps", steps, low=1)
        self._accelerator, self._model, self._schedule, self._steps = accelerator, model, schedule, steps
        self._done = 0
        self._set()
        accelerator.register_for_checkpointing(self)

    def step(self) -> None:
        if self._accelerator.sync_gradients:
            self._done += 1
            self._set()

    def state_dict(self) -> dict[str, Any]:
        return {"done": self._done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._done = state["done"]
        self._set()

    def _set(self) -> None:
        set_keep(self._model, self._schedule, self._done, self._steps)
