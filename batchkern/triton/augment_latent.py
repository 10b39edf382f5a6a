"""augment_latent on a GPU: noise, masks and Hadamard transforms by kernels; a dense basis by torch's matmul.

With a dense basis the noise is written to a buffer that is reused: drawing the normals in the loads of a matmul kernel
would take longer than the matmul. The matmul is computed in the type of ``x``; for float32 PyTorch's own switch decides
whether it may use TF32 (``torch.backends.cuda.matmul``).
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
"""The size of the buffer for the noise with a dense basis."""
PIECES_BYTES = 64 << 20
"""The size of the buffer for rows that are transformed in pieces: about 50 us of work between two launches."""
WIDEST = 8192
"""The most columns that are transformed in one piece."""
TILE = 2048
"""The number of elements in a tile."""


@kernel(("batch", "width", "stride", "gaussian", "copies", "left_out", "first", "last", "threshold"))
def _rows(
    x,  # (B, Q)
    out,  # ((1 + G + D) * B, Q)
    noise,  # (last - first, Q), or out
    seed,
    batch,
    width,  # in units of VECTOR, as stride is
    stride,
    gaussian,
    copies,  # the number that are written, including x; the left_out Gaussian copies after x are not
    left_out,
    first,  # before that, x is written to the rows [first, last) of out, and their noise to the buffer
    last,
    sigma,
    tau,
    threshold,
    scale,
    DENSE: tl.constexpr,  # whether the noise is written to the buffer instead of being added
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Writes one tile of a copy. The copies of a tile of x are neighbours in the grid, so that x is read from
    memory once."""
    width *= VECTOR
    stride *= VECTOR
    parts = tl.cdiv(width, COLUMNS)
    place = tl.program_id(0)
    before = tl.cdiv(last - first, ROWS).to(tl.int32) * parts
    if place < before:
        part, copy = place % parts, (first // batch).to(tl.int32)
        rows = first.to(tl.int64) + place // parts * ROWS + tl.arange(0, ROWS)
        of_x, real = rows % batch, rows < last
    else:
        tile, copy = (place - before) // copies, (place - before) % copies
        copy += tl.where(copy > 0, left_out, 0)
        part = tile % parts
        of_x = (tile // parts).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        rows, real = copy.to(tl.int64) * batch + of_x, of_x < batch
    quads = part * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
    columns = part * COLUMNS + tl.arange(0, COLUMNS)
    mask = real[:, None] & (columns < width)[None, :]
    value = tl.load(x + of_x[:, None] * stride + columns[None, :], mask, 0.0).to(tl.float32)
    if copy > gaussian:
        value *= dropout_factors(tl.load(seed), rows, quads, threshold, scale)
    elif copy > 0:
        drawn = clipped_normals(tl.load(seed), rows, quads, sigma, tau)
        if DENSE:
            tl.store(noise + (rows - first)[:, None] * width + columns[None, :], drawn.to(noise.dtype.element_ty), mask)
        else:
            value += drawn
    tl.store(out + rows[:, None] * width + columns[None, :], value.to(out.dtype.element_ty), mask)


@triton.jit
def _signs(numbers):
    """float32: -1 for numbers with an odd number of one bits, else 1."""
    odd = numbers ^ (numbers >> 16)
    odd ^= odd >> 8
    odd ^= odd >> 4
    odd ^= odd >> 2
    odd ^= odd >> 1
    return (1 - 2 * (odd & 1)).to(tl.float32)


@triton.jit
def _hadamard(N: tl.constexpr):
    """(N, N) Sylvester-Hadamard matrix in float16."""
    i = tl.arange(0, N)
    return _signs(i[:, None] & i[None, :]).to(tl.float16)


@triton.jit
def _product(x, h, EXACT: tl.constexpr):
    """``x @ h`` for float32 ``x`` and ``h`` of ones and minus ones, on tensor cores.

    x is rounded to float16, which has three bits more than bfloat16. With ``EXACT`` it is split into two, with 22 bits.
    """
    high = x.to(tl.float16)
    result = tl.dot(high, h)
    if EXACT:
        low = (x - high.to(tl.float32)) * 2048.0
        result += tl.dot(low.to(tl.float16), h) * (1 / 2048)
    return result


@kernel(("batch", "width", "stride", "gaussian", "first", "last", "pieces"))
def _hadamard_rows(
    x,  # (B, Q)
    out,  # ((1 + G + D) * B, Q), or (last - first, pieces, N) float32 for transforms of pieces
    signs,  # (Q,)
    seed,
    batch,
    width,  # in units of VECTOR, as stride is
    stride,
    gaussian,
    first,  # tiles [first, last) of ROWS rows; the Gaussian copies of a tile of x follow each other
    last,
    pieces,
    sigma,
    tau,
    gain,  # a factor of the transform of clip(sigma z, -tau, tau)
    ROWS: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    WHOLE: tl.constexpr,  # whether a row is one piece
    EXACT: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Transforms a piece of N = A * B columns, as a row-major (A, B) matrix X, to H_A X H_B."""
    width *= VECTOR
    stride *= VECTOR
    N: tl.constexpr = A * B
    h_a, h_b = _hadamard(A), _hadamard(B)
    key = tl.load(seed)
    for i in range(tl.program_id(0), (last - first) * pieces, tl.num_programs(0)):
        tile, piece = first + i // pieces, i % pieces
        of_x = (tile // gaussian).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        rows = (1 + tile % gaussian).to(tl.int64) * batch + of_x
        columns = piece * N + tl.arange(0, N)
        sign = tl.load(signs + columns, columns < width, 0.0)
        drawn = clipped_normals(key, rows, piece * (N // 4) + tl.arange(0, N // 4), sigma, tau) * sign[None, :]
        total = _product(drawn.reshape(ROWS * A, B), h_b, EXACT)
        if A > 1:
            total = total.reshape(ROWS, A, B).permute(0, 2, 1).reshape(ROWS * B, A)
            total = _product(total, h_a, EXACT).reshape(ROWS, B, A).permute(0, 2, 1)
        total = total.reshape(ROWS, N)
        if WHOLE:
            mask = (of_x < batch)[:, None] & (columns < width)[None, :]
            value = tl.load(x + of_x[:, None] * stride + columns[None, :], mask, 0.0).to(tl.float32)
            value = tl.fma(total, gain, value)
            tl.store(out + rows[:, None] * width + columns[None, :], value.to(out.dtype.element_ty), mask)
        else:
            tl.store(out + tl.cast(i, tl.int64) * N + tl.arange(0, N)[None, :], total)


@kernel(("batch", "width", "stride", "gaussian", "first", "pieces"))
def _sum_of_pieces(
    x,  # (B, Q)
    out,  # ((1 + G + D) * B, Q)
    transforms,  # (rows, pieces, N)
    batch,
    width,  # in units of VECTOR, as stride is
    stride,
    gaussian,
    first,  # row of out, in the order of _hadamard_rows
    pieces,
    gain,
    N: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECES: tl.constexpr,  # a power of two
    VECTOR: tl.constexpr,
):
    """The Hadamard matrix of several pieces has H_N or -H_N as its blocks: each piece is a signed sum of transformed
    ones."""
    width *= VECTOR
    stride *= VECTOR
    PARTS: tl.constexpr = N // COLUMNS
    row, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    of_x = ((first + row) // gaussian).to(tl.int64)
    to = (1 + (first + row) % gaussian).to(tl.int64) * batch + of_x
    those, inside = tl.arange(0, PIECES), part * COLUMNS + tl.arange(0, COLUMNS)
    at = (row.to(tl.int64) * pieces + those)[:, None] * N + inside[None, :]
    transformed = tl.load(transforms + at, (those < pieces)[:, None], 0.0)
    for piece in range(0, pieces):
        columns = piece * N + inside
        value = tl.load(x + of_x * stride + columns, columns < width, 0.0).to(tl.float32)
        total = tl.sum(transformed * _signs(piece & those)[:, None], 0)
        value = tl.fma(total, gain, value)
        tl.store(out + to * width + columns, value.to(out.dtype.element_ty), columns < width)


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
    """The gradient of x, with the upstream gradient g of each copy, summed in the order of the copies.

    1. The original and the Gaussian copies are x plus noise that does not depend on x: their derivative is 1.
    2. A dropout copy is x times its mask, which is drawn again from the seed: its derivative is the mask.
    3. So the gradient of a row is the sum of g over the original and the Gaussian copies, plus the sum of mask * g over
       the dropout copies.
    """
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
    """``batchkern::augment_latent``: one launch without a basis; two with a Hadamard basis, or, for rows of several
    pieces, one plus two for every 64 MB of pieces; two for every 16 MB of noise with a dense basis."""
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
    threshold, scale = _mask(drop_prob, rescale_dropout)
    columns, rows = _tile(width)
    unit = vector(x)

    def write(
        written: int, deviation: float, clip: float, first: int = 0, last: int = 0, noise: Tensor | None = None
    ) -> None:
        tiles = cdiv(last - first, rows) + cdiv(batch, rows) * written
        _rows[tiles * cdiv(width, columns),](
            x,
            out,
            out if noise is None else noise,
            seed,
            batch,
            width // unit,
            x.stride(0) // unit,
            gaussian,
            written,
            copies - written,
            first,
            last,
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
            write(copies, sigma, tau)
            return out
        # The noise is divided by its size, so that float16 neither overflows nor loses digits.
        size = min(sigma, tau)
        deviation, clip = (sigma / size, tau / size) if size > 0 else (0.0, 1.0)
        if basis.dim() == 1:
            write(1 + dropout, sigma, tau)
            signs = basis.to(torch.float32).contiguous()
            signs = signs.clone() if signs.data_ptr() % 16 else signs  # the kernel needs this alignment
            _write_hadamard(x, out, signs, seed, gaussian, deviation, clip, size)
            return out
        matrix = basis.to(x.dtype).t()
        chunk = max(1, NOISE_BYTES // (width * x.element_size()))
        buffer = x.new_empty(min(chunk, gaussian * batch), width)
        end = (1 + gaussian) * batch
        for first in range(batch, end, chunk):
            last = min(first + chunk, end)
            write(1 + dropout if first == batch else 0, deviation, clip, first, last, buffer)
            out[first:last].addmm_(buffer[: last - first], matrix, alpha=size)
    return out


def _write_hadamard(
    x: Tensor, out: Tensor, signs: Tensor, seed: Tensor, gaussian: int, deviation: float, clip: float, size: float
) -> None:
    batch, width = x.shape
    unit = vector(x)
    piece = min(power_of_two(width, 16), WIDEST)
    pieces = cdiv(width, piece)
    # The factors are at least 16, the smallest size that a tensor core takes, and at most 128.
    a = 1 if piece <= 128 else 1 << (piece.bit_length() - 1) // 2
    rows = max(1, 4096 // piece) if pieces == 1 else 1
    tiles, numbers = cdiv(batch, rows) * gaussian, (batch, width // unit, x.stride(0) // unit, gaussian)
    chunk, to = tiles, out
    if pieces > 1:
        chunk = min(tiles, max(1, PIECES_BYTES // (4 * pieces * piece)))
        to = x.new_empty(chunk, pieces, piece, dtype=torch.float32)
    gain = size / width**0.5
    for first in range(0, tiles, chunk):
        last = min(first + chunk, tiles)
        _hadamard_rows[min((last - first) * pieces, 4096),](
            x,
            to,
            signs,
            seed,
            *numbers,
            first,
            last,
            pieces,
            deviation,
            clip,
            gain,
            ROWS=rows,
            A=a,
            B=piece // a,
            WHOLE=pieces == 1,
            EXACT=x.dtype != torch.bfloat16,
            VECTOR=unit,
            num_warps=8,
            num_stages=1,
        )
        if pieces > 1:
            padded = power_of_two(pieces, 2)
            columns = min(piece, max(16, min(1024, 8192 // padded)))
            sizes = {"N": piece, "COLUMNS": columns, "PIECES": padded, "VECTOR": unit, "num_warps": 4}
            _sum_of_pieces[(last - first) * (piece // columns),](x, out, to, *numbers, first, pieces, gain, **sizes)


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
    """The threshold that the word of a kept element reaches, as the int32 with the same bits, and the element's
    factor."""
    threshold = round(drop_prob * 2**32)
    if threshold == 2**32:  # no word reaches it; a factor of 0 has the same effect
        return -1, 0.0
    return threshold - (threshold >> 31 << 32), 1 / (1 - drop_prob) if rescale else 1.0


@functools.cache
def _tile(width: int) -> tuple[int, int]:
    """Columns and rows of a tile: of the widest tile that pads a row by at most a quarter, or else the one that pads it
    least."""
    widths = (1024, 256, 64, 16)
    padded = {columns: cdiv(width, columns) * columns for columns in widths}
    columns = next((c for c in widths if padded[c] <= 1.25 * width), min(widths, key=lambda c: padded[c]))
    return columns, TILE // columns
