"""What only the Triton launcher of augment_latent does: the noise of a dense basis in parts, a row in several pieces.

Run by ``pytest --through interpreter`` (or ``cuda``, on a GPU); tests/ops has the rest.
"""

from __future__ import annotations

import pytest
import through
import torch

if through.which not in ("interpreter", "cuda"):
    pytest.skip("needs --through interpreter, or --through cuda and a GPU", allow_module_level=True)

import batchkern
from batchkern import reference
from batchkern.triton import augment_latent as launcher

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
@pytest.mark.parametrize("width", [33, 64, 65, 128, 150])
def test_a_row_that_is_transformed_in_pieces(monkeypatch: pytest.MonkeyPatch, width: int, dtype: torch.dtype) -> None:
    x, basis, seed = torch.randn(5, width).to(dtype), batchkern.random_basis(width, "hadamard"), torch.tensor(4)
    monkeypatch.setattr(launcher, "WIDEST", 32)
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
