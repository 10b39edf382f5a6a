"""The session of a benchmark run, and its output.

``BATCHKERN_BENCH_OUT=folder`` writes ``folder/<machine>/<date>-<commit>.json``, again after each case, so that a run
that is stopped keeps its results so far. Without it the tables are only printed. ``BATCHKERN_BENCH_QUICK=1`` makes
shapes small and rounds few: a check of the benchmarks, not a measurement.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

# torch reads it when it loads OpenMP.
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

import pytest
import torch

from batchkern.bench_report.report import page
from batchkern.bench_report.results import BENCHMARK, Results
from bench import machine, measure, registry
from bench.devices import Cpu, Cuda, Rates
from bench.results_file import as_text

_sessions: list[Session] = []


class Session:
    """The results so far."""

    def __init__(self, device: Cpu, cases: list[str], minutes: float | None, without: list[str]) -> None:
        self.device = device
        self.without = without
        """Variants that are not measured."""
        self.rates = Rates(device)
        self.machine = machine.facts(device.device)
        self.sections: dict[str, list[Any]] = {}
        self.failed: list[str] = []
        self.left_out = cases
        """The cases that were not tried so far."""
        self.begun = time.monotonic()
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.path = self._path()
        self.write()  # the first case may end the process

    def _path(self) -> Path | None:
        """The path of a file that does not exist yet."""
        if not (folder := os.environ.get("BATCHKERN_BENCH_OUT")):
            return None
        name = f"{self.machine['date'][:10]}-{self.machine['commit']}"
        own = Path(folder, machine.folder(self.machine))
        return next(p for n in range(1, 1000) if not (p := own / f"{name}{f'-{n}' if n > 1 else ''}.json").exists())

    def add(self, section: str, *entries: dict[str, Any]) -> None:
        self.sections.setdefault(section, []).extend(entries)
        self.write()

    def begin(self) -> None:
        """Skips a case if no time is left."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            pytest.skip("no time was left")

    def tried(self, case: str, failed: bool) -> None:
        if case in self.left_out:
            self.left_out.remove(case)
            self.failed += [case] * failed
            self.write()

    def report(self) -> dict[str, Any]:
        sections = dict(self.sections)
        known = measure.finish(sections.pop("operations", []), sections.pop("growth", []), self.rates)
        facts = {**self.machine, "load_average_at_end": os.getloadavg()}
        told = {"complete": not self.left_out, "failed": self.failed, "left_out": self.left_out}
        told |= {"without": self.without} if self.without else {}
        return {"machine": facts, "seconds": time.monotonic() - self.begun, **told, **known, **sections}

    def write(self) -> None:
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            partial.write_text(as_text(self.report()))
            partial.replace(self.path)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--on", choices=["cpu", "cuda"], default="cpu", help="the device to measure on")
    parser.addoption("--minutes", type=float, help="begin no case after so many minutes")
    parser.addoption("--without", action="append", default=[], metavar="VARIANT", help="do not measure it")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--on") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--on cuda needs a GPU that torch can see")
    if folder := os.environ.get("BATCHKERN_BENCH_OUT"):
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise pytest.UsageError(f"BATCHKERN_BENCH_OUT={folder} cannot be made: {error.strerror}") from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrizes a test by the cases, or the sweeps, of every operation for the device, the most important first."""
    device = metafunc.config.getoption("--on")
    if {"op", "case"} <= set(metafunc.fixturenames):
        cases = [
            (op, case)
            for op in registry.operations().values()
            for case in ([op.quick] if machine.QUICK else op.cases[device])
        ]
        if device == "cuda":
            place = {label: index for index, label in enumerate(registry.FIRST_ON_A_GPU)}
            cases.sort(key=lambda pair: place.get(f"{pair[0].name} {pair[1]}", len(place)))
        metafunc.parametrize(("op", "case"), cases, ids=[f"{op.name}-{case}".replace(" ", "_") for op, case in cases])
    if "sweep" in metafunc.fixturenames:
        sweeps = [(op, sweep) for op in registry.operations().values() for sweep in op.sweeps[device]]
        ids = [f"{op.name}-{sweep.along}-{sweep.case.kind}".strip("-").replace(" ", "_") for op, sweep in sweeps]
        metafunc.parametrize(("op", "sweep"), sweeps, ids=ids)


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Session:
    device = Cuda() if request.config.getoption("--on") == "cuda" else Cpu()
    cases = [item.nodeid for item in request.session.items if "session" in getattr(item, "fixturenames", ())]
    option = request.config.getoption
    _sessions.append(Session(device, cases, option("--minutes"), option("--without")))
    return _sessions[0]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A case was tried if its call has ended, or if an error came before the call."""
    if (report.when == "call" or report.failed) and not report.skipped:
        for session in _sessions:
            session.tried(report.nodeid, report.failed)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for session in _sessions:
        session.write()
        terminalreporter.write(
            "\n" + page([Results(session.path or Path("measured", "now"), BENCHMARK, session.report())])
        )
        if session.path:
            terminalreporter.write_line(f"written: {session.path}")
