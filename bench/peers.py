"""The peers of each operation: adapters that make other libraries compute the same as ours, or name what they leave
out. tests/test_bench_peers.py checks each of them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.registry import Forward, Variant


@dataclass(frozen=True)
class Peer:
    make: Callable[..., Forward]
    """Makes the step from the fixed arguments of a problem, given as keywords."""
    needs: str = ""
    """The module that must be installed."""
    gpu: bool = False
    """Whether it runs only on a GPU."""
    trims: bool = True
    """Whether it can compute the loss of only a part of the rows."""


def kept(rows: int, keep: float) -> int:
    return max(round(keep * rows), 1)


def trimmed(losses: Tensor, keep: float) -> Tensor:
    return losses.mean() if keep == 1 else losses.topk(kept(len(losses), keep), sorted=False).values.mean()


def reduction(keep: float) -> str:
    """The reduction that a peer is called with: its own mean is the fastest way that it has."""
    return "mean" if keep == 1 else "none"


def reduced(losses: Tensor, keep: float) -> Tensor:
    """The loss, from a peer's result for ``reduction(keep)``."""
    return losses if keep == 1 else trimmed(losses, keep)


# --- trimmed cross entropy --------------------------------------------------------------------------------------------


def eager_cross_entropy(target: Tensor, keep: float) -> Forward:
    # With bf16 logits the losses would be bf16 too and have many ties, so that other rows would be kept.
    return lambda x: trimmed(F.cross_entropy(x.float(), target, reduction="none").flatten(), keep)


def flattened_cross_entropy(target: Tensor, keep: float) -> Forward:
    """The usual code for pixels."""
    labels = target.flatten()
    return lambda x: trimmed(
        F.cross_entropy(x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).float(), labels, reduction="none"), keep
    )


def liger_cross_entropy(target: Tensor, keep: float) -> Forward:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    loss = LigerCrossEntropyLoss(reduction=reduction(keep))
    return lambda x: reduced(loss(x, target), keep)


def quack_cross_entropy(target: Tensor, keep: float) -> Forward:
    from quack.cross_entropy import cross_entropy

    return lambda x: reduced(cross_entropy(x, target, reduction=reduction(keep)), keep)


# --- with the last linear layer ---------------------------------------------------------------------------------------


def eager_linear(target: Tensor, keep: float) -> Forward:
    return lambda h, w: trimmed(F.cross_entropy(F.linear(h, w).float(), target, reduction="none"), keep)


def torch_linear(target: Tensor, keep: float) -> Forward:
    """In its own chunks at keep = 1. These have no losses of single rows: with keep below 1 it holds all logits in
    memory."""
    options = torch.nn.LinearCrossEntropyOptions() if keep == 1 else None
    return lambda h, w: reduced(
        F.linear_cross_entropy(h, w, target, reduction=reduction(keep), options=options).float(), keep
    )


def liger_linear(target: Tensor, keep: float) -> Forward:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction=reduction(keep))
    return lambda h, w: reduced(loss(w, h, target), keep)


def cut_linear(target: Tensor, keep: float) -> Forward:
    from cut_cross_entropy import linear_cross_entropy

    return lambda h, w: reduced(linear_cross_entropy(h, w, target, reduction=reduction(keep)), keep)


def quack_linear(target: Tensor, keep: float) -> Forward:
    """It has only a mean and a sum, so that it includes every row, whatever ``keep`` is."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda h, w: chunked_linear_cross_entropy(h, w, target)


# --- the others -------------------------------------------------------------------------------------------------------


def eager_mean(keep: float) -> Forward:
    return lambda x: trimmed(x, keep)


def eager_rank(count: int) -> Forward:
    return lambda x: x.topk(count).indices


def sorted_rank(count: int) -> Forward:
    """Ties are in the order of their indices, as in ours."""
    return lambda x: x.sort(descending=True, stable=True).indices[:count]


def eager_kl(copies: int) -> Forward:
    def step(q: Tensor, p: Tensor) -> Tensor:
        log_p, log_q = F.log_softmax(p.float(), dim=1), F.log_softmax(q.float(), dim=1)
        divergences = F.kl_div(log_q.unflatten(0, (copies, len(p))), log_p, log_target=True, reduction="none")
        return divergences.sum() / len(q)

    return step


def liger_kl(copies: int) -> Forward:
    from liger_kernel.transformers import LigerKLDIVLoss

    loss = LigerKLDIVLoss(reduction="batchmean", log_target=True)
    return lambda q, p: loss(F.log_softmax(q.float(), dim=1), F.log_softmax(p.float(), dim=1).repeat(copies, 1))


def eager_augment(
    gaussian: int, dropout: int, sigma: float, tau: float, drop_prob: float, dense: Tensor | None
) -> Forward:
    """Draws its own random numbers. The product with a dense basis is computed in the type of x."""

    def step(x: Tensor) -> Tensor:
        noise = (sigma * torch.randn(gaussian * len(x), x.shape[1], device=x.device, dtype=x.dtype)).clamp(-tau, tau)
        if dense is not None:
            noise = noise @ dense.T
        parts = [x, (x + noise.unflatten(0, (gaussian, len(x)))).flatten(0, 1)]
        if dropout:
            mask = torch.empty(dropout, *x.shape, device=x.device, dtype=x.dtype).bernoulli_(1 - drop_prob)
            parts.append((x * mask).flatten(0, 1))
        return torch.cat(parts)

    return step


OF_ROWS = ("liger", "quack")
"""Cross entropies that take only logits (B, C) and class indices."""

PEERS: dict[str, dict[str, Peer]] = {
    "trimmed_cross_entropy": {
        "eager": Peer(eager_cross_entropy),
        "liger": Peer(liger_cross_entropy, "liger_kernel", gpu=True),
        "quack": Peer(quack_cross_entropy, "quack", gpu=True),
    },
    "linear_trimmed_cross_entropy": {
        "eager": Peer(eager_linear),
        "F.linear_cross_entropy": Peer(torch_linear, "torch.nn.functional.linear_cross_entropy"),
        "liger": Peer(liger_linear, "liger_kernel", gpu=True),
        "cut": Peer(cut_linear, "cut_cross_entropy", gpu=True),
        "quack": Peer(quack_linear, "quack", gpu=True, trims=False),
    },
    "soft_label_kl": {"eager": Peer(eager_kl), "liger": Peer(liger_kl, "liger_kernel", gpu=True)},
    "augment_latent": {"eager": Peer(eager_augment)},
    "trimmed_mean": {"eager": Peer(eager_mean)},
    "rank_batches": {"eager": Peer(eager_rank), "sort": Peer(sorted_rank)},
}


def missing(peer: Peer, device: str) -> str:
    """Why it cannot run here; empty if it can."""
    if peer.gpu and device != "cuda":
        return "runs on a GPU alone"
    if peer.needs.startswith("torch."):
        return "" if hasattr(F, peer.needs.rpartition(".")[2]) else f"torch {torch.__version__} does not have it"
    return "" if not peer.needs or importlib.util.find_spec(peer.needs) else f"{peer.needs} is not installed"


def versions() -> dict[str, str]:
    """The versions of the libraries that peers come from, by module."""
    distributions = {"liger_kernel": "liger-kernel", "quack": "quack-kernels", "cut_cross_entropy": "cut-cross-entropy"}
    found = {module: name for module, name in distributions.items() if importlib.util.find_spec(module)}
    return {module: importlib.metadata.version(name) for module, name in found.items()}


def variants(op: str, device: torch.device, keep: float | None = None, **fixed: Any) -> dict[str, Variant]:
    """The peers that run here, and the eager one also compiled."""
    parameters = fixed if keep is None else {**fixed, "keep": keep}
    found = {}
    for name, peer in PEERS[op].items():
        if missing(peer, device.type):
            continue
        less = "" if peer.trims or keep == 1 else "counts every row"
        found[name] = Variant(peer.make(**parameters), less, captured=not peer.gpu)
        if name == "eager":
            found["compile"] = Variant(torch.compile(found[name].step, fullgraph=True, dynamic=False))
    return found
