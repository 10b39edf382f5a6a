"""Trimmed mean of any losses."""

from __future__ import annotations

import torch
from torch import Tensor

import batchkern
from batchkern import reference
from bench import inputs, peers
from bench.registry import FULL_PASS, Case, Floor, Operation, Problem, Sweep, Variant, doubled, shape


def build(case: Case, device: torch.device) -> Problem:
    losses = inputs.trained_losses(case.sizes["rows"], device)
    keep = case.keep

    def oracle(x: Tensor) -> Tensor:
        return reference.trimmed_mean(x, keep)

    ours = {"ours": Variant(lambda x: batchkern.trimmed_mean(x, keep))}
    return Problem((losses,), {**ours, **peers.variants("trimmed_mean", device, keep)}, oracle)


def floor(case: Case, mode: str) -> Floor:
    """The losses are read, and their gradient is written."""
    return Floor((2 if mode == "full" else 1) * 4 * case.sizes["rows"])


def case(rows: int, target_s: float | None = None, modes: tuple[str, ...] = FULL_PASS) -> Case:
    return Case(shape(rows=rows), keep=0.2, target_s=target_s, modes=modes)


OPERATION = Operation(
    "trimmed_mean",
    build,
    floor,
    cases={
        "cpu": [case(1_000_000), case(128)],
        "cuda": [
            case(rows, target_s, ("forward",))
            for rows, target_s in ((65_536, 15e-6), (16_384, None), (1_000_000, None))
        ],
    },
    sweeps={device: [Sweep(case(1024), "rows", doubled(1024, 1 << 20))] for device in ("cpu", "cuda")},
    quick=case(10_000),
)
