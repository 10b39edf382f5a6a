"""What only the Triton launcher of soft_label_kl does: gradients multiplied where they lie, blocks of two sizes.

Run by ``pytest --kernels interpreter`` (or ``cuda``, on a GPU); tests/ops has the rest.
"""

from __future__ import annotations

import kernel_backend
import pytest
import torch

if kernel_backend.chosen not in ("interpreter", "cuda"):
    pytest.skip("needs --kernels interpreter, or --kernels cuda and a GPU", allow_module_level=True)

from batchkern import reference
from batchkern.triton import soft_label_kl as launcher

OPS = torch.ops.batchkern


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (4, 2048), (5, 2047)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_gradient_is_multiplied_into_another_tensor(shape: tuple, dtype: torch.dtype) -> None:
    gradient, out = torch.randn(shape), torch.full(shape, 7.0, dtype=dtype)
    factors = torch.tensor([7.0, -3.0])[1], torch.tensor(torch.nan), torch.tensor(1.0)
    for factor in factors:  # the first begins at no multiple of 16
        OPS.scale_gradient_(out, gradient, factor)
        torch.testing.assert_close(out, (gradient * factor).to(dtype), rtol=0, atol=0, equal_nan=True)


def test_a_factor_of_1_touches_nothing_in_place() -> None:
    gradient, out = torch.randn(300), torch.full((300,), 7.0)  # another tensor shows what was written
    options = {"IN_PLACE": True, "BLOCK": 4096, "VECTOR": 4, "num_warps": 4}
    launcher._scale_gradient[1,](out, gradient, torch.tensor(1.0), 75, **options)
    assert (out == 7.0).all()
    launcher._scale_gradient[1,](out, gradient, torch.tensor(2.0), 75, **options)
    assert torch.equal(out, 2.0 * gradient)


def test_more_elements_than_all_programs_take_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "PROGRAMS", 2)
    gradient = torch.randn(5, 4096)
    out = gradient.clone()
    OPS.scale_gradient_(out, out, torch.tensor(0.5))
    assert torch.equal(out, 0.5 * gradient)


@pytest.mark.parametrize("short", [0, 1 << 30])
@pytest.mark.parametrize("classes", [96, 98, 99])
def test_swept_rows_by_blocks_of_either_size(monkeypatch: pytest.MonkeyPatch, classes: int, short: int) -> None:
    monkeypatch.setattr(launcher, "ONE_TILE", 64)
    monkeypatch.setattr(launcher, "SHORT", short)
    p, q = 2 * torch.randn(2, classes), 2 * torch.randn(6, classes)
    mean, kl, to_q, to_p = launcher.soft_label_kl(p, q, scale=0.3, reference_grad=True)
    leaves = [x.double().requires_grad_() for x in (p, q)]
    exact = reference.soft_label_kl(*leaves)
    torch.testing.assert_close(kl.double(), exact.detach(), rtol=2e-6, atol=0)
    torch.testing.assert_close(mean.double(), 0.3 * exact.mean().detach(), rtol=2e-6, atol=0)
    for ours, theirs in zip((to_p, to_q), torch.autograd.grad(0.3 * exact.mean(), leaves), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-7)
