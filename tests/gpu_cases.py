"""What the tests that need a GPU share: test_gpu.py and test_gpu_graphs.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import batchkern
from batchkern.basis import Hadamard

NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def batch(rows: int, classes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    logits = (3 * torch.randn(rows, classes, device="cuda")).to(dtype)
    target = torch.randint(classes, (rows,), device="cuda")
    target[::7] = -100
    return logits, target


def step(logits: Tensor, target: Tensor, keep: float | Tensor, **options: object) -> tuple[Tensor, Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    loss, losses = batchkern.trimmed_cross_entropy(leaf, target, keep, per_sample=True, **options)
    return loss.detach(), losses, torch.autograd.grad(loss, leaf)[0]


def launches(call: Callable[[], object]) -> list[str]:
    """The kernels, and the clearing of memory, that a call launches."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        call()
        torch.cuda.synchronize()
    events = recorded.events()
    return [e.name for e in events if e.device_type == torch.autograd.DeviceType.CUDA and "Memcpy" not in e.name]


def layer(rows: int, width: int, words: int, dtype: torch.dtype) -> list[Tensor]:
    """hidden, weight, bias, target"""
    hidden, weight = torch.randn(rows, width, device="cuda"), torch.randn(words, width, device="cuda") / width**0.5
    _, target = batch(rows, words)
    return [hidden.to(dtype), weight.to(dtype), torch.randn(words, device="cuda").to(dtype), target]


def linear_step(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, keep: float | Tensor, **options: object
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
    loss, losses = batchkern.linear_trimmed_cross_entropy(
        *leaves[:2], target, keep, bias=leaves[2], per_sample=True, **options
    )
    return [loss.detach(), losses, *torch.autograd.grad(1.5 * loss, leaves)]


NUMBERS = {"gaussian": 2, "dropout": 2, "sigma": 0.5, "tau": 0.6, "drop_prob": 0.3}
HALF_STEP = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def basis_of(kind: str, width: int) -> Tensor | Hadamard | None:
    return None if kind == "none" else batchkern.random_basis(width, kind, device="cuda")
