"""What a command writes to: no pipe or full disk ends it with a traceback, and no file name moves a cursor."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""What a terminal may take for a command, and halves of letters, which stand for bytes of a file name."""


def visible(text: object, keep: str = "") -> str:
    """``text`` with escapes such as ``\\x1b`` in place of control characters but those of ``keep``."""
    return CONTROL.sub(lambda m: m[0] if m[0] in keep else m[0].encode("unicode_escape").decode(), str(text))


class Output:
    """stdout or stderr while a command runs.

    Letters that its encoding lacks are written as escapes, as are control characters but newlines and tabs. Once it
    cannot be written, all that follows is dropped: a training should not end for want of a place for its lines.

    Args:
        stream: ``None`` where it was closed before the command began.
        called: its name in the sentence, on stderr, that says that it cannot be written; without one nothing is said.
        styled: leave control characters as they are.
    """

    def __init__(self, stream: TextIO | None, called: str = "", *, styled: bool = False) -> None:
        self._stream = stream
        self._called = called
        self._styled = styled
        self.encoding = getattr(stream, "encoding", None) or "utf-8"
        self.failure: Exception | None = None

    @property
    def styled(self) -> Output:
        """The same stream for what moves the cursor on purpose."""
        return Output(self._stream, styled=True)

    def isatty(self) -> bool:
        return self._stream is not None and self.failure is None and self._stream.isatty()

    def fileno(self) -> int:
        return self._open().fileno()

    def write(self, text: str) -> int:
        if not isinstance(text, str):  # by which click finds out that this is no stream of bytes
            raise TypeError(f"text must be a str, got {type(text).__name__}")
        shown = text if self._styled else visible(text, keep="\n\t")
        shown = shown.encode(self.encoding, "backslashreplace").decode(self.encoding)
        self._try(lambda: self._open().write(shown))
        return len(text)

    def flush(self) -> None:
        self._try(lambda: self._stream and self._stream.flush())

    def _open(self) -> TextIO:
        if self._stream is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self._stream

    def _try(self, action: Callable[[], object]) -> None:
        """Nothing, once something has failed."""
        try:
            if self.failure is None:
                action()
        except OSError as error:
            self.failure = error
            # What is still in the stream's buffer goes nowhere, or Python would fail to write it once more at its end.
            with contextlib.suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.fileno())
                os.close(nowhere)
            if self._called and not isinstance(error, BrokenPipeError):
                said = f"batchkern: error: {self._called} cannot be written: {error.strerror}"
                print(said, file=sys.stderr, flush=True)


@contextlib.contextmanager
def outputs() -> Iterator[None]:
    """stdout and stderr as :class:`Output`, and the exit status 2 where the first could not be written.

    Where its reader has gone, as ``head`` does, the command ends without a word, and with the status that a shell shows
    of one that SIGPIPE has ended.
    """
    _open_all()
    before = sys.stdout, sys.stderr
    out, err = Output(sys.stdout, "standard output"), Output(sys.stderr)
    sys.stdout, sys.stderr = out, err
    try:
        yield
    except SystemExit as ended:
        out.flush()
        if out.failure is None or ended.code:
            raise
        raise SystemExit(128 + signal.SIGPIPE if isinstance(out.failure, BrokenPipeError) else 2) from None
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before


def _open_all() -> None:
    """Where stdin, stdout or stderr is closed, the next file that is opened would get its number, and what is meant for
    a terminal."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
