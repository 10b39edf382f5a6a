"""Trains an image classifier with any combination of the strategies, one update at a time."""

from __future__ import annotations

import contextlib
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchkern import models, schedules
from batchkern._version import __version__
from batchkern.configure import (
    AMP_TYPES,
    OptimizerFactory,
    build_optimizer,
    check_counts,
    check_data,
    check_model,
    check_one_process,
    check_range,
    describe_choice,
    describe_data,
    describe_model,
    pick_device,
    pick_schedule,
)
from batchkern.data import Feed, ImageData
from batchkern.diagnostics import SampleLog
from batchkern.errors import UserError
from batchkern.plan import Batch, EpochBatches
from batchkern.progress import ProgressBar
from batchkern.rundir import CHECKPOINT, SAMPLES, WEIGHTS, RunDirectory
from batchkern.seeding import derived_seed
from batchkern.strategies import Run, Step, Strategy, check_combination
from batchkern.strategies.base import Perturbation, run_with_virtual

EVALUATION_BATCH = 512
CUDA_CHECK_EVERY = 50
"""Updates between looks at whether the loss is finite on a GPU, where each look waits for the device."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during :meth:`Trainer.fit`; the message says what was saved."""


@dataclass
class Counts:
    """What a training has cost so far. Samples are rows, each time they enter a pass."""

    updates: int = 0
    """Active updates; passive ones are counted by their strategy."""
    samples_seen: int = 0
    """Rows of active batches."""
    samples_forward: int = 0
    samples_backward: int = 0
    samples_kept: int = 0
    seconds: float = 0.0
    """Of training: without evaluation and checkpoints."""


class Trainer:
    """One training run.

    Args:
        model: a module that maps images ``(B, C, H, W)`` to logits ``(B, classes)``, or a name for
            ``batchkern.models.build``, which is then initialised from ``seed``.
        train, test: the data; same shape and classes.
        strategies: any combination in which no two decide the same thing; none is the plain baseline.
        epochs, batch_size: of the plain baseline; strategies may change what an epoch visits.
        optimizer: ``"sgd"``, ``"adam"``, ``"adamw"``, or a function of the parameter list.
        lr, momentum, weight_decay: of the named optimizers; a function sets its own, and ``lr`` is taken from it.
        schedule: ``"constant"``, ``"cosine"``, ``"step"``, or ``f(progress) -> factor`` on the learning rate.
        amp: autocast to ``"bf16"`` or ``"fp16"`` (with loss scaling), or ``"none"``.
        augment: ``"none"``, ``"flip"``, ``"crop"``, ``"crop+flip"``.
        label_smoothing: in [0, 1], of the training loss.
        classifier: name of the model's last linear layer, where the last one registered is not it.
        seed: of the weights, the order, the augmentation and every choice. :meth:`fit` seeds torch's generators.
        device: default: CUDA where torch sees it, else CPU.
        out: the run's directory; ``None`` writes nothing.
        overwrite: replace the files of a run that is there. resume: go on from its checkpoint.
        checkpoint_every: also save after every so many updates; a checkpoint is always saved after an epoch.
        progress: show a progress bar on a terminal.

    Raises:
        UserError: whatever can be known to be wrong before training.
    """

    def __init__(
        self,
        model: nn.Module | str,
        train: ImageData,
        test: ImageData,
        *,
        strategies: Sequence[Strategy] = (),
        epochs: int = 15,
        batch_size: int = 64,
        optimizer: Literal["sgd", "adam", "adamw"] | OptimizerFactory = "sgd",
        lr: float = 0.05,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        schedule: str | schedules.RateSchedule = "cosine",
        amp: Literal["none", "bf16", "fp16"] = "none",
        augment: str = "none",
        label_smoothing: float = 0.0,
        classifier: str | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        out: str | Path | None = None,
        overwrite: bool = False,
        resume: bool = False,
        checkpoint_every: int | None = None,
        progress: bool = True,
    ) -> None:
        check_one_process()
        check_counts(epochs=epochs, batch_size=batch_size, checkpoint_every=checkpoint_every)
        check_range("label_smoothing", label_smoothing, 0, 1)
        check_data(train, test, batch_size)
        check_combination(strategies)
        if amp not in AMP_TYPES:
            raise UserError(f"amp must be one of {', '.join(AMP_TYPES)}, got {amp!r}")
        self.strategies = list(strategies)
        self.seed = seed
        self.device = pick_device(device)
        self.amp = AMP_TYPES[amp]
        self.schedule = pick_schedule(schedule)
        self.checkpoint_every = checkpoint_every
        self.progress = progress
        self.settings = {
            "train": describe_data(train),
            "test": describe_data(test),
            "model": describe_model(model),
            "strategies": [strategy.describe() for strategy in self.strategies],
            "epochs": epochs,
            "batch_size": batch_size,
            "optimizer": describe_choice(optimizer),
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "schedule": describe_choice(schedule),
            "amp": amp,
            "augment": augment,
            "label_smoothing": label_smoothing,
            "classifier": classifier,
            "seed": seed,
        }

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(seed, "weights"))
            if isinstance(model, str):
                model = models.build(model, shape=train.shape, classes=len(train.classes))
        self.model = model.to(self.device)
        check_model(self.model, train.shape, len(train.classes), self.device)
        self.statistics = train.statistics()
        self.feed = self._feed(train, augment=augment, seed=derived_seed(seed, "augment"))
        self.test_feed = self._feed(test)

        self.run = Run(
            model=self.model,
            shape=train.shape,
            classes=len(train.classes),
            rows=len(train),
            epochs=epochs,
            batch_size=batch_size,
            device=self.device,
            seed=seed,
            label_smoothing=label_smoothing,
            classifier=classifier,
        )
        for strategy in self.strategies:
            strategy.setup(self.run)
        self.batches = EpochBatches(len(train), batch_size, epochs, derived_seed(seed, "order"))
        parameters = [*self.model.parameters(), *self.run.extras.parameters()]
        self.optimizer = build_optimizer(optimizer, parameters, lr, momentum, weight_decay)
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.grad_scaler.GradScaler(self.device.type, enabled=self.amp == torch.float16)

        clean = train.clean_labels
        self.samples = SampleLog(len(train), self.device, None if clean is None else clean != train.labels)
        self.counts = Counts()
        self.history: list[dict[str, Any]] = []
        """One row an epoch, as in metrics.jsonl."""
        # Of the epoch so far, on the device: untrimmed losses, objective, correct predictions, samples.
        self._sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        self._not_finite = torch.full((), -1, dtype=torch.int64, device=self.device)
        self._stop = False
        self._rng: tuple[Tensor, Tensor | None] | None = None
        """States of torch's generators where this run goes on, once it has begun."""
        self.directory = self._open(out, overwrite=overwrite, resume=resume)

    def _feed(self, data: ImageData, *, augment: str = "none", seed: int = 0) -> Feed:
        mean, std = self.statistics
        return Feed(data, mean=mean, std=std, device=self.device, augment=augment, seed=seed)

    def owner(self, thing: str) -> Strategy:
        """The strategy that decides ``thing``, else the plain baseline."""
        return next((s for s in self.strategies if thing in s.owns), Strategy())

    # --- files -------------------------------------------------------------------------------------------------

    def _open(self, out: str | Path | None, *, overwrite: bool, resume: bool) -> RunDirectory | None:
        if out is None:
            if resume:
                raise UserError("resume=True needs the run's directory as out")
            return None
        environment = {
            "batchkern": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine(),
        }
        directory = RunDirectory(Path(out), self.settings, environment, overwrite=overwrite, resume=resume)
        if resume:
            state = directory.load_checkpoint()
            if state is not None:
                self._load(state)
                self.history = directory.metrics()
        return directory

    def _save(self) -> None:
        """What a later process needs to go on to the same weights."""
        if self.directory is None:
            return
        self._check_finite()
        self._check_weights()
        rng, cuda_rng = self._rng_states()
        self.directory.save_checkpoint(
            {
                "epochs_done": len(self.history),
                "counts": asdict(self.counts),
                "sums": self._sums,
                "model": self.model.state_dict(),
                "extras": self.run.extras.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "batches": self.batches.state_dict(),
                "strategies": [strategy.state_dict() for strategy in self.strategies],
                "samples": self.samples.state_dict(),
                "rng": rng,
                "cuda_rng": cuda_rng,
            }
        )

    def _load(self, state: dict[str, Any]) -> None:
        self.counts = Counts(**state["counts"])
        self._sums.copy_(state["sums"])
        self.model.load_state_dict(state["model"])
        self.run.extras.load_state_dict(state["extras"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.batches.load_state_dict(state["batches"])
        for strategy, saved in zip(self.strategies, state["strategies"], strict=True):
            strategy.load_state_dict(saved)
        self.samples.load_state_dict(state["samples"])
        self._rng = state["rng"], state["cuda_rng"]

    # --- the training ------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Trains to the end, from wherever it stands; the last row of :attr:`history`.

        Raises:
            UserError: the loss is not finite, or a file cannot be written.
            Interrupted: Ctrl-C, after the update under way and a checkpoint. A second Ctrl-C stops at once.
        """
        self.model.train()
        label = "+".join(s.name for s in self.strategies) or "baseline"
        with self._own_rng(), self._sigint(), ProgressBar(label, enabled=self.progress) as bar:
            for batch in self.plan():
                started = time.perf_counter()
                self._update(batch)
                if batch.ends_epoch and self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)  # the time of queued work is the training's
                self.counts.seconds += time.perf_counter() - started
                if batch.ends_epoch:
                    self._end_epoch(batch.epoch)
                elif self.checkpoint_every and self.counts.updates % self.checkpoint_every == 0:
                    self._save()
                if bar.due():
                    self._show(bar, batch.progress)
                if self._stop:
                    self._interrupt()
        return self._finish()

    @contextlib.contextmanager
    def _own_rng(self) -> Iterator[None]:
        """Torch's generators as this run left them, whatever was drawn in between, by another trainer say."""
        if self._rng is None:
            torch.manual_seed(derived_seed(self.seed, "fit"))
        else:
            rng, cuda_rng = self._rng
            torch.set_rng_state(rng)
            if self.device.type == "cuda" and cuda_rng is not None:
                torch.cuda.set_rng_state(cuda_rng, self.device)
        try:
            yield
        finally:
            self._rng = self._rng_states()

    def _rng_states(self) -> tuple[Tensor, Tensor | None]:
        cuda = self.device.type == "cuda"
        return torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if cuda else None

    @contextlib.contextmanager
    def _sigint(self) -> Iterator[None]:
        """Ctrl-C finishes the update under way: a checkpoint is only ever taken between updates."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: FrameType | None) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True

        previous = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def _interrupt(self) -> None:
        self._stop = False
        self._save()
        place = f"interrupted after update {self.counts.updates}"
        if self.directory is None:
            raise Interrupted(f"{place}; nothing is saved, since the run has no directory")
        raise Interrupted(f"{place}; checkpoint written to {self.directory.path}; resume it to go on from there")

    def _show(self, bar: ProgressBar, progress: float) -> None:
        loss, _, correct, rows = self._sums.tolist()
        bar.show(
            progress,
            loss=loss / max(rows, 1),
            accuracy=correct / max(rows, 1),
            kept=self.counts.samples_kept / max(self.counts.samples_seen, 1),
            speed=self.counts.samples_seen / max(self.counts.seconds, 1e-9),
        )

    def plan(self) -> Iterator[Batch]:
        owner_first = sorted(self.strategies, key=lambda s: "the batch plan" not in s.owns)
        stream: Iterator[Batch] = iter(self.batches)
        for strategy in owner_first:
            stream = strategy.plan(self.batches, stream)
        return stream

    def _update(self, batch: Batch) -> None:
        step = Step(self.run, batch, self.counts.updates)
        factor = self.schedule(batch.progress) if batch.rate is None else batch.rate
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = base * factor
        if batch.reset_optimizer:
            self.optimizer.state.clear()
        if batch.inject is not None:
            inject = batch.inject
            self._descend(lambda: inject(step))
            self.counts.samples_forward += len(batch.indices)
            self.counts.samples_backward += len(batch.indices)
            return
        images, target = self.feed.batch(batch.indices, self.counts.updates)
        self._active_update(step, images, target)
        self.counts.updates += 1

    def _active_update(self, step: Step, images: Tensor, target: Tensor) -> None:
        scored: list[tuple[Tensor, Tensor]] = []

        def score() -> Tensor:
            """A pass for the losses alone. It leaves batch norm's running statistics to the full pass."""
            with torch.no_grad(), self._autocast(), models.frozen_statistics(self.model):
                logits = self.model(images)
                _, losses = Strategy().loss(step, logits, target)
            scored.append((logits, losses))
            return losses

        owner = self.owner("the loss")
        rows = owner.narrow(step, score)
        full_target = target
        if rows is not None:
            images, target, step.narrowed = images[rows], target[rows], True
        perturbation = self.owner("the virtual samples").perturb(step)
        outcome: list[tuple[Tensor, Tensor]] = []

        def objective() -> Tensor:
            penalty: Tensor | float = 0.0
            if perturbation is None or perturbation.own_update:
                logits = self.model(images)
            else:
                logits, penalty = self._perturbed(perturbation, images)
            loss, losses = owner.loss(step, logits, target)
            outcome.append((logits.detach(), losses))
            return loss + penalty

        value = self._descend(objective)
        passes = 1
        if perturbation is not None and perturbation.own_update:
            self._descend(lambda: self._perturbed(perturbation, images)[1])
            passes = 2

        logits, losses = scored[0] if scored else outcome[0]
        seen = full_target if scored else target
        for strategy in self.strategies:
            strategy.observe(step, losses)
        # A choice without losses leaves those that it did not choose without one.
        known = step.batch.indices if rows is None or scored else step.batch.indices[rows.cpu()]
        self.samples.observe(known, losses, owner.kept(step, losses))
        sums = losses.sum(), value * len(seen), (logits.argmax(1) == seen).sum(), torch.full_like(value, len(seen))
        self._sums += torch.stack([x.double() for x in sums])
        self.counts.samples_seen += len(full_target)
        self.counts.samples_forward += passes * len(target) + (len(full_target) if scored else 0)
        self.counts.samples_backward += passes * len(target)
        self.counts.samples_kept += len(full_target) if step.kept is None else step.kept

    def _perturbed(self, perturbation: Perturbation, images: Tensor) -> tuple[Tensor, Tensor]:
        raw, virtual = run_with_virtual(self.model, perturbation.layer, perturbation.virtual, images)
        return raw, perturbation.penalty(raw, virtual)

    def _descend(self, objective: Callable[[], Tensor]) -> Tensor:
        """One update along the gradient of ``objective``; its detached value."""
        # Gradients become None, not zero: the optimizer then leaves alone what this update does not use.
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            loss = objective()
        self._watch(loss.detach())
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)

    # --- a loss that is not finite -----------------------------------------------------------------------------

    def _watch(self, loss: Tensor) -> None:
        update = self.counts.updates
        if self.device.type == "cpu":
            if not torch.isfinite(loss):
                self._diverged(update)
            return
        first = ~torch.isfinite(loss) & (self._not_finite < 0)
        self._not_finite = torch.where(first, update, self._not_finite)
        if update % CUDA_CHECK_EVERY == CUDA_CHECK_EVERY - 1:
            self._check_finite()

    def _check_finite(self) -> None:
        update = int(self._not_finite)
        if update >= 0:
            self._diverged(update)

    def _check_weights(self) -> None:
        """A step after a finite loss can overflow, and must not be saved over a checkpoint that is finite."""
        weights = [*self.model.parameters(), *self.run.extras.parameters()]
        if not torch.stack([weight.detach().isfinite().all() for weight in weights]).all():
            self._diverged(self.counts.updates - 1, "the weights are not finite after")

    def _diverged(self, update: int, what: str = "the loss is not finite at") -> None:
        message = f"{what} update {update + 1}"
        if self.directory and (self.directory.path / CHECKPOINT).exists():
            message += f"; the last finite checkpoint is kept in {self.directory.path / CHECKPOINT}"
        raise UserError(message + "; a lower learning rate may help")

    # --- the end of an epoch, of a run --------------------------------------------------------------------------

    def _end_epoch(self, epoch: int) -> None:
        self._check_finite()
        self._check_weights()
        loss, objective, correct, _ = (self._sums / self._sums[3].clamp(min=1)).tolist()
        row: dict[str, Any] = {
            "epoch": epoch,
            **asdict(self.counts),
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": loss,
            "train_objective": objective,
            "train_accuracy": correct,
            **self.evaluate(),
        }
        if epoch + 1 == self.run.epochs:
            row["train_set_accuracy"] = self._accuracy(self.feed)
        row.update(self.samples.end_epoch())
        for strategy in self.strategies:
            row.update(strategy.diagnostics(row))
        self.history.append(row)
        self._sums.zero_()
        if self.directory:
            self.directory.append_metrics(row)
        self._save()

    def _finish(self) -> dict[str, Any]:
        if self.directory:
            self.directory.save_tensors(WEIGHTS, self.model.state_dict())
            self.directory.save_tensors(SAMPLES, self.samples.samples())
            from batchkern.plots import plot_run

            plot_run(self.directory.path)
        for strategy in self.strategies:
            strategy.finish(self.run)
        return self.history[-1]

    # --- evaluation ---------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """Accuracy and mean cross entropy on the test set.

        ``test_accuracy`` is that of :meth:`predict`; ``test_accuracy_plain`` and ``test_loss`` are those of the
        model's own logits, whatever the strategies do at inference.
        """
        voted = plain = loss = 0.0
        for target, logits, scores in self._inference(self.test_feed):
            voted += float((scores.argmax(1) == target).sum())
            plain += float((logits.argmax(1) == target).sum())
            loss += float(F.cross_entropy(logits.float(), target, reduction="sum"))
        rows = len(self.test_feed.data)
        return {"test_accuracy": voted / rows, "test_accuracy_plain": plain / rows, "test_loss": loss / rows}

    def _accuracy(self, feed: Feed) -> float:
        correct = sum(float((scores.argmax(1) == target).sum()) for target, _, scores in self._inference(feed))
        return correct / len(feed.data)

    def predict(self, data: ImageData) -> Tensor:
        """Predicted classes ``(N,)`` int64 on the CPU, as the strategies decide at inference (majority vote, say)."""
        if data.shape != self.run.shape:
            raise UserError(f"data has images of shape {data.shape}; the model was trained on {self.run.shape}")
        return torch.cat([scores.argmax(1).cpu() for _, _, scores in self._inference(self._feed(data))])

    @torch.no_grad()
    def _inference(self, feed: Feed) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Labels, logits and class scores, batch by batch."""
        training = self.model.training
        self.model.eval()
        try:
            for indices in torch.arange(len(feed.data)).split(EVALUATION_BATCH):
                images, target = feed.batch(indices, None)
                with self._autocast():
                    logits = self.model(images)
                    inferred = (s.infer(self.run, images) for s in self.strategies)
                    scores = next((x for x in inferred if x is not None), logits)
                yield target, logits, scores
        finally:
            self.model.train(training)
