"""What soak.py looks for once something was stopped: bits that were lost, files half written, changes of a user's."""

from __future__ import annotations

import json
import os
from pathlib import Path

from test_resume import difference, outcome

from batchkern.compare import RESULTS, report
from batchkern.rundir import CURVES, PREPROCESSING, PREVIOUS, SAMPLES, WEIGHTS

SORTS = ("bits", "outside", "parts", "refused")
OURS = {
    "train": (PREVIOUS, PREPROCESSING, WEIGHTS, SAMPLES, CURVES),
    "compare": (report.CSV, report.REPORT, report.SECONDS_PLOT),
}
"""Files in whose place a link of a user's is replaced, and not followed."""


class LostError(Exception):
    """Its first argument is one of SORTS."""


def state(out: Path, command: str) -> object:
    """All that must be the same in the end: whatever does not tell of time or of processes."""
    if command == "train":
        files = [(out / name).read_bytes() for name in (PREPROCESSING, SAMPLES)]
        return outcome(out), files, (out / CURVES).is_symlink()
    timeless = {
        "object_pairs_hook": lambda pairs: {key: value for key, value in pairs if key not in ("seconds", "jobs")}
    }
    results = json.loads((out / RESULTS).read_text(), **timeless)
    runs = {run["directory"]: state(out / run["directory"], "train") for run in results["runs"]}
    return results, runs, [(out / name).is_symlink() for name in OURS["compare"] if (out / name).stat()]


def check(out: Path, command: str, whole: object) -> None:
    try:
        differs = difference(state(out, command), whole)
    except Exception as error:
        differs = f"{type(error).__name__}: {error}"
    if differs:
        raise LostError("bits", f"{out} is not as what never was stopped: {differs[:300]}")
    check_parts(out)


def check_parts(out: Path) -> None:
    if parts := [str(path) for path in out.rglob("*.part") if path.name != "mine.part"]:
        raise LostError("parts", f"files half written are left: {parts}")


def listing(folder: Path) -> dict[str, tuple]:
    """Every file, link and folder: its status but for when it was read, and content or target."""
    found = {}
    for path in (folder, *folder.rglob("*")):
        status = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        found[str(path)] = (status.st_mode, status.st_ino, status.st_mtime_ns, content)
    return found
