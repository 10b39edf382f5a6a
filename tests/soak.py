"""Kills trainings and comparisons at random moments, fills their disk, lets two meet, and says what was lost.

python tests/soak.py, or make soak; KILLS=200 and SEED=0 are read from the environment. Each case has a folder of its
own: a directory for --out, a user's files in it, and a tree beside it that links in the directory lead to. What was
stopped is resumed, perhaps stopped again, and must end bit for bit as what never was; the user's files and the tree
must stay as they are. The processes are forks of this one, which has torch loaded, and SIGKILL ends them. Plots are
replaced by small files, since to draw them takes longer than the training; but workers of --jobs 2 start cold, and
draw. A seed gives the same cases, but how far a process has come when it is killed depends on the machine. Ends with 1
where anything was lost.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from itertools import cycle, islice
from pathlib import Path

if __name__ == "__main__":  # before torch is loaded: threads do not survive a fork
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import commands
from lost import SORTS, LostError, state
from soaked import Case, begin, says, words_of
from warm import has_ended

from batchkern import files, plots
from batchkern.compare import report
from batchkern.rundir import CURVES

STRATEGIES = ["trimming", "hard-batches", "stepwise(fractions=(.5,1),batch_multiples=(1,2))", "augmentation"]
STRATEGIES += ["passive(every=2)", "random(select=rows)", "random(select=batches)", "baseline"]
STRATEGIES += ["hard-batches+trimming+passive(every=3)+augmentation"]
KINDS = ["train", "train --overwrite", "compare", "train", "train --overwrite", "compare --overwrite"] * 2
KINDS += ["compare 2", "train", "train --overwrite", "compare --overwrite 2"]
"""A command, how it is begun, and jobs."""
MEETINGS = [
    ("train", "train --resume"),
    ("train", "train --overwrite"),
    ("compare", "compare"),
    ("compare --resume", "train --overwrite"),
    ("train --resume", "train --resume"),
    ("compare --overwrite", "compare --resume"),
    ("train --overwrite", "compare --overwrite"),
    ("compare --overwrite", "train --resume"),
]
COLUMNS = ["killed", "ended", "in use", "earlier", "other run", "full", "lost"]
"""Processes: killed; ended with 0; refused, since the directory is in use, since of what was there before, and since it
is of another run; ended by a full disk. And cases that lost something."""


def quick_plots() -> None:
    def drawn(path: Path, *_: object, **__: object) -> None:
        files.write_file(path, b"a plot")

    plots.plot_run = lambda directory: drawn(directory / CURVES)
    for name in [name for name in vars(report) if name.startswith("plot_")]:
        setattr(report, name, drawn)


class Soak:
    def __init__(self, root: Path, seed: int, kills: int) -> None:
        self.root, self.wanted, self.numbers = root, kills, random.Random(seed)
        self.figures: dict[str, Counter[str]] = defaultdict(Counter)
        self.lost: list[tuple[str, str]] = []
        self.wholes: dict[str, tuple[Path, float, object]] = {}
        self.groups: list[int] = []
        self.mounts = False
        """Whether a file system may be mounted."""

    def kills(self) -> int:
        return sum(row["killed"] for row in self.figures.values())

    def ended(self, pid: int, said: Path) -> tuple[int, str]:
        self.groups.append(pid)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said.read_text()

    def whole(self, words: list[str]) -> tuple[Path, float, object]:
        """The directory of what never was stopped, how long that took, and its state."""
        key = " ".join(words)
        if key not in self.wholes:
            folder = Path(tempfile.mkdtemp(dir=self.root))
            started, jobs = time.monotonic(), ["--jobs", "1"] * (words[0] == "compare")
            pid = begin([*words, "--out", "out", *jobs], folder, folder / "said")
            status, said = self.ended(pid, folder / "said")
            assert status == 0, said
            self.wholes[key] = folder / "out", time.monotonic() - started, state(folder / "out", words[0])
        return self.wholes[key]

    def play(self, name: str, command: str, strategy: str, sort: str, *how: str) -> None:
        case = Case(self, Path(tempfile.mkdtemp(dir=self.root)), command, strategy)
        try:
            getattr(case, sort)(*how)
            case.check_outside()
        except LostError as error:
            self.lost.append((error.args[0], f"{name}, {strategy}: {error.args[1]}"))
            self.figures[name]["lost"] += 1
        if case.folder.is_mount():
            subprocess.run(["umount", "--lazy", case.folder])
        shutil.rmtree(case.folder, ignore_errors=True)

    def run(self) -> None:
        strategies, kinds, meetings = cycle(STRATEGIES), cycle(KINDS), cycle(MEETINGS)
        while self.kills() < self.wanted:
            for kind in islice(kinds, 4):
                print(f"{self.kills()} kills, {len(self.lost)} cases lost something", file=sys.stderr, flush=True)
                self.play(kind, kind.split()[0], next(strategies), "killed", *kind.split()[1:])
            command, *mode = self.numbers.choice(KINDS[:6]).split()
            self.play("full disk", command, next(strategies), "full_disk", *mode)
            meeting = next(meetings)
            command = "compare" if says(" ".join(meeting), "compare") else "train"
            self.play(" + ".join(meeting), command, next(strategies), "meet", *meeting)
        for group in self.groups:
            if not has_ended(group):
                self.lost.append(("outside", f"a process of the group {group} goes on"))

    def table(self) -> str:
        total = sum(self.figures.values(), Counter())
        rows = [(f"{'':44}", {column: column for column in COLUMNS}), *sorted(self.figures.items()), ("all", total)]
        lines = [f"{name:44}" + "".join(f"{row[column] or '':>11}" for column in COLUMNS) for name, row in rows]
        sorts = Counter(sort for sort, _ in self.lost)
        lines += ["lost: " + ", ".join(f"{sort} {sorts[sort]}" for sort in SORTS)]
        return "\n".join([*lines, *(f"LOST {what}" for _, what in self.lost)])


def of_its_own() -> bool:
    """Whether mounts are of this process alone from now on (CLONE_NEWNS), and end with it; root alone may do that."""
    alone = os.geteuid() == 0 and ctypes.CDLL(None).unshare(0x20000) == 0
    return alone and subprocess.run(["mount", "--make-rprivate", "/"], stderr=subprocess.DEVNULL).returncode == 0


def main() -> int:
    seed, kills = (int(os.environ.get(name) or default) for name, default in (("SEED", 0), ("KILLS", 200)))
    quick_plots()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        # Loads what is loaded late.
        commands.run(*words_of("compare", "trimming"), "--jobs", 1, "--out", f"{root}/warm")
        soak = Soak(Path(root).resolve(), seed, kills)
        soak.mounts = of_its_own()
        soak.run()
    print(f"{soak.table()}\nseed {seed}, {time.monotonic() - started:.0f} s")
    return bool(soak.lost)


if __name__ == "__main__":
    sys.exit(main())
