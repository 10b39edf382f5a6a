"""What ``make gpu`` leaves behind: each stage's result, whatever the others did, and where no GPU is there."""

from __future__ import annotations

import json
import sys
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = util.spec_from_file_location("gpu_run", ROOT / "bench" / "gpu_run.py")
    module = util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def main(script: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> tuple[int, dict]:
    monkeypatch.setattr(sys, "argv", ["gpu_run.py", "--out", str(out), *arguments])
    code = script.main()
    path = out / "summary.json"
    return code, json.loads(path.read_text())["stages"] if path.exists() else {}


def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_a_gpu_it_refuses(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    no_gpu(monkeypatch)
    assert main(script, monkeypatch, tmp_path / "out") == (2, {})
    assert "needs a GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_each_stage_leaves_its_result(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_gpu(monkeypatch)

    def stages(out: Path) -> list:
        def shell(name: str, command: str, seconds: float = 30, **options: object):
            return script.Stage(name, ["sh", "-c", command], seconds, without_gpu=True, **options)

        return [
            shell("build", 'echo "$MARK"', environment={"MARK": "built"}),
            shell("tests", "echo some; echo lines; exit 7"),
            # Long enough to be stopped; its time is over while later stages have theirs.
            shell("slow", f"echo begun; (sleep 4; touch {out}/survivor) & wait", 3),
            shell("tool", "true", needs="no-such-program"),
            shell("silent", "echo 1 error", must_say="0 errors"),
            shell("here", f"{sys.executable} -c 'import batchkern; print(batchkern.__file__)'", must_say=str(ROOT)),
            script.Stage("measure", ["false"], 30),
            shell("last", f"test $(ls {out} | grep -c log) = 6; sleep 2; test ! -e {out}/survivor"),
        ]

    monkeypatch.setattr(script, "stages", stages)
    monkeypatch.setattr(script, "LEAST_SECONDS", 1)
    code, results = main(script, monkeypatch, tmp_path, "--dry-run", "--minutes", "0.5")
    assert code == 1
    assert results["build"]["result"] == "passed"
    assert results["build"]["last_lines"] == ["built"]
    assert results["tests"]["result"] == "failed with exit code 7"
    assert results["tests"]["last_lines"] == ["some", "lines"]
    assert results["slow"]["result"] == "stopped after 3 s"
    assert results["slow"]["last_lines"] == ["begun"]
    assert results["tool"]["result"] == "left out: no-such-program was not found"
    assert results["silent"]["result"] == "failed: the log does not say '0 errors'"
    assert results["here"]["result"] == "passed"
    assert results["measure"]["result"] == "left out: there is no CUDA GPU"
    assert results["last"]["result"] == "passed"


def test_nothing_runs_after_a_build_that_failed_or_when_time_is_up(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_gpu(monkeypatch)
    build = script.Stage("build", ["false"], 30, without_gpu=True)
    tests = script.Stage("tests", ["true"], 30, without_gpu=True)
    monkeypatch.setattr(script, "stages", lambda out: [build, tests])
    assert main(script, monkeypatch, tmp_path / "a", "--dry-run")[1].keys() == {"build"}
    monkeypatch.setattr(script, "stages", lambda out: [tests])
    code, results = main(script, monkeypatch, tmp_path / "b", "--dry-run", "--minutes", "0.1")
    assert results["tests"]["result"] == "left out: no time was left"
    assert code == 1


def test_the_real_stages_name_files_that_exist(script: ModuleType, tmp_path: Path) -> None:
    stages = script.stages(tmp_path)
    names = ["build", "tests", "operations", "memcheck", "racecheck", "semantics", "growth", "training"]
    assert [stage.name for stage in stages] == names
    for stage in stages:
        for argument in stage.command:
            if argument.startswith(("tests/", "bench/")):
                assert (ROOT / argument).exists(), argument


def test_only_the_stages_that_are_asked_for(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    no_gpu(monkeypatch)
    stages = [script.Stage(name, ["true"], 30, without_gpu=True) for name in ("build", "growth", "training")]
    monkeypatch.setattr(script, "stages", lambda out: stages)
    stages[2].command, stages[2].paced, stages[2].must_say = ["echo", "minutes"], True, "minutes 9."
    code, results = main(script, monkeypatch, tmp_path, "--dry-run", "--stages", "training", "build", "--minutes", "10")
    assert (code, list(results)) == (0, ["build", "training"]), results
    with pytest.raises(SystemExit, match="2"):
        main(script, monkeypatch, tmp_path, "--dry-run", "--stages", "trainings")
    assert "--stages must be among build, growth, training, got trainings" in capsys.readouterr().err
