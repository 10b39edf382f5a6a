"""The session of a benchmark run, and what it prints and writes.

``BATCHKERN_BENCH_OUT=folder`` writes ``folder/<machine>/<date>-<commit>.json``, anew after each case, so that a run
that is stopped leaves what it has; without it the tables are only printed. ``BATCHKERN_BENCH_QUICK=1`` makes shapes
small and rounds few: a check of the benchmarks, not a measurement.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

# Read when torch loads OpenMP.
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

import pytest
import torch

from batchkern.bench.report import page
from batchkern.bench.results import BENCHMARK, Results
from bench import machine, measure, registry
from bench.devices import Cpu, Cuda, Rates
from bench.results_file import as_text

_sessions: list[Session] = []


class Session:
    """What was measured so far."""

    def __init__(self, device: Cpu, minutes: float | None) -> None:
        self.device = device
        self.rates = Rates(device)
        self.machine = machine.facts(device.device)
        self.sections: dict[str, list[Any]] = {}
        self.failed: list[str] = []
        self.complete = False
        """Until the last case has been measured."""
        self.begun = time.monotonic()
        self.left_out: list[str] = []
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.path = self._path()

    def _path(self) -> Path | None:
        """A file that is not there yet."""
        if not (folder := os.environ.get("BATCHKERN_BENCH_OUT")):
            return None
        name = f"{self.machine['date'][:10]}-{self.machine['commit']}"
        own = Path(folder, machine.folder(self.machine))
        return next(p for n in range(1, 1000) if not (p := own / f"{name}{f'-{n}' if n > 1 else ''}.json").exists())

    def add(self, section: str, *entries: dict[str, Any]) -> None:
        self.sections.setdefault(section, []).extend(entries)
        self.write()

    def begin(self, label: str) -> None:
        """Skips what no time is left for."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            self.left_out.append(label)
            self.write()
            pytest.skip("no time was left")

    def report(self) -> dict[str, Any]:
        sections = dict(self.sections)
        known = measure.finish(sections.pop("operations", []), sections.pop("growth", []), self.rates)
        facts = {**self.machine, "load_average_at_end": os.getloadavg()}
        told = {"complete": self.complete, "failed": self.failed, "left_out": self.left_out}
        return {"machine": facts, "seconds": time.monotonic() - self.begun, **told, **known, **sections}

    def write(self) -> None:
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            partial.write_text(as_text(self.report()))
            partial.replace(self.path)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--on", choices=["cpu", "cuda"], default="cpu", help="the device to measure on")
    parser.addoption("--minutes", type=float, help="begin no case after so many")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--on") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--on cuda needs a GPU that torch can see")
    if folder := os.environ.get("BATCHKERN_BENCH_OUT"):
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise pytest.UsageError(f"BATCHKERN_BENCH_OUT={folder} cannot be made: {error.strerror}") from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The cases, or the sweeps, of every operation for the device. Those with a target come first, in case time runs
    out."""
    device = metafunc.config.getoption("--on")
    if {"op", "case"} <= set(metafunc.fixturenames):
        cases = [
            (op, case)
            for op in registry.operations().values()
            for case in ([op.quick] if machine.QUICK else op.cases[device])
        ]
        cases.sort(key=lambda pair: pair[1].target_s is None)
        metafunc.parametrize(("op", "case"), cases, ids=[f"{op.name}-{case}".replace(" ", "_") for op, case in cases])
    if "sweep" in metafunc.fixturenames:
        sweeps = [(op, sweep) for op in registry.operations().values() for sweep in op.sweeps[device]]
        ids = [f"{op.name}-{sweep.along}-{sweep.case.kind}".strip("-").replace(" ", "_") for op, sweep in sweeps]
        metafunc.parametrize(("op", "sweep"), sweeps, ids=ids)


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Session:
    device = Cuda() if request.config.getoption("--on") == "cuda" else Cpu()
    _sessions.append(Session(device, request.config.getoption("--minutes")))
    return _sessions[0]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int) -> None:
    for session in _sessions:
        session.complete = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        session.failed = [r.nodeid for kind in ("failed", "error") for r in terminalreporter.stats.get(kind, [])]
        session.write()
        terminalreporter.write(
            "\n" + page([Results(session.path or Path("measured", "now"), BENCHMARK, session.report())])
        )
        if session.path:
            terminalreporter.write_line(f"written: {session.path}")
