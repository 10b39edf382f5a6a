"""All checks and measurements that need a GPU, within minutes, on a machine that keeps no files (``make gpu``).

    python3 tools/gpu_run.py [--out FOLDER] [--minutes 5] [--stages NAME ...] [--dry-run]

Builds for the GPU of the machine, runs the GPU tests, measures the operations, the most important cases first, and
checks for memory errors; then, while time is left, runs the other stages. Each stage has a time limit. ``--stages``
runs only the named stages, after the build, and each of them may take all the time that is left.

However the run ends, the folder holds its results so far: ``summary.json`` and ``logs.tar.gz`` with the logs of the
finished stages, written again after each stage; the log of the running stage; and a file of results for each
measurement, written again after each case. That is eight files at most, one folder deep. A second run into the same
folder numbers its files: ``summary-2.json``.

Peers are installed from wheels in ``wheels/``, if there are any. ``BATCHKERN_BENCH_COMMIT`` names the commit if there
is no ``.git``. A module that was already built from the same sources, for this Python and torch, is not built again.
``--dry-run`` needs no GPU: it runs the stages that can run on a CPU, with small shapes.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
LIBC = ctypes.CDLL(None)
LEAST_SECONDS = 15  # no stage begins if less time is left
LAST_CASE_SECONDS = 20  # the longest that a case should take
GRACE_SECONDS = 15  # for an interrupted program to write its results: xdist waits 10 s for a worker that hangs
LAST_TEST_SECONDS = 20
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb", "short"]
# A kernel that hangs ends its process, not the stage.
PYTEST += ["--timeout", "60", "--timeout-method", "thread"]
# Not --dist loadgroup: if a worker is lost, it may wait for ever.
WORKERS = ["-n", "8", "--dist", "worksteal", "-m", "not large"]
# Without PyTorch's memory cache, so that every tensor ends where its allocation ends.
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
OPERATIONS = (
    *("cross_entropy", "trimmed_cross_entropy", "trimmed_mean", "rank_batches"),
    *("linear_trimmed_cross_entropy", "augment_latent", "soft_label_kl"),
)
TAKES = """
import pathlib, runpy, torch
from batchkern import _C, _backend
digest = runpy.run_path("csrc/digest.py")["digest"]()
assert bytes.fromhex(digest) in pathlib.Path(_C.__file__).read_bytes(), "it was built from other sources"
assert _backend.extension is not None, _backend.extension_error
assert not torch.cuda.is_available() or _backend.built_for(torch.cuda.get_device_capability()), "not for this GPU"
"""
"""A program that passes if the module in the checkout can be used."""


@dataclass
class Stage:
    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    must_say: str = ""
    """Text that the log must contain for the stage to pass."""
    measures: bool = False
    """Whether it writes a file of results."""
    pace: Callable[[float], list[str]] = lambda seconds: []
    """Options with which the command ends by itself, with its results so far, before the given seconds have passed."""
    without_gpu: list[str] | None = None
    """The command to run without a GPU; None: the stage does not run then."""


def stages(out: Path) -> list[Stage]:
    """The stages, the most informative first."""
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", "--force"]
    settings = {}
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        settings = {"BATCHKERN_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    semantic = [f"tests/ops/test_{op}{suffix}.py" for op in OPERATIONS for suffix in ("", "_kernel")]
    through = ["--kernels", "cuda", "-k", "not compile and not group", "tests/triton", *semantic]
    return [
        Stage("build", build, 150, settings, without_gpu=build),
        suite("tests", 90, "tests/test_gpu.py"),
        measurement("operations", 120, out, "bench_operations", "--without", "compile"),
        sanitizer("memcheck", "ERROR SUMMARY: 0 errors"),
        Stage("large", [*PYTEST, "-m", "large", "tests/test_gpu.py"], 90, pace=ends_with_verdicts),
        Stage("semantics", [*PYTEST, *WORKERS, *through], 150, pace=ends_with_verdicts),
        # There are eight workers, and the compiler of each would start sixteen processes.
        suite("graphs", 100, "tests/test_gpu_graphs.py", {"TORCHINDUCTOR_COMPILE_THREADS": "2"}),
        sanitizer("racecheck", "RACECHECK SUMMARY: 0 hazards"),
        measurement("growth", 120, out, "bench_growth"),
        measurement("training", 120, out, "bench_training"),
        measurement("compiled", 240, out, "bench_operations"),
    ]


def ends_with_verdicts(seconds: float) -> list[str]:
    return ["--session-timeout", f"{max(1.0, seconds - LAST_TEST_SECONDS):.0f}"]


def ends_with_figures(seconds: float) -> list[str]:
    return ["--minutes", f"{max(0.0, seconds - LAST_CASE_SECONDS) / 60:.2f}"]


def suite(name: str, seconds: float, file: str, settings: dict[str, str] | None = None) -> Stage:
    on_gpu, on_cpu = [*PYTEST, *WORKERS, file], [*PYTEST, file]
    return Stage(name, on_gpu, seconds, settings or {}, pace=ends_with_verdicts, without_gpu=on_cpu)


def measurement(name: str, seconds: float, out: Path, file: str, *options: str) -> Stage:
    command = [*PYTEST, f"bench/{file}.py", "--benchmark-quiet", *options]
    settings = {"BATCHKERN_BENCH_OUT": str(out)}
    if not torch.cuda.is_available():
        settings |= {"BATCHKERN_BENCH_QUICK": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    on_gpu, on_cpu = ([*command, "--on", device] for device in ("cuda", "cpu"))
    return Stage(name, on_gpu, seconds, settings, measures=True, pace=ends_with_figures, without_gpu=on_cpu)


def sanitizer(tool: str, verdict: str) -> Stage:
    """Checks only kernels with our name in theirs. torch may take long to start, and some of its driver calls fail by
    design."""
    script = [sys.executable, "tools/every_kernel.py"]
    program = [find("compute-sanitizer"), "--tool", tool, "--kernel-name", "kns=batchkern", "--error-exitcode", "9"]
    program += ["--launch-timeout", "120", "--report-api-errors", "no"]
    without_gpu = [*script, "--on", "cpu"]
    must_say = verdict if torch.cuda.is_available() else ""
    return Stage(tool, [*program, *script], 60, UNCACHED, must_say, without_gpu=without_gpu)


def find(program: str) -> str:
    """Its path, if the PATH or the CUDA toolkit has it, else its name."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", *map(str, Path("/usr/local").glob("cuda-*"))]
    folders = [f"{home}/{folder}" for home in homes if home for folder in ("bin", program)]
    return shutil.which(program) or shutil.which(program, path=os.pathsep.join(folders)) or program


class Runner:
    """Runs stages, one after another, and writes their results."""

    def __init__(self, out: Path, environment: dict[str, str], logs: Path) -> None:
        self.out, self.logs = out, logs
        names = (
            ("summary.json", "logs.tar.gz") if n == 1 else (f"summary-{n}.json", f"logs-{n}.tar.gz") for n in count(1)
        )
        self.paths = next([out / s, out / a] for s, a in names if not (out / s).exists())
        """The paths of the summary and of the archive of logs."""
        self.tried_again = False
        self.signals: list[int] = []
        """The signals received so far: the first one ends the run."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, frame: self.signals.append(number))
        # Import this checkout, whatever is installed.
        path = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
        self.environment = {**environment, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(path)}
        self.on_gpu = torch.cuda.is_available()
        self.summary: dict[str, Any] = {
            "gpu": torch.cuda.get_device_name() if self.on_gpu else None,
            "torch": torch.__version__,
            "python": sys.version.split()[0],
            "commit": commit(),
            "stages": {},
        }

    def run(self, stage: Stage, seconds: float) -> str:
        """The result, in words."""
        start = time.monotonic()
        command = stage.command if self.on_gpu else stage.without_gpu
        outcome: dict[str, Any] = {"last_lines": [], "failed": []}
        if reason := self.why_not(stage, seconds):
            outcome["result"] = reason
        elif stage.name == "build" and self.takes():
            outcome |= {"result": "passed", "last_lines": ["not built: the module that is here is of these sources"]}
        elif stage.measures:
            outcome["result"] = self.measure(stage, command, seconds)
        else:
            if stage.name == "build":  # otherwise make would take a build for another environment as its own
                for mark in ROOT.glob("build/.built-*"):
                    mark.unlink()
            outcome["result"] = self.call(stage, command, seconds)
        log = self.out / f"{stage.name}.log"
        if log.exists():
            lines = [line[:300] for line in log.read_text(errors="replace").splitlines() if line.strip()]
            outcome["last_lines"] = lines[-3:]
            outcome["failed"] = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
            shutil.move(log, self.logs / log.name)
        outcome["seconds"] = round(time.monotonic() - start, 1)
        self.summary["stages"][stage.name] = outcome
        self.write()
        return outcome["result"]

    def why_not(self, stage: Stage, seconds: float) -> str:
        if seconds < LEAST_SECONDS:
            return "left out: no time was left"
        if not self.on_gpu:
            return "" if stage.without_gpu else "left out: there is no CUDA GPU"
        return "" if shutil.which(stage.command[0]) else f"left out: {stage.command[0]} was not found"

    def takes(self) -> bool:
        """Whether there is already a module that was built from these sources for this Python, torch and GPU."""
        check = subprocess.run([sys.executable, "-c", TAKES], cwd=ROOT, env=self.environment, capture_output=True)
        return check.returncode == 0

    def measure(self, stage: Stage, command: list[str], seconds: float) -> str:
        """A case that fails may destroy the GPU's context, so that the cases after it are tried again, without it. This
        happens only once in a run, to limit the number of files."""
        until, before = time.monotonic() + seconds, set(self.out.glob("*/*.json"))
        result = self.call(stage, command, seconds)
        rest = [case for path in set(self.out.glob("*/*.json")) - before for case in untried(path)]
        left = until - time.monotonic()
        if not rest or self.tried_again or self.signals or left < LEAST_SECONDS + LAST_CASE_SECONDS:
            return result
        self.tried_again = True
        options = [word for word in command if not word.startswith("bench/")]
        return f"{result}; the cases after the first failure again: {self.call(stage, [*options, *rest], left)}"

    def call(self, stage: Stage, command: list[str], seconds: float) -> str:
        """Runs a program in its own process group, and ends all processes of the group."""
        log, until = self.out / f"{stage.name}.log", time.monotonic() + seconds
        with log.open("a") as file:
            process = subprocess.Popen(
                [*command, *stage.pace(seconds)],
                cwd=ROOT,
                env={**self.environment, **stage.environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=apart,
            )
            try:
                while process.poll() is None and not self.signals and time.monotonic() < until:
                    time.sleep(0.1)
                code = process.poll()
            finally:
                end(process)
        if code is None:
            return f"stopped by signal {self.signals[0]}" if self.signals else f"stopped after {seconds:.0f} s"
        if code != 0:
            return f"failed with exit code {code}"
        if stage.must_say not in log.read_text(errors="replace"):
            return f"failed: the log does not say '{stage.must_say}'"
        return "passed"

    def write(self) -> None:
        """Archives the logs of the stages that have ended, and writes the summary."""
        archive = self.logs / "logs.tar.gz"
        with tarfile.open(archive, "w:gz") as file:
            for log in sorted(self.logs.glob("*.log")):
                file.add(log, log.name)
        summary, logs = self.paths
        replace(logs, archive.read_bytes())
        replace(summary, (json.dumps(self.summary, indent=1) + "\n").encode())
        for partial in self.out.glob("*/*.partial"):  # left by a measurement that was killed
            partial.unlink()


def untried(path: Path) -> list[str]:
    """The cases of a file of results that were lost by a first failure, or because the process ended within a case."""
    results = json.loads(path.read_text())
    return [*results["failed"][1:], *results["left_out"][1:]]


def apart() -> None:
    """Called in a new process before its program starts: puts it into its own process group, and has it killed if this
    process ends."""
    os.setpgrp()
    LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def end(process: subprocess.Popen[bytes]) -> None:
    """Interrupts a program so that it writes its results, then kills the rest of its group, which would keep the GPU
    busy."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)  # not to its workers: only the main process writes results
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def commit() -> str:
    named = os.environ.get("BATCHKERN_BENCH_COMMIT")
    if named:
        return named
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        print("no .git is here: set BATCHKERN_BENCH_COMMIT, so that the figures have a commit", file=sys.stderr)
        return "unknown"


def with_peers(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The environment with the libraries of the wheels installed, and the outcome for each wheel. Their dependencies
    are not installed: torch and Triton are present."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(folder)]
    wheels = {}
    for wheel in sorted((ROOT / "wheels").glob("*.whl")):
        done = subprocess.run([*command, str(wheel)], capture_output=True, text=True)
        wheels[wheel.name] = "installed" if done.returncode == 0 else (done.stderr.strip().splitlines() or [""])[-1]
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}, wheels


def minutes(word: str) -> float:
    value = float(word)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"it must be above 0, got {word}")
    return value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu")
    parser.add_argument("--minutes", type=minutes, default=5.0)
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="run only these, such as: growth training")
    parser.add_argument("--dry-run", action="store_true", help="go on without a GPU")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.dry_run:
        print("there is no GPU that this torch can see; --dry-run (make gpu DRY_RUN=1) needs none", file=sys.stderr)
        return 2
    until = time.monotonic() + 60 * arguments.minutes
    out: Path = arguments.out.resolve()
    chosen = stages(out)
    if arguments.stages:
        if unknown := set(arguments.stages) - {stage.name for stage in chosen}:
            names = ", ".join(stage.name for stage in chosen)
            parser.error(f"--stages must be among {names}, got {', '.join(sorted(unknown))}")
        chosen = [stage for stage in chosen if stage.name in {"build", *arguments.stages}]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {out} cannot be made: {error.strerror}")
    with TemporaryDirectory() as folder:
        environment, wheels = with_peers(Path(folder, "site"))
        runner = Runner(out, environment, Path(folder))
        runner.summary["wheels"] = wheels
        passed = all_pass(runner, chosen, until, bool(arguments.stages))
    print(f"written: {out}")
    return 128 + runner.signals[0] if runner.signals else int(not passed)


def all_pass(runner: Runner, chosen: list[Stage], until: float, unlimited: bool) -> bool:
    passed = True
    for stage in chosen:
        left = until - time.monotonic()
        result = runner.run(stage, left if unlimited else min(stage.seconds, left))
        outcome = runner.summary["stages"][stage.name]
        told = [*outcome["failed"][:20], *outcome["last_lines"]]
        print(f"{stage.name:10} {result} ({outcome['seconds']} s)", *told, sep="\n    ", flush=True)
        # A stage that was left out, for lack of time or of a program, did not pass either.
        passed &= result == "passed" or (not runner.on_gpu and "no CUDA GPU" in result)
        if runner.signals or (stage.name == "build" and result != "passed"):
            break
    return passed


if __name__ == "__main__":
    sys.exit(main())
