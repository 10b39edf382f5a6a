"""Ctrl-C, and the end that torchrun asks for: between two updates, where a checkpoint can be taken."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during :meth:`Trainer.fit`; the message says what was saved."""


class StopRequest:
    """Whether this process was asked to stop.

    In one process that is Ctrl-C, and a second one stops at once. One of several ranks is asked by SIGTERM as well, and
    gets Ctrl-C twice, from the terminal and from torchrun, which kills what has not ended after 30 seconds.
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
