"""Measures every operation and its peers, at each of its cases."""

from __future__ import annotations

from typing import Any

import pytest

from bench import measure
from bench.registry import Case, Operation

_replayed = 0.0


def replay_clock() -> float:
    """The clock that pytest-benchmark reads: it advances by the durations that were measured before."""
    return _replayed


def _advance(seconds: float) -> None:
    global _replayed
    _replayed += seconds


@pytest.mark.benchmark(timer=replay_clock)
def test_operation(benchmark: Any, session: Any, op: Operation, case: Case) -> None:
    """Adds rows to the session. pytest-benchmark gets our median in the last mode, so that ``--benchmark-compare`` can
    compare two commits."""
    session.begin()
    session.rates.sample(case.dtype)
    rows = measure.rows_of(op, case, session.device, session.without)
    session.add("operations", *rows)
    ours = next(row for row in reversed(rows) if row["variant"] == "ours")
    benchmark.group = op.name
    benchmark.pedantic(_advance, args=(ours["time"]["median"],), rounds=1)
    benchmark.extra_info.update(ours)
