"""Trimmed losses for the causal language models of Hugging Face ``transformers``, without a change of their code.

Two places that every such model has are used: its output layer, ``get_output_embeddings()``, and its ``loss_function``.
While the model trains on labels the layer hands its input on as it is, and the loss function gets the last hidden
state where it expected logits. ``transformers`` itself is not imported.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from batchkern.ops import _checks as check
from batchkern.ops.linear_trimmed_cross_entropy import linear_trimmed_cross_entropy


def patch_causal_lm(
    model: nn.Module,
    keep: float | Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    chunk_rows: int | None = None,
) -> CausalLMPatch:
    """Makes ``model(input_ids, labels=...)`` train on the tokens of highest loss, and never hold all logits.

    In training mode (``model.train()``) and with ``labels``, the loss is :func:`linear_trimmed_cross_entropy` over the
    tokens of the batch, and ``output.logits`` is None. At ``keep=1`` loss and gradients are the unpatched model's. In
    every other call, evaluation and generation among them, the model does what it did before. With
    ``num_items_in_batch`` (gradient accumulation in ``transformers.Trainer``) the mean over the kept tokens counts as
    many items as the batch has labels. Patch a model before it is compiled or wrapped for distributed training.

    Args:
        model: a causal language model of ``transformers``, which calls its ``loss_function`` on what its output layer,
            an ``nn.Linear``, returned. Models that scale or cap their logits in between are refused in the first call.
        keep: fraction of the tokens kept, in (0, 1]; or a 0-dim float64 tensor on the device of the loss.
        group, chunk_rows: as in :func:`linear_trimmed_cross_entropy`.

    Returns:
        A handle. Assign to its ``keep`` for a schedule; call its ``remove()`` to have the model as it was.

    Raises:
        TypeError, ValueError: ``model`` is not such a model, or is patched already; an argument is out of range.
        RuntimeError: in the first call, where the model does not hand the output layer's result to its loss function.
    """
    return CausalLMPatch(model, keep, group=group, chunk_rows=chunk_rows)


class CausalLMPatch:
    """What :func:`patch_causal_lm` did to a model."""

    keep: float | Tensor
    """May be reassigned between steps."""
    untrimmed_loss: Tensor | None = None
    """Mean loss of all tokens of the latest training batch, 0-dim, detached."""

    def __init__(
        self, model: nn.Module, keep: float | Tensor, *, group: dist.ProcessGroup | None, chunk_rows: int | None
    ) -> None:
        check.fraction("keep", keep, keep if isinstance(keep, Tensor) else torch.empty(0))
        check.process_group(group)
        if chunk_rows is not None:
            check.count("chunk_rows", chunk_rows, low=1)
        # A PEFT model's forward leads to that of its base model.
        get_base: Any = getattr(model, "get_base_model", lambda: model)
        base = get_base()
        loss: Any = getattr(base, "loss_function", None)
        if isinstance(getattr(loss, "__self__", None), CausalLMPatch):
            raise ValueError("model is patched already: assign to the patch's keep, or remove() it first")
        if not hasattr(base, "get_output_embeddings") or getattr(loss, "__name__", "") != "ForCausalLMLoss":
            raise TypeError(
                "model must be a causal language model of transformers, whose loss_function is ForCausalLMLoss, "
                f"got {type(model).__name__}"
            )
        head = base.get_output_embeddings()
        if getattr(type(head), "forward", None) is not nn.Linear.forward:
            raise TypeError(f"the output layer of model must be a plain nn.Linear, got {type(head).__name__}")
        self.keep, self._group, self._chunk_rows = keep, group, chunk_rows
        self._model, self._head, self._loss = base, head, loss
        self._training = False
        self._hidden: Tensor | None = None
        self._forwards = [(module, module.__dict__.get("forward"), module.forward) for module in (base, head)]

        @functools.wraps(base.forward)  # whose arguments transformers.Trainer looks at
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._model_forward(*args, **kwargs)

        base.forward = forward
        head.forward = self._head_forward
        base.loss_function = self._loss_function

    def remove(self) -> None:
        """Gives the model its own forward passes and loss function back, where that has not been done."""
        if not self._forwards:
            return
        for module, own, _ in self._forwards:
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = own
        self._forwards = []
        self._model.loss_function = self._loss

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = self._forwards[0][2]
        labels = inspect.signature(forward).bind(*args, **kwargs).arguments.get("labels")
        if labels is None or not self._model.training:
            return forward(*args, **kwargs)
        self._training = True
        try:
            output = forward(*args, **kwargs)
            if self._training:
                raise RuntimeError(
                    f"{type(self._model).__name__} cannot be patched: it has not called its loss_function"
                )
            if isinstance(output, tuple):
                return tuple(x for x in output if x is not self._hidden)
            return type(output)(**{**output, "logits": None})
        finally:
            self._training, self._hidden = False, None

    def _head_forward(self, hidden: Tensor) -> Tensor:
        if not self._training:
            logits: Tensor = self._forwards[1][2](hidden)
            return logits
        self._hidden = hidden
        return hidden

    def _loss_function(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        if not self._training:
            items = num_items_in_batch, ignore_index, shift_labels
            loss: Tensor = self._loss(logits, labels, vocab_size, *items, **options)
            return loss
        if logits is not self._hidden:
            raise RuntimeError(
                f"{type(self._model).__name__} cannot be patched: between the output layer and the loss it changes its "
                "logits, by a scale or a cap"
            )
        self._training = False
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        target = shift_labels.reshape(-1).to(logits.device)
        mean, losses = linear_trimmed_cross_entropy(
            logits.reshape(-1, logits.shape[-1]),
            self._head.weight,
            target,
            self.keep,
            bias=self._head.bias,
            ignore_index=ignore_index,
            per_sample=True,
            group=self._group,
            chunk_rows=self._chunk_rows,
        )
        count = (target != ignore_index).sum()
        self.untrimmed_loss = losses.sum() / count
        if num_items_in_batch is None:
            return mean
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(mean.device)
        return mean * count / num_items_in_batch
