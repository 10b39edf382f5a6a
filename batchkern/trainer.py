"""Trains an image classifier with any combination of the strategies, one update at a time."""

from __future__ import annotations

import contextlib
import copy
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
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
    check_choice,
    check_counts,
    check_data,
    check_flags,
    check_kind,
    check_model,
    check_model_kind,
    check_range,
    check_rates,
    count,
    describe_choice,
    describe_data,
    describe_model,
    least_rows,
    load_optimizer,
    pick_schedule,
)
from batchkern.data import AUGMENTATIONS, Feed, ImageData
from batchkern.diagnostics import SampleLog
from batchkern.distributed import Ranks
from batchkern.errors import UserError, only_warned
from batchkern.initial_weights import PRETRAINED, check_outside, describe_weights, load_weights
from batchkern.interrupts import Interrupted, StopRequest
from batchkern.learner import EVALUATION_BATCH, Counts, Learner
from batchkern.plan import Batch, EpochBatches
from batchkern.progress import ProgressBar
from batchkern.rundir import CHECKPOINT, CURVES, SAMPLES, WEIGHTS, RunDirectory, check_readable, check_saved
from batchkern.seeding import derived_seed, set_torch_states, torch_states
from batchkern.strategies import Run, Strategy, check_combination

__all__ = ["EVALUATION_BATCH", "Counts", "Interrupted", "Trainer"]


class Trainer(Learner):
    """One training run, in one process or in all that torchrun started (docs/distributed.md).

    Args:
        model: a module that maps images ``(B, C, H, W)`` to logits ``(B, classes)``, or a name for
            ``batchkern.models.build``, which is then initialised from ``seed``.
        train, test: the data; same shape and classes.
        weights: to begin with: a file of safetensors or the directory of a run that has ended, as
            :func:`batchkern.initial_weights.load_weights` takes them, or ``"pretrained"``, for what timm has for a
            model of its own. The classifier begins with random weights where it has another number of classes.
        strategies: any combination in which no two decide the same thing; none is the plain baseline.
        epochs, batch_size: of the plain baseline; strategies may change what an epoch visits. A batch is that of all
            processes together.
        drop_last: leave out the last batch of an epoch where it is smaller; by default no image is left out.
        optimizer: ``"sgd"``, ``"adam"``, ``"adamw"``, or a function of the parameter list.
        lr, momentum, weight_decay: of the named optimizers; a function sets its own, and ``lr`` is taken from it.
        schedule: ``"constant"``, ``"cosine"``, ``"step"``, with numbers of its own as in ``"step(milestones=(0.3, 0.6),
            gamma=0.1)"``, or ``f(progress) -> factor`` on the learning rate.
        amp: autocast to ``"bf16"`` or ``"fp16"`` (with loss scaling), or ``"none"``.
        augment: ``"none"``, ``"flip"``, ``"crop"``, ``"crop+flip"``, ``"resized-crop"``, ``"resized-crop+flip"``, as
            :class:`batchkern.data.Feed` takes them.
        label_smoothing: in [0, 1], of the training loss.
        classifier: name of the model's last linear layer, where the last one registered is not it.
        seed: of the weights, the order, the augmentation and every choice. :meth:`fit` seeds torch's generators.
        device: default: CUDA where torch sees it, else CPU; of several processes, each takes a GPU of its own.
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
        weights: str | os.PathLike[str] | None = None,
        strategies: Sequence[Strategy] = (),
        epochs: int = 15,
        batch_size: int = 64,
        drop_last: bool = False,
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
        epochs, batch_size, seed = count("epochs", epochs), count("batch_size", batch_size), count("seed", seed, None)
        check_counts(checkpoint_every=checkpoint_every)
        label_smoothing = check_range("label_smoothing", label_smoothing, 0, 1)
        lr, momentum, weight_decay = check_rates(lr, momentum, weight_decay)
        check_data(train, test, batch_size)
        check_model_kind(model)
        check_kind("strategies", strategies, list | tuple, "a list of strategies, such as [Trimming()]")
        check_combination(strategies)
        check_choice("amp", amp, AMP_TYPES)
        check_choice("augment", augment, AUGMENTATIONS)
        check_kind("classifier", classifier, str | None, "the name of a module")
        check_kind("out", out, str | os.PathLike | None, "a path")
        check_flags(drop_last=drop_last, overwrite=overwrite, resume=resume, progress=progress)
        check_kind("weights", weights, str | os.PathLike | None, "a path, or the word pretrained")
        pretrained = weights == PRETRAINED
        if pretrained and not isinstance(model, str):
            raise UserError("weights are pretrained, but model is a module, and not the name of one of timm's")
        if out is not None:
            check_outside(weights, out)
        ranks = Ranks.join(device)
        self.seed = seed
        self.checkpoint_every = checkpoint_every
        self.progress = progress
        self.settings = {
            "train": describe_data(train),
            "test": describe_data(test),
            "model": describe_model(model),
            "weights": describe_weights(weights),
            "strategies": [strategy.describe() for strategy in strategies],
            "epochs": epochs,
            "batch_size": batch_size,
            "drop_last": drop_last or None,  # as of runs from before there was such a thing
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
            "ranks": ranks.world,
        }

        name = model if isinstance(model, str) else None

        def fresh(seed: int) -> nn.Module:
            if name is None:
                return copy.deepcopy(self.model)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                built = models.build(name, shape=train.shape, classes=len(train.classes), pretrained=pretrained)
            if weights is not None and not pretrained:
                load_weights(built, weights, classifier)
            return built

        if isinstance(model, str):
            model = fresh(derived_seed(seed, "weights"))
        elif weights is not None:
            load_weights(model, weights, classifier)
        model = model.to(ranks.device)
        check_model(model, train.shape, len(train.classes), ranks.device)
        if classifier is not None:
            models.find_classifier(model, classifier)
        least = least_rows(model, train.shape, len(train.classes), ranks.device, ranks.world, batch_size)
        self.statistics = train.statistics()
        self.test_feed = self._feed(test, ranks.device)
        clean = train.clean_labels
        super().__init__(
            Run(
                model=model,
                shape=train.shape,
                classes=len(train.classes),
                rows=len(train),
                epochs=epochs,
                batch_size=batch_size,
                device=ranks.device,
                seed=seed,
                label_smoothing=label_smoothing,
                classifier=classifier,
                least_rows=least,
                drop_last=drop_last,
                ranks=ranks,
                fresh=fresh,
                images_vary=augment != "none" or any(type(s).transform is not Strategy.transform for s in strategies),
            ),
            strategies,
            self._feed(train, ranks.device, augment=augment, seed=derived_seed(seed, "augment")),
            optimizer=lambda parameters: build_optimizer(optimizer, parameters, lr, momentum, weight_decay),
            schedule=pick_schedule(schedule),
            amp=AMP_TYPES[amp],
            samples=SampleLog(len(train), ranks.device, None if clean is None else clean != train.labels),
            last_checkpoint=self._last_checkpoint,
        )
        self.batches = EpochBatches(len(train), batch_size, epochs, derived_seed(seed, "order"), least, drop_last)
        self.history: list[dict[str, Any]] = []
        """One row an epoch, as in metrics.jsonl."""
        self._rng: tuple[Tensor, Tensor | None] | None = None
        """States of torch's generators where this run goes on, once it has begun."""
        self.directory = self._open(out, overwrite=overwrite, resume=resume)

    def _feed(self, data: ImageData, device: torch.device, *, augment: str = "none", seed: int = 0) -> Feed:
        mean, std = self.statistics
        return Feed(data, mean=mean, std=std, device=device, augment=augment, seed=seed)

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
        path = Path(out)
        self.ranks.first(lambda: check_saved(self.model))
        self.ranks.first(lambda: check_readable(self._state([torch_states(self.device)])))
        directory = self.ranks.first(
            lambda: RunDirectory(path, self.settings, environment, overwrite=overwrite, resume=resume)
        )
        if resume:
            state, self.history = self.ranks.first(lambda: (directory.load_checkpoint(), directory.metrics()))
            if state is not None:
                self._load(state)
        return directory

    def _save(self) -> None:
        """What a later process needs to go on to the same weights."""
        directory = self.directory
        if directory is None:
            return
        self._check_finite()
        generators = self.ranks.collect(torch_states(self.device))
        self.ranks.first(lambda: directory.save_checkpoint(self._state(generators)))

    def _state(self, generators: list[tuple[Tensor, Tensor | None]]) -> dict[str, Any]:
        """``generators``: the states of torch's, of each rank."""
        (rng, cuda_rng), *others = generators
        return {
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
            "rng_of_other_ranks": others,
        }

    def _last_checkpoint(self) -> str:
        if self.directory is None:
            return ""
        file = self.directory.path / CHECKPOINT
        kept = self.ranks.first(file.exists)
        return f"; the last finite checkpoint is kept in {file}" if kept else ""

    def _load(self, state: dict[str, Any]) -> None:
        from batchkern import records

        try:
            records.check(state, records.Checkpoint)
            self._take(state)
        # Of a checkpoint that is whole: another model, optimizer or strategy of the user's than the one that was saved.
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{CHECKPOINT} does not fit this training: {reason}") from error

    def _take(self, state: dict[str, Any]) -> None:
        if state["epochs_done"] > self.run.epochs or state["sums"].shape != self._sums.shape:
            raise ValueError(
                f"epochs_done is {state['epochs_done']}, and sums are of shape {tuple(state['sums'].shape)}"
            )
        self.counts = Counts(**state["counts"])
        self._sums.copy_(state["sums"])
        self.model.load_state_dict(state["model"])
        self.run.extras.load_state_dict(state["extras"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.batches.load_state_dict(state["batches"])
        if len(state["strategies"]) != len(self.strategies):
            raise ValueError(
                f"it is of {len(state['strategies'])} strategies, and this training has {len(self.strategies)}"
            )
        for strategy, saved in zip(self.strategies, state["strategies"], strict=True):
            strategy.load_state_dict(saved)
        self.samples.load_state_dict(state["samples"])
        self._rng = [(state["rng"], state["cuda_rng"]), *state["rng_of_other_ranks"]][self.ranks.rank]
        torch.Generator().set_state(self._rng[0])  # says now if it cannot be

    # --- the training ------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Trains to the end, from wherever it stands; the last row of :attr:`history`.

        Raises:
            UserError: the loss is not finite, or a file cannot be written.
            Interrupted: Ctrl-C, after the update under way and a checkpoint. A second Ctrl-C stops at once.
        """
        self.model.train()
        label = "+".join(s.name for s in self.strategies) or "baseline"
        stop = StopRequest(several=self.ranks.world > 1)
        shown = self.progress and self.ranks.rank == 0
        with self._directory_held(), contextlib.ExitStack() as ending:
            ending.callback(self.feed.forget)
            with self._own_rng(), stop.heeded(), ProgressBar(label, enabled=shown) as bar:
                self._prepare()
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
                    if self.ranks.agree(stop.made):
                        stop.made = False  # a further Ctrl-C does not end the saving
                        self._interrupt()
            return self._finish()

    def _prepare(self) -> None:
        """What strategies do before the first update; where something was done, it is saved."""
        if self.counts.samples_forward:
            return
        started = time.perf_counter()
        for strategy in self.strategies:
            strategy.prepare(self.beside)
            forward, backward = strategy.preparation()
            self.counts.samples_forward += forward
            self.counts.samples_backward += backward
        if self.counts.samples_forward:
            self.counts.seconds += time.perf_counter() - started
            self._save()

    @contextlib.contextmanager
    def _directory_held(self) -> Iterator[None]:
        directory = self.directory
        if directory is None:
            yield
            return
        self.ranks.first(directory.lock)
        try:
            yield
        finally:
            directory.unlock()

    @contextlib.contextmanager
    def _own_rng(self) -> Iterator[None]:
        """Torch's generators as this run left them, whatever was drawn in between, by another trainer say."""
        if self._rng is None:
            # Each rank drops out other units of its rows.
            place = (self.ranks.rank,) if self.ranks.rank else ()
            torch.manual_seed(derived_seed(self.seed, "fit", *place))
        else:
            set_torch_states(self._rng, self.device)
        try:
            yield
        finally:
            self._rng = torch_states(self.device)

    def _interrupt(self) -> None:
        self._save()
        place = f"interrupted after update {self.counts.updates}"
        if self.directory is None:
            raise Interrupted(f"{place}; nothing is saved, since the run has no directory")
        raise Interrupted(f"{place}; checkpoint written to {self.directory.path}; resume it to go on from there")

    def _show(self, bar: ProgressBar, progress: float) -> None:
        loss, correct, rows, *_ = self._sums.tolist()
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

    # --- the end of an epoch, of a run --------------------------------------------------------------------------

    def _end_epoch(self, epoch: int) -> None:
        self._check_finite()
        loss, correct, rows, objective, trained = self._sums.tolist()
        row: dict[str, Any] = {
            "epoch": epoch,
            **asdict(self.counts),
            "lr": float(self.optimizer.param_groups[0]["lr"]),
            "train_loss": loss / max(rows, 1),
            "train_objective": objective / max(trained, 1),
            "train_accuracy": correct / max(rows, 1),
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
            self.ranks.first(partial(self.directory.append_metrics, row))
        self._save()

    def _finish(self) -> dict[str, Any]:
        if self.directory:
            self.ranks.first(partial(self._write_results, self.directory))
        for strategy in self.strategies:
            strategy.finish(self.run)
        return self.history[-1]

    def _write_results(self, directory: RunDirectory) -> None:
        directory.save_tensors(WEIGHTS, self.model.state_dict())
        directory.save_tensors(SAMPLES, self.samples.samples())
        from batchkern.plots import plot_run

        with only_warned(f"{directory.path / CURVES} is not drawn"):
            plot_run(directory.path)

    # --- evaluation ---------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """Accuracy and mean cross entropy on the test set.

        ``test_accuracy`` is that of :meth:`predict`; ``test_accuracy_plain`` and ``test_loss`` are those of the
        model's own logits, whatever the strategies do at inference. With more than five classes there is
        ``test_top5_accuracy`` too: how often the label is among the five classes of the highest scores.
        """
        voted = top = plain = loss = 0.0
        several = self.run.classes > 5
        for _, target, logits, scores in self._inference(self.test_feed):
            voted += float((scores.argmax(1) == target).sum())
            top += float((scores.topk(5).indices == target[:, None]).sum()) if several else 0.0
            plain += float((logits.argmax(1) == target).sum())
            loss += float(F.cross_entropy(logits.float(), target, reduction="sum"))
        sums = zip(*self.ranks.collect((voted, plain, loss, top)), strict=True)
        voted, plain, loss, top = (sum(parts) / len(self.test_feed.data) for parts in sums)
        found = {"test_accuracy": voted, "test_accuracy_plain": plain, "test_loss": loss}
        return found | ({"test_top5_accuracy": top} if several else {})

    def _accuracy(self, feed: Feed) -> float:
        """Of the predictions that :meth:`predict` makes."""
        correct = sum(float((scores.argmax(1) == target).sum()) for _, target, _, scores in self._inference(feed))
        return sum(self.ranks.collect(correct)) / len(feed.data)

    def predict(self, data: ImageData) -> Tensor:
        """Predicted classes ``(N,)`` int64 on the CPU, as the strategies decide at inference (majority vote, say)."""
        check_kind("data", data, ImageData, "labelled images, as batchkern.data.load gives them")
        if data.shape != self.run.shape:
            raise UserError(f"data has images of shape {data.shape}; the model was trained on {self.run.shape}")
        mine = {place: scores.argmax(1).cpu() for place, _, _, scores in self._inference(self._feed(data, self.device))}
        predicted = {place: classes for part in self.ranks.collect(mine) for place, classes in part.items()}
        return torch.cat([predicted[place] for place in sorted(predicted)])

    @torch.no_grad()
    def _inference(self, feed: Feed) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Number, labels, logits and class scores of each batch; whole batches go to the ranks in turn, so that the
        noise of a vote is that of one process."""
        self.ranks.copy_first(self.model.buffers())  # batch norm's running statistics differ from rank to rank
        training = self.model.training
        self.model.eval()
        try:
            batches = torch.arange(len(feed.data)).split(EVALUATION_BATCH)
            mine = range(self.ranks.rank, len(batches), self.ranks.world)
            for place in mine:
                for due in (place, place + self.ranks.world):
                    if due < len(batches):
                        feed.prepare(batches[due], None)
                images, target = feed.batch(batches[place], None)
                with self._autocast():
                    logits = self.model(images)
                    inferred = (s.infer(self.run, images) for s in self.strategies)
                    scores = next((x for x in inferred if x is not None), logits)
                yield place, target, logits, scores
        finally:
            feed.forget()
            self.model.train(training)
