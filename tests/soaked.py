"""One case of soak.py: a directory with a user's files in and beside it, and what is done to its processes."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import types
from pathlib import Path
from typing import TYPE_CHECKING

from lost import OURS, LostError, check, check_parts, listing

from batchkern import cli
from batchkern.compare import RESULTS
from batchkern.files import slug
from batchkern.rundir import CONFIG, WEIGHTS

if TYPE_CHECKING:
    from soak import Soak

SMALL = ["--data", "digits", "--epochs", "2", "--batch-size", "256"]
MANIFEST = {"train": CONFIG, "compare": RESULTS}
BUSY = "is in use by another training or comparison", "was written by another training"
NOTHING, OTHER = "holds no run to resume", ("was trained with other settings", "was compared with other settings")
EARLIER = NOTHING, "already holds a run", "already holds a comparison"
FULL = os.strerror(errno.ENOSPC), os.strerror(errno.EFBIG)


def words_of(command: str, strategy: str, older: bool = False) -> list[str]:
    words = [command, *SMALL, *["--passive", "photo-patches"] * ("passive" in strategy)]
    if command == "train":
        return [*words, "--strategy", strategy, "--seed", "7" if older else "0"]
    return [*words, "--arms", strategy, "--lr", "0.02" if older else "0.05", "--no-controls", "--seeds", "1"]


def says(said: str, *sentences: str) -> bool:
    return any(sentence in said for sentence in sentences)


def begin(words: list[str], folder: Path, said: Path, most: int | None = None) -> int:
    """A fork that is ``batchkern WORDS``; its files may have ``most`` bytes."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        os.chdir(folder)
        for number in (1, 2):
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.modules["__main__"] = types.ModuleType("__main__")  # which a worker would import
        sys.argv[:] = ["batchkern", *words]
        if most:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        cli.main()
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)


class Case:
    def __init__(self, soak: Soak, folder: Path, command: str, strategy: str) -> None:
        self.soak, self.folder, self.numbers = soak, folder, soak.numbers
        self.command, self.strategy, self.words = command, strategy, words_of(command, strategy)
        self.older_words = words_of(command, "trimming", older=True)
        self.out, self.tree, self.said = folder / "out", folder / "tree", soak.root / f"{folder.name}.said"
        self.older, self.jobs = False, 1
        self.lay_tree()

    # --- what is a user's ---

    def lay_tree(self) -> None:
        (self.tree / "below").mkdir(parents=True)
        for name in ("notes", "below/notes", CONFIG, WEIGHTS, RESULTS):
            (self.tree / name).write_text(f"{name} of a user's")
        self.before, self.mine = listing(self.tree), {}

    def lay_mine(self) -> None:
        """Files, and links in the place of ours, too, once the directory is a run's or a comparison's."""
        if self.mine or not (self.out / MANIFEST[self.command]).exists():
            return
        mine = self.out / "mine"
        mine.mkdir()
        (mine / "mine.part").write_text("a part")
        (mine / "tree").symlink_to("../../tree")
        self.mine = listing(mine)
        for name in self.numbers.sample(OURS[self.command], 2):
            with contextlib.suppress(FileExistsError):
                (self.out / name).symlink_to("../tree/notes")

    def check_outside(self) -> None:
        for folder, before in ((self.tree, self.before), (self.out / "mine", self.mine)):
            now = listing(folder) if before else {}
            if changed := [path for path in now.keys() | before.keys() if now.get(path) != before.get(path)]:
                raise LostError("outside", f"what is a user's has changed: {sorted(changed)}")
        if strange := {path.name for path in self.folder.iterdir()} - {"out", "tree"}:
            raise LostError("outside", f"there is more than {self.out} now: {strange}")

    # --- processes ---

    def start(self, mode: str, words: list[str] | None = None, said: Path | None = None, **most: int) -> int:
        words, said = words or self.words, said or self.said
        options = [mode] if mode else []
        if words[0] == "compare":
            options += ["--jobs", str(self.jobs)]
        elif self.numbers.random() < 0.6:
            options += ["--checkpoint-every", str(self.numbers.choice([1, 3]))]
        said.write_text("")
        inside = Path(slug(self.strategy), "2-epochs", "seed-0") if words[0] != self.command else Path()
        return begin([*words, "--out", str(self.out / inside), *options], self.folder, said, **most)

    def count(self, mode: str, column: str) -> None:
        self.soak.figures[" ".join(filter(None, [self.command, mode, "2" * (self.jobs > 1)]))][column] += 1

    def kill(self, mode: str) -> tuple[int, str]:
        # Workers take seconds to load torch, and where they have ended early the comparison has, too.
        length = self.soak.whole(self.words)[1] + (8 if self.jobs > 1 else 0)
        pid = self.start(mode)
        time.sleep(self.numbers.uniform(0, length))
        os.kill(pid, signal.SIGKILL)
        return self.soak.ended(pid, self.said)

    def overwriting(self, mode: str) -> None:
        if mode == "--overwrite":
            shutil.copytree(self.soak.whole(self.older_words)[0], self.out)
            self.older = True
            self.lay_mine()

    def go_on(self, status: int, said: str, mode: str, again: float = 0.0) -> None:
        """From how the last process ended, to the end. Where there is nothing yet to resume, it is begun once more."""
        for _ in range(20):
            if status == 0:
                return self.count(mode, "ended")
            if status == -signal.SIGKILL:
                self.count(mode, "killed")
                self.lay_mine()
                mode = "--resume"
            elif status == 2 and says(said, NOTHING) and not (self.out / CONFIG).exists():
                self.count(mode, "earlier")
                mode = ""
            elif status == 2 and says(said, *OTHER) and self.older:
                self.count(mode, "other run")
                mode = self.numbers.choice(["--overwrite", "--resume"])
                if mode == "--resume":  # the older one, or what is left of it
                    self.words, self.older = self.older_words, False
            elif status == 2 and says(said, *BUSY):  # by a worker of what was killed, which is about to end
                self.count(mode, "in use")
                mode = "--resume"
            else:
                break
            stop = self.numbers.random() < again and self.soak.kills() < self.soak.wanted
            status, said = self.kill(mode) if stop else self.soak.ended(self.start(mode), self.said)
        raise LostError("refused", f"{self.command} {mode} ends with {status}: {said[-600:]}")

    def resumed(self, words: list[str]) -> None:
        self.words = words
        self.go_on(*self.soak.ended(self.start("--resume"), self.said), "--resume")
        check(self.out, self.command, self.soak.whole(words)[2])

    # --- the three sorts ---

    def killed(self, mode: str = "", jobs: str = "1") -> None:
        if mode.isdigit():
            mode, jobs = "", mode
        self.jobs = int(jobs)
        self.overwriting(mode)
        self.go_on(*self.kill(mode), mode, again=0.6)
        check(self.out, self.command, self.soak.whole(self.words)[2])

    def full_disk(self, mode: str = "") -> None:
        """A file system with room for a random part; or, where none can be mounted, files that may not be large."""
        size = sum(path.stat().st_size for path in self.soak.whole(self.words)[0].rglob("*"))
        ballast, most = self.folder / "ballast", {"most": self.numbers.randint(10_000, 200_000)}
        mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "soak", str(self.folder)]
        if self.soak.mounts and subprocess.run(mount).returncode == 0:
            self.lay_tree()
            most = {}
        self.overwriting(mode)
        if not most:
            with open(ballast, "wb") as file:
                disk = os.statvfs(self.folder)
                room = int(self.numbers.uniform(0, size))
                os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_bsize - room)
        status, said = self.soak.ended(self.start(mode, **most), self.said)
        if status and not (status == 2 and says(said, *FULL)):
            raise LostError("refused", f"{self.command} {mode} on a full disk ends with {status}: {said[-600:]}")
        self.soak.figures["full disk"]["full" if status else "ended"] += 1
        check_parts(self.out)
        ballast.unlink(missing_ok=True)
        self.resumed(self.words)

    def meet(self, *kinds: str) -> None:
        """Two begin within half the length of one: in one directory, or in a comparison's and that of a run in it."""
        length, name, mode = self.soak.whole(self.words)[1], " + ".join(kinds), kinds[0].partition(" ")[2]
        # Another training that overwrites is told by its settings, too.
        others = self.older_words if kinds == ("train", "train --overwrite") else None
        while mode and not (self.out / MANIFEST[self.command]).exists():
            self.kill("")
        self.lay_mine()
        begun = []
        for kind, other in zip(kinds, (None, others), strict=True):
            command, _, mode = kind.partition(" ")
            said = self.soak.root / f"{self.folder.name}.{len(begun)}.said"
            begun.append((self.start(mode, other or words_of(command, self.strategy), said), said))
            time.sleep(self.numbers.uniform(0, 0.5) * length * (len(begun) == 1))
        ends = [self.soak.ended(pid, said) for pid, said in begun]
        for status, said in ends:
            column = "ended" if status == 0 else "in use" if says(said, *BUSY) else "earlier"
            self.soak.figures[name][column] += 1
            if status not in (0, 2) or (column == "earlier" and not says(said, *EARLIER)):
                raise LostError("refused", f"{name} ends with {status}: {said[-600:]}")
        if all(status for status, _ in ends):
            raise LostError("refused", f"neither goes on: {ends}")
        winner = others if others and ends[1][0] == 0 else self.words
        if self.command == "train" or kinds[0].startswith(kinds[1][:5]):
            check(self.out, self.command, self.soak.whole(winner)[2])
        self.resumed(winner)
