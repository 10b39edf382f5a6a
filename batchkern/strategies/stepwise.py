"""Step-wise progressive training: S. Prasad, D. Lin, Y. Li, D. Sheng, O. Z. Min, "Rethinking of Deep Models Parameters
with Respect to Data Distribution", ICPR 2020, section III."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from batchkern.parts.subsets import BATCH_MULTIPLES, FRACTIONS, Rates, Subsets, check_subsets
from batchkern.plan import Batch, EpochBatches
from batchkern.strategies.base import Run, Strategy


@dataclass
class Stepwise(Strategy):
    """Training on nested random subsets that grow step by step, with a batch size and a learning rate for each.

    The epochs are divided evenly among the n steps, and weights are carried over, so the training costs the mean of
    its fractions times the baseline's samples (0.6 of them by default).

    Args:
        fractions: sizes of the subsets, increasing, in (0, 1]; each subset contains the one before it.
        batch_multiples: batch size of each step, in units of the run's batch size.
        gamma, decay_every, gradients, divisor, rates: the learning rate of each step; see
            :class:`batchkern.parts.subsets.Rates`.
        reset_optimizer: clear the optimizer's state (momentum) at the start of each step.
        share_weights: carry the weights over from step to step. If False, each step starts from the initial weights
            (Tables I and IV); heads that other strategies train beside the model are kept.

    Examples:
        >>> import torch
        >>> from batchkern.strategies import Stepwise
        >>> from batchkern.trainer import Trainer
        >>> data = torch.arange(64.0).view(64, 1), torch.arange(64) // 32
        >>> strategy = Stepwise(fractions=(0.25, 0.5, 1.0), batch_multiples=(1, 2, 1))
        >>> trainer = Trainer("mlp", data, data, strategies=[strategy], epochs=3, batch_size=8)
        >>> trainer.fit()["samples_seen"]  # 16 + 32 + 64
        112
    """

    name: ClassVar[str] = "stepwise"
    owns = frozenset({"the batch plan", "the learning rate"})
    divides_epochs = True

    fractions: tuple[float, ...] = FRACTIONS
    batch_multiples: tuple[int, ...] = BATCH_MULTIPLES
    gamma: float = 0.1
    decay_every: float = 0.5
    gradients: Literal["sum", "mean"] = "sum"
    divisor: Literal["step", "run"] = "step"
    rates: tuple[float, ...] | None = None
    reset_optimizer: bool = False
    share_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.fractions, self.batch_multiples = check_subsets(self.fractions, self.batch_multiples)
        names = ("gamma", "decay_every", "gradients", "divisor", "rates")
        self.rule = Rates(len(self.fractions), **{name: getattr(self, name) for name in names})
        self.rates = self.rule.rates

    def setup(self, run: Run) -> None:
        self.run_batch_size = run.batch_size
        self.subsets = Subsets(self.fractions, self.batch_multiples, run.rows, run.batch_size, run.epochs)
        self.initial = None if self.share_weights else {k: v.clone() for k, v in run.model.state_dict().items()}

    def diagnostics(self, row: Mapping[str, Any]) -> dict[str, float]:
        """The noise scale of eq. 10, rate * M_i / b_i, of the step of this epoch, with the rate at the end of the
        epoch."""
        step = self.subsets.step(row["epoch"])
        return {"noise_scale": row["lr"] * self.subsets.sizes[step] / self.subsets.batch_sizes[step]}

    def plan(self, batches: EpochBatches, upstream: Iterator[Batch]) -> Iterator[Batch]:
        for batch in self.subsets.plan(batches):
            begins = batch.epoch in self.subsets.bounds[1:] and self.subsets.place == 1
            yield replace(
                batch,
                rate=self.rule.of_epoch(self.subsets, batch.epoch, self.run_batch_size),
                reset_optimizer=begins and (self.reset_optimizer or not self.share_weights),
                weights=self.initial if begins else None,
            )

    def state_dict(self) -> dict[str, Any]:
        return {**self.subsets.state_dict(), "initial": self.initial}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.subsets.load_state_dict(state)
        own, saved = self.initial or {}, state["initial"] or {}
        if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in saved.items()}:
            raise ValueError("the initial weights are not those of this model")
        self.initial = state["initial"]
