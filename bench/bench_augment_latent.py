"""Latent augmentation beside randn, clamp, matmul, bernoulli and cat."""

from __future__ import annotations

from functools import partial
from typing import Any

import harness
import torch
from torch import Tensor

import batchkern
from batchkern.basis import BasisKind

BATCH, WIDTH, COPIES = (32, 64, 4) if harness.QUICK else (128, 512, 8)
SIGMA, TAU, DROP = 0.5, 1.0, 0.3


def problem(kind: BasisKind | None) -> harness.Problem:
    x = (
        torch.randn(BATCH, WIDTH).relu() + 0.01
    )  # what a hidden layer gives, without zeros: those look like dropped ones
    basis = None if kind is None else batchkern.random_basis(WIDTH, kind)
    dense = basis.matrix() if isinstance(basis, batchkern.Hadamard) else basis

    def ours(x: Tensor) -> Tensor:
        return batchkern.augment_latent(
            x, gaussian=COPIES, dropout=COPIES, sigma=SIGMA, tau=TAU, drop_prob=DROP, basis=basis
        )

    def eager(x: Tensor) -> Tensor:
        noise = (SIGMA * torch.randn(COPIES * BATCH, WIDTH)).clamp(-TAU, TAU)
        if dense is not None:
            noise = noise @ dense.T
        mask = torch.bernoulli(torch.full((COPIES, BATCH, WIDTH), 1 - DROP))
        return torch.cat([x, (x + noise.view(COPIES, BATCH, WIDTH)).flatten(0, 1), (mask * x).flatten(0, 1)])

    def assert_alike(y: Tensor, dx: Tensor | None, peer_y: Tensor, peer_dx: Tensor | None) -> None:
        """The random numbers differ by design: equal in shape, in the raw rows, in scale and in the share of zeros."""
        assert y.shape == peer_y.shape
        assert torch.equal(y[:BATCH], x)
        copies = y[BATCH:].view(2, COPIES, BATCH, WIDTH)
        peers = peer_y[BATCH:].view(2, COPIES, BATCH, WIDTH)
        loose = 5 / (COPIES * BATCH * WIDTH) ** 0.5  # some standard errors
        noise, peer_noise = (c[0] - x for c in (copies, peers))
        torch.testing.assert_close(noise.std(), peer_noise.std(), rtol=2 * loose, atol=0)
        torch.testing.assert_close(noise.mean(), peer_noise.mean(), rtol=0, atol=2 * loose)
        kept = copies[1] != 0
        torch.testing.assert_close(kept.float().mean(), torch.tensor(1 - DROP), rtol=0, atol=loose)
        assert torch.equal(copies[1], kept * x)
        torch.testing.assert_close(dx.std(), peer_dx.std(), rtol=0.1, atol=0)

    output = (1 + 2 * COPIES) * x.nbytes
    matmul = 0.0
    if kind == "normalized":
        noise = torch.randn(COPIES * BATCH, WIDTH)
        matmul = harness.median_seconds(lambda: noise @ dense.T)
    return harness.Problem(
        x,
        ours=ours,
        eager=eager,
        floor_bytes={"forward": output, "backward": output + x.nbytes, "full": 2 * output + x.nbytes},
        floor_seconds={"forward": matmul, "full": matmul},
        upstream=torch.randn((1 + 2 * COPIES) * BATCH, WIDTH),
        check=assert_alike,
    )


CASES = [
    harness.Case("augment_latent", f"{BATCH}x{WIDTH} x{1 + 2 * COPIES} {kind or 'no basis'}", partial(problem, kind))
    for kind in (None, "normalized", "hadamard")
]


@harness.benchmark_rows(CASES)
def test_augment_latent(benchmark: Any, bench: harness.Bench, case: harness.Case, phase: str, variant: str) -> None:
    bench.row(benchmark, case, phase, variant)
