"""The benchmarks run and write what they measured."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
import warm

ROOT = Path(__file__).resolve().parents[1]
PYTEST = ["-m", "pytest", "-p", "no:cacheprovider"]


def bench(out: Path, *arguments: str) -> str:
    settings = {"BATCHKERN_BENCH_QUICK": "1", "BATCHKERN_BENCH_OUT": str(out), "OMP_WAIT_POLICY": "PASSIVE"}
    run = warm.run(*PYTEST, "-q", *arguments, cwd=ROOT, env={**os.environ, **settings})
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_a_quick_run_measures_every_row(tmp_path: Path) -> None:
    # One operation of the six: a compiled peer takes seconds to build. test_gpu_run.py measures all, without these.
    parts = ["bench/bench_operations.py", "bench/bench_growth.py", "bench/bench_accuracy.py"]
    shown = bench(tmp_path, *parts, "-k", "rank_batches or accuracy and 10")
    (path,) = tmp_path.glob("*/*.json")
    assert str(path) in shown
    written = json.loads(path.read_text())
    rows = {(row["op"], row["mode"], row["variant"]) for row in written["operations"]}
    assert {("rank_batches", "forward", variant) for variant in ("ours", "eager", "compile")} <= rows
    for row in written["operations"]:
        assert 0 < row["time"]["median"] < math.inf
        assert row["floor"]["seconds"] > 0
    assert {(sweep["op"], sweep["variant"]) for sweep in written["growth"]} >= {("rank_batches", "ours")}
    assert {entry["variant"] for entry in written["accuracy"]} == {"ours", "F.kl_div"}
    for entry in written["confident"]:
        assert entry["ours"] == pytest.approx(entry["exact"], rel=2**-8)
    assert written["machine"]["quick"]
    assert written["failed"] == written["left_out"] == []
    assert written["complete"] is True


def test_a_case_that_ends_the_process_is_told(tmp_path: Path) -> None:
    """As a kernel that hangs does, when its time is over."""
    (tmp_path / "dies.py").write_text(
        "import os\nfrom bench import measure\nmeasure.rows_of = lambda *_: os._exit(3)\n"
    )
    settings = {"BATCHKERN_BENCH_QUICK": "1", "BATCHKERN_BENCH_OUT": str(tmp_path), "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    words = ["-q", "-p", "dies", "bench/bench_operations.py", "-k", "mean or rank"]
    run = warm.run(*PYTEST, *words, cwd=ROOT, env={**os.environ, **settings})
    assert run.returncode == 3
    (path,) = tmp_path.glob("*/*.json")
    written = json.loads(path.read_text())
    assert (written["complete"], written["failed"], len(written["left_out"])) == (False, [], 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    run = warm.run(*PYTEST, "bench", "--on", "cuda", cwd=ROOT)
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--on cuda needs a GPU that torch can see" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_second_run_leaves_the_file_of_the_first_and_no_case_begins_after_its_time(tmp_path: Path) -> None:
    arguments = ("bench/bench_growth.py", "-k", "rank_batches")
    bench(tmp_path, *arguments, "--minutes", "0")
    (first,) = tmp_path.glob("*/*.json")
    before = first.read_text()
    bench(tmp_path, *arguments, "--minutes", "0")
    assert first.read_text() == before
    second = json.loads(first.with_stem(first.stem + "-2").read_text())
    assert second["left_out"] == ["bench/bench_growth.py::test_growth[rank_batches-batches]"]
    assert second["complete"] is False
