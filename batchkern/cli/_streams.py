"""The output of a command: a closed pipe or full disk gives no traceback, and file names cannot control the
terminal."""

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
"""Control characters for terminals, and surrogates, which stand for undecodable bytes of file names."""


def visible(text: object, keep: str = "") -> str:
    """``text`` with escapes such as ``\\x1b`` in place of control characters, except those in ``keep``."""
    return CONTROL.sub(lambda m: m[0] if m[0] in keep else m[0].encode("unicode_escape").decode(), str(text))


class Output:
    """stdout or stderr while a command runs.

    Characters that its encoding lacks are written as escapes, and so are control characters except newlines and tabs.
    After a failed write, all further output is dropped, so that a training does not end because of it.

    Args:
        stream: the stream; ``None`` if it was closed before the command began.
        called: its name in the error message on stderr after a failed write; without a name there is no message.
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
        """The same stream for output that moves the cursor intentionally."""
        return Output(self._stream, styled=True)

    def isatty(self) -> bool:
        return self._stream is not None and self.failure is None and self._stream.isatty()

    def fileno(self) -> int:
        return self._open().fileno()

    def write(self, text: str) -> int:
        if not isinstance(text, str):  # click tests this way whether a stream is binary
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
        """Runs ``action``, unless an earlier one has failed."""
        try:
            if self.failure is None:
                action()
        except OSError as error:
            self.failure = error
            # The rest of the stream's buffer is discarded; otherwise Python would fail again to write it at exit.
            with contextlib.suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.fileno())
                os.close(nowhere)
            if self._called and not isinstance(error, BrokenPipeError):
                said = f"batchkern: error: {self._called} cannot be written: {error.strerror}"
                print(said, file=sys.stderr, flush=True)


@contextlib.contextmanager
def outputs() -> Iterator[None]:
    """Replaces stdout and stderr by :class:`Output`; the exit status is 2 if stdout could not be written.

    If the reader of a pipe has ended, such as ``head``, the command ends without a message, and with the status that a
    shell shows after SIGPIPE.
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
    """Opens /dev/null in place of a closed stdin, stdout or stderr; otherwise the next opened file would get its
    number, and the output meant for a terminal."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
