"""Every snippet of the README runs; every command it shows exists."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]


def test_there_is_something_to_run():
    assert len(PYTHON) >= 2
    assert any(line.startswith("batchkern ") for line in SHELL)


@pytest.mark.parametrize("snippet", PYTHON, ids=range(len(PYTHON)))
def test_python_snippets_run(snippet, tmp_path):
    done = warm.run("-c", snippet, cwd=tmp_path, timeout=250)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_python_snippets_pass_a_type_checker(tmp_path):
    pytest.importorskip("mypy")
    files = [tmp_path / f"snippet_{number}.py" for number in range(len(PYTHON))]
    for file, snippet in zip(files, PYTHON, strict=True):
        file.write_text(snippet)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file=",
        "--ignore-missing-imports",
        "--follow-imports=silent",
        *files,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("line", [x for x in SHELL if x.startswith("batchkern ")])
def test_batchkern_commands_run(line, tmp_path):
    """In one working directory of their own; the lengthy comparison with fewer seeds, epochs, images and budgets."""
    words = shlex.split(line)
    if words[1] == "compare":
        words += ["--seeds", "1", "--epochs", "5", "--train-rows", "200", "--budget", "updates", "--jobs", "1"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = warm.run("-m", "batchkern", *words[1:], cwd=tmp_path, env=environment, timeout=250)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("line", [x for x in SHELL if x.startswith("make ")])
def test_make_targets_exist(line):
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(shlex.split(line)[1:]) <= set(targets)


def test_every_other_command_is_one_we_test_elsewhere():
    known = ("batchkern ", "make ", "pip install --no-build-isolation ")
    known += ("pip install 'cuda-toolkit[nvcc,nvvm,crt,cccl]'",)  # test_build.py: what setup.py asks for
    assert [line for line in SHELL if not line.startswith(known)] == []
