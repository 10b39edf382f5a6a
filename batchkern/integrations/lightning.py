"""For Lightning: a schedule of ``keep``, and support for epochs of different lengths. The other classes of
``batchkern.parts``, and patched models, are used in a ``training_step`` as in any loop. The checkpoints of
Lightning contain the state of loaders that have a ``state_dict``, and of submodules of the LightningModule."""

from __future__ import annotations

from typing import Any

import lightning

from batchkern.causal_lm import CausalLMPatch
from batchkern.errors import UserError
from batchkern.integrations import set_keep
from batchkern.parts import WholeEpochs, inject
from batchkern.schedules import EpochSchedule


class KeepSchedule(lightning.Callback):
    """Sets ``keep`` of the trimmed losses and the patched model in a LightningModule. If there is a patched model, it
    also logs ``untrimmed_loss``, the mean loss of all tokens.

        Trainer(callbacks=[KeepSchedule(linear(1.0, 0.2))])

    Args:
        schedule: a function ``f(step, steps)`` that returns keep, such as those in ``batchkern.schedules``; steps are
            optimizer steps, counted from 0. A resumed training continues the schedule from the step it had reached.

    Raises:
        ValueError: at the first batch, if the number of steps is not limited (``max_steps=-1`` and ``max_epochs=-1``),
            or if the LightningModule has neither a trimmed loss nor a patched model; at any batch, if the schedule
            returned a value that is not in (0, 1].

    Examples:
        >>> import lightning, torch
        >>> from batchkern import TrimmedCrossEntropyLoss
        >>> from batchkern.integrations.lightning import KeepSchedule
        >>> from batchkern.schedules import linear
        >>> class Module(lightning.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer, self.loss = torch.nn.Linear(1, 2), TrimmedCrossEntropyLoss(keep=1.0)
        ...     def training_step(self, batch):
        ...         return self.loss(self.layer(batch), torch.zeros(len(batch), dtype=torch.int64))
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> callbacks = [KeepSchedule(linear(1.0, 0.5))]
        >>> trainer = lightning.Trainer(max_epochs=1, callbacks=callbacks, accelerator="cpu", barebones=True)
        >>> trainer.fit(module := Module(), torch.utils.data.DataLoader(torch.ones(6, 1), batch_size=2))
        >>> trainer.global_step, module.loss.keep
        (3, 0.5)
    """

    def __init__(self, schedule: EpochSchedule) -> None:
        self.schedule = schedule

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        steps = trainer.estimated_stepping_batches
        if not 0 < steps < float("inf"):  # -1 if the loader has no length
            raise ValueError(
                "max_steps must be set for a schedule of keep if max_epochs is -1 or the loader has no length, got "
                f"max_epochs={trainer.max_epochs} and max_steps={trainer.max_steps}"
            )
        set_keep(pl_module, self.schedule, trainer.global_step, int(steps))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        patch = CausalLMPatch.of(pl_module)
        if patch is not None and patch.untrimmed_loss is not None:
            pl_module.log("untrimmed_loss", patch.untrimmed_loss)


class VaryingEpochs(lightning.Callback):
    """For a loader whose epochs differ in length: ``WholeEpochs`` with a ``SubsetSampler``, or ``inject``.

    Without this callback Lightning would read one batch ahead, and a training resumed within an epoch would skip that
    batch.

        loader = inject(WholeEpochs(DataLoader(...)), passive)
        Trainer(callbacks=[VaryingEpochs(loader)]).fit(module, loader)

    Args:
        loader: a ``WholeEpochs`` or ``inject`` of ``batchkern.parts``. The callback gives it a ``len()``, which is the
            number of batches in the current epoch.

    Examples:
        >>> import torch
        >>> from batchkern.integrations.lightning import VaryingEpochs
        >>> from batchkern.parts import SubsetSampler, WholeEpochs
        >>> sampler = SubsetSampler(10, 2, epochs=2, fractions=(0.4, 1.0), batch_multiples=(1, 1))
        >>> loader = WholeEpochs(torch.utils.data.DataLoader(torch.arange(10), batch_sampler=sampler))
        >>> callback = VaryingEpochs(loader)  # lightning.Trainer(callbacks=[callback]).fit(module, loader)
        >>> [len(list(loader)) for epoch in range(2)]
        [2, 5]
    """

    def __init__(self, loader: WholeEpochs | inject) -> None:
        if not isinstance(loader, WholeEpochs | inject):
            raise UserError(f"loader must be WholeEpochs(...) or inject(...), got {type(loader).__name__}")
        self.loader = loader
        loader.sized = True

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        trainer.reload_dataloaders_every_n_epochs = 1  # Lightning then reads the length in every epoch

    def state_dict(self) -> dict[str, Any]:
        return self.loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loader.load_state_dict(state_dict)  # before Lightning reads the length of the epoch
