"""The progress bar of a training: loss, accuracy, kept fraction, samples per second."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

LEAST_WIDTH = 40
"""The smallest number of columns of a terminal; with fewer, rich would break lines and tables apart."""


class ProgressBar:
    """A bar that is shown on a terminal if rich is installed. Figures are read at most five times a second."""

    def __init__(self, label: str, *, enabled: bool) -> None:
        self._bar: Any = None
        self._next = 0.0
        if not enabled:
            return
        try:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
        except ImportError:
            return
        # The command line escapes control characters, except in the stream ``styled``.
        console = Console(file=getattr(sys.stderr, "styled", None), stderr=True)
        if console.is_terminal and console.width >= LEAST_WIDTH:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
            self._task = self._bar.add_task(label, total=1.0, figures="")

    def __enter__(self) -> ProgressBar:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def due(self) -> bool:
        """Whether figures are due to be shown; reading them may wait for the device."""
        return self._bar is not None and time.monotonic() >= self._next

    def show(self, progress: float, *, loss: float, accuracy: float, kept: float, speed: float) -> None:
        self._next = time.monotonic() + 0.2
        figures = f"loss {loss:.4f}  acc {accuracy:.1%}  kept {kept:.0%}  {speed:,.0f} samples/s"
        self._bar.update(self._task, completed=progress, figures=figures)
