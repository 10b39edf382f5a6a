"""Runs side by side in processes of their own, none of which can take another with it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from typing import Any

import torch


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
                    outcome = worker.pipe.recv()
                except EOFError:
                    outcome = died(task, worker.dismiss())
                    worker = _Worker(run, worker.device) if waiting else worker
                give(worker)
                yield outcome
    finally:
        for worker in busy.values():
            worker.process.terminate()
            worker.dismiss()


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
        with contextlib.suppress(BrokenPipeError):  # it died in its first seconds, which reading will tell
            self.pipe.send(task)

    def dismiss(self) -> str:
        """How it ended."""
        self.pipe.close()
        self.process.join()
        code = self.process.exitcode or 0
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


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
        pipe.send(run(task, device))


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
