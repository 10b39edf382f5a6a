"""Parallel runs in separate processes; if one of them dies, the others continue."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

GRACE = 5.0
"""Seconds until a process that was told to end is killed."""


def in_processes(
    run: Callable[[Any, str], Any], died: Callable[[Any, str], Any], tasks: Sequence[Any], devices: Sequence[str]
) -> Generator[Any]:
    """The results of ``run(task, device)`` for all tasks, as they end, in as many processes as there are devices.

    Args:
        run: a module-level function, called in a worker; an exception in it ends the worker.
        died: returns the outcome of a task whose worker died, given the task and a description of how it ended.
        devices: one for each process; a device may be named several times.
    """
    waiting = list(reversed(tasks))
    busy: dict[Connection, _Worker] = {}

    def give(worker: _Worker) -> None:
        if waiting:
            worker.take(waiting.pop())
            busy[worker.pipe] = worker
        else:
            worker.dismiss()

    try:
        for device in devices[: len(tasks)]:
            give(_Worker(run, device))
        while busy:
            for pipe in wait(list(busy)):
                worker = busy.pop(pipe)  # type: ignore[call-overload]
                task = worker.task
                try:
                    told, outcome = worker.pipe.recv()
                except (EOFError, OSError):  # it died, perhaps while sending a message
                    outcome = died(task, worker.dismiss())
                    worker = _Worker(run, worker.device) if waiting else worker
                except Exception as error:  # raised by the classes of an outcome
                    outcome = died(task, f"returned a result that cannot be read ({type(error).__name__}: {error})")
                else:
                    outcome = outcome if told else died(task, outcome)
                give(worker)
                yield outcome
    finally:
        for worker in busy.values():
            worker.process.terminate()
        _end([worker.process for worker in busy.values()])


class _Worker:
    """A process that gets one task after another through a pipe."""

    def __init__(self, run: Callable[[Any, str], Any], device: str) -> None:
        # Not "fork": the child would inherit the state of torch's threads, but not the threads.
        context = get_context("spawn")
        self.device = device
        self.task: Any = None
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, run, device), daemon=True)
        with _ignored_sigint():  # the worker inherits this: Ctrl-C is handled by this process
            self.process.start()
        theirs.close()  # so that reading fails when the worker has ended

    def take(self, task: Any) -> None:
        self.task = task
        # If the worker died in its first seconds, reading from it will fail.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send(task)

    def dismiss(self) -> str:
        """Ends the worker; returns a description of how it ended."""
        self.pipe.close()
        _end([self.process])
        code = self.process.exitcode or 0
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def _end(processes: Sequence[BaseProcess]) -> None:
    """Waits for processes that were told to end, then kills them: a stopped process or a busy library may not react."""
    deadline = time.monotonic() + GRACE
    try:
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
    finally:  # at once after a second Ctrl-C
        for process in processes:
            process.kill()
            process.join()


def _work(pipe: Connection, run: Callable[[Any, str], Any], device: str) -> None:
    torch.set_num_threads(1)
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        """Ends the worker with its parent. Otherwise it would train to the end, and then wait forever."""
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        outcome = run(task, device)
        try:
            pipe.send((True, outcome))
        except Exception as error:  # raised by the classes of an outcome, before anything is sent
            pipe.send((False, f"has a result that cannot be sent back ({type(error).__name__}: {error})"))


@contextlib.contextmanager
def _ignored_sigint() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
