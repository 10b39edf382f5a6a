"""Trimmed losses for the causal language models of Hugging Face ``transformers``, without a change of their code.

Two places that such a model has are used: its output layer, ``get_output_embeddings()``, and its ``loss_function``.
While the model trains on labels the layer hands its input on as it is, and the loss function gets the last hidden state
where it expected logits. All that is put into the model is bound methods of one object, so that a copy of the model has
its own. ``transformers`` itself is not imported.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

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
    many items as the batch has labels. Patch a model after adapters are added, and before it is compiled or wrapped for
    distributed training. A copy of the model is patched too: ``CausalLMPatch.of(copy)``.

    Args:
        model: a causal language model of ``transformers``, which calls its ``loss_function`` on what its output layer,
            an ``nn.Linear``, returned; or on that with a softcap or a scale of its configuration (Gemma 2 and 3,
            Cohere, Granite). Models that change their logits in another way are refused in the first call.
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
        base, head, loss = _parts(model)
        self.keep, self._group, self._chunk_rows = keep, group, chunk_rows
        self._model, self._base, self._head, self._loss = model, base, head, loss
        self._softcap, self._scale = _cap(base)
        self._checked = False
        self._training = False
        self._hidden: Tensor | None = None
        self._version = 0
        self._own_forward = head.__dict__.get("forward")
        self._head_forward = head.forward
        head.forward = self._hand_on
        base.loss_function = self._loss_function
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    @staticmethod
    def of(model: nn.Module) -> CausalLMPatch | None:
        """The patch of a model, or of a copy of a patched one; None where there is none."""
        patch = getattr(getattr(_base(model), "loss_function", None), "__self__", None)
        return patch if isinstance(patch, CausalLMPatch) else None

    def remove(self) -> None:
        """Gives the model its own output layer and loss function back, where that has not been done."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._own_forward is None:
            del self._head.forward
        else:
            self._head.forward = self._own_forward
        self._base.loss_function = self._loss

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model is not self._model:
            raise RuntimeError("a patched model cannot be replicated by DataParallel: use DistributedDataParallel")
        labels = inspect.signature(model.forward).bind(*args, **kwargs).arguments.get("labels")
        self._training = labels is not None and model.training
        self._hidden = None

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Also where the forward pass raised, and there is no output."""
        unused, hidden = self._training, self._hidden
        self._training, self._hidden = False, None
        if hidden is None or output is None:
            return output
        if unused:
            raise RuntimeError(f"{type(self._base).__name__} cannot be patched: it has not called its loss_function")
        if isinstance(output, tuple):
            return tuple(x for x in output if x is not hidden)
        return type(output)(**{**output, "logits": None})

    def _hand_on(self, hidden: Tensor) -> Tensor:
        if not self._training:
            return cast(Tensor, self._head_forward(hidden))
        self._hidden, self._version = hidden, _version(hidden)
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
            return cast(Tensor, self._loss(logits, labels, vocab_size, *items, **options))
        name = type(self._base).__name__
        if self._hidden is None:
            raise RuntimeError(
                f"the output layer of {name} was replaced since it was patched: remove() and patch again"
            )
        hidden = self._hidden
        if not self._is_known(logits, hidden):
            raise RuntimeError(
                f"{name} cannot be patched: between the output layer and the loss it changes its logits, by a cast, or "
                "by a scale or a cap that its configuration does not name"
            )
        self._training = False
        self._hidden = logits  # which the output has in place of logits
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        target = shift_labels.reshape(-1).to(hidden.device)
        mean, losses = linear_trimmed_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            self._head.weight,
            target,
            self.keep,
            bias=self._head.bias,
            ignore_index=ignore_index,
            softcap=self._softcap,
            logit_scale=self._scale,
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
        # A batch without labels is a part of nothing.
        return torch.where(count > 0, mean, 0.0) * count / num_items_in_batch

    def _is_known(self, logits: Tensor, hidden: Tensor) -> bool:
        """Whether ``logits`` are the hidden state that was handed on, capped and scaled as the configuration says. That
        is looked at once, which makes the host wait."""
        if _version(hidden) != self._version:
            return False
        if self._softcap is None and self._scale == 1:
            return logits is hidden
        if self._checked or torch.compiler.is_compiling():
            return True
        expected = hidden.detach()
        if self._softcap is not None:
            expected = torch.tanh(expected / self._softcap) * self._softcap
        expected = expected * self._scale
        if logits.dtype != hidden.dtype or logits.shape != hidden.shape:
            return False
        # They may divide where this multiplies.
        self._checked = torch.allclose(logits, expected, rtol=4 * torch.finfo(logits.dtype).eps, equal_nan=True)
        return self._checked


def _version(x: Tensor) -> int:
    """How often ``x`` was changed in place; the compiler cannot look at that."""
    return 0 if torch.compiler.is_compiling() else x._version


def _base(model: nn.Module) -> Any:
    """The model itself, or that in a PEFT model, whose forward pass leads to it."""
    get: Any = getattr(model, "get_base_model", lambda: model)
    return get()


def _cap(base: Any) -> tuple[float | None, float]:
    """The softcap and the scale of the logits, where the model's forward pass reads one."""
    names = {name for forward in _forwards(base) for name in getattr(forward, "__code__", forward).co_names}
    softcap, scale = None, 1.0
    if "final_logit_softcapping" in names:
        softcap = base.config.final_logit_softcapping
    if "logit_scale" in names:
        scale *= base.logit_scale
    if "logits_scaling" in names:
        scale /= base.config.logits_scaling
    return softcap, scale


def _forwards(base: Any) -> list[Any]:
    return [inspect.unwrap(c.__dict__["forward"]) for c in type(base).__mro__ if "forward" in c.__dict__]


def _parts(model: nn.Module) -> tuple[Any, Any, Any]:
    """The model of transformers, its output layer and its loss function."""
    base = _base(model)
    loss = getattr(base, "loss_function", None)
    if CausalLMPatch.of(model) is not None:
        raise ValueError(
            "model is patched already: assign to the keep of CausalLMPatch.of(model), or remove() it first"
        )
    name = type(base).__name__
    calls_it = any("loss_function" in getattr(forward, "__code__", forward).co_names for forward in _forwards(base))
    if getattr(loss, "__name__", "") != "ForCausalLMLoss" or not calls_it:
        raise TypeError(
            f"model must be a causal language model of transformers that calls its loss_function, got {name}"
        )
    if getattr(base.config, "z_loss_coefficient", 0):
        raise TypeError(f"model must have no loss of its logits besides, {name} has a z_loss_coefficient")
    head = base.get_output_embeddings()
    if getattr(type(head), "forward", None) is not nn.Linear.forward:
        raise TypeError(f"model must have a plain nn.Linear as its output layer, {name} has {type(head).__name__}")
    return base, head, loss
