"""Losses of selected tokens for the causal language models of Hugging Face ``transformers``, without changing their
code.

Two parts of such a model are patched: its output layer, ``get_output_embeddings()``, and its ``loss_function``. While
the model trains on labels, the layer returns its input unchanged, and the loss function gets the last hidden state
instead of logits. Everything added to the model belongs to one object, so that a copy of the model has its own patch.
Training that bypasses the loss function is an error. ``transformers`` itself is not imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from batchkern._past_the_loss import ADVICE, PatchedCall, caller, learns, place, version
from batchkern.ops import Rows, linear_cross_entropy, trimmed_mean
from batchkern.ops import _checks as check
from batchkern.ops.linear_trimmed_cross_entropy import linear_trimmed_cross_entropy

Objective = Callable[[Rows, Tensor], Tensor]

OF_THE_MODEL_ALONE = (
    "num_items_in_batch",
    "past_key_values",
    "use_cache",
    "cache",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
)


def patch_causal_lm(
    model: nn.Module,
    keep: float | Tensor,
    objective: Objective | ExcessLoss | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    chunk_rows: int | None = None,
) -> CausalLMPatch:
    """Makes ``model(input_ids, labels=...)`` train on the tokens with the highest loss, without holding all logits.

    In training mode (``model.train()``) and with ``labels`` or ``shift_labels``, the loss is
    :func:`linear_trimmed_cross_entropy` over the tokens of the batch, and ``output.logits`` is None. With ``keep=1``
    the loss and the gradients equal those of the unpatched model. In evaluation mode the loss is the mean over all
    tokens, and the output has logits unless ``skip_logits=True`` is passed. All other calls, such as those by
    ``generate``, are unchanged. With ``num_items_in_batch`` (gradient accumulation in ``transformers.Trainer``) the
    mean over the kept tokens is weighted by the number of labels of the batch. Patch a model after adapters are added,
    and before it is compiled or wrapped for distributed training. A copy of the model is patched too:
    ``CausalLMPatch.of(copy)`` returns its patch.

    Args:
        model: a causal language model of ``transformers`` that calls its ``loss_function`` on the result of its output
            layer, an ``nn.Linear``. A softcap or a scale from the configuration may be applied in between (Gemma 2 and
            3, Cohere, Granite). For models that change their logits in another way, the first call raises an error.
        keep: fraction of the tokens kept, in (0, 1]; or a 0-dim float64 tensor on the device of the loss.
        objective: replaces the selection of the hardest tokens: an :class:`ExcessLoss`, or your own function
            ``objective(rows, labels)`` that returns the loss, 0-dim. ``rows`` holds loss, lse, entropy and correctness
            of each token, as returned by :func:`linear_cross_entropy`; loss and lse are differentiable. ``labels``, of
            the same shape, are already shifted: the label of a token is the token that it has to predict, or -100 if
            there is none. Tokens that receive no gradient cost no backward pass. The function does not receive
            ``keep``. With ``num_items_in_batch`` its result is treated as a mean over the tokens.
        group, chunk_rows: as in :func:`linear_trimmed_cross_entropy`.

    Returns:
        The patch. Assign to its ``keep`` for a schedule; call its ``remove()`` to restore the model.

    Raises:
        TypeError, ValueError: ``model`` is not such a model, or is already patched; an argument is out of range.
        RuntimeError: in a training step with gradients, if the loss is computed without the patch, for example by a
            trainer that uses the logits; the message names the function that did so. Also in a backward pass in
            evaluation mode, and in the first call, if the model does not pass the result of the output layer to its
            loss function.

    Examples:
        >>> import torch
        >>> from batchkern import patch_causal_lm
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **size))
        >>> patch = patch_causal_lm(model, keep=0.5)
        >>> output = model.train()(tokens := torch.arange(8).view(1, 8), labels=tokens)
        >>> output.logits is None, bool(output.loss > patch.untrimmed_loss)  # the hardest half of the tokens
        (True, True)
    """
    return CausalLMPatch(model, keep, objective, group=group, chunk_rows=chunk_rows)


class CausalLMPatch:
    """The patch of a model by :func:`patch_causal_lm`.

    Args:
        model, keep, objective, group, chunk_rows: as in :func:`patch_causal_lm`, which creates the patch.

    Examples:
        >>> import torch
        >>> from batchkern import CausalLMPatch, patch_causal_lm
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2))
        >>> patch = patch_causal_lm(model, keep=1.0)
        >>> CausalLMPatch.of(model) is patch
        True
        >>> patch.keep = 0.5  # for the steps that follow
        >>> patch.remove()  # the model is as it was
    """

    keep: float | Tensor
    """Fraction of the tokens kept; may be reassigned between steps."""
    untrimmed_loss: Tensor | None = None
    """Mean loss of all tokens of the latest training batch, 0-dim, detached."""

    def __init__(
        self,
        model: nn.Module,
        keep: float | Tensor,
        objective: Objective | ExcessLoss | None = None,
        *,
        group: dist.ProcessGroup | None = None,
        chunk_rows: int | None = None,
    ) -> None:
        check.fraction("keep", keep, keep if isinstance(keep, Tensor) else torch.empty(0))
        check.process_group(group)
        own = callable(objective) and not isinstance(objective, type)
        if not (objective is None or own or isinstance(objective, ExcessLoss)):
            raise TypeError(f"objective must be a function of rows and labels, or an ExcessLoss, got {objective!r}")
        if chunk_rows is not None:
            check.count("chunk_rows", chunk_rows, low=1)
        base, head, loss = _parts(model)
        if isinstance(objective, ExcessLoss):
            objective.prepare(head, chunk_rows)
        self.keep, self._objective, self._group, self._chunk_rows = keep, objective, group, chunk_rows
        self._model, self._base, self._head, self._loss = model, base, head, loss
        self._softcap, self._scale = _cap(base)
        self._checked = False
        self._removed = self._is_reference = False
        self._each_token = False
        self._reference: Tensor | None = None
        self._losses: Tensor | None = None
        self._own_forward = head.__dict__.get("forward")
        self._call = head.forward = PatchedCall(base, head.forward)
        base.loss_function = self._loss_function
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]
        if base.base_model is not base:
            self._hooks.append(base.base_model.register_forward_hook(self._call.refuse_around))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._call.belong(self._base)

    @staticmethod
    def of(model: nn.Module) -> CausalLMPatch | None:
        """The patch of a model, of a copy of a patched model, or of a model within ``model``; None if there is none.

        The patch of a reference model is returned only if there is no other.

        Raises:
            ValueError: there are several.
        """
        _check_module("model", model)
        functions = (module.__dict__.get("_loss_function") for module in model.modules())
        found = [getattr(function, "__self__", None) for function in functions]
        patches = [patch for patch in dict.fromkeys(found) if isinstance(patch, CausalLMPatch)]
        patches = [patch for patch in patches if not patch._is_reference] or patches
        if len(patches) > 1:
            raise ValueError(f"model must have one patched model in it, it has {len(patches)}")
        return patches[0] if patches else None

    def remove(self) -> None:
        """Restores the model's own output layer and loss function, unless this was already done."""
        if self._removed:
            return
        self._removed = True
        for hook in self._hooks:
            hook.remove()
        if self._own_forward is None:
            del self._head.forward
        else:
            self._head.forward = self._own_forward
        self._base.loss_function = self._loss

    @torch.no_grad()
    def token_losses(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of each token, in the shape of the labels; 0 for tokens that have nothing to predict.

        The losses have no gradient, no logits are held, and the result is computed in the mode, training or evaluation,
        that the model is in.

        Args:
            args, kwargs: the arguments of the model, including ``labels``.

        Raises:
            ValueError: there are no labels.
        """
        self._each_token, self._losses = True, None
        try:
            self._model(*args, **kwargs)
            if self._losses is None:
                raise ValueError("labels must be given for the losses of tokens, got None")
            return self._losses
        finally:
            self._each_token, self._losses = False, None

    def _before(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if model is not self._model:
            raise RuntimeError(
                "a shallow copy of a patched model, or its replica in DataParallel, cannot be called: use "
                "copy.deepcopy, or DistributedDataParallel"
            )
        skip_logits = kwargs.pop("skip_logits", False)
        makes_loss = model.training or self._each_token or bool(skip_logits)
        given = {**dict(zip(inspect.signature(model.forward).parameters, args)), **kwargs}
        if given.get("labels") is None and given.get("shift_labels") is not None and makes_loss:
            # Sequence parallelism passes no labels, without which the model computes no loss.
            given["labels"] = kwargs["labels"] = given["shift_labels"]
        call = self._call
        call.inside, call.hidden, call.labelled = True, None, given.get("labels") is not None
        call.active = call.labelled and makes_loss
        known = torch.compiler.is_compiling() or self._base.loss_function == self._loss_function
        if call.active and not (known and _output_layer(self._base) is self._head):
            raise RuntimeError(
                f"{call.name} has another output layer or loss_function than when it was patched (it was replaced, or "
                "an adapter was added or disabled): remove() and patch again"
            )
        if call.active and model.training and not self._each_token and isinstance(self._objective, ExcessLoss):
            self._reference = self._objective.reference_losses(given)
        return args, kwargs

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Runs after each forward pass, even if it raised and there is no output."""
        call, self._reference = self._call, None
        unused, hidden = call.active, call.hidden
        call.inside, call.active, call.hidden = False, False, None
        if output is None:
            return output
        if not call.labelled and learns(model, output):
            raise RuntimeError(
                f"{call.name} was called in training without labels, by {caller()}, so that its loss would be that of "
                f"all tokens: {ADVICE}"
            )
        if unused and (hidden is not None or learns(model, output)):
            base = self._base
            forward = place(base.forward) if "forward" in base.__dict__ else f"{call.name}.forward"
            raise RuntimeError(
                f"the loss of {call.name} was made without the patch, as its forward pass, {forward}, has not called "
                f"its loss_function: {ADVICE}"
            )
        if hidden is None:
            return output
        if isinstance(output, tuple):
            return tuple(x for x in output if x is not hidden)
        return type(output)(**{**output, "logits": None})

    def _loss_function(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        call = self._call
        if not call.active:
            items = num_items_in_batch, ignore_index, shift_labels
            loss = cast(Tensor, self._loss(logits, labels, vocab_size, *items, **others))
            call.refuse_backward_of(loss)
            return loss
        hidden = call.hidden
        if hidden is None or not self._is_known(logits, hidden):
            raise RuntimeError(
                f"{call.name} cannot be patched: between the output layer and the loss it changes its logits, by a "
                "hook, a cast, or a scale or cap that its configuration does not name"
            )
        loss = self._loss_of(hidden, labels, num_items_in_batch, ignore_index, shift_labels)
        # The output holds this tensor in place of logits. It is set last, because an objective may call the model.
        call.active, call.hidden = False, logits
        return loss

    def _loss_of(
        self,
        hidden: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None,
        ignore_index: int,
        shift_labels: Tensor | None,
    ) -> Tensor:
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        tokens = hidden.shape[:-1]
        if shift_labels.numel() != tokens.numel():
            raise ValueError(
                f"labels must have one for each of the {tokens.numel()} tokens that have logits, got "
                f"{shift_labels.numel()}: with logits_to_keep, pass shift_labels of those tokens"
            )
        target = shift_labels.reshape(tokens).to(hidden.device)
        options: dict[str, Any] = {"bias": self._head.bias, "softcap": self._softcap, "logit_scale": self._scale}
        options |= {"ignore_index": ignore_index, "chunk_rows": self._chunk_rows}
        if self._each_token:
            self._losses = linear_cross_entropy(hidden, self._head.weight, target, reduction="none", **options)
            return self._losses.sum()
        counted = target != ignore_index
        if self._model.training:
            loss = self._selected(hidden, target, counted, options)
        else:
            loss = linear_cross_entropy(hidden, self._head.weight, target, **options)
            self._call.refuse_backward_of(loss)
        if num_items_in_batch is None:
            return loss
        count = counted.sum()
        if self._group is not None:
            # With a group the loss is the mean over all processes, so the count has to be their mean too.
            dist.all_reduce(count, group=self._group)
            count = count / dist.get_world_size(self._group)
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        # A batch without labels contributes nothing.
        return torch.where(count > 0, loss, 0.0) * count / num_items_in_batch

    def _selected(self, hidden: Tensor, target: Tensor, counted: Tensor, options: dict[str, Any]) -> Tensor:
        """The loss to train on."""
        weight = self._head.weight
        if self._objective is None:
            flat, of_each = hidden.flatten(0, -2), target.flatten()
            loss, losses = linear_trimmed_cross_entropy(
                flat, weight, of_each, self.keep, per_sample=True, group=self._group, **options
            )
        elif isinstance(self._objective, ExcessLoss):
            reference = cast(Tensor, self._reference)
            if reference.shape != target.shape:
                raise ValueError(
                    f"reference_model must give a loss for each of the {tuple(target.shape)} tokens of the model, got "
                    f"{tuple(reference.shape)}: a learnt prompt has no part in it"
                )
            keep = check.fraction("keep", self.keep, hidden)
            if not isinstance(keep, Tensor) and self._group is None:
                options["backward_rows"] = max(1, round(keep * target.numel()))
            losses = linear_cross_entropy(hidden, weight, target, reduction="none", **options)
            loss = trimmed_mean(losses, keep, score=losses.detach() - reference, mask=counted, group=self._group)
        else:
            rows = linear_cross_entropy(hidden, weight, target, stats=True, **options)
            losses, loss = rows.loss, self._objective(rows, target)
            if not isinstance(loss, Tensor) or loss.ndim:
                raise TypeError(f"objective must return the loss, a 0-dim tensor, got {loss!r}")
        self.untrimmed_loss = losses.detach().sum() / counted.sum()
        return loss

    def _is_known(self, logits: Tensor, hidden: Tensor) -> bool:
        """Whether ``logits`` are the hidden state, unchanged or with the softcap and scale of the configuration. With
        a softcap or scale, the values are compared only once, because the comparison synchronises with the host."""
        if version(hidden) != self._call.version:
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
        # There is a tolerance because the model may divide where this code multiplies.
        self._checked = torch.allclose(logits, expected, rtol=4 * torch.finfo(logits.dtype).eps, equal_nan=True)
        return self._checked


class ExcessLoss:
    """The objective of Rho-1: the fraction ``keep`` of the tokens whose loss most exceeds that of a reference model.

        patch_causal_lm(model, 0.6, ExcessLoss(reference_model))

    The loss is the mean over these tokens. The reference model should be trained on text of the desired kind. It costs
    one more forward pass for each batch; its losses are computed by :func:`linear_cross_entropy`, without gradient and
    without logits. It is not part of the model's ``state_dict``, and copies of the model share it.

    Args:
        reference_model: a causal language model that :func:`patch_causal_lm` accepts, with the vocabulary of the model
            and on the same device. It is put into evaluation mode, and patched if it is not yet; both remain so.

    Raises:
        TypeError: ``reference_model`` cannot be patched, as in :func:`patch_causal_lm`.
        ValueError: when a model is patched that has a vocabulary of another size or shares its output layer with the
            reference model; or when the model is trained on ``inputs_embeds``, on ``past_key_values`` or on a learnt
            prompt, which cannot be passed to the reference model.

    Source: Lin et al., 2024, section 2.2, `arXiv:2404.07965 <https://arxiv.org/abs/2404.07965>`_.

    Examples:
        >>> import torch
        >>> from batchkern import ExcessLoss, patch_causal_lm
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2)
        >>> model, reference = GPT2LMHeadModel(config).train(), GPT2LMHeadModel(config)
        >>> patch = patch_causal_lm(model, 0.6, ExcessLoss(reference))
        >>> output = model(tokens := torch.arange(8).view(1, 8), labels=tokens)
        >>> output.loss.requires_grad, reference.training  # the reference model stays as it is
        (True, False)
    """

    def __init__(self, reference_model: nn.Module) -> None:
        self._model = reference_model.eval() if isinstance(reference_model, nn.Module) else reference_model
        self._patch = CausalLMPatch.of(reference_model) or CausalLMPatch(reference_model, 1.0)
        self._patch._is_reference = True

    def __deepcopy__(self, memo: dict[int, Any]) -> ExcessLoss:
        return self

    def prepare(self, head: nn.Linear, chunk_rows: int | None) -> None:
        """Checks that the reference model fits a model with this output layer; sets its ``chunk_rows``.

        Raises:
            ValueError: the output layer is shared, or the sizes of the vocabularies differ.
        """
        patch, words = self._patch, head.weight.shape[0]
        if patch._head is head:
            raise ValueError("reference_model must have an output layer of its own, it has that of the model")
        if patch._head.weight.shape[0] != words:
            raise ValueError(
                f"reference_model must have the {words} words of the model, it has {patch._head.weight.shape[0]}"
            )
        patch._chunk_rows = chunk_rows

    def reference_losses(self, given: dict[str, Any]) -> Tensor:
        """The loss of each token under the reference model, for the arguments with which the model was called."""
        for name in ("inputs_embeds", "past_key_values"):
            if given.get(name) is not None:
                raise ValueError(f"{name} must be None with an ExcessLoss, whose reference model needs whole input_ids")
        if self._patch._removed:
            raise RuntimeError("the patch of reference_model was removed: make the ExcessLoss anew")
        if self._model.training:  # train() was called on a module that contains the reference model
            self._model.eval()
        inputs = {name: x for name, x in given.items() if name not in OF_THE_MODEL_ALONE}
        return self._patch.token_losses(**inputs, use_cache=False)


def _check_module(name: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} must be a causal language model of transformers, got {type(model).__name__}")


def _base(model: nn.Module) -> Any:
    """The model itself, or the base model within a PEFT model."""
    get: Any = getattr(model, "get_base_model", lambda: model)
    return get()


def _output_layer(base: Any) -> Any:
    """The output layer, or the layer that PEFT trains in its place (``modules_to_save``)."""
    layer = base.get_output_embeddings()
    trained = getattr(layer, "modules_to_save", None)
    if trained is None or layer.disable_adapters or not layer.active_adapters:
        return layer
    return trained[layer.active_adapters[0]]


def _cap(base: Any) -> tuple[float | None, float]:
    """The softcap and the scale of the logits, if the model's forward pass reads them."""
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
    _check_module("model", model)
    base = _base(model)
    loss = getattr(base, "loss_function", None)
    if isinstance(getattr(loss, "__self__", None), CausalLMPatch):
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
    head = _output_layer(base)
    if getattr(type(head), "forward", None) is not nn.Linear.forward:
        raise TypeError(f"model must have a plain nn.Linear as its output layer, {name} has {type(head)}")
    return base, head, loss
