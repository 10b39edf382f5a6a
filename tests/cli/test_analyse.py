"""``batchkern analyse``: what it prints, writes and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import warm

pytest.importorskip("typer")
pytest.importorskip("scipy")
pytest.importorskip("statsmodels")

TEXT = "arm,seed,top1,loss\n" + "".join(
    f"{arm},{seed},{base + 0.01 * seed * (1 + (arm != 'plain'))},{1 - base}\n"
    for arm, base in (("plain", 0.6), ("sam(rho=1)", 0.7), ("random", 0.65))
    for seed in range(5)
)


def test_tables_a_page_and_what_is_refused(tmp_path: Path) -> None:
    (tmp_path / "my results.csv").write_text(TEXT)
    words = ["-m", "batchkern", "analyse", "my results.csv", "--baseline", "plain", "--control", "sam(rho=1)=random"]
    done = warm.run(*words, "--metric", "top1", "--out", "page", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Better than the baseline: sam(rho=1) (+0.120 ± 0.020)" in done.stdout
    assert "loss" not in done.stdout
    assert (tmp_path / "page" / "analysis.html").exists()
    for more, says in (
        (["--out", "page"], "analysis.html already exists; give overwrite (--overwrite)"),
        (["--control", "sam"], "control must be of the form arm=control, both of plain, random, sam(rho=1), got 'sam'"),
        (["--baseline", "none"], "baseline: there is no arm 'none'; there are plain, sam(rho=1), random"),
    ):
        done = warm.run(*words, *more, cwd=tmp_path)
        assert done.returncode == 2
        assert says in done.stderr
        assert "Traceback" not in done.stderr
    done = warm.run("-m", "batchkern", "analyse", "missing.csv", cwd=tmp_path)
    assert done.returncode == 2
    assert "missing.csv" in done.stderr
