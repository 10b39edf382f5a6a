"""The tests that look at what a change touches, one path a line: python tests/touched.py [BASE].

A change is what differs from the commit BASE, new files included; by default from where this branch left origin/main,
or from the last commit. A file's tests are those that mirror it or its folder, that import it by its own name, or that
find faults in it by mutations. Tests of everything are not found this way: make test runs all.
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
OPS = ["cross_entropy", "trimmed_cross_entropy", "trimmed_mean", "linear_cross_entropy", "linear_trimmed_cross_entropy"]
OPS += ["augment_latent", "soft_label_kl", "rank_batches"]
OF_OPS = [f"test_{op}" for op in OPS]
OF_KERNELS = [f"test_{op}_kernel" for op in OPS if op != "linear_cross_entropy"]  # which has none of its own
OTHERS = {
    "setup.py": ["test_build"],
    "pyproject.toml": ["test_build"],
    "MANIFEST.in": ["test_build"],
    "batchkern/compare/report.html.jinja": ["test_report"],
    "batchkern/ops/_": OF_OPS,
    "batchkern/ops/": ["test_docs", "test_docstrings"],
    "batchkern/strategies/": ["test_docs", "test_docstrings"],
    "batchkern/reference.py": OF_OPS,
    "tests/mutations/": ["test_touched"],
    "csrc/digest.py": ["test_build", "test_gpu_run"],
    "csrc/ops.": ["test_build", "test_kernels", "test_backend"],
    "csrc/arguments.h": ["test_kernels", *OF_KERNELS],
    "csrc/order.h": ["test_trimmed_mean_kernel", "test_rank_batches_kernel"],
    "csrc/philox.h": ["test_augment_latent_kernel"],
    "csrc/cpu/": ["test_kernels"],
    **{f"csrc/cpu/{shared}": OF_KERNELS for shared in ("elements.h", "kernels.", "isa", "tensors.h")},
    "csrc/cpu/reduce.inl": ["test_trimmed_cross_entropy_kernel", "test_soft_label_kl_kernel"],
    "csrc/cpu/loss_vectors.inl": ["test_trimmed_mean_kernel", "test_rank_batches_kernel"],
    "csrc/cpu/select.": ["test_trimmed_mean_kernel", "test_trimmed_cross_entropy_kernel", "test_rank_batches_kernel"],
    "README.md": ["test_readme", "test_figures"],
    "docs/benchmarks.md": ["test_figures", "test_docs"],
    "docs/": ["test_docs"],
    "examples/": ["test_examples"],
    "bench/results/": ["test_figures", "test_bench_measure"],
    "bench/bench_": ["test_bench"],
    "bench/conftest.py": ["test_bench"],
    "tests/cuda_on_host/": ["test_runner"],
}
"""Tests with another name than what they look at, by how the paths of that begin."""


def changed(base: str) -> list[str]:
    """Paths from the root."""
    differ = git("diff", "--name-only", "--relative", "-z", base, "--")
    return [path for path in (differ + git("ls-files", "--others", "--exclude-standard", "-z")).split("\0") if path]


def branched() -> str:
    """The commit where this branch left origin/main; the last one, where there is none."""
    found = subprocess.run(["git", "merge-base", "HEAD", "origin/main"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "HEAD"


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


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


def own_tests(path: str) -> set[Path]:
    """But for those that only find faults in it."""
    if ROOT / path in TESTS:
        return {ROOT / path}
    named = [name for begin, names in OTHERS.items() if path.startswith(begin) for name in names]
    found = {test for test in TESTS if test.stem in named or mirrors(test, path)}
    if path.startswith("batchkern/") and (ROOT / path).is_file() and "def load_state_dict" in (ROOT / path).read_text():
        found |= {test for test in TESTS if test.stem == "test_resume"}
    if path.endswith(".py"):
        found |= {test for test in TESTS if module(path) in imported(test) - {"batchkern", "bench", "tools"}}
    return found


def tests_of(path: str) -> set[Path]:
    faults = {ROOT / name for m in MUTATIONS if m.file == path for name in m.tests}
    return own_tests(path) | (faults & set(TESTS))


def touched(paths: Iterable[str]) -> dict[str, list[str]]:
    """The tests of each path."""
    return {path: [str(test.relative_to(ROOT)) for test in tests_of(path)] for path in paths}


if __name__ == "__main__":
    base = sys.argv[1] if len(sys.argv) > 1 else branched()
    found = touched(changed(base))
    if not found:
        print(f"nothing differs from {base}: there is nothing to test", file=sys.stderr)
    for path in found:
        if path.startswith("csrc/cuda/"):
            print(f"{path}: make cuda-on-host runs its tests, which takes minutes", file=sys.stderr)
        elif not path.endswith((".md", "LICENSE")) and not own_tests(path):
            print(f"{path} has no tests of its own: make test", file=sys.stderr)
    print(*sorted({test for tests in found.values() for test in tests}), sep="\n")
