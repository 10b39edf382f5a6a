"""The definition of a comparison, and the single trainings that it consists of."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from batchkern.compare.arms import ARMS, BASELINE, BUDGETS, described, with_controls
from batchkern.data import ImageData, Labelled, load, open_pair, subset, validation_split, with_label_noise
from batchkern.errors import UserError
from batchkern.files import slug
from batchkern.initial_weights import check_outside
from batchkern.rundir import CHECKPOINT, CONFIG, METRICS
from batchkern.strategies import Trimming, check_passive, parse
from batchkern.trainer import Trainer
from batchkern.validation import check_flags, check_kind, check_number, count

MOST_SEEDS = 100_000
_OF_A_RUN = {
    "self",
    "model",
    "train",
    "test",
    "strategies",
    "seed",
    "out",
    "overwrite",
    "resume",
    "progress",
    "callbacks",
}
TRAINING = frozenset(inspect.signature(Trainer.__init__).parameters) - _OF_A_RUN
"""Arguments of :class:`Trainer` that are the same in all runs."""


@dataclass(frozen=True)
class Comparison:
    """The definition of a comparison.

    Args:
        data, label, test, image_size, center_crop: as for :func:`batchkern.data.load_pair`.
        model: a name for :func:`batchkern.models.build`.
        out: the directory of the comparison, with a directory ``<arm>/<epochs>-epochs/seed-<s>`` for each run.
        passive: the passive set, if an arm injects one.
        arms: in the notation of :func:`batchkern.strategies.parse`; the baseline is added if it is missing.
        controls: add the random control of each arm that selects by loss.
        seeds: number of seeds, which are 0, 1, ...
        budgets: names in :data:`BUDGETS`. An arm trains for the number of epochs in which it uses the same budget as
            the baseline, and its learning rate decays over these epochs. An arm with the same number of epochs in two
            budgets trains once.
        validation: hold out this fraction of the training set, and test on it instead of the test set.
        train_rows, test_rows: use a stratified part of this size, the same in all runs.
        noise: fraction of the training labels that are replaced by wrong ones, drawn anew for each seed.
        clean_labels: a column of the data with the correct labels, if its labels are noisy.
        training: further keyword arguments of :class:`Trainer`, the same in all runs.
        overwrite: replace the files of an existing comparison.
        resume: continue an existing comparison, if there is one; arms, seeds and budgets may be added.

    Examples:
        >>> from pathlib import Path
        >>> from batchkern.compare import Comparison
        >>> comparison = Comparison("digits", "mlp", Path("out"), arms=("trimming",), training={"epochs": 5})
        >>> comparison.arms  # with the baseline and the control
        ('baseline', 'trimming', 'random(select=rows)')
    """

    data: str
    model: str
    out: Path
    label: str | None = None
    test: str | None = None
    passive: str | None = None
    image_size: int | None = None
    center_crop: bool = False
    arms: tuple[str, ...] = ARMS
    controls: bool = True
    seeds: int = 3
    budgets: tuple[str, ...] = ("updates",)
    validation: float | None = None
    train_rows: int | None = None
    test_rows: int | None = None
    noise: float = 0.0
    clean_labels: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    overwrite: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        if count("seeds", self.seeds) > MOST_SEEDS:
            raise UserError(f"seeds must be at most {MOST_SEEDS}, got {self.seeds}")
        check_flags(center_crop=self.center_crop, controls=self.controls, overwrite=self.overwrite, resume=self.resume)
        for name in ("arms", "budgets"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or not all(isinstance(word, str) for word in value):
                raise UserError(f"{name} must be a tuple of strings, got {value!r:.60}")
        check_kind("data", self.data, str | os.PathLike, "the name of a data set, or its path")
        check_kind("out", self.out, str | Path, "a path")
        check_kind("training", self.training, dict, "a dictionary of arguments of Trainer")
        unknown = ", ".join(str(key) for key in self.training if key not in TRAINING)
        if unknown:
            raise UserError(f"training must have arguments of Trainer that hold for all runs, got {unknown:.60}")
        check_outside(self.training.get("weights"), self.out)
        object.__setattr__(self, "out", Path(self.out))
        object.__setattr__(self, "seeds", int(self.seeds))
        object.__setattr__(self, "noise", check_number("noise", self.noise))
        if self.overwrite and self.resume:
            raise UserError("overwrite and resume exclude each other; give one of them")
        if not self.arms:
            raise UserError("there is no arm to compare")
        unknown = ", ".join(budget for budget in self.budgets if budget not in BUDGETS)
        if unknown or not self.budgets:
            raise UserError(f"budget must be one of {', '.join(BUDGETS)}, or several, got {unknown or 'none'}")
        check_passive(self.arms, self.passive)
        known: dict[str, str] = {}
        for arm in self.arms:
            for name in (slug(arm), described(arm)):
                if (other := known.setdefault(name, arm)) is not arm:
                    raise UserError(f"arms {other!r} and {arm!r} are the same, or would have the same directory")
        for arm in self.arms:
            if any(isinstance(s, Trimming) and s.backward == "auto" for s in parse(arm, passive="")):
                raise UserError(
                    f"arm {arm}: backward=auto depends on the load of the machine, so a comparison cannot be "
                    "repeated; give masked or compact"
                )
        arms = with_controls(self.arms) if self.controls else tuple(dict.fromkeys([BASELINE, *self.arms]))
        object.__setattr__(self, "arms", arms)

    def trainer(self, run: RunOf, *, write: bool, device: str | None = None) -> Trainer:
        """The trainer of one run. The device does not affect its settings."""
        train, test, passive = load_data(
            self.data,
            self.label,
            self.test,
            self.passive,
            self.image_size,
            self.center_crop,
            self.clean_labels,
            self.validation,
            self.train_rows,
            self.test_rows,
        )
        if self.noise:
            train = with_label_noise(train, self.noise, run.seed)
        directory = self.out / run.directory
        begun = all(os.path.lexists(directory / name) for name in (CONFIG, METRICS, CHECKPOINT))
        where = {} if device is None else {"device": device}
        return Trainer(
            self.model,
            train,
            test,
            strategies=parse(run.arm, passive=passive),
            seed=run.seed,
            out=directory if write else None,
            resume=write and begun,
            overwrite=write and not begun,  # files of a run that was killed before its first checkpoint
            progress=False,
            **self.training | where | {"epochs": run.epochs},
        )


@dataclass(frozen=True)
class RunOf:
    """One training of a comparison."""

    arm: str
    epochs: int
    seed: int

    @property
    def directory(self) -> Path:
        return Path(slug(self.arm), f"{self.epochs}-epochs", f"seed-{self.seed}")

    @classmethod
    def recorded(cls, outcome: dict[str, Any]) -> RunOf:
        return cls(outcome["arm"], outcome["epochs"], outcome["seed"])


@lru_cache(maxsize=1)
def load_data(
    data: str,
    label: str | None,
    test: str | None,
    passive: str | None,
    image_size: int | None,
    center_crop: bool,
    clean_labels: str | None,
    validation: float | None,
    train_rows: int | None,
    test_rows: int | None,
) -> tuple[Labelled, Labelled, ImageData | None]:
    """Training set, test set and passive set; loaded once in each process."""
    size: dict[str, Any] = {"image_size": image_size, "center_crop": center_crop}
    injected = None if passive is None else load(passive, **size)
    train, held_out = open_pair(data, test, clean_labels=clean_labels, label=label, **size)
    if validation is not None:
        train, held_out = validation_split(train, validation)
    train = train if train_rows is None else subset(train, train_rows)
    held_out = held_out if test_rows is None else subset(held_out, test_rows)
    return train, held_out, injected
