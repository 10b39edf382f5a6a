"""Processes that run tasks, and all that can become of one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from batchkern.compare import workers
from batchkern.compare.workers import in_processes


class Unreadable:
    """Goes through a pipe, and cannot be made again."""

    def __reduce__(self):
        return int, ("no number",)


class Doomed:
    """Ends the process that reads it, before that reads anything more."""

    def __call__(self, task, device):
        raise AssertionError

    def __reduce__(self):
        return os._exit, (3,)


def work(task, device):
    if task == "unpicklable":
        return lambda: None
    if task == "unreadable":
        return Unreadable()
    return f"{task} done"


def wait(task, device):
    """A task is what the process does, and the file by which it tells that it does."""
    what, file = task
    if what == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(file).touch()
    if what == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600)


def died(task, how):
    return f"{task} {how}"


def test_an_outcome_that_cannot_pass_ends_nothing():
    tasks = ["first", "unpicklable", "second", "unreadable", "last"]
    outcomes = list(in_processes(work, died, tasks, ["cpu"]))
    assert [outcome.partition(" (")[0] for outcome in outcomes] == [
        "first done",
        "unpicklable has a result that cannot be sent back",
        "second done",
        "unreadable returned a result that cannot be read",
        "last done",
    ]
    assert "lambda" in outcomes[1]
    assert "ValueError" in outcomes[3]


def test_a_process_that_dies_with_its_task_unread():
    """The system then says that the connection was reset, not that it has ended."""
    assert list(in_processes(Doomed(), died, ["task"], ["cpu"])) == ["task ended with status 3"]


def test_processes_that_do_not_end_are_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "GRACE", 0.5)
    files = {what: tmp_path / what for what in ("deaf", "stopped")}
    outcomes = in_processes(wait, died, [(what, str(file)) for what, file in files.items()], ["cpu"] * 2)

    rescued = []

    def kill():
        rescued.extend(multiprocessing.active_children())
        for process in rescued:
            process.kill()

    rescue = threading.Timer(10, kill)

    def interrupt():
        while not all(file.exists() for file in files.values()):
            time.sleep(0.05)
        rescue.start()
        os.kill(os.getpid(), signal.SIGINT)

    # Whoever starts the tests in the background may have had the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            next(outcomes)
    finally:
        signal.signal(signal.SIGINT, before)
    rescue.cancel()
    assert not rescued
    assert multiprocessing.active_children() == []
