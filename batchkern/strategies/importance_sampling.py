"""Importance sampling by gradient norms: A. Katharopoulos, F. Fleuret, "Not All Samples Are Created Equal: Deep
Learning with Importance Sampling", ICML 2018 (arXiv:1803.00942), Algorithm 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from batchkern.errors import UserError
from batchkern.plan import Batch, EpochBatches
from batchkern.seeding import generator
from batchkern.strategies.base import Run, Step, Strategy, as_probabilities, weighted_mean
from batchkern.validation import count

SMOOTHING = 0.9
"""a_tau: weight of the earlier value in the moving average of tau, which starts at 0."""


def gradient_norms(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """``(B,)`` float32: the norm of the cross entropy's gradient at each row of the logits, ||softmax - target||_2.

    Args:
        logits: ``(B, C)``.
        target: labels ``(B,)`` int64, or probabilities ``(B, C)``. The norm of a row with a label below 0 is
            meaningless.
    """
    classes = logits.shape[1]
    wanted = as_probabilities(target if target.is_floating_point() else target.clamp(min=0), classes)
    smoothed = (1 - label_smoothing) * wanted + label_smoothing / classes
    return (logits.float().softmax(1) - smoothed).norm(dim=1)


@dataclass
class ImportanceSampling(Strategy):
    """A batch is drawn from a larger one in proportion to a bound on the gradient norms, while this is worth its cost.

    B = ratio * b samples are passed forward and scored by the gradient norm at the logits; b of them are drawn with
    replacement, sample i with probability g_i, proportional to its score, and its loss gets the weight 1 / (B g_i), so
    that the expected gradient is the gradient of all B samples. This is done while a moving average of
    tau = sqrt(B sum g_i^2), which the paper reads as an equivalent increase of the batch size, is above a threshold.
    Otherwise batches are those of the baseline, whose scores cost no extra pass. An epoch has as many updates as for
    the baseline.

    The B samples are drawn uniformly from the training set, with replacement, as in the authors' program. With batch
    norm, the scores come from a pass over all B samples, and the b drawn samples are normalised among themselves.

    Args:
        ratio: B / b, a whole number of at least 2; the authors' program uses 3.
        threshold: tau_th, at least 0; default: (B + 3 b) / (3 b), above which a speed-up is guaranteed if a backward
            pass costs two forward passes. With 0, all updates but the first sample by importance.
        at_random: the control: draw the same number with equal probabilities, while tau is above the threshold.

    Examples:
        >>> import torch
        >>> from batchkern.strategies import ImportanceSampling
        >>> from batchkern.trainer import Trainer
        >>> data = torch.arange(64.0).view(64, 1), torch.arange(64) // 32
        >>> strategy = ImportanceSampling(ratio=3, threshold=0)
        >>> trainer = Trainer("mlp", data, data, strategies=[strategy], epochs=2, batch_size=16)
        >>> trainer.fit()["samples_seen"]  # the first update sees 16, each of the other seven 48
        352
    """

    name: ClassVar[str] = "importance"
    owns = frozenset({"the batch plan", "the loss"})

    ratio: int = 3
    threshold: float | None = None
    at_random: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.ratio = count("ratio", self.ratio, 2)
        if self.threshold is not None and not self.threshold >= 0:
            raise UserError(f"threshold must be a number of at least 0, got {self.threshold}")

    def setup(self, run: Run) -> None:
        run.require_labels(self.name)
        self.tau = 0.0
        self.drawn = torch.zeros(0, dtype=torch.int64)
        """Positions of the drawn rows in the current batch."""

    @property
    def active(self) -> bool:
        return self.tau > ((self.ratio + 3) / 3 if self.threshold is None else self.threshold)

    def plan(self, batches: EpochBatches, upstream: Iterator[Batch]) -> Iterator[Batch]:
        for batch in upstream:
            if self.active:
                rows, numbers = self.ratio * len(batch.indices), generator(batches.seed, "presample", batches.taken)
                indices = torch.randint(batches.rows, (rows,), generator=numbers)
                batch = replace(batch, indices=indices, ahead=())
            yield batch

    def score(self, step: Step, logits: Tensor, target: Tensor, losses: Tensor) -> Tensor:
        return gradient_norms(logits.detach(), target, step.run.label_smoothing)

    def narrow(self, step: Step, score: Callable[[], Tensor]) -> Tensor | None:
        if not self.active:
            return None
        norms = score().double().cpu()
        if self.at_random or not norms.sum() > 0:
            norms = torch.ones_like(norms)
        shares = norms / norms.sum()
        step.kept = len(shares) // self.ratio
        numbers = generator(step.run.seed, "importance", step.update)
        self.drawn = shares.multinomial(step.kept, replacement=True, generator=numbers)
        self.weights = 1 / (len(shares) * shares[self.drawn])
        return self.drawn.to(step.run.device)

    def loss(self, step: Step, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if step.narrowed:
            return weighted_mean(step, logits, target, self.weights)
        return super().loss(step, logits, target)

    def kept(self, step: Step, losses: Tensor) -> Tensor | None:
        return self.drawn.to(losses.device) if step.narrowed else None

    def observe(self, step: Step, losses: Tensor) -> None:
        assert step.scores is not None
        norms = step.scores.double()
        mean = float(norms.mean())
        tau = float(norms.square().mean().sqrt()) / mean if mean > 0 else 1.0
        self.tau = SMOOTHING * self.tau + (1 - SMOOTHING) * tau

    def diagnostics(self, row: Mapping[str, Any]) -> dict[str, float]:
        """``tau``: the moving average of tau at the end of the epoch."""
        return {"tau": self.tau}

    def state_dict(self) -> dict[str, Any]:
        return {"tau": self.tau}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tau = float(state["tau"])
