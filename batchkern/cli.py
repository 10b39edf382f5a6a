"""The command line: ``batchkern train | compare | info``.

What a user did wrong is one line on stderr and exit status 2, never a traceback; a traceback is a bug of ours.
"""

from __future__ import annotations

import functools
import json
import platform
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import torch

from batchkern import _backend
from batchkern._version import __version__
from batchkern.compare import ARMS, COUNTS, RESULTS, Comparison, check_passive, run, slug, split_arms, wants_passive
from batchkern.data import load, load_pair
from batchkern.errors import UserError, require
from batchkern.plots import SECONDS_PLOT, UPDATES_PLOT, kept_fractions
from batchkern.rundir import CHECKPOINT, CONFIG, CURVES, METRICS, WEIGHTS
from batchkern.strategies import STRATEGIES, parse
from batchkern.trainer import Trainer

try:
    import typer
except ImportError:  # main() says so in a sentence
    typer = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from rich.table import Table

FEW_SEEDS = 10
"""Below this, the note under a comparison warns."""
PIPE_WIDTH = 500


def main() -> NoReturn:
    """The entry point of ``batchkern`` and ``python -m batchkern``."""
    try:
        require("typer", "train")
        require("rich", "train")
    except UserError as error:
        _fail(f"error: {error}")
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        _app()(prog_name="batchkern")
    raise SystemExit(0)


def _app() -> typer.Typer:
    # Plain help and usage errors: rich would break sentences at the edges of a box.
    app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.callback()(_group)
    for command in (train, compare, info):
        app.command()(_in_sentences(command))
    return app


def _in_sentences(command: Callable[..., None]) -> Callable[..., None]:
    """``command``, with what a user did wrong, and Ctrl-C, told in one line."""

    @functools.wraps(command)
    def told(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except UserError as error:
            _fail(f"error: {error}")
        except torch.OutOfMemoryError as error:
            _fail(f"error: out of memory; a smaller --batch-size needs less ({error})")
        except KeyboardInterrupt as stop:
            _fail(str(stop) or "interrupted")

    return told


def _fail(sentence: str) -> NoReturn:
    print("batchkern:", " ".join(sentence.split()), file=sys.stderr)
    raise SystemExit(2)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """In place of Python's two lines with a path and a line of source."""
    print("batchkern: warning:", " ".join(str(message).split()), file=sys.stderr)


# --- options ---------------------------------------------------------------------------------------------------------


def _option(*names: str, help: str) -> Any:
    """Nothing where typer is missing, since this module must load to say so."""
    return typer.Option(*names, help=help) if typer else None


DataOption = Annotated[str, _option(help="digits, a parquet file, a folder of images, or a name on the hub")]
TestOption = Annotated[str | None, _option(help="test data; default: those of --data, else a fifth of it")]
StrategyOption = Annotated[
    str, _option(help=f'{", ".join(STRATEGIES)}; joined, with options: "trimming(end=0.3)+passive(every=20)"')
]
PassiveOption = Annotated[str | None, _option(help="data that the strategy passive injects, e.g. photo-patches")]
ImageSizeOption = Annotated[int | None, _option(help="resize all images to so many pixels square")]
ModelOption = Annotated[str, _option(help="cnn, resnet8, resnet20, resnet56, or any model of timm")]
ClassifierOption = Annotated[str | None, _option(help="the model's last linear layer, where it cannot be found")]
EpochsOption = Annotated[int, _option(help="of the baseline; strategies may visit less in one")]
BatchSizeOption = Annotated[int, _option(help="of the baseline; strategies may change it")]
OptimizerOption = Annotated[str, _option(help="sgd, adam or adamw")]
LrOption = Annotated[float, _option(help="learning rate, at the start of the schedule")]
MomentumOption = Annotated[float, _option(help="of sgd; the first beta of adam and adamw")]
WeightDecayOption = Annotated[float, _option(help="of the optimizer")]
ScheduleOption = Annotated[str, _option(help="of the learning rate: constant, cosine or step")]
AmpOption = Annotated[str, _option(help="mixed precision: none, bf16 or fp16")]
AugmentOption = Annotated[str, _option(help="none, flip, crop or crop+flip")]
SmoothingOption = Annotated[float, _option(help="label smoothing of the training loss, in [0, 1]")]
DeviceOption = Annotated[str | None, _option(help="cpu, cuda or cuda:N; default: cuda where there is one")]
OverwriteOption = Annotated[bool, _option("--overwrite", help="replace the files that batchkern wrote in --out")]


def _print_version(asked: bool) -> None:
    if asked:
        print(f"batchkern {__version__}")
        raise SystemExit(0)


def _group(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Training with selected mini-batches: five published strategies, and random selection as their control."""


# --- train -----------------------------------------------------------------------------------------------------------


def train(
    data: DataOption,
    test: TestOption = None,
    strategy: StrategyOption = "baseline",
    passive: PassiveOption = None,
    model: ModelOption = "cnn",
    epochs: EpochsOption = 15,
    batch_size: BatchSizeOption = 64,
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
    seed: Annotated[int, _option(help="of the weights, the order and every choice")] = 0,
    device: DeviceOption = None,
    out: Annotated[Path | None, _option(help="default: runs/<data>-<strategies>-<model>-s<seed>")] = None,
    resume: Annotated[bool, _option("--resume", help="go on from the checkpoint in --out")] = False,
    overwrite: OverwriteOption = False,
    checkpoint_every: Annotated[
        int | None, _option(help="also write a checkpoint after every so many updates; after an epoch always")
    ] = None,
    no_progress: Annotated[bool, _option("--no-progress", help="no progress bar")] = False,
) -> None:
    """Train a model, with any combination of strategies."""
    check_passive([strategy], passive)
    train_set, test_set = load_pair(data, test, image_size=image_size)
    strategies = parse(strategy, passive=None if passive is None else load(passive, image_size=image_size))
    if out is None:
        source = Path(data).stem if Path(data).exists() else data
        names = "+".join(s.name for s in strategies) or "baseline"
        out = Path("runs", slug(f"{source}-{names}-{model}-s{seed}"))
    _spare_threads(train_set.shape)
    trainer = TalkingTrainer(
        model,
        train_set,
        test_set,
        strategies=strategies,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,  # type: ignore[arg-type]  # checked by the trainer, as is amp
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        schedule=schedule,
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
        # Without a terminal at stdout the bar, which is on stderr, would draw the lines below to itself.
        progress=not no_progress and sys.stdout.isatty(),
    )
    try:
        row = trainer.fit()
    except KeyboardInterrupt as stop:
        said = str(stop) or f"interrupted; resume from the last checkpoint in {out}"
        raise KeyboardInterrupt(f"{said}: {_resume_command()}") from None
    print(f"test accuracy {row['test_accuracy']:.2%} after {trainer.counts.updates:,} updates; in {out}:")
    print("  " + "  ".join((CONFIG, METRICS, CHECKPOINT, WEIGHTS, CURVES)))


class TalkingTrainer(Trainer):
    """Prints a line after each epoch."""

    def _end_epoch(self, epoch: int) -> None:
        super()._end_epoch(epoch)
        row, before = self.history[-1], self.history[-2] if len(self.history) > 1 else {}
        seen, seconds = (row[key] - before.get(key, 0) for key in ("samples_seen", "seconds"))
        print(
            f"epoch {epoch + 1:{len(str(self.run.epochs))}}/{self.run.epochs}"
            f"  train loss {row['train_loss']:.4f}  kept {kept_fractions(self.history)[-1]:4.0%}"
            f"  test accuracy {row['test_accuracy']:6.2%}  {seen / max(seconds, 1e-9):,.0f} samples/s",
            flush=True,
        )


def _spare_threads(shape: tuple[int, int, int]) -> None:
    """One thread for small images: others would only be waited for.

    The cnn on 8x8 digits trains as fast with one thread as with two on two idle cores, and ten times as fast where
    anything else runs on them. A rule, not a measurement: the number of threads changes the last bits of a result.
    """
    _, height, width = shape
    if height * width <= 16 * 16:
        torch.set_num_threads(1)


def _resume_command() -> str:
    words = [word for word in sys.argv[1:] if word not in ("--overwrite", "--resume")]
    return shlex.join(["batchkern", *words, "--resume"])


# --- compare ---------------------------------------------------------------------------------------------------------


def compare(
    data: DataOption = "digits",
    test: TestOption = None,
    arms: Annotated[str, _option(help='strategies, such as "baseline, trimming(end=0.3)"; default: all')] = "",
    arm: Annotated[list[str] | None, _option(help="one strategy; may be given several times")] = None,
    passive: Annotated[str | None, _option(help="as for train; photo-patches if --data is digits")] = None,
    seeds: Annotated[int, _option(help="runs of each arm")] = 3,
    jobs: Annotated[int | None, _option(help="runs side by side; default: CPU cores, or 1 on a GPU")] = None,
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
    out: Annotated[Path | None, _option(help="default: runs/compare-<data>-<model>")] = None,
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
    _print_tables(comparison_table(results["summary"]))
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
    table = _table(*(heading.replace("_", "\n") for heading in headings), numbers=True)
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


# --- info ------------------------------------------------------------------------------------------------------------


def info(as_json: Annotated[bool, _option("--json", help="print JSON")] = False) -> None:
    """Print versions, and what computes each operation."""
    facts = environment()
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    plain = _table("installed", "")
    build = facts["extension"]
    shown = {key: facts[key] for key in ("batchkern", "torch", "python", "cuda")}
    shown["GPU"] = ", ".join(facts["gpus"]) or "none"
    shown["batchkern._C"] = build["why"] or "built"
    for key, value in (build["facts"] or {}).items():
        shown[f"  {key}"] = ", ".join(map(str, value)) if isinstance(value, list) else value
    for key, value in shown.items():
        plain.add_row(key, str(value))
    backends = _table("operation", "device", "backend", "why")
    for entry in facts["operations"]:
        backends.add_row(entry["op"], entry["device"], entry["backend"], entry["why"])
    _print_tables(plain, backends)


def environment() -> dict[str, Any]:
    """What ``info`` says, as JSON."""
    extension = _backend.extension
    return {
        "batchkern": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "none: this torch is for the CPU",
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "extension": {
            "facts": None if extension is None else extension.build_facts(),
            "why": _backend.extension_error,
        },
        "operations": [asdict(entry) for entry in _backend.status()],
    }


# --- tables ----------------------------------------------------------------------------------------------------------


def _table(*headings: str, numbers: bool = False) -> Table:
    """Columns of words, or one and then ``numbers``."""
    box, table = require("rich.box", "train"), require("rich.table", "train").Table
    made: Table = table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 0 if numbers else 1), pad_edge=False)
    for place, heading in enumerate(headings):
        made.add_column(heading, justify="right" if numbers and place else "left", overflow="fold")
    return made


def _print_tables(*tables: Table) -> None:
    console = require("rich.console", "train").Console
    for place, table in enumerate(tables):
        if place:
            print()
        # In a pipe nothing says how wide a line may be, and rich would guess 80 columns and break them.
        (console() if sys.stdout.isatty() else console(width=PIPE_WIDTH)).print(table)
