"""Ctrl-C while the command line loads torch and other libraries, which takes seconds: one line, and no traceback.

The package imports this first. An exception is not enough: a library that is being imported may replace or suppress it.
"""

from __future__ import annotations

import os
import signal
import sys
from itertools import pairwise
from types import FrameType


def loaded() -> None:
    """From here on Ctrl-C raises an exception again, except during an import."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, _interrupt)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"batchkern: interrupted\n")
    os._exit(130)


def _interrupt(number: int, frame: FrameType | None) -> None:
    caller = frame
    while caller:
        if caller.f_code.co_filename.startswith("<frozen importlib."):
            _leave(number, frame)
        caller = caller.f_back
    signal.default_int_handler(number, frame)


def _is_command() -> bool:
    """Whether this process is ``batchkern`` or ``python -m batchkern``, and not a worker started by it."""
    script = sys.argv[0] in sys.orig_argv and os.path.basename(sys.argv[0]) == "batchkern"
    return script or (sys.argv[0] == "-m" and ("-m", "batchkern") in pairwise(sys.orig_argv))


if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)
