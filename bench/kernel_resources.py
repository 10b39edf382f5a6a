"""What does each CUDA kernel take: registers, static shared memory, and memory it should not need, stack and spills?

    python bench/kernel_resources.py [--out bench/KERNEL_RESOURCES.md | --check]

Compiles every file of kernels for three architectures, one nvcc per core at a time, and tabulates what ptxas reports.
No GPU is needed. Exits with 1 where a kernel of ours has a stack frame or spills on any architecture, and with 2 where
there is nothing to judge: no nvcc, code that does not compile, or a report that cannot be read.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("80", "90", "100")
OPTIONS = ("-std=c++17", "-O3", "-Xptxas", "-v")
OURS = "_ZN9batchkern"
"""How the mangled names in namespace batchkern begin, and none of CUB's."""
ENTRY = re.compile(
    r"Compiling entry function '(\S+)' for '(\w+)'\n"
    # By its name, for functions that were not inlined have properties too.
    r".*?Function properties for \1\n"
    r"\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
    r".*?Used (\d+) registers([^\n]*)",
    re.DOTALL,
)


class Failure(Exception):
    """A sentence that says why there is nothing to judge."""


@dataclass(frozen=True)
class Kernel:
    """What one kernel takes on one architecture: registers of a thread; shared memory, stack and spills in bytes."""

    name: str
    architecture: str
    registers: int
    shared: int
    stack: int
    spills: int


def parse(report: str) -> list[Kernel]:
    """The kernels of ours that a report of ptxas lists, under their mangled names. A file may have CUB's alone."""
    entries, listed = ENTRY.findall(report), report.count("Compiling entry function")
    if not entries or len(entries) != listed:
        raise Failure(f"of {listed} kernels in a report of ptxas, {len(entries)} could be read")
    kernels = []
    for name, architecture, frame, stores, loads, registers, rest in entries:
        memory = {what: int(size) for size, what in re.findall(r"(\d+) bytes ([\w ]+)", rest)}
        # The cumulative size has the frames of the functions that the kernel calls, and so their spills.
        stack, spills = max(int(frame), memory.get("cumulative stack size", 0)), int(stores) + int(loads)
        if name.startswith(OURS):
            kernels.append(Kernel(name, architecture, int(registers), memory.get("smem", 0), stack, spills))
    return kernels


def find_nvcc() -> str:
    """The compiler that setup.py would take, if the first one fits torch."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    wheels = sorted(map(str, Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin")))
    places = [os.path.join(home, "bin")] if home else [os.environ.get("PATH", ""), *wheels, "/usr/local/cuda/bin"]
    if nvcc := shutil.which("nvcc", path=os.pathsep.join(places)):
        return nvcc
    raise Failure("no nvcc was found in CUDA_HOME, on the PATH, in this environment or in /usr/local/cuda")


def compile_kernels(nvcc: str, source: Path, architecture: str) -> list[Kernel]:
    with tempfile.TemporaryDirectory() as folder:
        target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
        command = [nvcc, *OPTIONS, target, "-c", str(source), "-o", os.path.join(folder, "kernels.o")]
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    where = f"{source.name} for sm_{architecture}"
    if run.returncode:
        lines = run.stdout.splitlines()
        errors = [line for line in lines if re.search("error|fatal", line, re.IGNORECASE)] or lines[-5:]
        raise Failure("\n".join([f"nvcc could not compile {where}", *errors]))
    try:
        return parse(run.stdout)
    except Failure as failure:
        raise Failure(f"{where}: {failure}") from None


def demangle(kernels: list[Kernel]) -> list[Kernel]:
    """With names as they are in the sources, with template arguments but without the kernels' own, sorted."""
    names = "\n".join(kernel.name for kernel in kernels)
    plain = subprocess.run(["c++filt", "-p"], input=names, capture_output=True, text=True).stdout
    short = [name.replace("batchkern::", "").replace("> >", ">>") for name in plain.splitlines()]
    named = [replace(kernel, name=name) for kernel, name in zip(kernels, short, strict=True)]
    return sorted(named, key=lambda kernel: (kernel.name, int(kernel.architecture.removeprefix("sm_"))))


def table(kernels: list[Kernel], version: str) -> str:
    columns = [f"sm_{a} {what}" for a in ARCHITECTURES for what in ("registers", "shared", "stack + spills")]
    lines = [
        "# What the CUDA kernels take",
        "",
        "Registers of a thread, bytes of static shared memory, and bytes of stack frame and of spill stores and loads",
        "together, which should be 0, as ptxas reports them; kernels that come from CUB are left out.",
        f"Written by `python bench/kernel_resources.py` with nvcc {version}: for each file and architecture,",
        f"`nvcc {' '.join(OPTIONS)} -gencode=arch=compute_NN,code=sm_NN -c csrc/cuda/FILE.cu`.",
        "",
        f"| kernel | {' | '.join(columns)} |",
        f"|---|{'---:|' * len(columns)}",
    ]
    for name in dict.fromkeys(kernel.name for kernel in kernels):
        cells = []
        for architecture in ARCHITECTURES:
            same = [k for k in kernels if (k.name, k.architecture) == (name, f"sm_{architecture}")]
            for values in ({k.registers for k in same}, {k.shared for k in same}, {k.stack + k.spills for k in same}):
                # Several where kernels share a name, none where an architecture lacks the kernel.
                cells.append(" / ".join(map(str, sorted(values))) or "-")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Tabulate what the CUDA kernels take, and refuse stack and spills.")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "KERNEL_RESOURCES.md")
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    start = time.perf_counter()
    try:
        nvcc = find_nvcc()
        sources = [path for path in sorted(ROOT.glob("csrc/cuda/*.cu")) if path.name != "build_facts.cu"]
        jobs = list(product(sources, ARCHITECTURES))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = list(pool.map(lambda job: compile_kernels(nvcc, *job), jobs))
        kernels = demangle([kernel for part in found for kernel in part])
        if not kernels:
            raise Failure("no kernel of ours was found")
        if not arguments.check:
            version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
            number = re.search(r"\bV(\d[\d.]*)", version)
            arguments.out.write_text(table(kernels, number.group(1) if number else "of unknown version"))
    except (Failure, OSError) as failure:  # no c++filt, or no folder for --out
        print(f"kernel_resources: {failure}", file=sys.stderr)
        return 2
    names = {kernel.name for kernel in kernels}
    print(f"{len(names)} kernels, {len(jobs)} runs of nvcc ({time.perf_counter() - start:.0f} s)")
    for architecture in ARCHITECTURES:
        most = max((k.registers for k in kernels if k.architecture == f"sm_{architecture}"), default=0)
        print(f"sm_{architecture}: at most {most} registers")
    bad = [kernel for kernel in kernels if kernel.stack or kernel.spills]
    for kernel in bad:
        print(f"{kernel.architecture}: {kernel.name} has {kernel.stack} bytes of stack, {kernel.spills} of spills")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
