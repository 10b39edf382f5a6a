"""Runs every GPU kernel once or twice, for a sanitizer: ``compute-sanitizer python tools/every_kernel.py``.

Shapes are small: one for each way to divide rows among threads, and to select, with rows of every alignment. Results
are compared with float64, with a loose tolerance: the tests check them more strictly.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import batchkern
from batchkern import reference
from batchkern.basis import Hadamard

LOGITS = [
    (128, 10),  # a tile; a selection by counting
    (300, 19),  # two lanes per row in float32, and one in bfloat16
    (3000, 64),  # four lanes per row in float32, rows of whole vectors; a selection launch of one block
    (300, 151),  # eight lanes per row, rows of every alignment
    (100, 1001),  # a warp per row
    (20, 5003),  # a block of 256 threads per row
    (3, 100_001),  # several blocks per row
    (17_000, 12),  # a selection launch of several blocks
]
WIDTHS = [10, 300, 1024, 16_384]
CLASSES = [10, 300, 4096, 8200, 20_003]
NUMBERS = {"gaussian": 2, "dropout": 1, "sigma": 0.5, "tau": 0.6, "drop_prob": 0.3}

Pair = tuple[str, Tensor, Tensor]
"""A name, our result, and the one in float64."""


def cross_entropies(device: str, dtype: torch.dtype) -> Iterator[Pair]:
    for rows, classes in LOGITS:
        logits = (3 * torch.randn(rows, classes, device=device)).to(dtype).requires_grad_()
        target = torch.randint(classes, (rows,), device=device)
        target[::7] = -100
        weight = torch.rand(classes, device=device) + 0.5
        for options in ({}, {"label_smoothing": 0.1, "class_weight": weight}):
            wide = logits.detach().double().requires_grad_()
            loss = batchkern.trimmed_cross_entropy(logits, target, 0.3, **options)
            exact, _ = reference.trimmed_cross_entropy(wide, target, 0.3, **options)
            gradients = [torch.autograd.grad(y, x)[0] for y, x in ((loss, logits), (exact, wide))]
            yield f"trimmed_cross_entropy {rows} x {classes}", loss, exact
            yield f"its gradient {rows} x {classes}", *gradients


def dense_cross_entropies(device: str, dtype: torch.dtype) -> Iterator[Pair]:
    """Pixels, tokens with classes that are not contiguous, and probabilities. The numbers are rows, classes and
    pixels."""
    for rows, classes, pixels in ((3, 19, 1000), (2, 3000, 50), (5, 6, 20_000), (70, 300, 1), (5, 5000, 1)):
        logits = (3 * torch.randn(rows, classes, pixels, device=device)).to(dtype)
        target = torch.randint(classes, (rows, pixels), device=device, dtype=torch.int32)
        target.view(-1)[::7] = -100
        for laid in (logits, logits.movedim(1, -1).contiguous().movedim(-1, 1)):
            leaf, wide = laid.detach().requires_grad_(), laid.double().requires_grad_()
            for aim in (target, torch.rand_like(logits).softmax(1)):
                ours = batchkern.cross_entropy(leaf, aim, stats=True)
                exact = reference.cross_entropy(wide, aim)
                name = f"cross_entropy {rows} x {classes} x {pixels}"
                yield name, ours.loss, exact.loss
                yield f"entropy of {name}", ours.entropy, exact.entropy
                pairs = ((ours, leaf), (exact, wide))
                yield (
                    f"gradient of {name}",
                    *(torch.autograd.grad(y.loss.mean() + 1e-3 * y.lse.square().mean(), x)[0] for y, x in pairs),
                )
                loss = batchkern.trimmed_cross_entropy(leaf, aim, 0.3)
                yield f"trimmed {name}", loss, reference.trimmed_cross_entropy(wide, aim, 0.3)[0]


def bands(device: str, dtype: torch.dtype) -> Iterator[Pair]:
    for rows in (100, 20_000):
        losses, score = torch.randn(8, rows, device=device).to(dtype), torch.randn(8, rows, device=device)
        for options in ({"score": score, "skip": 0.1, "above": 1.0}, {"order": "lowest", "within": "sample"}):
            mean = batchkern.trimmed_mean(losses, 0.3, weight=score.abs(), **options)
            exact = reference.trimmed_mean(losses, 0.3, weight=score.abs(), **options)
            yield f"trimmed_mean 8 x {rows}, {', '.join(options)}", mean, exact


def selections(device: str, dtype: torch.dtype) -> Iterator[Pair]:
    for rows in (100, 5000, 20_000):
        losses = torch.randn(rows, device=device).to(dtype).requires_grad_()
        mask = torch.rand(rows, device=device) < 0.9
        mean, exact = batchkern.trimmed_mean(losses, 0.3, mask=mask), reference.trimmed_mean(losses, 0.3, mask=mask)
        yield f"trimmed_mean {rows}", mean, exact
        yield f"its gradient {rows}", torch.autograd.grad(mean, losses)[0], torch.autograd.grad(exact, losses)[0]
        for fraction in (0.01, 0.9):
            indices = batchkern.rank_batches(losses, fraction)
            yield f"rank_batches {rows}", indices, reference.rank_batches(losses.detach(), len(indices))


def linear_losses(device: str, dtype: torch.dtype) -> Iterator[Pair]:
    hidden = torch.randn(200, 16, device=device).to(dtype).requires_grad_()
    weight = torch.randn(1001, 16, device=device).to(dtype)
    target = torch.randint(1001, (200,), device=device)
    for keep in (0.2, 0.9, 1.0):
        wide = hidden.detach().double().requires_grad_()
        loss = batchkern.linear_trimmed_cross_entropy(hidden, weight, target, keep, chunk_rows=64)
        exact, _ = reference.linear_trimmed_cross_entropy(wide, weight.double(), target, keep)
        yield f"linear_trimmed_cross_entropy, keep {keep}", loss, exact
        gradients = [torch.autograd.grad(y, x)[0] for y, x in ((loss, hidden), (exact, wide))]
        yield f"its gradient, keep {keep}", *gradients
    upstream = torch.randn(200, device=device) * (torch.rand(200, device=device) < 0.2)
    for softcap in (None, 2.0):
        wide = hidden.detach().double().requires_grad_()
        rows = batchkern.linear_cross_entropy(hidden, weight, target, softcap=softcap, stats=True, chunk_rows=64)
        exact_rows = reference.linear_cross_entropy(wide, weight.double(), target, softcap=softcap)
        pairs = zip(rows._fields[:3], rows[:3], exact_rows[:3], strict=True)
        yield from ((f"linear_cross_entropy, {name}, softcap {softcap}", x, y) for name, x, y in pairs)
        sums = (((r.loss + r.lse) * upstream).sum() for r in (rows, exact_rows))
        gradients = [torch.autograd.grad(y, x)[0] for y, x in zip(sums, (hidden, wide), strict=True)]
        yield f"its gradient, softcap {softcap}", *gradients


def virtual_samples(device: str, dtype: torch.dtype) -> Iterator[Pair]:
    seed = torch.tensor(3, device=device)
    for width in WIDTHS:
        x = torch.randn(9, width, device=device).to(dtype).requires_grad_()
        for kind in ("none", "normalized", "hadamard"):
            if kind == "normalized" and width > 1024:
                continue  # the matrix would be large, and no other kernel would run
            basis = None if kind == "none" else batchkern.random_basis(width, kind, device=device)
            wide = x.detach().double().requires_grad_()
            exact_basis = basis if basis is None or isinstance(basis, Hadamard) else basis.double()
            out = batchkern.augment_latent(x, basis=basis, seed=seed, **NUMBERS)
            exact = reference.augment_latent(wide, seed, basis=exact_basis, **NUMBERS)
            upstream = torch.randn_like(out)
            yield f"augment_latent {width} {kind}", out, exact
            gradients = torch.autograd.grad(out, x, upstream), torch.autograd.grad(exact, wide, upstream.double())
            yield f"its gradient {width} {kind}", gradients[0][0], gradients[1][0]


def divergences(device: str, dtype: torch.dtype) -> Iterator[Pair]:
    for classes in CLASSES:
        p = torch.randn(5, classes, device=device)
        q = p.repeat(2, 1) + torch.randn(10, classes, device=device)
        p, q = (x.to(dtype).requires_grad_() for x in (p, q))
        wide = [x.detach().double().requires_grad_() for x in (p, q)]
        mean = 3 * batchkern.soft_label_kl(p, q, scale=0.5, reference_grad=True)  # an upstream gradient of 3
        exact = 1.5 * reference.soft_label_kl(*wide).mean()
        yield f"soft_label_kl {classes}", mean, exact
        for ours, theirs in zip(torch.autograd.grad(mean, [p, q]), torch.autograd.grad(exact, wide)):
            yield f"its gradient {classes}", ours, theirs


FAMILIES = (
    *(cross_entropies, dense_cross_entropies, bands, selections),
    *(linear_losses, virtual_samples, divergences),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--on", choices=["cpu", "cuda"], default="cuda")
    device = parser.parse_args().on
    torch.manual_seed(0)
    limits = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
    if device == "cpu":
        del limits[torch.bfloat16]  # slow there, and no GPU kernel runs
    wrong, count = [], 0
    for dtype, limit in limits.items():
        for pairs in FAMILIES:
            for what, ours, exact in pairs(device, dtype):
                ours, exact = ours.detach().double(), exact.detach().double()
                count += 1
                error = float((ours - exact).norm() / exact.norm())
                if not error <= limit:
                    wrong.append(f"{what}, {dtype}: off by {error:.2g} of itself")
    print(f"{count} results", *wrong, sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
