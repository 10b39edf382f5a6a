"""The computation of linear_cross_entropy: matmuls by PyTorch, row operations by the kernels, never all logits at once.

With F = 2 N H V flops, a forward pass over chunks of rows costs F; it stores losses and log-sum-exps. ``gradients``
computes the gradient for the rows with a nonzero upstream gradient: it gathers these rows and loops over slices of the
vocabulary, so that each slice of the weight's gradient is one product, summed in float32 by the matmul and written
once. In the backward pass, a row costs three times as much as in the forward pass: for the logits, the gradient of
hidden and the gradient of weight.

There are three ways to compute the gradient of a fraction of the rows, and ``choose`` takes the cheapest one that
memory allows. If all logits fit into one chunk, they are kept for the backward pass: (1 + 2 share) F. If nearly all
rows count, with equal weights, the forward pass computes the gradient of all rows, chunk by chunk, and then subtracts
that
of the dropped rows: (3 + 2 (1 - share)) F. Otherwise the logits of the rows are computed again: (1 + 3 share) F.

With a softcap c and a scale s, the logits are s c tanh(y / c) of the product y. The matmul divides by c when it writes
u = y / c; the derivative is s / cosh(u)^2, which stays accurate where 1 - tanh(u)^2 does not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from batchkern import _backend
from batchkern.ops import _checks as check
from batchkern.ops.trimmed_mean import trimmed_mean_op
from batchkern.reference import kept_count

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
"""Size of the logits of a chunk, if the caller did not give its number of rows."""
LEAST_CHUNK = 128
"""The smallest number of rows of a chunk; with fewer, matmuls would read the weight too often."""
SLICE_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
"""Size of the logits of a slice of the vocabulary; on a CPU they stay in the cache between two products."""
ALIGNMENT = 64
"""Rows of logits start at multiples of this number of elements."""


class Options(NamedTuple):
    """The options that all operators of this module share, in their order."""

    dtype: torch.dtype
    """Type of the products."""
    ignore_index: int
    label_smoothing: float
    softcap: float | None
    logit_scale: float
    chunk_rows: int | None


BackwardPlan = Literal["keep logits", "gradient of all", "logits again"]


def _most_rows(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> int:
    """The largest number of rows of a chunk within ``CHUNK_BYTES``."""
    size = 4 if hidden.is_cpu else dtype.itemsize  # on a CPU, torch may first compute 16-bit products in float32
    return max(LEAST_CHUNK, CHUNK_BYTES[hidden.device.type] // max(1, weight.shape[0] * size))


def _chunk_rows(hidden: Tensor, weight: Tensor, dtype: torch.dtype, wanted: int | None) -> int:
    """The number of rows of a chunk: ``wanted``, or by default that of equally large chunks."""
    rows = hidden.shape[0]
    if wanted is None:
        wanted = _divide(rows, _divide(rows, _most_rows(hidden, weight, dtype)))
    return max(1, min(wanted, rows))


def all_in_a_chunk(hidden: Tensor, weight: Tensor, dtype: torch.dtype, wanted: int | None) -> bool:
    """Whether one chunk has all rows. It is a comparison with a constant, so the compiler makes at most two graphs."""
    return hidden.shape[0] <= (_most_rows(hidden, weight, dtype) if wanted is None else wanted)


def choose(keep: float | None, needs: Sequence[bool], *, may_keep_logits: bool, dtype: torch.dtype) -> BackwardPlan:
    """The way to compute the gradients of (hidden, weight, bias) with the fewest flops. ``keep`` is None if its value
    is not known on the host, or if the kept rows depend on other processes."""
    if not any(needs):
        return "logits again"  # which is never run
    if may_keep_logits:
        return "keep logits"
    # A float16 gradient would underflow without the loss scale, which comes with the upstream gradient.
    if keep is None or dtype == torch.float16:
        return "logits again"
    products = needs[0] + needs[1]
    again = 1 + keep * (1 + products)
    taken_off = (1 - keep) * (1 + needs[1]) if needs[1] or needs[2] else 0
    return "gradient of all" if 1 + products + taken_off < again else "logits again"


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Disables autocast within ``function``: types are already chosen, and autocast would narrow sums in float32."""

    @functools.wraps(function)
    def wrapper(hidden: Tensor, *args: Any) -> Any:
        with torch.autocast(hidden.device.type, enabled=False):
            return function(hidden, *args)

    return wrapper


# --- products --------------------------------------------------------------------------------------------------


def _divide(size: int, part: int) -> int:
    """``size / part``, rounded up."""
    return -(-size // max(1, part))


def _parts(size: int, part: int) -> Iterator[slice]:
    return (slice(begin, min(begin + part, size)) for begin in range(0, size, part))


def _buffer(rows: int, columns: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty ``(rows, columns)`` tensor with aligned rows; odd strides would slow down matmuls and kernels."""
    stride = _divide(columns, ALIGNMENT) * ALIGNMENT
    return _backend.large_empty(rows, stride, dtype, like)[:, :columns]


class _Layer:
    """The last linear layer with its softcap and scale."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        softcap: float | None,
        logit_scale: float,
    ):
        self.weight, self.bias, self.dtype = weight, bias, dtype
        self.softcap, self.scale = softcap, logit_scale

    def write_logits(self, out: Tensor, hidden: Tensor, capped: Tensor, words: slice = slice(None)) -> Tensor:
        """Computes the logits of some words. Without a softcap they are in ``out``; with one they are in ``capped``,
        and ``out`` holds u, unless both are the same tensor."""
        weight = self.weight[words].to(self.dtype)
        factor = self.scale if self.softcap is None else 1 / self.softcap
        if self.bias is None:
            torch.addmm(out, hidden, weight.t(), beta=0, alpha=factor, out=out)
        else:
            torch.addmm(self.bias[words].to(self.dtype), hidden, weight.t(), beta=factor, alpha=factor, out=out)
        if self.softcap is None:
            return out
        masked = None if self.bias is None else self.bias[words] == -math.inf  # padding of the vocabulary
        torch.tanh(out, out=capped).mul_(self.softcap * self.scale)
        return capped if masked is None else capped.masked_fill_(masked, -math.inf)

    def through_cap(self, gradient: Tensor, u: Tensor) -> None:
        """Turns the gradient with respect to capped logits into that with respect to the product, in place, except for
        the scale, which the upstream gradient includes. Overwrites u."""
        if self.softcap is not None:
            gradient.mul_(u.cosh_().reciprocal_().square_())


def _add_product(out: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """``out += a @ b``, or ``out = a @ b`` if ``first``; ``out`` may have another type than its factors. Only CUDA has
    float32 products of 16-bit factors; elsewhere the product is rounded once before it is added."""
    beta = 0 if first else 1
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif out.is_cuda and out.dtype == torch.float32:
        torch.addmm(out, a, b, out.dtype, beta=beta, out=out)
    elif first:
        out.copy_(a @ b)
    else:
        out.add_(a @ b)


class _Sums:
    """The gradients of weight and bias: in float32 if several terms are added, otherwise in their own type."""

    def __init__(self, weight: Tensor, bias: Tensor | None, needs: Sequence[bool], *, terms: int):
        def empty(x: Tensor | None, needed: bool) -> Tensor | None:
            if x is None or not needed:
                return None
            return torch.empty(x.shape, dtype=x.dtype if terms == 1 else torch.float32, device=x.device)

        self.weight, self.bias = empty(weight, needs[1]), empty(bias, needs[2])
        self.dtypes = weight.dtype, None if bias is None else bias.dtype

    def add(self, gradient: Tensor, hidden: Tensor, *, words: slice = slice(None), first: bool) -> None:
        """Adds the terms of ``gradient (rows, words)``, the gradient of the loss with respect to the logits."""
        if self.weight is not None:
            _add_product(self.weight[words], gradient.t(), hidden, first=first)
        if self.bias is not None:
            term = gradient.sum(0, dtype=torch.float32)
            self.bias[words] = term if first else self.bias[words] + term

    def results(self) -> list[Tensor]:
        return [x.to(dtype) for x, dtype in zip((self.weight, self.bias), self.dtypes, strict=True) if x is not None]


# --- forward ---------------------------------------------------------------------------------------------------


class ForwardChunks:
    """One pass over all rows in chunks: writes losses and log-sum-exps, and yields each chunk with its logits and u."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        dtype: torch.dtype,
        ignore_index: int,
        label_smoothing: float,
        softcap: float | None,
        logit_scale: float,
        chunk_rows: int | None,
        *,
        stats: bool = False,
        keep_u: bool = False,
    ):
        count = len(hidden)
        check.target_values(target, classes=len(weight), ignore_index=ignore_index)
        self.rows = _chunk_rows(hidden, weight, dtype, chunk_rows)
        self.hidden, self.target = hidden, target
        self.options = ignore_index, label_smoothing
        self.layer = _Layer(weight.to(dtype), None if bias is None else bias.to(dtype), dtype, softcap, logit_scale)
        self.losses = torch.empty(count, dtype=torch.float32, device=hidden.device)
        self.lse = self.losses.new_empty(count, 2)
        self.entropy = torch.empty_like(self.losses) if stats else None
        self.correct = torch.empty_like(self.losses, dtype=torch.bool) if stats else None
        self.buffer = _buffer(min(self.rows, count), len(weight), hidden, dtype)
        self.capped = self.buffer
        if softcap is not None and keep_u:
            self.capped = _buffer(len(self.buffer), len(weight), hidden, dtype)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        for part in _parts(len(self.hidden), self.rows):
            hidden = self.hidden[part].to(self.layer.dtype)
            u, capped = self.buffer[: len(hidden)], self.capped[: len(hidden)]
            logits = self.layer.write_logits(u, hidden, capped)
            of_rows = (None if x is None else x[part] for x in (self.losses, self.lse, self.entropy, self.correct))
            torch.ops.batchkern.cross_entropy_losses.default(logits, self.target[part], *of_rows, *self.options)
            yield part, hidden, logits, u


@without_autocast
def losses(hidden: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Losses ``(N,)``, lse ``(N, 2)``, entropy and correct ``(N,)`` (empty unless ``stats``) and, with ``keep_logits``,
    the logits ``(N, V)`` of the only chunk. The arguments are those of ``ForwardChunks``, ``stats`` and
    ``keep_logits``."""
    *options, stats, keep_logits = args
    chunks = ForwardChunks(hidden, *options, stats=stats)
    for _ in chunks:
        pass
    entropy = chunks.losses.new_empty(0) if chunks.entropy is None else chunks.entropy
    correct = entropy.new_empty(0, dtype=torch.bool) if chunks.correct is None else chunks.correct
    return chunks.losses, chunks.lse, entropy, correct, [chunks.buffer] if keep_logits else []


@without_autocast
def losses_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    dtype: torch.dtype,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    chunk_rows: int | None,
    needs: Sequence[bool],
    keep: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Loss, losses, lse, kept, and the gradients of the loss with respect to those of (hidden, weight, bias) that need
    one. The gradient of all rows is computed first; that of the dropped rows is then removed."""
    keep = float(keep)
    valid = target != ignore_index
    normalizer = kept_count(valid.sum(), keep).float()
    options = dtype, ignore_index, label_smoothing, softcap, logit_scale, chunk_rows
    chunks = ForwardChunks(hidden, weight, bias, target, *options, keep_u=True)
    sums = _Sums(weight, bias, needs, terms=_divide(len(hidden), chunks.rows) + (keep < 1))
    to_hidden = torch.empty_like(hidden) if needs[0] else None
    upstream = (logit_scale / normalizer).expand(len(hidden))
    for part, narrow, logits, u in chunks:
        saved = target[part], chunks.lse[part], ignore_index, label_smoothing, 0, None
        torch.ops.batchkern.cross_entropy_backward_.default(upstream[part], None, logits, *saved)
        chunks.layer.through_cap(logits, u)
        ignored = ~valid[part, None]
        if softcap is not None:
            logits.masked_fill_(ignored, 0)
        # An ignored row may hold NaN, as padding does after some attentions; multiplied by zero, it would spread.
        sums.add(logits, narrow.masked_fill(ignored, 0), first=part.start == 0)
        if to_hidden is not None:
            _add_product(to_hidden[part], logits, chunks.layer.weight, first=True)
    losses, lse, rows = chunks.losses, chunks.lse, chunks.rows
    del chunks, narrow, logits, u  # one chunk of logits at a time
    loss, kept, normalizer = trimmed_mean_op(losses, keep, None, valid)
    if keep < 1:
        if needs[1] or needs[2]:
            layer = _Layer(weight, bias, dtype, softcap, logit_scale)
            off = torch.where(valid & ~kept, -1 / normalizer, 0.0)
            dropped = _Rows(hidden, target, lse, off, None, ignore_index, layer, (None, 1 - keep))
            for words, gradient in dropped.gradients(label_smoothing, rows):
                sums.add(gradient, dropped.hidden, words=words, first=False)
        if to_hidden is not None:
            to_hidden.masked_fill_(~kept[:, None], 0)
    return loss, losses, lse, kept, [*([] if to_hidden is None else [to_hidden]), *sums.results()]


# --- backward --------------------------------------------------------------------------------------------------


class Shard(NamedTuple):
    """The part of the vocabulary of one process in a group whose processes all have the same rows."""

    group: dist.ProcessGroup
    first: int
    words: int
    """Size of the whole vocabulary."""


Limits = tuple[int | None, float | None]
"""Limits on the rows with a gradient: a number promised by the caller, and a fraction of all rows known to be
enough."""


def _count(mask: Tensor, limits: Limits) -> int:
    """The number of rows in a mask, or on a GPU an upper limit. If no limit is known, the number is read from the GPU,
    unless a graph is being captured."""
    promised, share = limits
    if mask.is_cpu:
        count = int(mask.sum())
        if promised is not None and count > promised:
            raise ValueError(f"backward_rows was {promised}, and {count} rows have a gradient")
        return count
    if promised is not None:
        torch._assert_async(mask.sum() <= promised, "more rows have a gradient than backward_rows")
        return min(len(mask), promised)
    if share is None:
        return len(mask) if torch.cuda.is_current_stream_capturing() else int(mask.sum())
    return min(len(mask), math.floor(share * len(mask)) + 1)


class _Rows:
    """The gathered rows with a nonzero upstream gradient."""

    def __init__(
        self,
        hidden: Tensor,
        target: Tensor,
        lse: Tensor,
        grad: Tensor | None,
        grad_lse: Tensor | None,
        ignore_index: int,
        layer: _Layer,
        limits: Limits,
    ):
        upstream = grad, grad_lse
        live = torch.stack([x != 0 for x in upstream if x is not None]).any(0) & (target != ignore_index)
        # Rows with a gradient come first, in order. The rows after them fill up the number; their gradient is zero.
        self.index = torch.sort(live.byte(), descending=True, stable=True).indices[: _count(live, limits)]
        others = ~live[self.index]
        self.layer, self.ignore_index = layer, ignore_index
        self.hidden = hidden[self.index].to(layer.dtype).masked_fill_(others[:, None], 0)
        self.target, self.lse = target[self.index], lse[self.index]
        self.upstream = [None if x is None else (x[self.index] * layer.scale).masked_fill_(others, 0) for x in upstream]

    def gradients(
        self, label_smoothing: float, chunk: int, logits: Tensor | None = None, shard: Shard | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """For each slice of the vocabulary, the gradient ``(rows, words)`` with respect to its products. The logits are
        taken from ``logits (N, V)`` or computed again. Each slice reuses the same memory, at most a chunk."""
        first, every = (0, len(self.layer.weight)) if shard is None else shard[1:]
        weight, dtype = self.layer.weight, self.layer.dtype
        rows, words = len(self.index), len(weight)
        most = min(chunk * words, SLICE_BYTES[weight.device.type] // dtype.itemsize)
        width = _divide(words, _divide(words * rows, most))
        if width > ALIGNMENT:
            width = min(words, _divide(width, ALIGNMENT) * ALIGNMENT)
        buffer = _buffer(rows if logits is None else 0, width, weight, dtype)
        capped = buffer if self.layer.softcap is None else torch.empty_like(buffer)
        for part in _parts(words, max(1, width)):
            size = part.stop - part.start
            if logits is None:
                out = self.layer.write_logits(buffer[:, :size], self.hidden, capped[:, :size], part)
            else:
                out = logits[:, part].index_select(0, self.index)
            saved = self.target, self.lse, self.ignore_index, label_smoothing
            torch.ops.batchkern.cross_entropy_backward_.default(*self.upstream, out, *saved, first + part.start, every)
            self.layer.through_cap(out, buffer[:, :size])
            yield part, out


@without_autocast
def gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad: Tensor | None,
    grad_lse: Tensor | None,
    target: Tensor,
    lse: Tensor,
    logits: Tensor | None,
    dtype: torch.dtype,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    chunk_rows: int | None,
    needs: Sequence[bool],
    backward_rows: int | None,
    keep: float | Tensor | None,
    shard: Shard | None = None,
) -> list[Tensor]:
    """The gradients with respect to those of (hidden, weight, bias) that need one, from the rows with a nonzero
    upstream gradient ``grad`` or ``grad_lse (N,)``: at most ``backward_rows``, and at most the fraction ``keep`` of
    all."""
    layer = _Layer(weight, bias, dtype, softcap, logit_scale)
    limits = backward_rows, None if keep is None else float(keep)
    rows = _Rows(hidden, target, lse, grad, grad_lse, ignore_index, layer, limits)
    sums = _Sums(weight, bias, needs, terms=1)
    to_rows = torch.zeros(rows.hidden.shape, device=hidden.device) if needs[0] else None
    chunk = _chunk_rows(hidden, weight, dtype, chunk_rows)
    for words, gradient in rows.gradients(label_smoothing, chunk, logits, shard):
        sums.add(gradient, rows.hidden, words=words, first=True)
        if to_rows is not None:
            _add_product(to_rows, gradient, weight[words].to(dtype), first=False)
    if to_rows is None:
        return sums.results()
    if shard is not None:
        dist.all_reduce(to_rows, group=shard.group)
    return [torch.zeros_like(hidden).index_copy_(0, rows.index, to_rows.to(hidden.dtype)), *sums.results()]


# --- for the compiler: a node of its graph, where loops would be unrolled and numbers of rows must be known -------


def _operator(function: Callable[..., Any], arguments: str, results: str) -> Any:
    """The operator ``batchkern::linear_<function>`` with these arguments after the common ones."""
    schema = f"(Tensor hidden, Tensor weight, Tensor? bias, {arguments}) -> {results}"
    # The host reads keep: a CUDA graph of the compiler would always use the value at capture.
    tags = [torch.Tag.cudagraph_unsafe] if arguments.endswith(" keep") else []
    return torch.library.custom_op(
        f"batchkern::linear_{function.__name__}", function, mutates_args=(), schema=schema, tags=tags
    )


_OPTIONS = (
    "ScalarType dtype, int ignore_index, float label_smoothing, float? softcap, float logit_scale, int? chunk_rows"
)

_operators = {
    losses: _operator(
        losses,
        f"Tensor target, {_OPTIONS}, bool stats, bool keep_logits",
        "(Tensor, Tensor, Tensor, Tensor, Tensor[])",
    ),
    losses_and_gradients: _operator(
        losses_and_gradients,
        f"Tensor target, {_OPTIONS}, bool[] needs, Tensor keep",
        "(Tensor, Tensor, Tensor, Tensor, Tensor[])",
    ),
    gradients: _operator(
        gradients,
        f"Tensor? grad, Tensor? grad_lse, Tensor target, Tensor lse, Tensor? logits, {_OPTIONS}, bool[] needs, "
        "SymInt? backward_rows, Tensor? keep",
        "Tensor[]",
    ),
}


def run(function: Callable[..., Any], *args: Any) -> Any:
    """Runs ``function``, or its operator while a graph is being traced. If the last argument is a float, it is
    ``keep``: a number would be a constant of the graph, and a schedule would recompile at each change."""
    if not torch.compiler.is_compiling() and not isinstance(args[0], FakeTensor):
        return function(*args)
    *rest, keep = args
    if isinstance(keep, float):
        keep = torch.ones((), dtype=torch.float64, device="cpu") * keep
    return _operators[function](*rest, keep)


@_operators[losses].register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, dtype: torch.dtype, *rest: Any) -> Any:
    *_, stats, keep_logits = rest
    count = hidden.shape[0]
    losses = hidden.new_empty(count, dtype=torch.float32)
    rows = torch.empty_like(losses) if stats else losses.new_empty(0)
    logits = [_buffer(count, weight.shape[0], hidden, dtype)] if keep_logits else []
    return losses, losses.new_empty(count, 2), rows, torch.empty_like(rows, dtype=torch.bool), logits


@_operators[losses_and_gradients].register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Any:
    needs = rest[-2]
    losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    lse, kept = losses.new_empty(*losses.shape, 2), torch.empty_like(losses, dtype=torch.bool)
    return losses.new_empty(()), losses, lse, kept, _fake_gradients(hidden, weight, bias, needs)


@_operators[gradients].register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Any:
    return _fake_gradients(hidden, weight, bias, rest[-3])


def _fake_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]) -> list[Tensor]:
    new = [torch.empty_like(hidden), weight.new_empty(weight.shape)]
    if bias is not None:
        new.append(bias.new_empty(bias.shape))
    return [x for x, needed in zip(new, needs) if needed]
