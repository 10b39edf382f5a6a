"""What bench/gpu_kernels.py measures: problems, their peers, floors and targets."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import batchkern
from batchkern.basis import Hadamard

KEEP = 0.2
Call = Callable[[], object]


@dataclass
class Problem:
    floor_bytes: float
    variants: dict[str, Call]
    host: bool = False
    """Whether the host time of a call counts too."""
    floor_flops: float = 0.0
    """Of bfloat16 products."""
    captured: bool = True
    """Whether a call is measured in a CUDA graph. Not where it is so long that launches do not show, and peers wait
    for the device."""


@dataclass(frozen=True)
class Case:
    op: str
    label: str
    phase: str
    build: Callable[[], Problem]
    target_s: float | None = None


def cross_entropy(rows: int, classes: int, dtype: torch.dtype) -> Problem:
    logits = 2 * torch.randn(rows, classes, device="cuda", dtype=dtype)
    target = torch.randint(classes, (rows,), device="cuda")
    kept = max(round(KEEP * rows), 1)
    leaf = logits.requires_grad_()
    one = torch.ones((), device="cuda")

    def eager(x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x.float(), target, reduction="none").topk(kept).values.mean()

    def step(function: Callable[[torch.Tensor], torch.Tensor]) -> Call:
        return lambda: torch.autograd.grad(function(leaf), leaf, one)

    return Problem(
        (2 + KEEP) * logits.nbytes,
        {
            "ours": step(lambda x: batchkern.trimmed_cross_entropy(x, target, KEEP)),
            "eager": step(eager),
            "compile": step(torch.compile(eager, fullgraph=True, dynamic=False)),
        },
        host=rows * classes < 10_000,
    )


def linear_cross_entropy(rows: int, width: int, words: int, keep: float) -> Problem:
    """Forward and backward pass, the gradients of hidden and weight among them. Peers that cannot trim, and so cost the
    same at any keep, are there at keep = 1."""
    hidden = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (width**-0.5 * torch.randn(words, width, device="cuda")).bfloat16().requires_grad_()
    target = torch.randint(words, (rows,), device="cuda")
    kept = max(round(keep * rows), 1)

    def eager(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        losses = F.cross_entropy(F.linear(hidden, weight).float(), target, reduction="none")
        return losses.topk(kept, sorted=False).values.mean()

    functions = {
        "ours": lambda h, w: batchkern.linear_trimmed_cross_entropy(h, w, target, keep),
        "eager": eager,
        "compile": torch.compile(eager, fullgraph=True, dynamic=False),
    }
    if keep == 1:
        if hasattr(F, "linear_cross_entropy"):
            options = torch.nn.LinearCrossEntropyOptions()
            functions["torch"] = lambda h, w: F.linear_cross_entropy(h, w, target, options=options)
        if importlib.util.find_spec("liger_kernel"):
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            liger = LigerFusedLinearCrossEntropyLoss()
            functions["liger"] = lambda h, w: liger(w, h, target)
        if importlib.util.find_spec("cut_cross_entropy"):
            from cut_cross_entropy import linear_cross_entropy as cut

            functions["cut"] = lambda h, w: cut(h, w, target)
        if importlib.util.find_spec("quack"):
            from quack.linear_cross_entropy import chunked_linear_cross_entropy as quack

            functions["quack"] = lambda h, w: quack(h, w, target)

    def step(function: Callable[..., torch.Tensor]) -> Call:
        return lambda: torch.autograd.grad(function(hidden, weight), (hidden, weight))

    return Problem(
        2 * (hidden.nbytes + weight.nbytes),
        {name: step(function) for name, function in functions.items()},
        floor_flops=min(1 + 3 * keep, 3 + 2 * (1 - keep)) * 2 * rows * width * words,
        captured=False,
    )


def trimmed_mean(rows: int) -> Problem:
    losses = torch.randn(rows, device="cuda").exp()
    kept = max(round(KEEP * rows), 1)

    def eager(x: torch.Tensor) -> torch.Tensor:
        return x.topk(kept, sorted=False).values.mean()

    compiled = torch.compile(eager, fullgraph=True, dynamic=False)
    return Problem(
        losses.nbytes + rows,
        {
            "ours": lambda: batchkern.trimmed_mean(losses, KEEP),
            "eager": lambda: eager(losses),
            "compile": lambda: compiled(losses),
        },
    )


def rank_batches(size: int, fraction: float) -> Problem:
    losses = torch.randn(size, device="cuda").exp()
    count = max(1, int(fraction * size))
    return Problem(
        losses.nbytes + 8 * count,
        {
            "ours": lambda: batchkern.rank_batches(losses, fraction),
            "eager": lambda: losses.topk(count).indices,
            "sort": lambda: losses.sort(descending=True, stable=True).indices[:count],
        },
    )


def divergence(batch: int, copies: int, classes: int, dtype: torch.dtype, *, full: bool) -> Problem:
    """The loss and its gradient. Ours is made in the forward pass; with ``full`` the backward pass scales it. The peers
    run their backward pass in either case.
    """
    p = 2 * torch.randn(batch, classes, device="cuda")
    q = (p.repeat(copies, 1) + 0.3 * torch.randn(copies * batch, classes, device="cuda")).to(dtype).requires_grad_()
    p = p.to(dtype)
    one = torch.ones((), device="cuda")

    def eager(q: torch.Tensor) -> torch.Tensor:
        log_p = F.log_softmax(p.float(), dim=1).repeat(copies, 1)
        return F.kl_div(F.log_softmax(q.float(), dim=1), log_p, reduction="batchmean", log_target=True)

    functions = {"ours": lambda q: batchkern.soft_label_kl(p, q), "eager": eager}
    functions["compile"] = torch.compile(eager, fullgraph=True, dynamic=False)
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerKLDIVLoss

        theirs = LigerKLDIVLoss(reduction="batchmean", log_target=True)
        functions["liger"] = lambda q: theirs(
            F.log_softmax(q, dim=1), F.log_softmax(p, dim=1, dtype=torch.float32).repeat(copies, 1)
        )

    def step(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Call:
        if name == "ours" and not full:
            return lambda: function(q)
        return lambda: torch.autograd.grad(function(q), q, one)

    calls = {name: step(name, function) for name, function in functions.items()}
    return Problem((2 * copies + 1) * p.nbytes, calls, host=classes < 100)


def augmentation(kind: str) -> Problem:
    """32 Gaussian copies; ``matmul`` is the product with a dense basis alone."""
    batch, width, copies, sigma, tau = 1024, 4096, 32, 0.5, 0.6
    x = torch.randn(batch, width, device="cuda", dtype=torch.bfloat16)
    basis = None if kind == "none" else batchkern.random_basis(width, kind, device="cuda")
    dense = basis.matrix() if isinstance(basis, Hadamard) else basis
    matrix = None if dense is None else dense.to(x.dtype).T.contiguous()
    seed = torch.tensor(1, device="cuda")
    options = {"gaussian": copies, "dropout": 0, "sigma": sigma, "tau": tau, "drop_prob": 0.0}

    def eager() -> torch.Tensor:
        noise = (sigma * torch.randn(copies * batch, width, device="cuda", dtype=x.dtype)).clamp(-tau, tau)
        noise = noise if matrix is None else noise @ matrix
        return torch.cat([x, x.repeat(copies, 1) + noise])

    variants = {
        "ours": lambda: batchkern.augment_latent(x, basis=basis, seed=seed, **options),
        "eager": eager,
        "compile": torch.compile(eager, fullgraph=True, dynamic=False),
    }
    if matrix is not None:
        drawn = torch.randn(copies * batch, width, device="cuda", dtype=x.dtype)
        variants["matmul"] = lambda: drawn @ matrix
    return Problem((1 + copies) * x.nbytes, variants)


def cases() -> list[Case]:
    fp32, bf16 = torch.float32, torch.bfloat16
    shapes = [
        (65_536, 1000, fp32, 160e-6),
        (8192, 131_072, bf16, 1.25e-3),
        (128, 10, fp32, 8e-6),
        (16_384, 8192, bf16, None),
        (16_384, 4096, fp32, None),
        (8192, 50_257, bf16, None),  # rows that begin at every alignment
        (64, 131_072, bf16, None),  # several blocks to a row
        (4096, 1000, fp32, None),
    ]
    result = [
        Case("trimmed_cross_entropy", f"{r}x{c} {str(d)[6:]}", "full", lambda r=r, c=c, d=d: cross_entropy(r, c, d), t)
        for r, c, d, t in shapes
    ]
    for rows, target in ((65_536, 12e-6), (16_384, None), (1_000_000, None)):
        result.append(Case("trimmed_mean", str(rows), "forward", lambda n=rows: trimmed_mean(n), target))
    for size, fraction, target in ((1_000_000, 0.2, 60e-6), (1_000_000, 0.002, None), (400, 0.2, None)):
        label = f"{size} at {fraction}"
        result.append(Case("rank_batches", label, "forward", lambda n=size, f=fraction: rank_batches(n, f), target))
    for batch, copies, classes, dtype, target in (
        (1024, 4, 131_072, bf16, 0.75e-3),
        (512, 8, 1000, fp32, 15e-6),
        (128, 4, 10, fp32, None),
    ):
        label = f"{batch}x{classes} M {copies} {str(dtype)[6:]}"
        shape = batch, copies, classes, dtype
        result.append(Case("soft_label_kl", label, "forward", lambda s=shape: divergence(*s, full=False), target))
        result.append(Case("soft_label_kl", label, "full", lambda s=shape: divergence(*s, full=True)))
    for keep, target in ((0.2, 11e-3), (1.0, None), (0.5, None), (0.1, None)):
        label, shape = f"4096x4096x128256 keep {keep:g}", (4096, 4096, 128_256)
        result.append(
            Case(
                "linear_trimmed_cross_entropy",
                label,
                "full",
                lambda s=shape, k=keep: linear_cross_entropy(*s, k),
                target,
            )
        )
    for basis, target in (("normalized", None), ("hadamard", 0.25e-3), ("none", None)):
        label = f"1024x4096 32 copies bf16 {basis}"  # normalized: within 1.25 of the line "matmul"
        result.append(Case("augment_latent", label, "forward", lambda b=basis: augmentation(b), target))
    return sorted(result, key=lambda case: case.target_s is None)  # if time runs out, those with targets are there
