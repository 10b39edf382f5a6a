"""The tests that look at what a change touches, one path a line: python tests/touched.py [BASE].

A change is what differs from the commit BASE, new files included; by default from where this branch left origin/main,
or from the last commit. A file's tests are those that mirror it or its folder, that import it by its own name, or that
find faults in it by mutations.py. Tests of everything are not found this way: make test runs all.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from mutations import MUTATIONS

ROOT = Path(__file__).resolve().parents[1]
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
OTHERS = {
    "setup.py": ["test_build"],
    "csrc/digest.py": ["test_build", "test_gpu_run"],
    "csrc/ops.": ["test_build", "test_kernels", "test_backend"],
    "csrc/arguments.h": ["test_kernels"],
    "csrc/cpu/": ["test_kernels"],
    "README.md": ["test_readme", "test_figures"],
    "docs/": ["test_docs"],
    "examples/": ["test_examples"],
    "bench/results/": ["test_figures", "test_bench_measure"],
    "bench/bench_": ["test_bench"],
    "bench/conftest.py": ["test_bench"],
    "tests/cuda_on_host/": ["test_runner"],
}
"""Tests with another name than what they look at, by how the paths of that begin."""


def changed(base: str | None) -> list[str]:
    """Paths from the root."""
    base = base or git("merge-base", "HEAD", "origin/main") or "HEAD"
    return [*git("diff", "--name-only", base).split(), *git("ls-files", "--others", "--exclude-standard").split()]


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def module(path: str) -> str:
    """The name by which Python imports a file; that of a helper of the tests is short."""
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return name.rpartition(".")[2] if name.startswith("tests.") else name


@cache
def imported(test: Path) -> set[str]:
    """What a test imports: modules, and what may be one within a module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(test.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def mirrors(test: Path, path: str) -> bool:
    """Whether a test has the file's name: that of test_trimmed_mean_kernel.py is trimmed_mean."""
    stem, folder = Path(path).stem.lstrip("_"), Path(path).parent.name
    name = test.stem.removeprefix("test_").removesuffix("_kernel")
    return name in (stem, f"{folder}_{stem}") or (name == folder != "bench") or (test.parent.name == folder == "triton")


def tests_of(path: str) -> set[Path]:
    if ROOT / path in TESTS:
        return {ROOT / path}
    named = [name for begin, names in OTHERS.items() if path.startswith(begin) for name in names]
    found = {test for test in TESTS if test.stem in named or mirrors(test, path)}
    found |= {ROOT / name for m in MUTATIONS if m.file == path for name in m.tests if ROOT / name in TESTS}
    if path.endswith(".py"):
        found |= {test for test in TESTS if module(path) in imported(test) - {"batchkern", "bench"}}
    return found


def touched(paths: Iterable[str]) -> dict[str, list[str]]:
    """The tests of each path."""
    return {path: [str(test.relative_to(ROOT)) for test in tests_of(path)] for path in paths}


if __name__ == "__main__":
    found = touched(changed(sys.argv[1] if len(sys.argv) > 1 else None))
    for path, tests in found.items():
        if path.startswith("csrc/cuda/"):
            print(f"{path}: make cuda-on-host runs its tests, which takes minutes", file=sys.stderr)
        elif path.endswith((".py", ".h", ".cpp", ".inl")) and not tests:
            print(f"{path} has no tests of its own: make test", file=sys.stderr)
    print(*sorted({test for tests in found.values() for test in tests}), sep="\n")
