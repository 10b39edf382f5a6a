"""For TRL's ``SFTTrainer``, which computes its loss by itself and so would go past the patch (tried with 1.16)."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer

from batchkern.integrations.transformers import KeepSchedule as KeepSchedule
from batchkern.integrations.transformers import PatchedModelMixin as _PatchedModelMixin


class PatchedModelMixin(_PatchedModelMixin):
    """For an SFTTrainer of a patched model: ``class MyTrainer(PatchedModelMixin, SFTTrainer)``.

    In training the loss is the model's own, as in ``transformers.Trainer``, which adds a router's loss in each
    micro-batch; the metrics ``entropy``, ``mean_token_accuracy`` and ``num_tokens`` are not made. In evaluation
    everything is SFTTrainer's, which holds no logits either.

    Raises:
        ValueError: when made with a ``loss_type`` other than "nll".
        RuntimeError: in the first step, with label smoothing or a ``compute_loss_func``, which take the logits.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        if trainer.args.loss_type != "nll":
            raise ValueError(f'loss_type must be "nll" for a patched model, got "{trainer.args.loss_type}"')

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        trainer: Any = self
        if not trainer.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        return Trainer.compute_loss(trainer, model, {**inputs, "use_cache": False}, return_outputs, num_items_in_batch)
