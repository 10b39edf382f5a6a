"""Runs side by side in processes of their own, none of which can take another with it."""

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
"""Seconds in which a process must end that was asked to; then it is killed."""


def in_processes(
    run: Callable[[Any, str], Any], died: Callable[[Any, str], Any], tasks: Sequence[Any], devices: Sequence[str]
) -> Generator[Any]:
    """``run(task, device)`` of all tasks, as they end, in as many processes as there are devices.

    Args:
        run: a function of a module, called in a worker; what it raises ends the worker.
        died: what stands for the outcome where the worker died, given the task and how it ended.
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
                except (EOFError, OSError):  # it died: between two messages, or in the midst of one
                    outcome = died(task, worker.dismiss())
                    worker = _Worker(run, worker.device) if waiting else worker
                except Exception as error:  # whatever the classes of an outcome do
                    outcome = died(task, f"gave back what cannot be read ({type(error).__name__}: {error})")
                else:
                    outcome = outcome if told else died(task, outcome)
                give(worker)
                yield outcome
    finally:
        for worker in busy.values():
            worker.process.terminate()
        _end([worker.process for worker in busy.values()])


class _Worker:
    """A process that takes one task after another through a pipe."""

    def __init__(self, run: Callable[[Any, str], Any], device: str) -> None:
        # Not forked: a fork would inherit the state of torch's threads, but not the threads.
        context = get_context("spawn")
        self.device = device
        self.task: Any = None
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, run, device), daemon=True)
        with _ignored_sigint():  # by the worker too, which inherits it: Ctrl-C is for this process to deal with
            self.process.start()
        theirs.close()  # so that reading ends when the worker does

    def take(self, task: Any) -> None:
        self.task = task
        # It died in its first seconds, which reading will tell.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send(task)

    def dismiss(self) -> str:
        """How it ended."""
        self.pipe.close()
        _end([self.process])
        code = self.process.exitcode or 0
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def _end(processes: Sequence[BaseProcess]) -> None:
    """Waits for those who were asked to end. One that was stopped does not hear it, and a library may not let go."""
    deadline = time.monotonic() + GRACE
    try:
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
    finally:  # at once, where a second Ctrl-C says so
        for process in processes:
            process.kill()
            process.join()


def _work(pipe: Connection, run: Callable[[Any, str], Any], device: str) -> None:
    torch.set_num_threads(1)
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        """A worker whose parent was killed would otherwise train to the end, and then wait for ever."""
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
        except Exception as error:  # whatever the classes of an outcome do, before anything is sent
            pipe.send((False, f"has what cannot be given back ({type(error).__name__}: {error})"))


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
