"""Comparisons: what they compute, what they write, and that neither a failing arm nor Ctrl-C loses the rest.

One small comparison, run once in this process and once in two workers, serves most tests.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from training import flat, single_thread

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")

from batchkern import cli, compare, plots
from batchkern.cli import _compare
from batchkern.compare import ARMS, RESULTS, Comparison, interval, run, slug, split_arms, summarise
from batchkern.errors import UserError
from batchkern.rundir import CHECKPOINT, CONFIG, CURVES, METRICS, WEIGHTS
from batchkern.strategies import parse
from batchkern.trainer import Trainer

one_thread = single_thread()
PACKAGE = str(Path(compare.__file__).parents[1])
RUN_FILES = sorted([CONFIG, METRICS, CHECKPOINT, WEIGHTS, CURVES])
SMALL = ["--epochs", "2", "--batch-size", "256"]
FOUR = "baseline, trimming(end=0.3), passive(every=5), augmentation+random(select=batches,delta=0.5)"
# Its check passes, since that sees no gradient; its first penalty is infinite.
FAILING = "augmentation(omega=0,sigma=1e4,tau=1e9,eta=1e38)"


@pytest.fixture
def batchkern(tmp_path, monkeypatch):
    """Runs ``batchkern compare`` in a directory of the test's own: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    return in_process


def in_process(*words):
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        patch.setattr(sys, "argv", ["batchkern", "compare", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return ended.value.code or 0, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Four arms, two seeds, run one after another and in two workers: (directory, stdout, stderr) by jobs."""
    parent = tmp_path_factory.mktemp("compared")
    outcomes = {}
    for jobs in ("1", "2"):
        words = [*SMALL, "--arms", FOUR, "--seeds", "2", "--jobs", jobs, "--out", parent / jobs]
        status, out, err = in_process(*words)
        assert status == 0, err
        outcomes[jobs] = parent / jobs, out, err
    return outcomes


def results_of(directory):
    return json.loads(Path(directory, RESULTS).read_text())


def without_seconds(runs):
    return [
        outcome | {"rows": [{key: value for key, value in row.items() if key != "seconds"} for row in outcome["rows"]]}
        for outcome in runs
    ]


# --- the arms --------------------------------------------------------------------------------------------------------


def test_default_arms_are_all_strategies_and_both_controls():
    strategies = [parse(arm, passive="digits") for arm in ARMS]
    assert strategies[0] == []
    assert all(len(arm) == 1 for arm in strategies[1:])
    names = [arm[0].name for arm in strategies[1:]]
    assert names == ["trimming", "hard-batches", "stepwise", "augmentation", "passive", "random", "random"]
    assert [arm[0].select for arm in strategies[-2:]] == ["rows", "batches"]


@pytest.mark.parametrize(
    ("text", "arms"),
    [
        ("", []),
        ("baseline", ["baseline"]),
        (" baseline, trimming(end=0.3, start=0.9),", ["baseline", "trimming(end=0.3, start=0.9)"]),
        (
            "stepwise(fractions=(.5,1),batch_multiples=(1,2)),a+b",
            ["stepwise(fractions=(.5,1),batch_multiples=(1,2))", "a+b"],
        ),
    ],
)
def test_arms_in_one_text(text, arms):
    assert split_arms(text) == arms


def test_a_slug_is_one_plain_name():
    assert slug("trimming(end=0.3)+passive(passive='a/../b')") == "trimming-end-0.3-passive-passive-a-..-b"
    assert slug("../..") == ""


def test_arms_without_a_passive_set(batchkern, monkeypatch):
    """digits has one by default, anything else only what it is given."""
    assert _compare._chosen_arms([], None, "digits") == (ARMS, "photo-patches")
    assert _compare._chosen_arms([], None, "photo-patches") == (tuple(a for a in ARMS if "passive" not in a), None)
    assert _compare._chosen_arms([], "digits", "photo-patches") == (ARMS, "digits")
    assert _compare._chosen_arms(["trimming"], None, "digits") == (("trimming",), None)
    words = ("--data", "photo-patches", "--arm", "passive", *SMALL)
    assert_refused(batchkern, words, "passive needs a data set to inject: --passive SOURCE")


# --- the figures -----------------------------------------------------------------------------------------------------


def test_interval_by_hand():
    mean, half = interval([0.90, 0.95, 0.97])
    assert mean == pytest.approx(0.94)
    deviation = math.sqrt((0.04**2 + 0.01**2 + 0.03**2) / 2)
    assert half == pytest.approx(4.302652729911275 * deviation / math.sqrt(3), rel=1e-9)  # a table's t for 2 degrees
    assert interval([0.9, 0.9])[1] == 0
    assert interval([0.9, 1.0])[1] == pytest.approx(12.706204736174694 * 0.05)
    assert interval([0.9]) == (0.9, None)


def outcome(arm, seed, error=None, **last):
    return {"arm": arm, "seed": seed, "rows": [] if error else [{"test_accuracy": 0.0}, last], "error": error}


def test_summary_is_of_the_last_rows_of_what_did_not_fail():
    counts = {"updates": 10, "samples_forward": 100, "samples_backward": 50}
    runs = [
        outcome("a", 0, test_accuracy=0.5, seconds=1.0, **counts),
        outcome("a", 1, test_accuracy=0.7, seconds=3.0, **counts),
        outcome("a", 2, "it broke"),
        outcome("b", 0, test_accuracy=0.9, seconds=9.0, passive_updates=4, **counts),
        outcome("c", 0, "so did this"),
    ]
    assert summarise("a", runs) == {
        "arm": "a",
        "seeds": 2,
        "failed": [{"seed": 2, "error": "it broke"}],
        "test_accuracy": {"mean": 0.6, "half_width": pytest.approx(12.7062 * 0.1, rel=1e-4), "values": [0.5, 0.7]},
        **counts,
        "passive_updates": None,
        "seconds": 2.0,
    }
    assert summarise("b", runs)["passive_updates"] == 4
    assert summarise("c", runs)["test_accuracy"] is None
    assert summarise("c", runs)["failed"] == [{"seed": 0, "error": "so did this"}]


def test_table_and_json_agree(finished):
    directory, out, _ = finished["1"]
    results = results_of(directory)
    upper, lower, _, *lines = out.splitlines()[:7]
    assert upper.split() == ["test", "passive", "samples", "samples"]
    assert lower.split() == ["arm", "accuracy", "(%)", "updates", "updates", "forward", "backward", "seconds"]
    for line, arm in zip(lines, results["summary"], strict=True):
        values = [o["rows"][-1]["test_accuracy"] for o in results["runs"] if o["arm"] == arm["arm"]]
        assert arm["test_accuracy"]["values"] == values
        half = 12.706204736174694 * abs(values[0] - values[1]) / 2
        assert arm["test_accuracy"]["half_width"] == pytest.approx(half)
        passive = [f"{arm['passive_updates']:.0f}"] if arm["passive_updates"] else []
        assert line.split() == [
            arm["arm"],
            f"{50 * (values[0] + values[1]):.2f}",
            "±",
            f"{100 * half:.2f}",
            f"{arm['updates']:.0f}",
            *passive,
            f"{arm['samples_forward']:,.0f}",
            f"{arm['samples_backward']:,.0f}",
            f"{arm['seconds']:.1f}",
        ]
    assert [arm["passive_updates"] for arm in results["summary"]] == [None, None, 2, None]
    assert "95 % confidence interval (Student's t, 1 degrees of freedom)" in out
    assert "2 seeds are few" in out


def test_runs_in_json_are_those_of_the_run_directories(finished):
    directory, _, err = finished["2"]
    results = results_of(directory)
    arms = [arm.strip() for arm in split_arms(FOUR)]
    assert [(o["arm"], o["seed"]) for o in results["runs"]] == [(arm, seed) for arm in arms for seed in (0, 1)]
    for o in results["runs"]:
        assert Path(o["directory"]) == Path(slug(o["arm"]), f"seed-{o['seed']}")
        lines = (directory / o["directory"] / METRICS).read_text().splitlines()
        assert o["rows"] == [json.loads(line) for line in lines]
        assert sorted(os.listdir(directory / o["directory"])) == RUN_FILES
        settings = json.loads((directory / o["directory"] / CONFIG).read_text())["settings"]
        assert settings["seed"] == o["seed"]
        shared = {key: value for key, value in results["settings"].items() if key in settings}
        assert len(shared) > 10
        assert shared == {key: settings[key] for key in shared}
    assert results["settings"]["arms"] == arms
    assert results["settings"]["seeds"] == [0, 1]
    assert results["settings"]["passive"] == "photo-patches"
    assert (results["environment"]["jobs"], results["environment"]["threads_per_run"]) == (2, 1)
    assert results["environment"]["torch"] == torch.__version__
    assert sorted(re.sub(r" *\d+/8  (.*): test accuracy .*", r"\1", line) for line in err.splitlines()) == sorted(
        f"{arm}, seed {seed}" for arm in arms for seed in (0, 1)
    )
    for plot in (plots.UPDATES_PLOT, plots.SECONDS_PLOT):
        assert (directory / plot).stat().st_size < 200_000


# --- what must not matter, and what must -----------------------------------------------------------------------------


def test_jobs_do_not_change_a_bit(finished):
    one, two = (results_of(finished[jobs][0]) for jobs in ("1", "2"))
    assert without_seconds(one["runs"]) == without_seconds(two["runs"])
    for o in one["runs"]:
        paths = (finished[jobs][0] / o["directory"] / WEIGHTS for jobs in ("1", "2"))
        assert len({path.read_bytes() for path in paths}) == 1


def test_a_seed_is_the_same_weights_and_order_in_all_arms(finished):
    first = {(o["arm"], o["seed"]): o["rows"][0] for o in results_of(finished["1"][0])["runs"]}
    # Trimming keeps all in its first epoch, so that is the baseline's, bit for bit, if weights and order are.
    for seed in (0, 1):
        baseline, trimming = (first[arm, seed] for arm in ("baseline", "trimming(end=0.3)"))
        assert baseline["train_loss"] == trimming["train_loss"]
        assert baseline["test_loss"] == trimming["test_loss"]
    assert first["baseline", 0]["train_loss"] != first["baseline", 1]["train_loss"]


def test_every_default_arm_starts_from_the_same_weights(tmp_path):
    comparison = Comparison("digits", "cnn", tmp_path, passive="photo-patches", training={"epochs": 5, "device": "cpu"})
    trainers = [comparison.trainer(arm, 3, write=False) for arm in ARMS]
    weights = [flat(trainer.model) for trainer in trainers]
    assert len(weights) == 8
    assert all(torch.equal(weights[0], other) for other in weights)
    assert not torch.equal(weights[0], flat(comparison.trainer("baseline", 4, write=False).model))
    orders = [trainer.batches.epoch(0) for trainer in trainers]
    assert all(torch.equal(a, b) for order in orders for a, b in zip(order, orders[0], strict=True))


# --- what goes wrong -------------------------------------------------------------------------------------------------


def assert_refused(batchkern, words, *patterns):
    status, out, err = batchkern(*words)
    assert status == 2
    assert re.fullmatch(r"(batchkern: without [^\n]*\n)?batchkern: error: [^\n]+\n", err), err
    assert out == ""
    for pattern in patterns:
        assert re.search(pattern, err), err


@pytest.mark.parametrize(
    ("words", "patterns"),
    [
        ("--arms baseline,triming", ["'triming'", "did you mean trimming"]),
        ("--arms trimming,trimming", ["arms 'trimming' and 'trimming' are the same"]),
        ("--arm trimming(end=.3) --arm trimming(end=.3,)", ["are the same, or their directories would be"]),
        ("--arms baseline,hard-batches(delta=0.01)", [r"arm hard-batches\(delta=0.01\): delta=0.01 selects none"]),
        ("--arms baseline --passive digits", ["--passive is digits, but no strategy"]),
        ("--arms baseline,stepwise", ["arm stepwise: epochs must be at least 5"]),
        ("--model resnet21", ["unknown model 'resnet21'"]),
        ("--seeds 0", ["seeds must be .* at least 1, got 0"]),
        ("--jobs 0", ["jobs must be .* at least 1, got 0"]),
        ("--device gpu", ["'gpu'"]),
        ("--batch-size 5000", ["batch_size is 5000"]),
        ("--data no.parquet", ["'no.parquet' is no file"]),
        ("--out /proc/compared --arms baseline", ["/proc/compared cannot be written"]),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_trained(batchkern, words, patterns):
    assert_refused(batchkern, [*SMALL, *words.split()], *patterns)
    assert not Path("runs").exists()


def test_a_failing_arm_is_reported_and_loses_no_other(batchkern):
    words = [*SMALL, "--arm", "baseline", "--arm", FAILING, "--seeds", 1, "--jobs", 1, "--out", "out"]
    status, out, err = batchkern(*words)
    assert status == 2
    assert re.search(rf"\n{re.escape(FAILING)} \(1 failed\) +- *\n", out)
    assert re.search(r"\nbaseline +\d\d\.\d\d +12 ", out)
    assert "no telling chance from effect" in out
    last = err.splitlines()[-1]
    assert last.startswith(f"batchkern: error: 1 of 2 runs failed, the first is arm {FAILING}, seed 0: the loss is not")
    assert "Traceback" not in err
    results = results_of("out")
    assert [bool(o["error"]) for o in results["runs"]] == [False, True]
    assert results["summary"][1]["failed"] == [{"seed": 0, "error": results["runs"][1]["error"]}]
    assert Path("out", plots.UPDATES_PLOT).exists()


def test_a_bug_in_one_run_is_reported_and_loses_no_other(tmp_path, monkeypatch):
    fit = Trainer.fit

    def broken(self):
        if self.seed == 1:
            raise RuntimeError("it broke")
        return fit(self)

    monkeypatch.setattr(Trainer, "fit", broken)
    comparison = Comparison("digits", "cnn", tmp_path / "out", arms=("baseline",), seeds=3, training=tiny())
    results = run(comparison, jobs=1)
    assert [o["error"] for o in results["runs"]] == [None, "RuntimeError: it broke", None]
    assert results["summary"][0]["seeds"] == 2


def tiny():
    return {"epochs": 1, "batch_size": 700, "device": "cpu"}


def die(*_):
    os._exit(1)


def test_a_worker_that_dies_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "_run", die)
    comparison = Comparison("digits", "cnn", tmp_path / "out", arms=("baseline",), seeds=2, training=tiny())
    with pytest.raises(UserError, match="a worker process died"):
        run(comparison, jobs=2)


def test_threads_are_given_back(tmp_path):
    torch.set_num_threads(2)
    comparison = Comparison("digits", "cnn", tmp_path / "out", arms=("baseline",), seeds=1, training=tiny())
    assert run(comparison, jobs=1)["environment"]["threads_per_run"] == 1
    assert torch.get_num_threads() == 2


def test_ctrl_c_ends_all_workers_with_one_sentence(tmp_path):
    words = ["--arms", "baseline,trimming", "--seeds", "6", "--epochs", "3", "--jobs", "2", "--out", "out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "batchkern", "compare", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": PACKAGE},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a script in the background ignores it
    )
    assert process.stderr.readline().startswith(" 1/12  ")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the workers as well
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    *lines, last = err.splitlines()
    assert all(re.match(r" *\d+/12  ", line) for line in lines), err
    match = re.fullmatch(r"batchkern: interrupted: (\d+) of 12 runs have ended and are in out; .*--overwrite", last)
    assert match, err
    results = results_of(tmp_path / "out")
    assert len(results["runs"]) == int(match[1]) >= 1
    for _ in range(100):  # Python's own tracker of resources ends a moment later than its owner
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("a worker is left")


# --- the directory ---------------------------------------------------------------------------------------------------


@pytest.fixture
def quick_plots(monkeypatch):
    """Plots have tests of their own."""
    monkeypatch.setattr(plots, "plot_run", lambda directory: (directory / CURVES).write_text("plot"))
    monkeypatch.setattr(compare, "plot_comparison", lambda directory, *_: None)


def compared(**changes):
    settings = {"arms": ("baseline", "trimming"), "seeds": 1, "training": tiny(), **changes}
    return run(Comparison("digits", "cnn", Path("out"), **settings), jobs=1)


def test_a_comparison_is_not_overwritten_unless_asked(tmp_path, monkeypatch, quick_plots):
    monkeypatch.chdir(tmp_path)
    compared(seeds=2)
    before = Path("out", RESULTS).read_bytes()
    with pytest.raises(UserError, match="out holds a comparison already; overwrite it"):
        compared()
    assert Path("out", RESULTS).read_bytes() == before
    mine = [
        Path("out/notes"),
        Path("out/trimming/seed-1/notes"),
        Path("out/baseline/seed-0/notes"),
        Path("out/a/seed-0"),
    ]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    compared(overwrite=True, training=tiny() | {"lr": 0.01})
    assert all(path.read_text() == "mine" for path in mine)
    # Runs of the old comparison that the new one does not have are gone: they would be taken for its own.
    assert not Path("out/baseline/seed-1").exists()
    assert os.listdir("out/trimming/seed-1") == ["notes"]
    assert sorted(os.listdir("out/baseline/seed-0")) == sorted([*RUN_FILES, "notes"])
    assert json.loads(Path("out/baseline/seed-0", CONFIG).read_text())["settings"]["lr"] == 0.01
    assert [o["error"] for o in results_of("out")["runs"]] == [None, None]


@pytest.mark.parametrize("name", ["notes.txt", RESULTS])
@pytest.mark.parametrize("contents", ["mine", "[]", '{"kind": "mine", "settings": {"arms": [], "seeds": []}}'])
def test_what_is_not_a_comparison_is_never_touched(tmp_path, monkeypatch, name, contents):
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    Path("out", name).write_text(contents)
    for overwrite in (False, True):
        with pytest.raises(UserError, match="out exists and is not a batchkern comparison"):
            compared(overwrite=overwrite)
    assert os.listdir("out") == [name]
    assert Path("out", name).read_text() == contents


def test_results_are_written_after_every_run(tmp_path, monkeypatch, quick_plots):
    """So that a kill loses what was under way alone."""
    monkeypatch.chdir(tmp_path)
    written = []
    run(
        Comparison("digits", "cnn", Path("out"), arms=("baseline", "trimming"), seeds=1, training=tiny()),
        jobs=1,
        report=lambda outcome: written.append(results_of("out")["runs"]),
    )
    assert [len(runs) for runs in written] == [1, 2]
    assert written[1] == results_of("out")["runs"]
