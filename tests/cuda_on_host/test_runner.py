"""The runner that runs the CUDA kernels in tests: what it computes, what it refuses, and which faults it makes
visible."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
FLAGS = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs cases of kernels.cpp in a process of their own. Each worker of xdist compiles it, in seconds."""
    program = tmp_path_factory.mktemp("runner") / "kernels"
    compiler = os.environ.get("CXX", "c++").split()
    sources = [HERE / "runner.cpp", HERE / "kernels.cpp"]
    subprocess.run([*compiler, *FLAGS, *SANITIZE, "-I", HERE / "include", *sources, "-o", program], check=True)

    def run(*cases: str, seed: int | None = None, asan: str = "") -> subprocess.CompletedProcess[str]:
        # The leak detector is off: it does not work in every container.
        env = {**os.environ, "ASAN_OPTIONS": f"detect_leaks=0:{asan}", "UBSAN_OPTIONS": ""}
        env.pop("CUDA_ON_HOST_SEED", None)
        if seed is not None:
            env["CUDA_ON_HOST_SEED"] = str(seed)
        return subprocess.run([program, *cases], env=env, capture_output=True, text=True, timeout=60)

    return run


def written(process: subprocess.CompletedProcess[str]) -> list[int]:
    """The output of a process that ran one kernel."""
    assert process.returncode == 0, process.stderr
    error, *numbers = map(int, process.stdout.split())
    assert error == 0
    return numbers


def after_rounds(size: int, neighbour: Callable[[int], int]) -> list[int]:
    values = list(range(size))
    for _ in range(4):
        values = [value + values[neighbour(i)] for i, value in enumerate(values)]
    return values


def warp_operations() -> list[int]:
    def lanes(of: Callable[[int, list[int]], int]) -> list[int]:
        warps = list(range(100, 132)), list(range(132, 164))
        return [of(lane, warp) for warp in warps for lane in range(32)]

    return [
        *lanes(lambda i, warp: warp[i ^ 5]),
        *lanes(lambda i, warp: warp[i - 3 if i >= 3 else i]),
        *lanes(lambda i, warp: warp[i + 3 if i + 3 < 32 else i]),
        *lanes(lambda i, warp: warp[3 * i % 32]),  # an index is taken modulo 32, and 3 * (32 + i) is the same
        *lanes(lambda i, warp: warp[i ^ 1]),
        *lanes(lambda i, warp: sum(1 << k for k, value in enumerate(warp) if value % 3 == 0)),
        *lanes(lambda i, warp: any(value > 140 for value in warp)),
        *lanes(lambda i, warp: all(value > 120 for value in warp)),
        *lanes(lambda i, warp: sum(value << 26 for value in warp) % 2**32),
        *lanes(lambda i, warp: min(value ^ 7 for value in warp)),
        *lanes(lambda i, warp: max(value ^ 7 for value in warp)),
    ]


def groups() -> list[int]:
    values = list(range(64))
    for i in range(4):
        values = [value + (values[t ^ (1 << i % 3)] if i <= t % 32 // 8 else 0) for t, value in enumerate(values)]
    return [value + (1000 if t % 16 < 8 else 0) for t, value in enumerate(values)]


RIGHT = {
    "sums": [sum(1000 * block + t for t in range(256)) for block in range(6)],
    "rounds": after_rounds(256, lambda i: i ^ 1),
    "warp rounds": after_rounds(64, lambda i: i ^ 1),
    "grid rounds": after_rounds(128, lambda i: (i + 32) % 128),
    "dynamic reverse": [*reversed(range(128))],
    "last block": [16, *(block**2 for block in range(16)), sum(block**2 for block in range(16))],
    "warp operations": warp_operations(),
    "groups": groups(),
    "chain": [sum(range(t + 1)) for t in range(32)],
    "locals": [*range(32)],
    "some return": [(t + 2) % 64 if t % 2 == 0 and t < 64 else 0 for t in range(96)],
    "large": [2 * t for t in range(32)],
    "largest": [1],
}
# The results that their authors would expect.
IN_ORDER = {"blocks in order": [*range(1, 17)], "same order again": [4, 4, 4]}


@pytest.mark.parametrize("case", RIGHT)
def test_a_correct_kernel_is_right_in_every_order(run: Run, case: str) -> None:
    for seed in range(5):
        assert written(run(case, seed=seed)) == RIGHT[case], f"{seed=}"


@pytest.mark.parametrize(
    "case",
    [
        "rounds without first",
        "rounds without second",
        "warp rounds without first",
        "warp rounds without second",
        "grid rounds without first",
        "grid rounds without second",
        "dynamic reverse without first",
        "last block without first",
        *IN_ORDER,
    ],
)
def test_a_kernel_that_relies_on_an_order_is_wrong_in_some(run: Run, case: str) -> None:
    right = (RIGHT | IN_ORDER)[case.partition(" without ")[0]]
    assert any(written(run(case, seed=seed)) != right for seed in range(20))


@pytest.mark.parametrize("case", ["blocks in order", "rounds without first"])
def test_a_seed_repeats_an_order_and_no_seed_draws_a_new_one(run: Run, case: str) -> None:
    def outputs(seed: int | None) -> set[str]:
        return {line for _ in range(2) for line in run(case, case, seed=seed).stdout.splitlines()}

    assert len(outputs(1)) == len(outputs(2)) == 1
    assert outputs(1) != outputs(2)
    assert len(outputs(None)) >= 3  # two orders may look the same, but hardly two pairs


def test_shared_memory_holds_neither_zeros_nor_what_a_block_has_left(run: Run) -> None:
    values = written(run("unwritten"))
    assert len(values) == 256
    assert not {0, 7} & set(values)


PLACE = r"kernels\.cpp:\d+"
REFUSALS = {
    "not in own mask": rf"thread 3 of block \(0, 0\) is not in its own mask at {PLACE}",
    "ended lane": rf"waits at {PLACE} for lane 31, which has ended",
    "another operation": rf"at {PLACE} for lane \d+, which waits for it at {PLACE} with another mask or operation",
    "another mask": r"with another mask or operation",
    "another place": r"with another mask or operation",
    "outside mask": rf"thread 7 of block \(0, 0\) reads at {PLACE} from lane 8, which the mask does not name",
    "two barriers": rf"threads of a block wait at different barriers: {PLACE} and {PLACE}",
    "warp and block": rf"waits at {PLACE} for lanes that never come",
    "block and grid": r"some threads of a block wait for the grid, and others have ended or wait for the block",
    "ended and grid": r"some threads of a block wait for the grid, and others have ended or wait for the block",
    "two grid barriers": rf"blocks wait for the grid at different places: {PLACE} and {PLACE}",
    "not cooperative": r"a launch that is not cooperative waits for its grid",
    "some blocks end": r"some blocks wait for the grid, and others have ended",
    "too large": r"a block takes more than 49152 bytes of shared memory",
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_a_device_leaves_undefined_is_refused_with_a_sentence(run: Run, case: str) -> None:
    for seed in range(5):
        process = run(case, seed=seed)
        assert process.returncode == 3, process.stderr
        assert process.stdout == ""
        assert re.fullmatch(rf"kernel refused: .*{REFUSALS[case]} \(CUDA_ON_HOST_SEED={seed}\)\n", process.stderr)


def test_the_seed_in_a_refusal_is_the_one_that_was_drawn(run: Run) -> None:
    # The thread in the message depends on the order.
    refusal = run("another operation").stderr
    (seed,) = re.findall(r"CUDA_ON_HOST_SEED=(\d+)", refusal)
    assert run("another operation", seed=int(seed)).stderr == refusal


# AddressSanitizer must know to which fiber a fake stack belongs, even if the fiber never ends.
@pytest.mark.parametrize("fake_stacks", [0, 1])
def test_after_a_refusal_the_next_launch_works(run: Run, fake_stacks: int) -> None:
    after = ["sums", "grid rounds", "locals"]
    cases = [case for refused in REFUSALS for case in (refused, *after)]
    process = run(*cases, asan=f"detect_stack_use_after_return={fake_stacks}")
    assert process.returncode == 3, process.stderr
    assert process.stderr.count("kernel refused") == len(process.stderr.splitlines()) == len(REFUSALS)
    lines = [[int(number) for number in line.split()] for line in process.stdout.splitlines()]
    assert lines == [[0, *RIGHT[case]] for case in after] * len(REFUSALS)


@pytest.mark.parametrize(
    ("case", "error"),
    [
        ("no blocks", 9),  # cudaErrorInvalidConfiguration
        ("1056 threads", 9),
        ("33 threads", 9),
        ("dynamic 49153", 9),
        ("5 cooperative blocks", 720),  # cudaErrorCooperativeLaunchTooLarge
    ],
)
def test_a_launch_over_the_limits_returns_an_error_and_runs_nothing(run: Run, case: str, error: int) -> None:
    process = run(case)
    assert (process.returncode, process.stdout) == (0, f"{error} 0\n"), process.stderr


READ = r"AddressSanitizer: .*\n*READ of size 1"
REPORTS = {
    "past shared 13": READ,
    "past shared 16": READ,
    "past dynamic 13": READ,
    "past dynamic 16": READ,
    "past global": r"AddressSanitizer: heap-buffer-overflow .*\n*WRITE of size 4",
    "past local": r"AddressSanitizer: stack-buffer-overflow .*\n*WRITE of size 4",
    "misaligned": r"runtime error: .* misaligned address \S+ for type 'const (struct )?uint4'",
}


@pytest.mark.parametrize("case", REPORTS)
def test_a_sanitizer_reports_an_access_that_is_wrong(run: Run, case: str) -> None:
    process = run(case)
    assert process.returncode not in (0, 2, 3), process.stderr
    assert re.search(REPORTS[case], process.stderr), process.stderr
