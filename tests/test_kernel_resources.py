"""What bench/kernel_resources.py reads in a report of ptxas, and what it refuses."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "kernel_resources.py"
SELECT = "_ZN9batchkern11select_rowsILb1ENS_11PlainLossesINS_7Float16EEEEEvNS_9SelectionIT0_EE"
SPILLS = "_ZN9batchkern8rank_fewILb0EfEEvNS_7RankFewIT0_EE"
# From nvcc 13.0, but for the figures of the second kernel, and with one function that was not inlined.
REPORT = f"""\
ptxas info    : 29 bytes gmem
ptxas info    : Compiling entry function '{SELECT}' for 'sm_90'
ptxas info    : Function properties for {SELECT}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 8592 bytes smem
ptxas info    : Compile time = 213.755 ms
ptxas info    : Compiling entry function '{SPILLS}' for 'sm_90'
ptxas info    : Function properties for {SPILLS}
    856 bytes stack frame, 892 bytes spill stores, 1124 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 880 bytes cumulative stack size, 48 bytes smem, 364 bytes cmem[0]
ptxas info    : Compile time = 864.401 ms
ptxas info    : Function properties for _ZN9batchkern4slowEPfi
    24 bytes stack frame, 12 bytes spill stores, 12 bytes spill loads
ptxas info    : Compiling entry function '_ZN3cub17CUB_300001_SM_9006detail11EmptyKernelIvEEvv' for 'sm_90'
ptxas info    : Function properties for _ZN3cub17CUB_300001_SM_9006detail11EmptyKernelIvEEvv
    8 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 4 registers, used 0 barriers
ptxas info    : Compile time = 1.355 ms
ptxas info    : Compiling entry function '_ZN9batchkern11unpack_rowsEPKmPll' for 'sm_90'
ptxas info    : Function properties for _ZN9batchkern11unpack_rowsEPKmPll
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 28 registers, used 0 barriers, 376 bytes cmem[0]
ptxas info    : Compile time = 9.058 ms
"""
# Only CUB's kernel still spills.
CLEAN = re.sub(r"\d{2,} bytes (stack|spill|cumulative)", r"0 bytes \1", REPORT)
FAKE = """\
#!/bin/sh
if [ "$1" = --version ]; then echo 'Cuda compilation tools, release 9.2, V9.2.148'; exit; fi
arch=$(echo "$*" | sed 's/.*code=\\(sm_[0-9]*\\).*/\\1/')
sed "s/sm_90/$arch/" "${0%/*}/report" >&2
exit $(cat "${0%/*}/status")
"""
SPEC = importlib.util.spec_from_file_location("kernel_resources", SCRIPT)
script = sys.modules["kernel_resources"] = importlib.util.module_from_spec(SPEC)  # where dataclass looks for it
SPEC.loader.exec_module(script)


def run(folder: Path, *arguments: str, report: str = REPORT, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the script with an nvcc that prints this report for every file and architecture."""
    for name, text in (("nvcc", FAKE), ("report", report), ("status", str(status))):
        (folder / name).write_text(text)
    (folder / "nvcc").chmod(0o755)
    env = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH")}
    env["PATH"] = os.pathsep.join([str(folder), env["PATH"]])
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], env=env, capture_output=True, text=True)


def test_the_kernels_of_a_report() -> None:
    select, spills, unpack = script.parse(REPORT)  # and none of CUB's
    assert select == script.Kernel(SELECT, "sm_90", registers=64, shared=8592, stack=0, spills=0)
    # The stack of the function that it calls counts as its own.
    assert spills == script.Kernel(SPILLS, "sm_90", registers=255, shared=48, stack=880, spills=892 + 1124)
    assert (unpack.registers, unpack.shared, unpack.stack, unpack.spills) == (28, 0, 0, 0)
    assert script.parse(REPORT.replace("_ZN9batchkern", "_ZN3cub")) == []


@pytest.mark.parametrize("report", ["", "ptxas info    : 0 bytes gmem\n", REPORT.replace("Used 4 ", "Needs 4 ")])
def test_a_report_that_cannot_be_read_is_an_error(report: str) -> None:
    with pytest.raises(script.Failure, match="could be read"):
        script.parse(report)


def test_clean_kernels_are_tabulated(tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    result = run(tmp_path, "--out", str(out), report=CLEAN)
    assert result.returncode == 0, result.stdout + result.stderr
    text = out.read_text()
    assert "with nvcc 9.2.148" in text
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    names = ["rank_few<false, float>", "select_rows<true, PlainLosses<Float16>>", "unpack_rows"]
    assert [row.split("`")[1] for row in rows] == names
    assert rows[1].endswith("` |" + " 64 | 8592 | 0 |" * 3)


def test_spills_are_refused_by_name(tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    result = run(tmp_path, "--check", "--out", str(out))
    assert result.returncode == 1, result.stdout + result.stderr
    for architecture in ("sm_80", "sm_90", "sm_100"):
        assert f"{architecture}: rank_few<false, float> has 880 bytes of stack, 2016 of spills" in result.stdout
    assert "select_rows" not in result.stdout
    assert not out.exists()


def test_without_a_working_nvcc_there_is_nothing_to_judge(tmp_path: Path) -> None:
    env = {**os.environ, "PATH": "", "CUDA_HOME": str(tmp_path / "nowhere")}
    result = subprocess.run([sys.executable, str(SCRIPT), "--check"], env=env, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert (
        result.stderr
        == "kernel_resources: no nvcc was found in CUDA_HOME, on the PATH, in this environment or in /usr/local/cuda\n"
    )

    failed = run(tmp_path, "--check", report="x.cu(3): error: expected a ';'\nnot of interest\n", status=1)
    assert failed.returncode == 2
    first, *rest = failed.stderr.splitlines()
    assert first.startswith("kernel_resources: nvcc could not compile ")
    assert rest == ["x.cu(3): error: expected a ';'"]

    for report, because in (("", "0 could be read"), (REPORT.replace("_ZN9batchkern", "_ZN3cub"), "no kernel of ours")):
        empty = run(tmp_path, "--check", report=report)
        assert (empty.returncode, empty.stderr.count("\n")) == (2, 1)
        assert because in empty.stderr
