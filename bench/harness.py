"""What every benchmark shares: variants timed in turn, peak memory, the copy bandwidth and the machine's facts.

A round runs every variant once, in shuffled order, so that what the machine does besides hits them alike, and ratios
are taken within a round. The measured durations are then replayed into pytest-benchmark, one row per variant.
"""

from __future__ import annotations

import gc
import math
import os
import platform
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from batchkern import _backend

QUICK = os.environ.get("BATCHKERN_BENCH_QUICK") == "1"
ROOT = Path(__file__).resolve().parents[1]
FULL_PASS = ("forward", "backward", "full")
PEERS = ("eager", "compile")
SECONDS_A_GROUP = 0.05 if QUICK else 5.0
MIN_ROUNDS, MAX_ROUNDS = (3, 3) if QUICK else (15, 101)
SHORT_ROUND = 2e-3  # seconds; shorter calls are repeated within a round until they fill it

Step = Callable[[Tensor], Tensor]
Check = Callable[[Tensor, Tensor | None, Tensor, Tensor | None], None]


def assert_same(y: Tensor, dx: Tensor | None, peer_y: Tensor, peer_dx: Tensor | None) -> None:
    """The default check; the tolerance is that of the dtype, scaled to the largest gradient."""
    torch.testing.assert_close(y, peer_y, rtol=1e-4, atol=1e-6)
    if dx is not None and peer_dx is not None:
        rtol = 2e-2 if dx.dtype == torch.bfloat16 else 1e-3
        torch.testing.assert_close(dx, peer_dx, rtol=rtol, atol=rtol * 1e-1 * float(peer_dx.abs().max()))


@dataclass
class Problem:
    """One case with its data. ``floor_bytes`` and ``floor_seconds`` by phase: what no implementation can avoid."""

    input: Tensor
    ours: Step
    eager: Step
    floor_bytes: dict[str, float]
    floor_seconds: dict[str, float] = field(default_factory=dict)
    inplace: Step | None = None
    parameters: tuple[Tensor, ...] = ()
    """Leaves besides the input that get a gradient."""
    peers: dict[str, Step] = field(default_factory=dict)
    """Variants besides ours and ``PEERS``."""
    upstream: Tensor | None = None
    """The gradient of the result; None: 1."""
    check: Check = assert_same


@dataclass(frozen=True)
class Case:
    op: str
    label: str
    build: Callable[[], Problem]
    """Called when the case is run, not when it is collected: the inputs are large."""
    phases: Sequence[str] = FULL_PASS
    variants: Sequence[str] = ("ours", *PEERS)


def benchmark_rows(cases: Sequence[Case]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Parametrize a test with ``(case, phase, variant)``, case by case so that one case's data exist at a time."""
    rows = [(case, phase, variant) for case in cases for phase in case.phases for variant in case.variants]
    ids = [f"{case.label}-{phase}-{variant}".replace(" ", "_") for case, phase, variant in rows]

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        return pytest.mark.benchmark(timer=replay_clock)(
            pytest.mark.parametrize(("case", "phase", "variant"), rows, ids=ids)(test)
        )

    return decorate


_replayed = 0.0


def replay_clock() -> float:
    """The clock that pytest-benchmark reads: it advances by the durations that were measured before."""
    return _replayed


def advance_clock(seconds: float) -> None:
    global _replayed
    _replayed += seconds


def median_seconds(function: Callable[[], object], rounds: int = 9) -> float:
    function()
    return statistics.median(_time(function) for _ in range(rounds))


def _time(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - start
    del result  # after the clock has stopped: in training someone else frees what a step returned
    return seconds


@dataclass
class Bench:
    """The session: results so far, and the one case that is in memory."""

    copy: tuple[Tensor, Tensor] = field(default_factory=lambda: _pages(1 << (22 if QUICK else 26)))
    bandwidths: list[float] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    rounds: dict[tuple[str, str, str], dict[str, list[float]]] = field(default_factory=dict)
    case: Case | None = None
    problem: Problem | None = None
    steps: dict[str, Step] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    """How often each variant is called within a round, in the latest group."""

    def row(self, benchmark: Any, case: Case, phase: str, variant: str) -> None:
        """Measure the group of this row unless it was, and report the row."""
        if case is not self.case:
            self._load(case)
        key = (case.op, case.label, phase)
        if key not in self.rounds:
            self.rounds[key] = self._measure(phase)
            self._summarize(key)
        durations = self.rounds[key][variant]
        remaining = iter(durations)
        benchmark.group = " ".join(key)
        benchmark.pedantic(lambda: advance_clock(next(remaining)), rounds=len(durations))
        benchmark.extra_info.update(next(r for r in self.rows if r["key"] == key and r["variant"] == variant))

    def _load(self, case: Case) -> None:
        """Build the case, check every variant against ``eager``, and take its memory peak."""
        self.case = None
        self.problem, self.steps, self.calls = None, {}, {}
        torch.compiler.reset()  # each case compiles anew for its shape
        torch.manual_seed(0)
        source, target = self.copy
        self.bandwidths += [2 * source.nbytes / _time(lambda: target.copy_(source)) for _ in range(5)]
        problem = self.problem = case.build()
        known = {
            "ours": problem.ours,
            "ours inplace": problem.inplace,
            "eager": problem.eager,
            "compile": torch.compile(problem.eager, fullgraph=True, dynamic=False),
            **problem.peers,
        }
        self.steps = {name: known[name] for name in case.variants}
        whole = case.phases[-1]
        ((y, dx, others),) = self._prepare("eager", whole, 1)()
        for name in self.steps:
            if name != "eager":
                ((our_y, our_dx, our_others),) = self._prepare(name, whole, 1)()
                problem.check(our_y, our_dx, y, dx)
                for ours, theirs in zip(our_others, others, strict=True):
                    assert_same(our_y, ours, y, theirs)
                del our_y, our_dx, our_others
        del y, dx, others
        self.peaks = {name: peak_bytes(self._prepare(name, whole, 1)) for name in self.steps}
        self.case = case

    def _prepare(
        self, variant: str, phase: str, calls: int
    ) -> Callable[[], list[tuple[Tensor, Tensor | None, tuple[Tensor, ...]]]]:
        """Everything that is not to be timed; what it returns is: results, their gradients by the input and by the
        parameters. Each call has inputs and a graph of its own.

        The inputs are not leaves, as logits are not in training: ``inplace_backward`` needs that, and the gradient is
        returned in fresh memory instead of being accumulated.
        """
        step, upstream = self.steps[variant], self.problem.upstream
        base = self.problem.input
        if "backward" not in self.problem.floor_bytes:  # not differentiable
            return lambda: [(step(base), None, ()) for _ in range(calls)]
        leaf = base.detach().requires_grad_()
        inputs = [leaf.clone() for _ in range(calls)]
        if phase == "forward":
            return lambda: [(step(x), None, ()) for x in inputs]

        def backward(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
            dx, *others = torch.autograd.grad(y, (x, *self.problem.parameters), upstream)
            return y, dx, tuple(others)

        if phase == "full":
            return lambda: [backward(step(x), x) for x in inputs]
        graphs = [(step(x), x) for x in inputs]
        return lambda: [backward(y, x) for y, x in graphs]

    def _measure(self, phase: str) -> dict[str, list[float]]:
        """Seconds a call, by variant and round."""
        for name in self.steps:
            once = _time(self._prepare(name, phase, 1))
            if once < 0.1:
                once = min(once, *(_time(self._prepare(name, phase, 1)) for _ in range(4)))
            self.calls[name] = math.ceil(SHORT_ROUND / once)
        seconds: dict[str, list[float]] = {name: [] for name in self.steps}
        order = list(self.steps)
        shuffle = random.Random(0).shuffle
        gc.collect()
        gc.freeze()  # so that collecting what a round left, between rounds, is cheap
        gc.disable()
        try:
            deadline = time.monotonic() + SECONDS_A_GROUP
            while (done := len(seconds["ours"])) < MIN_ROUNDS or (done < MAX_ROUNDS and time.monotonic() < deadline):
                gc.collect()
                shuffle(order)
                for name in order:
                    seconds[name].append(_time(self._prepare(name, phase, self.calls[name])) / self.calls[name])
        finally:
            gc.enable()
            gc.unfreeze()
        return seconds

    def _summarize(self, key: tuple[str, str, str]) -> None:
        op, label, phase = key
        seconds = self.rounds[key]
        backend = next(s.backend for s in _backend.status() if (s.op, s.device) == (op, "cpu"))
        for name, durations in seconds.items():
            p20, median, p80 = quantiles(durations)
            row = {
                "key": key,
                "op": op,
                "case": label,
                "phase": phase,
                "variant": name,
                "backend": backend if name.startswith("ours") else "torch",
                "median_s": median,
                "p20_s": p20,
                "p80_s": p80,
                "rounds": len(durations),
                "calls_a_round": self.calls[name],
                "floor_bytes": self.problem.floor_bytes[phase],
                "floor_compute_s": self.problem.floor_seconds.get(phase, 0.0),
                "ratio": {p: quantiles([a / b for a, b in zip(durations, seconds[p])])[1] for p in PEERS},
            }
            if phase == self.case.phases[-1]:
                row["peak_bytes"] = self.peaks[name]
            self.rows.append(row)

    def report(self) -> dict[str, Any]:
        """All rows, now with floors, since the bandwidth is the median over the whole run."""
        p20, median, p80 = quantiles(self.bandwidths)
        rows = []
        for row in self.rows:
            floor = row["floor_bytes"] / median + row["floor_compute_s"]
            rows.append({**row, "floor_s": floor, "over_floor": row["median_s"] / floor})
            del rows[-1]["key"]
        bandwidth = {"median": median, "p20": p20, "p80": p80, "samples": len(self.bandwidths)}
        return {"copy_bytes_per_s": bandwidth, "rows": rows}


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p20, median and p80."""
    p20, *_, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return p20, statistics.median(values), p80


def _pages(elements: int) -> tuple[Tensor, Tensor]:
    """Two buffers whose every page exists, much larger than a cache."""
    return torch.ones(elements), torch.zeros(elements).fill_(1)


def peak_bytes(step: Callable[[], object]) -> int:
    """Bytes at the highest moment of a step beyond those before it: every event of the CPU allocator is counted."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        result = step()
    del result
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def machine_facts() -> dict[str, Any]:
    """What a reader must know to compare two result files."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(("OMP_", "KMP_", "MKL_"))},
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "compiler": _backend.extension.build_facts()["compiler"] if _backend.extension else None,
        "extension_error": _backend.extension_error,
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":!bench/results")),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load_average": os.getloadavg(),
        "quick": QUICK,
    }


def machine_slug(facts: dict[str, Any]) -> str:
    name = re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b|@", " ", facts["cpu"].lower())
    return "-".join([*re.findall(r"[a-z0-9.]+", name), f"{facts['cores']}cores"])


def _cpu_model() -> str:
    try:
        return re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()).group(1)
    except (OSError, AttributeError):
        return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:  # no git here
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"
