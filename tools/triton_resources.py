"""Compiles every Triton kernel, in every configuration that can be launched, for three architectures, without a GPU.

    python tools/triton_resources.py [--out tools/TRITON_RESOURCES.md | --check]

The launchers run on CPU tensors, and each kernel that they launch is compiled, with the specialisation of a real
launch, instead of being run. The exit code is 1 if a kernel has a stack or spills, or no load as wide as its rows
allow: 16, 8 or 4 bytes. ``--check`` writes nothing, reports a table that is out of date, and exits with 1 if the
machine code for Hopper (``machine_code.py``) is worse than in the table and the same Triton made both.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from batchkern.triton import augment_latent, soft_label_kl  # noqa: E402
from tools import machine_code  # noqa: E402

ARCHITECTURES = (80, 90, 100)
HOPPER = 90
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WHOLE = [2**n for n in range(4, 14)]
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
NUMBERS = re.compile(r"(\d+)")
LOADS = re.compile(r"\bld\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\b")


@dataclass(frozen=True, order=True)
class Case:
    """One call of a launcher."""

    op: str
    width: int
    dtype: torch.dtype
    basis: str = ""
    shifted: bool = False
    """Whether tensors begin one element after a multiple of 16 bytes."""

    def __str__(self) -> str:
        facts = (self.width, str(self.dtype).removeprefix("torch."), self.basis, "shifted" * self.shifted)
        return " ".join(str(fact) for fact in facts if fact)


@dataclass(frozen=True)
class Kernel:
    """The resources of a kernel: registers per thread; shared memory, and stack and spills, in bytes; and the bytes of
    its widest load, and of the widest that its launcher allows."""

    name: str
    architecture: int
    case: str
    registers: int
    shared: int
    stack: int
    load: int
    allowed: int
    speed: machine_code.Speed | None
    """Only for Hopper."""

    def complaint(self) -> str:
        if self.stack:
            return f"{self.stack} bytes of stack and spills"
        return f"no load of {self.allowed} bytes, but of {self.load}" if self.load < self.allowed else ""


def cases() -> list[Case]:
    """Shapes that reach every configuration: with rows that begin at multiples of 16 bytes, and rows or tensors that do
    not."""
    tiles = [16, 64, 256, 1024]
    widths = {
        "soft_label_kl": [*WHOLE, 2**13 + 16, 2**15 + 16],
        "augment_latent none": tiles,
        "augment_latent dense": tiles,
        "augment_latent hadamard": [*WHOLE, *(2**n for n in range(14, 18))],
        "augment_latent_backward": tiles,
    }
    every = []
    for what, aligned in widths.items():
        op, _, basis = what.partition(" ")
        # If rows are one element shorter, a load takes one element; two shorter, 8 or 4 bytes; four shorter, 8 bytes.
        for less, dtypes in ((0, DTYPES), (1, DTYPES), (2, DTYPES[:2]), (4, DTYPES[1:2])):
            every += [Case(op, width - less, dtype, basis) for width, dtype in product(aligned, dtypes)]
        every += [Case(op, aligned[-1] + 1, dtype, basis) for dtype in DTYPES]
        every += [Case(op, width, dtype, basis, shifted=True) for width, dtype in product(aligned, DTYPES)]
    return every


def call(case: Case) -> None:
    def tensor(rows: int) -> torch.Tensor:
        flat = torch.zeros(rows * case.width + 1, dtype=case.dtype)
        return flat[1 if case.shifted else 0 :][: rows * case.width].view(rows, case.width)

    seed, copies = torch.tensor(1), {"gaussian": 1, "dropout": 1, "drop_prob": 0.5}
    if case.op == "soft_label_kl":
        _, _, *gradients = soft_label_kl.soft_label_kl(tensor(2), tensor(2), reference_grad=True)
        for gradient in gradients:
            out = gradient if gradient.dtype == case.dtype else torch.empty_like(gradient, dtype=case.dtype)
            soft_label_kl.scale_gradient_(out, gradient, torch.ones(()))
    elif case.op == "augment_latent":
        # A basis of the right shape that takes no memory.
        shape = {"none": None, "dense": (case.width, case.width), "hadamard": (case.width,)}[case.basis]
        basis = None if shape is None else torch.zeros(1).expand(shape)
        augment_latent.augment_latent(tensor(2), seed, sigma=1.0, tau=1.0, basis=basis, **copies)
    else:
        augment_latent.augment_latent_backward(tensor(6), seed, **copies)


class HostDriver:
    """The functions of a driver that Triton calls before it compiles."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_device(self) -> int:
        return self.target.arch  # Triton caches compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@contextmanager
def compiled(architecture: int) -> Iterator[list[tuple[JITFunction, dict[str, Any], Any]]]:
    """Collects (function, constants, compiled kernel) of every launch, and launches none."""
    launches: list[tuple[JITFunction, dict[str, Any], Any]] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        launches.append((self, options, kernel))
        return kernel

    triton.runtime.driver.set_active(HostDriver(architecture))
    JITFunction.run = compile_only
    try:
        yield launches
    finally:
        JITFunction.run = run


def inspect(job: tuple[Case, int]) -> list[Kernel]:
    case, architecture = job
    torch.set_num_threads(1)
    with compiled(architecture) as launches:
        call(case)
    return [describe(case, architecture, *launch) for launch in launches]


def describe(case: Case, architecture: int, function: JITFunction, options: dict[str, Any], kernel: Any) -> Kernel:
    with TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        registers, stack, shared, local = map(int, USAGE.search(dumped("-res-usage", cubin)).groups())
        shared, speed = max(shared, kernel.metadata.shared), None
        if architecture == HOPPER:
            (code,) = machine_code.kernels(dumped("-sass", cubin)).values()
            warps = machine_code.resident_warps(registers, shared, 32 * kernel.metadata.num_warps)
            speed = machine_code.Speed.of(code, warps, case.dtype.itemsize)
    constants = ", ".join(f"{name.lower()} {value}" for name, value in options.items() if name.isupper())
    return Kernel(
        name=f"{function.fn.__name__.lstrip('_')}, {constants}, {kernel.metadata.num_warps} warps",
        architecture=architecture,
        case=f"{case.op} {case}",
        registers=registers,
        shared=shared,
        stack=stack + local,
        load=max(int(vector or 1) * int(bits) // 8 for vector, bits in LOADS.findall(kernel.asm["ptx"])),
        allowed=options["VECTOR"] * case.dtype.itemsize,
        speed=speed,
    )


def dumped(what: str, cubin: Path) -> str:
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([cuobjdump, what, cubin], capture_output=True, text=True, check=True).stdout


def table(kernels: list[Kernel]) -> str:
    architectures = sorted({k.architecture for k in kernels})
    columns = [f"sm_{a} {what}" for a in architectures for what in ("registers", "shared", "stack + spills")]
    lines = [
        "# What the Triton kernels take",
        "",
        "Registers of a thread, bytes of shared memory, and bytes of stack and spills together, which should be 0, of",
        "every configuration that can be launched: the most over float32, bfloat16 and float16, and over tensors that",
        "begin at a multiple of 16 bytes and tensors that do not. Vector: elements that a load takes, those in 16, 8",
        "or 4 bytes, of which rows are multiples; 1 where there are none, or tensors begin elsewhere.",
        f"Written by `python tools/triton_resources.py` with Triton {triton.__version__}.",
        "",
        f"| kernel | {' | '.join(columns)} |",
        f"|---|{'---:|' * len(columns)}",
    ]
    names = sorted(
        {k.name for k in kernels}, key=lambda x: [int(y) if y.isdigit() else y for y in re.split(r"(\d+)", x)]
    )
    for name in names:
        cells = []
        for architecture in architectures:
            same = [k for k in kernels if (k.name, k.architecture) == (name, architecture)]
            cells += [max(k.registers for k in same), max(k.shared for k in same), max(k.stack for k in same)]
        lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
    lines += ["", f"## What their machine code for sm_{HOPPER} says", "", "The worst over types.", *machine_code.HEADER]
    lines += [f"| {name} | {slowest(kernels, name).cells()}" for name in names]
    return "\n".join(lines) + "\n"


def slowest(kernels: list[Kernel], name: str) -> machine_code.Speed:
    return machine_code.Speed.worst([k.speed for k in kernels if k.name == name and k.speed])


def slower(kernels: list[Kernel], before: str) -> list[str]:
    known = machine_code.rows(before)
    names = sorted({k.name for k in kernels} & known.keys())
    changes = {name: slowest(kernels, name).worse(known[name]) for name in names}
    return [f"sm_{HOPPER}: {name}: {change}" for name, change in changes.items() if change]


def main() -> int:
    parser = argparse.ArgumentParser(description="Tabulate what the Triton kernels take, and refuse stack and spills.")
    parser.add_argument("--out", type=Path, default=ROOT / "tools" / "TRITON_RESOURCES.md")
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    start = time.monotonic()
    jobs = list(product(cases(), ARCHITECTURES))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        kernels = [kernel for found in pool.map(inspect, jobs, chunksize=4) for kernel in found]
    text, before = table(kernels), arguments.out.read_text() if arguments.out.exists() else ""
    worse = []
    if arguments.check and f"with Triton {triton.__version__}." in before and text != before:
        print(f"{arguments.out.name} is not what the kernels take now: make triton-resources")
        worse = slower(kernels, before)
    if not arguments.check:
        arguments.out.write_text(text)
    names = {kernel.name for kernel in kernels}
    print(f"{len(names)} configurations in {len(set(kernels))} kernels ({time.monotonic() - start:.0f} s)")
    for architecture in ARCHITECTURES:
        most = max(k.registers for k in kernels if k.architecture == architecture)
        print(f"sm_{architecture}: at most {most} registers")
    bad = worse + sorted(
        {f"sm_{k.architecture}: {k.name} has {k.complaint()} ({k.case})" for k in kernels if k.complaint()}
    )
    print(*bad, sep="\n", end="\n" * bool(bad))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
