"""``batchkern compare``."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    PretrainedOption,
    ScheduleOption,
    SmoothingOption,
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
from batchkern.cli._tables import make_table, print_tables
from batchkern.compare import ARMS, BUDGETS, RESULTS, Comparison, run, split_arms
from batchkern.compare.report import CSV, REPORT, costs, effects, notes, verdict
from batchkern.errors import UserError
from batchkern.files import slug
from batchkern.strategies import wants_passive

if TYPE_CHECKING:
    from rich.table import Table


def compare(
    data: DataOption = "digits",
    label: LabelOption = None,
    test: TestOption = None,
    arms: Annotated[
        str, option(help='strategies, such as "all, trimming(end=0.3)"; all: the five, which is the default')
    ] = "",
    arm: Annotated[
        list[str] | None, option(help='one more: "trimming+augmentation"; may be given several times')
    ] = None,
    no_controls: Annotated[
        bool, option("--no-controls", help="without random controls for arms that select by loss")
    ] = False,
    passive: Annotated[str | None, option(help="as for train; photo-patches if --data is digits")] = None,
    seeds: Annotated[int, option(help="runs of each arm")] = 3,
    budget: Annotated[
        str, option(help="what is equal for all arms: epochs, updates, cost (samples forward and backward), or several")
    ] = ("updates, cost"),
    train_rows: Annotated[int | None, option(help="train on this number of images, the same in all runs")] = None,
    test_rows: Annotated[int | None, option(help="test on this number of images, the same in all runs")] = None,
    validation: ValidationOption = None,
    noise: NoiseOption = 0.0,
    clean_labels: CleanLabelsOption = None,
    jobs: Annotated[int | None, option(help="number of parallel runs; default: CPU cores, or one per GPU")] = None,
    model: ModelOption = None,
    epochs: EpochsOption = 15,
    batch_size: BatchSizeOption = 32,
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
    weights: WeightsOption = None,
    pretrained: PretrainedOption = False,
    classifier: ClassifierOption = None,
    device: DeviceOption = None,
    out: Annotated[Path | None, option(help="default: runs/compare-<data>-<model>")] = None,
    overwrite: OverwriteOption = False,
    resume: Annotated[
        bool, option("--resume", help="continue the comparison in --out; arms, seeds and budgets may be added")
    ] = False,
) -> None:
    """Find out whether strategies help: on your data, against the baseline and random controls, over several seeds.

    For each seed, every arm has the same initial weights and order of the data. It trains once for as many updates as
    the baseline, and once for as many samples forward and backward. The defaults are for digits, where they take some
    minutes on two cores. A comparison that was killed continues with --resume.
    """
    chosen, passive = _chosen_arms([*split_arms(arms), *(arm or [])], passive, data)
    source = Path(data).stem if Path(data).exists() else data
    model = model or default_model(label)
    comparison = Comparison(
        data=data,
        label=label,
        test=test,
        passive=passive,
        image_size=image_size,
        center_crop=center_crop,
        model=model,
        arms=chosen,
        controls=not no_controls,
        seeds=seeds,
        budgets=tuple(dict.fromkeys(word for word in budget.replace(",", " ").split())),
        train_rows=train_rows,
        test_rows=test_rows,
        validation=validation,
        noise=noise,
        clean_labels=clean_labels,
        training={
            "weights": initial_weights(weights, pretrained),
            "epochs": epochs,
            "batch_size": batch_size,
            "drop_last": drop_last,
            "optimizer": optimizer,
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "schedule": schedule,
            "warmup_epochs": warmup_epochs,
            "max_grad_norm": max_grad_norm,
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "ema_decay": ema_decay,
            "compile": compile,
            "channels_last": False if no_channels_last else None,
            "amp": amp,
            "augment": augment,
            "label_smoothing": label_smoothing,
            "classifier": classifier,
            "device": device,
        },
        out=out or Path("runs", slug(f"compare-{source}-{model}")),
        overwrite=overwrite,
        resume=resume,
    )
    results = run(comparison, jobs=jobs, report=print_run)
    print_comparison(results)
    print(f"in {visible(comparison.out)}: {REPORT}  {RESULTS}  {CSV}, plots, and a directory for each run")
    check_runs(results)


def _chosen_arms(named: Sequence[str], passive: str | None, data: str) -> tuple[tuple[str, ...], str | None]:
    """The arms and their passive set, with the defaults for what was not given."""
    if not all(map(str.strip, named)):
        raise UserError("arm must be a strategy, such as trimming, or baseline, got ''")
    chosen = tuple(map(str.strip, named)) or ARMS
    if passive is None and any(wants_passive(arm) for arm in chosen):
        if data == "digits":
            passive = "photo-patches"
        elif not named:
            print("batchkern: without --passive, the arm passive is left out", file=sys.stderr)
            chosen = tuple(arm for arm in chosen if not wants_passive(arm))
    return chosen, passive


def print_run(outcome: dict[str, Any], ended: int, runs: int) -> None:
    """Prints a line on stderr for a run that has ended."""
    last = outcome["final"]
    error = outcome["error"] and " ".join(outcome["error"].split())
    what = error or f"test accuracy {last['test_accuracy']:.2%}, {last['seconds']:.1f} s"
    place = f"{outcome['arm']}, {outcome['epochs']} epochs, seed {outcome['seed']}"
    print(f"{ended:{len(str(runs))}}/{runs}  {place}: {what}", file=sys.stderr, flush=True)


def print_comparison(results: dict[str, Any]) -> None:
    for budget in results["settings"]["budgets"]:
        print(f"At {BUDGETS[budget]}:\n")
        print_tables(*(filled(rows) for rows in (effects(results, budget), costs(results, budget))))
        print("\n" + "\n".join(verdict(results, budget)) + "\n")
    print("\n".join(textwrap.fill(note, 118) for note in notes(results)))


def filled(rows: Sequence[Sequence[str]]) -> Table:
    table = make_table(*rows[0], numbers=True)
    for row in rows[1:]:
        table.add_row(*row)
    return table


def check_runs(results: dict[str, Any]) -> None:
    """Raises if a run failed; called after the results are printed."""
    failed = [outcome for outcome in results["runs"] if outcome["error"]]
    if failed:
        first = f"arm {failed[0]['arm']}, seed {failed[0]['seed']}: {failed[0]['error']}"
        raise UserError(f"{len(failed)} of {len(results['runs'])} runs failed, the first is {first}")
