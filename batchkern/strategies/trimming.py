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
from batchkern.ops import select_rows, trimmed_cross_entropy
from batchkern.ops.trimmed_mean import Order
from batchkern.schedules import EpochSchedule, linear
from batchkern.strategies.base import Run, Step, Strategy, selected_mean

PLAIN = {"order": "highest", "skip": 0.0, "above": None}
"""The selection that ``trimmed_cross_entropy`` can make itself."""


def kept_rows(keep: float, rows: int) -> int:
    """The number of rows, k, that the operations keep of a batch without ignored rows."""
    return min(rows, max(round(keep * rows), 1))


def positions(chosen: Tensor, k: int | None) -> Tensor:
    """Positions of the k rows marked in ``chosen (B,)`` bool, in index order, without a synchronisation with the
    GPU."""
    return chosen.byte().argsort(descending=True, stable=True)[:k]


def check_keep(start: float, end: float) -> None:
    for name, value in (("start", start), ("end", end)):
        if not 0 < value <= 1:
            raise UserError(f"{name} must be in (0, 1], got {value}")


@dataclass
class Trimming(Strategy):
    """The loss is the mean over the hardest fraction of each batch, and that fraction falls from epoch to epoch.

    Args:
        start, end: fraction kept in the first and the last epoch, in (0, 1]; linear in between. A training of one epoch
            keeps ``start`` (the official code divides by zero in this case).
        backward: ``"masked"``: one forward and one backward pass over the whole batch, with zero gradients at dropped
            rows. ``"compact"``: a forward pass for the losses alone, then a forward and backward pass of the kept
            rows; this is the speed-up that the paper intends. The gradient is the same for a network without batch
            norm; with batch norm, the kept rows are normalised among themselves. ``"auto"``: compact in the epochs in
            which it is cheaper, as timed once before the training; always masked with batch norm.
        schedule: replaces the linear schedule: ``f(epoch, epochs)`` -> fraction.
        order: ``"lowest"`` keeps the easiest fraction instead: small-loss selection, against wrong labels.
        skip: first leaves out this fraction at the top of the order: the hardest rows, which often have wrong labels.
            ``skip`` and the fraction kept must add up to at most 1.
        above: also keeps every row with a loss above this value; the fraction is then the minimum that is kept.

    Examples:
        >>> from batchkern.strategies import Trimming
        >>> strategy = Trimming(end=0.2)  # Trainer(..., strategies=[strategy])
        >>> [round(strategy.keep(epoch, epochs=5), 2) for epoch in range(5)]
        [1.0, 0.8, 0.6, 0.4, 0.2]
    """

    name: ClassVar[str] = "trimming"
    owns = frozenset({"the loss"})

    start: float = 1.0
    end: float = 0.2
    backward: Literal["masked", "compact", "auto"] = "masked"
    schedule: EpochSchedule | None = None
    order: Order = "highest"
    skip: float = 0.0
    above: float | None = None
    compact_below: float = field(default=0.0, init=False, repr=False)
    """Fractions below this value use the compact backward pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.start, self.end)
        if self.backward not in ("masked", "compact", "auto"):
            raise UserError(f"backward must be masked, compact or auto, got {self.backward!r}")
        if self.order not in ("highest", "lowest"):
            raise UserError(f"order must be highest or lowest, got {self.order!r}")
        if not 0 <= self.skip < 1:
            raise UserError(f"skip must be in [0, 1), got {self.skip}")
        if self.above is not None and self.order == "lowest":
            raise UserError("above must be left out if order is lowest: it adds rows with high losses")
        if self.schedule is not None and not callable(self.schedule):
            raise UserError(f"schedule must be a function of (epoch, epochs), got {self.schedule!r}")

    def setup(self, run: Run) -> None:
        self.compact_below = 0.0
        for epoch in range(run.epochs):
            self.keep(epoch, run.epochs)  # rejects a schedule that leaves its range before the training
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
        if self.skip + value > 1 + 1e-12:
            raise UserError(
                f"skip and the fraction kept must be at most 1 together, got {self.skip} + {value} in epoch {epoch}"
                + ("" if self.schedule else f": start at {1 - self.skip:g} or less")
            )
        return value

    def narrow(self, step: Step, score: Callable[[], Tensor]) -> Tensor | None:
        keep, rows = self.keep(step.batch.epoch, step.run.epochs), len(step.batch.indices)
        step.kept = kept_rows(keep, rows)
        if step.kept == rows or keep >= self.compact_below:
            return None
        return self._chosen(step, score())

    def loss(self, step: Step, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if step.narrowed:
            return super().loss(step, logits, target)
        keep = self.keep(step.batch.epoch, step.run.epochs)
        one_each = target.dim() == 1 or (target.is_floating_point() and step.share.world == 1)
        if self._band == PLAIN and one_each:
            smoothing, group = step.run.label_smoothing, step.run.ranks.group
            return trimmed_cross_entropy(logits, target, keep, label_smoothing=smoothing, per_sample=True, group=group)
        return selected_mean(step, logits, target, keep, **self._band)

    def kept(self, step: Step, losses: Tensor) -> Tensor | None:
        return None if step.kept in (None, len(losses)) else self._chosen(step, losses)

    @property
    def _band(self) -> dict[str, Any]:
        return {"order": self.order, "skip": self.skip, "above": self.above}

    def _chosen(self, step: Step, losses: Tensor) -> Tensor:
        """Positions of the kept rows, in the order of the batch, so that sums have the same order as in the masked
        pass. Their number is known without a synchronisation with the GPU, unless ``above`` adds some."""
        chosen = select_rows(losses, self.keep(step.batch.epoch, step.run.epochs), **self._band)
        if self.above is not None:
            step.kept = int(chosen.sum())
        return positions(chosen, step.kept)

    def state_dict(self) -> dict[str, Any]:
        return {"compact_below": self.compact_below}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.compact_below = float(state["compact_below"])


def _break_even(run: Run) -> float:
    """The fraction below which a loss-only pass plus a full pass of the kept rows beats one full pass of all rows."""
    forward_times, full_times = [], []
    with torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):
        images = run.example(run.ranks.share(run.batch_size).each)
        for _ in range(5):
            with torch.no_grad():
                forward_times.append(_seconds(lambda: run.model(images), run.device))
            full_times.append(_seconds(lambda: run.model(images).sum().backward(), run.device))
    run.model.zero_grad(set_to_none=True)
    # The first round is a warm-up. The minimum is the time least disturbed by other load on the machine.
    return max(0.0, 1 - min(forward_times[1:]) / min(full_times[1:]))


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
