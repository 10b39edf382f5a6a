"""Tables on a terminal or in a pipe."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from batchkern.errors import require
from batchkern.progress import LEAST_WIDTH

if TYPE_CHECKING:
    from rich.table import Table

PIPE_WIDTH = 500


def make_table(*headings: str, numbers: bool = False) -> Table:
    """A table with columns of words, or with ``numbers`` one column of words and then columns of numbers."""
    box, table = require("rich.box", "train"), require("rich.table", "train").Table
    made: Table = table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 0 if numbers else 1), pad_edge=False)
    for place, heading in enumerate(headings):
        made.add_column(heading, justify="right" if numbers and place else "left", overflow="fold")
    return made


def print_tables(*tables: Table) -> None:
    console = require("rich.console", "train").Console
    # Plain text: a file name may look like rich's markup, and stdout shows its control characters as escapes.
    plain = {"color_system": None, "markup": False, "emoji": False, "highlight": False}
    screen = console(**plain)
    # A pipe has no width, and rich would assume 80 columns and break lines.
    screen.width = max(screen.width, LEAST_WIDTH) if sys.stdout.isatty() else PIPE_WIDTH
    for place, table in enumerate(tables):
        if place:
            print()
        screen.print(table)
