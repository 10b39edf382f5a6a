"""augment_latent on a GPU: noise, masks and Hadamard transforms by kernels; a dense basis by torch's matmul.

The noise of a dense basis is written once to a buffer that is used again: normals drawn by the loader of a matmul would
cost more than the matmul. The matmul takes the type of ``x``; for float32 PyTorch's own switch decides whether it may
use TF32 (``torch.backends.cuda.matmul``).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchkern.triton.launch import cdiv, check_float, dense_rows, device_of, kernel, power_of_two, vector
from batchkern.triton.random import clipped_normals, dropout_factors

NOISE_BYTES = 16 << 20
"""Of the buffer for the noise of a dense basis."""
WIDEST = 8192
"""Columns that are transformed in one piece."""
TILE = 2048
"""Elements of a block."""


@kernel(("batch", "width", "stride", "first", "last", "first_dropout", "end", "threshold"))
def _rows(
    x,  # (B, Q)
    out,  # ((1 + G + D) * B, Q)
    noise,  # (last - first, Q), or out
    seed,
    batch,
    width,  # in units of VECTOR, as stride is
    stride,
    first,  # rows [first, last) of out are Gaussian,
    last,
    first_dropout,  # [first_dropout, end) are dropout
    end,
    sigma,
    tau,
    threshold,
    scale,
    DENSE: tl.constexpr,  # the noise goes to its buffer, else it is added
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One tile of one kind of rows: Gaussian ones, then x, then dropout. A grid may end after the first kind."""
    width *= VECTOR
    stride *= VECTOR
    parts = tl.cdiv(width, COLUMNS)
    tile, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    gaussian, plain = tl.cdiv(last - first, ROWS), tl.cdiv(batch, ROWS)
    if tile < gaussian:
        start, stop = first.to(tl.int64) + tile * ROWS, last.to(tl.int64)
    elif tile < gaussian + plain:
        start, stop = (tile - gaussian).to(tl.int64) * ROWS, batch.to(tl.int64)
    else:
        start, stop = first_dropout.to(tl.int64) + (tile - gaussian - plain) * ROWS, end.to(tl.int64)
    rows = start + tl.arange(0, ROWS)
    quads = part * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
    columns = part * COLUMNS + tl.arange(0, COLUMNS)
    mask = (rows < stop)[:, None] & (columns < width)[None, :]
    value = tl.load(x + (rows % batch)[:, None] * stride + columns[None, :], mask, 0.0).to(tl.float32)
    to = rows[:, None] * width + columns[None, :]
    if tile < gaussian:
        drawn = clipped_normals(tl.load(seed), rows, quads, sigma, tau)
        if DENSE:
            tl.store(noise + (rows - first)[:, None] * width + columns[None, :], drawn.to(noise.dtype.element_ty), mask)
        else:
            value += drawn
    elif tile >= gaussian + plain:
        value *= dropout_factors(tl.load(seed), rows, quads, threshold, scale)
    tl.store(out + to, value.to(out.dtype.element_ty), mask)


@triton.jit
def _hadamard(N: tl.constexpr):
    """(N, N) Sylvester-Hadamard matrix in float16."""
    i = tl.arange(0, N)
    odd = i[:, None] & i[None, :]
    odd ^= odd >> 4
    odd ^= odd >> 2
    odd ^= odd >> 1
    return (1 - 2 * (odd & 1)).to(tl.float16)


@triton.jit
def _product(x, h, EXACT: tl.constexpr):
    """``x @ h`` for float32 ``x`` and ``h`` of ones and minus ones, on tensor cores.

    x is rounded to float16, which has three bits more than bfloat16, or with ``EXACT`` split into two: 22 bits.
    """
    high = x.to(tl.float16)
    result = tl.dot(high, h)
    if EXACT:
        low = (x - high.to(tl.float32)) * 2048.0
        result += tl.dot(low.to(tl.float16), h) * (1 / 2048)
    return result


@kernel(("batch", "width", "stride", "first", "last", "pieces"))
def _hadamard_rows(
    x,  # (B, Q)
    out,  # ((1 + G + D) * B, Q)
    signs,  # (Q,)
    seed,
    batch,
    width,  # in units of VECTOR, as stride is
    stride,
    first,  # rows [first, last) of out are Gaussian
    last,
    pieces,  # of the padded width
    sigma,
    tau,
    gain,  # what the transform of clip(sigma z, -tau, tau) is multiplied by
    ROWS: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    EXACT: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A piece of A * B columns, (A, B) row-major, is transformed as H_A X H_B.

    A row of several pieces is a Hadamard matrix of such blocks: each program sums all of the row's pieces, with signs.
    """
    width *= VECTOR
    stride *= VECTOR
    N: tl.constexpr = A * B
    h_a, h_b = _hadamard(A), _hadamard(B)
    key = tl.load(seed)
    tiles = tl.cdiv(last - first, ROWS) * pieces
    for i in range(tl.program_id(0), tiles, tl.num_programs(0)):
        piece = i % pieces
        rows = first + (i // pieces).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        total = tl.zeros((ROWS, N), tl.float32)
        for j in range(0, pieces):
            odd = piece & j
            odd ^= odd >> 16
            odd ^= odd >> 8
            odd ^= odd >> 4
            odd ^= odd >> 2
            odd ^= odd >> 1
            columns = j * N + tl.arange(0, N)
            sign = tl.load(signs + columns, columns < width, 0.0) * (1 - 2 * (odd & 1)).to(tl.float32)
            drawn = clipped_normals(key, rows, j * (N // 4) + tl.arange(0, N // 4), sigma, tau)
            total += drawn * sign[None, :]
        total = _product(total.reshape(ROWS * A, B), h_b, EXACT)
        if A > 1:
            total = total.reshape(ROWS, A, B).permute(0, 2, 1).reshape(ROWS * B, A)
            total = _product(total, h_a, EXACT).reshape(ROWS, B, A).permute(0, 2, 1)
        total = total.reshape(ROWS, N)
        columns = piece * N + tl.arange(0, N)
        mask = (rows < last)[:, None] & (columns < width)[None, :]
        value = tl.load(x + (rows % batch)[:, None] * stride + columns[None, :], mask, 0.0).to(tl.float32)
        value = tl.fma(total, gain, value)
        tl.store(out + rows[:, None] * width + columns[None, :], value.to(out.dtype.element_ty), mask)


@kernel(("batch", "width", "stride", "gaussian", "dropout", "threshold"))
def _sum_of_copies(
    grad,  # ((1 + G + D) * B, Q)
    out,  # (B, Q)
    seed,
    batch,
    width,  # in units of VECTOR, as stride is
    stride,
    gaussian,
    dropout,
    threshold,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The gradient of x, by copies in their order."""
    width *= VECTOR
    stride *= VECTOR
    parts = tl.cdiv(width, COLUMNS)
    tile, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    rows = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    quads = part * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
    columns = part * COLUMNS + tl.arange(0, COLUMNS)
    mask = (rows < batch)[:, None] & (columns < width)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for copy in range(0, 1 + gaussian):
        of_copy = rows + copy * batch.to(tl.int64)
        total += tl.load(grad + of_copy[:, None] * stride + columns[None, :], mask, 0.0).to(tl.float32)
    key = tl.load(seed)
    for copy in range(1 + gaussian, 1 + gaussian + dropout):
        of_copy = rows + copy * batch.to(tl.int64)
        value = tl.load(grad + of_copy[:, None] * stride + columns[None, :], mask, 0.0).to(tl.float32)
        total += value * dropout_factors(key, of_copy, quads, threshold, scale)
    tl.store(out + rows[:, None] * width + columns[None, :], total.to(out.dtype.element_ty), mask)


def augment_latent(
    x: Tensor,
    seed: Tensor,
    *,
    gaussian: int,
    dropout: int,
    sigma: float,
    tau: float,
    drop_prob: float,
    rescale_dropout: bool = False,
    basis: Tensor | None = None,
) -> Tensor:
    """``batchkern::augment_latent``: one launch; two with a Hadamard basis; two for every 16 MB of noise with a
    dense one."""
    check_float(x, "x")
    _check_seed(seed)
    if x.dim() != 2:
        raise ValueError(f"x must be (B, Q), got {tuple(x.shape)}")
    batch, width = x.shape
    if basis is not None and tuple(basis.shape) not in ((width,), (width, width)):
        raise ValueError(f"basis must be ({width}, {width}) or signs ({width},), got {tuple(basis.shape)}")
    x = dense_rows(x)
    copies = 1 + gaussian + dropout
    out = x.new_empty(copies * batch, width)
    if out.numel() == 0:
        return out
    end_gaussian = (1 + gaussian) * batch
    threshold, scale = _mask(drop_prob, rescale_dropout)
    columns, rows = _tile(width)
    parts, plain = cdiv(width, columns), cdiv(batch, rows)
    dropped = cdiv(dropout * batch, rows)
    unit = vector(x)

    def write(first: int, last: int, others: bool, deviation: float, clip: float, noise: Tensor | None = None) -> None:
        tiles = cdiv(last - first, rows) + (plain + dropped if others else 0)
        _rows[tiles * parts,](
            x,
            out,
            out if noise is None else noise,
            seed,
            batch,
            width // unit,
            x.stride(0) // unit,
            first,
            last,
            end_gaussian,
            copies * batch,
            deviation,
            clip,
            threshold,
            scale,
            DENSE=noise is not None,
            ROWS=rows,
            COLUMNS=columns,
            VECTOR=unit,
            num_warps=8,
        )

    with device_of(x):
        if basis is None or gaussian == 0:
            write(batch, end_gaussian, True, sigma, tau)
            return out
        # The noise in units of its size, so that float16 neither overflows nor loses digits.
        size = min(sigma, tau)
        deviation, clip = (sigma / size, tau / size) if size > 0 else (0.0, 1.0)
        if basis.dim() == 1:
            write(batch, batch, True, sigma, tau)
            signs = basis.to(torch.float32).contiguous()
            signs = signs.clone() if signs.data_ptr() % 16 else signs  # as the kernel expects of its other data
            _write_hadamard(x, out, signs, seed, batch, end_gaussian, deviation, clip, size)
            return out
        matrix = basis.to(x.dtype).t()
        chunk = max(1, NOISE_BYTES // (width * x.element_size()))
        buffer = x.new_empty(min(chunk, gaussian * batch), width)
        for first in range(batch, end_gaussian, chunk):
            last = min(first + chunk, end_gaussian)
            write(first, last, first == batch, deviation, clip, buffer)
            out[first:last].addmm_(buffer[: last - first], matrix, alpha=size)
    return out


def _write_hadamard(
    x: Tensor,
    out: Tensor,
    signs: Tensor,
    seed: Tensor,
    first: int,
    last: int,
    deviation: float,
    clip: float,
    size: float,
) -> None:
    batch, width = x.shape
    unit = vector(x)
    padded = power_of_two(width, 16)
    piece = min(padded, WIDEST)
    pieces = padded // piece
    # Factors of at least 16, the least that a tensor core takes, and at most 128.
    a = 1 if piece <= 128 else 1 << (piece.bit_length() - 1) // 2
    rows = max(1, 4096 // piece)
    tiles = cdiv(last - first, rows) * pieces
    _hadamard_rows[min(tiles, 4096),](
        x,
        out,
        signs,
        seed,
        batch,
        width // unit,
        x.stride(0) // unit,
        first,
        last,
        pieces,
        deviation,
        clip,
        size / width**0.5,
        ROWS=rows,
        A=a,
        B=piece // a,
        EXACT=x.dtype != torch.bfloat16,
        VECTOR=unit,
        num_warps=8,
    )


def augment_latent_backward(
    grad: Tensor,
    seed: Tensor,
    *,
    gaussian: int,
    dropout: int,
    drop_prob: float,
    rescale_dropout: bool = False,
) -> Tensor:
    """``batchkern::augment_latent_backward``: one launch."""
    check_float(grad, "grad")
    _check_seed(seed)
    copies = 1 + gaussian + dropout
    if grad.dim() != 2 or grad.shape[0] % copies:
        raise ValueError(f"grad must be ({copies} * B, Q), got {tuple(grad.shape)}")
    grad = dense_rows(grad)
    batch, width = grad.shape[0] // copies, grad.shape[1]
    out = grad.new_empty(batch, width)
    if out.numel() == 0:
        return out
    threshold, scale = _mask(drop_prob, rescale_dropout)
    columns, rows = _tile(width)
    unit = vector(grad)
    with device_of(grad):
        _sum_of_copies[cdiv(batch, rows) * cdiv(width, columns),](
            grad,
            out,
            seed,
            batch,
            width // unit,
            grad.stride(0) // unit,
            gaussian,
            dropout,
            threshold,
            scale,
            ROWS=rows,
            COLUMNS=columns,
            VECTOR=unit,
            num_warps=8,
        )
    return out


def _check_seed(seed: Tensor) -> None:
    if seed.dim() != 0 or seed.dtype != torch.int64:
        raise ValueError(f"seed must be 0-dim int64, got {tuple(seed.shape)} {seed.dtype}")


def _mask(drop_prob: float, rescale: bool) -> tuple[int, float]:
    """What a kept word must reach, as int32 of the same bits, and the factor of a kept element."""
    threshold = round(drop_prob * 2**32)
    if threshold == 2**32:  # no word reaches it; a factor of 0 says the same
        return -1, 0.0
    return threshold - (threshold >> 31 << 32), 1 / (1 - drop_prob) if rescale else 1.0


@functools.cache
def _tile(width: int) -> tuple[int, int]:
    """Columns and rows of a tile: the widest that wastes no more than a quarter of its columns, else the least
    wasteful."""
    widths = (1024, 256, 64, 16)
    padded = {columns: cdiv(width, columns) * columns for columns in widths}
    columns = next((c for c in widths if padded[c] <= 1.25 * width), min(widths, key=lambda c: padded[c]))
    return columns, TILE // columns
