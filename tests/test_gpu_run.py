"""What ``make gpu`` leaves behind, whatever ends it, and what it does where no GPU is there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from batchkern import _C

ROOT = Path(__file__).resolve().parents[1]
STAGES = ["build", "tests", "operations", "memcheck"]
LATER = ["large", "semantics", "graphs", "racecheck", "growth", "training", "compiled"]
MOST_FILES = 8  # that a lent machine gives back


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module, on a machine without a GPU."""
    spec = util.spec_from_file_location("gpu_run", ROOT / "tools" / "gpu_run.py")
    module = util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module, "LEAST_SECONDS", 1)
    monkeypatch.setattr(module, "GRACE_SECONDS", 1)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield module
    for number, handler in before.items():
        signal.signal(number, handler)


VERDICTS = "trap 'echo verdicts; exit 1' INT; while :; do sleep 0.1; done"


class Run:
    """``gpu_run.py --dry-run`` with stages of a test's own."""

    def __init__(self, script: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
        self.script, self.monkeypatch, self.out = script, monkeypatch, out

    def shell(self, name: str, command: str, seconds: float = 30, **options: Any) -> Any:
        command = command.replace("OUT", str(self.out))
        return self.script.Stage(name, ["false"], seconds, without_gpu=["sh", "-c", command], **options)

    def __call__(self, stages: list[Any] | None, *arguments: str) -> tuple[int, dict[str, Any]]:
        if stages is not None:
            self.monkeypatch.setattr(self.script, "stages", lambda out: stages)
        self.monkeypatch.setattr(sys, "argv", ["gpu_run.py", "--out", str(self.out), "--dry-run", *arguments])
        code = self.script.main()
        return code, self.summary()["stages"]

    def summary(self) -> dict[str, Any]:
        """Of the latest run."""
        return json.loads(max(self.out.glob("summary*.json"), key=lambda path: path.stat().st_mtime_ns).read_text())

    def logs(self) -> dict[str, str]:
        with tarfile.open(self.out / "logs.tar.gz") as archive:
            return {name: archive.extractfile(name).read().decode() for name in archive.getnames()}


@pytest.fixture
def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    return Run(script, monkeypatch, tmp_path / "out")


def test_without_a_gpu_it_refuses(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_run.py", "--out", str(tmp_path / "out")])
    assert script.main() == 2
    assert "there is no GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_each_stage_leaves_its_result(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.out.mkdir()
    (run.out / "mine.log").write_text("of somebody else")
    stages = [
        run.shell("kernels", 'echo "$MARK"', environment={"MARK": "built"}),
        run.shell("tests", "echo FAILED tests/test_some.py::test_one; echo some; echo lines; exit 7"),
        # Its time is over while later stages have theirs. Interrupted, it tells; what it began is killed.
        run.shell("slow", f"sleep 60 & echo begun $!; {VERDICTS}", 1),
        run.shell("silent", "echo 1 error", must_say="0 errors"),
        run.shell("paced", "echo $0", pace=lambda seconds: [f"{seconds:.0f} s"]),
        run.shell("here", f"{sys.executable} -c 'import batchkern; print(batchkern.__file__)'", must_say=str(ROOT)),
        run.script.Stage("gpu", ["false"], 30),
        run.shell("last", "test -e OUT/summary.json"),
    ]
    code, results = run(stages)
    assert code == 1
    assert {name: outcome["result"] for name, outcome in results.items()} == {
        "kernels": "passed",
        "tests": "failed with exit code 7",
        "slow": "stopped after 1 s",
        "silent": "failed: the log does not say '0 errors'",
        "paced": "passed",
        "here": "passed",
        "gpu": "left out: there is no CUDA GPU",
        "last": "passed",
    }
    assert results["kernels"]["last_lines"] == ["built"]
    assert results["tests"]["failed"] == ["FAILED tests/test_some.py::test_one"]
    assert results["tests"]["last_lines"][1:] == ["some", "lines"]
    begun, verdicts = results["slow"]["last_lines"]
    assert verdicts == "verdicts"
    assert_ended(int(begun.removeprefix("begun ")))
    assert 0 < float(results["paced"]["last_lines"][0].split()[0]) <= 30
    assert run.logs().keys() == {f"{stage.name}.log" for stage in stages if stage.name != "gpu"}
    assert sorted(path.name for path in run.out.iterdir()) == ["logs.tar.gz", "mine.log", "summary.json"]
    assert "FAILED tests/test_some.py::test_one" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_with_what_there_is(run: Run, number: int) -> None:
    stages = [
        run.shell("first", "echo one"),
        run.shell("second", f"sleep 60 & echo $!; kill -{int(number)} $PPID; sleep 60"),
        run.shell("third", "echo three"),
    ]
    code, results = run(stages)
    assert code == 128 + number
    assert {name: outcome["result"] for name, outcome in results.items()} == {
        "first": "passed",
        "second": f"stopped by signal {int(number)}",
    }
    logs = run.logs()
    assert logs.keys() == {"first.log", "second.log"}
    assert logs["first.log"] == "one\n"
    assert_ended(int(logs["second.log"]))
    assert sorted(path.name for path in run.out.iterdir()) == ["logs.tar.gz", "summary.json"]


def test_a_program_that_ignores_the_interrupt_is_killed(run: Run) -> None:
    stage = run.shell("deaf", "trap '' INT; sleep 30; touch OUT/survivor", 1)
    _, results = run([stage])
    assert results["deaf"]["result"] == "stopped after 1 s"
    assert results["deaf"]["seconds"] < 5


def test_nothing_runs_after_a_build_that_failed_or_when_time_is_up(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.script.Runner, "takes", lambda self: False)
    monkeypatch.setattr(run.script, "ROOT", run.out.parent)
    build, tests = run.shell("build", "false"), run.shell("tests", "true")
    assert run([build, tests])[1].keys() == {"build"}
    monkeypatch.setattr(run.script, "LEAST_SECONDS", 15)
    code, results = run([tests], "--minutes", "0.1")
    assert results["tests"]["result"] == "left out: no time was left"
    assert code == 1


@pytest.mark.parametrize("takes", [True, False])
def test_a_module_that_was_carried_is_not_built_again(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, takes: bool
) -> None:
    monkeypatch.setattr(run.script.Runner, "takes", lambda self: takes)
    monkeypatch.setattr(run.script, "ROOT", tmp_path)
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / ".built-2.11.0").touch()  # by make, for another environment perhaps
    code, results = run([run.shell("build", "echo building"), run.shell("tests", "true")])
    assert code == 0
    assert (tmp_path / "build" / ".built-2.11.0").exists() is takes
    assert results["build"]["last_lines"] == [
        "not built: the module that is here is of these sources" if takes else "building"
    ]


@pytest.mark.skipif(not _C.build_facts()["cuda"], reason="batchkern._C was built without CUDA")
def test_what_is_carried_is_of_these_sources(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runner = run.script.Runner(tmp_path, dict(os.environ), tmp_path)
    assert runner.takes()
    monkeypatch.setattr(run.script, "TAKES", run.script.TAKES.replace('digest"]()', 'digest"]()[::-1]'))
    assert not runner.takes()


MEASURE = """
import json, pathlib, sys
folder = pathlib.Path("OUT/machine")
folder.mkdir(exist_ok=True)
path = folder / f"{len(list(folder.iterdir()))}.json"
tried = {"failed": FAILED, "left_out": REMAINING} if path.stem == "0" else {"failed": ["d"], "left_out": []}
path.write_text(json.dumps(tried | {"arguments": sys.argv[1:]}))
print("run", path.stem)
sys.exit(path.stem == "0")
"""


@pytest.mark.parametrize(
    ("failed", "left_out", "again"),
    [
        (["b", "c", "d"], [], ["c", "d"]),  # the first took the GPU's context with it
        ([], ["b", "c", "d"], ["c", "d"]),  # the process ended within the first
        (["b"], [], None),
        ([], [], None),
    ],
)
def test_what_came_after_a_case_that_failed_is_measured_again(
    run: Run, monkeypatch: pytest.MonkeyPatch, failed: list[str], left_out: list[str], again: list[str] | None
) -> None:
    monkeypatch.setattr(run.script, "LAST_CASE_SECONDS", 1)
    code = MEASURE.replace("OUT", str(run.out)).replace("FAILED", str(failed)).replace("REMAINING", str(left_out))
    command = [sys.executable, "-c", code, "bench/bench_some.py", "--without", "compile"]
    _, results = run([run.script.Stage("some", [], 60, measures=True, without_gpu=command)])
    written = [json.loads(path.read_text())["arguments"] for path in sorted(run.out.glob("machine/*.json"))]
    assert written[0] == ["bench/bench_some.py", "--without", "compile"]
    assert written[1:] == ([] if again is None else [["--without", "compile", *again]])
    told = "failed with exit code 1" + "; the cases after the first failure again: passed" * bool(again)
    assert results["some"]["result"] == told
    assert run.logs()["some.log"] == "run 0\n" + "run 1\n" * bool(again)


def test_the_real_stages_are_in_the_order_of_what_they_tell_and_name_files_that_exist(script: ModuleType) -> None:
    stages = script.stages(Path("out"))
    assert [stage.name for stage in stages] == STAGES + LATER
    for stage in stages:
        for argument in [*stage.command, *(stage.without_gpu or [])]:
            if argument.startswith(("tests/", "bench/")):
                assert (ROOT / argument).exists(), argument
        if stage.command[1:3] == ["-m", "pytest"]:  # it ends before it would be stopped
            assert stage.pace(90.0) in (["--session-timeout", "70"], ["--minutes", "1.17"])
    # The four that count most have room in the time that is given by default, each but the build with its whole limit.
    assert sum(stage.seconds for stage in stages[1:4]) <= 300 - 30


def test_never_more_files_than_come_back_and_none_too_deep(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """All stages at once, whose measurements are run twice; what is there is counted whenever a stage has ended, and
    while each runs."""
    monkeypatch.setattr(run.script.Runner, "takes", lambda self: False)
    monkeypatch.setattr(run.script, "ROOT", run.out.parent)
    monkeypatch.setattr(run.script, "LAST_CASE_SECONDS", 0)
    counts: list[int] = []
    write = run.script.Runner.write

    def counted(runner: Any) -> None:
        counts.append(len([path for path in run.out.rglob("*") if path.is_file()]))
        write(runner)
        files = [path.relative_to(run.out) for path in run.out.rglob("*") if path.is_file()]
        assert all(len(path.parts) <= 2 for path in files)
        counts.append(len(files))

    monkeypatch.setattr(run.script.Runner, "write", counted)
    code = MEASURE.replace("OUT", str(run.out)).replace("FAILED", "['a', 'b']").replace("REMAINING", "[]")
    code = code.replace('path.stem == "0"', "True")  # each fails, and might be tried again
    stages = run.script.stages(run.out)
    for stage in stages:
        stage.without_gpu = [sys.executable, "-c", code] if stage.measures else ["sh", "-c", "echo done"]
        stage.must_say = ""
    assert sum(stage.measures for stage in stages) == 4
    run(stages)
    assert len(counts) == 2 * len(stages)
    assert max(counts) <= MOST_FILES
    assert len(list(run.out.glob("machine/*.json"))) == 5


def test_only_the_stages_that_are_asked_for(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    stages = [run.shell(name, "true") for name in ("tests", "growth", "training")]
    stages[2] = run.shell("training", "echo $0", pace=lambda seconds: [f"{seconds:.0f}"])
    code, results = run(stages, "--stages", "training", "tests", "--minutes", "10")
    assert (code, list(results)) == (0, ["tests", "training"]), results
    assert 300 < int(results["training"]["last_lines"][0]) <= 600  # more than a stage's own limit
    with pytest.raises(SystemExit, match="2"):
        run(stages, "--stages", "trainings")
    assert "--stages must be among tests, growth, training, got trainings" in capsys.readouterr().err
    for wrong in ("0", "-1", "nan"):
        with pytest.raises(SystemExit, match="2"):
            run(stages, "--minutes", wrong)
        assert f"--minutes: it must be above 0, got {wrong}" in capsys.readouterr().err
    run.out = run.out / "summary.json" / "out"
    with pytest.raises(SystemExit, match="2"):
        run(stages)
    assert "summary.json/out cannot be made: Not a directory" in capsys.readouterr().err


def test_peers_come_from_wheels(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "a_peer-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("a_peer.py", "WHERE = __file__\n")
        about = "Metadata-Version: 2.1\nName: a-peer\nVersion: 1.0\nRequires-Dist: torch\n"
        wheel.writestr("a_peer-1.0.dist-info/METADATA", about)
        wheel.writestr("a_peer-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("a_peer-1.0.dist-info/RECORD", "")
    (tmp_path / "wheels" / "a_junk-1.0-py3-none-any.whl").write_text("no archive")
    monkeypatch.setattr(run.script, "ROOT", tmp_path)
    code, _ = run([run.shell("peers", f"{sys.executable} -c 'import a_peer; print(a_peer.WHERE)'")])
    assert code == 0
    junk, peer = run.summary()["wheels"].values()
    assert "a_junk-1.0" in junk
    assert peer == "installed"


def test_a_second_run_leaves_the_files_of_the_first(run: Run) -> None:
    run([run.shell("some", "echo one")])
    run([run.shell("other", "echo two")])
    assert json.loads((run.out / "summary.json").read_text())["stages"].keys() == {"some"}
    assert run.summary()["stages"].keys() == {"other"}
    assert run.logs() == {"some.log": "one\n"}
    assert len(list(run.out.iterdir())) == 4


def test_it_takes_what_it_runs_with_it(run: Run) -> None:
    """Killed outright, it has no time to end anything."""
    code = f"""
import importlib.util, os, pathlib, signal, sys
spec = importlib.util.spec_from_file_location("gpu_run", {str(ROOT / "tools" / "gpu_run.py")!r})
module = sys.modules["gpu_run"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
out = pathlib.Path({str(run.out)!r})
runner = module.Runner(out, dict(os.environ), out)
runner.call(module.Stage("some", [], 60), ["sh", "-c", f"echo $$; kill -9 {{os.getpid()}}; exec sleep 60"], 60)
"""
    run.out.mkdir()
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert_ended(int((run.out / "some.log").read_text()))


def assert_ended(process: int) -> None:
    """But for a moment that it may take."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0]
        except OSError:
            return
        if state == "Z":
            return
        time.sleep(0.1)
    pytest.fail("it lives on")


def test_the_commit_is_named_where_there_is_no_git(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run.script, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("BATCHKERN_BENCH_COMMIT", raising=False)
    assert run.script.commit() == "unknown"
    assert "set BATCHKERN_BENCH_COMMIT" in capsys.readouterr().err
    monkeypatch.setenv("BATCHKERN_BENCH_COMMIT", "abc1234")
    run([run.shell("some", "true")])
    assert json.loads((run.out / "summary.json").read_text())["commit"] == "abc1234"


@pytest.mark.slow
def test_a_dry_run_measures_every_operation_and_runs_every_kernel(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHKERN_BENCH_COMMIT", "abc1234")
    code, results = run(None, "--stages", "operations", "memcheck")
    assert code == 0, results
    (path,) = run.out.glob("*/*.json")
    written = json.loads(path.read_text())
    # cross_entropy is measured as half of trimmed_cross_entropy.
    assert {row["op"] for row in written["operations"]} == set(run.script.OPERATIONS) - {"cross_entropy"}
    rows = {(row["op"], row["mode"], row["variant"]) for row in written["operations"]}
    modes = ("forward", "backward", "full")
    assert rows >= {("trimmed_mean", mode, variant) for mode in modes for variant in ("ours", "eager")}
    assert "compile" not in {variant for _, _, variant in rows}
    assert (written["complete"], written["left_out"], written["without"]) == (True, [], ["compile"])
    assert written["machine"]["commit"] == "abc1234"
    (count,) = results["memcheck"]["last_lines"]
    assert count.endswith(" results")


TORCH = """
class cuda:
    is_initialized = staticmethod(lambda: False)
    is_available = is_initialized

def manual_seed(seed): pass
"""
LOST = """
import pytest, torch

@pytest.mark.parametrize("i", range(8))
def test_some(i):
    if i == 3:
        def lost():
            raise RuntimeError("an illegal memory access was encountered")
        torch.cuda.is_initialized, torch.cuda.synchronize = (lambda: True), lost
        assert i == 0, "the first to fail"
    assert not torch.cuda.is_initialized()
"""


@pytest.mark.slow
def test_a_test_that_loses_the_gpu_costs_no_other(script: ModuleType, tmp_path: Path) -> None:
    """With a torch that is there at once, since each worker of xdist imports it."""
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    for name, text in {"torch.py": TORCH, "kernel_backend.py": "", "test_lost.py": LOST}.items():
        (tmp_path / name).write_text(text)
    workers = ["1" if word == "8" else word for word in script.WORKERS]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "AssertionError: the first to fail" in done.stdout
    assert "2 failed, 7 passed" in done.stdout, done.stdout  # the test, and the end of its process
