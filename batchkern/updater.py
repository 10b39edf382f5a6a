"""One update: from a batch of the plan to a step of the optimizer, with the hooks of the strategies."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchkern import models
from batchkern.averaging import WeightAverage
from batchkern.data import DatasetFeed, Feed
from batchkern.data.labelled import IGNORED, rows_of
from batchkern.diagnostics import SampleLog
from batchkern.divergence import FiniteCheck
from batchkern.model_checks import uses_all_parameters
from batchkern.optimizers import OptimizerFactory, load_optimizer
from batchkern.plan import Batch, Window
from batchkern.schedules import RateSchedule
from batchkern.strategies import Run, Step, Strategy
from batchkern.strategies.base import Perturbation, row_losses, run_with_virtual

EVALUATION_BATCH = 512


@dataclass
class Counts:
    """The cost of a training so far. A sample is counted each time it enters a pass."""

    updates: int = 0
    """Updates from active batches; updates from passive batches are counted by their strategy."""
    samples_seen: int = 0
    """Rows of active batches."""
    samples_forward: int = 0
    """Rows of active and passive batches, counted in each forward pass."""
    samples_backward: int = 0
    samples_kept: int = 0
    seconds: float = 0.0
    """Time spent on training, without evaluation and checkpoints."""


class Outcome(NamedTuple):
    """The result of an objective."""

    loss: Tensor
    """``()``, the loss of this rank, which is differentiated."""
    value: Tensor
    """``()``, its mean over the ranks, detached."""
    figures: Tensor | None = None
    """``(3, rows)`` of the whole batch: see ``Updater._figures``. None for a batch that is not from the training
    set."""


class _Objective(nn.Module):
    """All trained parameters in one module, for the averaging of gradients over ranks. ``forward`` calls the given
    objective."""

    def __init__(self, model: nn.Module, extras: nn.ModuleDict) -> None:
        super().__init__()
        self.model = model
        self.extras = extras

    def forward(self, objective: Callable[[], Outcome]) -> Outcome:
        return objective()


class Updater:
    """Makes updates, and holds the state that they change: weights, optimizer, counts, the sums of the epoch.

    Args:
        run: the run, whose model is on its device.
        strategies: they are set up here, before the optimizer is built.
        feed: the feed of the training set.
        optimizer: a function of the parameter list.
        accumulate: number of active batches whose gradients are combined into one update.
        max_grad_norm: gradients are clipped to this norm, computed over all parameters together.
        ema_decay: decay of a :class:`batchkern.averaging.WeightAverage`.
        compile: backend of ``torch.compile`` for passes over whole batches.
        samples: the per-sample statistics of the training set.
        last_checkpoint: returns the end of the error message for a diverged training, which names the last checkpoint.
    """

    def __init__(
        self,
        run: Run,
        strategies: Sequence[Strategy],
        feed: Feed | DatasetFeed,
        *,
        optimizer: OptimizerFactory,
        schedule: RateSchedule,
        amp: torch.dtype | None,
        accumulate: int = 1,
        max_grad_norm: float | None = None,
        ema_decay: float | None = None,
        compile: str | None = None,
        samples: SampleLog,
        last_checkpoint: Callable[[], str],
    ) -> None:
        self.run, self.model, self.ranks, self.device = run, run.model, run.ranks, run.device
        self.strategies = list(strategies)
        self.feed = feed
        self.new_optimizer = optimizer
        self.schedule = schedule
        self.amp = amp
        self.samples = samples
        self.window = Window(accumulate)
        self.max_grad_norm = max_grad_norm
        for strategy in self.strategies:
            strategy.setup(run)
        self.average = None if ema_decay is None else WeightAverage(run.model, ema_decay)
        self.compiled = run.model if compile is None else models.Compiled(run.model, compile)
        """The model for passes over whole batches. Virtual samples and passive batches need hooks, which a compiled
        graph does not run, and each new number of chosen rows would compile another graph; such passes use the plain
        model."""
        self.parallel = self.ranks.parallel(
            _Objective(run.model, run.extras),
            # A head that an update does not use gets no gradient.
            find_unused=lambda: len(run.extras) > 0 or not uses_all_parameters(run.model, run.example(2)),
        )
        self.optimizer = optimizer([*run.model.parameters(), *run.extras.parameters()])
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.grad_scaler.GradScaler(self.device.type, enabled=amp == torch.float16)
        self.counts = Counts()
        self.active = 0
        """Number of active batches so far. Without accumulation, it equals the number of updates."""
        self.sums = torch.zeros(5, dtype=torch.float64, device=self.device)
        """Sums over the epoch so far: untrimmed losses, correct predictions, samples of these two; objective, samples
        of the objective."""
        self._finite = FiniteCheck(self.device, last_checkpoint)

    def owner(self, thing: str) -> Strategy:
        """The strategy that decides ``thing``, else the plain baseline."""
        return next((s for s in self.strategies if thing in s.owns), Strategy())

    def narrow(self, step: Step, score: Callable[[], Tensor]) -> Tensor | None:
        """Positions in the batch of the rows that get a full pass. ``None`` means all rows; this is also the result if
        the chosen rows are too few for batch norm, and the loss then counts the same rows in a pass over all."""
        rows = self.owner("the loss").narrow(step, score)
        return None if rows is not None and len(rows) < self.run.least_rows else rows

    def beside(self, model: nn.Module, batches: Iterable[Batch], rows: Tensor) -> Iterator[Tensor]:
        """Trains another model on ``batches``; yields its losses of ``rows`` after each epoch. Implements
        ``batchkern.strategies.base.Beside``."""
        other = Updater(
            replace(self.run, model=model.to(self.device), extras=nn.ModuleDict()),
            (),
            self.feed,
            optimizer=self.new_optimizer,
            schedule=self.schedule,
            amp=self.amp,
            accumulate=self.window.size,
            max_grad_norm=self.max_grad_norm,
            samples=SampleLog(self.run.rows, self.device, None),
            last_checkpoint=lambda: " of a model that is trained beside",
        )
        model.train()
        for batch in batches:
            other.update(batch)
            if batch.ends_epoch:
                other.check_finite()
                yield other._losses_of(rows)

    @torch.no_grad()
    def _losses_of(self, rows: Tensor) -> Tensor:
        """Losses of ``rows`` in evaluation mode, computed by the first rank."""
        self.ranks.copy_first(self.model.buffers())
        self.model.eval()
        losses = []
        for part in rows.split(EVALUATION_BATCH):
            images, target = self.feed.batch(part, None)
            with self.autocast():
                logits = self.model(images)
            losses.append(row_losses(logits, target, self.run.label_smoothing)[0].cpu())
        self.model.train()
        return self.ranks.first(lambda: torch.cat(losses))

    def update(self, batch: Batch) -> None:
        """Processes one batch of the plan: makes a step of the optimizer, or only accumulates gradients or computes
        losses."""
        if self.window.cut_by(batch):
            self._step()
        step = Step(self.run, batch, self.active)
        factor = self.schedule(batch.progress) if batch.rate is None else batch.rate
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = base * factor
        if batch.weights is not None:
            self.model.load_state_dict(batch.weights)
        if batch.reset_optimizer:
            self.optimizer.state.clear()
        if batch.inject is not None:
            inject = batch.inject
            self._descend(lambda: self._outcome(inject(step)))
            self.counts.samples_forward += len(batch.indices)
            self.counts.samples_backward += len(batch.indices)
            return
        if batch.only == "score":
            self._score_alone(step)
            return
        self._active_batch(step)
        self.active += 1

    def _rows(self, step: Step, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Images and targets of this rank, at ``positions`` of the batch."""
        images, target = self._transformed(step, positions, self.strategies)
        return images, step.share.ignore_filling(target)

    def _transformed(self, step: Step, positions: Tensor, strategies: Sequence[Strategy]) -> tuple[Tensor, Tensor]:
        """Rows of the batch, transformed by each of ``strategies`` in turn."""
        if not strategies:
            return self.feed.batch(step.batch.indices, step.update, positions)
        *before, last = strategies
        images, target = self._transformed(step, positions, before)

        def fetch(others: Tensor) -> tuple[Tensor, Tensor]:
            """Rows at the positions ``others``. They are read again only if some are not among the rows already
            read."""
            places = torch.full((len(step.batch.indices),), -1).index_put((positions,), torch.arange(len(positions)))
            at = places[others]
            if bool((at < 0).any()):
                return self._transformed(step, others, before)
            return rows_of((images, target), at)

        return last.transform(step, positions, images, target, fetch)

    def _whole(self, step: Step) -> tuple[Tensor, Tensor]:
        """All rows of the batch that belong to this rank; the rows of the next batches are read in the background. If
        rows are chosen without losses, this is not called, and nothing is read ahead."""
        self.feed.prepare(step.batch.indices, step.update, step.share.positions)
        for later, rows in enumerate(step.batch.ahead[: self.feed.depth], start=step.update + 1):
            self.feed.prepare(rows, later, self.ranks.share(len(rows)).positions)
        return self._rows(step, step.share.positions)

    def _scored(self, step: Step, images: Tensor, target: Tensor) -> Tensor:
        """Figures of the whole batch, from a pass that only computes losses. The running statistics of batch norm are
        updated only by the full pass."""
        with torch.no_grad(), self.autocast(), models.frozen_statistics(self.model):
            logits = self.compiled(images)
            loss, losses = Strategy().loss(step, logits, target)
        return self.ranks.gather(step.share, self._figures(step, logits, target, losses), loss)[0]

    def _score_alone(self, step: Step) -> None:
        losses, correct, _ = self._scored(step, *self._whole(step))
        self._finite.watch(losses.mean(), self.counts.updates)
        for strategy in self.strategies:
            strategy.observe(step, losses)
        self.samples.observe(step.batch.indices, losses, torch.arange(0, device=self.device))
        self.sums[:3] += torch.stack([losses.sum(), correct.sum(), torch.ones_like(losses).sum()]).double()
        self.counts.samples_seen += len(losses)
        self.counts.samples_forward += len(losses)
        if step.batch.ends_epoch and self.window.batches:
            self._step()

    def _active_batch(self, step: Step) -> None:
        """Trains on this rank's rows. Strategies and counts get the figures of the whole batch."""
        batch = _WholeBatch(self, step)
        rows = self.narrow(step, lambda: batch.figures[2])
        if rows is None:
            images, target = batch.rows
        else:
            images, target = self._narrowed(step, rows, batch.rows if batch.is_scored else None)
        perturbation = self.owner("the virtual samples").perturb(step)
        model = self.compiled if rows is None else self.model

        objective = partial(self._objective, step, model, images, target, perturbation)
        outcome = self._accumulate(objective, len(step.batch.indices))
        if self.window.add(step.batch):
            self._step()
        passes = 1
        if perturbation is not None and perturbation.own_update:
            self._descend(lambda: self._outcome(self._perturbed(perturbation, images, target)[1]))
            passes = 2

        figures = batch.figures if batch.is_scored else outcome.figures
        assert figures is not None
        losses, correct, step.scores = figures
        for strategy in self.strategies:
            strategy.observe(step, losses)
        # If rows were chosen without computing losses, only the chosen rows have a loss.
        known = step.batch.indices if rows is None or batch.is_scored else step.batch.indices[rows.cpu()]
        self.samples.observe(known, losses, self.owner("the loss").kept(step, losses))
        self._add_to_epoch(step, losses, correct, outcome.value)
        self._count(step, passes, scored=batch.is_scored)

    def _objective(
        self,
        step: Step,
        model: Callable[[Tensor], Any],
        images: Tensor,
        target: Tensor,
        perturbation: Perturbation | None,
    ) -> Outcome:
        """The sum of the loss of these rows, the penalties of the strategies and the loss of an injected batch, if
        any."""
        penalty: Tensor | None = None
        if perturbation is None or perturbation.own_update:
            logits = model(images)
        else:
            logits, penalty = self._perturbed(perturbation, images, target)
        loss, losses = self.owner("the loss").loss(step, logits, target)
        for term in (penalty, *(strategy.penalty(step) for strategy in self.strategies)):
            loss = loss if term is None else loss + term
        beside = step.batch.beside
        if beside is not None:
            assert beside.inject is not None
            loss = loss + beside.inject(Step(self.run, beside, step.update))
        figures, value = self.ranks.gather(step.share, self._figures(step, logits, target, losses), loss.detach())
        return Outcome(loss, value, figures)

    def _add_to_epoch(self, step: Step, losses: Tensor, correct: Tensor, value: Tensor) -> None:
        """Adds the batch to the sums of the epoch. Rows that were scored before are already in the first three sums."""
        seen = torch.full_like(value, len(losses))
        sums = torch.stack([x.double() for x in (losses.sum(), correct.sum(), seen, value * len(losses), seen)])
        first = 3 if step.batch.only == "update" else 0
        self.sums[first:] += sums[first:]

    def _count(self, step: Step, passes: int, *, scored: bool) -> None:
        beside = step.batch.beside
        full, trained, added = len(step.batch.indices), step.share.rows, 0 if beside is None else len(beside.indices)
        self.counts.samples_seen += 0 if step.batch.only == "update" else full
        self.counts.samples_forward += passes * trained + (full if scored else 0) + added
        self.counts.samples_backward += passes * trained + added
        self.counts.samples_kept += full if step.kept is None else step.kept

    def _narrowed(self, step: Step, rows: Tensor, whole: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """The rows that get a full pass, divided evenly among the ranks, since one rank may have held them all."""
        step.narrowed, step.share = True, self.ranks.share(len(rows))
        if whole is not None and self.ranks.world == 1:
            return rows_of(whole, rows)
        return self._rows(step, step.share.take(rows.cpu()))

    def _perturbed(self, perturbation: Perturbation, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        raw, virtual = run_with_virtual(self.model, perturbation.layer, perturbation.virtual, images)
        return raw, perturbation.penalty(raw, virtual, target)

    def _figures(self, step: Step, logits: Tensor, target: Tensor, losses: Tensor) -> Tensor:
        """``(3, rows)``: the loss, the correctness and the score of each row. For mixed images a prediction is correct
        if it is the class of the largest weight; for masks the correctness is the share of correct places among those
        not ignored."""
        labels = target.argmax(1) if target.is_floating_point() else target
        right = (logits.detach().argmax(1) == labels).to(losses.dtype)
        if right.dim() > 1:
            right = right.flatten(1).sum(1) / (labels != IGNORED).flatten(1).sum(1).clamp(min=1)
        score = self.owner("the loss").score(step, logits, target, losses)
        return torch.stack([losses, right, score.to(losses.dtype)])

    def _outcome(self, loss: Tensor) -> Outcome:
        """The outcome of a loss that has no per-row figures."""
        return Outcome(loss, self.ranks.mean(loss.detach()))

    def _descend(self, objective: Callable[[], Outcome]) -> None:
        """One update along the gradient of ``objective``."""
        self._accumulate(objective)
        self._step()

    def _accumulate(self, objective: Callable[[], Outcome], rows: int = 0) -> Outcome:
        """Adds the gradient of ``objective`` to the accumulated gradients, weighted by ``rows`` if several batches are
        accumulated."""
        if self.window.batches == 0:
            # Gradients become None, not zero: the optimizer then skips parameters that this update does not use.
            self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            outcome: Outcome = self.parallel(objective)
        # All ranks have the same value, so on divergence they all stop here, and none is left waiting for a gradient.
        self._finite.watch(outcome.value, self.counts.updates)
        loss = outcome.loss
        if rows and self.window.size > 1:
            loss = loss * (rows / self.run.batch_size)
        self.scaler.scale(loss).backward()
        return outcome

    def _step(self) -> None:
        """One update from the accumulated gradients."""
        trained = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.window.size > 1 and self.window.rows:
            torch._foreach_mul_([p.grad for p in trained], self.run.batch_size / self.window.rows)
        if self.max_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(trained, self.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.counts.updates += self.window.batches > 0
        self.window.clear()
        if self.average is not None:
            self.average.update()

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)

    def check_finite(self) -> None:
        """Checks the losses since the last check, and the weights.

        Raises:
            UserError: a loss or a weight is not finite.
        """
        self._finite.losses()
        self._finite.weights([*self.model.parameters(), *self.run.extras.parameters()], self.counts.updates)

    def state_dict(self) -> dict[str, Any]:
        return {
            "counts": asdict(self.counts),
            "active": self.active,
            "sums": self.sums,
            "model": self.model.state_dict(),
            "extras": self.run.extras.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "strategies": [strategy.state_dict() for strategy in self.strategies],
            "samples": self.samples.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state of :meth:`state_dict`.

        Raises:
            ValueError, or an error of torch: the state belongs to another model, optimizer or strategy.
        """
        if state["sums"].shape != self.sums.shape:
            raise ValueError(f"sums are of shape {tuple(state['sums'].shape)}")
        self.counts, self.active = Counts(**state["counts"]), state["active"]
        self.sums.copy_(state["sums"])
        self.model.load_state_dict(state["model"])
        self.run.extras.load_state_dict(state["extras"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if len(state["strategies"]) != len(self.strategies):
            raise ValueError(
                f"it is of {len(state['strategies'])} strategies, and this training has {len(self.strategies)}"
            )
        for strategy, saved in zip(self.strategies, state["strategies"], strict=True):
            strategy.load_state_dict(saved)
        self.samples.load_state_dict(state["samples"])


class _WholeBatch:
    """The rows of a batch that belong to this rank, read at first use, and the figures of the whole batch, computed by
    a forward pass at first use."""

    def __init__(self, updater: Updater, step: Step) -> None:
        self._updater, self._step = updater, step

    @cached_property
    def rows(self) -> tuple[Tensor, Tensor]:
        return self._updater._whole(self._step)

    @cached_property
    def figures(self) -> Tensor:
        return self._updater._scored(self._step, *self.rows)

    @property
    def is_scored(self) -> bool:
        return "figures" in self.__dict__
