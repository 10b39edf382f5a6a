"""The command line: ``batchkern train | evaluate | predict | compare | analyse | reproduce | bench | info``.

A user's error gives one line on stderr and exit status 2, never a traceback; a traceback is a bug of batchkern. Ctrl-C
gives one line and exit status 130.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable
from itertools import zip_longest
from typing import Annotated, Any, NoReturn, cast

from batchkern import _start
from batchkern._version import __version__
from batchkern.cli import _bench
from batchkern.cli._analyse import analyse
from batchkern.cli._compare import compare
from batchkern.cli._evaluate import evaluate
from batchkern.cli._info import info
from batchkern.cli._predict import predict
from batchkern.cli._reproduce import reproduce
from batchkern.cli._streams import outputs, visible
from batchkern.cli._train import train
from batchkern.distributed import says
from batchkern.errors import UserError, out_of_memory, require

try:
    import typer
except ImportError:  # main() reports it
    typer = None  # type: ignore[assignment]


def main() -> NoReturn:
    """The entry point of ``batchkern`` and ``python -m batchkern``."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook may pass on a backend that is not installed
    with outputs(), warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            require("typer", "train")
            require("rich", "train")
        except UserError as error:
            _fail(f"error: {error}")
        usage_error = cast("type[Exception]", typer.BadParameter.__base__)  # click's, or typer's copy of it
        try:
            raise SystemExit(_app()(prog_name="batchkern", standalone_mode=False) or 0)
        except usage_error as error:
            _refuse(error)


def _app() -> typer.Typer:
    # Plain help and usage errors: rich would break sentences at the edges of a box.
    app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.callback()(_group)
    for command in (train, evaluate, predict, compare, analyse, reproduce, info):
        app.command()(_in_sentences(command))
    bench = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help=_bench.BENCH_HELP)
    bench.callback()(lambda: None)
    bench.command()(_in_sentences(_bench.report))
    app.add_typer(bench, name="bench")
    return app


def _in_sentences(command: Callable[..., None]) -> Callable[..., None]:
    """Wraps ``command`` so that errors of the user or the system, and Ctrl-C, are reported in one line."""

    @functools.wraps(command)
    def told(*args: Any, **options: Any) -> None:
        _start.loaded()
        try:
            command(*args, **options)
        except UserError as error:
            _fail(f"error: {error}")
        except (MemoryError, OSError, RuntimeError) as error:
            if out_of_memory(error):
                _fail(f"error: out of memory{_what_helps(command)} ({_first_line(error)})")
            if isinstance(error, OSError):  # a failing disk, missing permissions, a removed folder
                _fail(f"error: {_first_line(error)}")
            raise
        except KeyboardInterrupt as stop:
            _fail(str(stop) or "interrupted", status=130)

    return told


def _refuse(error: Any) -> NoReturn:
    """Reports a wrong option, value or command; without a command, shows the help."""
    if error.ctx and error.message == error.ctx.get_help():
        error.show()
        raise SystemExit(2)
    _say(_usage_sentence(error), by=error.ctx.command_path if error.ctx else "batchkern")
    raise SystemExit(2)


def _usage_sentence(error: Any) -> str:
    """The message of a usage error: the same for all versions of click if their messages differ, else click's own."""
    said = error.format_message().removesuffix(".")
    kind = re.search(r"\bvalid (integer|number|float)\b", said)
    if kind and error.param:
        option = error.param.opts[0]
        return f"{option} must be a {'whole ' * (kind[1] == 'integer')}number, got {_given(option)!r}"
    if hasattr(error, "possibilities"):
        near = difflib.get_close_matches(error.option_name, error.possibilities or (), 1)
        return f"no such option {error.option_name}" + (f" (did you mean {near[0]}?)" if near else "")
    said = re.sub(r"\. Did you mean (.*)$", r" (did you mean \1)", said)
    return said[0].lower() + said[1:]


def _given(option: str) -> str:
    """The value of an option on the command line; if it is given several times, the last one, which is used."""
    found = ""
    for word, following in zip_longest(sys.argv, sys.argv[1:], fillvalue=""):
        name, equals, value = word.partition("=")
        if name == option:
            found = value if equals else following
    return found


def _what_helps(command: Callable[..., None]) -> str:
    options = {"batch_size": "a smaller --batch-size", "image_size": "a smaller --image-size", "jobs": "fewer --jobs"}
    known = inspect.signature(command).parameters
    advice = " or ".join(text for option, text in options.items() if option in known)
    return f"; {advice} may help" if advice else ""


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _fail(sentence: str, *, status: int = 2) -> NoReturn:
    _say(sentence)
    raise SystemExit(status)


def _say(sentence: str, *, by: str = "batchkern") -> None:
    sentence = visible(" ".join(sentence.split()))
    if says(sentence):
        print(f"{by}:", sentence, file=sys.stderr, flush=True)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Shows a warning in one line, without a path and a line of source."""
    _say(f"warning: {message}")


def _print_version(asked: bool) -> None:
    if asked:
        print(f"batchkern {__version__}")
        raise SystemExit(0)


def _group(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Training with selected mini-batches: five published strategies, and random selection as their control."""
