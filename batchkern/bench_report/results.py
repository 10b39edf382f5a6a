"""Files of results: how they are recognised, and the machine, commit and date to which they belong."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from batchkern.bench_report.markdown import quantity
from batchkern.errors import UserError
from batchkern.files import read_file

BENCHMARK, COMPARISON, LANGUAGE, REPRODUCTION = "benchmark", "comparison", "language", "reproduction"
REQUIRED = {
    "operations": ("op", "shape", "variant"),
    "growth": ("op", "along", "variant", "sizes"),
    "training": ("strategy",),
    "accuracy": ("op", "classes", "perturbation", "variant", "error"),
    "confident": ("op", "probability", "exact", "ours", "eager"),
    "arms": ("noise", "arm", "flops", "seconds", "updates", "loss", "difference", "curve"),
    "references": ("noise", "share", "tokens", "updates", "loss", "best", "difference"),
}
"""The lists that a file of results may have, and the keys that every row of a list must have."""
LANGUAGE_KIND = "batchkern token selection"
"""The value of ``kind`` in a file written by examples/selective_lm.py."""
QUANTITIES = ("time", "graph", "ratio")
"""Optional keys of a row whose values must have a median."""
STAMP = re.compile(r"^(\d{4}-\d\d-\d\d)-([0-9a-f]{7,40})\b")
"""The beginning of the name of a file of results: date and commit."""

UNKNOWN = datetime.min.replace(tzinfo=timezone.utc)
"""The date of results that state none."""


@dataclass(frozen=True)
class Results:
    path: Path
    sort: str
    """One of :data:`BENCHMARK`, :data:`COMPARISON`, :data:`LANGUAGE`, :data:`REPRODUCTION`."""
    content: dict[str, Any]

    def rows(self, name: str) -> list[dict[str, Any]]:
        """A list of the file; empty if the file does not have it."""
        return self.content.get(name) or []

    @property
    def machine(self) -> dict[str, Any]:
        machine = self.content.get("machine")
        return machine if isinstance(machine, dict) else {}

    @property
    def date(self) -> datetime:
        """The date of the measurement; :data:`UNKNOWN` if neither the file nor its name states it, as for planned
        measurements."""
        stamp = STAMP.match(self.path.name)
        try:
            date = datetime.fromisoformat(self.machine.get("date") or (stamp[1] if stamp else ""))
        except (TypeError, ValueError):
            return UNKNOWN
        return date if date.tzinfo else date.replace(tzinfo=timezone.utc)

    @property
    def complete(self) -> bool:
        """Whether the run finished and left out no cases."""
        return self.content.get("complete") is not False

    @property
    def release(self) -> str:
        """The version of torch without its patch number, such as 2.11; empty for planned measurements."""
        return ".".join(str(self.machine.get("torch") or "").split(".")[:2])

    @property
    def subject(self) -> tuple[Any, ...]:
        """The properties that must be equal for a newer file to replace this one, such as the data of a comparison."""
        if self.sort == REPRODUCTION:
            return (self.sort, self.content["name"])
        if self.sort != COMPARISON:
            return (self.sort,)
        settings = self.content["settings"]
        return (self.sort, settings["train"]["name"], settings["model"], settings["noise"])


def read_text(path: Path) -> str:
    """The content of a file, decoded as UTF-8, with unchanged line endings.

    Raises:
        UserError: the file cannot be read or is not UTF-8, or it is a device or a pipe, which might never end.
    """
    try:
        return read_file(path).decode()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:  # the content is not UTF-8, or the path has an invalid character
        raise UserError(f"{path} cannot be read: it is no text in UTF-8") from None


def load(path: Path) -> Results:
    """Reads and checks a file of results.

    Raises:
        UserError: the file cannot be read, is damaged, or is not a file of results.
    """
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{path} is no JSON; files of results are those that make bench writes") from None
    sort = _sort(content)
    if sort is None:
        raise UserError(
            f"{path} is no file of results: it must name its machine and device, as those do that make bench writes"
        )
    if sort not in (COMPARISON, REPRODUCTION):
        _check_rows(path, content)
    return Results(path, sort, content)


def _sort(content: Any) -> str | None:
    if not isinstance(content, dict):
        return None
    if content.get("kind") == "batchkern comparison" and "summary" in content:
        return COMPARISON
    if content.get("kind") == "batchkern reproduction" and "groups" in content:
        return REPRODUCTION
    if content.get("kind") == LANGUAGE_KIND and "settings" in content:
        return LANGUAGE
    machine = content.get("machine")
    return BENCHMARK if isinstance(machine, dict) and "device" in machine else None


def _check_rows(path: Path, content: dict[str, Any]) -> None:
    for name, keys in REQUIRED.items():
        rows = content.get(name)
        if rows is None:
            continue
        if not isinstance(rows, list):
            raise UserError(f"{path} is damaged: {name} must be a list, not {rows!r:.40}")
        for place, row in enumerate(rows):
            missing = [key for key in keys if not isinstance(row, dict) or row.get(key) is None]
            if missing:
                raise UserError(f"{path} is damaged: row {place} of {name} has no {missing[0]!r}")
            for key in QUANTITIES:
                if row.get(key) is not None and not (isinstance(row[key], dict) and "median" in row[key]):
                    raise UserError(f"{path} is damaged: {key} of row {place} of {name} has no median")


def load_all(paths: Iterable[Path]) -> tuple[list[Results], list[str]]:
    """Reads the given files and all files of results in the given folders.

    Returns:
        The results, newest first; and a sentence for each JSON file in a folder that was left out.

    Raises:
        UserError: a file that was given is not a file of results, or there is no file of results at all.
    """
    found, left_out = {}, []
    given = list(paths)
    for path in given:
        if not path.is_dir():
            found[path] = load(path)
            continue
        for file in sorted(path.rglob("*.json")):
            if file.is_dir():
                continue
            try:
                found[file] = load(file)
            except UserError as error:
                left_out.append(f"left out: {error}")
    if not found:
        raise UserError(f"there is no file of results in {', '.join(map(str, given))}")
    return sorted(found.values(), key=lambda results: results.date, reverse=True), left_out


@contextmanager
def rendering(results: Results) -> Iterator[None]:
    """A context for rendering a file, whose values may be damaged in ways that :func:`load` does not detect.

    Raises:
        UserError: the values of the file caused an error; the message names the file.
    """
    try:
        yield
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{results.path} is damaged: what it holds cannot be shown ({type(error).__name__}: {error})"
        ) from None


def facts(results: Results) -> str:
    """One line about how the results were made: processor, threads, version of torch, commit, date, missing cases,
    rates and load."""
    machine = {**results.content.get("environment", {}), **results.machine}
    stamp = STAMP.match(results.path.name)
    commit = machine.get("commit") or (stamp[2] if stamp else None)
    of_runs = results.sort in (COMPARISON, REPRODUCTION)
    if of_runs:  # the file does not name the processor, but its folder does
        name, threads = results.path.absolute().parent.name, machine.get("threads_per_run")
    else:
        name, threads = machine.get("gpu") or machine.get("cpu") or machine["device"], machine.get("threads")
    said = [str(name)]
    if machine.get("planned"):
        said.append("not measured yet")
    elif threads and not machine.get("gpu"):
        said.append(f"{threads} thread{'s' * (threads != 1)}" + " a run" * of_runs)
    if machine.get("torch"):
        said.append(f"torch {machine['torch']}")
    if commit:
        said.append(f"commit {commit}" + " with changes" * bool(machine.get("dirty")))
    if results.date > UNKNOWN:
        said.append(f"{results.date:%Y-%m-%d}")
    if failed := results.rows("failed"):
        said.append(f"{len(failed)} case{'s' * (len(failed) > 1)} failed")
    if not results.complete:
        said.append(_left_out(results))
    if machine.get("quick"):
        said.append("a quick run, whose figures mean nothing")
    load = [machine[key][0] for key in ("load_average", "load_average_at_end") if machine.get(key)]
    loads = [f"load {' to '.join(f'{value:.1f}' for value in load)}"] if load else []
    pages = [f"huge pages: {machine['huge_pages']}"] if machine.get("huge_pages") else []
    return "; ".join([", ".join(said), *_rates(results), *pages, *loads])


def _left_out(results: Results) -> str:
    count = len(results.rows("left_out"))
    return f"{count} case{'s' * (count > 1)} left out" if count else "interrupted"


def _rates(results: Results) -> list[str]:
    """The rates of copies and of matrix products from which floors are computed."""
    rates = results.content.get("rates") or {}
    said = []
    if copy := rates.get("copy"):
        said.append(f"copies {_rate(copy, 'B/s')}")
    for dtype, rate in (rates.get("matmul") or {}).items():
        said.append(f"multiplies {dtype} matrices at {_rate(rate, 'flop/s')}")
    return said


def _rate(rate: dict[str, float], unit: str) -> str:
    """The median, and in brackets the 20 % and 80 % quantiles if they are known."""
    between = [quantity(rate[key], unit) for key in ("p20", "p80") if key in rate]
    return quantity(rate["median"], unit) + (f" ({' - '.join(between)})" if between else "")
