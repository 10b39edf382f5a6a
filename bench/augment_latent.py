"""Latent augmentation: Gaussian and dropout copies, without a basis, with a dense one, with a Hadamard transform."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import batchkern
from batchkern import reference
from batchkern.basis import Hadamard
from bench import peers
from bench.registry import FULL_PASS, Case, Floor, Operation, Problem, Sweep, Variant, doubled, relative_error, shape

FP32, BF16 = torch.float32, torch.bfloat16
WIDEST_DENSE = 4096
"""Peers apply the transform as a dense matrix: wider ones would take more memory and time than all other cases."""
NUMBERS = {"sigma": 0.5, "tau": 0.6, "drop_prob": 0.3}


def build(case: Case, device: torch.device) -> Problem:
    batch, width, gaussian, dropout = case.sizes.values()
    # Like the output of a hidden layer, but without zeros, which would look like dropped elements.
    x = (torch.randn(batch, width, device=device).relu() + 0.01).to(case.dtype)
    basis = None if case.kind == "no basis" else batchkern.random_basis(width, case.kind, device=device)
    copies = {"gaussian": gaussian, "dropout": dropout}
    seed = torch.tensor(1, device=device)

    def oracle(x: Tensor) -> Tensor:
        return reference.augment_latent(x, seed, basis=wide(basis), **copies, **NUMBERS)

    variants = {
        "ours": Variant(
            lambda x: batchkern.augment_latent(x, basis=basis, seed=seed, **copies, **NUMBERS),
            random=lambda x: batchkern.augment_latent(x, basis=basis, **copies, **NUMBERS),
        )
    }
    theirs = {}
    if not isinstance(basis, Hadamard) or width <= WIDEST_DENSE:
        matrix = basis.matrix() if isinstance(basis, Hadamard) else basis
        dense = None if matrix is None else matrix.to(case.dtype)
        theirs = peers.variants("augment_latent", device, dense=dense, **copies, **NUMBERS)
    draw = oracle(x.double()).detach()
    upstream = torch.randn(len(draw), width, device=device).to(case.dtype)
    return Problem(
        (x,),
        variants | {name: replace(peer, wrong=partial(unlike, case, draw, upstream)) for name, peer in theirs.items()},
        oracle,
        upstream=upstream,
        limit=limit(case),
    )


def wide(basis: Tensor | Hadamard | None) -> Tensor | Hadamard | None:
    return basis.double() if isinstance(basis, Tensor) else basis


def unlike(case: Case, draw: Tensor, upstream: Tensor, result: Tensor, gradients: tuple[Tensor, ...]) -> str:
    """Why a result with random numbers of its own is not distributed like ``draw``, which is right; empty if it is.

    Compares the raw rows; the mean and spread of the noise; the number of zeros; x elsewhere; and the gradient.
    """
    batch, _, gaussian, dropout = case.sizes.values()
    if result.shape != draw.shape:
        return f"its shape is {tuple(result.shape)}, not {tuple(draw.shape)}"
    x, noisy, _ = draw.to(result.dtype).split([batch, gaussian * batch, dropout * batch])
    their_x, their_noisy, their_masked = result.split([batch, gaussian * batch, dropout * batch])
    if not torch.equal(their_x, x):
        return "its first rows are not x"
    if gaussian:
        noise, their_noise = (y.double() - x.double().repeat(gaussian, 1) for y in (noisy, their_noisy))
        spread = float(noise.std())
        # A few standard errors plus half an epsilon of the type, to which a peer rounds its tau and its noise.
        loose = 6 / noise.numel() ** 0.5 + torch.finfo(result.dtype).eps / 2
        shift, ratio = float(their_noise.mean() - noise.mean()) / spread, float(their_noise.std()) / spread
        if abs(shift) > loose or abs(ratio - 1) > loose:
            return f"its noise has mean {their_noise.mean():.3g} and spread {their_noise.std():.3g}, not {spread:.3g}"
    kept = their_masked != 0
    if dropout and abs(float(kept.double().mean()) - (1 - NUMBERS["drop_prob"])) > 3 / kept.numel() ** 0.5:
        return f"it keeps {kept.double().mean():.3f} of the elements"
    if not torch.equal(their_masked, x.repeat(dropout, 1) * kept):
        return "what it keeps is not x"
    weights = torch.cat([torch.ones_like(draw[: (1 + gaussian) * batch]), kept.double()])
    exact = (upstream.double() * weights).unflatten(0, (-1, batch)).sum(0)
    error = max((relative_error(gradient, exact) for gradient in gradients), default=0.0)
    return f"its gradient is off by {error:.2g} of itself" if error > limit(case) else ""


def limit(case: Case) -> float:
    return 1e-3 if case.dtype == FP32 else 2e-2


def floor(case: Case, mode: str) -> Floor:
    """Forward, the output is written and the product with a dense basis computed. Backward, the gradient of the output
    is read."""
    batch, width, gaussian, dropout = case.sizes.values()
    x = batch * width * case.dtype.itemsize
    output = (1 + gaussian + dropout) * x
    product = 2.0 * gaussian * batch * width**2 if case.kind == "normalized" else 0.0
    return {
        "forward": Floor(output, product),
        "backward": Floor(output + x),
        "full": Floor(2 * output + x, product),
    }[mode]


def case(
    batch: int,
    width: int,
    gaussian: int,
    dropout: int,
    kind: str = "no basis",
    dtype: torch.dtype = FP32,
    target_fraction: float | None = None,
    modes: tuple[str, ...] = FULL_PASS,
) -> Case:
    sizes = shape(batch=batch, width=width, gaussian=gaussian, dropout=dropout)
    return Case(sizes, dtype, kind=kind, modes=modes, target_fraction=target_fraction)


KINDS = "no basis", "normalized", "hadamard"
GPU_TARGETS = None, 0.85, 0.3  # the floor does not include normals and transforms

OPERATION = Operation(
    "augment_latent",
    build,
    floor,
    cases={
        "cpu": [case(128, 512, 8, 8, kind) for kind in KINDS],
        "cuda": [
            *(
                case(1024, 4096, 32, 0, kind, BF16, target, modes=("forward",))
                for kind, target in zip(KINDS, GPU_TARGETS)
            ),
            case(65_536, 1024, 0, 4, dtype=BF16, modes=("forward",)),
            case(1024, 20_000, 32, 0, "hadamard", BF16, modes=("forward",)),
        ],
    },
    sweeps={
        "cpu": [
            Sweep(case(64, 128, 4, 4), "batch", doubled(32, 16_384)),
            Sweep(case(16, 64, 4, 4), "width", doubled(128, 65_536)),
            Sweep(case(16, 64, 4, 4, "hadamard"), "width", doubled(128, 65_536)),
            Sweep(case(64, 512, 1, 0), "gaussian", doubled(1, 64)),
            Sweep(case(64, 512, 0, 1), "dropout", doubled(1, 64)),
        ],
        "cuda": [
            Sweep(case(64, 1024, 4, 4, dtype=BF16), "batch", doubled(64, 65_536)),
            Sweep(case(256, 64, 4, 4, "hadamard", BF16), "width", doubled(128, 65_536)),
            Sweep(case(1024, 1024, 1, 0, dtype=BF16), "gaussian", doubled(1, 64)),
        ],
    },
    quick=case(32, 64, 4, 4, "normalized"),
)
