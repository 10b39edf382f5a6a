"""The control: select the same amount as a strategy would, but at random."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from batchkern.errors import UserError
from batchkern.parts.rounds import RandomRounds, check_delta
from batchkern.plan import Batch, EpochBatches
from batchkern.schedules import linear
from batchkern.seeding import generator
from batchkern.strategies.base import Run, Step, Strategy, selected_mean
from batchkern.strategies.trimming import check_keep, kept_rows


def random_rows(step: Step, rows: int, k: int) -> Tensor:
    """Positions ``(k,)`` int64 on the CPU, drawn anew for each update from a batch of ``rows``."""
    return torch.randperm(rows, generator=generator(step.run.seed, "random rows", step.update))[:k]


@dataclass
class RandomSelection(Strategy):
    """Random rows in place of the hardest rows, or random batches in place of the hardest batches.

    Args:
        select: ``"rows"``: as :class:`Trimming`, with k random rows. ``"batches"``: as :class:`HardBatches`, with
            rounds of floor(delta * N) random batches.
        start, end: fractions of rows, as in :class:`Trimming`.
        delta: fraction of batches, as in :class:`HardBatches`.
        backward: how rows are trained on. ``"masked"``: a pass over the whole batch, with zero gradients at dropped
            rows. ``"compact"``: a pass over the chosen rows alone, since no loss is needed to choose them; the losses
            of the other rows are not computed.

    Examples:
        >>> import torch
        >>> from batchkern.strategies import RandomSelection
        >>> from batchkern.trainer import Trainer
        >>> data = torch.arange(64.0).view(64, 1), torch.arange(64) // 32
        >>> trainer = Trainer("mlp", data, data, strategies=[RandomSelection(end=0.5)], epochs=2, batch_size=16)
        >>> trainer.fit()["samples_kept"]  # 64 in the first epoch, 32 in the second
        96
    """

    name: ClassVar[str] = "random"

    select: Literal["rows", "batches"] = "rows"
    start: float = 1.0
    end: float = 0.2
    delta: float = 0.2
    backward: Literal["masked", "compact"] = "masked"
    rounds: RandomRounds | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.select not in ("rows", "batches"):
            raise UserError(f"select must be rows or batches, got {self.select!r}")
        if self.backward not in ("masked", "compact"):
            raise UserError(f"backward must be masked or compact, got {self.backward!r}")
        check_keep(self.start, self.end)
        check_delta(self.delta)
        self.owns = frozenset({"the loss" if self.select == "rows" else "the batch plan"})

    def setup(self, run: Run) -> None:
        self.epochs = run.epochs
        self.rounds = RandomRounds(run.batches_per_epoch, self.delta, run.seed) if self.select == "batches" else None

    def plan(self, batches: EpochBatches, upstream: Iterator[Batch]) -> Iterator[Batch]:
        return upstream if self.rounds is None else self.rounds.plan(batches)

    def narrow(self, step: Step, score: Callable[[], Tensor]) -> Tensor | None:
        if self.select == "batches" or self.backward == "masked":
            return None
        rows = len(step.batch.indices)
        chosen = self._choose(step, rows)
        return None if len(chosen) == rows else chosen.sort().values.to(step.run.device)

    def loss(self, step: Step, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if self.select == "batches" or step.narrowed:
            return super().loss(step, logits, target)
        chosen = self._choose(step, step.share.rows)
        counts = step.share.take(torch.zeros(step.share.rows, dtype=torch.bool).index_fill(0, chosen, True))
        return selected_mean(step, logits, target, 1.0, among=counts)

    def _choose(self, step: Step, rows: int) -> Tensor:
        """Random positions in a batch of ``rows``."""
        step.kept = kept_rows(linear(self.start, self.end)(step.batch.epoch, step.run.epochs), rows)
        return random_rows(step, rows, step.kept)

    def kept(self, step: Step, losses: Tensor) -> Tensor | None:
        if self.select == "batches" or step.narrowed:
            return None
        return self._choose(step, len(losses)).to(losses.device)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.rounds is None else self.rounds.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.rounds is not None:
            self.rounds.load_state_dict(state, self.epochs)
