"""What a GPU is needed for, made for a quarter of an hour on a machine that keeps nothing (``make gpu``).

    python3 tools/gpu_run.py [--out FOLDER] [--minutes 5] [--stages NAME ...] [--dry-run]

Builds for the GPU that is there, runs the GPU tests, measures the most important cases first, and looks for memory
errors; then, while time is left, the rest. Each stage has a limit. ``--stages`` runs some alone, after the build; each
of them may take all the time that is left.

Whatever ends it, the folder holds what there is: ``summary.json``, anew after each stage; ``logs.tar.gz`` of the stages
that have ended, and the log of the one that is running; a file of results for each measurement, anew after each case.
That is eight files at most, one folder deep. A second run into the same folder numbers its files: ``summary-2.json``.

Peers come from wheels in ``wheels/``, if there are any; ``BATCHKERN_BENCH_COMMIT`` names the commit where there is no
``.git``. A module that was built before from the same sources, for this Python and torch, is not built again.
``--dry-run`` needs no GPU: what can run on a CPU does, on small shapes.
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
LEAST_SECONDS = 15  # no stage begins with less
LAST_CASE_SECONDS = 20  # that a case may take
GRACE_SECONDS = 15  # in which what is interrupted may tell what it knows: xdist waits 10 s for a worker that hangs
LAST_TEST_SECONDS = 20
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb", "short"]
# A kernel that hangs ends its process, not the stage.
PYTEST += ["--timeout", "60", "--timeout-method", "thread"]
# Not by groups: where a worker is lost, xdist's loadgroup may wait for ever.
WORKERS = ["-n", "8", "--dist", "worksteal", "-m", "not large"]
# Memory that is not cached, so that every tensor ends where its allocation does.
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
"""Passes where the module that lies in the checkout will do."""


@dataclass
class Stage:
    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    must_say: str = ""
    """What the log of a stage that did its work holds."""
    measures: bool = False
    """Whether it leaves a file of results."""
    pace: Callable[[float], list[str]] = lambda seconds: []
    """Options with which it ends by itself before its seconds are over, with what it has."""
    without_gpu: list[str] | None = None
    """The command in its place where there is no GPU; None: it does nothing there."""


def stages(out: Path) -> list[Stage]:
    """In the order of what they tell."""
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
        # Eight workers, whose compilers would start sixteen processes each.
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
    """Looks only at kernels with our name in theirs. torch may take long to start, and its own calls of the
    driver fail now and then by design."""
    script = [sys.executable, "tools/every_kernel.py"]
    program = [find("compute-sanitizer"), "--tool", tool, "--kernel-name", "kns=batchkern", "--error-exitcode", "9"]
    program += ["--launch-timeout", "120", "--report-api-errors", "no"]
    without_gpu = [*script, "--on", "cpu"]
    must_say = verdict if torch.cuda.is_available() else ""
    return Stage(tool, [*program, *script], 60, UNCACHED, must_say, without_gpu=without_gpu)


def find(program: str) -> str:
    """Its path, where the PATH or the CUDA toolkit has it, else its name."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", *map(str, Path("/usr/local").glob("cuda-*"))]
    folders = [f"{home}/{folder}" for home in homes if home for folder in ("bin", program)]
    return shutil.which(program) or shutil.which(program, path=os.pathsep.join(folders)) or program


class Runner:
    """Runs stages, one after another, and writes what comes of them."""

    def __init__(self, out: Path, environment: dict[str, str], logs: Path) -> None:
        self.out, self.logs = out, logs
        names = (
            ("summary.json", "logs.tar.gz") if n == 1 else (f"summary-{n}.json", f"logs-{n}.tar.gz") for n in count(1)
        )
        self.paths = next([out / s, out / a] for s, a in names if not (out / s).exists())
        """Of the summary and of the archive of logs."""
        self.tried_again = False
        self.signals: list[int] = []
        """Received so far: the first one ends the run."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, frame: self.signals.append(number))
        # This checkout, whatever is installed.
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
            if stage.name == "build":  # make would take what was built for one environment for that of another
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
        """Whether a module is there already that was built from these sources for this Python, torch and GPU."""
        check = subprocess.run([sys.executable, "-c", TAKES], cwd=ROOT, env=self.environment, capture_output=True)
        return check.returncode == 0

    def measure(self, stage: Stage, command: list[str], seconds: float) -> str:
        """A case that fails may take the GPU's context with it: what came after it is tried again, without it. Once in
        a run, for the sake of the number of files."""
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
        """Runs a program in a process group of its own, and leaves none of it behind."""
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
        for partial in self.out.glob("*/*.partial"):  # of a measurement that was killed
            partial.unlink()


def untried(path: Path) -> list[str]:
    """The cases of a file of results that a first failure, or the process's end within a case, may have cost."""
    results = json.loads(path.read_text())
    return [*results["failed"][1:], *results["left_out"][1:]]


def apart() -> None:
    """In a program before it begins: its own process group, and its end where this process is killed."""
    os.setpgrp()
    LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def end(process: subprocess.Popen[bytes]) -> None:
    """Asks it to tell what it knows, and then kills whatever is left of its group: it would keep the GPU busy."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)  # not to its workers: it is the one that tells
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
    """The environment, with the libraries whose wheels were carried along, and what became of each wheel. Without
    their dependencies: torch and Triton are here."""
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
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="these alone, such as: growth training")
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
        # What was left out for want of time or a program was not checked either.
        passed &= result == "passed" or (not runner.on_gpu and "no CUDA GPU" in result)
        if runner.signals or (stage.name == "build" and result != "passed"):
            break
    return passed


if __name__ == "__main__":
    sys.exit(main())
