"""Reducible holdout loss selection: S. Mindermann, J. Brauner, M. Razzak, M. Sharma, A. Kirsch, W. Xu, B. Höltgen,
A. N. Gomez, A. Morisot, S. Farquhar, Y. Gal, "Prioritized Training on Points that are Learnable, Worth Learning, and
Not Yet Learnt", ICML 2022 (arXiv:2206.07137), Algorithm 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from batchkern import models
from batchkern.errors import UserError
from batchkern.model_checks import check_model
from batchkern.ops import select_rows
from batchkern.plan import Batch, EpochBatches, Passes, cut
from batchkern.saved_state import saved_tensor
from batchkern.seeding import derived_seed, generator
from batchkern.strategies.base import Beside, Run, Step, Strategy
from batchkern.strategies.mixup import MIXING
from batchkern.strategies.random_selection import random_rows
from batchkern.strategies.trimming import kept_rows, positions
from batchkern.validation import check_kind, count


@dataclass
class RHO(Strategy):
    """From each large batch, only the samples whose loss is furthest above their irreducible loss are trained on.

    An update takes the next batch_size / fraction samples, passes them forward, and trains on the ``fraction`` of
    them with the highest loss minus irreducible loss. An epoch passes each sample forward once, and so has 1 / fraction
    times fewer updates than the baseline.

    The irreducible loss of a sample is its loss under a reference model that was not trained on it. Two reference
    models are trained before the first update, each on one half of the training set, with the optimizer, batch size,
    schedule and augmentation of this training. After each of its epochs, each scores the other half without
    augmentation, and the scores of the epoch with the lowest mean are kept; this is the paper's method when there are
    no holdout data. The halves come from a random permutation. All passes of the two models are included in the counts
    of samples forward and backward.

    Args:
        fraction: fraction of the samples that is trained on, in (0, 1].
        reference: name of the reference models for :func:`batchkern.models.build`, such as ``"cnn"``; default: the
            network itself, with other random weights; if the model is a module, a copy with its initial weights.
        reference_epochs: number of epochs of each reference model on its half.
        at_random: the control: after the same passes, train on the same number of samples, chosen at random.

    Examples:
        >>> import torch
        >>> from batchkern.strategies import RHO
        >>> from batchkern.trainer import Trainer
        >>> data = torch.arange(64.0).view(64, 1), torch.arange(64) // 32
        >>> strategy = RHO(fraction=0.25, reference_epochs=1)
        >>> trainer = Trainer("mlp", data, data, strategies=[strategy], epochs=2, batch_size=16)
        >>> trainer.fit()["updates"]  # each of two epochs passes 64 samples forward and trains on 16
        2
    """

    name: ClassVar[str] = "rho"
    owns = frozenset({"the batch plan", "the loss"}) | MIXING

    fraction: float = 0.1
    reference: str | None = None
    reference_epochs: int = 10
    at_random: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.fraction <= 1:
            raise UserError(f"fraction must be in (0, 1], got {self.fraction}")
        check_kind("reference", self.reference, str | None, "the name of a model, such as cnn")
        self.reference_epochs = count("reference_epochs", self.reference_epochs, 1)

    def setup(self, run: Run) -> None:
        self.run = run
        self.rows = round(run.batch_size / self.fraction)
        if run.rows < max(self.rows, 2):
            raise UserError(
                f"rho chooses among batch_size / fraction = {self.rows} samples, and the training set has {run.rows}; "
                "use a smaller batch size or a larger fraction"
            )
        if self.reference is not None:
            run.require(f"rho(reference={self.reference})")
            check_model(self._network(0).to(run.device), run.example(2), run.classes, ())
        self.irreducible = torch.zeros(run.rows, dtype=torch.float32, device=run.device)
        self.passes = Passes()

    # --- the reference models ------------------------------------------------------------------------------------

    def _network(self, seed: int) -> nn.Module:
        if self.reference is None:
            assert self.run.fresh is not None
            return self.run.fresh(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return models.build(self.reference, shape=self.run.shape or (), classes=self.run.classes)

    def _halves(self) -> list[tuple[Tensor, EpochBatches]]:
        """The rows of each half, and its batches, which index into these rows."""
        run = self.run
        halves = torch.randperm(run.rows, generator=generator(run.seed, "halves")).chunk(2)
        # A reference model may have batch norm even if the network has none.
        least = min(max(run.least_rows, 2 * run.ranks.world), run.batch_size)
        seeds = [derived_seed(run.seed, "reference", number) for number in range(2)]
        return [
            (half, EpochBatches(len(half), run.batch_size, self.reference_epochs, seed, least, run.drop_last))
            for half, seed in zip(halves, seeds, strict=True)
        ]

    def prepare(self, beside: Beside) -> None:
        halves, device = self._halves(), self.run.device
        for (own, batches), (others, _) in zip(halves, reversed(halves), strict=True):
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(derived_seed(batches.seed, "dropout", self.run.ranks.rank))
                train = (replace(batch, indices=own[batch.indices], ahead=()) for batch in batches)
                epochs = beside(self._network(batches.seed), train, others)
                self.irreducible[others.to(device)] = min(epochs, key=lambda losses: float(losses.mean())).to(device)

    def preparation(self) -> tuple[int, int]:
        trained = sum(sum(map(len, batches.epoch(0))) for _, batches in self._halves())
        return self.reference_epochs * (trained + self.run.rows), self.reference_epochs * trained

    # --- the training --------------------------------------------------------------------------------------------

    def plan(self, batches: EpochBatches, upstream: Iterator[Batch]) -> Iterator[Batch]:
        least = min(math.ceil(batches.least / self.fraction), self.rows)
        return self.passes.plan(
            batches.epochs, lambda epoch: cut(batches.order(epoch), self.rows, least, batches.drop_last)
        )

    def narrow(self, step: Step, score: Callable[[], Tensor]) -> Tensor | None:
        rows = len(step.batch.indices)
        step.kept = kept_rows(self.fraction, rows)
        if step.kept == rows:
            return None
        losses = score()
        if self.at_random:
            self.chosen = random_rows(step, rows, step.kept).sort().values.to(losses.device)
        else:
            reducible = losses - self.irreducible[step.batch.indices.to(losses.device)]
            self.chosen = positions(select_rows(reducible, self.fraction), step.kept)
        return self.chosen

    def kept(self, step: Step, losses: Tensor) -> Tensor | None:
        return self.chosen if step.narrowed else None

    def diagnostics(self, row: Mapping[str, Any]) -> dict[str, float]:
        """``irreducible_loss``: its mean over the training set."""
        return {"irreducible_loss": float(self.irreducible.mean())}

    def state_dict(self) -> dict[str, Any]:
        return {**self.passes.state_dict(), "irreducible": self.irreducible}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.passes.load_state_dict(state)
        self.irreducible = saved_tensor(state, "irreducible", self.irreducible)
