"""The cross entropy of each token, fused with the last linear layer: see ``_chunked_linear.py`` for how."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor

from batchkern import _backend, reference
from batchkern.ops import _checks as check
from batchkern.ops import _chunked_linear
from batchkern.ops._autograd import boundary, is_batched, once_differentiable, one_by_one
from batchkern.ops._chunked_linear import Options
from batchkern.ops._public import check_memory, public
from batchkern.ops._sharded import check_equal, local, losses_of_shard, shard_of, whole
from batchkern.ops.cross_entropy import Reduction
from batchkern.ops.trimmed_mean import trimmed_mean
from batchkern.reference import Rows


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    reduction: Reduction = ...,
    stats: Literal[False] = ...,
    chunk_rows: int | None = ...,
    backward_rows: int | None = ...,
    vocab_group: dist.ProcessGroup | None = ...,
) -> Tensor: ...
@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    reduction: Reduction = ...,
    stats: Literal[True],
    chunk_rows: int | None = ...,
    backward_rows: int | None = ...,
    vocab_group: dist.ProcessGroup | None = ...,
) -> Rows: ...
@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    reduction: Reduction = ...,
    stats: bool,
    chunk_rows: int | None = ...,
    backward_rows: int | None = ...,
    vocab_group: dist.ProcessGroup | None = ...,
) -> Tensor | Rows: ...
@public
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: Reduction = "mean",
    stats: bool = False,
    chunk_rows: int | None = None,
    backward_rows: int | None = None,
    vocab_group: dist.ProcessGroup | None = None,
) -> Tensor | Rows:
    """``cross_entropy`` of ``F.linear(hidden, weight, bias)`` without all logits; tokens without a gradient cost no
    backward pass.

    With F = 2 N H V flops for N tokens the forward pass costs F. With ``reduction="none"`` or ``stats`` any code may
    select, mask or weigh the losses of the tokens, and the backward pass costs 3 F times the fraction of the tokens
    with a
    nonzero upstream gradient: their logits are computed again, or taken from the forward pass if the logits of all
    tokens fit into one chunk. ``"mean"`` and ``"sum"`` cost 3 F in all (in float16 4 F). The memory is the same as for
    :func:`linear_trimmed_cross_entropy`.

    Args:
        hidden: ``(..., H)`` float32, bfloat16, float16 or float64 (without a kernel, and with all logits in memory).
        weight: ``(V, H)``, same dtype; may be the weight of the embedding. Under autocast types may differ, since
            ``F.linear`` would cast both, and the gradient of a float32 weight is computed in float32. A DTensor
            (FSDP2's ``fully_shard``) is gathered once per call, in the type of ``hidden``, and its gradient, the mean
            over the processes of its mesh, is reduced once.
        target: ``(...)``, of any integer type, in [0, V), or ``ignore_index``.
        bias: ``(V,)``, of the type of weight.
        ignore_index: any int; tokens with this target have neither loss nor gradient.
        label_smoothing: in [0, 1], as in ``torch.nn.functional.cross_entropy``.
        softcap: from 1e-30 to 1e30: the logits are ``softcap * tanh(x / softcap)`` of the product x, as in Gemma 2. A
            logit of -inf, from a bias that masks words, stays -inf.
        logit_scale: from 1e-30 to 1e30: the final factor on the logits, such as the ``logit_scale`` of Cohere or
            1 / ``logits_scaling`` of Granite.
        reduction: ``"none"``, ``"mean"`` (over the tokens that are not ignored) or ``"sum"``.
        stats: return :class:`Rows` instead of the losses, whatever the reduction.
        chunk_rows: rows of a chunk, at least 1. None: equal chunks of at most 64 MiB of logits, on a GPU 512 MiB, but
            of at least 128 rows.
        backward_rows: at least 0: an upper limit on the tokens with a nonzero upstream gradient, if losses are returned
            for each token. The backward pass then does not synchronise with the GPU, and can be captured in a CUDA
            graph; a graph captured without it does the work for all tokens. Ignored in float64.
        vocab_group: the vocabulary is sharded over the processes of this group: weight (and bias) are the words of this
            process, in the order of the ranks, any number of them, or DTensors of ``Shard(0)``, whose local part is
            used. Hidden, target and the use of the losses must be the same on all processes; targets are indices into
            the whole vocabulary. The gradient of hidden is summed over the group. Reductions cost 4 F. Not supported
            within ``torch.compile``.

    Returns:
        The losses ``(...)``, or 0-dim. With ``stats`` it is ``Rows(loss, lse, entropy, correct)``, all ``(...)``, of
        which loss and lse are differentiable. Floats are float32 (float64 for float64).

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or range.
        ValueError: in the backward pass, if more than ``backward_rows`` tokens have a nonzero upstream gradient, or if
            the processes of ``vocab_group`` have different upstream gradients; on a GPU it is a device-side assert.
        RuntimeError: in the backward pass, when it is differentiated again.

    Examples:
        >>> import torch
        >>> from batchkern import linear_cross_entropy
        >>> hidden = torch.eye(2)  # two tokens
        >>> weight = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log()  # of a vocabulary of two words
        >>> losses = linear_cross_entropy(hidden, weight, torch.tensor([0, 1]), reduction="none")
        >>> [round(loss, 4) for loss in losses.tolist()]
        [0.2877, 0.6931]
    """
    check.one_of("reduction", reduction, ("none", "mean", "sum"))
    if backward_rows is not None:
        check.count("backward_rows", backward_rows)
    weight, bias, options = checked(
        hidden,
        weight,
        target,
        bias=bias,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        softcap=softcap,
        logit_scale=logit_scale,
        chunk_rows=chunk_rows,
        vocab_group=vocab_group,
    )
    if reduction == "none" or stats:
        rows: dict[str, Any] = {"stats": stats, "backward_rows": backward_rows, "vocab_group": vocab_group}
        return each_row(hidden, weight, bias, target, options, **rows)
    mean, _ = trimmed_linear_loss(hidden, weight, bias, target, 1.0, options, vocab_group=vocab_group)
    if reduction == "mean":
        return mean
    count = reference.valid_rows(target, ignore_index).sum()
    return torch.where(count > 0, mean * count, 0.0)


def checked(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    chunk_rows: int | None,
    vocab_group: dist.ProcessGroup | None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor | None, Options]:
    """Checks all arguments. Returns weight and bias, gathered if they were sharded, and the options."""
    check.tensor("hidden", hidden)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"hidden must have shape (..., H) with H > 0, got {tuple(hidden.shape)}")
    dtype = torch.get_autocast_dtype(hidden.device.type) if _autocasts(hidden) else hidden.dtype
    check.process_group(vocab_group, "vocab_group")
    if vocab_group is None:
        weight, bias = whole(weight, dtype), None if bias is None else whole(bias, dtype)
    else:
        weight = local("weight", weight, vocab_group)
        bias = None if bias is None else local("bias", bias, vocab_group)
        if torch.compiler.is_compiling():
            raise RuntimeError("vocab_group must be None within torch.compile: its collectives are not traced")
        if hidden.dtype == torch.float64 or not _backend.has_kernel("linear_cross_entropy", hidden):
            raise TypeError(
                "hidden must be float32, bfloat16 or float16, and not within a transform of torch.func, if "
                f"vocab_group is given, got {str(hidden.dtype).removeprefix('torch.')}"
            )
    _check_parameter("weight", weight, 2, hidden)
    words, width = weight.shape
    if hidden.shape[-1] != width:
        raise ValueError(f"weight must have shape (V, {hidden.shape[-1]}) to match hidden, got {tuple(weight.shape)}")
    if words == 0 and vocab_group is None:
        raise ValueError(f"weight must have at least one word, got shape {tuple(weight.shape)}")
    if bias is not None:
        _check_parameter("bias", bias, 1, hidden)
        check.vector("bias", bias, rows=words, like=hidden, dtypes=(bias.dtype,))
    check.tensor("target", target, dtypes=check.INTEGERS)
    if target.shape != hidden.shape[:-1]:
        raise ValueError(f"target must have shape {tuple(hidden.shape[:-1])}, got {tuple(target.shape)}")
    check.same_device("target", target, hidden)
    check.ignored(ignore_index, group)
    check_options(label_smoothing, softcap, logit_scale, chunk_rows)
    softcap = None if softcap is None else float(softcap)
    return weight, bias, Options(dtype, ignore_index, float(label_smoothing), softcap, float(logit_scale), chunk_rows)


def check_options(label_smoothing: float, softcap: float | None, logit_scale: float, chunk_rows: int | None) -> None:
    """Checks the options that are numbers."""
    check.number("label_smoothing", label_smoothing, 0, 1)
    if softcap is not None:
        check.number("softcap", softcap, 1e-30, 1e30)
    check.number("logit_scale", logit_scale, 1e-30, 1e30)
    if chunk_rows is not None:
        check.count("chunk_rows", chunk_rows, low=1)


def _autocasts(hidden: Tensor) -> bool:
    """Whether ``F.linear`` would cast its arguments."""
    device = hidden.device.type
    return hidden.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device)


def _check_parameter(name: str, x: Tensor, dims: int, hidden: Tensor) -> None:
    if isinstance(x, Tensor):
        check.ordinary(name, x)
        if x.shape == (0,) and dims == 2:
            raise ValueError(
                f"{name} is empty: its trainer keeps it sharded outside its module, as DeepSpeed ZeRO-3 and FSDP1 do. "
                "Call within deepspeed.zero.GatheredParameters([...]) or FSDP.summon_full_params(...), or use FSDP2"
            )
    check.tensor(name, x, dims=dims, dtypes=check.FLOATS[:3] if _autocasts(hidden) else (hidden.dtype,))
    check.same_device(name, x, hidden)


def each_row(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    options: Options,
    *,
    stats: bool = False,
    backward_rows: int | None = None,
    share: float | None = None,
    vocab_group: dist.ProcessGroup | None = None,
) -> Any:
    """The losses, or with ``stats`` the ``Rows``, for checked arguments. ``share`` is an upper limit on the fraction of
    the rows with a nonzero upstream gradient, known to the caller."""
    if not _backend.has_kernel("linear_cross_entropy", hidden):
        check.target_values(target, classes=len(weight), ignore_index=options.ignore_index)
        layer = boundary(hidden), boundary(weight), target
        found = reference.linear_cross_entropy(*layer, **_reference_options(bias, options), stats=stats)
        return found if stats else found.loss
    rows, labels = hidden.reshape(-1, hidden.shape[-1]), target.flatten()
    needs = _needs(hidden, weight, bias)
    shard = None if vocab_group is None else shard_of(weight, vocab_group)
    arguments = rows, weight, bias, labels, *options, stats
    logits: list[Tensor] = []
    with torch.no_grad():
        if shard is None:
            keep_logits = any(needs) and _may_keep_logits(rows, weight, options)
            losses, state, entropy, correct, logits = _chunked_linear.run(
                _chunked_linear.losses, *arguments, keep_logits
            )
        else:
            losses, state, entropy, correct = losses_of_shard(*arguments, shard)
        lse = state[:, 0] + state[:, 1] if stats else None
    limits = backward_rows, share
    forward = _Losses(losses, lse, labels, state, logits[0] if logits else None, options, needs, limits, shard)
    results: Any = _LinearCrossEntropy.apply(rows, weight, bias, forward)
    if not stats:
        return results.view(target.shape)
    return Rows(*(x.view(target.shape) for x in (*results, entropy, correct)))


def _needs(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[bool, bool, bool]:
    """Whether each of hidden, weight and bias needs a gradient."""
    if not torch.is_grad_enabled():
        return False, False, False
    return hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad


def _reference_options(bias: Tensor | None, options: Options) -> dict[str, Any]:
    """The options of the reference, which has no compute type and no chunks."""
    own = {name: value for name, value in options._asdict().items() if name not in ("dtype", "chunk_rows")}
    return {**own, "bias": None if bias is None else boundary(bias)}


def trimmed_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    keep: float | Tensor,
    options: Options,
    group: dist.ProcessGroup | None = None,
    vocab_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """The mean loss of the kept rows and the losses of all rows, for checked arguments."""
    if isinstance(keep, Tensor) and check.readable(keep):
        keep = float(keep)
    if not _backend.has_kernel("linear_trimmed_cross_entropy", hidden):
        check.target_values(target, classes=len(weight), ignore_index=options.ignore_index)
        layer = boundary(hidden), boundary(weight), target
        own = _reference_options(bias, options)
        return reference.linear_trimmed_cross_entropy(*layer, keep, **own, group=group)
    known = keep if group is None and isinstance(keep, float) else None
    if known is not None and vocab_group is None and target.numel() > 0:
        needs, rows = _needs(hidden, weight, bias), hidden.reshape(-1, hidden.shape[-1])
        may_keep = _may_keep_logits(rows, weight, options)
        if _chunked_linear.choose(known, needs, may_keep_logits=may_keep, dtype=options.dtype) == "gradient of all":
            labels = target.flatten()
            with torch.no_grad():
                loss, losses, lse, kept, grads = _chunked_linear.run(
                    _chunked_linear.losses_and_gradients, rows, weight, bias, labels, *options, needs, known
                )
            forward = _Mean(loss, labels, lse, kept, tuple(grads), options, needs, known)
            return _MeanWithGradient.apply(rows, weight, bias, forward), losses.view(target.shape)
    # A keep tensor on a GPU is not read by the host, so it may keep all rows.
    share = None if group is not None else 1.0 if known is None else known
    losses = each_row(hidden, weight, bias, target, options, share=share, vocab_group=vocab_group)
    valid = reference.valid_rows(target, options.ignore_index)
    return trimmed_mean(losses, keep, mask=valid, group=group), losses


def _may_keep_logits(hidden: Tensor, weight: Tensor, options: Options) -> bool:
    # With a softcap, two tensors of the logits' size would have to be kept.
    return options.softcap is None and _chunked_linear.all_in_a_chunk(hidden, weight, options.dtype, options.chunk_rows)


class _Losses(NamedTuple):
    """The results of ``_chunked_linear.losses`` for N rows that the backward pass needs."""

    losses: Tensor
    """``(N,)``."""
    lse: Tensor | None
    """``(N,)``, with a gradient; None without ``stats``."""
    target: Tensor
    """``(N,)``."""
    state: Tensor
    """``(N, 2)``: lse in two parts."""
    logits: Tensor | None
    """``(N, V)``; None if they are not kept."""
    options: Options
    needs: tuple[bool, bool, bool]
    limits: _chunked_linear.Limits
    shard: _chunked_linear.Shard | None


class _LinearCrossEntropy(torch.autograd.Function):
    """Adds the gradient to the losses and log-sum-exps of a forward pass that has already run.

    With h the row of hidden, z = W h + b its logits, and d the gradient with respect to z that ``cross_entropy``
    derives (through the softcap and the scale, see ``_chunked_linear.py``), the gradient is:

    1. with respect to h: d W;
    2. with respect to W: the outer product of d and h, summed over the rows;
    3. with respect to b: d, summed over the rows.

    d is zero in a row without an upstream gradient, so such a row contributes nothing.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, forward: _Losses) -> Any:
        ctx.save_for_backward(hidden, weight, bias, forward.target, forward.state, forward.logits)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.needs, ctx.limits, ctx.shard = forward.options, forward.needs, forward.limits, forward.shard
        losses = forward.losses.detach()  # as in trimmed_cross_entropy
        return losses if forward.lse is None else (losses, forward.lse.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None = None) -> tuple[Tensor | None, ...]:
        if grad is None and grad_lse is None:
            return None, None, None, None
        hidden, weight, bias, *saved = ctx.saved_tensors  # read only once, as activation checkpointing requires
        check_memory(hidden=hidden, weight=weight, bias=bias, target=saved[0], grad=grad)

        def gradients(grad: Tensor | None, grad_lse: Tensor | None) -> list[Tensor]:
            arguments = hidden, weight, bias, grad, grad_lse, *saved, *ctx.options, ctx.needs, *ctx.limits
            if ctx.shard is None:
                return _chunked_linear.run(_chunked_linear.gradients, *arguments)
            check_equal(ctx.shard.group, (grad, grad_lse))
            return _chunked_linear.gradients(*arguments, ctx.shard)

        grads = one_by_one(gradients, grad, grad_lse)
        results = iter(grads)
        return *(next(results) if needed else None for needed in ctx.needs), None


class _Mean(NamedTuple):
    """The results of ``_chunked_linear.losses_and_gradients`` for N rows that the backward pass needs."""

    loss: Tensor
    """``()``, the only result with a gradient."""
    target: Tensor
    """``(N,)``."""
    lse: Tensor
    """``(N, 2)``, in two parts."""
    kept: Tensor
    """``(N,)`` bool."""
    grads: tuple[Tensor, ...]
    """The gradients of those of (hidden, weight, bias) that need one."""
    options: Options
    needs: tuple[bool, bool, bool]
    keep: float


class _MeanWithGradient(torch.autograd.Function):
    """Adds to the mean of the kept rows the gradient that the forward pass has computed, see
    ``_chunked_linear.losses_and_gradients``. The backward pass multiplies it by the upstream gradient, in place."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, forward: _Mean) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, forward.target, forward.lse, forward.kept, *forward.grads)
        ctx.options, ctx.needs, ctx.keep = forward.options, forward.needs, forward.keep
        ctx.used = False
        return forward.loss.detach()  # as in trimmed_cross_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, lse, kept, *grads = ctx.saved_tensors
        check_memory(grad=grad, **({"hidden": hidden, "weight": weight, "target": target} if ctx.used else {}))
        if torch.compiler.is_compiling():
            grads = [grad * x for x in grads]
        elif ctx.used:

            def again(grad: Tensor) -> list[Tensor]:
                upstream = torch.where(kept, grad / kept.sum(), 0.0)
                saved = upstream, None, target, lse, None
                arguments = hidden, weight, bias, *saved, *ctx.options, ctx.needs, None, ctx.keep
                return _chunked_linear.run(_chunked_linear.gradients, *arguments)

            grads = one_by_one(again, grad)
        else:
            if is_batched(grad):
                grads = [grad * x for x in grads]  # in place, there is room for only one
            else:
                ctx.used = True  # another backward pass computes them again
                # .data hides the scaling from autograd, which would raise an error about a modified tensor.
                grads = [x.data.mul_(grad) for x in grads]
            if ctx.needs[0]:
                grads[0].masked_fill_(~kept[:, None], 0)  # even where the upstream gradient is infinite
        results = iter(grads)
        return *(next(results) if needed else None for needed in ctx.needs), None
