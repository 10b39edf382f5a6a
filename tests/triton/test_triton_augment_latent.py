"""What only the Triton launcher of augment_latent does: the noise of a dense basis in parts, a row in several pieces.

Run by ``pytest --kernels interpreter`` (or ``cuda``, on a GPU); tests/ops has the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kernel_backend
import pytest
import torch

if kernel_backend.chosen not in ("interpreter", "cuda"):
    pytest.skip("needs --kernels interpreter, or --kernels cuda and a GPU", allow_module_level=True)

import batchkern
from batchkern import reference
from batchkern.triton import augment_latent as launcher
from batchkern.triton.launch import Kernel, vector

NUMBERS = {"gaussian": 3, "dropout": 1, "sigma": 0.5, "tau": 0.6, "drop_prob": 0.3}


@pytest.mark.parametrize("rows_a_part", [1, 7, 20, 21, 59, 60, 61])
def test_noise_of_a_dense_basis_that_is_made_in_parts(monkeypatch: pytest.MonkeyPatch, rows_a_part: int) -> None:
    # 20 rows and 3 copies: parts that end within a copy, with one, and after the last.
    x, basis, seed = torch.randn(20, 24), batchkern.random_basis(24, "orthogonal"), torch.tensor(-9)
    monkeypatch.setattr(launcher, "NOISE_BYTES", rows_a_part * 24 * 4)
    out = batchkern.augment_latent(x, basis=basis, seed=seed, **NUMBERS)
    expected = reference.augment_latent(x.double(), seed, basis=basis.double(), **NUMBERS)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("width", "rows_at_once"), [(33, 1), (64, 4), (65, 100), (128, 14), (150, 15)])
def test_a_row_that_is_transformed_in_pieces(
    monkeypatch: pytest.MonkeyPatch, width: int, rows_at_once: int, dtype: torch.dtype
) -> None:
    # 15 Gaussian rows: in parts that end within the copies of a row and with them, in one, and in more than there are.
    x, basis, seed = torch.randn(5, width).to(dtype), batchkern.random_basis(width, "hadamard"), torch.tensor(4)
    monkeypatch.setattr(launcher, "WIDEST", 32)
    monkeypatch.setattr(launcher, "PIECES_BYTES", rows_at_once * 4 * -(-width // 32) * 32)
    out = batchkern.augment_latent(x, basis=basis, seed=seed, **NUMBERS)
    expected = reference.augment_latent(x.double(), seed, basis=basis, **NUMBERS)
    half_step = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(out.double(), expected, rtol=half_step, atol=3e-6)


@pytest.mark.parametrize(("sigma", "tau"), [(1e-6, 1.0), (1.0, 1e-7), (3e4, 1e30), (1e5, 2e4), (0.0, 0.5)])
@pytest.mark.parametrize("kind", ["normalized", "hadamard"])
def test_noise_of_any_size_keeps_its_digits_in_float16(sigma: float, tau: float, kind: str) -> None:
    # Noise of 1e-7 is no number of float16, and one above 65504 neither, but both are after the projection of x = 0.
    x, basis, seed = torch.zeros(4, 32, dtype=torch.float16), batchkern.random_basis(32, kind), torch.tensor(4)
    numbers = {**NUMBERS, "sigma": sigma, "tau": tau}
    out = batchkern.augment_latent(x, basis=basis, seed=seed, **numbers).double()
    expected = reference.augment_latent(x.double(), seed, basis=basis, **numbers)
    overflow = expected.abs() >= 65520
    assert out[overflow].isinf().all()
    size = min(sigma, tau)
    torch.testing.assert_close(out[~overflow], expected[~overflow], rtol=2**-10, atol=2**-25 + 2e-3 * size)


class FirstPrograms:
    """A kernel of which no more than some programs are launched."""

    def __init__(self, kernel: Kernel, programs: int) -> None:
        self._kernel, self._programs = kernel, programs

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        assert grid[0] > self._programs
        return self._kernel[(self._programs,)]


@pytest.mark.skipif(kernel_backend.chosen == "cuda", reason="needs memory that was NaN before")
@pytest.mark.parametrize("kind", ["none", "hadamard"])
def test_copies_of_a_tile_are_neighbours_in_the_grid(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    # Two tiles of rows: the first programs write the first tile of each copy, so that it is read from memory once.
    width, rows = 16, launcher._tile(16)[1]
    x = torch.randn(2 * rows, width)
    basis = None if kind == "none" else batchkern.random_basis(width, kind)
    copies = 5 if kind == "none" else 2  # all, or x and the dropout copy
    monkeypatch.setattr(launcher, "_rows", FirstPrograms(launcher._rows, copies))
    out = batchkern.augment_latent(x, basis=basis, seed=3, **NUMBERS).view(5, 2, rows, width)
    written = range(5) if kind == "none" else (0, 4)
    for copy in written:
        assert out[copy, 0].isfinite().all()
        assert out[copy, 1].isnan().all()


@pytest.mark.skipif(kernel_backend.chosen == "cuda", reason="needs memory that was NaN before")
def test_hadamard_copies_of_a_tile_are_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    width, rows = 16, 256
    launched = launcher._hadamard_rows

    class FirstTiles:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            def launch(*arguments: Any, **options: Any) -> None:
                assert arguments[8:10] == (0, 6)  # tiles of two rows of tiles and three copies
                launched[grid](*arguments[:9], 3, *arguments[10:], **options)

            return launch

    monkeypatch.setattr(launcher, "_hadamard_rows", FirstTiles())
    x = torch.randn(2 * rows, width)
    out = batchkern.augment_latent(x, basis=batchkern.random_basis(width, "hadamard"), seed=3, **NUMBERS)
    gaussian = out.view(5, 2, rows, width)[1:4]
    assert gaussian[:, 0].isfinite().all()
    assert gaussian[:, 1].isnan().all()


@pytest.mark.parametrize(
    ("width", "stride", "begin", "dtype", "elements"),
    [
        (1000, 1000, 0, torch.float32, 4),
        (1000, 1000, 0, torch.float16, 8),
        (300, 300, 0, torch.bfloat16, 4),  # 8 bytes
        (302, 304, 0, torch.float32, 2),
        (302, 304, 0, torch.float16, 2),  # 4 bytes
        (304, 306, 0, torch.float16, 2),
        (304, 304, 8, torch.float16, 8),
        (304, 304, 4, torch.float16, 1),  # 8 bytes behind a multiple of 16
        (301, 304, 0, torch.float32, 1),
    ],
    ids=str,
)
def test_elements_of_a_load(width: int, stride: int, begin: int, dtype: torch.dtype, elements: int) -> None:
    flat = torch.zeros(3 * stride + 16, dtype=dtype)
    assert flat.data_ptr() % 16 == 0
    x = flat[begin:][: 3 * stride].view(3, stride)[:, :width]
    assert vector(x) == elements
    assert vector(torch.zeros(2, 304 * 8, dtype=dtype), x) == elements


@pytest.mark.parametrize(("width", "dtype"), [(12, torch.float16), (10, torch.float16), (10, torch.float32)], ids=str)
@pytest.mark.parametrize("kind", ["none", "normalized", "hadamard"])
def test_rows_of_8_and_of_4_bytes(kind: str, width: int, dtype: torch.dtype) -> None:
    x = torch.randn(7, width).to(dtype)
    basis = None if kind == "none" else batchkern.random_basis(width, kind)
    out = batchkern.augment_latent(x, basis=basis, seed=3, **NUMBERS)
    expected = reference.augment_latent(x.double(), torch.tensor(3), basis=basis, **NUMBERS)
    torch.testing.assert_close(
        out.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-3 if dtype.itemsize == 2 else 3e-6
    )
