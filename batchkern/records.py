"""The schemas of the files of a run and of a comparison, and functions that read and check them.

A file may be incomplete, edited or written by another program. Its contents are used for paths, sizes and figures, so
nothing is used before it was checked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, TypeVar

from torch import Tensor

from batchkern.errors import require
from batchkern.files import read_file

if TYPE_CHECKING:
    import msgspec
else:
    msgspec = require("msgspec", "train")

Whole = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
Json = dict[str, Any]
T = TypeVar("T")


class Counts(TypedDict):
    updates: Whole
    samples_seen: Whole
    samples_forward: Whole
    samples_backward: Whole
    samples_kept: Whole
    seconds: float


class _Row(Counts):
    epoch: Whole
    lr: float
    train_loss: float
    train_objective: float
    train_accuracy: float
    test_accuracy: Fraction
    test_accuracy_plain: Fraction
    test_loss: float


class _Figures(_Row, total=False):
    test_top5_accuracy: Fraction
    times_kept: list[float] | None
    kept_loss: list[float] | None
    dropped_loss: list[float] | None
    never_kept: float | None
    kept_overlap: float | None
    kept_overlap_by_chance: float | None
    kept_mislabelled: float | None
    passive_updates: Whole
    passive_accuracy: float | None
    augmented_updates: Whole
    virtual_kl: float | None
    virtual_loss: float | None
    srip_sigma: float | None
    pruned: float | None
    tau: float | None
    irreducible_loss: float | None
    noise_scale: float | None


class Row(_Figures, total=False):
    """A row of metrics.jsonl, for one epoch. Strategies add their own figures."""

    train_set_accuracy: Fraction


class _Named(TypedDict):
    name: str


class _RunSettings(TypedDict):
    strategies: list[_Named]
    model: str
    train: _Named
    seed: int


class Config(TypedDict):
    """The part of a run's config.json that plots need."""

    settings: _RunSettings


class _Data(_Named):
    shape: list[Whole] | None
    classes: Whole | None


class _Layout(TypedDict, total=False):
    channels_last: bool | None


class _ModelSettings(_Layout):
    train: _Data
    model: str
    amp: Literal["none", "bf16", "fp16"]


class ModelConfig(TypedDict):
    """The part of a run's config.json that is needed to use its model."""

    settings: _ModelSettings


class Preprocessing(TypedDict):
    """The common part of preprocessing.json. The rest is checked by a dataclass for each kind."""

    format: Positive
    kind: str


class Checkpoint(TypedDict):
    """checkpoint.pt. The states of models, optimizers and strategies are checked by their own code."""

    epochs_done: Whole
    counts: Counts
    active: Whole
    sums: Tensor
    model: dict[str, Any]
    extras: dict[str, Any]
    average: dict[str, Any] | None
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    batches: dict[str, Any]
    strategies: list[Json]
    samples: dict[str, Any]
    rng: Tensor
    cuda_rng: Tensor | None
    rng_of_other_ranks: list[tuple[Tensor, Tensor | None]]


class _Final(_Figures):
    train_set_accuracy: Fraction


class _Curve(TypedDict):
    test_accuracy: list[Fraction]
    updates: list[Positive]
    samples_forward: list[Positive]
    samples_backward: list[Whole]


class Curve(_Curve, total=False):
    train_loss: list[float]


class Outcome(TypedDict):
    arm: str
    epochs: Positive
    seed: Whole
    directory: str
    error: str | None
    curve: Curve | None
    final: _Final | None


class _Settings(TypedDict):
    train: _Named
    model: str
    passive: str | None
    noise: float
    arms: list[str]
    controls: dict[str, str]
    seeds: list[Whole]
    budgets: list[Literal["epochs", "updates", "cost"]]
    arm_epochs: dict[str, dict[str, Positive]]


class _Environment(TypedDict):
    batchkern: str
    torch: str
    python: str
    device: str
    jobs: Whole
    cores: Whole
    threads_per_run: Whole


class Results(TypedDict):
    """results.json of a comparison."""

    kind: Literal["batchkern comparison"]
    settings: _Settings
    environment: _Environment
    runs: list[Outcome]
    summary: list[Json]


def check(value: Any, schema: Any) -> None:
    """Checks a value against a schema.

    Raises:
        ValueError: it does not match; the message names the place, as in "Expected `int` >= 0 - at `$.runs[3].seed`".
    """
    msgspec.convert(value, schema)


def made(value: Any, cls: type[T]) -> T:
    """``value`` as a dataclass, which may check more than its types.

    Raises:
        ValueError: as :func:`check`.
    """
    try:
        return msgspec.convert(value, cls)
    except OverflowError as error:  # an integer with about 300 digits in place of a float
        raise ValueError(str(error)) from None


def read_json(path: Path, schema: Any = Json) -> Any:
    """The contents of a JSON file, checked against ``schema``.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, or does not match ``schema``.
    """
    value = _parsed(read_file(path))
    check(value, schema)
    return value


def read_metrics(path: Path, rows: int | None = None) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, one per epoch. With ``rows``, only the first rows; later ones may be incomplete.

    Raises:
        OSError, ValueError: as :func:`read_json`; or rows are missing, or the epoch of a row is wrong.
    """
    lines = read_file(path).removesuffix(b"\n").split(b"\n") if path.stat().st_size else []
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lines[:rows]):
        row = _parsed(line)
        check(row, Row)
        if row["epoch"] != number:
            raise ValueError(f"row {number} is of epoch {row['epoch']}")
        found.append(row)
    if rows is not None and len(found) < rows:
        raise ValueError(f"it has {len(found)} rows, not {rows}")
    return found


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
