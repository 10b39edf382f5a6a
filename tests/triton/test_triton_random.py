"""Words and normals of the Triton kernels, at rows that no tensor here has, and over every value of a word.

Run by ``pytest --kernels interpreter`` (or ``cuda``, on a GPU): a kernel of Triton cannot be called otherwise.
"""

from __future__ import annotations

import json
import math
from typing import Any

import kernel_backend
import pytest
import torch
from golden import philox as golden
from torch import Tensor

if kernel_backend.chosen not in ("interpreter", "cuda"):
    pytest.skip("needs --kernels interpreter, or --kernels cuda and a GPU", allow_module_level=True)

import triton
import triton.language as tl

from batchkern import reference
from batchkern.triton.random import box_muller, clipped_normals, random_words

DEVICE = "cuda" if kernel_backend.chosen == "cuda" else "cpu"
DRAWS = json.loads(golden.PATH.read_text())["draws"]
VALUES = 1 << 23  # of the bits of a word that a normal uses
BLOCK = 1 << 17


@triton.jit
def words_of(out, seed, row, first_quad, QUADS: tl.constexpr):
    """``(4, 1, QUADS)``"""
    rows = tl.load(row) + tl.arange(0, 1).to(tl.int64)
    a, b, c, d = random_words(tl.load(seed), rows, first_quad + tl.arange(0, QUADS))
    to = out + tl.arange(0, QUADS)[None, :]
    tl.store(to, a.to(tl.int64))
    tl.store(to + QUADS, b.to(tl.int64))
    tl.store(to + 2 * QUADS, c.to(tl.int64))
    tl.store(to + 3 * QUADS, d.to(tl.int64))


@pytest.mark.parametrize("draw", DRAWS, ids=lambda d: f"{d['seed']}-{d['row']}")
def test_words_of_the_golden_file(draw: dict[str, Any]) -> None:
    first, out = draw["first_column"], torch.zeros(4, 4, dtype=torch.int64, device=DEVICE)
    seed, row = (torch.tensor(draw[name], dtype=torch.int64, device=DEVICE) for name in ("seed", "row"))
    words_of[1,](out, seed, row, first // 4, QUADS=4)
    words = out.T.flatten()[first % 4 :]
    assert words[: len(draw["words"])].tolist() == draw["words"]


@triton.jit
def normals_of(radius_words, angle_words, x, y, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = (tl.load(radius_words + place) << 9).to(tl.uint32, bitcast=True)
    b = (tl.load(angle_words + place) << 9).to(tl.uint32, bitcast=True)
    cosine, sine = box_muller(a, b, 1.0)
    tl.store(x + place, cosine)
    tl.store(y + place, sine)


def largest_error(radius: Tensor, angle: Tensor) -> float:
    x, y = (torch.empty(len(radius), device=DEVICE) for _ in range(2))
    normals_of[len(radius) // BLOCK,](radius, angle, x, y, BLOCK=BLOCK)
    u, v = ((words.double() + 0.5) / VALUES for words in (radius, angle))
    exact = torch.sqrt(-2 * torch.log(u)) * torch.exp(2j * math.pi * v)
    return max(float((x - exact.real).abs().max()), float((y - exact.imag).abs().max()))


def test_every_radius_and_every_angle() -> None:
    # 1e-6 is what backends may differ by. The largest radius, 5.8, has the largest error.
    every = torch.arange(VALUES, dtype=torch.int32, device=DEVICE)
    mixed = every.flip(0) * 5 % VALUES
    assert largest_error(every, mixed) < 1e-6
    assert largest_error(torch.zeros_like(every), every) < 1e-6
    assert largest_error(every, torch.full_like(every, VALUES // 8)) < 1e-6


@triton.jit
def clipped(out, seed, sigma, tau, R: tl.constexpr, QUADS: tl.constexpr):
    rows = (1 << 40) + tl.arange(0, R).to(tl.int64)
    x = clipped_normals(tl.load(seed), rows, tl.arange(0, QUADS), sigma, tau)
    tl.store(out + tl.arange(0, R)[:, None] * 4 * QUADS + tl.arange(0, 4 * QUADS)[None, :], x)


def test_rows_beyond_32_bits_have_numbers_of_their_own() -> None:
    out, seed = torch.empty(8, 128, device=DEVICE), torch.tensor(-3, device=DEVICE)
    clipped[1,](out, seed, 0.5, 0.6, R=8, QUADS=32)
    expected = (0.5 * reference.random_normals((1 << 40) + torch.arange(8, device=DEVICE), 128, seed)).clamp(-0.6, 0.6)
    assert (out - expected).abs().max() < 1e-6
    assert (out.abs() == torch.tensor(0.6)).sum() > 100
