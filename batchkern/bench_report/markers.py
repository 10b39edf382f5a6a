"""Blocks of a Markdown page that are generated from files of results, so that no figure is older than its source.

    <!-- figures: KIND FILE [ARGUMENTS] -->
    <!-- end of figures -->

KIND is one of :data:`KINDS`; FILE is relative to the page's folder. The text between the two lines is replaced.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from batchkern.bench_report.comparisons import reproduced, strategies
from batchkern.bench_report.operations import linear, operations, planned, summary
from batchkern.bench_report.results import Results, facts, load, read_text, rendering
from batchkern.bench_report.tables import accuracy, confident, growth_table, language, training
from batchkern.errors import UserError
from batchkern.files import write_file

KINDS: dict[str, Callable[..., str]] = {
    "operations": operations,
    "summary": summary,
    "linear": linear,
    "planned": planned,
    "growth": growth_table,
    "training": training,
    "accuracy": accuracy,
    "confident": confident,
    "strategies": strategies,
    "language": language,
    "reproduced": reproduced,
}
"""The renderer of each kind, a function of the results and the marker's arguments. It returns an empty string if the
file has nothing of this kind."""
ARGUMENTS = {"strategies": ("BUDGET",)}

BEGIN = re.compile(r"<!-- figures: (.*) -->")
END = "<!-- end of figures -->"
LOOSE = re.compile(r"<!--.*\bfigures\b")
"""Matches a line that was probably meant as a marker."""


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    """The number of the line with the first marker, counted from 1."""
    kind: str
    file: str
    arguments: tuple[str, ...]
    inside: list[str]
    """The lines between the markers."""

    @property
    def place(self) -> str:
        return f"{self.page}, line {self.line}"

    @property
    def path(self) -> Path:
        return self.page.parent / self.file

    def render(self) -> list[str]:
        """The lines that belong between the markers.

        Raises:
            UserError: the file cannot be read or rendered, has nothing of this kind, or is the result of a quick run.
        """
        results = load(self.path)
        if results.machine.get("quick"):
            raise UserError(f"{self.place}: {self.path} is of a quick run, whose figures mean nothing")
        made = self._made(results)
        if not made:
            raise UserError(f"{self.place}: {self.path} has nothing for {self.kind}")
        with rendering(results):
            return ["", *made.split("\n"), "", f"{facts(results)}. [JSON]({self.file})", ""]

    def _made(self, results: Results) -> str:
        with rendering(results):
            return KINDS[self.kind](results, *self.arguments)

    def newer(self) -> Path | None:
        """The newest file in the same folder that can replace the file of this block; None if the file itself is the
        newest.

        A file can replace it if it has the same subject, at least as many rows, and the same release of torch, number
        of threads and setting of huge pages, as far as the file of this block states these.
        """
        own = load(self.path)
        rows = self._made(own).count("\n|")
        others = [own]
        for path in self.path.parent.glob("*.json"):
            try:
                other = load(path)
            except UserError:  # not a file of results
                continue
            same = other.subject == own.subject and own.release in ("", other.release)
            settings = [(own.machine.get(key), other.machine.get(key)) for key in ("threads", "huge_pages")]
            if same and all(mine in (None, its) for mine, its in settings) and self._serves(other, rows):
                others.append(other)
        newest = max(others, key=lambda results: results.date)  # among equal dates, the block's own file
        return None if newest is own else newest.path

    def _serves(self, other: Results, rows: int) -> bool:
        """Whether ``other`` has at least ``rows`` table rows and is the result of a run that may be quoted: a complete
        run, not a quick one, and without uncommitted changes of the code."""
        if other.machine.get("quick") or other.machine.get("dirty") or not other.complete:
            return False
        try:
            made = self._made(other)
        except UserError:
            return False
        return bool(made) and made.count("\n|") >= rows


def blocks(page: Path, text: str) -> list[Block]:
    """The blocks of a page, in order.

    Raises:
        UserError: a marker is wrong, or a block has no beginning or no end.
    """
    found: list[Block] = []
    begun: tuple[int, str] | None = None
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if match := BEGIN.fullmatch(line):
            if begun:
                raise UserError(f"{page}, line {number}: figures begin before those of line {begun[0]} end: {END}")
            begun = (number, match[1])
        elif line == END:
            if not begun:
                raise UserError(f"{page}, line {number}: figures end that did not begin")
            found.append(_block(page, *begun, inside=lines[begun[0] : number - 1]))
            begun = None
        elif LOOSE.search(line):
            raise UserError(
                f"{page}, line {number}: a marker is a line of its own, <!-- figures: KIND FILE --> or {END}, "
                f"not {line!r}"
            )
    if begun:
        raise UserError(f"{page}, line {begun[0]}: the figures that begin here do not end: {END}")
    return found


def _block(page: Path, line: int, words: str, inside: list[str]) -> Block:
    kind, *rest = words.split() or [""]
    if kind not in KINDS:
        raise UserError(f"{page}, line {line}: figures must be one of {', '.join(KINDS)}, got {kind!r}")
    wanted = ("FILE", *ARGUMENTS.get(kind, ()))
    if len(rest) != len(wanted):
        raise UserError(f"{page}, line {line}: {kind} is followed by {' '.join(wanted)}, got {' '.join(rest)!r}")
    return Block(page, line, kind, rest[0], tuple(rest[1:]), inside)


def check(page: Path) -> list[str]:
    """A sentence for each block that differs from the figures of its file, or whose file is not the newest.

    Raises:
        UserError: a marker or a file is wrong.
    """
    said = []
    for block in blocks(page, read_text(page)):
        if block.inside != block.render():
            said.append(
                f"{block.place}: the figures are not those of {block.file}; run batchkern bench report --readme {page}"
            )
        if newer := block.newer():
            name = os.path.relpath(newer, page.parent)
            said.append(
                f"{block.place}: {block.file} is older than {name}, which has figures for {block.kind} too: name that"
            )
    return said


def rewrite(page: Path) -> list[str]:
    """Replaces the text between the markers. Returns a sentence for each block whose file is not the newest.

    Raises:
        UserError: a marker or a file is wrong, or the page cannot be written; the page is then unchanged.
    """
    text = read_text(page)
    lines = text.split("\n")
    for block in reversed(blocks(page, text)):  # from the end, so that the line numbers of earlier blocks stay valid
        lines[block.line : block.line + len(block.inside)] = block.render()
    write_file(page, "\n".join(lines).encode())
    return check(page)
