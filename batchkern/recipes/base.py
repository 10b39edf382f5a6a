"""What a recipe is, and what becomes of it at a smaller scale."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from batchkern.compare.arms import BASELINE
from batchkern.compare.statistics import converged
from batchkern.schedules import RateSchedule, step
from batchkern.strategies import HardBatches, PassiveInjection, Stepwise, Trimming, parse

LEAST_BATCHES = 10
"""A scaled training set keeps so many batches, which every published strategy can select from."""

# Names on the Hugging Face hub.
CIFAR10 = "uoft-cs/cifar10"
CIFAR100 = "uoft-cs/cifar100"
SVHN = "ufldl-stanford/svhn:cropped_digits"
STL10 = "tanganke/stl10"
GTSRB = "tanganke/gtsrb"
FOOD101 = "ethz/food101"
BIRDSNAP = "sasha/birdsnap"
IMAGENET = "ILSVRC/imagenet-1k"

OVER_BATCHES = (
    "The paper's ± is the 95 % interval over the test batches of one model, as its authors' program computes it; the "
    "measured ± is that over seeds. The first says nothing of how trainings differ."
)
FIVE_SEEDS = "The number of runs is not given: five seeds."


@dataclass(frozen=True)
class Training:
    """The published settings, by the names of the trainer's arguments."""

    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    optimizer: str = "sgd"
    schedule: str | RateSchedule = "constant"
    augment: str = "none"


@dataclass(frozen=True)
class Published:
    """Two cells of a table, in per cent."""

    metric: Literal["error", "accuracy"]
    baseline: float
    method: float
    intervals: tuple[float | None, float | None] = (None, None)
    """What stands after the two figures and a plus-minus sign; :data:`OVER_BATCHES` says of what."""
    beside: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """What else the table says of baseline and strategy, by names of :data:`BESIDE`."""

    @property
    def difference(self) -> float:
        return self.method - self.baseline


@dataclass(frozen=True)
class Recipe:
    """A row of a paper's table that compares a strategy with the plain baseline."""

    name: str
    paper: str
    table: str
    published: Published
    data: str
    model: str
    image_size: int
    strategy: str
    """In the notation of :func:`batchkern.strategies.parse`."""
    training: Training
    seeds: int
    chosen: tuple[str, ...]
    """What the paper leaves open, and what was taken."""
    passive: str | None = None


@dataclass(frozen=True)
class LeftOut:
    """Rows of a paper's tables that cannot be run."""

    paper: str
    rows: str
    reason: str


def milestones(*epochs: int, of: int, gamma: float) -> step:
    """A rate multiplied by ``gamma`` at these epochs, which move with the length of the training."""
    return step(tuple(epoch / of for epoch in epochs), gamma)


def scaled(recipe: Recipe, scale: float, rows: int, classes: int) -> tuple[Recipe, int]:
    """The recipe with fewer epochs, and the training rows to keep of ``rows``.

    Both are multiplied by ``scale``, in (0, 1], as far as the strategy can still do what it does: a training set keeps
    10 batches and a row for each class; epochs are at least two, or one a step, or as many as inject a passive batch.
    """
    size, epochs = recipe.training.batch_size, recipe.training.epochs
    kept = min(rows, max(round(scale * rows), LEAST_BATCHES * size, classes))
    fewer = min(epochs, max(round(scale * epochs), _least_epochs(recipe, -(-kept // size))))
    return replace(recipe, training=replace(recipe.training, epochs=fewer)), kept


def _least_epochs(recipe: Recipe, batches: int) -> int:
    (strategy,) = parse(recipe.strategy, passive="")
    if isinstance(strategy, Stepwise):
        return len(strategy.fractions)
    if isinstance(strategy, PassiveInjection):
        assert isinstance(strategy.every, int)
        return math.ceil(strategy.every / batches)
    # Trimming keeps all rows in the first epoch; hard batches are unknown before its end.
    return 2 if isinstance(strategy, Trimming | HardBatches) else 1


def comparison_arguments(
    recipe: Recipe,
    *,
    out: Path,
    test: str | None = None,
    train_rows: int | None = None,
    amp: str = "none",
    device: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> dict[str, Any]:
    """The arguments of the :class:`batchkern.compare.Comparison` that a recipe is: the baseline, the strategy and its
    random control, for as many epochs each, as the papers have it."""
    return {
        "data": recipe.data,
        "test": test,
        "passive": recipe.passive,
        "image_size": recipe.image_size,
        "model": recipe.model,
        "out": out,
        "arms": ("baseline", recipe.strategy),
        "seeds": recipe.seeds,
        "budgets": ("epochs",),
        "train_rows": train_rows,
        "training": {**vars(recipe.training), "amp": amp, "device": device},
        "overwrite": overwrite,
        "resume": resume,
    }


def measured(recipe: Recipe, results: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    """What a comparison found, by arm, in per cent of the recipe's metric: mean and half of the 95 % interval.

    Under ``"difference"`` that of the strategy less the baseline, paired by seed. An arm that failed is not there.
    """
    error = recipe.published.metric == "error"
    found: dict[str, tuple[float, float | None]] = {}
    for entry in results["summary"]:
        if entry["test_accuracy"] is not None:
            found[entry["arm"]] = _per_cent(entry["test_accuracy"], 100.0 if error else 0.0, -100 if error else 100)
        if entry["arm"] == recipe.strategy and (entry.get("difference") or {}).get("baseline"):
            found["difference"] = _per_cent(entry["difference"]["baseline"], 0.0, -100 if error else 100)
    return found


Outcome = Mapping[str, Any]


def _of_last(name: str) -> Callable[[Outcome], float | None]:
    def per_cent(outcome: Outcome) -> float | None:
        value = outcome["final"].get(name)
        return None if value is None else 100 * value

    return per_cent


def _converged(outcome: Outcome) -> float | None:
    losses = outcome["curve"].get("train_loss")
    return converged(losses) if losses else None


TOP5 = "top-5 accuracy (%)"
TRAINING = "accuracy on the training set (%)"
MEDIAN = "error (%), median of the last five epochs"
EPOCHS = "epochs until the training loss converged"
MILLISECONDS = "milliseconds an update"
BESIDE: dict[str, tuple[Callable[[Outcome], float | None], Callable[[list[float]], float]]] = {
    TOP5: (_of_last("test_top5_accuracy"), statistics.fmean),
    TRAINING: (_of_last("train_set_accuracy"), statistics.fmean),
    MEDIAN: (lambda run: 100 - 100 * statistics.median(run["curve"]["test_accuracy"][-5:]), statistics.fmean),
    EPOCHS: (_converged, statistics.median),
    MILLISECONDS: (lambda run: 1000 * run["final"]["seconds"] / run["final"]["updates"], statistics.fmean),
}
"""Of a run, and over the seeds."""


def beside(recipe: Recipe, results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What the paper gives beside its main figure: the name, published and measured, of baseline, strategy, difference.

    The paper on hard batches does not say when a loss has converged, so that differences are to be compared, and not
    epochs. It gives them relative to its strategy's own epochs; here they are relative to the baseline's.
    """
    rows = []
    for name, published in recipe.published.beside.items():
        of, over_seeds = BESIDE[name]
        found: list[float | None] = []
        for arm in (BASELINE, recipe.strategy):
            runs = [run for run in results.get("runs", ()) if run["arm"] == arm and not run["error"]]
            values = [value for run in runs if (value := of(run)) is not None]
            found.append(over_seeds(values) if values else None)
        relative = name in (EPOCHS, MILLISECONDS)
        for arm, value, own in zip((BASELINE, recipe.strategy), published, found, strict=True):
            rows.append((f"{name}, {arm}", f"{value:g}", "-" if own is None else f"{own:.4g}"))
        rows.append((f"{name}, difference", _difference(published, relative), _difference(found, relative)))
    return rows


def _difference(pair: Sequence[float | None], relative: bool) -> str:
    before, after = pair
    if before is None or after is None:
        return "-"
    return f"{100 * (after - before) / before:+.1f} %" if relative else f"{after - before:+.2f}"


def _per_cent(figure: dict[str, Any], offset: float, factor: float) -> tuple[float, float | None]:
    half = figure["half_width"]
    return offset + factor * figure["mean"], None if half is None else 100 * half
