"""Files of results: what is one, and the machine, commit and date that it is of."""

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
"""The lists of a file of results, and what no row of them can do without."""
LANGUAGE_KIND = "batchkern token selection"
"""What a file of examples/selective_lm.py says that it is."""
QUANTITIES = ("time", "graph", "ratio")
"""What has a median where it is given."""
STAMP = re.compile(r"^(\d{4}-\d\d-\d\d)-([0-9a-f]{7,40})\b")
"""How the name of a file of results begins: its date and its commit."""

UNKNOWN = datetime.min.replace(tzinfo=timezone.utc)
"""The date of what has none."""


@dataclass(frozen=True)
class Results:
    path: Path
    sort: str
    """One of :data:`BENCHMARK`, :data:`COMPARISON`, :data:`LANGUAGE`, :data:`REPRODUCTION`."""
    content: dict[str, Any]

    def rows(self, name: str) -> list[dict[str, Any]]:
        """A list of the file, empty where it has none."""
        return self.content.get(name) or []

    @property
    def machine(self) -> dict[str, Any]:
        machine = self.content.get("machine")
        return machine if isinstance(machine, dict) else {}

    @property
    def date(self) -> datetime:
        """When it was measured; :data:`UNKNOWN` where nothing says so, as of what is planned."""
        stamp = STAMP.match(self.path.name)
        try:
            date = datetime.fromisoformat(self.machine.get("date") or (stamp[1] if stamp else ""))
        except (TypeError, ValueError):
            return UNKNOWN
        return date if date.tzinfo else date.replace(tzinfo=timezone.utc)

    @property
    def complete(self) -> bool:
        """Whether its run came to its end."""
        return self.content.get("complete") is not False

    @property
    def release(self) -> str:
        """Of torch, without its patch: 2.11; empty for what is planned."""
        return ".".join(str(self.machine.get("torch") or "").split(".")[:2])

    @property
    def subject(self) -> tuple[Any, ...]:
        """What a newer file must be of, too, to be in place of this one: comparisons of other data are not."""
        if self.sort == REPRODUCTION:
            return (self.sort, self.content["name"])
        if self.sort != COMPARISON:
            return (self.sort,)
        settings = self.content["settings"]
        return (self.sort, settings["train"]["name"], settings["model"], settings["noise"])


def read_text(path: Path) -> str:
    """All of a file, as UTF-8, with its line ends as they are.

    Raises:
        UserError: it cannot be read, or is a device or a pipe, whose end might never come.
    """
    try:
        return read_file(path).decode()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:  # it is no UTF-8, or its name holds what none can hold
        raise UserError(f"{path} cannot be read: it is no text in UTF-8") from None


def load(path: Path) -> Results:
    """
    Raises:
        UserError: it cannot be read, or is no file of results.
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
    """The files and those in the folders, newest first; and a sentence for each file of a folder that is left out.

    Raises:
        UserError: a file that was named is no file of results, or there is none at all.
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
    """Where the file is damaged in a way that only shows now.

    Raises:
        UserError: in place of whatever its values led to.
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
    """The machine in one line: what computed, by which torch, from which commit, when."""
    machine = {**results.content.get("environment", {}), **results.machine}
    stamp = STAMP.match(results.path.name)
    commit = machine.get("commit") or (stamp[2] if stamp else None)
    of_runs = results.sort in (COMPARISON, REPRODUCTION)
    if of_runs:  # names no processor; the folder does
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
    """What floors are counted at."""
    rates = results.content.get("rates") or {}
    said = []
    if copy := rates.get("copy"):
        said.append(f"copies {_rate(copy, 'B/s')}")
    for dtype, rate in (rates.get("matmul") or {}).items():
        said.append(f"multiplies {dtype} matrices at {_rate(rate, 'flop/s')}")
    return said


def _rate(rate: dict[str, float], unit: str) -> str:
    """The median, and how far it scatters."""
    between = [quantity(rate[key], unit) for key in ("p20", "p80") if key in rate]
    return quantity(rate["median"], unit) + (f" ({' - '.join(between)})" if between else "")
