"""``batchkern train``."""

from __future__ import annotations

import math
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist

from batchkern.callbacks import Callback, Row, loggers
from batchkern.cli._options import (
    AccumulationOption,
    AmpOption,
    AugmentOption,
    BatchSizeOption,
    CenterCropOption,
    ClassifierOption,
    CleanLabelsOption,
    CompileOption,
    DataOption,
    DeviceOption,
    DropLastOption,
    EmaOption,
    EpochsOption,
    ImageSizeOption,
    LabelOption,
    LrOption,
    MaxGradNormOption,
    ModelOption,
    MomentumOption,
    NoChannelsLastOption,
    NoiseOption,
    OptimizerOption,
    OverwriteOption,
    PassiveOption,
    PretrainedOption,
    ScheduleOption,
    SmoothingOption,
    StrategyOption,
    TestOption,
    ValidationOption,
    WarmupOption,
    WeightDecayOption,
    WeightsOption,
    default_model,
    initial_weights,
    option,
)
from batchkern.cli._streams import visible
from batchkern.data import load, open_pair, validation_split, with_label_noise
from batchkern.files import slug
from batchkern.plots import kept_fractions
from batchkern.rundir import RUN_FILES
from batchkern.strategies import check_passive, parse
from batchkern.trainer import Trainer


def train(
    data: DataOption,
    label: LabelOption = None,
    test: TestOption = None,
    strategy: StrategyOption = "baseline",
    passive: PassiveOption = None,
    model: ModelOption = None,
    epochs: EpochsOption = 15,
    batch_size: BatchSizeOption = 64,
    drop_last: DropLastOption = False,
    optimizer: OptimizerOption = "sgd",
    lr: LrOption = 0.05,
    momentum: MomentumOption = 0.9,
    weight_decay: WeightDecayOption = 5e-4,
    schedule: ScheduleOption = "cosine",
    warmup_epochs: WarmupOption = 0.0,
    max_grad_norm: MaxGradNormOption = None,
    gradient_accumulation_steps: AccumulationOption = 1,
    ema_decay: EmaOption = None,
    compile: CompileOption = None,
    no_channels_last: NoChannelsLastOption = False,
    amp: AmpOption = "none",
    augment: AugmentOption = "none",
    label_smoothing: SmoothingOption = 0.0,
    image_size: ImageSizeOption = None,
    center_crop: CenterCropOption = False,
    validation: ValidationOption = None,
    noise: NoiseOption = 0.0,
    clean_labels: CleanLabelsOption = None,
    weights: WeightsOption = None,
    pretrained: PretrainedOption = False,
    classifier: ClassifierOption = None,
    seed: Annotated[int, option(help="seed of the weights, the order and all random choices")] = 0,
    device: DeviceOption = None,
    out: Annotated[Path | None, option(help="default: runs/<data>-<strategies>-<model>-s<seed>")] = None,
    resume: Annotated[bool, option("--resume", help="continue from the checkpoint in --out")] = False,
    overwrite: OverwriteOption = False,
    checkpoint_every: Annotated[
        int | None,
        option(
            help="also write a checkpoint each time this many updates are done; one is always written after an epoch"
        ),
    ] = None,
    keep_best: Annotated[
        bool, option("--keep-best", help="also keep the weights of the best epoch, in best.safetensors")
    ] = False,
    log: Annotated[str | None, option(help="also show the figures in tensorboard, wandb, or tensorboard,wandb")] = None,
    no_progress: Annotated[bool, option("--no-progress", help="no progress bar")] = False,
) -> None:
    """Train a model, with any combination of strategies."""
    check_passive([strategy], passive)
    train_set, test_set = open_pair(
        data, test, image_size=image_size, center_crop=center_crop, clean_labels=clean_labels, label=label
    )
    model = model or default_model(label)
    if validation is not None:
        train_set, test_set = validation_split(train_set, validation)
    if noise:
        train_set = with_label_noise(train_set, noise, seed)
    injected = None if passive is None else load(passive, image_size=image_size, center_crop=center_crop)
    strategies = parse(strategy, passive=injected)
    if out is None:
        source = Path(data).stem if Path(data).exists() else data
        names = "+".join(s.name for s in strategies) or "baseline"
        out = Path("runs", slug(f"{source}-{names}-{model}-s{seed}"))
    spare_threads(train_set.shape)
    trainer = Trainer(
        model,
        train_set,
        test_set,
        weights=initial_weights(weights, pretrained),
        strategies=strategies,
        epochs=epochs,
        batch_size=batch_size,
        drop_last=drop_last,
        optimizer=optimizer,  # type: ignore[arg-type]  # checked by the trainer, as is amp
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        schedule=schedule,
        warmup_epochs=warmup_epochs,
        max_grad_norm=max_grad_norm,
        gradient_accumulation_steps=gradient_accumulation_steps,
        ema_decay=ema_decay,
        compile=compile,
        channels_last=False if no_channels_last else None,
        amp=amp,  # type: ignore[arg-type]
        augment=augment,
        label_smoothing=label_smoothing,
        classifier=classifier,
        seed=seed,
        device=device,
        out=out,
        resume=resume,
        overwrite=overwrite,
        checkpoint_every=checkpoint_every,
        keep_best=keep_best,
        callbacks=[PrintedEpochs(), *loggers(log)],
        # If stdout is not a terminal, the lines printed below would not be separate from the bar on stderr.
        progress=not no_progress and sys.stdout.isatty(),
    )
    try:
        row = trainer.fit()
    except KeyboardInterrupt as stop:
        said = str(stop) or f"interrupted; resume from the last checkpoint in {out}"
        raise KeyboardInterrupt(f"{said}: {_resume_command()}") from None
    if trainer.ranks.rank == 0:
        print(f"test accuracy {row['test_accuracy']:.2%} after {trainer.counts.updates:,} updates; in {visible(out)}:")
        print("  " + "  ".join(name for name in RUN_FILES if (out / name).exists()))
    if trainer.ranks.world > 1:
        trainer.ranks.collect(None)  # no process ends while another one still writes
        dist.destroy_process_group()


class PrintedEpochs(Callback):
    """Prints a line after each epoch."""

    def on_train_begin(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def on_epoch_end(self, row: Row) -> None:
        history = self._trainer.history
        before = history[-2] if len(history) > 1 else {}
        seen, seconds = (row[key] - before.get(key, 0) for key in ("samples_seen", "seconds"))
        print(
            f"epoch {row['epoch'] + 1:{len(str(self._trainer.run.epochs))}}/{self._trainer.run.epochs}"
            f"  train loss {row['train_loss']:.4f}  kept {kept_fractions(history)[-1]:4.0%}"
            f"  test accuracy {row['test_accuracy']:6.2%}  {seen / max(seconds, 1e-9):,.0f} samples/s",
            flush=True,
        )


def spare_threads(shape: tuple[int, ...] | None) -> None:
    """Uses one thread for small images and rows of tables, which gain nothing from more threads.

    The cnn on 8x8 digits trains as fast with one thread as with two on two idle cores, and ten times as fast if other
    programs run on them. The number is fixed by a rule and not by a measurement, because it changes the last bits of a
    result.
    """
    if math.prod((shape or ())[1:]) <= 16 * 16:
        torch.set_num_threads(1)


def _resume_command() -> str:
    words = [word for word in sys.argv[1:] if word not in ("--overwrite", "--resume")]
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return shlex.join(["batchkern", *words, "--resume"])
    # Other arguments of torchrun, such as the address for several machines, are not known here.
    launcher = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])]
    return shlex.join([*launcher, "-m", "batchkern", *words, "--resume"])
