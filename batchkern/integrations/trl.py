"""For TRL's ``SFTTrainer``, which computes the loss itself and would therefore bypass the patch (tested with version
1.16)."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer

from batchkern.integrations.transformers import KeepSchedule as KeepSchedule
from batchkern.integrations.transformers import PatchedModelMixin as _PatchedModelMixin


class PatchedModelMixin(_PatchedModelMixin):
    """For an SFTTrainer whose model is patched: ``class MyTrainer(PatchedModelMixin, SFTTrainer)``.

    In training the loss is the one that the model returns, as in ``transformers.Trainer``. The auxiliary loss of a
    router is therefore added in each micro-batch, and the metrics ``entropy``, ``mean_token_accuracy`` and
    ``num_tokens`` are not computed. Evaluation is unchanged; SFTTrainer does not hold all logits there either.

    Args:
        args, kwargs: the arguments of ``trl.SFTTrainer``.

    Raises:
        ValueError: when created with a ``loss_type`` other than "nll".
        RuntimeError: in the first step, with label smoothing or a ``compute_loss_func``, which need the logits.

    Examples:
        >>> import batchkern, datasets, tokenizers, transformers, trl
        >>> from batchkern.integrations.trl import PatchedModelMixin
        >>> class MyTrainer(PatchedModelMixin, trl.SFTTrainer): pass
        >>> config = transformers.GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2)
        >>> patch = batchkern.patch_causal_lm(model := transformers.GPT2LMHeadModel(config), keep=0.5)
        >>> words = tokenizers.models.WordLevel({str(i): i for i in range(16)}, unk_token="1")
        >>> tokenizer = transformers.PreTrainedTokenizerFast(
        ...     tokenizer_object=tokenizers.Tokenizer(words), pad_token="0", eos_token="2"
        ... )
        >>> rows = datasets.Dataset.from_list([{"input_ids": list(range(8))}] * 4)
        >>> options = trl.SFTConfig(max_steps=2, use_cpu=True, bf16=False, report_to="none", save_strategy="no")
        >>> trainer = MyTrainer(model, options, train_dataset=rows, processing_class=tokenizer)
        >>> trainer.train().global_step, patch.keep  # doctest: +ELLIPSIS
        {'train_runtime': ...}
        (2, 0.5)
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
