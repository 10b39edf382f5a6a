"""Mini-batch trimming: H. Fassold, "Some like it tough: Improving model generalization via progressively increasing
the training difficulty", 2021 (arXiv:2110.13058), section 2."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from batchkern.errors import UserError
from batchkern.models import has_batch_norm
from batchkern.ops import rank_batches, trimmed_cross_entropy
from batchkern.schedules import EpochSchedule, linear
from batchkern.strategies.base import Run, Step, Strategy


def kept_rows(keep: float, rows: int) -> int:
    """k of the operations, for a batch without ignored rows."""
    return min(rows, max(round(keep * rows), 1))


def check_keep(start: float, end: float) -> None:
    for name, value in (("start", start), ("end", end)):
        if not 0 < value <= 1:
            raise UserError(f"{name} must be in (0, 1], got {value}")


@dataclass
class Trimming(Strategy):
    """The loss is the mean over the hardest fraction of each batch, and that fraction falls from epoch to epoch.

    Args:
        start, end: fraction kept in the first and the last epoch, in (0, 1]; linear in between. A training of one epoch
            keeps ``start`` (the official code divides by zero there).
        backward: ``"masked"``: one forward and one backward pass over the whole batch, with zero gradients at dropped
            rows. ``"compact"``: a forward pass for the losses alone, then forward and backward of the kept rows:
            the run-time gain that the paper has in mind. The same gradient for a network without batch norm; with
            batch norm, the kept rows are normalised among themselves. ``"auto"``: compact in the epochs where it is
            the cheaper one, as timed once before the training; always masked with batch norm.
        schedule: replaces the line: ``f(epoch, epochs)`` -> fraction.
    """

    name: ClassVar[str] = "trimming"
    owns = frozenset({"the loss"})

    start: float = 1.0
    end: float = 0.2
    backward: Literal["masked", "compact", "auto"] = "masked"
    schedule: EpochSchedule | None = None
    compact_below: float = field(default=0.0, init=False, repr=False)
    """Fractions under this are trained compact."""

    def __post_init__(self) -> None:
        check_keep(self.start, self.end)
        if self.backward not in ("masked", "compact", "auto"):
            raise UserError(f"backward must be masked, compact or auto, got {self.backward!r}")
        if self.schedule is not None and not callable(self.schedule):
            raise UserError(f"schedule must be a function of (epoch, epochs), got {self.schedule!r}")

    def setup(self, run: Run) -> None:
        self.compact_below = 0.0
        for epoch in range(run.epochs):
            self.keep(epoch, run.epochs)  # a schedule that leaves its range should say so before the training
        normalised = has_batch_norm(run.model)
        if self.backward == "compact":
            self.compact_below = 1.0
            if normalised:
                warnings.warn(
                    "Trimming(backward='compact') on a model with batch norm: kept rows get statistics of their own",
                    stacklevel=2,
                )
        elif self.backward == "auto" and not normalised:
            self.compact_below = run.ranks.first(lambda: _break_even(run))

    def keep(self, epoch: int, epochs: int) -> float:
        value = (self.schedule or linear(self.start, self.end))(epoch, epochs)
        if not 0 < value <= 1:
            raise UserError(f"Trimming's schedule must give a fraction in (0, 1], got {value} in epoch {epoch}")
        return value

    def narrow(self, step: Step, score: Callable[[], Tensor]) -> Tensor | None:
        keep, rows = self.keep(step.batch.epoch, step.run.epochs), len(step.batch.indices)
        step.kept = kept_rows(keep, rows)
        if step.kept == rows or keep >= self.compact_below:
            return None
        # In index order, as the rows stand in the batch: the order of summation is then that of the masked pass.
        return rank_batches(score(), 1.0)[: step.kept].sort().values

    def loss(self, step: Step, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        keep = 1.0 if step.narrowed else self.keep(step.batch.epoch, step.run.epochs)
        smoothing, group = step.run.label_smoothing, step.run.ranks.group
        return trimmed_cross_entropy(logits, target, keep, label_smoothing=smoothing, per_sample=True, group=group)

    def kept(self, step: Step, losses: Tensor) -> Tensor | None:
        return None if step.kept in (None, len(losses)) else rank_batches(losses, 1.0)[: step.kept]

    def state_dict(self) -> dict[str, Any]:
        return {"compact_below": self.compact_below}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.compact_below = state["compact_below"]


def _break_even(run: Run) -> float:
    """The fraction below which a loss-only pass plus a full pass of the kept rows beats one full pass of all rows."""
    forward_times, full_times = [], []
    with torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):
        images = torch.randn(run.ranks.share(run.batch_size).each, *run.shape, device=run.device)
        for _ in range(5):
            with torch.no_grad():
                forward_times.append(_seconds(lambda: run.model(images), run.device))
            full_times.append(_seconds(lambda: run.model(images).sum().backward(), run.device))
    run.model.zero_grad(set_to_none=True)
    # The first round warms up. The minimum is the least disturbed by whatever else the machine does.
    return max(0.0, 1 - min(forward_times[1:]) / min(full_times[1:]))


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
