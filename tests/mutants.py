"""Breaks the code on purpose, one small fault at a time, and says whether the tests find it: python tests/mutants.py.

Each fault of mutations is put into a copy of the checkout, which is rebuilt where the fault is in a kernel of the
CPU, and the tests named beside it are run there. A test that fails has killed the fault; a crash and a time-out have,
too. Tests that cannot be collected, and tests that fail without the fault, prove nothing: they are told apart. Ends
with 1 where a fault survived that is not known to, or could not be tried.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[1]
VERDICTS = KILLED, SURVIVED, KNOWN, BROKEN = "killed", "SURVIVED", "known survivor", "COULD NOT RUN"
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGBUS, signal.SIGILL, signal.SIGTRAP)
"""Signals by which a process ends itself. Another one came from outside, for want of memory perhaps."""
GRACE = 120
"""Seconds that tests may take beyond twice what they take without a fault."""

MODULE = "batchkern/_C" + sysconfig.get_config_var("EXT_SUFFIX")

stopped = threading.Event()
running: set[subprocess.Popen[bytes]] = set()


@dataclass(frozen=True)
class Outcome:
    mutation: Mutation
    verdict: str
    why: str
    """The first test that failed, or what went wrong."""
    seconds: float = 0.0


class Copy:
    """A checkout of its own: what git does not ignore, as it is in the working tree, and the built module."""

    def __init__(self, folder: Path, cores: int) -> None:
        self.root, self.temporary = folder / "checkout", folder / "tmp"
        self.temporary.mkdir(parents=True)
        self.baselines: dict[tuple[str, ...], tuple[float, str]] = {}
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if listed.returncode:
            sys.exit(f"{' '.join(command)}: {listed.stderr.strip()}")
        for name in filter(None, [*listed.stdout.split("\0"), MODULE]):
            if (ROOT / name).exists():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.root / name)
        self.environment = os.environ | {
            "PYTHONPATH": str(self.root),  # before the checkout that is installed, in processes of the tests, too
            "PYTHONDONTWRITEBYTECODE": "1",  # of a file that changes twice in a second the old one would be run
            "TMPDIR": str(self.temporary),
            "TORCHINDUCTOR_CACHE_DIR": str(self.temporary / "inductor"),
            "BATCHKERN_CUDA": "0",
            "CI": "1",  # Hypothesis draws the same examples for each fault
            "MAX_JOBS": str(cores),
            "OMP_NUM_THREADS": str(cores),
        }
        _, output = self.run([sys.executable, "-c", "import batchkern._C; print(batchkern._C.__file__)"], 300)
        if str(self.root) not in output.splitlines()[-1]:
            sys.exit(f"batchkern must be built in {ROOT} first (make setup): {output.splitlines()[-1]}")

    def run(self, command: list[str], limit: float) -> tuple[int | None, str]:
        """Exit status, None where time ran out, and output. By way of a file: a process left over might hold a pipe."""
        with tempfile.TemporaryFile(dir=self.temporary) as output:
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(command, cwd=self.root, env=self.environment, start_new_session=True, **streams)
            running.add(process)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0 if stopped.is_set() else limit)
            code = process.poll()
            kill(process)
            running.discard(process)
            if stopped.is_set():
                raise KeyboardInterrupt
            output.seek(0)
            return code, output.read().decode(errors="replace")

    def pytest(self, tests: tuple[str, ...], limit: float) -> tuple[int | None, str]:
        (self.root / "build" / "cuda-on-host" / "lock").unlink(missing_ok=True)  # of a build that was killed
        options = ["-x", "-q", "-p", "no:cacheprovider", "--tb=line"]
        return self.run([sys.executable, "-m", "pytest", *tests, *options], limit)

    def build(self) -> str:
        """Compiles what changed; says what is wrong, if anything."""
        code, output = self.run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], 1800)
        wrong = re.findall(r"^.*\berror\b.*$", output, re.M) or [f"setup.py ended with {code}"]
        return "" if code == 0 else f"the build fails: {wrong[0][:200]}"

    def baseline(self, tests: tuple[str, ...]) -> tuple[float, str]:
        """Seconds of the tests without a fault, and why they prove nothing, where they do not pass."""
        if tests not in self.baselines:
            started = time.monotonic()
            code, output = self.pytest(tests, 1800)
            seconds, why = time.monotonic() - started, "" if code == 0 else f"without the fault: {ending(code, output)}"
            self.baselines[tests] = seconds, why
            print(f"{'':10}{seconds:.0f} s without a fault: pytest {' '.join(tests)}", flush=True)
        return self.baselines[tests]

    def try_one(self, mutation: Mutation) -> Outcome:
        seconds, wrong = self.baseline(mutation.tests)
        if wrong:
            return Outcome(mutation, BROKEN, wrong)
        file, started = self.root / mutation.file, time.monotonic()
        before = file.read_text()
        file.write_text(mutation.applied(before))
        try:
            if mutation.built_by == "cpu" and (wrong := self.build()):
                return Outcome(mutation, BROKEN, wrong, time.monotonic() - started)
            code, output = self.pytest(mutation.tests, 2 * seconds + GRACE)
        finally:
            file.write_text(before)
        if code == 0:
            verdict, why = (KNOWN, mutation.survives) if mutation.survives else (SURVIVED, "")
        else:
            failed = code == 1 and re.search(
                r"^(FAILED|ERROR \S+::)", output, re.M
            )  # -x makes 1 of what is no test, too
            dead = code is None or failed or -code in CRASHES
            verdict, why = KILLED if dead else BROKEN, ending(code, output)
        return Outcome(mutation, verdict, why, time.monotonic() - started)

    def try_all(self, mutations: list[Mutation], tell: Callable[[Outcome], None]) -> None:
        """Of one batch. The module is put back as it was, for what comes next."""
        module = self.root / MODULE
        saved = shutil.copy2(module, self.temporary)
        wrong = self.build() if mutations[0].built_by == "cpu" else ""
        for tests in dict.fromkeys(mutation.tests for mutation in mutations if not wrong):
            self.baseline(tests)  # before the module is built with a fault
        for mutation in mutations:
            tell(Outcome(mutation, BROKEN, wrong) if wrong else self.try_one(mutation))
        shutil.copy2(saved, module)


def kill(process: subprocess.Popen[bytes]) -> None:
    """With all that it started and left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def ending(code: int | None, output: str) -> str:
    """How a run of pytest ended: by the first test that failed, if there is one."""
    if code is None:
        return "timed out"
    if code < 0:
        return f"crashed by {signal.Signals(-code).name}"
    found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.M)
    lines = output.strip().splitlines() or [""]
    return found[1] if code == 1 and found else f"pytest ended with {code}: {lines[-1][:200]}"


def try_in_copies(mutations: list[Mutation], jobs: int) -> list[Outcome]:
    """What shares a build is one batch, and comes first; then what shares tests."""
    batches: dict[object, list[Mutation]] = {}
    for mutation in sorted(mutations, key=lambda m: ("cpu", "host", "").index(m.built_by)):
        batches.setdefault(mutation.built_by or mutation.tests, []).append(mutation)
    outcomes: list[Outcome] = []
    free: queue.SimpleQueue[Copy] = queue.SimpleQueue()

    def tell(outcome: Outcome) -> None:
        outcomes.append(outcome)
        place, m = f"[{len(outcomes)}/{len(mutations)}]", outcome.mutation
        print(f"{place:10}{outcome.verdict} in {outcome.seconds:.0f} s: {m.file}: {m.fault}: {outcome.why}", flush=True)

    def work(batch: list[Mutation]) -> None:
        copy = free.get()
        copy.try_all(batch, tell)
        free.put(copy)

    with tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as folder:
        pool = ThreadPoolExecutor(jobs)
        try:
            for job in range(jobs):
                free.put(Copy(Path(folder) / str(job), max(1, (os.cpu_count() or 1) // jobs)))
            for future in as_completed([pool.submit(work, batch) for batch in batches.values()]):
                future.result()
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
        finally:
            stopped.set()
            for process in list(running):
                kill(process)
            pool.shutdown(cancel_futures=True)
    return outcomes


def summary(outcomes: list[Outcome]) -> str:
    lines = [f"{'':14}" + "".join(f"{verdict:>16}" for verdict in VERDICTS) + f"{'minutes':>10}"]
    for area in [*dict.fromkeys(outcome.mutation.area for outcome in outcomes), "all"]:
        own = [outcome for outcome in outcomes if area in (outcome.mutation.area, "all")]
        counts, minutes = Counter(outcome.verdict for outcome in own), sum(outcome.seconds for outcome in own) / 60
        lines.append(f"{area:14}" + "".join(f"{counts[verdict]:16}" for verdict in VERDICTS) + f"{minutes:10.1f}")
    for outcome in outcomes:
        place = f"{outcome.mutation.file}: {outcome.mutation.fault}"
        if outcome.verdict != KILLED:
            lines.append(f"{outcome.verdict}: {place}: {outcome.why}")
        elif outcome.mutation.survives:
            lines.append(f"killed, though known to survive: {place}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="of area, file and fault")
    parser.add_argument("--list", action="store_true", help="show the faults, and which tests should find them")
    parser.add_argument("--check", action="store_true", help="only look whether each fault can still be put in")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="copies side by side")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write what happened to each as JSON")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if options.only.lower() in f"{m.area} {m.file}: {m.fault}".lower()]
    if not chosen:
        parser.error(f"--only: no area, file or fault has {options.only!r}")
    if options.report and not options.report.absolute().parent.is_dir():
        parser.error(f"--report: {options.report.parent} is no folder")
    if options.list:
        for m in chosen:
            print(f"{m.area:13}{m.file}: {m.fault}\n{'':13}pytest {' '.join(m.tests)}")
        return 0
    misplaced = [f"{m.file}: {m.fault}: {wrong}" for m in chosen if (wrong := m.misplaced(ROOT))]
    print(f"{len(chosen)} faults, {len(misplaced)} that do not apply", *misplaced, sep="\n", flush=True)
    if misplaced or options.check:
        return bool(misplaced)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    outcomes = try_in_copies(chosen, max(1, options.jobs))
    print(summary(outcomes))
    if options.report:
        rows = [asdict(o.mutation) | {"verdict": o.verdict, "why": o.why, "seconds": o.seconds} for o in outcomes]
        options.report.write_text(json.dumps(rows, indent=1) + "\n")
    return len(outcomes) < len(chosen) or any(outcome.verdict in (SURVIVED, BROKEN) for outcome in outcomes)


if __name__ == "__main__":
    sys.exit(main())
