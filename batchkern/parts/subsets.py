"""Nested subsets that grow step by step, with a batch size and a learning rate for each.

S. Prasad, D. Lin, Y. Li, D. Sheng, O. Z. Min, "Rethinking of Deep Models Parameters with Respect to Data Distribution",
ICPR 2020, section III.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from batchkern.errors import UserError
from batchkern.parts.samplers import PlannedBatches
from batchkern.plan import AHEAD, Batch, EpochBatches, count_batches, cut
from batchkern.saved_state import saved_number
from batchkern.seeding import generator
from batchkern.validation import check_number, count

FRACTIONS = (0.2, 0.4, 0.6, 0.8, 1.0)
BATCH_MULTIPLES = (1, 2, 3, 4, 1)


def check_subsets(
    fractions: Sequence[float], batch_multiples: Sequence[int]
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    for name, value in (("fractions", fractions), ("batch_multiples", batch_multiples)):
        if not isinstance(value, Iterable):
            raise UserError(f"{name} must be a tuple, such as (0.5, 1), got {value!r:.60}")
    f = tuple(check_number("fractions", x) for x in fractions)
    m = tuple(count("batch_multiples", x, None) for x in batch_multiples)
    if not f or any(not 0 < x <= 1 for x in f) or any(a >= b for a, b in pairwise(f)):
        raise UserError(f"fractions must increase within (0, 1], got {f}")
    if len(m) != len(f) or min(m) < 1:
        raise UserError(f"batch_multiples must be {len(f)} whole numbers of at least 1, one a fraction, got {m}")
    return f, m


class Subsets:
    """The epochs of a training, divided evenly among the steps, and the batches of each epoch."""

    def __init__(
        self, fractions: tuple[float, ...], batch_multiples: tuple[int, ...], rows: int, batch_size: int, epochs: int
    ) -> None:
        n = len(fractions)
        if epochs < n:
            raise UserError(f"epochs must be at least {n}, one for each step, got {epochs}")
        self.sizes = tuple(round(fraction * rows) for fraction in fractions)
        self.batch_sizes = tuple(multiple * batch_size for multiple in batch_multiples)
        for fraction, size, batch in zip(fractions, self.sizes, self.batch_sizes, strict=True):
            if size < batch:
                raise UserError(
                    f"the subset of {fraction:g} has {size} samples, fewer than one batch of {batch}; "
                    "use a smaller batch size or larger fractions"
                )
        self.bounds = [i * epochs // n for i in range(n + 1)]
        """The first epoch of each step, and the number of epochs."""
        self.epoch = self.place = 0

    def step(self, epoch: int) -> int:
        """The step that an epoch belongs to."""
        return bisect.bisect_right(self.bounds, epoch) - 1

    def plan(self, batches: EpochBatches) -> Iterator[Batch]:
        seed = batches.seed
        shuffled = torch.randperm(batches.rows, generator=generator(seed, "subsets"))

        @lru_cache(maxsize=2)
        def of_epoch(epoch: int) -> tuple[Tensor, ...]:
            step = self.step(epoch)
            subset = shuffled[: self.sizes[step]]
            order = torch.randperm(len(subset), generator=generator(seed, "epoch", epoch))
            return cut(subset[order], self.batch_sizes[step], batches.least, batches.drop_last)

        while self.epoch < batches.epochs:
            index_batches = of_epoch(self.epoch)
            while self.place < len(index_batches):
                progress = (self.epoch + self.place / len(index_batches)) / batches.epochs
                indices = index_batches[self.place]
                self.place += 1
                ends_epoch = self.place == len(index_batches)
                ahead = index_batches[self.place : self.place + AHEAD]
                if ends_epoch and self.epoch + 1 < batches.epochs:
                    ahead = of_epoch(self.epoch + 1)[:1]
                yield Batch(indices, self.epoch, progress, ends_epoch, ahead=ahead)
            self.epoch, self.place = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.place = saved_number(state, "epoch"), saved_number(state, "place")


class Rates:
    """The learning rate of each step, as a factor on lambda for mean gradients: by eq. 9, or as given in ``rates``.

    Args:
        steps: n.
        gamma: within a step the rate is multiplied by this every ``decay_every`` of the step's epochs (the paper's
            0.1 at epoch 10 of 20).
        decay_every: fraction of the step's epochs, in (0, 1].
        gradients: what the rate of eq. 9 multiplies. ``"sum"``: the sum of a batch's gradients, the convention of
            eq. 7; for mean gradients, the rate is then lambda in the first and last step and lambda / (10 n) in
            between. ``"mean"``: eq. 9 read literally for mean gradients, with a further factor of 1 / b. The words
            "lambda = lambda' for next i" below eq. 9 are read as naming the rate, not as compounding it.
        divisor: which batch size the b of eq. 9 is. ``"step"``: that of the step, b_i, as in eq. 10. ``"run"``: that of
            the run in all steps; sums of larger batches are then larger, and the rates of the steps in between are 2, 3
            and 4 times as large by default.
        rates: factors on lambda, one for each step, instead of eq. 9.
    """

    def __init__(
        self,
        steps: int,
        *,
        gamma: float = 0.1,
        decay_every: float = 0.5,
        gradients: Literal["sum", "mean"] = "sum",
        divisor: Literal["step", "run"] = "step",
        rates: Sequence[float] | None = None,
    ) -> None:
        for name, value in (("gamma", gamma), ("decay_every", decay_every)):
            if not 0 < check_number(name, value) <= 1:
                raise UserError(f"{name} must be in (0, 1], got {value}")
        if gradients not in ("sum", "mean"):
            raise UserError(f"gradients must be sum or mean, got {gradients!r}")
        if divisor not in ("step", "run"):
            raise UserError(f"divisor must be step or run, got {divisor!r}")
        for name, choice, default in (("gradients", gradients, "sum"), ("divisor", divisor, "step")):
            if rates is not None and choice != default:
                raise UserError(f"{name} is {choice!r}, but it belongs to eq. 9, which rates replace: leave it out")
        if rates is not None:
            rates = tuple(check_number("rates", x) for x in rates)
            if len(rates) != steps or not all(0 < x < math.inf for x in rates):
                raise UserError(f"rates must be {steps} numbers above 0, one a fraction, got {rates}")
        self.steps, self.gamma, self.decay_every = steps, gamma, decay_every
        self.gradients, self.divisor = gradients, divisor
        self.rates: tuple[float, ...] | None = rates

    def of(self, step: int, epoch_in_step: int, step_epochs: int, batch_size: int, run_batch_size: int) -> float:
        """The factor, including the decay within the step."""
        if self.rates is None:
            factor = 1.0 if step in (0, self.steps - 1) else 1 / (10 * self.steps)
            divisor = batch_size if self.divisor == "step" else run_batch_size
            factor *= (batch_size if self.gradients == "sum" else 1) / divisor
        else:
            factor = self.rates[step]
        # A small tolerance: 0.28 of 25 epochs is 7.000000000000001 in floating point, and epoch 7 must decay.
        decays = int(epoch_in_step / max(1.0, self.decay_every * step_epochs) + 1e-9)
        return factor * self.gamma**decays

    def of_epoch(self, subsets: Subsets, epoch: int, run_batch_size: int) -> float:
        step = subsets.step(epoch)
        first, end = subsets.bounds[step], subsets.bounds[step + 1]
        return self.of(step, epoch - first, end - first, subsets.batch_sizes[step], run_batch_size)


class SubsetSampler(PlannedBatches):
    """Batches of random subsets that grow step by step, each containing the one before it. A pass is an epoch.

    The number of batches differs between epochs, so the sampler and its loader have no ``len()``; :attr:`updates` is
    the number of batches of the whole training.

        sampler = SubsetSampler(len(dataset), 50, epochs=20)
        schedule = StepwiseLR(optimizer, sampler)
        loader = DataLoader(dataset, batch_sampler=sampler)
        for epoch in range(20):
            for x, y in loader:
                ...  # the update
            schedule.step()

    Args:
        rows: number of rows of the data set.
        batch_size: b, the batch size of the baseline.
        epochs: number of epochs of the training, which are divided evenly among the steps.
        fractions: sizes of the subsets, increasing, in (0, 1].
        batch_multiples: batch size of each step, in units of ``batch_size``.
        seed, drop_last, group: as :class:`batchkern.parts.EpochBatchSampler`.

    Raises:
        UserError: an argument is out of its range, or a subset is smaller than its batches.

    Examples:
        >>> from batchkern.parts import SubsetSampler
        >>> sampler = SubsetSampler(rows=10, batch_size=2, epochs=2, fractions=(0.5, 1.0), batch_multiples=(1, 1))
        >>> sampler.updates  # 3 of 5 rows, then 5 of 10
        8
        >>> half, all_rows = (sum(sampler, []) for epoch in range(2))
        >>> len(half), sorted(all_rows)
        (5, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        epochs: int,
        *,
        fractions: Sequence[float] = FRACTIONS,
        batch_multiples: Sequence[int] = BATCH_MULTIPLES,
        seed: int = 0,
        drop_last: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(rows, batch_size, seed=seed, drop_last=drop_last, group=group, epochs=epochs)
        self.subsets = Subsets(*check_subsets(fractions, batch_multiples), rows, batch_size, epochs)

    def batches_of(self, epoch: int) -> int:
        """The number of batches of an epoch; 0 after the last epoch."""
        if epoch >= self.batches.epochs:
            return 0
        step, plan = self.subsets.step(epoch), self.batches
        return count_batches(self.subsets.sizes[step], self.subsets.batch_sizes[step], plan.least, plan.drop_last)

    @property
    def updates(self) -> int:
        """The number of batches of the whole training."""
        return sum(self.batches_of(epoch) for epoch in range(self.batches.epochs))

    def _stream(self) -> Iterator[Batch]:
        return self.subsets.plan(self.batches)

    def _place(self) -> dict[str, Any]:
        return self.subsets.state_dict()

    def _go_to(self, place: dict[str, Any]) -> None:
        self.subsets.load_state_dict(place)

    def _epoch_of(self, place: dict[str, Any]) -> int:
        epoch = int(place["epoch"])
        return epoch + (epoch < self.batches.epochs and place["place"] == self.batches_of(epoch))


class StepwiseLR(LambdaLR):
    """The learning rates of the steps of a :class:`SubsetSampler` (eq. 9), constant within an epoch.

    ``step()`` sets the rate of the sampler's current epoch, so it may be called after each epoch, each batch or each
    update. If a loader reads ahead, wrap it in ``WholeEpochs``: the sampler's epoch is then the epoch of the training.

    Args:
        optimizer: its learning rates are lambda, the rates of the first step.
        sampler: the sampler of the training.
        gamma, decay_every, gradients, divisor, rates: as for :class:`Rates`.

    Raises:
        UserError: an argument is out of its range.

    Examples:
        >>> import torch
        >>> from batchkern.parts import StepwiseLR, SubsetSampler
        >>> optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1)
        >>> sampler = SubsetSampler(10, 2, epochs=2, fractions=(0.5, 1.0), batch_multiples=(1, 1))
        >>> schedule = StepwiseLR(optimizer, sampler, rates=(1.0, 0.5))
        >>> for batch in sampler:
        ...     optimizer.step()
        >>> schedule.step()
        >>> schedule.get_last_lr()
        [0.05]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        sampler: SubsetSampler,
        *,
        gamma: float = 0.1,
        decay_every: float = 0.5,
        gradients: Literal["sum", "mean"] = "sum",
        divisor: Literal["step", "run"] = "step",
        rates: Sequence[float] | None = None,
    ) -> None:
        if not isinstance(sampler, SubsetSampler):
            raise UserError(f"sampler must be a SubsetSampler, got {type(sampler).__name__}")
        rule = Rates(
            len(sampler.subsets.sizes),
            gamma=gamma,
            decay_every=decay_every,
            gradients=gradients,
            divisor=divisor,
            rates=rates,
        )

        def factor(calls: int) -> float:
            epoch = min(sampler.epoch, sampler.batches.epochs - 1)
            return rule.of_epoch(sampler.subsets, epoch, sampler.batches.batch_size)

        super().__init__(optimizer, factor)
