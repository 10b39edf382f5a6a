"""The benchmarks run, check their peers, and write what they measured."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_a_quick_run_measures_every_row(tmp_path: Path) -> None:
    # Two operations of the five: a compiled peer takes seconds to build.
    command = [sys.executable, "-m", "pytest", "-q", "bench/bench_rank_batches.py", "bench/bench_trimmed_mean.py"]
    settings = {"BATCHKERN_BENCH_QUICK": "1", "BATCHKERN_BENCH_OUT": str(tmp_path), "OMP_WAIT_POLICY": "PASSIVE"}
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = tmp_path.glob("*/*.json")
    written = json.loads(path.read_text())
    rows = {(row["op"], row["phase"], row["variant"]) for row in written["rows"]}
    for op, phases in (("rank_batches", ["forward"]), ("trimmed_mean", ["forward", "backward", "full"])):
        assert {(op, phase, variant) for phase in phases for variant in ("ours", "eager", "compile")} <= rows
    for row in written["rows"]:
        assert 0 < row["median_s"] < math.inf
        assert row["floor_s"] > 0
    assert written["machine"]["torch"]
