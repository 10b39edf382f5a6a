"""Python processes that are there at once: forks of one that has torch and the other libraries loaded.

A Python that imports torch takes seconds to start. :func:`run` and :class:`Process` stand for ``subprocess.run`` and
``Popen`` of ``python WORDS``: with its working directory, environment, output, exit status and signals. batchkern is
not loaded before: each imports it anew. They differ from a Python that starts in what a library reads from the
environment when it is imported; in modules that are loaded though nothing imports them; in the hashes of strings,
which are the same in all of them; and in that nothing is freed at the end. Where one of these may matter, one process
of a test starts cold.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import multiprocessing.process
import os
import pickle
import random
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import IO, NoReturn

# Not datasets nor transformers: whether they may use the network is read when they are imported.
LOADED = ["torch._dynamo", "numpy", "typer", "rich.console", "scipy.stats", "sklearn.datasets", "matplotlib.figure"]
LOADED += ["matplotlib.backends.backend_agg", "jinja2", "PIL.Image", "pyarrow.parquet", "pandas", "safetensors.torch"]

ENVIRONMENT = {name: os.environ[name] for name in os.environ if name != "OMP_NUM_THREADS"}
"""In which all of that is loaded, whichever test is the first to need it."""
READ_AT_START = ("PYTHONHASHSEED", "PYTHONIOENCODING", "PYTHONOPTIMIZE", "PYTHONWARNINGS")


class Process:
    """A running ``python WORDS``, where WORDS begin with ``-c``, ``-m`` or the path of a script.

    Args:
        env: the whole environment. OMP_NUM_THREADS is heeded, too, though torch is loaded.
        own_session: as ``start_new_session``, so that ``os.killpg(pid, ...)`` reaches all that it starts.
    """

    def __init__(
        self, *words: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, own_session: bool = False
    ) -> None:
        for name in READ_AT_START:
            assert env is None or env.get(name) == ENVIRONMENT.get(name), f"{name} is heeded by a Python that starts"
        job = {
            "words": words,
            "cwd": str(cwd or Path.cwd()),
            "env": dict(os.environ if env is None else env),
            "own_session": own_session,
        }
        self.args = words
        self._own_session = own_session
        self.returncode: int | None = None
        self._answers, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        (out, to_out), (err, to_err) = os.pipe(), os.pipe()
        socket.send_fds(_server(), [json.dumps(job).encode()], [to_out, to_err, theirs.fileno()])
        self.stdout: IO[str] = os.fdopen(out)
        self.stderr: IO[str] = os.fdopen(err)
        theirs.close()
        os.close(to_out)
        os.close(to_err)
        self.pid = self._answer()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _answer(self) -> int:
        answer = self._answers.recv(64)
        assert answer, "the process that forks has died"
        return int(answer)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, or less than 0 for the signal that ended it."""
        if self.returncode is None:
            self._answers.settimeout(timeout)
            try:
                self.returncode = os.waitstatus_to_exitcode(self._answer())
            except TimeoutError:
                raise subprocess.TimeoutExpired(list(self.args), timeout or 0) from None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What is left of stdout and stderr, once it has ended."""
        with ThreadPoolExecutor(2) as readers:
            outputs = [readers.submit(stream.read) for stream in (self.stdout, self.stderr)]
            try:
                self.wait(timeout)
            except BaseException:  # such as that of pytest's timeout: the readers wait for the process
                self.kill()
                raise
            return outputs[0].result(), outputs[1].result()

    def kill(self) -> None:
        """And whatever shares its session, if that is its own, though it may have ended."""
        for kill in [os.killpg] * self._own_session + [os.kill] * (self.returncode is None):
            with contextlib.suppress(ProcessLookupError):
                kill(self.pid, signal.SIGKILL)


def run(
    *words: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    process = Process(*words, cwd=cwd, env=env)
    out, err = process.communicate(timeout)
    return subprocess.CompletedProcess(words, process.wait(), out, err)


def spawn(worker: Callable[..., None], world: int, *args: object) -> None:
    """``torch.multiprocessing.spawn``: ``worker(rank, *args)``, a function of a module, in ``world`` processes."""
    code = "import pickle, sys; rank, call = sys.argv[1:]; worker, args = pickle.loads(bytes.fromhex(call)); "
    words = ["-c", code + "worker(int(rank), *args)"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    call = pickle.dumps((worker, args)).hex()
    processes = [Process(*words, str(rank), call, env=environment) for rank in range(world)]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()


def has_ended(group: int) -> bool:
    """Whether the last process of a group has, within ten seconds: the system, and Python's own tracker of resources,
    take a moment."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@cache
def _server() -> socket.socket:
    """It ends when this process does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    own = ("PYTHONPATH", "PYTHONUNBUFFERED")
    environment = {name: value for name, value in ENVIRONMENT.items() if name not in own}
    environment["OPENBLAS_NUM_THREADS"] = "1"  # NumPy's threads would not survive a fork; Arrow's one knows of forks
    command = [sys.executable, __file__, str(theirs.fileno())]
    nowhere = subprocess.DEVNULL
    subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, stdin=nowhere, stdout=nowhere)
    theirs.close()
    return ours


# --- in the other process -------------------------------------------------------------------------------------------


def serve(fd: int) -> None:
    """Forks for every job. The fork forks once more: to become what was asked for, and to tell how that ended."""
    path = sys.path[1:]  # without the folder of this file
    for name in LOADED:
        with contextlib.suppress(ImportError):
            import_module(name)
    warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
    gc.freeze()  # a collection would copy all of it
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait
    jobs = socket.socket(fileno=fd)
    while True:
        message, fds, *_ = socket.recv_fds(jobs, 2**20, 3)
        if not message:
            return
        if os.fork() == 0:
            jobs.close()
            out, err, answers = fds
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            pid = os.fork()
            if pid == 0:
                os.close(answers)
                for number, name in ((out, 1), (err, 2)):
                    os.dup2(number, name)
                    os.close(number)
                as_python_ends(partial(become, **json.loads(message), path=path))
            os.close(out)
            os.close(err)
            told = socket.socket(fileno=answers)
            with contextlib.suppress(BrokenPipeError):  # nobody asked how it ended
                told.send(str(pid).encode())
                told.send(str(os.waitpid(pid, 0)[1]).encode())
            os._exit(0)
        for number in fds:
            os.close(number)


def as_python_ends(action: Callable[[], None]) -> NoReturn:
    """But without a second's work for the memory of all that was loaded."""
    status, number = 0, 0
    try:
        action()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if status and not isinstance(ended.code, int):
            print(ended.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        number = signal.SIGINT
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with contextlib.suppress(ValueError):  # it may be closed
        sys.stdout.flush()
    if number:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(status & 0xFF)


def become(words: list[str], cwd: str, env: dict[str, str], own_session: bool, path: list[str]) -> None:
    """Runs what ``python WORDS`` would."""
    if own_session:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    random.seed()
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    os.chdir(cwd)
    multiprocessing.process.ORIGINAL_DIR = cwd  # type: ignore[attr-defined]  # where its own processes look for a script
    os.environ.clear()
    os.environ.update(env)
    if env.get("OMP_NUM_THREADS") and (torch := sys.modules.get("torch")):
        torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    first, rest = words[0], words[1:]
    own = cwd if first in ("-c", "-m") else str(Path(first).resolve().parent)
    sys.path[:] = [own, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep)), *path]
    if first == "-m":
        sys.argv[:] = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv[:] = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv[:] = words
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    serve(int(sys.argv[1]))
