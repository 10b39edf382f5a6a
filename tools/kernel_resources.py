"""Tabulates the resources of each CUDA kernel: registers, static shared memory, and stack and spills, which should be
0; and estimates of its speed from its machine code for Hopper (``machine_code.py``).

    python tools/kernel_resources.py [--out tools/KERNEL_RESOURCES.md | --check | --loops NAME]

Reads the machine code in batchkern._C with the cuobjdump of Triton's package: nothing is compiled, and neither a GPU
nor a CUDA toolkit is needed. The exit code is 1 if one of our kernels has a stack or spills on any architecture, or,
with ``--check``, if the table differs and was made with the same nvcc; it prints what became worse. The exit code is 2
if there is nothing to check: no module, a module without one of the architectures, no table, or a report that cannot be
read. ``--loops`` shows every loop that reads memory in the kernels whose names contain NAME.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools import machine_code  # noqa: E402

ARCHITECTURES = (80, 90, 100)
OURS = "_ZN9batchkern"
"""The beginning of mangled names in the namespace batchkern, and of none in CUB."""
ARCHITECTURE = re.compile(r"^arch = sm_(\d+)$", re.MULTILINE)
HOPPER = 90
THREADS = re.compile(r"^\.nv\.info\.(\S+)$|EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+0x([0-9a-f]+)", re.MULTILINE)
FUNCTION = re.compile(r"^ Function (\S+):\n  REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+) ", re.MULTILINE)


class Failure(Exception):
    """A sentence that says why there is nothing to check."""


@dataclass(frozen=True)
class Kernel:
    """The resources of one kernel, or of a function that a kernel calls, on one architecture: registers per thread,
    and, in bytes, static shared memory, and stack and spills together."""

    name: str
    architecture: int
    registers: int
    shared: int
    stack: int
    mangled: str = ""


def parse(report: str) -> list[Kernel]:
    """Our kernels in a report of cuobjdump, with their mangled names."""
    kernels, listed = [], 0
    for part in re.split(r"^Fatbin ", report, flags=re.MULTILINE):
        architecture = ARCHITECTURE.search(part)
        listed += part.count("\n Function ")
        for name, registers, stack, shared, local in FUNCTION.findall(part):
            listed -= 1
            if architecture and name.startswith(OURS):
                kernels.append(Kernel(name, int(architecture[1]), int(registers), int(shared), int(stack) + int(local)))
    if listed:
        raise Failure(f"{listed} functions in the report of cuobjdump could not be read")
    return kernels


def report(*options: str) -> str:
    """The report of cuobjdump on the module that Python would import."""
    import triton  # here, so that main() reports it in a sentence if it is missing

    from batchkern import _C

    if not _C.build_facts()["cuda"]:
        raise Failure("batchkern._C was built without CUDA")
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([cuobjdump, *options, _C.__file__], capture_output=True, text=True, check=True).stdout


def compiler() -> str:
    from batchkern import _C

    return f"nvcc {_C.build_facts()['cuda_version']}"


def threads(report: str) -> dict[str, int]:
    """The threads of a block, by mangled names, from cuobjdump's report on the ELF file."""
    found, kernel = {}, ""
    for name, value in THREADS.findall(report):
        if name:
            kernel = name
        else:
            found[kernel] = int(value, 16)
    return found


def speeds(kernels: list[Kernel]) -> dict[str, machine_code.Speed]:
    """The speeds of the kernels for Hopper, by short names."""
    hopper = f"sm_{HOPPER}"
    of_block = threads(report("-elf", "-arch", hopper))
    code = machine_code.kernels(report("-sass", "-arch", hopper))
    result = {}
    for kernel in kernels:
        if kernel.architecture == HOPPER:
            warps = machine_code.resident_warps(kernel.registers, kernel.shared, of_block[kernel.mangled])
            size = 2 if "Float16" in kernel.name else 4
            result[kernel.name] = machine_code.Speed.of(code[kernel.mangled], warps, size)
    return result


def show_loops(name: str, kernels: list[Kernel]) -> None:
    named = [kernel for kernel in kernels if kernel.architecture == HOPPER and name in kernel.name]
    if not named:
        raise Failure(f"no kernel has {name!r} in its name")
    code = machine_code.kernels(report("-sass", "-arch", f"sm_{HOPPER}"))
    for kernel in named:
        print(kernel.name)
        for loop in code[kernel.mangled].loops:
            loads = f"{loop.loads} loads of {loop.width:g} bytes in flight, {loop.bytes} bytes in all"
            main = ", the main loop" if loop == code[kernel.mangled].main else ""
            print(f"  {loop.address:#x}: {loads}, {loop.instructions} instructions{main}")
        if not code[kernel.mangled].loops:
            print("  no loop reads memory")


def demangle(kernels: list[Kernel]) -> list[Kernel]:
    """The kernels, sorted, with names as in the sources: with template arguments, but without the arguments of the
    function."""
    names = "\n".join(kernel.name for kernel in kernels)
    plain = subprocess.run(["c++filt", "-p"], input=names, capture_output=True, text=True).stdout
    short = [name.replace("batchkern::", "").replace("> >", ">>") for name in plain.splitlines()]
    named = [replace(k, name=name, mangled=k.name) for k, name in zip(kernels, short, strict=True)]
    return sorted(named, key=lambda kernel: (kernel.name, kernel.architecture))


def table(kernels: list[Kernel], found: dict[str, machine_code.Speed]) -> str:
    columns = [f"sm_{a} {what}" for a in ARCHITECTURES for what in ("registers", "shared", "stack + spills")]
    lines = [
        "# What the CUDA kernels take",
        "",
        "Registers of a thread, bytes of static shared memory, and bytes of stack and of spills together, which should",
        "be 0, in the machine code of `batchkern._C`; kernels that come from CUB are left out. From sm_90 on CUDA",
        "takes 1,024 bytes of the shared memory of a kernel that has any.",
        "Written by `python tools/kernel_resources.py`.",
        "",
        f"| kernel | {' | '.join(columns)} |",
        f"|---|{'---:|' * len(columns)}",
    ]
    for name in dict.fromkeys(kernel.name for kernel in kernels):
        cells = []
        for architecture in ARCHITECTURES:
            same = [k for k in kernels if (k.name, k.architecture) == (name, architecture)]
            for values in ({k.registers for k in same}, {k.shared for k in same}, {k.stack for k in same}):
                # Several if kernels share a name, none if an architecture lacks the kernel.
                cells.append(" / ".join(map(str, sorted(values))) or "-")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    lines += ["", f"## What their machine code for sm_{HOPPER} says", "", f"Compiled by {compiler()}.", ""]
    lines += [*machine_code.HEADER, *(f"| `{name}` | {speed.cells()}" for name, speed in found.items())]
    return "\n".join(lines) + "\n"


def differences(kernels: list[Kernel], found: dict[str, machine_code.Speed], path: Path) -> list[str]:
    """The differences between the table in a file and the one that would be written now."""
    before = path.read_text() if path.exists() else ""
    known = machine_code.rows(before)
    if not known:
        raise Failure(f"{path} has no such table; it is written without --check")
    if f"Compiled by {compiler()}." not in before:
        print(f"the table's machine code is of another compiler than {compiler()}: not compared")
        return []
    if before == table(kernels, found):
        return []
    changes = {name: speed.worse(known[name]) for name, speed in found.items() if name in known}
    return [
        *(f"sm_{HOPPER}: {name}: {change}" for name, change in changes.items() if change),
        *(f"{name} is not in the table" for name in found.keys() - known.keys()),
        *(f"{name} is in the table and not in the module" for name in known.keys() - found.keys()),
        f"{path} is not what it would be now; it is written without --check",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="Tabulate what the CUDA kernels take, and refuse what is worse.")
    parser.add_argument("--out", type=Path, default=ROOT / "tools" / "KERNEL_RESOURCES.md")
    parser.add_argument("--check", action="store_true", help="write nothing, and compare")
    parser.add_argument("--loops", metavar="NAME", help="show the loops of kernels whose names contain this")
    arguments = parser.parse_args()
    try:
        kernels = demangle([k for k in parse(report("-res-usage")) if k.architecture in ARCHITECTURES])
        if missing := set(ARCHITECTURES) - {k.architecture for k in kernels}:
            names = ", ".join(f"sm_{architecture}" for architecture in sorted(missing))
            raise Failure(f"batchkern._C has no kernel of ours for {names}")
        if arguments.loops:
            show_loops(arguments.loops, kernels)
            return 0
        found = speeds(kernels)
        changed = differences(kernels, found, arguments.out) if arguments.check else []
        if not arguments.check:
            arguments.out.write_text(table(kernels, found))
    except (Failure, ImportError, OSError, subprocess.CalledProcessError) as failure:
        print(f"kernel_resources: {failure}", file=sys.stderr)
        return 2
    print(f"{len({kernel.name for kernel in kernels})} kernels for {len(ARCHITECTURES)} architectures")
    for architecture in ARCHITECTURES:
        most = max(k.registers for k in kernels if k.architecture == architecture)
        print(f"sm_{architecture}: at most {most} registers")
    bad = [kernel for kernel in kernels if kernel.stack]
    for kernel in bad:
        print(f"sm_{kernel.architecture}: {kernel.name} has {kernel.stack} bytes of stack and spills")
    print(*changed, sep="\n", end="\n" * bool(changed))
    return int(bool(bad or changed))


if __name__ == "__main__":
    sys.exit(main())
