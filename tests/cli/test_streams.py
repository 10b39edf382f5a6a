"""What a command writes to: full, closed, gone, narrow, or with few letters; and names that would move a cursor."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import commands
import pytest
import warm

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from batchkern import cli
from batchkern.cli import _streams
from batchkern.cli._streams import Output, visible
from batchkern.progress import ProgressBar
from batchkern.rundir import BEST, METRICS, RUN_FILES

TRAIN = ("train", "--data", "digits", "--epochs", "2", "--batch-size", "256", "--out", "run")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(cli.__file__).parents[2]))


class Refusing(io.StringIO):
    """Fails as a full disk or a closed pipe does: where it is written, or where its buffer is."""

    def __init__(self, number: int, *, late: bool = False) -> None:
        super().__init__()
        self.error, self.late = OSError(number, os.strerror(number)), late

    def write(self, text: str) -> int:
        if not self.late:
            raise self.error
        return len(text)

    def flush(self) -> None:
        raise self.error


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(monkeypatch, words, stdout, stderr):
    monkeypatch.setattr(sys, "argv", ["batchkern", *words])
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", stderr)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


@pytest.mark.parametrize("words", [("--version",), ("--help",), ("info",), ("info", "--json"), ("reproduce", "--list")])
@pytest.mark.parametrize(
    ("out", "status", "said"),
    [
        (lambda: None, 2, "Bad file descriptor"),
        (lambda: Refusing(errno.ENOSPC), 2, "No space left on device"),
        (lambda: Refusing(errno.ENOSPC, late=True), 2, "No space left on device"),
        (lambda: Refusing(errno.EPIPE), 141, None),
        (lambda: Refusing(errno.EPIPE, late=True), 141, None),
    ],
)
def test_stdout_that_cannot_be_written(monkeypatch, words, out, status, said):
    err = io.StringIO()
    assert run(monkeypatch, words, out(), err) == status
    assert err.getvalue() == (f"batchkern: error: standard output cannot be written: {said}\n" if said else "")


@pytest.mark.parametrize(("number", "status"), [(errno.ENOSPC, 2), (errno.EPIPE, 141)])
def test_a_training_goes_on_without_a_place_for_its_lines(monkeypatch, number, status):
    err = io.StringIO()
    assert run(monkeypatch, TRAIN, Refusing(number), err) == status
    assert err.getvalue().count("\n") == (number == errno.ENOSPC)
    assert sorted(os.listdir("run")) == sorted({*RUN_FILES} - {BEST})
    assert len(Path("run", METRICS).read_text().splitlines()) == 2


@pytest.mark.parametrize("err", [None, Refusing(errno.ENOSPC), Refusing(errno.EPIPE)])
def test_stderr_that_cannot_be_written(monkeypatch, err):
    out = io.StringIO()
    assert run(monkeypatch, ("train", "--data", "no/such.parquet"), out, err) == 2
    assert run(monkeypatch, ("--version",), out, err) == 0
    assert out.getvalue().startswith("batchkern 0")  # and no sentence that was meant for stderr


@pytest.mark.parametrize(
    ("words", "redirections", "said"),
    [
        (["--version"], ">/dev/full", "batchkern: error: standard output cannot be written: No space left on device\n"),
        (TRAIN, "<&- >&-", "batchkern: error: standard output cannot be written: Bad file descriptor\n"),
    ],
)
def test_a_process_whose_streams_are_closed_or_full(words, redirections, said):
    """Nothing is said once more as Python ends."""
    command = ["sh", "-c", f'"$@" {redirections}', "sh", sys.executable, "-m", "batchkern", *words]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (2, said)
    assert words[0] != "train" or len(Path("run", METRICS).read_text().splitlines()) == 2


def test_closed_streams_leave_no_number_to_a_file():
    code = "import os; from batchkern.cli._streams import _open_all; os.close(0); os.close(2); "
    code += "_open_all(); _open_all(); print(os.open('x', os.O_CREAT))"
    assert int(warm.run("-c", code).stdout) > 2


# --- letters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ± é 🙂", "plain ± é 🙂"),
        ("\x1b[2Jx", r"\x1b[2Jx"),
        ("a\rb\nc\td\0", r"a\rb\nc\td\x00"),
        ("\x7f\x9b2J\x85", r"\x7f\x9b2J\x85"),
        ("\udcff\ud83d", r"\udcff\ud83d"),
        (Path("a\x1bb"), r"a\x1bb"),
    ],
)
def test_what_is_visible(text, shown):
    assert visible(text) == shown


def test_stdout_keeps_its_lines():
    stream = io.StringIO()
    Output(stream).write("a\tb\n\x1b[2J\r\n")
    assert stream.getvalue() == "a\tb\n\\x1b[2J\\r\n"
    with pytest.raises(TypeError, match="bytes"):
        Output(stream).write(b"")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "words",
    [
        ("train", "--data", "\x1b[2Jx\udcff.parquet"),
        ("train", "--data", "digits", "--out", "\x9b2J\n\udcff/\0"),
        ("train", "--data", "digits", "--strategy", "\x1b[2J"),
        ("train", "--\x1b[2Jx"),
        ("\x1b[2Jx",),
        ("info", "\x1b[2Jx"),
        ("compare", "--arm", "trimming", "--arm", "\x1b[2J"),
        ("reproduce", "\x1b[2J"),
        ("bench", "report", "\x1b[2Jx\r\nbatchkern: all is well"),
        ("bench", "report", "--readme", "\x1b[2Jx"),
    ],
)
def test_no_control_character_of_an_argument_reaches_the_terminal(words):
    status, out, err = commands.run(*words)
    assert status == 2
    assert not _streams.CONTROL.search((out + err).replace("\n", "")), err
    assert "batchkern: all is well" not in err.splitlines()


def test_nor_one_of_where_the_files_are():
    status, out, _ = commands.run(*TRAIN[:-1], "a\x1b[2J\nb")
    assert status == 0
    assert r"updates; in a\x1b[2J\nb:" in out.splitlines()[-2]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "utf-16"])
def test_letters_that_the_terminal_lacks(monkeypatch, encoding):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2))
    assert run(monkeypatch, ("reproduce", "--list"), out, err) == 0
    sign = r"\xb1" if encoding == "ascii" else "±"
    assert f"69.6 {sign} 0.9" in out.buffer.getvalue().decode(encoding)
    assert run(monkeypatch, ("train", "--data", "é\udcff/🙂.parquet"), out, err) == 2
    assert r"\udcff" in err.buffer.getvalue().decode(encoding)


# --- terminals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", ["0", "1", "39", "nonsense", "-3", "200"])
@pytest.mark.parametrize("term", ["xterm", "dumb", ""])
def test_tables_in_any_terminal(monkeypatch, columns, term):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", term)
    out = Terminal()
    assert run(monkeypatch, ("info",), out, io.StringIO()) == 0
    assert "kernel" in out.getvalue()
    assert "\\x1b" not in out.getvalue()


@pytest.mark.parametrize(("columns", "shown"), [("0", False), ("1", False), ("39", False), ("80", True)])
def test_the_bar_moves_the_cursor_of_a_wide_terminal(monkeypatch, columns, shown):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "xterm")
    err = Terminal()
    monkeypatch.setattr(sys, "stderr", Output(err))
    with ProgressBar("trimming", enabled=True) as bar:
        if bar.due():
            bar.show(0.5, loss=1.0, accuracy=0.5, kept=1.0, speed=1.0)
    assert ("\x1b[" in err.getvalue()) == shown
    assert "\\x1b" not in err.getvalue()


def test_names_that_look_like_markup():
    from batchkern.cli._tables import make_table, print_tables

    out = io.StringIO()
    table = make_table("[/heading]")
    table.add_row("[bold]passive='[/x]' :smile:")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        print_tables(table)
    assert "[/heading]" in out.getvalue()
    assert "[bold]passive='[/x]' :smile:" in out.getvalue()
