"""Ctrl-C, and the signal by which torchrun ends processes: handled between two updates, where a checkpoint can be
saved."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during :meth:`Trainer.fit`; the message tells what was saved."""


class StopRequest:
    """Whether this process got a signal to stop.

    A single process is stopped by Ctrl-C, and at once by a second Ctrl-C. With several ranks, SIGTERM is handled as
    well; a rank gets Ctrl-C twice, from the terminal and from torchrun, which kills processes that run on for 30
    seconds.
    """

    def __init__(self, *, several: bool) -> None:
        self.made = False
        self._several = several

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = [signal.SIGINT, signal.SIGTERM] if self._several else [signal.SIGINT]
        previous = [(number, signal.signal(number, self._note)) for number in numbers]
        try:
            yield
        finally:
            for number, handler in previous:
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.made and not self._several:
            raise KeyboardInterrupt
        self.made = True
