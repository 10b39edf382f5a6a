"""What tools/kernel_resources.py reads in a report of cuobjdump, and what it refuses."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "tools" / "kernel_resources.py"
SELECT = "_ZN9batchkern11select_rowsILb1ENS_11PlainLossesINS_7Float16EEEEEvNS_9SelectionIT0_EE"
SPILLS = "_ZN9batchkern8rank_fewILb0EfEEvNS_7RankFewIT0_EE"
SHORT = ["rank_few<false, float>", "select_rows<true, PlainLosses<Float16>>"]
# From CUDA 13.0, but for the figures of the second kernel.
PART = f"""
Fatbin elf code:
================
arch = sm_90
code version = [1,8]
host = linux
compile_size = 64bit

Resource usage:
 Common:
  GLOBAL:171 CONSTANT[4]:32
 Function {SELECT}:
  REG:64 STACK:0 SHARED:9616 LOCAL:0 CONSTANT[0]:568 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function {SPILLS}:
  REG:255 STACK:856 SHARED:48 LOCAL:24 CONSTANT[0]:568 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN3cub17CUB_300001_SM_9006detail11EmptyKernelIvEEvv:
  REG:4 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:528 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin ptx code:
================
arch = sm_90
code version = [9,0]
host = linux
compile_size = 64bit
compressed
ptxasOptions =
"""
REPORT = "".join(PART.replace("sm_90", f"sm_{architecture}") for architecture in (100, 80, 90, 75))
ELF = f"""
.nv.info.{SELECT}
	<0x10>
	Attribute:	EIATTR_MAX_THREADS
	Format:	EIFMT_SVAL
	Value:	0x400 0x1 0x1
.nv.info.{SPILLS}
	Attribute:	EIATTR_MAX_THREADS
	Format:	EIFMT_SVAL
	Value:	0x100 0x1 0x1
"""
SASS = "".join(
    f"""
		Function : {name}
        /*0000*/                   LDG.E.64 R8, desc[UR4][R4.64] ;
        /*0010*/                   LDG.E.128 R12, desc[UR4][R8.64] ;
        /*0020*/                   FADD R20, R12, R13 ;
        /*0030*/              @!P0 BRA 0x10 ;
        /*0040*/                   EXIT ;
"""
    for name in (SELECT, SPILLS)
)
CLEAN = REPORT.replace("STACK:856", "STACK:0").replace("LOCAL:24", "LOCAL:0")  # only CUB's kernel still has a stack
SPEC = importlib.util.spec_from_file_location("kernel_resources", SCRIPT)
script = sys.modules["kernel_resources"] = importlib.util.module_from_spec(SPEC)  # where dataclass looks for it
SPEC.loader.exec_module(script)


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the script on a report: (exit status, stdout, stderr)."""

    def run(report: str, *arguments: str) -> tuple[int, str, str]:
        parts = {"-res-usage": report, "-elf": ELF, "-sass": SASS}
        monkeypatch.setattr(script, "report", lambda what, *_: parts[what])
        monkeypatch.setattr(script, "compiler", lambda: "nvcc 13.0")
        monkeypatch.setattr(sys, "argv", ["kernel_resources.py", *arguments])
        return script.main(), *capsys.readouterr()

    return run


def test_the_kernels_of_a_report() -> None:
    select, spills = script.parse(PART)  # and none of CUB's
    assert select == script.Kernel(SELECT, 90, registers=64, shared=9616, stack=0)
    assert spills == script.Kernel(SPILLS, 90, registers=255, shared=48, stack=856 + 24)
    assert {kernel.architecture for kernel in script.parse(REPORT)} == {75, 80, 90, 100}


def test_clean_kernels_are_tabulated(main, tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    code, shown, _ = main(CLEAN, "--out", str(out))
    assert (code, shown.splitlines()[0]) == (0, "2 kernels for 3 architectures")
    rows = [line for line in out.read_text().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == SHORT * 2
    assert rows[1].endswith("` |" + " 64 | 9616 | 0 |" * 3)
    assert rows[2].endswith("` | 1 x 16 | 0.8 | 1 | 0 | 8 | 4.1 |")  # 255 registers: a block of 8 warps
    assert rows[3].endswith("` | 1 x 16 | 0.4 | 1 | 0 | 32 | 16.4 |")


def test_machine_code_worse_than_the_table_is_refused(main, tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    main(CLEAN, "--out", str(out))
    assert main(CLEAN, "--check", "--out", str(out))[0] == 0
    whole = out.read_text()
    last = f"{out} is not what it would be now; it is written without --check"
    row = next(line for line in whole.splitlines()[::-1] if SHORT[1] in line)
    for changed, said in (
        (whole.replace("| 0.4 | 1 | 0 | 32 |", "| 0.3 | 1 | 0 | 32 |"), "instructions an element 0.4, was 0.3"),
        (whole.replace("| 0.4 | 1 | 0 | 32 |", "| abc | 1 | 0 | 32 |"), "instructions an element 0.4, was abc"),
    ):
        out.write_text(changed)
        code, shown, _ = main(CLEAN, "--check", "--out", str(out))
        assert (code, shown.splitlines()[-2:]) == (1, [f"sm_90: {SHORT[1]}: {said}", last])
    for changed, said in (
        (whole.replace(f"{row}\n", ""), [f"{SHORT[1]} is not in the table", last]),
        (whole + "| `gone` | 1 |\n", ["gone is in the table and not in the module", last]),
        (whole.replace(" 64 | 9616 | 0 |", " 40 | 9616 | 0 |"), [last]),  # registers
        (whole.replace("| 0.4 | 1 | 0 | 32 |", "| 0.9 | 1 | 0 | 32 |"), [last]),  # better
    ):
        out.write_text(changed)
        code, shown, _ = main(CLEAN, "--check", "--out", str(out))
        assert (code, shown.splitlines()[-len(said) :]) == (1, said)
    out.write_text(whole.replace("nvcc 13.0", "nvcc 12.9"))
    code, shown, _ = main(CLEAN, "--check", "--out", str(out))
    assert code == 0
    assert "of another compiler than nvcc 13.0: not compared" in shown
    out.write_text("")
    assert main(CLEAN, "--check", "--out", str(out))[::2] == (
        2,
        f"kernel_resources: {out} has no such table; it is written without --check\n",
    )


def test_loops_by_a_name(main) -> None:
    code, shown, _ = main(CLEAN, "--loops", "select_rows")
    assert (code, shown.splitlines()[0], len(shown.splitlines())) == (0, SHORT[1], 2)
    assert main(CLEAN, "--loops", "nosuch") == (2, "", "kernel_resources: no kernel has 'nosuch' in its name\n")


def test_spills_are_refused_by_name(main, tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    code, shown, _ = main(REPORT, "--out", str(out))
    assert code == 1
    for architecture in ("sm_80", "sm_90", "sm_100"):
        assert f"{architecture}: rank_few<false, float> has 880 bytes of stack and spills" in shown
    assert "sm_75" not in shown
    assert "select_rows" not in shown


@pytest.mark.parametrize(
    ("report", "because"),
    [
        ("", "batchkern._C has no kernel of ours for sm_80, sm_90, sm_100"),
        (CLEAN.replace("arch = sm_100", "arch = sm_103"), "batchkern._C has no kernel of ours for sm_100"),
        (CLEAN.replace("_ZN9batchkern", "_ZN3cub"), "batchkern._C has no kernel of ours for sm_80, sm_90, sm_100"),
        (CLEAN.replace("REG:4 ", "REGISTERS:4 "), "4 functions in the report of cuobjdump could not be read"),
    ],
)
def test_what_cannot_be_judged_is_an_error(main, report: str, because: str) -> None:
    assert main(report, "--check") == (2, "", f"kernel_resources: {because}\n")


def test_a_module_without_cuda_has_nothing_to_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from batchkern import _C

    monkeypatch.setattr(_C, "build_facts", lambda: {"cuda": False})
    with pytest.raises(script.Failure, match="was built without CUDA"):
        script.report("-res-usage")
