"""What warm.py starts is what Python would start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import warm


def cold(*words: str, cwd: Path, env: dict[str, str]) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import os, sys; print(sys.argv, os.getcwd(), os.environ.get('HERE'), os.environ.get('PATH'), __name__)",
        "import mine; print(mine.__file__)",
        "import sys; sys.exit()",
        "import sys; sys.exit(3)",
        "import sys; sys.exit('a sentence')",
        "import sys; sys.exit(None)",
        "import sys; sys.exit(-1)",
        "import sys; sys.exit(258)",
        "import sys; print('said'); sys.stdout.close()",
        "import atexit; atexit.register(print, 'last'); print('first', end='')",
        "import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), print('joined'))).start()",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import os; print('lost', end=''); os._exit(5)",
        "import sys; print(sys.stdin.read() == '', sys.stdout.isatty())",
        "import multiprocessing as m; p = m.get_context('spawn').Process(target=print, args='ab'); p.start(); p.join()",
    ],
)
@pytest.mark.parametrize("way", ["-c", "script", "-m"])
def test_it_ends_and_says_what_python_does(tmp_path: Path, code: str, way: str) -> None:
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "mine.py").touch()
    guard = "if __name__ == '__main__':\n    "
    (tmp_path / "script.py").write_text(guard + code + "\n")
    words = {"-c": ["-c", code], "script": ["script.py"], "-m": ["-m", "script"]}[way]
    env = {"PATH": os.environ["PATH"], "HERE": "yes", "PYTHONPATH": str(tmp_path / "library")}
    done = warm.run(*words, "an", "argument", cwd=tmp_path, env=env)
    assert (done.returncode, done.stdout, done.stderr) == cold(*words, "an", "argument", cwd=tmp_path, env=env)


def test_an_exception_is_a_traceback_and_status_1() -> None:
    done = warm.run("-c", "print('before')\n1 / 0")
    assert (done.returncode, done.stdout) == (1, "before\n")
    assert done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-1] == "ZeroDivisionError: division by zero"


def test_threads_are_those_of_the_environment_and_random_numbers_its_own() -> None:
    code = "import numpy, random, torch; print(torch.get_num_threads(), numpy.random.rand(), random.random())"
    for threads in ("1", "3"):
        said = [warm.run("-c", code, env={**os.environ, "OMP_NUM_THREADS": threads}).stdout.split() for _ in range(2)]
        assert [number for number, *_ in said] == [threads] * 2
        assert not set(said[0][1:]) & set(said[1][1:])
    assert warm.run("-c", "print(1)", env={**os.environ, "OMP_NUM_THREADS": ""}).stdout == "1\n"
    with pytest.raises(AssertionError, match="PYTHONOPTIMIZE"):
        warm.run("-c", "", env={**os.environ, "PYTHONOPTIMIZE": "1"})


def test_a_process_is_not_left_behind() -> None:
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    with warm.Process("-c", code, own_session=True) as process:
        assert process.wait(timeout=60) == 0
    assert warm.has_ended(process.pid)


def test_batchkern_is_imported_anew_and_torch_is_not() -> None:
    done = warm.run("-c", "import sys; print('torch' in sys.modules, 'batchkern' in sys.modules)")
    assert done.stdout == "True False\n"


def test_signals_reach_it_and_its_session_and_output_is_read_as_it_comes(tmp_path: Path) -> None:
    code = "import time; print('here', flush=True); time.sleep(60)"
    process = warm.Process("-c", code, own_session=True)
    assert process.stdout.readline() == "here\n"
    os.killpg(process.pid, signal.SIGINT)  # also where the tests are run in the background, which ignores it
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert errors.splitlines()[-1] == "KeyboardInterrupt"
    process = warm.Process("-c", code)
    process.send_signal(0)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL


def test_many_at_a_time_say_much_on_both_streams() -> None:
    code = "import sys; [print(f'{i}' * 50000, file=f) for i in range(4) for f in (sys.stdout, sys.stderr)]"
    processes = [warm.Process("-c", code) for _ in range(8)]
    said = "".join(f"{i}" * 50000 + "\n" for i in range(4))
    assert [process.communicate(timeout=60) for process in processes] == [(said, said)] * 8


def add(rank: int, folder: Path, number: int) -> None:
    (folder / str(rank)).write_text(str(rank + number))


def test_spawn_calls_a_function_in_each_process(tmp_path: Path) -> None:
    warm.spawn(add, 3, tmp_path, 10)
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["10", "11", "12"]
    with pytest.raises(AssertionError, match="TypeError"):
        warm.spawn(add, 2, tmp_path, "ten")
