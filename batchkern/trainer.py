"""Trains a model with any combination of the strategies, one update at a time."""

from __future__ import annotations

import contextlib
import copy
import os
import platform
import time
import warnings
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
from batchkern.callbacks import Callback, checked_callbacks
from batchkern.data import AUGMENTATIONS, DatasetData, DatasetFeed, Feed, ImageData, Labelled, as_labelled, feed_of
from batchkern.data.datasets import Data
from batchkern.data.labelled import IGNORED
from batchkern.description import describe_choice, describe_data, describe_model
from batchkern.diagnostics import SampleLog
from batchkern.distributed import Ranks
from batchkern.errors import UserError, only_warned
from batchkern.initial_weights import PRETRAINED, check_outside, describe_weights, load_weights
from batchkern.interrupts import Interrupted, StopRequest
from batchkern.model_checks import check_model, check_model_kind, least_rows
from batchkern.optimizers import OptimizerFactory, build_optimizer, check_rates, pick_schedule
from batchkern.plan import Batch, EpochBatches
from batchkern.preprocessing import encoded, preprocessing_of
from batchkern.progress import ProgressBar
from batchkern.rundir import BEST, CHECKPOINT, CURVES, SAMPLES, WEIGHTS, RunDirectory, check_readable, check_saved
from batchkern.seeding import derived_seed, set_torch_states, torch_states
from batchkern.strategies import Run, Strategy, check_combination
from batchkern.updater import EVALUATION_BATCH, Counts, Updater
from batchkern.validation import (
    AMP_TYPES,
    check_choice,
    check_counts,
    check_data,
    check_flags,
    check_kind,
    check_knobs,
    check_range,
    check_same_kind,
    count,
)

__all__ = ["Counts", "Interrupted", "Trainer"]


class Trainer:
    """One training run, in a single process or in all the processes that torchrun started (docs/distributed.md).

    Args:
        model: a module that maps a batch of inputs, such as images ``(B, C, H, W)``, to logits ``(B, classes)``, or for
            masks ``(B, classes, *places)``; or a name for ``batchkern.models.build``, which is then initialised from
            ``seed``.
        train, test: the data; same shape and classes. The result of :func:`batchkern.data.load_pair`, a map-style
            dataset (:func:`batchkern.data.from_dataset`), or a pair of tensors (:func:`batchkern.data.from_tensors`).
        weights: initial weights: a safetensors file or the directory of a finished run, as accepted by
            :func:`batchkern.initial_weights.load_weights`, or ``"pretrained"`` for the pretrained weights of a timm
            model. The classifier starts from random weights if its number of classes differs.
        strategies: any combination in which no two decide the same thing; an empty list is the plain baseline.
        epochs, batch_size: the values of the plain baseline; strategies may change which samples an epoch visits. The
            batch size is the total over all processes.
        drop_last: leave out the last batch of an epoch if it is smaller than the others; by default no sample is left
            out.
        optimizer: ``"sgd"``, ``"adam"``, ``"adamw"``, or a function of the parameter list.
        lr, momentum, weight_decay: settings of the named optimizers; an optimizer function uses its own settings, and
            the base learning rate is read from the optimizer it returns.
        schedule: ``"constant"``, ``"cosine"``, ``"step"``, optionally with arguments, as in
            ``"step(milestones=(0.3, 0.6), gamma=0.1)"``, or ``f(progress) -> factor`` on the learning rate.
        warmup_epochs: over this many epochs the schedule is multiplied by a factor that rises linearly from almost 0 to
            1.
        max_grad_norm: clip the gradient of each update to this norm, computed over all parameters together.
        gradient_accumulation_steps: number of batches whose gradients are combined into one update, each weighted by
            its number of rows; the last update of an epoch may combine fewer. Strategies choose samples within each
            batch.
        ema_decay: evaluate and save an exponential moving average of the weights; see
            :class:`batchkern.averaging.WeightAverage`.
        compile: a backend of ``torch.compile``, such as ``"inductor"``, used for passes over whole batches. Virtual
            samples, passive batches and selected rows use the model without compilation.
        channels_last: use the channels-last memory format for the weights of 2-d convolutions, and so for the
            activations between them, which is faster on CPUs and GPUs. It is the default if ``model`` is a name. A
            module of your own may fail with it: ``view`` raises for such tensors.
        amp: autocast to ``"bf16"`` or ``"fp16"`` (with loss scaling), or ``"none"``.
        augment: ``"none"``, ``"flip"``, ``"crop"``, ``"crop+flip"``, ``"resized-crop"``, ``"resized-crop+flip"``, as
            :class:`batchkern.data.Feed` takes them.
        label_smoothing: in [0, 1], of the training loss.
        workers: number of worker processes that fetch rows of datasets ahead of their update. With 0, the training
            process fetches them when they are needed. Image files are decoded by threads, and data in memory needs
            neither.
        classifier: name of the model's last linear layer, needed only if it is not the one registered last.
        seed: seed of the weights, the order, the augmentation and every choice. :meth:`fit` seeds torch's generators.
        device: by default, CUDA if it is available, else the CPU. With several processes, each uses its own GPU.
        out: the run's directory; ``None`` writes nothing.
        overwrite: replace the files of an existing run.
        resume: continue from the checkpoint of the run, to its end or for more epochs. With more epochs the schedule
            covers all of them, and a warning states the learning rate with which the training continues.
        checkpoint_every: also save a checkpoint each time this many updates are done; one is always saved after an
            epoch.
        keep_best: also keep, in best.safetensors, the weights of the epoch with the highest test accuracy (the first
            of equal ones). An accuracy that was used to choose the epoch is too optimistic: measure the final accuracy
            on other held-out data.
        callbacks: called at the begin and end of the training and after each epoch; see
            :class:`batchkern.callbacks.Callback`.
        progress: show a progress bar on a terminal.

    Raises:
        UserError: an argument is invalid; everything that can be checked before training is checked here.

    Examples:
        >>> import torch
        >>> from batchkern.strategies import Trimming
        >>> from batchkern.trainer import Trainer
        >>> x = torch.linspace(-1, 1, 64).view(64, 1)
        >>> data = x, (x[:, 0] > 0).long()
        >>> trainer = Trainer("mlp", data, data, strategies=[Trimming(end=0.5)], epochs=2, batch_size=16)
        >>> result = trainer.fit()
        >>> result["updates"], result["samples_kept"]  # all of 64 samples, then the hardest half
        (8, 96)
    """

    def __init__(
        self,
        model: nn.Module | str,
        train: Labelled | Data,
        test: Labelled | Data,
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
        warmup_epochs: float = 0.0,
        max_grad_norm: float | None = None,
        gradient_accumulation_steps: int = 1,
        ema_decay: float | None = None,
        compile: str | None = None,
        channels_last: bool | None = None,
        amp: Literal["none", "bf16", "fp16"] = "none",
        augment: str = "none",
        label_smoothing: float = 0.0,
        workers: int = 0,
        classifier: str | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        out: str | Path | None = None,
        overwrite: bool = False,
        resume: bool = False,
        checkpoint_every: int | None = None,
        keep_best: bool = False,
        callbacks: Sequence[Callback] = (),
        progress: bool = True,
    ) -> None:
        epochs, batch_size, seed = count("epochs", epochs), count("batch_size", batch_size), count("seed", seed, None)
        check_counts(checkpoint_every=checkpoint_every)
        label_smoothing = check_range("label_smoothing", label_smoothing, 0, 1)
        lr, momentum, weight_decay = check_rates(lr, momentum, weight_decay)
        accumulate = count("gradient_accumulation_steps", gradient_accumulation_steps)
        warmup_epochs = check_range("warmup_epochs", warmup_epochs, 0, epochs)
        max_grad_norm, ema_decay = check_knobs(max_grad_norm, ema_decay, compile, model)
        train = as_labelled("train", train)
        test = as_labelled("test", test, train.classes)
        check_data(train, test, batch_size)
        workers = count("workers", workers, 0)
        check_model_kind(model)
        check_kind("strategies", strategies, list | tuple, "a list of strategies, such as [Trimming()]")
        check_combination(strategies)
        check_kind("channels_last", channels_last, bool | None, "True, False or None")
        check_choice("amp", amp, AMP_TYPES)
        check_choice("augment", augment, AUGMENTATIONS)
        check_kind("classifier", classifier, str | None, "the name of a module")
        check_kind("out", out, str | os.PathLike | None, "a path")
        check_flags(drop_last=drop_last, overwrite=overwrite, resume=resume, keep_best=keep_best, progress=progress)
        if warmup_epochs and (paced := next((s for s in strategies if "the learning rate" in s.owns), None)):
            raise UserError(f"warmup_epochs is {warmup_epochs:g}, but {paced.name} sets the learning rate itself")
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
        self.keep_best = keep_best
        self.callbacks = checked_callbacks(callbacks)
        self.settings = {
            "train": describe_data(train),
            "test": describe_data(test),
            "model": describe_model(model),
            "weights": describe_weights(weights),
            "strategies": [strategy.describe() for strategy in strategies],
            "epochs": epochs,
            "batch_size": batch_size,
            "drop_last": drop_last or None,
            "optimizer": describe_choice(optimizer),
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "schedule": describe_choice(schedule),
            # None when unused, so that the settings of older runs, which lack these entries, still match.
            "warmup_epochs": warmup_epochs or None,
            "max_grad_norm": max_grad_norm,
            "gradient_accumulation_steps": accumulate if accumulate > 1 else None,
            "ema_decay": ema_decay,
            "compile": compile,
            "amp": amp,
            "augment": augment,
            "label_smoothing": label_smoothing,
            "classifier": classifier,
            "seed": seed,
            "ranks": ranks.world,
        }

        self.workers = workers
        self.statistics = train.statistics()
        feed = self._feed(train, ranks.device, augment=augment, seed=derived_seed(seed, "augment"))
        inputs, target = feed.batch(torch.arange(2) % len(train), None)
        feed.forget()
        places = tuple(target.shape[1:])
        if isinstance(train, ImageData):
            inputs = torch.zeros_like(inputs)
        named = model if isinstance(model, str) else None

        def fresh(seed: int) -> nn.Module:
            if named is None:
                return copy.deepcopy(self.model)
            if train.shape is None or train.classes is None:
                raise UserError(
                    f"model is the name {named!r}, for which shape and classes must be known: give a module, or "
                    "from_dataset the classes of rows that are one tensor each"
                )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                built = models.build(named, shape=train.shape, classes=len(train.classes), pretrained=pretrained)
            return models.in_channels_last(built) if channels_last else built

        if isinstance(model, str):
            model = fresh(derived_seed(seed, "weights"))
        if channels_last is None:
            channels_last = named is not None and any(isinstance(m, nn.Conv2d) for m in model.modules())
        if channels_last:
            models.in_channels_last(model)
        self.settings["channels_last"] = channels_last or None
        if weights is not None and not pretrained:
            load_weights(model, weights, classifier)
        model = model.to(ranks.device)
        classes = check_model(model, inputs, len(train.classes) if train.classes else None, places)
        if classifier is not None:
            models.find_classifier(model, classifier)
        least = least_rows(model, inputs, classes, places, ranks.device, ranks.world, batch_size)
        self.classes = train.classes or tuple(map(str, range(classes)))
        if isinstance(feed, DatasetFeed):
            feed.classes = classes  # a dataset may not have declared them
        self.preprocessing = preprocessing_of(
            train, self.statistics, classes=self.classes, model=named, classifier=classifier
        )
        """How inputs are prepared for the model; saved with the weights."""
        self.test_feed = self._feed(test, ranks.device, classes=classes)
        rate = pick_schedule(schedule)
        if warmup_epochs:  # the first factor is the share of the warm-up that one batch makes up
            start = min(1.0, batch_size / (warmup_epochs * len(train)))
            rate = schedules.warm_up(rate, warmup_epochs / epochs, start)
        clean = train.clean_labels
        wrong = None if clean is None else clean != train.one_label_each("clean labels")
        self.updater = Updater(
            Run(
                model=model,
                shape=train.shape,
                classes=classes,
                rows=len(train),
                inputs=inputs,
                masks=bool(places),
                epochs=epochs,
                batch_size=batch_size,
                device=ranks.device,
                seed=seed,
                label_smoothing=label_smoothing,
                classifier=classifier,
                least_rows=least,
                drop_last=drop_last,
                accumulate=accumulate,
                ranks=ranks,
                fresh=fresh,
                images_vary=augment != "none"
                or isinstance(train, DatasetData)
                or any(type(s).transform is not Strategy.transform for s in strategies),
            ),
            strategies,
            feed,
            optimizer=lambda parameters: build_optimizer(optimizer, parameters, lr, momentum, weight_decay),
            schedule=rate,
            amp=AMP_TYPES[amp],
            accumulate=accumulate,
            max_grad_norm=max_grad_norm,
            ema_decay=ema_decay,
            compile=compile,
            samples=SampleLog(len(train), ranks.device, wrong),
            last_checkpoint=self._last_checkpoint,
        )
        """Makes the updates."""
        self.run, self.ranks, self.device, self.model = self.updater.run, ranks, ranks.device, self.updater.model
        self.strategies, self.feed, self.optimizer = self.updater.strategies, feed, self.updater.optimizer
        self.samples = self.updater.samples
        self.batches = EpochBatches(len(train), batch_size, epochs, derived_seed(seed, "order"), least, drop_last)
        self.history: list[dict[str, Any]] = []
        """One row per epoch, as in metrics.jsonl."""
        self._rng: tuple[Tensor, Tensor | None] | None = None
        """States of torch's random generators from which this run continues; None before it has begun."""
        self.directory = self._open(out, overwrite=overwrite, resume=resume)

    @property
    def counts(self) -> Counts:
        """Counts of updates and samples, and the seconds spent, so far."""
        return self.updater.counts

    def _feed(self, data: Labelled, device: torch.device, **options: Any) -> Feed | DatasetFeed:
        return feed_of(data, self.statistics, device=device, workers=self.workers, **options)

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
            if self.keep_best and self.history and not self.ranks.first((path / BEST).exists):
                warnings.warn(
                    f"keep_best: the weights of earlier epochs are gone, so that {BEST} will be there only if a later "
                    "epoch is better than all of them",
                    stacklevel=3,
                )
            if (before := self.ranks.first(lambda: directory.epochs_before)) is not None:
                self._check_extended(path, before)
                self.ranks.first(lambda: directory.extend(len(self.history)))
        return directory

    def _check_extended(self, path: Path, before: int) -> None:
        """Warns how a run changes that is resumed for more epochs than it was started with, or rejects it.

        Raises:
            UserError: a strategy divides its epochs into steps.
        """
        now, done = self.run.epochs, len(self.history)
        divided = next((s for s in self.strategies if s.divides_epochs), None)
        if divided is not None:
            raise UserError(
                f"epochs was {before}, now {now}: {divided.name} divides its epochs into steps, so that it cannot be "
                "resumed with more of them"
            )
        last = f", {self.history[-1]['lr']:.3g} at its end," if self.history else ""
        warnings.warn(
            f"{path} was to end after {before} epochs, and now after {now}: the schedule {self.settings['schedule']}, "
            f"and those of strategies, reach over {now}; after epoch {done} the learning rate{last} goes on at "
            f"{self.updater.base_rates[0] * self.updater.schedule(done / now):.3g}",
            stacklevel=4,
        )

    def _save(self) -> None:
        """Saves a checkpoint with all that a later process needs to reach the same weights."""
        directory = self.directory
        if directory is None:
            return
        self.updater.check_finite()
        generators = self.ranks.collect(torch_states(self.device))
        self.ranks.first(lambda: directory.save_checkpoint(self._state(generators)))

    def _state(self, generators: list[tuple[Tensor, Tensor | None]]) -> dict[str, Any]:
        """The contents of a checkpoint. ``generators``: the states of torch's random generators of each rank."""
        (rng, cuda_rng), *others = generators
        return {
            "epochs_done": len(self.history),
            **self.updater.state_dict(),
            "batches": self.batches.state_dict(),
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
        # The checkpoint is intact, but the user's own model, optimizer or strategy is not the one that was saved.
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{CHECKPOINT} does not fit this training: {reason}") from error

    def _take(self, state: dict[str, Any]) -> None:
        if state["epochs_done"] > self.run.epochs:
            raise ValueError(f"epochs_done is {state['epochs_done']}")
        self.updater.load_state_dict(state)
        self.batches.load_state_dict(state["batches"])
        self._rng = [(state["rng"], state["cuda_rng"]), *state["rng_of_other_ranks"]][self.ranks.rank]
        torch.Generator().set_state(self._rng[0])  # raises here if the state is invalid

    # --- the training ------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Trains to the end, from the current state; returns the last row of :attr:`history`.

        Raises:
            UserError: the loss is not finite, or a file cannot be written.
            Interrupted: Ctrl-C was pressed. The current update is completed and a checkpoint saved first; a second
                Ctrl-C stops at once.
        """
        self.model.train()
        label = "+".join(s.name for s in self.strategies) or "baseline"
        stop = StopRequest(several=self.ranks.world > 1)
        shown = self.progress and self.ranks.rank == 0
        with self._directory_held(), contextlib.ExitStack() as ending:
            ending.callback(self.feed.forget)
            self.ranks.first(lambda: self._call_back("on_train_begin", self))
            ending.callback(self._call_back, "on_train_end")
            with self._own_rng(), stop.heeded(), ProgressBar(label, enabled=shown) as bar:
                self._prepare()
                for batch in self.plan():
                    started = time.perf_counter()
                    self.updater.update(batch)
                    if batch.ends_epoch and self.device.type == "cuda":
                        torch.cuda.synchronize(self.device)  # queued work counts as training time
                    self.counts.seconds += time.perf_counter() - started
                    if self.updater.window.batches:
                        continue  # a checkpoint does not hold accumulated gradients
                    if batch.ends_epoch:
                        self._end_epoch(batch.epoch)
                        if self._stopped_by_callback():
                            break
                    elif self.checkpoint_every and self.counts.updates % self.checkpoint_every == 0:
                        self._save()
                    if bar.due() and not batch.ends_epoch:  # the sums were just reset
                        self._show(bar, batch.progress)
                    if self.ranks.agree(stop.made):
                        stop.made = False  # a further Ctrl-C does not end the saving
                        self._interrupt()
            return self._finish()

    def _call_back(self, method: str, *arguments: Any) -> list[Any]:
        if self.ranks.rank > 0:
            return []
        methods = [getattr(callback, method, None) for callback in self.callbacks]
        return [call(*arguments) for call in methods if call is not None]

    def _stopped_by_callback(self) -> bool:
        if not self.callbacks:
            return False
        return self.ranks.first(lambda: True in self._call_back("on_epoch_end", self.history[-1]))

    def _prepare(self) -> None:
        """Runs the preparation of the strategies before the first update, and saves a checkpoint if there was any."""
        if self.counts.samples_forward:
            return
        started = time.perf_counter()
        for strategy in self.strategies:
            strategy.prepare(self.updater.beside)
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
        """Restores torch's random generators to the states of this run, in case other code has used them since."""
        if self._rng is None:
            # Each rank uses its own dropout masks.
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
        loss, correct, rows, *_ = self.updater.sums.tolist()
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
        self.updater.check_finite()
        loss, correct, rows, objective, trained = self.updater.sums.tolist()
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
        best = max((before["test_accuracy"] for before in self.history), default=-1.0)
        self.history.append(row)
        self.updater.sums.zero_()
        if self.directory:
            if self.keep_best and row["test_accuracy"] > best:
                with self._averaged():
                    self.ranks.first(partial(self.directory.save_tensors, BEST, self.model.state_dict()))
            self.ranks.first(partial(self.directory.append_metrics, row))
        self._save()

    def _averaged(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.updater.average is None else self.updater.average.applied()

    def _finish(self) -> dict[str, Any]:
        if self.updater.average is not None:
            self.updater.average.apply()
        if self.counts.updates == 0:
            warnings.warn(
                "the training has made no update, so the model is what it was: its strategies selected fewer samples "
                "than a batch has",
                stacklevel=3,
            )
        if self.directory:
            self.ranks.first(partial(self._write_results, self.directory))
        for strategy in self.strategies:
            strategy.finish(self.run)
        return self.history[-1]

    def _write_results(self, directory: RunDirectory) -> None:
        # The weights come last: they mark the run as finished.
        directory.save_preprocessing(encoded(self.preprocessing))
        directory.save_tensors(WEIGHTS, self.model.state_dict())
        directory.save_tensors(SAMPLES, self.samples.samples())
        from batchkern.plots import plot_run

        with only_warned(f"{directory.path / CURVES} is not drawn"):
            plot_run(directory.path)

    # --- evaluation ---------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """Accuracy and mean cross entropy on the test set; for masks, over all places that are not ignored.

        ``test_accuracy`` is the accuracy of :meth:`predict`. ``test_accuracy_plain`` and ``test_loss`` are computed
        from the model's own logits, whatever the strategies do at inference. With more than five classes there is also
        ``test_top5_accuracy``: how often the label is among the five classes with the highest scores.
        """
        voted = top = plain = loss = 0.0
        places, several = 0, self.run.classes > 5
        for _, target, logits, scores in self._inference(self.test_feed):
            voted += float((scores.argmax(1) == target).sum())
            top += float((scores.topk(5, 1).indices == target[:, None]).sum()) if several else 0.0
            plain += float((logits.argmax(1) == target).sum())
            loss += float(F.cross_entropy(logits.float(), target, reduction="sum"))
            places += int((target != IGNORED).sum())
        sums = (sum(parts) for parts in zip(*self.ranks.collect((places, voted, plain, loss, top)), strict=True))
        count, *figures = sums
        voted, plain, loss, top = (figure / max(count, 1) for figure in figures)
        found = {"test_accuracy": voted, "test_accuracy_plain": plain, "test_loss": loss}
        return found | ({"test_top5_accuracy": top} if several else {})

    def _accuracy(self, feed: Feed | DatasetFeed) -> float:
        """The accuracy of the predictions that :meth:`predict` makes."""
        correct = places = 0
        for _, target, _, scores in self._inference(feed):
            correct += int((scores.argmax(1) == target).sum())
            places += int((target != IGNORED).sum())
        correct, places = (sum(parts) for parts in zip(*self.ranks.collect((correct, places)), strict=True))
        return correct / max(places, 1)

    def predict(self, data: Labelled | Data) -> Tensor:
        """Predicted classes ``(N,)`` int64 on the CPU, or ``(N, *places)`` for masks. A strategy may change the
        inference, for example to a majority vote."""
        data = as_labelled("data", data, self.classes)
        check_same_kind("data", data, self.feed.data)
        if data.shape != self.run.shape:
            raise UserError(f"data has inputs of shape {data.shape}; the model was trained on {self.run.shape}")
        feed = self._feed(data, self.device, classes=self.run.classes)
        mine = {place: scores.argmax(1).cpu() for place, _, _, scores in self._inference(feed)}
        predicted = {place: classes for part in self.ranks.collect(mine) for place, classes in part.items()}
        return torch.cat([predicted[place] for place in sorted(predicted)])

    @torch.no_grad()
    def _inference(self, feed: Feed | DatasetFeed) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Number, labels, logits and class scores of each batch. Whole batches are dealt to the ranks in turn, so that
        the noise of a vote is the same as in a single process."""
        training = self.model.training
        with contextlib.ExitStack() as ending:
            ending.enter_context(self._averaged())
            ending.callback(feed.forget)
            ending.callback(self.model.train, training)
            self.ranks.copy_first(self.model.buffers())  # batch norm's running statistics differ from rank to rank
            self.model.eval()
            batches = torch.arange(len(feed.data)).split(EVALUATION_BATCH)
            mine = range(self.ranks.rank, len(batches), self.ranks.world)
            for place in mine:
                for due in range(place, len(batches), self.ranks.world)[: feed.depth + 1]:
                    feed.prepare(batches[due], None)
                images, target = feed.batch(batches[place], None)
                with self.updater.autocast():
                    logits = self.updater.compiled(images)
                    inferred = (s.infer(self.run, images) for s in self.strategies)
                    scores = next((x for x in inferred if x is not None), logits)
                yield place, target, logits, scores
