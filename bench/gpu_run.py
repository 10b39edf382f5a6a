"""Everything that a GPU is needed for, in one command that ends within ten minutes (``make gpu``).

    python bench/gpu_run.py [--out FOLDER] [--minutes 9.5] [--stages NAME ...] [--dry-run]

Builds for the GPU that is there, runs the GPU tests and the tests of the operations through the kernels, looks for
memory errors and races with compute-sanitizer on a reduced set, and measures. Each stage has a time limit; one that
no time is left for is said to be left out. ``summary.json`` is written anew after each stage, beside a log of each, so
that a run that is stopped leaves what it has. ``--dry-run`` goes as far as a machine without a GPU allows.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
# Memory that is not cached, so that every tensor ends where its allocation does.
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
LEAST_SECONDS = 20  # no stage begins with less
LAST_CASE_SECONDS = 30  # that a case may take
SANITIZED = [
    "-k",
    "(test_every_path and float32) or test_ranks or ((test_divergences or test_virtual_samples) and float32)",
    "-x",
    "tests/test_gpu.py",
]


@dataclass
class Stage:
    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    needs: str | None = None
    """A program."""
    must_say: str = ""
    """What the log of a stage that did its work holds."""
    paced: bool = False
    """Whether its last argument is to be the minutes after which it begins nothing new."""
    without_gpu: bool = False
    """Whether it does something where there is no GPU."""


def stages(out: Path) -> list[Stage]:
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    build = {"BATCHKERN_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    operations = ["trimmed_cross_entropy", "trimmed_mean", "rank_batches", "linear_trimmed_cross_entropy"]
    operations += ["augment_latent", "soft_label_kl"]
    semantic = [f"tests/ops/test_{op}{suffix}.py" for op in operations for suffix in ("", "_kernel")]
    setup = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", "--force"]
    return [
        Stage("build", setup, 240, build, without_gpu=True),
        Stage("tests", [*PYTEST, "--continue-on-collection-errors", "-m", "gpu"], 180, without_gpu=True),
        measurement("operations", 150, out),
        sanitizer("memcheck", "ERROR SUMMARY: 0 errors"),
        sanitizer("racecheck", "RACECHECK SUMMARY: 0 hazards"),
        Stage(
            "semantics",
            [*PYTEST, "--through", "cuda", "-k", "not compile and not group", "tests/triton", *semantic],
            180,
        ),
        measurement("growth", 120, out),
        measurement("training", 120, out),
    ]


def measurement(what: str, seconds: float, out: Path) -> Stage:
    """Ends by itself before it would be stopped, with what it has."""
    command = [*PYTEST, f"bench/bench_{what}.py", "--on", "cuda", "--benchmark-quiet", "--minutes"]
    return Stage(what, command, seconds, {"BATCHKERN_BENCH_OUT": str(out)}, paced=True)


def sanitizer(tool: str, verdict: str) -> Stage:
    """Looks only at kernels with our name in theirs. torch may take long to start, and its own calls of the
    driver fail now and then by design."""
    program = ["compute-sanitizer", "--tool", tool, "--kernel-name", "kns=batchkern", "--error-exitcode", "9"]
    program += ["--launch-timeout", "120", "--report-api-errors", "no"]
    return Stage(tool, [*program, *PYTEST, *SANITIZED], 100, UNCACHED, "compute-sanitizer", verdict)


def run(stage: Stage, out: Path, seconds: float) -> dict[str, Any]:
    log = out / f"{stage.name}.log"
    start = time.monotonic()
    # This checkout, whatever is installed.
    command = [*stage.command, f"{max(0.0, seconds - LAST_CASE_SECONDS) / 60:.2f}"] if stage.paced else stage.command
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT), **stage.environment}
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
            result = "passed" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            result = f"stopped after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its children would stay on the GPU
                process.wait()
    text = log.read_text(errors="replace")
    if result == "passed" and stage.must_say not in text:
        result = f"failed: the log does not say '{stage.must_say}'"
    lines = [line[:200] for line in text.splitlines() if line.strip()]
    return {"result": result, "seconds": round(time.monotonic() - start, 1), "last_lines": lines[-3:]}


def why_not(stage: Stage, seconds: float) -> str | None:
    if not torch.cuda.is_available() and not stage.without_gpu:
        return "left out: there is no CUDA GPU"
    if stage.needs and shutil.which(stage.needs) is None:
        return f"left out: {stage.needs} was not found"
    return "left out: no time was left" if seconds < LEAST_SECONDS else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu")
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument(
        "--stages", nargs="+", metavar="NAME", help="only these, without their limits, such as: build growth"
    )
    parser.add_argument("--dry-run", action="store_true", help="go on without a GPU")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.dry_run:
        print("make gpu needs a GPU that this torch can see; DRY_RUN=1 goes as far as it can without", file=sys.stderr)
        return 2
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * arguments.minutes
    summary: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "stages": {},
    }
    failed = False
    chosen = stages(out)
    if arguments.stages:
        if unknown := set(arguments.stages) - {stage.name for stage in chosen}:
            names = ", ".join(stage.name for stage in chosen)
            parser.error(f"--stages must be among {names}, got {', '.join(sorted(unknown))}")
        chosen = [stage for stage in chosen if stage.name in arguments.stages]
    for stage in chosen:
        left = end - time.monotonic()
        seconds = left if arguments.stages else min(stage.seconds, left)
        reason = why_not(stage, seconds)
        outcome = {"result": reason} if reason else run(stage, out, seconds)
        summary["stages"][stage.name] = outcome
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        print(
            f"{stage.name:10} {outcome['result']} {outcome.get('seconds', '')}",
            *outcome.get("last_lines", []),
            sep="\n    ",
        )
        # What was left out for want of time or a program was not checked either.
        failed |= outcome["result"] != "passed" and not (arguments.dry_run and "no CUDA GPU" in outcome["result"])
        if stage.name == "build" and outcome["result"] != "passed":
            break
    print(f"written: {out}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
