"""What a machine refuses is one sentence: memory, files, libraries."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import commands
import pytest
import torch
import warm

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from batchkern import cli
from batchkern.cli import _bench, _compare, _train
from batchkern.errors import out_of_memory

TRAIN = ("train", "--data", "digits", "--epochs", "1", "--out", "run")
CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def raising(error):
    def raise_it(*_, **__):
        raise error

    return raise_it


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(f"{CPU} 9 bytes.\nException raised from alloc_cpu"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        RuntimeError("std::bad_alloc"),
        MemoryError(),
        MemoryError("Unable to allocate 9 GiB for an array"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
    ],
)
def test_out_of_memory(monkeypatch, error):
    assert out_of_memory(error)
    monkeypatch.setattr(_train, "open_pair", raising(error))
    status, out, err = commands.run(*TRAIN)
    assert (status, out) == (2, "")
    sentence = (
        r"batchkern: error: out of memory; a smaller --batch-size or a smaller --image-size may help \([^\n]+\)\n"
    )
    assert re.fullmatch(sentence, err)
    assert "Exception raised" not in err


def test_what_needs_less_memory_is_an_option_of_the_command(monkeypatch):
    monkeypatch.setattr(_compare, "run", raising(MemoryError()))
    assert "--image-size or fewer --jobs may help (MemoryError)" in commands.run("compare", "--arm", "trimming")[2]
    monkeypatch.setattr(_bench, "load_all", raising(MemoryError()))
    Path("results").mkdir()
    assert commands.run("bench", "report", "results")[2] == "batchkern: error: out of memory (MemoryError)\n"


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), ValueError("memory"), KeyError("x"), OSError(errno.EIO, "Input/output error")]
)
def test_what_is_not_want_of_memory(error):
    assert not out_of_memory(error)


def test_a_file_that_the_system_refuses(monkeypatch):
    monkeypatch.setattr(_train, "open_pair", raising(OSError(errno.EIO, "Input/output error", "a\x1bb")))
    status, out, err = commands.run(*TRAIN)
    assert (status, out) == (2, "")
    assert re.fullmatch(r"batchkern: error: \[Errno 5\] Input/output error: 'a\\x1bb'\n", err)


def test_a_folder_that_was_removed_while_in_it(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    status, out, err = commands.run("train", "--data", "digits", "--epochs", "1")
    assert (status, out) == (2, "")
    assert re.fullmatch(r"batchkern: error: [^\n]*No such file or directory\n", err)


LIBRARIES = [
    "datasets",
    "jinja2",
    "matplotlib",
    "msgspec",
    "PIL",
    "pyarrow",
    "rich",
    "safetensors",
    "scipy",
    "sklearn",
    "statsmodels",
    "timm",
]


def without(libraries, *words):
    """``batchkern WORDS`` where none of ``libraries`` is installed, in a process of its own."""
    code = f"import sys; sys.modules.update(dict.fromkeys({libraries})); from batchkern.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    return warm.run("-c", code, *words, env=environment)


def test_nothing_optional_is_needed_to_say_that_it_is_missing():
    done = without([*LIBRARIES, "typer"], "info")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"batchkern: error: this needs the library 'typer'[^\n]*\n", done.stderr)


def test_what_only_other_commands_need_may_be_missing():
    done = without([library for library in LIBRARIES if library != "rich"], "info", "--json")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_report_of_benchmarks_without_matplotlib_writes_nothing(monkeypatch):
    growth = {"op": "f", "along": "n", "variant": "ours", "sizes": [1, 2], "fractions": [0.5, 0.6]}
    Path("a.json").write_text(json.dumps({"machine": {"device": "cpu"}, "growth": [growth]}))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, err = commands.run("bench", "report", "a.json", "--out", "page")
    assert status == 2
    assert "this needs the library 'matplotlib'" in err
    assert not Path("page").exists()


def test_a_backend_of_a_notebook_is_not_asked_for(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://of_another_environment")
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    words = ["-m", "batchkern", "train", "--data", "digits", "--epochs", "1", "--batch-size", "512", "--out", "run"]
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path("run", "curves.png").exists()


def test_a_library_that_refuses_to_be_loaded(monkeypatch, tmp_path):
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "__init__.py").write_text("raise ValueError('nope is not a valid backend')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    status, _, err = commands.run("train", "--data", "digits", "--epochs", "1", "--out", "run")
    said = "this needs the library 'matplotlib', which cannot be imported (nope is not a valid backend)"
    assert (status, err) == (2, f"batchkern: error: {said}\n")
    assert not Path("run").exists()
