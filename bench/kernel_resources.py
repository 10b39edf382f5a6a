"""What does each CUDA kernel take: registers, static shared memory, and memory it should not need: stack and spills?

    python bench/kernel_resources.py [--out bench/KERNEL_RESOURCES.md | --check]

Reads it from the machine code in batchkern._C, by the cuobjdump that Triton brings: nothing is compiled, and neither a
GPU nor a CUDA toolkit is needed. Exits with 1 where a kernel of ours has a stack or spills on any architecture, and
with 2 where there is nothing to judge: no module, one without one of the architectures, a report that cannot be read.
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
ARCHITECTURES = (80, 90, 100)
OURS = "_ZN9batchkern"
"""How the mangled names in namespace batchkern begin, and none of CUB's."""
ARCHITECTURE = re.compile(r"^arch = sm_(\d+)$", re.MULTILINE)
FUNCTION = re.compile(r"^ Function (\S+):\n  REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+) ", re.MULTILINE)


class Failure(Exception):
    """A sentence that says why there is nothing to judge."""


@dataclass(frozen=True)
class Kernel:
    """What one kernel, or a function that one calls, takes on one architecture: registers of a thread; static shared
    memory, and stack and spills together, in bytes."""

    name: str
    architecture: int
    registers: int
    shared: int
    stack: int


def parse(report: str) -> list[Kernel]:
    """Those of ours that a report of cuobjdump lists, under their mangled names."""
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


def report() -> str:
    """Of cuobjdump, on the module that Python would import."""
    import triton  # here, so that its absence is a sentence

    from batchkern import _C

    if not _C.build_facts()["cuda"]:
        raise Failure("batchkern._C was built without CUDA")
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([cuobjdump, "-res-usage", _C.__file__], capture_output=True, text=True, check=True).stdout


def demangle(kernels: list[Kernel]) -> list[Kernel]:
    """With names as they are in the sources, with template arguments but without the kernels' own, sorted."""
    names = "\n".join(kernel.name for kernel in kernels)
    plain = subprocess.run(["c++filt", "-p"], input=names, capture_output=True, text=True).stdout
    short = [name.replace("batchkern::", "").replace("> >", ">>") for name in plain.splitlines()]
    named = [replace(kernel, name=name) for kernel, name in zip(kernels, short, strict=True)]
    return sorted(named, key=lambda kernel: (kernel.name, kernel.architecture))


def table(kernels: list[Kernel]) -> str:
    columns = [f"sm_{a} {what}" for a in ARCHITECTURES for what in ("registers", "shared", "stack + spills")]
    lines = [
        "# What the CUDA kernels take",
        "",
        "Registers of a thread, bytes of static shared memory, and bytes of stack and of spills together, which should",
        "be 0, in the machine code of `batchkern._C`; kernels that come from CUB are left out. From sm_90 on CUDA",
        "takes 1,024 bytes of the shared memory of a kernel that has any.",
        "Written by `python bench/kernel_resources.py`.",
        "",
        f"| kernel | {' | '.join(columns)} |",
        f"|---|{'---:|' * len(columns)}",
    ]
    for name in dict.fromkeys(kernel.name for kernel in kernels):
        cells = []
        for architecture in ARCHITECTURES:
            same = [k for k in kernels if (k.name, k.architecture) == (name, architecture)]
            for values in ({k.registers for k in same}, {k.shared for k in same}, {k.stack for k in same}):
                # Several where kernels share a name, none where an architecture lacks the kernel.
                cells.append(" / ".join(map(str, sorted(values))) or "-")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Tabulate what the CUDA kernels take, and refuse stack and spills.")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "KERNEL_RESOURCES.md")
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    try:
        kernels = demangle([k for k in parse(report()) if k.architecture in ARCHITECTURES])
        if missing := set(ARCHITECTURES) - {k.architecture for k in kernels}:
            names = ", ".join(f"sm_{architecture}" for architecture in sorted(missing))
            raise Failure(f"batchkern._C has no kernel of ours for {names}")
        if not arguments.check:
            arguments.out.write_text(table(kernels))
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
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
