"""How the time and memory of each operation grow with each of its dimensions."""

from __future__ import annotations

from typing import Any

from bench import measure
from bench.machine import QUICK
from bench.registry import Operation, Sweep


def test_growth(session: Any, op: Operation, sweep: Sweep) -> None:
    session.begin()
    session.rates.sample(sweep.case.dtype)
    sizes = sweep.sizes[:3] if QUICK else sweep.sizes
    session.add("growth", *measure.growth_of(op, sweep, session.device, sizes))
