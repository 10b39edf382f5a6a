"""Ranking of batches by loss."""

from __future__ import annotations

import torch
from torch import Tensor

import batchkern
from batchkern import reference
from bench import inputs, peers
from bench.registry import Case, Floor, Operation, Problem, Sweep, Variant, shape


def build(case: Case, device: torch.device) -> Problem:
    losses = inputs.trained_losses(case.sizes["batches"], device)
    fraction, count = case.keep, ranked(case)

    def misplaced(indices: Tensor, exact: Tensor) -> float:
        """The fraction of places with another loss. Tied losses may have any order in a peer's result."""
        return float((losses[indices] != losses[exact]).double().mean())

    return Problem(
        (losses,),
        {
            "ours": Variant(lambda x: batchkern.rank_batches(x, fraction)),
            **peers.variants("rank_batches", device, count=count),
        },
        lambda x: reference.rank_batches(x, count),
        differentiable=0,
        result_error=misplaced,
        limit=0.0,
    )


def ranked(case: Case) -> int:
    return max(1, int(case.keep * case.sizes["batches"]))


def floor(case: Case, mode: str) -> Floor:
    """The losses are read, the indices written."""
    return Floor(4 * case.sizes["batches"] + 8 * ranked(case))


def case(batches: int, fraction: float = 0.2, target_s: float | None = None) -> Case:
    return Case(shape(batches=batches), keep=fraction, modes=("forward",), target_s=target_s)


TENFOLD = (1000, 10_000, 100_000, 1_000_000, 10_000_000)

OPERATION = Operation(
    "rank_batches",
    build,
    floor,
    cases={
        "cpu": [case(400), case(1_000_000)],
        "cuda": [case(1_000_000, 0.2, 60e-6), case(1_000_000, 0.002), case(400)],
    },
    sweeps={device: [Sweep(case(1000), "batches", TENFOLD)] for device in ("cpu", "cuda")},
    quick=case(10_000),
)
