"""For ``accelerate``: a schedule of keep that its checkpoints hold. A loop that trains on ``model(**batch).loss``, or
with ``batchkern.parts``, needs nothing else."""

from __future__ import annotations

from typing import Any

import accelerate
from torch import nn

from batchkern.integrations import set_keep
from batchkern.ops import _checks as check
from batchkern.schedules import EpochSchedule


class KeepSchedule:
    """Sets ``keep`` of a patched model; call ``step()`` after each backward pass, beside ``optimizer.step()``.

        keep = KeepSchedule(accelerator, model, linear(1.0, 0.2), steps=1000)

    Within ``accelerator.accumulate`` it counts optimizer steps, not batches. ``accelerator.save_state`` and
    ``load_state`` take it along.

    Args:
        accelerator: the accelerator of the loop.
        model: what has ``keep``: the patched model, before or after ``prepare``, or a trimmed loss.
        schedule: ``f(step, steps)`` gives keep, as those of ``batchkern.schedules`` do.
        steps: number of optimizer steps of the whole training, at least 1.

    Raises:
        ValueError: ``model`` is not patched, or the schedule gave what is not in (0, 1].

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
