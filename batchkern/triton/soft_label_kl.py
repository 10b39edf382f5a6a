"""soft_label_kl on a GPU.

With u = log Q - log P, KL(P || Q) = sum P (e^u - 1 - u), where no term is negative. Near the reference u = d + s, where
d, the difference of two logits, is exact, and s, the difference of two float32 log-sum-exps, has an error of about
1e-7. The same sweep finds this error: Q sums to 1 + e with e = sum P (e^u - 1), and KL is too large by e - log(1 + e).
So no row needs another sweep.

The gradients, with a and b the reference and the virtual logits divided by the temperature T:

1. KL = -sum_i P_i u_i, with P = softmax(a) and Q = softmax(b);
2. the derivative of log Q_i by b_j is (i == j) - Q_j, so that of KL is Q_j - P_j = P_j (e^u_j - 1), which keeps its
   digits near the reference;
3. the derivative of P_i by a_j is P_i ((i == j) - P_j), and sum_i P_i (d log P_i / d a_j) = 0, so that of KL is
   P_j (sum_i P_i u_i - u_j) = P_j (-u_j - KL), summed over the copies of a reference;
4. the gradients of the scaled mean by the logits are these times ``grad_scale`` = scale / (T rows).

A row of up to ``ONE_TILE`` classes is held in registers, and the softmax of the reference is computed again for each of
its virtual rows. A longer row is swept twice, the second time from its end to its start, because the logits that were
read last are still in the cache.

The forward pass computes the gradient, with ``scale`` as a factor. The backward pass loads the upstream gradient on the
device; if it is 1, a gradient that has its final type already is neither read nor written.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchkern.triton.launch import cdiv, check_float, dense_rows, device_of, kernel, power_of_two, vector

ONE_TILE = 8192
LOG2_E = tl.constexpr(math.log2(math.e))
LOG_2 = tl.constexpr(math.log(2))
SHORT = 1 << 16
"""Up to this many bytes of a swept row, two blocks of half as many threads share a multiprocessor: twice as many rows
are then in flight, and they must stay in the cache between their two sweeps."""
PROGRAMS = 4096
"""The most programs of a kernel that may have nothing to do."""
RUNTIME = ("batch", "copies", "classes", "reference_stride", "virtual_stride", "wants_grad", "wants_rows")
"""The arguments that may change between calls without another compilation. Classes and strides are in units of
VECTOR."""


@triton.jit
def _alignment(p_max, q_max, p_log_sum, q_log_sum, k):
    """``offset`` and ``shift`` of a row of virtual logits, as `_log_ratio` takes them."""
    distance = p_max - q_max
    offset = tl.where(tl.abs(distance) > 0.5, distance, 0.0)
    moved = (p_max - tl.where(offset > 0.0, offset, 0.0)) - (q_max + tl.where(offset < 0.0, offset, 0.0))
    return offset, tl.fma(moved, k, (p_log_sum - q_log_sum) * LOG_2)


@triton.jit
def _log_ratio(p, q, offset, shift, k):
    """u = log Q - log P. The logits are subtracted directly, which is exact if they are close.

    If one row is higher than the other by an offset, the offset is subtracted from it first, so that no digits are
    lost.
    """
    return tl.fma((q + tl.where(offset < 0.0, offset, 0.0)) - (p - tl.where(offset > 0.0, offset, 0.0)), k, shift)


@triton.jit
def _divergence(p, q, p_max, q_max, p_log_sum, q_log_sum, offset, shift, k):
    """P (e^u - 1 - u) and Q - P, elementwise.

    ``p`` and ``q`` are logits; ``_max`` is the maximum of their row, and ``_log_sum`` is log2 of the sum of
    exponentials relative to it. An absent class, at -inf in both rows, gives 0 and 0.
    """
    u = _log_ratio(p, q, offset, shift, k)
    # If u is 128 or more, P is 0. The comparison also removes the NaN of an absent class; a NaN logit makes P or Q NaN.
    u = tl.where(u < 128.0, u, 128.0)
    p = tl.exp2(tl.fma(p - p_max, k * LOG2_E, -p_log_sum))
    q = tl.exp2(tl.fma(q - q_max, k * LOG2_E, -q_log_sum))
    small = tl.abs(u) <= 0.5
    g = tl.fma(u, 0.00019962186057284173, 0.0013982196861982632)  # (e^u - 1 - u) / u^2 for |u| <= 1/2
    g = tl.fma(u, g, 0.008333182040866879)
    g = tl.fma(u, g, 0.041665790959645996)
    g = tl.fma(u, g, 0.16666667139685737)
    g = tl.fma(u, g, 0.5000000121691628)
    w = u * u * g
    grad = tl.where(small, p * (u + w), q - p)
    # P is at least the smallest normal number, so that the term is infinite for u = -inf even if P underflowed to 0.
    term = tl.where(small, p * w, grad - tl.where(p < 1.2e-38, 1.2e-38, p) * u)
    return term, grad


@triton.jit
def _corrected(kl, excess):
    """The divergence less the part that the error of the log-sum-exps added; ``excess`` is the sum of Q - P."""
    kl += excess * excess * tl.fma(excess, tl.fma(excess, -0.25, 1 / 3), -0.5)
    return tl.where(kl < 0.0, 0.0, kl)


@triton.jit
def _sums(a, b, axis: tl.constexpr):
    """The sums of two tensors, which are reduced across warps together."""
    return tl.split(tl.sum(tl.join(a, b), axis))


@kernel(RUNTIME)
def _whole_rows(
    reference,  # (B, C)
    virtual,  # (M * B, C)
    kl,  # (M * B,)
    grad,  # (M * B, C)
    reference_rows,  # (B, 2): maximum, log2 of the sum
    virtual_rows,  # (M * B, 2): offset, and shift without the error of the log-sum-exps
    batch,
    copies,
    classes,
    reference_stride,
    virtual_stride,
    k,  # 1 / temperature
    grad_scale,
    wants_grad,  # 0 or 1
    wants_rows,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    classes *= VECTOR
    reference_stride *= VECTOR
    virtual_stride *= VECTOR
    tile, copy = tl.program_id(0) // copies, tl.program_id(0) % copies
    rows = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    real = rows < batch
    mask = real[:, None] & (columns < classes)[None, :]
    p = tl.load(reference + rows[:, None] * reference_stride + columns[None, :], mask, float("-inf")).to(tl.float32)
    rows_q = copy.to(tl.int64) * batch + rows
    q = tl.load(virtual + rows_q[:, None] * virtual_stride + columns[None, :], mask, float("-inf")).to(tl.float32)
    p_max, q_max = tl.split(tl.max(tl.join(p, q), 1))
    p_max, q_max = p_max[:, None], q_max[:, None]
    p_sum, q_sum = _sums(tl.exp2((p - p_max) * (k * LOG2_E)), tl.exp2((q - q_max) * (k * LOG2_E)), 1)
    p_log_sum, q_log_sum = tl.log2(p_sum)[:, None], tl.log2(q_sum)[:, None]
    offset, shift = _alignment(p_max, q_max, p_log_sum, q_log_sum, k)
    term, to_q = _divergence(p, q, p_max, q_max, p_log_sum, q_log_sum, offset, shift, k)
    total, excess = _sums(term, to_q, 1)
    tl.store(kl + rows_q, _corrected(total, excess), real)
    if wants_grad != 0:
        to = grad + rows_q[:, None] * classes + columns[None, :]
        tl.store(to, (to_q * grad_scale).to(grad.dtype.element_ty), mask)
    if wants_rows != 0:
        if copy == 0:
            tl.store(reference_rows + 2 * rows[:, None], p_max, real[:, None])
            tl.store(reference_rows + 2 * rows[:, None] + 1, p_log_sum, real[:, None])
        tl.store(virtual_rows + 2 * rows_q[:, None], offset, real[:, None])
        tl.store(virtual_rows + 2 * rows_q[:, None] + 1, shift - excess[:, None], real[:, None])


@triton.jit
def _block(SETS: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr):
    """Columns ``(SETS, THREADS, VECTOR)`` of a block: a thread has SETS groups of VECTOR columns, each for one load."""
    groups = tl.arange(0, SETS)[:, None] * THREADS + tl.arange(0, THREADS)[None, :]
    return groups[:, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def _log_sum_exp(row, classes, scale, SETS: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr):
    """Maximum of a row and log2 of the sum of 2^(scale (z - maximum)), in one sweep. Each thread keeps its own."""
    inside = _block(SETS, THREADS, VECTOR)
    maxima = tl.full((THREADS,), float("-inf"), tl.float32)
    sums = tl.zeros((THREADS,), tl.float32)
    for start in range(0, classes, SETS * THREADS * VECTOR):
        columns = start + inside
        z = tl.load(row + columns, columns < classes, float("-inf"), eviction_policy="evict_last").to(tl.float32)
        highest = tl.max(tl.max(z, 2), 0)
        highest = tl.where(highest > maxima, highest, maxima)
        base = tl.where(highest == float("-inf"), 0.0, highest)
        powers = tl.exp2((z - base[None, :, None]) * scale)
        sums = sums * tl.exp2((maxima - base) * scale) + tl.sum(tl.sum(powers, 2), 0)
        maxima = highest
    maximum = tl.max(maxima, 0)
    # NaN and +inf make a sum NaN; a row of only -inf becomes NaN here, as its softmax is.
    return maximum, tl.log2(tl.sum(sums * tl.exp2((maxima - maximum) * scale), 0))


@kernel(("classes", "stride"))
def _reference_rows(
    reference,  # (B, C)
    reference_rows,  # (B, 2)
    classes,
    stride,
    k,
    SETS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    classes *= VECTOR
    stride *= VECTOR
    row = tl.program_id(0).to(tl.int64)
    maximum, log_sum = _log_sum_exp(reference + row * stride, classes, k * LOG2_E, SETS, THREADS, VECTOR)
    tl.store(reference_rows + 2 * row, maximum)
    tl.store(reference_rows + 2 * row + 1, log_sum)


@kernel(RUNTIME)
def _swept_rows(
    reference,  # (B, C)
    virtual,  # (M * B, C)
    kl,  # (M * B,)
    grad,  # (M * B, C)
    reference_rows,  # (B, 2), made by _reference_rows
    virtual_rows,  # (M * B, 2), as in _whole_rows
    batch,
    copies,
    classes,
    reference_stride,
    virtual_stride,
    k,
    grad_scale,
    wants_grad,
    wants_rows,
    SETS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    classes *= VECTOR
    reference_stride *= VECTOR
    virtual_stride *= VECTOR
    # The copies of a row are neighbours in the grid: they run at the same time and share the reference's row in the
    # cache.
    row, copy = (tl.program_id(0) // copies).to(tl.int64), tl.program_id(0) % copies
    row_q = copy.to(tl.int64) * batch + row
    p_row, q_row = reference + row * reference_stride, virtual + row_q * virtual_stride
    q_max, q_log_sum = _log_sum_exp(q_row, classes, k * LOG2_E, SETS, THREADS, VECTOR)
    p_max, p_log_sum = tl.load(reference_rows + 2 * row), tl.load(reference_rows + 2 * row + 1)
    offset, shift = _alignment(p_max, q_max, p_log_sum, q_log_sum, k)

    BLOCK: tl.constexpr = SETS * THREADS * VECTOR
    inside = _block(SETS, THREADS, VECTOR)
    sums, excesses = tl.zeros((THREADS,), tl.float32), tl.zeros((THREADS,), tl.float32)
    blocks = tl.cdiv(classes, BLOCK)
    for i in range(0, blocks):
        columns = (blocks - 1 - i) * BLOCK + inside
        mask = columns < classes
        p = tl.load(p_row + columns, mask, float("-inf"), eviction_policy="evict_last").to(tl.float32)
        q = tl.load(q_row + columns, mask, float("-inf"), eviction_policy="evict_first").to(tl.float32)
        term, to_q = _divergence(p, q, p_max, q_max, p_log_sum, q_log_sum, offset, shift, k)
        sums += tl.sum(tl.sum(term, 2), 0)
        excesses += tl.sum(tl.sum(to_q, 2), 0)
        if wants_grad != 0:
            scaled = (to_q * grad_scale).to(grad.dtype.element_ty)
            tl.store(grad + row_q * classes + columns, scaled, mask, eviction_policy="evict_first")
    excess = tl.sum(excesses, 0)  # separately: joined with the other sum it would spill on sm_100
    tl.store(kl + row_q, _corrected(tl.sum(sums, 0), excess))
    if wants_rows != 0:
        tl.store(virtual_rows + 2 * row_q, offset)
        tl.store(virtual_rows + 2 * row_q + 1, shift - excess)


@kernel(RUNTIME)
def _reference_gradient(
    reference,  # (B, C)
    virtual,  # (M * B, C)
    kl,  # (M * B,)
    grad,  # (B, C)
    reference_rows,  # (B, 2)
    virtual_rows,  # (M * B, 2)
    batch,
    copies,
    classes,
    reference_stride,
    virtual_stride,
    k,
    grad_scale,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Step 3 of the module's derivation: P times the sum of -u - KL over the copies of a row, in their order."""
    classes *= VECTOR
    reference_stride *= VECTOR
    virtual_stride *= VECTOR
    parts = tl.cdiv(classes, COLUMNS)
    row, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    columns = part * COLUMNS + tl.arange(0, COLUMNS)
    mask = columns < classes
    row = row.to(tl.int64)
    p = tl.load(reference + row * reference_stride + columns, mask, float("-inf")).to(tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for copy in range(0, copies):
        row_q = tl.cast(copy, tl.int64) * batch + row
        q = tl.load(virtual + row_q * virtual_stride + columns, mask, float("-inf")).to(tl.float32)
        u = _log_ratio(p, q, tl.load(virtual_rows + 2 * row_q), tl.load(virtual_rows + 2 * row_q + 1), k)
        total -= u + tl.load(kl + row_q)
    p_max, p_log_sum = tl.load(reference_rows + 2 * row), tl.load(reference_rows + 2 * row + 1)
    p = tl.exp2(tl.fma(p - p_max, k * LOG2_E, -p_log_sum))
    tl.store(grad + row * classes + columns, tl.where(p == 0.0, 0.0, p * total) * grad_scale, mask)


@kernel(("count",))
def _scale_gradient(
    out,  # may be gradient
    gradient,
    factor,
    count,  # in units of VECTOR
    IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Writes ``gradient * factor`` in the type of ``out``, or nothing if that is in place and the factor is 1."""
    scale = tl.load(factor)
    count = count.to(tl.int64) * VECTOR
    tiles = tl.cdiv(count, BLOCK).to(tl.int32)
    if IN_PLACE:
        tiles = tl.where(scale == 1.0, 0, tiles)
    for i in range(tl.program_id(0), tiles, tl.num_programs(0)):
        at = tl.cast(i, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(gradient + at, at < count).to(tl.float32) * scale
        tl.store(out + at, value.to(out.dtype.element_ty), at < count)


def scale_gradient_(out: Tensor, gradient: Tensor, factor: Tensor) -> None:
    """``batchkern::scale_gradient_``: one launch, none for no elements."""
    count = out.numel()
    if count == 0:
        return
    unit = math.gcd(16 // gradient.dtype.itemsize, count)
    options = {"IN_PLACE": out.data_ptr() == gradient.data_ptr(), "BLOCK": 4096, "VECTOR": unit, "num_warps": 4}
    with device_of(out):
        _scale_gradient[min(cdiv(count, 4096), PROGRAMS),](out, gradient, factor, count // unit, **options)


def soft_label_kl(
    reference_logits: Tensor,
    virtual_logits: Tensor,
    *,
    temperature: float = 1.0,
    scale: float = 1.0,
    reference_grad: bool = False,
    virtual_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``batchkern::soft_label_kl``: two launches; one more each for rows that are swept, for ``reference_grad`` and for
    a ``scale`` other than 1."""
    batch, copies, classes = _shape(reference_logits, virtual_logits)
    reference, virtual = dense_rows(reference_logits), dense_rows(virtual_logits)
    dtype, rows = reference.dtype, batch * copies
    kl = reference.new_empty(rows, dtype=torch.float32)
    # Gradients that are divided by the number of rows could underflow in float16.
    to_virtual = virtual.new_empty(
        rows if virtual_grad else 0, classes, dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    )
    to_reference = kl.new_empty(batch if reference_grad else 0, classes)
    of_reference = kl.new_empty(batch, 2) if reference_grad or classes > ONE_TILE else kl
    of_virtual = kl.new_empty(rows, 2) if reference_grad else kl
    if rows == 0 or classes == 0:
        return kl.zero_().mean(), kl, to_virtual, to_reference.zero_()
    k = 1 / temperature
    unit = vector(reference, virtual)
    strides = reference.stride(0) // unit, virtual.stride(0) // unit
    rows_of = of_reference, of_virtual
    numbers = batch, copies, classes // unit, *strides, k, scale * k / rows
    with device_of(reference):
        if classes > ONE_TILE:
            # A multiprocessor has 65,536 registers: 64 for each of 1,024 threads, in one block or two. In blocks of
            # half as many threads, loads of single elements would take more, and so would 16-bit elements on sm_100.
            threads = 512 if unit == 4 and dtype.itemsize == 4 and classes * dtype.itemsize <= SHORT else 1024
            sweep = {"SETS": max(2, 8 // unit), "THREADS": threads, "VECTOR": unit}
            sweep |= {"num_warps": threads // 32, "maxnreg": 64}
            _reference_rows[batch,](reference, of_reference, classes // unit, strides[0], k, **sweep)
            run, tiles, options = _swept_rows, batch, sweep
        else:
            columns = power_of_two(classes, 16)
            tile = max(1, 256 // columns)
            run, tiles = _whole_rows, cdiv(batch, tile)
            options = {"ROWS": tile, "COLUMNS": columns, "VECTOR": unit, "num_warps": min(max(1, columns // 256), 16)}
        wants = int(virtual_grad), int(reference_grad)
        run[tiles * copies,](reference, virtual, kl, to_virtual, *rows_of, *numbers, *wants, **options)
        if reference_grad:
            columns = 256 if classes <= 256 else 1024
            options = {"COLUMNS": columns, "VECTOR": unit, "num_warps": columns // 256}
            grid = (batch * cdiv(classes, columns),)
            _reference_gradient[grid](reference, virtual, kl, to_reference, *rows_of, *numbers, **options)
    mean = kl.mean()
    return mean if scale == 1 else mean.mul_(scale), kl, to_virtual, to_reference


def _shape(reference: Tensor, virtual: Tensor) -> tuple[int, int, int]:
    """B, M and C, or an error that names the argument."""
    check_float(reference, "reference_logits")
    if reference.dim() != 2:
        raise ValueError(f"reference_logits must be (B, C), got {tuple(reference.shape)}")
    batch, classes = reference.shape
    rows = virtual.shape[0] if virtual.dim() else 0
    if (
        virtual.dim() != 2
        or virtual.shape[1] != classes
        or virtual.dtype != reference.dtype
        or (rows % batch if batch else rows)
    ):
        raise ValueError(
            f"virtual_logits must be (M * {batch}, {classes}) {reference.dtype}, got "
            f"{tuple(virtual.shape)} {virtual.dtype}"
        )
    return batch, rows // batch if batch else 0, classes
