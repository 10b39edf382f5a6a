"""What a recipe is, and what becomes of it at a smaller scale."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from batchkern.compare.arms import BASELINE
from batchkern.schedules import RateSchedule, step
from batchkern.strategies import HardBatches, PassiveInjection, Stepwise, Strategy, Trimming, parse

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
    "The paper's ± is the 95 % interval over the test batches of one model, as in its authors' program. The measured ± "
    "is the interval over seeds. The paper's does not say how much trainings differ."
)
FIVE_SEEDS = "The paper does not give the number of runs. We use five seeds."

TOP5 = "top-5 accuracy (%)"
TRAINING = "accuracy on the training set (%)"
MEDIAN = "error (%), median of the last five epochs"
EPOCHS = "epochs until the training loss converged"
MILLISECONDS = "milliseconds an update"
"""What tables say beside their main figure."""


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
    weights: str | Path | None = None
    drop_last: bool = False


@dataclass(frozen=True)
class Published:
    """Two cells of a table, in per cent."""

    metric: Literal["error", "accuracy", "gap"]
    """Of the test set; gap: accuracy on the training set less that on the test set."""
    baseline: float
    method: float
    intervals: tuple[float | None, float | None] = (None, None)
    """What stands after the two figures and a plus-minus sign; :data:`OVER_BATCHES` says of what."""
    beside: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """What else the table says of baseline and strategy, by names of :data:`batchkern.recipes.reproduction.BESIDE`."""

    steps: tuple[float, ...] = ()
    """The strategy's accuracy at the end of each of its steps."""

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
    also: tuple[str, ...] = ()
    """Other tables that have the same row."""
    share: float = 1.0
    """Of the training set."""
    center_crop: bool = False
    """As of :func:`batchkern.data.load`."""

    @property
    def tables(self) -> tuple[str, ...]:
        """The names of its tables, such as passive/table-2."""
        return tuple(table_name(self.name, table) for table in (self.table, *self.also))


@dataclass(frozen=True)
class LeftOut:
    """Rows of a paper's tables that cannot be run."""

    paper: str
    rows: str
    reason: str


ROMAN = {"i": 1, "ii": 2, "iii": 3, "iv": 4, "v": 5, "vi": 6, "vii": 7}


def table_name(recipe: str, table: str) -> str:
    """``Table II`` of the paper that the recipe is of: passive/table-2. Of a section section-iv-b2."""
    kind, number = table.lower().split(" ")
    return f"{recipe.partition('/')[0]}/{kind}-{ROMAN.get(number, number) if kind == 'table' else number}"


def grouped(recipes: Iterable[Recipe]) -> list[tuple[Recipe, ...]]:
    """The recipes that one comparison is made of: all but their strategies are alike, no two inject different sets, and
    they share a baseline."""
    groups: list[list[Recipe]] = []
    for recipe in recipes:
        fitting = (group for group in groups if all(_share_a_baseline(recipe, other) for other in group))
        group = next(fitting, None)
        if group is None:
            groups.append(group := [])
        group.append(recipe)
    return [tuple(group) for group in groups]


def _share_a_baseline(a: Recipe, b: Recipe) -> bool:
    alike = ("data", "share", "model", "image_size", "center_crop", "training", "seeds")
    same = all(getattr(a, name) == getattr(b, name) for name in alike)
    return (
        same and a.published.metric == b.published.metric and (a.passive == b.passive or None in (a.passive, b.passive))
    )


def passive_of(group: Iterable[Recipe]) -> str | None:
    """The set that its recipes inject."""
    return next((recipe.passive for recipe in group if recipe.passive), None)


def milestones(*epochs: int, of: int, gamma: float) -> step:
    """A rate multiplied by ``gamma`` at these epochs, which move with the length of the training."""
    return step(tuple(epoch / of for epoch in epochs), gamma)


def scaled(group: Sequence[Recipe], scale: float, rows: int, classes: int) -> tuple[tuple[Recipe, ...], int]:
    """The recipes of a group with fewer epochs, and the training rows to keep of ``rows``.

    Both are multiplied by ``scale``, in (0, 1], as far as the strategies can still do what they do: a training set
    keeps 10 batches and a row for each class; there is an epoch at least, or two for what selects by the losses of the
    first, one a step, or as many as inject a passive batch.
    """
    training = group[0].training
    size, epochs = training.batch_size, training.epochs
    rows = round(group[0].share * rows)
    kept = min(rows, max(round(scale * rows), LEAST_BATCHES * size, classes))
    least = max(_least_epochs(recipe, -(-kept // size)) for recipe in group)
    fewer = replace(training, epochs=min(epochs, max(round(scale * epochs), least)))
    return tuple(replace(recipe, training=fewer) for recipe in group), kept


def _least_epochs(recipe: Recipe, batches: int) -> int:
    return max(_least_epochs_of(strategy, batches) for strategy in parse(recipe.strategy, passive=""))


def _least_epochs_of(strategy: Strategy, batches: int) -> int:
    if isinstance(strategy, Stepwise):
        return len(strategy.fractions)
    if isinstance(strategy, PassiveInjection):
        assert isinstance(strategy.every, int)
        return math.ceil(strategy.every / batches)
    # Trimming keeps all rows in the first epoch; hard batches are unknown before its end.
    return 2 if isinstance(strategy, Trimming | HardBatches) else 1


def comparison_arguments(
    group: Sequence[Recipe],
    *,
    out: Path,
    test: str | None = None,
    train_rows: int | None = None,
    amp: str = "none",
    device: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> dict[str, Any]:
    """The arguments of the :class:`batchkern.compare.Comparison` that a group of recipes is: the baseline, each
    strategy and its random control, for as many epochs each, as the papers have it."""
    recipe = group[0]
    return {
        "data": recipe.data,
        "test": test,
        "passive": passive_of(group),
        "image_size": recipe.image_size,
        "center_crop": recipe.center_crop,
        "model": recipe.model,
        "out": out,
        "arms": (BASELINE, *(recipe.strategy for recipe in group)),
        "seeds": recipe.seeds,
        "budgets": ("epochs",),
        "train_rows": train_rows,
        "training": {**vars(recipe.training), "amp": amp, "device": device},
        "overwrite": overwrite,
        "resume": resume,
    }
