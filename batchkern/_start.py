"""Ctrl-C while the command line still loads torch, which takes seconds: one line, in place of a traceback.

The package imports this first.
"""

from __future__ import annotations

import os
import signal
import sys
from itertools import pairwise
from types import FrameType


def loaded() -> None:
    """From here on Ctrl-C is an exception again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"batchkern: interrupted\n")
    os._exit(130)


def _is_command() -> bool:
    """Whether this process is ``batchkern`` or ``python -m batchkern``, and no worker that it has started."""
    script = sys.argv[0] in sys.orig_argv and os.path.basename(sys.argv[0]) == "batchkern"
    return script or (sys.argv[0] == "-m" and ("-m", "batchkern") in pairwise(sys.orig_argv))


if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)
