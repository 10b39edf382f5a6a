"""Step-wise progressive training: S. Prasad, D. Lin, Y. Li, D. Sheng, O. Z. Min, "Rethinking of Deep Models Parameters
with Respect to Data Distribution", ICPR 2020, section III."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from batchkern.configure import check_number, count
from batchkern.errors import UserError
from batchkern.plan import Batch, EpochBatches, cut, saved_number
from batchkern.seeding import generator
from batchkern.strategies.base import Run, Strategy


@dataclass
class Stepwise(Strategy):
    """Training on nested random subsets that grow step by step, with a batch size and a learning rate for each.

    The epochs are divided evenly among the n steps, and weights are carried over, so the training costs the mean of
    its fractions times the baseline's samples (0.6 of them by default).

    Args:
        fractions: sizes of the subsets, increasing, in (0, 1]; each subset contains the one before it.
        batch_multiples: batch size of each step, in units of the run's batch size.
        gamma: within a step the rate is multiplied by this every ``decay_every`` of the step's epochs (the paper's
            0.1 at epoch 10 of 20).
        decay_every: in (0, 1].
        gradients: what the rate of eq. 9 multiplies. ``"sum"``: the sum of a batch's gradients, the convention of
            eq. 7; on mean gradients that is lambda in the first and last step and lambda / (10 n) in between.
            ``"mean"``: eq. 9 read literally on mean gradients, a further factor of 1 / b. The words "lambda = lambda'
            for next i" below eq. 9 are read as naming the rate, not as compounding it.
        divisor: whose batch size the b of eq. 9 is. ``"step"``: the step's, b_i, as in eq. 10. ``"run"``: the run's, in
            all steps; sums of larger batches are then larger, and the rates in between 2, 3 and 4 times those above.
        rates: the rates themselves, one a step, as factors on lambda, for mean gradients; in place of eq. 9. Ones keep
            lambda constant (Table VII).
        reset_optimizer: forget the optimizer's state (momentum) at the start of each step.
        share_weights: carry weights over. Without, each step starts from the initial weights (Tables I and IV); heads
            that other strategies train beside the model go on.
    """

    name: ClassVar[str] = "stepwise"
    owns = frozenset({"the batch plan"})

    fractions: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0)
    batch_multiples: tuple[int, ...] = (1, 2, 3, 4, 1)
    gamma: float = 0.1
    decay_every: float = 0.5
    gradients: Literal["sum", "mean"] = "sum"
    divisor: Literal["step", "run"] = "step"
    rates: tuple[float, ...] | None = None
    reset_optimizer: bool = False
    share_weights: bool = True
    epoch: int = field(default=0, init=False, repr=False)
    place: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        f = tuple(check_number("fractions", x) for x in self.fractions)
        m = tuple(count("batch_multiples", x, None) for x in self.batch_multiples)
        self.fractions, self.batch_multiples = f, m
        if not f or any(not 0 < x <= 1 for x in f) or any(a >= b for a, b in pairwise(f)):
            raise UserError(f"fractions must increase within (0, 1], got {f}")
        if len(m) != len(f) or min(m) < 1:
            raise UserError(f"batch_multiples must be {len(f)} whole numbers of at least 1, one a fraction, got {m}")
        for name, value in (("gamma", self.gamma), ("decay_every", self.decay_every)):
            if not 0 < value <= 1:
                raise UserError(f"{name} must be in (0, 1], got {value}")
        if self.gradients not in ("sum", "mean"):
            raise UserError(f"gradients must be sum or mean, got {self.gradients!r}")
        if self.divisor not in ("step", "run"):
            raise UserError(f"divisor must be step or run, got {self.divisor!r}")
        for name, default in (("gradients", "sum"), ("divisor", "step")):
            if self.rates is not None and getattr(self, name) != default:
                value = getattr(self, name)
                raise UserError(f"{name} is {value!r}, but rates take the place of eq. 9, which it is of: leave it out")
        if self.rates is not None:
            self.rates = tuple(check_number("rates", x) for x in self.rates)
            if len(self.rates) != len(f) or not all(0 < x < math.inf for x in self.rates):
                raise UserError(f"rates must be {len(f)} numbers above 0, one a fraction, got {self.rates}")

    def setup(self, run: Run) -> None:
        self.epoch = self.place = 0
        self.rows, self.run_batch_size, n = run.rows, run.batch_size, len(self.fractions)
        self.bounds = [i * run.epochs // n for i in range(n + 1)]
        """The epoch in which each step begins, and the end."""
        if run.epochs < len(self.fractions):
            raise UserError(f"epochs must be at least {len(self.fractions)}, one a step of Stepwise, got {run.epochs}")
        self.initial = None if self.share_weights else {k: v.clone() for k, v in run.model.state_dict().items()}
        for fraction, multiple in zip(self.fractions, self.batch_multiples, strict=True):
            rows, batch = round(fraction * run.rows), multiple * run.batch_size
            if rows < batch:
                raise UserError(
                    f"Stepwise's subset of {fraction:g} has {rows} samples, fewer than one batch of {batch}; "
                    "use a smaller batch size or larger fractions"
                )

    def rate(self, step: int, epoch_in_step: int, step_epochs: int, batch_size: int) -> float:
        """Eq. 9, or that of ``rates``, as a factor on lambda for mean gradients, with the decay within the step."""
        n = len(self.fractions)
        if self.rates is None:
            factor = 1.0 if step in (0, n - 1) else 1 / (10 * n)
            divisor = batch_size if self.divisor == "step" else self.run_batch_size
            factor *= (batch_size if self.gradients == "sum" else 1) / divisor
        else:
            factor = self.rates[step]
        # A hair more, because 0.28 of 25 epochs is 7.000000000000001 in floating point: epoch 7 decays all the same.
        decays = int(epoch_in_step / max(1.0, self.decay_every * step_epochs) + 1e-9)
        return factor * self.gamma**decays

    def diagnostics(self, row: Mapping[str, Any]) -> dict[str, float]:
        """Eq. 10's noise scale, rate * M_i / b_i, of the step that the epoch belongs to, at the rate of its end."""
        step = self._step(row["epoch"])
        batch_size = self.batch_multiples[step] * self.run_batch_size
        return {"noise_scale": row["lr"] * round(self.fractions[step] * self.rows) / batch_size}

    def _step(self, epoch: int) -> int:
        """Which step an epoch belongs to."""
        return bisect.bisect_right(self.bounds, epoch) - 1

    def plan(self, batches: EpochBatches, upstream: Iterator[Batch]) -> Iterator[Batch]:
        seed = batches.seed
        shuffled = torch.randperm(batches.rows, generator=generator(seed, "subsets"))

        @lru_cache(maxsize=2)
        def of_epoch(epoch: int) -> tuple[Tensor, ...]:
            step = self._step(epoch)
            subset = shuffled[: round(self.fractions[step] * batches.rows)]
            order = torch.randperm(len(subset), generator=generator(seed, "epoch", epoch))
            size = self.batch_multiples[step] * batches.batch_size
            return cut(subset[order], size, batches.least, batches.drop_last)

        while self.epoch < batches.epochs:
            step, index_batches = self._step(self.epoch), of_epoch(self.epoch)
            first, length = self.bounds[step], self.bounds[step + 1] - self.bounds[step]
            rate = self.rate(step, self.epoch - first, length, self.batch_multiples[step] * batches.batch_size)
            while self.place < len(index_batches):
                progress = (self.epoch + self.place / len(index_batches)) / batches.epochs
                begins = step > 0 and self.epoch == first and self.place == 0
                reset = begins and (self.reset_optimizer or not self.share_weights)
                weights = self.initial if begins else None
                indices = index_batches[self.place]
                self.place += 1
                ends_epoch = self.place == len(index_batches)
                ahead = None if ends_epoch else index_batches[self.place]
                if ends_epoch and self.epoch + 1 < batches.epochs:
                    ahead = of_epoch(self.epoch + 1)[0]
                yield Batch(
                    indices, self.epoch, progress, ends_epoch, rate, reset_optimizer=reset, weights=weights, ahead=ahead
                )
            self.epoch, self.place = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "place": self.place, "initial": self.initial}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.place = saved_number(state, "epoch"), saved_number(state, "place")
        own, saved = self.initial or {}, state["initial"] or {}
        if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in saved.items()}:
            raise ValueError("the initial weights are not those of this model")
        self.initial = state["initial"]
