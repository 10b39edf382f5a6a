"""For ``transformers.Trainer``: schedules of ``keep``, evaluation without logits, and the loaders, losses and second
heads of the strategies."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback

from batchkern.causal_lm import CausalLMPatch
from batchkern.errors import UserError
from batchkern.integrations import set_keep
from batchkern.parts import SecondHead, is_passive
from batchkern.schedules import EpochSchedule

FILE = "batchkern.pt"
"""Name of the file with the state of the parts, in a checkpoint of the Trainer."""


class KeepSchedule(TrainerCallback):
    """Sets ``keep`` before each optimizer step: ``Trainer(..., callbacks=[KeepSchedule(linear(1.0, 0.2))])``.

    Args:
        schedule: a function ``f(step, steps)`` that returns keep, such as those in ``batchkern.schedules``; steps count
            from 0. A resumed training continues the schedule from the step it had reached.
        module: a trimmed loss or a patched model, whose ``keep`` is set; by default the Trainer's model.

    Raises:
        ValueError: at the first step, if ``module`` has neither a trimmed loss nor a patched model; at any step, if the
            schedule returned a value that is not in (0, 1].

    Examples:
        >>> import batchkern, torch, transformers
        >>> from batchkern.integrations.transformers import KeepSchedule
        >>> config = transformers.GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2)
        >>> patch = batchkern.patch_causal_lm(model := transformers.GPT2LMHeadModel(config), keep=1.0)
        >>> rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4
        >>> options = transformers.TrainingArguments(max_steps=3, use_cpu=True, report_to="none", save_strategy="no")
        >>> schedule = KeepSchedule(batchkern.schedules.linear(1.0, 0.5))
        >>> trainer = transformers.Trainer(model, options, train_dataset=rows, callbacks=[schedule])
        >>> trainer.train().global_step, patch.keep  # doctest: +ELLIPSIS
        {'train_runtime': ...}
        (3, 0.5)
    """

    def __init__(self, schedule: EpochSchedule, module: nn.Module | None = None) -> None:
        self.schedule, self.module = schedule, module

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        set_keep(self.module or kwargs["model"], self.schedule, state.global_step, state.max_steps)


class PatchedModelMixin:
    """For a Trainer whose model is patched: ``class MyTrainer(PatchedModelMixin, Trainer)``.

    Evaluation computes no logits if only the loss is needed (``prediction_loss_only``, or no ``compute_metrics``). The
    training logs also contain ``untrimmed_loss``, the mean over all tokens of the latest batch of this process, and
    ``keep``.

    Examples:
        >>> import batchkern, torch, transformers
        >>> from batchkern.integrations.transformers import PatchedModelMixin
        >>> class MyTrainer(PatchedModelMixin, transformers.Trainer): pass
        >>> config = transformers.GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2)
        >>> patch = batchkern.patch_causal_lm(model := transformers.GPT2LMHeadModel(config), keep=0.5)
        >>> rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4
        >>> options = transformers.TrainingArguments(max_steps=1, logging_steps=1, use_cpu=True, report_to="none")
        >>> trainer = MyTrainer(model, options, train_dataset=rows)
        >>> _ = trainer.train()  # doctest: +ELLIPSIS
        {'loss': ..., 'untrimmed_loss': ..., 'keep': ...}
        ...
    """

    model: Any

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        if prediction_loss_only and CausalLMPatch.of(model) is not None:
            inputs = {**inputs, "skip_logits": True}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)  # type: ignore[misc]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        patch = CausalLMPatch.of(self.model)
        if patch is not None and patch.untrimmed_loss is not None and "loss" in logs:
            logs = {**logs, "untrimmed_loss": float(patch.untrimmed_loss), "keep": float(patch.keep)}
        super().log(logs, start_time)  # type: ignore[misc]


class OutputLoss:
    """Turns a loss of logits and labels into a ``compute_loss_func``. Each micro-batch of a step is weighted by its
    number of labels.

    Each label belongs to the logits at the same position. In causal language models labels belong to the logits at the
    position before; use ``patch_causal_lm`` for them.

    Args:
        loss: maps logits ``(N, C)`` and labels ``(N,)`` to a 0-dim mean, such as ``batchkern.parts.BatchLoss``.

    Examples:
        >>> import torch
        >>> from batchkern.integrations.transformers import OutputLoss
        >>> from batchkern.parts import BatchLoss
        >>> criterion = OutputLoss(BatchLoss(keep=0.5))  # Trainer(..., compute_loss_func=criterion)
        >>> outputs = {"logits": torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log().requires_grad_()}
        >>> loss = criterion(outputs, torch.tensor([0, 0]), num_items_in_batch=4)  # two of the four labels of a step
        >>> round(loss.item(), 4)  # 0.6931, of the harder row, times 2 / 4
        0.3466
    """

    def __init__(self, loss: Any) -> None:
        self.loss = loss

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits: Tensor = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
        loss: Tensor = self.loss(logits.flatten(0, -2), labels.flatten())
        return loss if num_items_in_batch is None else loss * ((labels != -100).sum() / num_items_in_batch)


class StrategiesMixin:
    """For a Trainer with a loader of your own: ``class MyTrainer(StrategiesMixin, Trainer)``.

    Its checkpoints contain the state of the loader and of the virtual samples of a ``BatchLoss``, so that a resumed
    training continues with the next batch. If epochs differ in length, set ``max_steps``.

    Args:
        loader: the training data, such as ``WholeEpochs`` of ``batchkern.parts``, or ``inject`` with such a loader; it
            is not passed to ``accelerator.prepare``. If it has no ``state_dict``, a resumed training starts from the
            beginning of the epoch and skips the batches already used, as is the default in Transformers.
        second_head: the second head for the passive batches of ``inject``; needed only for these.
        args, options: the arguments of ``transformers.Trainer``.

    Raises:
        UserError: a batch is passive and ``second_head`` is None; or a training is resumed from a checkpoint that was
            written by another Trainer.

    Examples:
        >>> import torch, transformers
        >>> from batchkern.integrations.transformers import StrategiesMixin
        >>> from batchkern.parts import EpochBatchSampler, WholeEpochs
        >>> class MyTrainer(StrategiesMixin, transformers.Trainer): pass
        >>> model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2))
        >>> rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4
        >>> sampler = EpochBatchSampler(rows=4, batch_size=2)
        >>> loader = WholeEpochs(torch.utils.data.DataLoader(rows, batch_sampler=sampler))
        >>> options = transformers.TrainingArguments(max_steps=4, use_cpu=True, report_to="none", save_strategy="no")
        >>> MyTrainer(model, options, loader=loader).train().global_step, sampler.epoch  # doctest: +ELLIPSIS
        {'train_runtime': ...}
        (4, 2)
    """

    def __init__(self, *args: Any, loader: Any, second_head: SecondHead | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.loader, self.second_head = loader, second_head
        trainer: Any = self
        if hasattr(loader, "state_dict"):
            trainer.args.ignore_data_skip = True  # the loader continues from its own state

    def get_train_dataloader(self) -> Any:
        return self.loader

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **options: Any) -> Any:
        trainer: Any = self
        if not is_passive(inputs):
            return super().compute_loss(model, inputs, *args, **options)  # type: ignore[misc]
        if self.second_head is None:
            raise UserError("second_head must be given for passive batches, it is None")
        own, trainer.compute_loss_func = trainer.compute_loss_func, OutputLoss(F.cross_entropy)
        try:
            with self.second_head.used_by(inputs):
                return super().compute_loss(model, inputs, *args, **options)  # type: ignore[misc]
        finally:
            trainer.compute_loss_func = own

    def _stateful(self) -> dict[str, Any]:
        trainer: Any = self
        loss = getattr(trainer.compute_loss_func, "loss", None)
        parts = {"loader": self.loader, "virtual": getattr(loss, "virtual", None)}
        return {name: part for name, part in parts.items() if hasattr(part, "state_dict")}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        trainer: Any = self
        folder = os.path.join(trainer._get_output_dir(trial=trial), f"checkpoint-{trainer.state.global_step}")
        if trainer.args.should_save:
            torch.save({name: part.state_dict() for name, part in self._stateful().items()}, os.path.join(folder, FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None:
            return
        if not os.path.isfile(path := os.path.join(checkpoint, FILE)):
            raise UserError(
                f"{checkpoint} has no {FILE}, with the place in the training data: it is of another Trainer"
            )
        states = torch.load(path, weights_only=True)
        for name, part in self._stateful().items():
            part.load_state_dict(states[name])
