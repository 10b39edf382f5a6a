"""One update: from a batch of the plan to a step of the optimizer, through the seams of the strategies."""

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
    """What a training has cost so far. Samples are rows, each time they enter a pass."""

    updates: int = 0
    """Of active batches; passive ones are counted by their strategy."""
    samples_seen: int = 0
    """Rows of active batches."""
    samples_forward: int = 0
    """Rows of active and passive batches, in each pass."""
    samples_backward: int = 0
    samples_kept: int = 0
    seconds: float = 0.0
    """Of training: without evaluation and checkpoints."""


class Outcome(NamedTuple):
    """Of an objective."""

    loss: Tensor
    """``()``, this rank's, which is differentiated."""
    value: Tensor
    """``()``, its mean over the ranks, detached."""
    figures: Tensor | None = None
    """``(3, rows)`` of the whole batch: see ``Updater._figures``. None for a batch that is not of the training set."""


class _Objective(nn.Module):
    """All that trains, as one module for the averaging of gradients; it computes whatever it is given."""

    def __init__(self, model: nn.Module, extras: nn.ModuleDict) -> None:
        super().__init__()
        self.model = model
        self.extras = extras

    def forward(self, objective: Callable[[], Outcome]) -> Outcome:
        return objective()


class Updater:
    """Makes updates, and holds what changes with them: weights, optimizer, counts, the sums of the epoch.

    Args:
        run: with the model, on its device.
        strategies: set up here, before there is an optimizer.
        feed: of the training set.
        optimizer: a function of the parameter list.
        accumulate: the gradients of so many active batches make an update.
        max_grad_norm: gradients are shortened to this norm, that of all parameters together.
        ema_decay: of a :class:`batchkern.averaging.WeightAverage`.
        compile: with this backend of ``torch.compile``, passes over whole batches.
        samples: what is kept of each sample of the training set.
        last_checkpoint: what to say of files where the training ends because it diverged.
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
        """The model in passes over whole batches. Hooks, which virtual samples and passive batches need, are no part of
        a compiled graph, and each number of chosen rows would be one more graph: such passes run the plain model."""
        self.parallel = self.ranks.parallel(
            _Objective(run.model, run.extras),
            # A head that idles in this update has no gradient to wait for.
            find_unused=lambda: len(run.extras) > 0 or not uses_all_parameters(run.model, run.example(2)),
        )
        self.optimizer = optimizer([*run.model.parameters(), *run.extras.parameters()])
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.grad_scaler.GradScaler(self.device.type, enabled=amp == torch.float16)
        self.counts = Counts()
        self.active = 0
        """Active batches so far: without accumulation, the updates."""
        self.sums = torch.zeros(5, dtype=torch.float64, device=self.device)
        """Of the epoch so far: untrimmed losses, right predictions, their number; objective, its samples."""
        self._finite = FiniteCheck(self.device, last_checkpoint)

    def owner(self, thing: str) -> Strategy:
        """The strategy that decides ``thing``, else the plain baseline."""
        return next((s for s in self.strategies if thing in s.owns), Strategy())

    def narrow(self, step: Step, score: Callable[[], Tensor]) -> Tensor | None:
        """Positions in the batch of the rows worth a full pass; ``None``: all, also where these are too few for batch
        norm. The loss then counts the same rows in a pass over all."""
        rows = self.owner("the loss").narrow(step, score)
        return None if rows is not None and len(rows) < self.run.least_rows else rows

    def beside(self, model: nn.Module, batches: Iterable[Batch], rows: Tensor) -> Iterator[Tensor]:
        """``Beside`` of the strategies."""
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
        """As the first rank has them."""
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
        """Of one batch of the plan: a step of the optimizer, or less where batches wait for each other."""
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
        """Rows of the batch as ``strategies`` make them, one after the other."""
        if not strategies:
            return self.feed.batch(step.batch.indices, step.update, positions)
        *before, last = strategies
        images, target = self._transformed(step, positions, before)

        def fetch(others: Tensor) -> tuple[Tensor, Tensor]:
            """From the rows at hand, if they have all of ``others``."""
            places = torch.full((len(step.batch.indices),), -1).index_put((positions,), torch.arange(len(positions)))
            at = places[others]
            if bool((at < 0).any()):
                return self._transformed(step, others, before)
            return rows_of((images, target), at)

        return last.transform(step, positions, images, target, fetch)

    def _whole(self, step: Step) -> tuple[Tensor, Tensor]:
        """All of this rank's rows of the batch; those of the next ones are read in the meantime. Where rows are chosen
        without losses nobody asks for the whole, and nothing is read ahead."""
        self.feed.prepare(step.batch.indices, step.update, step.share.positions)
        for later, rows in enumerate(step.batch.ahead[: self.feed.depth], start=step.update + 1):
            self.feed.prepare(rows, later, self.ranks.share(len(rows)).positions)
        return self._rows(step, step.share.positions)

    def _scored(self, step: Step, images: Tensor, target: Tensor) -> Tensor:
        """Figures of the whole batch, from a pass for the losses alone. It leaves batch norm's running statistics to
        the full pass."""
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
        """From this rank's rows; what strategies see and what is counted is of the whole batch."""
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
        # A choice without losses leaves those that it did not choose without one.
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
        """The loss of these rows, the penalties of the strategies and, beside it, the loss of an injected batch."""
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
        """Rows that were scored before are in the first three sums already."""
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
        """The rows worth a full pass, dealt out evenly: they may all have been one rank's."""
        step.narrowed, step.share = True, self.ranks.share(len(rows))
        if whole is not None and self.ranks.world == 1:
            return rows_of(whole, rows)
        return self._rows(step, step.share.take(rows.cpu()))

    def _perturbed(self, perturbation: Perturbation, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        raw, virtual = run_with_virtual(self.model, perturbation.layer, perturbation.virtual, images)
        return raw, perturbation.penalty(raw, virtual, target)

    def _figures(self, step: Step, logits: Tensor, target: Tensor, losses: Tensor) -> Tensor:
        """``(3, rows)``: the loss; whether the prediction is right, of mixed images the class of the most weight, of
        masks at which share of the places that count; and the score."""
        labels = target.argmax(1) if target.is_floating_point() else target
        right = (logits.detach().argmax(1) == labels).to(losses.dtype)
        if right.dim() > 1:
            right = right.flatten(1).sum(1) / (labels != IGNORED).flatten(1).sum(1).clamp(min=1)
        score = self.owner("the loss").score(step, logits, target, losses)
        return torch.stack([losses, right, score.to(losses.dtype)])

    def _outcome(self, loss: Tensor) -> Outcome:
        """Of a loss whose rows have no figures."""
        return Outcome(loss, self.ranks.mean(loss.detach()))

    def _descend(self, objective: Callable[[], Outcome]) -> None:
        """One update along the gradient of ``objective``."""
        self._accumulate(objective)
        self._step()

    def _accumulate(self, objective: Callable[[], Outcome], rows: int = 0) -> Outcome:
        """Adds the gradient of ``objective`` to those that wait for the update, and weighs it by ``rows`` where there
        may be several."""
        if self.window.batches == 0:
            # Gradients become None, not zero: the optimizer then leaves alone what this update does not use.
            self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            outcome: Outcome = self.parallel(objective)
        # Every rank sees the same value and ends here together with the others, none of which waits for a gradient.
        self._finite.watch(outcome.value, self.counts.updates)
        loss = outcome.loss
        if rows and self.window.size > 1:
            loss = loss * (rows / self.run.batch_size)
        self.scaler.scale(loss).backward()
        return outcome

    def _step(self) -> None:
        """One update along the gradients that wait for it."""
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
        """
        Raises:
            UserError: a loss since the last check, or a weight, is not finite.
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
        """
        Raises:
            ValueError, or what torch raises: the state is that of another model, optimizer or strategy.
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
    """All of a batch's rows that this rank has, and their figures: read, and scored by a forward pass, when they are
    first asked for."""

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
