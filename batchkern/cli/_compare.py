"""``batchkern compare``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from batchkern.cli._options import (
    AmpOption,
    AugmentOption,
    BatchSizeOption,
    ClassifierOption,
    DataOption,
    DeviceOption,
    EpochsOption,
    ImageSizeOption,
    LrOption,
    ModelOption,
    MomentumOption,
    OptimizerOption,
    OverwriteOption,
    ScheduleOption,
    SmoothingOption,
    TestOption,
    WeightDecayOption,
    option,
)
from batchkern.cli._tables import make_table, print_tables
from batchkern.compare import ARMS, COUNTS, RESULTS, Comparison, run, slug, split_arms, wants_passive
from batchkern.errors import UserError
from batchkern.plots import SECONDS_PLOT, UPDATES_PLOT

if TYPE_CHECKING:
    from rich.table import Table

FEW_SEEDS = 10
"""Below this, the note under a comparison warns."""


def compare(
    data: DataOption = "digits",
    test: TestOption = None,
    arms: Annotated[str, option(help='strategies, such as "baseline, trimming(end=0.3)"; default: all')] = "",
    arm: Annotated[list[str] | None, option(help="one strategy; may be given several times")] = None,
    passive: Annotated[str | None, option(help="as for train; photo-patches if --data is digits")] = None,
    seeds: Annotated[int, option(help="runs of each arm")] = 3,
    jobs: Annotated[int | None, option(help="runs side by side; default: CPU cores, or 1 on a GPU")] = None,
    model: ModelOption = "cnn",
    epochs: EpochsOption = 15,
    batch_size: BatchSizeOption = 32,
    optimizer: OptimizerOption = "sgd",
    lr: LrOption = 0.05,
    momentum: MomentumOption = 0.9,
    weight_decay: WeightDecayOption = 5e-4,
    schedule: ScheduleOption = "cosine",
    amp: AmpOption = "none",
    augment: AugmentOption = "none",
    label_smoothing: SmoothingOption = 0.0,
    image_size: ImageSizeOption = None,
    classifier: ClassifierOption = None,
    device: DeviceOption = None,
    out: Annotated[Path | None, option(help="default: runs/compare-<data>-<model>")] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Compare strategies over several seeds.

    Every strategy, the baseline and the random controls train from the same initial weights and on the same order of
    the data, seed by seed. The defaults suit digits; there they take one or two minutes on two cores.
    """
    chosen, passive = _chosen_arms([*split_arms(arms), *(arm or [])], passive, data)
    source = Path(data).stem if Path(data).exists() else data
    comparison = Comparison(
        data=data,
        test=test,
        passive=passive,
        image_size=image_size,
        model=model,
        arms=chosen,
        seeds=seeds,
        training={
            "epochs": epochs,
            "batch_size": batch_size,
            "optimizer": optimizer,
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "schedule": schedule,
            "amp": amp,
            "augment": augment,
            "label_smoothing": label_smoothing,
            "classifier": classifier,
            "device": device,
        },
        out=out or Path("runs", slug(f"compare-{source}-{model}")),
        overwrite=overwrite,
    )
    results = run(comparison, jobs=jobs, report=_Report(len(chosen) * seeds))
    print_tables(comparison_table(results["summary"]))
    print(comparison_note(results))
    print(f"in {comparison.out}: {RESULTS}  {UPDATES_PLOT}  {SECONDS_PLOT}, and a directory for each run")
    failed = [outcome for outcome in results["runs"] if outcome["error"]]
    if failed:
        first = f"arm {failed[0]['arm']}, seed {failed[0]['seed']}: {failed[0]['error']}"
        raise UserError(f"{len(failed)} of {len(results['runs'])} runs failed, the first is {first}")


def _chosen_arms(named: Sequence[str], passive: str | None, data: str) -> tuple[tuple[str, ...], str | None]:
    """The arms and their passive set, with what is to hold where nothing was said."""
    chosen = tuple(named) or ARMS
    if passive is None and any(wants_passive(arm) for arm in chosen):
        if data == "digits":
            passive = "photo-patches"
        elif not named:
            print("batchkern: without --passive, the arm passive is left out", file=sys.stderr)
            chosen = tuple(arm for arm in chosen if not wants_passive(arm))
    return chosen, passive


class _Report:
    """A line on stderr for each run that has ended."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.ended = 0

    def __call__(self, outcome: dict[str, Any]) -> None:
        self.ended += 1
        last = outcome["rows"][-1:]
        reached = [f"test accuracy {row['test_accuracy']:.2%}, {row['seconds']:.1f} s" for row in last]
        what = f"{outcome['arm']}, seed {outcome['seed']}: {outcome['error'] or reached[0]}"
        print(f"{self.ended:{len(str(self.total))}}/{self.total}  {what}", file=sys.stderr, flush=True)


def comparison_table(summary: Sequence[dict[str, Any]]) -> Table:
    """One row for each arm, from the summary of results.json."""
    columns = [key for key in COUNTS if any(arm[key] is not None for arm in summary)]
    headings = ("arm", "test_accuracy (%)", *columns)
    # In two lines each, so that the usual table fits into 80 columns.
    table = make_table(*(heading.replace("_", "\n") for heading in headings), numbers=True)
    for arm in summary:
        failed = f" ({len(arm['failed'])} failed)" if arm["failed"] else ""
        accuracy = arm["test_accuracy"]
        if accuracy is None:
            table.add_row(arm["arm"] + failed, "-")
            continue
        half = accuracy["half_width"]
        reached = f"{100 * accuracy['mean']:.2f}" + ("" if half is None else f" ± {100 * half:.2f}")
        numbers = ((arm[key], 1 if key == "seconds" else 0) for key in columns)
        table.add_row(arm["arm"] + failed, reached, *("" if n is None else f"{n:,.{digits}f}" for n, digits in numbers))
    return table


def comparison_note(results: dict[str, Any]) -> str:
    """How to read the table."""
    seeds, environment = len(results["settings"]["seeds"]), results["environment"]
    if seeds == 1:
        about = "Accuracy after the last epoch, of one seed: without others, there is no telling chance from effect."
    else:
        about = (
            "Accuracy after the last epoch: mean over the seeds ± half of its 95 % confidence interval "
            f"(Student's t, {seeds - 1} degrees of freedom)."
        )
        if seeds < FEW_SEEDS:
            about += f"\n{seeds} seeds are few: a difference that is small beside these intervals may well be chance."
    return (
        f"{about}\nSeconds are of training alone; {environment['jobs']} at a time, "
        f"{environment['threads_per_run']} CPU threads each, on {environment['cores']} cores."
    )
