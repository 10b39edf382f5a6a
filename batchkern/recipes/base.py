"""What a recipe is, and what becomes of it at a smaller scale."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from batchkern.compare.arms import BASELINE
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
    converged: tuple[int, int] | None = None
    """The epochs in which the training losses converged."""
    update_seconds: tuple[float, float] | None = None
    """The time of an update."""

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


def others(recipe: Recipe, results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What the paper gives beside accuracies: the name of a figure, published and measured, of baseline and strategy.

    Epochs to convergence are medians over the seeds; the paper does not say when a loss has converged, so that the
    changes are to be compared and not the epochs.
    """
    entries = {entry["arm"]: entry for entry in results["summary"]}
    rows = []
    for name, published, of in (
        ("epochs until the training loss converged", recipe.published.converged, _epochs_to_converge),
        ("milliseconds an update", recipe.published.update_seconds, _update_seconds),
    ):
        if published is None:
            continue
        pairs = [(BASELINE, published[0]), (recipe.strategy, published[1])]
        found = [of(entries.get(arm)) for arm, _ in pairs]
        scale = 1000 if published is recipe.published.update_seconds else 1
        for (arm, value), own in zip(pairs, found, strict=True):
            rows.append((f"{name}, {arm}", f"{scale * value:g}", "-" if own is None else f"{scale * own:.3g}"))
        rows.append((f"{name}, change", _change(*published), _change(*found)))
    return rows


def _epochs_to_converge(entry: dict[str, Any] | None) -> float | None:
    return entry["converged"]["median"] if entry and entry.get("converged") else None


def _update_seconds(entry: dict[str, Any] | None) -> float | None:
    return entry["seconds"] / entry["updates"] if entry and entry.get("updates") else None


def _change(before: float | None, after: float | None) -> str:
    """Of the baseline's: the paper divides by the strategy's own number of epochs, which makes gains look larger."""
    if before is None or after is None:
        return "-"
    return f"{100 * (after - before) / before:+.1f} %"


def _per_cent(figure: dict[str, Any], offset: float, factor: float) -> tuple[float, float | None]:
    half = figure["half_width"]
    return offset + factor * figure["mean"], None if half is None else 100 * half
