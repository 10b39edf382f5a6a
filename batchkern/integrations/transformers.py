"""For ``transformers.Trainer``: a schedule of keep, and evaluation without logits where only the loss is wanted."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from batchkern.causal_lm import CausalLMPatch
from batchkern.integrations import set_keep
from batchkern.schedules import EpochSchedule


class KeepSchedule(TrainerCallback):
    """Sets ``keep`` before each optimizer step: ``Trainer(..., callbacks=[KeepSchedule(linear(1.0, 0.2))])``.

    Args:
        schedule: ``f(step, steps)`` gives keep, as those of ``batchkern.schedules`` do; steps count from 0, and a
            training that is resumed goes on where it was.

    Raises:
        ValueError: at the first step, where the model is not patched.
    """

    def __init__(self, schedule: EpochSchedule) -> None:
        self.schedule = schedule

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        set_keep(kwargs["model"], self.schedule, state.global_step, state.max_steps)


class PatchedModelMixin:
    """For a Trainer of a patched model: ``class MyTrainer(PatchedModelMixin, Trainer)``.

    Evaluation makes no logits where only the loss is wanted (``prediction_loss_only``, or no ``compute_metrics``), and
    the logs of training have ``untrimmed_loss``, the mean over all tokens of this process's latest batch, and ``keep``.
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
