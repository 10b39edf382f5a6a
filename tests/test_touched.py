"""Which tests make check runs for a change."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import touched

from batchkern import _backend


@pytest.mark.parametrize(
    ("path", "tests"),
    [
        ("batchkern/ops/trimmed_mean.py", {"tests/ops/test_trimmed_mean.py", "tests/ops/test_trimmed_mean_kernel.py"}),
        ("batchkern/compare/statistics.py", {"tests/compare/test_statistics.py"}),  # it imports it
        ("batchkern/data/feed.py", {"tests/test_data.py"}),  # that of its folder
        (
            "batchkern/updater.py",
            {"tests/test_trainer.py", "tests/strategies/test_trimming.py"},
        ),  # they find its faults
        ("csrc/cpu/soft_label_kl.inl", {"tests/ops/test_soft_label_kl_kernel.py", "tests/test_kernels.py"}),
        ("tests/ranks.py", {"tests/test_distributed.py"}),
        ("tests/test_plan.py", {"tests/test_plan.py"}),
        ("docs/compare.md", {"tests/test_docs.py"}),
        ("LICENSE", set()),
        ("csrc/cpu/select.h", {"tests/ops/test_trimmed_mean_kernel.py", "tests/ops/test_rank_batches_kernel.py"}),
        ("batchkern/compare/report.html.jinja", {"tests/compare/test_report.py"}),
    ],
)
def test_the_tests_of_a_file(path: str, tests: set[str]) -> None:
    (found,) = touched.touched([path]).values()
    assert tests <= set(found)
    assert len(found) <= 10  # the updater has the seams of all strategies


def test_what_everybody_imports_is_nobodys() -> None:
    assert touched.touched(["batchkern/__init__.py"]) == {"batchkern/__init__.py": []}


def test_every_operation_is_known() -> None:
    assert {*touched.OPS, "select_rows"} == {*_backend.OPS}  # whose tests are those of trimmed_mean


def test_what_is_saved_and_loaded_is_tested_by_resumed_runs() -> None:
    resumed = touched.ROOT / "tests" / "test_resume.py"
    for path in ("batchkern/averaging.py", "batchkern/strategies/stepwise.py", "batchkern/parts/subsets.py"):
        assert resumed in touched.own_tests(path)
    assert resumed not in touched.own_tests("batchkern/seeding.py")


def test_other_names_are_those_of_tests_and_of_files() -> None:
    stems = {test.stem for test in touched.TESTS}
    for begin, names in touched.OTHERS.items():
        assert stems.issuperset(names)
        assert list(touched.ROOT.glob(f"{begin}*")), begin


def test_names_with_spaces_and_what_cannot_be_compared(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=b"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    def run(*words: str) -> tuple[int, str, str]:
        command = [sys.executable, "tests/touched.py", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    (tmp_path / "tests").mkdir()
    shutil.copy(touched.ROOT / "tests" / "touched.py", tmp_path / "tests")
    shutil.copytree(touched.ROOT / "tests" / "mutations", tmp_path / "tests" / "mutations")
    status, _, errors = run()
    assert status == 1
    assert errors.startswith("git diff")
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    assert run() == (0, "\n", "nothing differs from HEAD: there is nothing to test\n")
    status, _, errors = run("nosuch")
    assert status == 1
    assert "nosuch" in errors
    (tmp_path / "tests" / "sp ace").mkdir()
    (tmp_path / "tests" / "sp ace" / "test_ü.py").touch()
    (tmp_path / "a b.py").touch()
    assert run() == (0, "tests/sp ace/test_ü.py\n", "a b.py has no tests of its own: make test\n")
