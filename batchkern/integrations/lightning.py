"""For Lightning: a schedule of keep. A ``training_step`` that returns ``self.model(**batch).loss`` needs no more."""

from __future__ import annotations

from typing import Any

import lightning

from batchkern.causal_lm import CausalLMPatch
from batchkern.integrations import set_keep
from batchkern.schedules import EpochSchedule


class KeepSchedule(lightning.Callback):
    """Sets ``keep`` of the patched model in a LightningModule, and logs the mean loss of all tokens.

        Trainer(callbacks=[KeepSchedule(linear(1.0, 0.2))])

    Args:
        schedule: ``f(step, steps)`` gives keep, as those of ``batchkern.schedules`` do; optimizer steps count from 0,
            and a training that is resumed goes on where it was.

    Raises:
        ValueError: when training starts without an end (``max_steps=-1`` and ``max_epochs=-1``), or without a patched
            model.
    """

    def __init__(self, schedule: EpochSchedule) -> None:
        self.schedule = schedule

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        steps = trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("max_steps or max_epochs must be set for a schedule of keep, both are -1")
        set_keep(pl_module, self.schedule, trainer.global_step, int(steps))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        patch = CausalLMPatch.of(pl_module)
        if patch is not None and patch.untrimmed_loss is not None:
            pl_module.log("untrimmed_loss", patch.untrimmed_loss)
