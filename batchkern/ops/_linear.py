"""The work of linear_trimmed_cross_entropy: matmuls by PyTorch, rows by the kernels, never all logits at once.

With F = 2 N H V flops a forward pass costs F, over chunks of rows, and leaves losses and log-sum-exps. ``gradients``
makes the gradient of some rows from these: it gathers the rows and goes over slices of the vocabulary, so that each
slice of the weight's gradient is one product, summed in float32 by the matmul and written once. A row costs three times
what it cost before: logits, the gradient of hidden, that of weight.

Three ways lead to the gradient, and ``choose`` takes the cheapest that memory allows. All logits fit into a chunk: they
are kept for the backward pass, (1 + 2 keep) F. Nearly all rows are kept: the forward pass makes the gradient of all,
chunk by chunk, and takes that of the dropped rows off again, (3 + 2 (1 - keep)) F. Otherwise the logits of the kept
rows are computed again, (1 + 3 keep) F.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from batchkern import _backend
from batchkern.ops import _checks as check
from batchkern.ops.trimmed_mean import trimmed_mean_op
from batchkern.reference import kept_count

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
"""Of the logits of a chunk, where the caller did not say how many rows it has."""
LEAST_CHUNK = 128
"""Rows: with fewer, matmuls would read the weight too often."""
SLICE_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
"""Of the logits of a slice of the vocabulary: on a CPU they stay in the cache from one product to the next."""
ALIGNMENT = 64
"""Elements: rows of logits begin at multiples of it."""

Way = Literal["keep logits", "gradient of all", "logits again"]


def chunk_rows(hidden: Tensor, weight: Tensor, dtype: torch.dtype, wanted: int | None) -> int:
    """Rows of a chunk: as many as were wanted, or else those of equal chunks within ``CHUNK_BYTES``."""
    rows, words = hidden.shape[0], weight.shape[0]
    if wanted is None:
        size = 4 if hidden.is_cpu else dtype.itemsize  # on a CPU torch may make narrower products in float32 first
        most = max(LEAST_CHUNK, CHUNK_BYTES[hidden.device.type] // max(1, words * size))
        wanted = _divide(rows, _divide(rows, most))
    return max(1, min(wanted, rows))


def choose(keep: float | None, needs: Sequence[bool], *, all_in_a_chunk: bool, dtype: torch.dtype) -> Way:
    """The way to the gradients of (hidden, weight, bias) that takes the fewest flops. ``keep`` is None where the host
    does not know it, or where other processes have a say in which rows are kept."""
    if not any(needs):
        return "logits again"  # never, that is
    if all_in_a_chunk:
        return "keep logits"
    # Without the upstream gradient, which scales the loss, a gradient in float16 would underflow.
    if keep is None or dtype == torch.float16:
        return "logits again"
    products = needs[0] + needs[1]
    again = 1 + keep * (1 + products)
    taken_off = (1 - keep) * (1 + needs[1]) if needs[1] or needs[2] else 0
    return "gradient of all" if 1 + products + taken_off < again else "logits again"


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Types were chosen before; autocast would narrow what is summed in float32."""

    @functools.wraps(function)
    def wrapper(hidden: Tensor, *args: Any) -> Any:
        with torch.autocast(hidden.device.type, enabled=False):
            return function(hidden, *args)

    return wrapper


# --- products --------------------------------------------------------------------------------------------------


def _divide(size: int, part: int) -> int:
    """Rounded up."""
    return -(-size // max(1, part))


def _parts(size: int, part: int) -> Iterator[slice]:
    return (slice(begin, min(begin + part, size)) for begin in range(0, size, part))


def _buffer(rows: int, columns: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """``(rows, columns)`` whose rows begin at aligned places: odd strides would slow down matmuls and kernels."""
    stride = _divide(columns, ALIGNMENT) * ALIGNMENT
    return torch.empty(rows, stride, dtype=dtype, device=like.device)[:, :columns]


def _write_logits(out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        torch.mm(hidden, weight.t(), out=out)
    else:
        torch.addmm(bias, hidden, weight.t(), out=out)


def _add_product(out: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """``out += a @ b``, or ``out = a @ b``; ``out`` may have another type than its factors. Only CUDA has products of
    16-bit factors in float32: elsewhere they are rounded once before they are added."""
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
    """The gradients of weight and bias: in float32 where several terms are added, else in their own type."""

    def __init__(self, weight: Tensor, bias: Tensor | None, needs: Sequence[bool], *, terms: int):
        def empty(x: Tensor | None, needed: bool) -> Tensor | None:
            if x is None or not needed:
                return None
            return torch.empty(x.shape, dtype=x.dtype if terms == 1 else torch.float32, device=x.device)

        self.weight, self.bias = empty(weight, needs[1]), empty(bias, needs[2])
        self.dtypes = weight.dtype, None if bias is None else bias.dtype

    def add(self, gradient: Tensor, hidden: Tensor, *, words: slice = slice(None), first: bool) -> None:
        """The terms of ``gradient (rows, words)``, that of the loss by logits."""
        if self.weight is not None:
            _add_product(self.weight[words], gradient.t(), hidden, first=first)
        if self.bias is not None:
            term = gradient.sum(0, dtype=torch.float32)
            self.bias[words] = term if first else self.bias[words] + term

    def results(self) -> list[Tensor]:
        return [x.to(dtype) for x, dtype in zip((self.weight, self.bias), self.dtypes, strict=True) if x is not None]


def _write_losses(*args: Any) -> None:
    _backend.call("cross_entropy_losses")(*args)


def _to_gradient(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    mask: Tensor,
    normalizer: Tensor,
    label_smoothing: float,
    words: tuple[int, int],
) -> None:
    """Turns logits into the gradient of the loss by them. ``words``: the first that they are of, the number of all."""
    backward = _backend.call("trimmed_cross_entropy_backward_")
    backward(grad, logits, target, lse, mask, normalizer, None, label_smoothing, *words)


# --- forward ---------------------------------------------------------------------------------------------------


class _Pass:
    """One pass over all rows, by chunks: writes losses and log-sum-exps, and yields each chunk with its logits."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        dtype: torch.dtype,
        ignore_index: int,
        label_smoothing: float,
        rows: int,
    ):
        count = len(hidden)
        check.target_values(target, classes=len(weight), ignore_index=ignore_index)
        self.hidden, self.target, self.dtype, self.rows = hidden, target, dtype, rows
        self.options = ignore_index, label_smoothing
        self.weight, self.bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        self.losses = torch.empty(count, dtype=torch.float32, device=hidden.device)
        self.lse = torch.empty(count, 2, dtype=torch.float32, device=hidden.device)
        self.buffer = _buffer(min(rows, count), len(weight), hidden, dtype)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        for part in _parts(len(self.hidden), self.rows):
            hidden = self.hidden[part].to(self.dtype)
            logits = self.buffer[: len(hidden)]
            _write_logits(logits, hidden, self.weight, self.bias)
            _write_losses(logits, self.target[part], self.losses[part], self.lse[part], *self.options)
            yield part, hidden, logits


@_without_autocast
def losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    dtype: torch.dtype,
    ignore_index: int,
    label_smoothing: float,
    rows: int,
    keep_logits: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Losses ``(N,)``, lse ``(N, 2)`` and, if asked for, the logits ``(N, V)`` of the only chunk."""
    chunks = _Pass(hidden, weight, bias, target, dtype, ignore_index, label_smoothing, rows)
    for _ in chunks:
        pass
    return chunks.losses, chunks.lse, [chunks.buffer] if keep_logits else []


@_without_autocast
def losses_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    dtype: torch.dtype,
    ignore_index: int,
    label_smoothing: float,
    rows: int,
    needs: Sequence[bool],
    keep: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Loss, losses, lse, kept, normalizer, and the gradients of the loss by those of (hidden, weight, bias) that need
    one: of all rows first."""
    keep = float(keep)
    valid = target != ignore_index
    normalizer = kept_count(valid.sum(), keep).float()
    one = torch.ones((), device=hidden.device)
    sums = _Sums(weight, bias, needs, terms=_divide(len(hidden), rows) + (keep < 1))
    to_hidden = torch.empty_like(hidden) if needs[0] else None
    chunks = _Pass(hidden, weight, bias, target, dtype, ignore_index, label_smoothing, rows)
    for part, narrow, logits in chunks:
        saved = target[part], chunks.lse[part], valid[part], normalizer
        _to_gradient(one, logits, *saved, label_smoothing, (0, len(weight)))
        # An ignored row may hold NaN, as padding does after some attentions: times zero it would spread.
        sums.add(logits, narrow.masked_fill(~valid[part, None], 0), first=part.start == 0)
        if to_hidden is not None:
            _add_product(to_hidden[part], logits, chunks.weight, first=True)
    losses, lse = chunks.losses, chunks.lse
    del chunks, narrow, logits  # one chunk of logits at a time
    loss, kept, normalizer = trimmed_mean_op(losses, keep, None, valid)
    if keep < 1:
        if needs[1] or needs[2]:
            dropped = _Rows(hidden, target, lse, valid & ~kept, 1 - keep, dtype)
            for words, gradient in dropped.gradients(-one, normalizer, weight, bias, label_smoothing, rows):
                sums.add(gradient, dropped.hidden, words=words, first=False)
        if to_hidden is not None:
            to_hidden.masked_fill_(~kept[:, None], 0)
    return loss, losses, lse, kept, normalizer, [*([] if to_hidden is None else [to_hidden]), *sums.results()]


# --- backward --------------------------------------------------------------------------------------------------


def _count(mask: Tensor, share: float | None) -> int:
    """How many rows a mask has, or on a GPU the most that it can have: ``share`` of all, rounded up. Where no share is
    known the GPU is asked, unless a graph is being captured."""
    if mask.is_cpu or (share is None and not torch.cuda.is_current_stream_capturing()):
        return int(mask.sum())
    return len(mask) if share is None else min(len(mask), math.floor(share * len(mask)) + 1)


class _Rows:
    """The rows of a mask, gathered."""

    def __init__(
        self, hidden: Tensor, target: Tensor, lse: Tensor, mask: Tensor, share: float | None, dtype: torch.dtype
    ):
        count = _count(mask, share)
        # Its own rows come first, in order. Those behind them make up the number, and have a gradient of zeros.
        self.index = torch.sort(mask.byte(), descending=True, stable=True).indices[:count]
        self.mask = mask[self.index]
        self.hidden = hidden[self.index].to(dtype).masked_fill_(~self.mask[:, None], 0)
        self.target, self.lse = target[self.index], lse[self.index]

    def gradients(
        self,
        grad: Tensor,
        normalizer: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        label_smoothing: float,
        chunk: int,
        logits: Tensor | None = None,
    ) -> Iterator[tuple[slice, Tensor]]:
        """For each slice of the vocabulary the gradient ``(rows, words)`` by its logits, which are taken from
        ``logits (N, V)`` or computed again. The next one uses the same memory, a chunk at most."""
        rows, words, dtype = len(self.index), len(weight), self.hidden.dtype
        most = min(chunk * words, SLICE_BYTES[weight.device.type] // dtype.itemsize)
        width = _divide(words, _divide(words * rows, most))
        if width > ALIGNMENT:
            width = min(words, _divide(width, ALIGNMENT) * ALIGNMENT)
        buffer = _buffer(rows if logits is None else 0, width, weight, dtype)
        for part in _parts(words, max(1, width)):
            if logits is None:
                out = buffer[:, : part.stop - part.start]
                _write_logits(out, self.hidden, weight[part].to(dtype), None if bias is None else bias[part].to(dtype))
            else:
                out = logits[:, part].index_select(0, self.index)
            saved = self.target, self.lse, self.mask, normalizer
            _to_gradient(grad, out, *saved, label_smoothing, (part.start, words))
            yield part, out


@_without_autocast
def gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad: Tensor,
    target: Tensor,
    lse: Tensor,
    kept: Tensor,
    normalizer: Tensor,
    logits: Tensor | None,
    dtype: torch.dtype,
    label_smoothing: float,
    chunk: int,
    needs: Sequence[bool],
    keep: float | Tensor | None,
) -> list[Tensor]:
    """The gradients by those of (hidden, weight, bias) that need one, of the kept rows alone: ``keep`` of all, or None
    where it may be any number of them."""
    rows = _Rows(hidden, target, lse, kept, None if keep is None else float(keep), dtype)
    sums = _Sums(weight, bias, needs, terms=1)
    to_rows = torch.zeros(rows.hidden.shape, device=hidden.device) if needs[0] else None
    for words, gradient in rows.gradients(grad, normalizer, weight, bias, label_smoothing, chunk, logits):
        sums.add(gradient, rows.hidden, words=words, first=True)
        if to_rows is not None:
            _add_product(to_rows, gradient, weight[words].to(dtype), first=False)
    if to_rows is None:
        return sums.results()
    return [torch.zeros_like(hidden).index_copy_(0, rows.index, to_rows.to(hidden.dtype)), *sums.results()]


# --- for the compiler: a node of its graph, where loops would be unrolled and numbers of rows must be known -------


def _operator(function: Callable[..., Any], arguments: str, results: str) -> Any:
    """The operator ``batchkern::linear_<function>`` with these arguments behind those that all have in common."""
    schema = f"(Tensor hidden, Tensor weight, Tensor? bias, {arguments}) -> {results}"
    # The host reads keep: what the compiler replays as a CUDA graph would have the value of the capture for ever.
    tags = [torch.Tag.cudagraph_unsafe] if arguments.endswith(" keep") else []
    return torch.library.custom_op(
        f"batchkern::linear_{function.__name__}", function, mutates_args=(), schema=schema, tags=tags
    )


_operators = {
    losses: _operator(
        losses,
        "Tensor target, ScalarType dtype, int ignore_index, float label_smoothing, int rows, bool keep_logits",
        "(Tensor, Tensor, Tensor[])",
    ),
    losses_and_gradients: _operator(
        losses_and_gradients,
        "Tensor target, ScalarType dtype, int ignore_index, float label_smoothing, int rows, bool[] needs, Tensor keep",
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])",
    ),
    gradients: _operator(
        gradients,
        "Tensor grad, Tensor target, Tensor lse, Tensor kept, Tensor normalizer, Tensor? logits, ScalarType dtype, "
        "float label_smoothing, int chunk, bool[] needs, Tensor? keep",
        "Tensor[]",
    ),
}


def call(function: Callable[..., Any], *args: Any) -> Any:
    """``function``, or its operator where a graph is being traced. The last argument, if a float, is ``keep``: as a
    number it would be a constant of the graph, and a schedule would compile again and again."""
    if not torch.compiler.is_compiling() and not isinstance(args[0], FakeTensor):
        return function(*args)
    *rest, keep = args
    if isinstance(keep, float):
        keep = torch.ones((), dtype=torch.float64, device="cpu") * keep
    return _operators[function](*rest, keep)


@_operators[losses].register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any) -> Any:
    dtype, *_, keep_logits = rest
    count = hidden.shape[0]
    losses = hidden.new_empty(count, dtype=torch.float32)
    logits = [_buffer(count, weight.shape[0], hidden, dtype)] if keep_logits else []
    return losses, losses.new_empty(count, 2), logits


@_operators[losses_and_gradients].register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Any:
    needs = rest[-2]
    losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    loss, lse, kept = (
        losses.new_empty(()),
        losses.new_empty(*losses.shape, 2),
        torch.empty_like(losses, dtype=torch.bool),
    )
    return loss, losses, lse, kept, torch.empty_like(loss), _fake_gradients(hidden, weight, bias, needs)


@_operators[gradients].register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Any:
    return _fake_gradients(hidden, weight, bias, rest[-2])


def _fake_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]) -> list[Tensor]:
    new = [torch.empty_like(hidden), weight.new_empty(weight.shape)]
    if bias is not None:
        new.append(bias.new_empty(bias.shape))
    return [x for x, needed in zip(new, needs) if needed]
