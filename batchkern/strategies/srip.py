"""Spectral restricted isometry property: N. Bansal, X. Chen, Z. Wang, "Can We Gain More from Orthogonality
Regularizations in Training Deep CNNs?", NeurIPS 2018 (arXiv:1810.09102), section 3.4."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from batchkern.errors import UserError
from batchkern.saved_state import saved_number
from batchkern.seeding import generator
from batchkern.strategies.base import Run, Step, Strategy

SCHEDULE = ((0.6, 0.0), (0.35, 1e-6), (0.25, 1e-4), (0.1, 1e-3), (0.0, 1e-1))
"""Pairs of a fraction of the training and lambda from there on: epochs 120, 70, 50, 20 and 0 of the paper's 200."""


def spectral_deviation(weight: Tensor, start: Tensor) -> Tensor:
    """sigma(W^T W - I), 0-dim float32, by two power iterations: with A = W^T W - I, ||A A v|| / ||A v||.

    Args:
        weight: the weight of a convolution or a linear layer, with the M outputs first. W is its transpose as a matrix,
            ``(S H C, M)``.
        start: v, ``(M,)``, not zero.
    """
    transposed = weight.flatten(1).float()

    def times(v: Tensor) -> Tensor:
        return transposed @ (transposed.T @ v) - v

    once = times(start)
    # Orthogonal weights have a deviation of 0, and no gradient.
    return times(once / once.norm().clamp(min=torch.finfo(once.dtype).tiny)).norm()


@dataclass
class SRIP(Strategy):
    """A penalty in the loss of every active update: lambda times the sum over layers of sigma(W^T W - I), the largest
    deviation of a filter bank from an isometry.

    Layers are the convolutions and linear layers of the model; W of a convolution is ``(S H C, M)``, a column for each
    of its M filters, and W^T W is M x M, as in the paper's equation and in the authors' program for ResNets. Their
    program for Wide ResNets uses the smaller one of W^T W and W W^T, and squares sigma. The power iterations start at a
    normal random vector, drawn anew in each update, and the gradient goes through them.

    Args:
        coefficient: a constant lambda, at least 0. By default it follows the paper's schedule: 0.1, then 1e-3, 1e-4,
            1e-6 and 0 from epochs 20, 50, 70 and 120 of 200 on, scaled to any other number of epochs. The authors'
            programs start at 0.01 instead of 0.1, and multiply it by the later values.

    Examples:
        >>> from batchkern.strategies import SRIP
        >>> strategy = SRIP()  # Trainer(..., strategies=[strategy])
        >>> [strategy.factor(epoch / 200) for epoch in (0, 20, 50, 70, 120)]
        [0.1, 0.001, 0.0001, 1e-06, 0.0]
    """

    name: ClassVar[str] = "srip"
    owns = frozenset({"the isometry of weights"})

    coefficient: float | None = None
    added: int = field(default=0, init=False, repr=False)
    """Number of updates of the epoch that had a penalty."""
    sigma_sum: float | Tensor = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coefficient is not None and not 0 <= self.coefficient < math.inf:
            raise UserError(f"coefficient must be a number of at least 0, got {self.coefficient}")

    def setup(self, run: Run) -> None:
        self.added, self.sigma_sum = 0, 0.0
        kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
        self.layers = [module for module in run.model.modules() if isinstance(module, kinds)]
        if not self.layers:
            raise UserError("srip needs a model with convolutions or linear layers; this one has none")

    def factor(self, progress: float) -> float:
        """lambda after the fraction ``progress`` of the training."""
        if self.coefficient is not None:
            return self.coefficient
        return next(value for begin, value in SCHEDULE if progress >= begin)

    def penalty(self, step: Step) -> Tensor | None:
        factor = self.factor(step.batch.progress)
        if factor == 0:
            return None
        weights = [layer.weight for layer in self.layers]
        numbers = generator(step.run.seed, "srip", step.update)
        starts = torch.randn(sum(map(len, weights)), generator=numbers, dtype=torch.float32).to(step.run.device)
        parts = starts.split([len(w) for w in weights])
        with torch.autocast(step.run.device.type, enabled=False):
            total = torch.stack([spectral_deviation(w, v) for w, v in zip(weights, parts, strict=True)]).sum()
        self.added += 1
        self.sigma_sum = self.sigma_sum + total.detach()
        return factor * total

    def diagnostics(self, row: Mapping[str, Any]) -> dict[str, float]:
        """``srip_sigma``: the sum over layers before lambda, averaged over the updates of the epoch that had a
        penalty."""
        mean, added = float(self.sigma_sum) / max(self.added, 1), self.added
        self.added, self.sigma_sum = 0, 0.0
        return {"srip_sigma": mean} if added else {}

    def state_dict(self) -> dict[str, Any]:
        return {"added": self.added, "sigma_sum": float(self.sigma_sum)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.added = saved_number(state, "added")
        self.sigma_sum = float(state["sigma_sum"])
