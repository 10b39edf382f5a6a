"""What tools/machine_code.py reads in the machine code of kernels."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import machine_code
from tools.machine_code import Speed

# As cuobjdump prints it: the second word of each instruction stands in a line of its own.
SASS = """
	code for sm_90
		Function : first
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                 /* 0x00000a00ff017b82 */
                                                                          /* 0x000e300000000800 */
        /*0010*/                   LDG.E.U8 R6, desc[UR4][R2.64] ;
        /*0020*/                   ISETP.NE.AND P0, PT, R6, RZ, PT ;
        /*0030*/              @!P0 BRA 0xe0 ;
        /*0040*/                   LDG.E.64 R8, desc[UR4][R4.64] ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/                   LDG.E.128 R12, desc[UR4][R8.64] ;
        /*0070*/              @!P1 LDG.E.128 R16, desc[UR4][R8.64+0x200] ;
        /*0080*/                   FADD R20, R12, R13 ;
        /*0090*/                   LDG.E.128 R24, desc[UR4][R8.64+0x400] ;
        /*00a0*/                   MUFU.EX2 R21, R20 ;
        /*00b0*/                   IADD3 R8, P2, R8, 0x600, RZ ;
        /*00c0*/                   ISETP.GE.U32.AND P0, PT, R8, R11, PT ;
        /*00d0*/              @!P0 BRA 0x60 ;
        /*00e0*/                   EXIT ;
        /*00f0*/                   BRA 0xf0 ;
		Function : second
        /*0000*/                   LDG.E R2, desc[UR4][R4.64] ;
        /*0010*/                   LDG.E R3, desc[UR4][R6.64] ;
        /*0020*/                   IMAD.WIDE R8, R2, 0x4, R10 ;
        /*0030*/                   LDG.E R3, desc[UR4][R8.64] ;
        /*0040*/                   EXIT ;
"""


def test_the_main_loop_and_what_it_waits_for() -> None:
    first, second = machine_code.kernels(SASS).values()
    (loop,) = first.loops
    assert (loop.address, loop.loads, loop.in_flight, loop.bytes, loop.instructions) == (0x60, 2, 32, 48, 8)
    assert (loop.exponentials, loop.elements(4)) == (1, 1)
    assert first.main == loop
    assert first.dependent == 2  # the byte decides whether the address is loaded
    assert first.barriers == 1
    assert (second.main, second.dependent) == (None, 2)  # not 3: the first two do not wait
    assert second.outside == (2, 8)


def test_a_way_around_a_load_is_not_the_loop() -> None:
    # Both ways load as much, and one does more work by fewer instructions than the other's checks take.
    sass = """
		Function : choice
        /*0000*/                   NOP ;
        /*0010*/                   ISETP.GE.AND P0, PT, R1, R2, PT ;
        /*0020*/               @P0 BRA 0x70 ;
        /*0030*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0040*/                   LDG.E.128 R8, desc[UR4][R2.64+0x200] ;
        /*0050*/                   MUFU.EX2 R12, R4 ;
        /*0060*/                   BRA 0xd0 ;
        /*0070*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0080*/                   FADD R20, R4, R4 ;
        /*0090*/                   LDG.E.128 R8, desc[UR4][R2.64+0x200] ;
        /*00a0*/                   FADD R20, R8, R4 ;
        /*00b0*/                   MUFU.EX2 R12, R4 ;
        /*00c0*/                   FADD R20, R8, R4 ;
        /*00d0*/                   ISETP.GE.AND P1, PT, R1, R3, PT ;
        /*00e0*/               @P1 BRA 0x10 ;
        /*00f0*/                   EXIT ;
"""
    (code,) = machine_code.kernels(sass).values()
    assert (code.main.loads, code.main.bytes, code.main.instructions) == (2, 32, 8)


def test_threads_that_meet_again_go_on_where_they_were_told() -> None:
    sass = """
		Function : meets
        /*0000*/                   BSSY B0, 0x60 ;
        /*0010*/              @!P0 BRA 0x40 ;
        /*0020*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0030*/                   BSYNC B0 ;
        /*0040*/                   LDG.E R5, desc[UR4][R2.64] ;
        /*0050*/                   BSYNC B0 ;
        /*0060*/                   IADD3 R4, R4, R5, RZ ;
        /*0070*/                   IMAD.WIDE R6, R4, 0x4, R8 ;
        /*0080*/                   LDG.E R5, desc[UR4][R6.64] ;
        /*0090*/                   EXIT ;
"""
    (code,) = machine_code.kernels(sass).values()
    assert code.dependent == 2  # neither side waits for the other


def test_a_multiprocessor_holds_what_a_block_lets_it() -> None:
    assert machine_code.resident_warps(64, 9760, 512) == 32  # registers
    assert machine_code.resident_warps(65, 0, 256) == 24  # which come in eights
    assert machine_code.resident_warps(32, 100_000, 256) == 16  # shared memory
    assert machine_code.resident_warps(16, 0, 1024) == 64  # threads
    assert machine_code.resident_warps(16, 0, 32) == 32  # blocks


SPEED = Speed(4, 16, 1, 22, 11.9, 32, 65.5)


@pytest.mark.parametrize(
    ("now", "worse"),
    [
        (SPEED, ""),
        (Speed(8, 16, 0, 3, 8.0, 48, 131.0), ""),
        (Speed(2, 16, 1, 22, 11.9, 32, 32.8), "KB in flight 32.8, was 65.5"),
        (Speed(4, 16, 2, 22, 12.0, 32, 65.5), "instructions an element 12, was 11.9; dependent loads before 2, was 1"),
        (Speed(1, 4, 1, 22, 0, 32, 4.1), "instructions an element -, was 11.9; KB in flight 4.1, was 65.5"),
    ],
)
def test_what_is_worse_than_a_table_says(now: Speed, worse: str) -> None:
    table = "\n".join(["| `kernel<1>` | 1 | 2 |", *machine_code.HEADER, f"| `kernel<1>` | {SPEED.cells()}", ""])
    assert now.worse(machine_code.rows(table)["kernel<1>"]) == worse


def test_a_warp_issues_in_order_and_what_other_blocks_wrote_is_no_input() -> None:
    sass = """
		Function : head
        /*0000*/                   LDG.E R2, desc[UR4][R4.64] ;
        /*0010*/                   FADD R3, R2, R2 ;
        /*0020*/                   LDG.E.64.STRONG.GPU R8, desc[UR4][R6.64] ;
        /*0030*/                   DADD R10, R8, R8 ;
        /*0040*/              @!P1 BRA 0x20 ;
        /*0050*/                   LDG.E R12, desc[UR4][R14.64] ;
        /*0060*/                   LDG.E R13, desc[UR4][R14.64+0x4] ;
        /*0070*/                   LDG.E R16, desc[UR4][R14.64+0x8] ;
        /*0080*/                   FADD R17, R13, R12 ;
        /*0090*/                   LDG.E R18, desc[UR4][R14.64+0xc] ;
        /*00a0*/                   EXIT ;
"""
    (code,) = machine_code.kernels(sass).values()
    assert code.loops == []  # of blocks' sums
    assert code.dependent == 4  # each behind an instruction that uses the one before
    assert code.outside == (3, 12)
