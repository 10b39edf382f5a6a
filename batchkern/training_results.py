"""Results of any trainings: a file of comma-separated values, checked and read into runs."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from batchkern.errors import UserError
from batchkern.files import read_file

REQUIRED = ("arm", "seed")
AXES = ("cost", "steps")
OTHERS = ("data", "budget", "control", "error")
RESERVED = (*REQUIRED, *AXES, *OTHERS)
"""Columns with a special meaning; other columns are metrics."""
USUAL = "test_accuracy"
"""The default metric, if there is a column with this name."""
WIDE = re.compile(r"(.+)\[(\d+(?:\.\d+)?(?:e\d+)?)\]")
"""The name of a column with a metric after a number of steps, such as ``accuracy[100]``."""
NOTHING = {"", "none", "null", "false", "nan"}
"""Values of a column of words that count as empty."""
LARGEST = 1e150
"""The largest number; squares of larger ones could overflow."""

Curve = tuple[list[float], list[float]]


@dataclass
class Run:
    """One training.

    Examples:
        >>> from batchkern.analysis import Run
        >>> run = Run("sam", "0", {"accuracy": 0.75}, budgets=("updates", "cost"), used={"cost": 200.0})
        >>> sorted(run.group)
        ['cost', 'updates']
    """

    arm: str
    seed: str
    metrics: dict[str, float]
    """The last value of each metric. A run without any has failed."""
    data: str = ""
    """The data set."""
    budgets: tuple[str, ...] = ("",)
    """The budgets for which this run is compared with other arms, such as ``updates`` or ``cost``."""
    control: str = ""
    """The arm with which this one is compared, besides the baseline."""
    used: dict[str, float] = field(default_factory=dict)
    """The ``cost`` and the ``steps`` of the run, if known."""
    curves: dict[str, Curve] = field(default_factory=dict)
    """Curves of metrics over ``cost`` or ``steps``; for a metric without a curve, only its last value is known."""

    def curve(self, metric: str) -> Curve:
        return self.curves.get(metric) or ([0.0], [self.metrics[metric]])

    @property
    def group(self) -> frozenset[str]:
        """A key that is equal for runs of an arm that belong together: the set of their budgets."""
        return frozenset(self.budgets)


@dataclass
class Results:
    """The contents of a file of results.

    Examples:
        >>> from pathlib import Path
        >>> from batchkern.analysis import read_results
        >>> _ = Path("results.csv").write_text("arm,seed,accuracy[10],accuracy[20]\\nbaseline,0,0.5,0.75\\n")
        >>> results = read_results(Path("results.csv"))
        >>> results.axis, results.runs[0].curves["accuracy"]
        ('steps', ([10.0, 20.0], [0.5, 0.75]))
    """

    runs: list[Run]
    axis: str = "steps"
    """The axis of curves: ``cost`` or ``steps``."""
    left_out: tuple[str, ...] = ()
    """Columns without a number, which are not metrics."""
    unused: tuple[str, ...] = ()
    """Metrics that were not selected."""


@dataclass
class _Line:
    """A line of a file, with its number."""

    path: Path
    number: int
    cells: dict[str, str]

    def value(self, column: str) -> float | None:
        """The number in a column; None if the cell is empty.

        Raises:
            UserError: the cell is not empty and not a number.
        """
        cell = self.cells.get(column, "")
        if not cell:
            return None
        value = _number(cell)
        if value is None or abs(value) > LARGEST or (column in AXES and value < 0):
            least = " of at least 0" if column in AXES else f" up to {LARGEST:g}"
            self.wrong(column, f"must be a number{least}, or empty if a run failed, got {cell!r:.60}")
        return value

    def wrong(self, column: str, what: str) -> None:
        raise UserError(f"{self.path}, line {self.number}, column {column}: {what}")


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) and "_" not in cell else None


def read_results(path: Path, metrics: Sequence[str] = ()) -> Results:
    """The runs of a file of comma-separated values.

    - ``arm`` and ``seed`` are any names; an arm and a seed define a run, on each data set and at each budget.
    - ``data``, ``budget`` (several words: one run for all of them), ``control`` (an arm), ``cost``, ``steps`` and
      ``error`` are optional. A run with a word in ``error`` has failed, as has a run without a metric. If ``error`` has
      numbers, it is a metric.
    - Any other column with a number is a metric. If a run has several lines, they are its curve, over ``cost`` or
      ``steps``, and the last line with a value counts. A column ``accuracy[100]`` has the value after 100 steps.

    Args:
        path: path of the file.
        metrics: names of columns; default: ``test_accuracy`` if there is such a column, else all metrics.

    Raises:
        UserError: the file cannot be read or has wrong contents; the message names the line and the column.

    Examples:
        >>> from pathlib import Path
        >>> from batchkern.analysis import read_results
        >>> _ = Path("results.csv").write_text("arm,seed,accuracy\\nbaseline,0,0.5\\nsam,0,0.75\\n")
        >>> [(run.arm, run.seed, run.metrics) for run in read_results(Path("results.csv")).runs]
        [('baseline', '0', {'accuracy': 0.5}), ('sam', '0', {'accuracy': 0.75})]
    """
    lines, header = _lines(path)
    errors = [line.cells["error"] for line in lines if line.cells.get("error")]
    numbers = [_number(cell) is not None for cell in errors]
    if any(numbers) and not all(numbers):
        wrong = next(line for line in lines if line.cells.get("error") and _number(line.cells["error"]) is None)
        if wrong.cells["error"].lower() not in NOTHING:
            wrong.wrong(
                "error",
                f"{wrong.cells['error']!r:.60} is a word, but other lines have numbers; the column must be a metric, "
                "or mark failed runs by a word",
            )
    if errors and all(numbers):
        words = [name for name in RESERVED if name != "error"]  # an error is a metric, too
    else:
        words = list(RESERVED)
    wide: dict[str, dict[float, str]] = {}
    for name in header:
        match = None if name in words else WIDE.fullmatch(name)
        if match and wide.setdefault(match[1], {}).setdefault(float(match[2]), name) != name:
            raise UserError(f"{path} has two columns of {match[1]} after {match[2]} steps")
    columns = [name for name in header if name not in words and not WIDE.fullmatch(name)]
    with_numbers = [c for c in columns if any(_number(line.cells[c]) is not None for line in lines)]
    known = list(dict.fromkeys([*with_numbers, *wide]))
    for name in metrics:
        if name not in known:
            raise UserError(f"{path} has no metric {name!r}; it has {', '.join(known) or 'none'}")
    chosen = list(dict.fromkeys(metrics)) or ([USUAL] if USUAL in known else known)
    if not chosen:
        raise UserError(f"{path} has no metric: no column has a number, except {', '.join(words)}")
    courses: dict[tuple[str, ...], list[_Line]] = {}
    for line in lines:
        for name in REQUIRED:
            if not line.cells[name]:
                line.wrong(name, "must not be empty")
        budgets = sorted(set(line.cells.get("budget", "").split()))
        whole = re.fullmatch(
            r"([+-]?\d+)(\.0*)?", line.cells["seed"]
        )  # 1 and 1.0 are the same seed; pandas may write either
        name = str(int(whole[1])) if whole and len(whole[1]) < 1000 else line.cells["seed"]
        courses.setdefault((line.cells.get("data", ""), line.cells["arm"], name, *budgets), []).append(line)
    axis = _axis(header, courses.values(), bool(wide))
    failing = "error" if "error" in words else ""
    runs = [_run(key, course, axis, chosen, wide, failing) for key, course in courses.items()]
    if failing and not any(run.metrics for run in runs):
        first = next((line for line in lines if line.cells.get("error", "").lower() not in NOTHING), None)
        if first is not None:
            first.wrong(
                "error", f"has a word in a line of every run, here {first.cells['error']!r:.60}: all runs have failed"
            )
    left_out = tuple(name for name in columns if name not in with_numbers and name != "directory")
    return Results(runs, axis, left_out, () if metrics else tuple(name for name in known if name not in chosen))


def _lines(path: Path) -> tuple[list[_Line], list[str]]:
    """The lines of the file, and its header without columns that have no name."""
    try:
        text = read_file(path).decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text in UTF-8 ({error.reason} at byte {error.start})") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    lines: list[_Line] = []
    header: list[str] = []
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                continue
            if not header:
                header = [name.lower() if name.lower() in RESERVED else name for name in cells]
                _check_header(path, header)
                continue
            if len(cells) != len(header):
                wrong = f"must have {len(header)} cells, as the first line, got {len(cells)}"
                raise UserError(f"{path}, line {reader.line_num}: {wrong}")
            named = {name: cell for name, cell in zip(header, cells, strict=True) if name}
            lines.append(_Line(path, reader.line_num, named))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from None
    _check_header(path, header)
    header = [name for name in header if name]
    if twice := [name for name in header if header.count(name) > 1]:
        raise UserError(f"{path} has two columns {twice[0]!r}")
    if not lines:
        raise UserError(f"{path} has no run: only a first line")
    return lines, header


def _check_header(path: Path, header: Sequence[str]) -> None:
    for name in REQUIRED:
        if name not in header:
            other = next((mark for mark in (";", "\t") if mark in "".join(header)), None)
            hint = f"; it seems to be separated by {other!r}, not by commas" if other else ""
            raise UserError(f"{path} has no column {name}; its first line has {', '.join(header) or 'nothing'}{hint}")


def _axis(header: Sequence[str], courses: Iterable[list[_Line]], wide: bool) -> str:
    """The column that distinguishes the lines of every run: ``cost`` or ``steps``."""
    several = [course for course in courses if len(course) > 1]
    if not several:
        return "steps" if wide or "cost" not in header else "cost"
    if wide:
        several[0][1].wrong(
            "arm", f"is the same run as in line {several[0][0].number}; in this file, columns have the curves"
        )
    apart = [
        axis
        for axis in AXES
        if all(
            None not in (own := [line.value(axis) for line in course]) and len(set(own)) == len(own)
            for course in several
        )
    ]
    if not apart:
        for course in several:
            for place, line in enumerate(course[1:], 1):
                if all(line.cells.get(axis, "") in ("", *(o.cells.get(axis) for o in course[:place])) for axis in AXES):
                    first = course[0]
                    line.wrong(
                        "arm",
                        f"{first.cells['arm']!r}, seed {first.cells['seed']!r} is already in line {first.number}; "
                        "lines of one run need different values of cost or steps; other data sets need a column data",
                    )
        several[0][0].wrong("steps", "this column or cost must distinguish the lines of every run")
    return apart[0]


def _run(
    key: tuple[str, ...],
    course: list[_Line],
    axis: str,
    metrics: Sequence[str],
    wide: Mapping[str, Mapping[float, str]],
    failing: str,
) -> Run:
    data, arm, seed, *_ = key
    budgets = tuple(dict.fromkeys(course[0].cells.get("budget", "").split())) or ("",)
    course = sorted(course, key=lambda line: line.value(axis) or 0.0)
    last = course[-1]
    named = [cell for line in course if (cell := line.cells.get("control", "")) and cell.lower() not in NOTHING]
    run = Run(arm, seed, {}, data, budgets, named[-1] if named else "")
    run.used = {name: value for name in AXES if (value := last.value(name)) is not None}
    failed = failing and any(line.cells.get(failing, "").lower() not in NOTHING for line in course)
    for metric in metrics:
        points = [(line.value(axis) or 0.0, line.value(metric)) for line in course]
        final = [y for _, y in points if y is not None]
        if metric in wide:
            points = [(x, last.value(column)) for x, column in sorted(wide[metric].items())]
        curve = [(x, y) for x, y in points if y is not None]
        if (final or curve) and not failed:
            curve = curve or [(last.value(axis) or 0.0, final[-1])]
            run.metrics[metric] = final[-1] if final else curve[-1][1]
            run.curves[metric] = [x for x, _ in curve], [y for _, y in curve]
    return run
