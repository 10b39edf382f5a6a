"""``batchkern bench``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from batchkern.bench_report import check, load_all, page, rewrite, write_report
from batchkern.cli._options import argument, option
from batchkern.cli._streams import visible
from batchkern.errors import UserError

FOLDER = Path("bench", "results")

BENCH_HELP = """The results of batchkern's benchmarks, from their JSON files.

Benchmarks run in a checkout: make bench times every operation against PyTorch on the CPU, make gpu builds, tests and
measures on a GPU; both write bench/results/MACHINE/DATE-COMMIT.json. Showing such files needs neither.
"""


def report(
    files: Annotated[
        list[Path] | None, argument(help="files of results, or folders of them; default: bench/results")
    ] = None,
    out: Annotated[Path | None, option(help="write report.md and its plots into this folder")] = None,
    readme: Annotated[Path | None, option(help="rewrite the figures between the markers of this page")] = None,
    check_only: Annotated[
        bool, option("--check", help="with --readme: write nothing, and exit with 1 if a figure differs from its file")
    ] = False,
) -> None:
    """Show results of benchmarks as Markdown: tables, exponents of growth and, in a folder, plots of the floor."""
    if readme is not None:
        if files or out:
            raise UserError("--readme names its files in its markers; leave out FILES and --out")
        _renew(readme, check_only)
        return
    if check_only:
        raise UserError("--check needs --readme FILE")
    if not files and not FOLDER.is_dir():
        raise UserError(f"there is no {FOLDER} in this folder; give files of results, which make bench writes")
    found, left_out = load_all(files or [FOLDER])
    for sentence in left_out:
        print(f"batchkern: {visible(sentence)}", file=sys.stderr)
    if out is None:
        print(page(found), end="")
    else:
        print(f"in {visible(out)}: {'  '.join(write_report(found, out))}")


def _renew(readme: Path, check_only: bool) -> None:
    said = check(readme) if check_only else rewrite(readme)
    for sentence in said:
        print(f"batchkern: {visible(sentence)}", file=sys.stderr)
    if said:
        raise SystemExit(1)
