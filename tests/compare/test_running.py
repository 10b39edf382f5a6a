"""Comparisons as they run: what they write, and that no failing arm, kill or Ctrl-C loses anything that was finished.

One small comparison, run once in this process and once in two workers, serves most tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import commands
import numpy as np
import pytest
import torch
import warm
from training import flat, single_thread

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")

from batchkern import plots
from batchkern.compare import ARMS, RESULTS, Comparison, run, running, with_controls
from batchkern.compare.comparison import RunOf
from batchkern.compare.report import CSV, REPORT, REPORT_FILES
from batchkern.compare.workers import in_processes
from batchkern.errors import UserError
from batchkern.files import locked, slug
from batchkern.rundir import BEST, CHECKPOINT, CONFIG, CURVES, METRICS, PREVIOUS, RUN_FILES, WEIGHTS
from batchkern.trainer import Trainer

one_thread = single_thread()
SMALL = ["--epochs", "2", "--batch-size", "256"]
ARMS_OF_THIS = "trimming(end=0.3), passive(every=5), stepwise(fractions=(.4,1),batch_multiples=(1,1))+augmentation"
STEPWISE = ARMS_OF_THIS.split(", ")[-1]
CONTROL = "random(select=rows,end=0.3)"
# Its check passes, since that sees no gradient; its first penalty is infinite.
FAILING = "augmentation(omega=0,sigma=1e4,tau=1e9,eta=1e38)"


@pytest.fixture
def batchkern(tmp_path, monkeypatch):
    """Runs ``batchkern compare`` in a directory of the test's own: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    return in_process


in_process = partial(commands.run, "compare")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two seeds, run one after another and in two workers: (directory, stdout, stderr) by jobs. The latter draw the
    curves of each run."""
    parent = tmp_path_factory.mktemp("compared")
    outcomes = {}
    for jobs in ("1", "2"):
        words = [*SMALL, "--arms", ARMS_OF_THIS, "--seeds", "2", "--jobs", jobs, "--out", parent / jobs]
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(plots, "plot_run", lambda directory: None)
            status, out, err = in_process(*words)
        assert status == 0, err
        outcomes[jobs] = parent / jobs, out, err
    return outcomes


def results_of(directory):
    return json.loads(Path(directory, RESULTS).read_text())


def without_seconds(results):
    """Runs and summary, but for what a clock decides."""
    runs = [o | {"final": {k: v for k, v in (o["final"] or {}).items() if k != "seconds"}} for o in results["runs"]]
    return runs, [{k: v for k, v in entry.items() if k != "seconds"} for entry in results["summary"]]


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_runs_are_those_of_the_run_directories(finished):
    directory, _, err = finished["2"]
    results = results_of(directory)
    arms = ["baseline", *ARMS_OF_THIS.split(", "), CONTROL]
    # Of the stepwise arm 2 epochs are 3 + 6 updates and 575 + 1438 samples, 3 epochs 3 + 12 and 575 + 2876: the
    # baseline's 12 updates are as near to both, its 2876 samples nearer to the second.
    epochs = {arm: [2] for arm in arms} | {STEPWISE: [2, 3]}
    assert results["settings"]["arm_epochs"] == {a: {"updates": e[0], "cost": e[-1]} for a, e in epochs.items()}
    expected = [(arm, e, seed) for seed in (0, 1) for arm in arms for e in epochs[arm]]
    assert [(o["arm"], o["epochs"], o["seed"]) for o in results["runs"]] == expected
    for o in results["runs"]:
        assert Path(o["directory"]) == Path(slug(o["arm"]), f"{o['epochs']}-epochs", f"seed-{o['seed']}")
        lines = [json.loads(line) for line in (directory / o["directory"] / METRICS).read_text().splitlines()]
        assert o["final"] == lines[-1]
        assert o["curve"]["test_accuracy"] == [row["test_accuracy"] for row in lines]
        assert sorted(os.listdir(directory / o["directory"])) == sorted({*RUN_FILES} - {BEST})
        settings = json.loads((directory / o["directory"] / CONFIG).read_text())["settings"]
        assert (settings["seed"], settings["epochs"]) == (o["seed"], o["epochs"])
        shared = {key: value for key, value in results["settings"].items() if key in settings and key != "epochs"}
        assert len(shared) > 10
        assert shared == {key: settings[key] for key in shared}
    assert results["settings"]["controls"] == {"trimming(end=0.3)": CONTROL}
    assert results["settings"]["passive"] == "photo-patches"
    assert (results["environment"]["jobs"], results["environment"]["threads_per_run"]) == (2, 1)
    assert results["environment"]["torch"] == torch.__version__
    told = [
        re.fullmatch(r" *\d+/12  (.*), (\d) epochs, seed (\d): test accuracy .*", line) for line in err.splitlines()
    ]
    assert sorted((m[1], int(m[2]), int(m[3])) for m in told) == sorted(expected)


@pytest.mark.slow
def test_the_report_lies_beside_them(finished):
    directory, out, _ = finished["1"]
    assert set(REPORT_FILES) - set(os.listdir(directory)) == {"accuracy-epochs.png"}
    for name in (REPORT, CSV, RESULTS):
        assert name in out.splitlines()[-1]
    assert "At equal updates of the model, to the nearest epoch:" in out
    assert "At equal cost to the nearest epoch: " in out
    assert "2 seeds are few" in out


# --- what must not matter, and what must -----------------------------------------------------------------------------


@pytest.mark.slow
def test_jobs_do_not_change_a_bit(finished):
    one, two = (results_of(finished[jobs][0]) for jobs in ("1", "2"))
    assert without_seconds(one) == without_seconds(two)
    for o in one["runs"]:
        paths = (finished[jobs][0] / o["directory"] / WEIGHTS for jobs in ("1", "2"))
        assert len({path.read_bytes() for path in paths}) == 1


@pytest.mark.slow
def test_a_seed_is_the_same_weights_and_order_in_all_arms(finished):
    directory = finished["1"][0]
    runs = results_of(directory)["runs"]
    lines = {(o["arm"], o["seed"]): (directory / o["directory"] / METRICS).read_text().splitlines() for o in runs}
    first = {run: json.loads(rows[0]) for run, rows in lines.items()}
    # Trimming keeps all in its first epoch, so that is the baseline's, bit for bit, if weights and order are.
    for seed in (0, 1):
        baseline, trimming = (first[arm, seed] for arm in ("baseline", "trimming(end=0.3)"))
        assert baseline["train_loss"] == trimming["train_loss"]
        assert baseline["test_loss"] == trimming["test_loss"]
    assert first["baseline", 0]["train_loss"] != first["baseline", 1]["train_loss"]


def test_every_default_arm_starts_from_the_same_weights(tmp_path):
    comparison = Comparison("digits", "cnn", tmp_path, passive="photo-patches", training={"device": "cpu"})
    trainers = [comparison.trainer(RunOf(arm, 5, 3), write=False) for arm in with_controls(ARMS)]
    weights = [flat(trainer.model) for trainer in trainers]
    assert len(weights) == 8
    assert all(torch.equal(weights[0], other) for other in weights)
    assert not torch.equal(weights[0], flat(comparison.trainer(RunOf("baseline", 5, 4), write=False).model))
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
        ("--arm trimming(end=.3) --arm trimming(end=.3,)", ["are the same, or would have the same directory"]),
        ("--arms trimming,trimming(end=0.2)", [r"arms 'trimming' and 'trimming\(end=0.2\)' are the same"]),
        ("--arms baseline,hard-batches(delta=0.01)", [r"arm hard-batches\(delta=0.01\): delta=0.01 selects none"]),
        ("--arms baseline --passive digits", ["--passive is digits, but no strategy"]),
        ("--arms baseline,stepwise", ["arm stepwise: epochs must be at least 5"]),
        ("--model resnet21", ["unknown model 'resnet21'"]),
        ("--arms trimming(backward=auto)", [r"arm trimming\(backward=auto\): backward=auto depends on the load"]),
        ("--budget time", ["budget must be one of epochs, updates, cost, or several, got time"]),
        ("--noise 1.5", [r"noise must be in \[0, 1\), got 1.5"]),
        ("--train-rows 5", [r"digits: a part of it must have 10 \(its classes\) to 1438 rows, got 5"]),
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
    assert re.search(r"\nbaseline +\d\d\.\d\d *\n", out)
    assert "an effect cannot be distinguished from chance" in out
    last = err.splitlines()[-1]
    assert last.startswith(f"batchkern: error: 1 of 2 runs failed, the first is arm {FAILING}, seed 0: the loss is not")
    assert "Traceback" not in err
    results = results_of("out")
    assert [bool(o["error"]) for o in results["runs"]] == [False, True]
    assert results["summary"][1]["failed"] == [{"seed": 0, "error": results["runs"][1]["error"]}]
    assert "1 of 2 runs failed" in Path("out", REPORT).read_text()
    # What failed is tried again by a resumed comparison, and nothing else.
    status, _, err = batchkern(*words, "--resume")
    assert status == 2
    assert re.fullmatch(rf"2/2  {re.escape(FAILING)}, 2 epochs, seed 0: the loss is not finite.*", err.splitlines()[0])


def test_a_bug_in_one_run_is_reported_and_loses_no_other(tmp_path, monkeypatch):
    fit = Trainer.fit

    def broken(self):
        if self.seed == 1:
            raise RuntimeError("it broke")
        if self.seed == 2:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return fit(self)

    monkeypatch.setattr(Trainer, "fit", broken)
    comparison = Comparison("digits", "cnn", tmp_path / "out", arms=("baseline",), seeds=3, training=tiny())
    results = run(comparison, jobs=1)
    memory = "out of memory; fewer --jobs or a smaller --batch-size need less"
    assert [o["error"] for o in results["runs"]] == [None, "RuntimeError: it broke", memory]
    assert results["summary"][0]["seeds"] == 1
    assert running._devices(torch.device("cpu"), 10**18, 2) == ["cpu", "cpu"]


def tiny():
    return {"epochs": 1, "batch_size": 700, "device": "cpu"}


def die_of_seed_1(comparison, task, device):
    if task.seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return running._record(task) | {"error": "no such luck"}


@pytest.mark.slow
def test_a_worker_that_dies_is_an_outcome_and_loses_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "_run", die_of_seed_1)
    comparison = Comparison("digits", "cnn", tmp_path / "out", arms=("baseline",), seeds=4, training=tiny())
    errors = [o["error"] for o in run(comparison, jobs=2)["runs"]]
    assert errors[1].startswith("its process was killed by SIGKILL, perhaps because memory ran out")
    assert [errors[0], *errors[2:]] == ["no such luck"] * 3


class EndsItsWorker:
    """Read by a process, it ends it: before that has read its task, which its parent has sent."""

    def __reduce__(self):
        return os._exit, (3,)


def test_a_worker_that_dies_before_it_has_read_its_task_is_an_outcome():
    def died(task, how):
        return task, how

    outcomes = list(in_processes(EndsItsWorker(), died, ["first"], ["cpu"]))
    assert outcomes == [("first", "ended with status 3")]


def test_threads_are_given_back(tmp_path):
    torch.set_num_threads(2)
    comparison = Comparison("digits", "cnn", tmp_path / "out", arms=("baseline",), seeds=1, training=tiny())
    assert run(comparison, jobs=1)["environment"]["threads_per_run"] == 1
    assert torch.get_num_threads() == 2


@pytest.mark.slow
def test_ctrl_c_ends_all_workers_with_one_sentence(tmp_path):
    words = ["--arms", "baseline,trimming", "--seeds", "6", "--epochs", "3", "--jobs", "2", "--out", "out"]
    with warm.Process("-m", "batchkern", "compare", *words, cwd=tmp_path, own_session=True) as process:
        assert process.stderr.readline().startswith(" 1/18  ")
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the workers as well
        out, err = process.communicate(timeout=150)
        ended = warm.has_ended(process.pid)
    assert (process.returncode, out) == (130, "")
    *lines, last = err.splitlines()
    assert all(re.match(r" *\d+/18  ", line) for line in lines), err
    assert last == "batchkern: interrupted; finished runs are in out; resume it to continue from there"
    assert 18 > len(results_of(tmp_path / "out")["runs"]) >= 1 + len(lines)
    assert ended


# --- the directory ---------------------------------------------------------------------------------------------------


@pytest.fixture
def quick_plots(monkeypatch):
    """Plots have tests of their own."""
    monkeypatch.setattr(plots, "plot_run", lambda directory: (directory / CURVES).write_text("plot"))
    monkeypatch.setattr(running, "write_report", lambda directory, results: (directory / REPORT).write_text("page"))


def compared(**changes):
    settings = {"arms": ("baseline", "trimming"), "controls": False, "seeds": 1, "training": tiny(), **changes}
    return run(Comparison("digits", "cnn", Path("out"), **settings), jobs=1)


def test_a_comparison_is_not_overwritten_unless_asked(tmp_path, monkeypatch, quick_plots):
    monkeypatch.chdir(tmp_path)
    compared(seeds=2)
    before = Path("out", RESULTS).read_bytes()
    with pytest.raises(UserError, match="out already holds a comparison; resume it, overwrite it"):
        compared()
    assert Path("out", RESULTS).read_bytes() == before
    mine = [
        Path("out/notes"),
        Path("out/trimming/1-epochs/seed-1/notes"),
        Path("out/baseline/1-epochs/seed-0/notes"),
        Path("out/a/seed-0"),
    ]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    compared(overwrite=True, training=tiny() | {"lr": 0.01})
    assert all(path.read_text() == "mine" for path in mine)
    # Runs of the old comparison that the new one does not have are gone: they would be taken for its own.
    assert not Path("out/baseline/1-epochs/seed-1").exists()
    assert os.listdir("out/trimming/1-epochs/seed-1") == ["notes"]
    assert set(os.listdir("out/baseline/1-epochs/seed-0")) == {*RUN_FILES, "notes"} - {PREVIOUS, BEST}
    assert json.loads(Path("out/baseline/1-epochs/seed-0", CONFIG).read_text())["settings"]["lr"] == 0.01
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
        Comparison("digits", "cnn", Path("out"), arms=("trimming",), controls=False, seeds=1, training=tiny()),
        jobs=1,
        report=lambda outcome, ended, runs: written.append((ended, runs, results_of("out")["runs"])),
    )
    assert [(ended, runs, len(recorded)) for ended, runs, recorded in written] == [(1, 2, 1), (2, 2, 2)]
    assert written[1][2] == results_of("out")["runs"]


def test_equal_epochs_are_the_papers_budget(tmp_path):
    arm = "stepwise(fractions=(.2,1),batch_multiples=(1,1))"
    comparison = Comparison(
        "digits", "cnn", tmp_path, arms=(arm,), budgets=("epochs", "updates"), training={"epochs": 4, "device": "cpu"}
    )
    settings = running._check(comparison)
    assert settings["arm_epochs"][arm]["epochs"] == 4
    # A fifth, then all of the data: .6 of the updates.
    assert settings["arm_epochs"][arm]["updates"] > 5
    assert set(settings["arm_epochs"]["baseline"].values()) == {4}


def test_a_control_in_other_words_is_the_control(tmp_path):
    training = {"epochs": 2, "device": "cpu"}
    comparison = Comparison("digits", "cnn", tmp_path, arms=("trimming", "random"), training=training)
    assert running._check(comparison)["controls"] == {"trimming": "random"}


# --- going on --------------------------------------------------------------------------------------------------------


def test_a_comparison_that_goes_on_repeats_nothing_and_may_grow(tmp_path, monkeypatch, quick_plots):
    monkeypatch.chdir(tmp_path)
    trained = []
    fit = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda self: trained.append((self.strategies, self.seed)) or fit(self))
    first = compared()
    assert len(trained) == 2
    again = compared(resume=True)
    assert len(trained) == 2
    assert again == first
    grown = compared(resume=True, seeds=2, arms=("baseline", "trimming", "passive(every=1)"), passive="photo-patches")
    assert len(trained) == 2 + 4
    assert [o for o in grown["runs"] if (o["arm"], o["seed"]) in {("baseline", 0), ("trimming", 0)}] == first["runs"]


def test_resume_starts_where_there_is_nothing(tmp_path, monkeypatch, quick_plots):
    monkeypatch.chdir(tmp_path)
    assert [o["error"] for o in compared(resume=True)["runs"]] == [None, None]


def test_a_finished_run_that_is_gone_trains_again(tmp_path, monkeypatch, quick_plots):
    monkeypatch.chdir(tmp_path)
    first = compared()
    shutil.rmtree("out/trimming")
    Path("out/baseline/1-epochs/seed-0", METRICS).unlink()
    again = compared(resume=True)
    assert without_seconds(again) == without_seconds(first)
    assert set(os.listdir("out/trimming/1-epochs/seed-0")) == {*RUN_FILES} - {PREVIOUS, BEST}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A comparison that has ended, to be copied and damaged."""
    parent = tmp_path_factory.mktemp("ended")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plots, "plot_run", lambda directory: None)
        patched.setattr(running, "write_report", lambda directory, results: None)
        patched.chdir(parent)
        compared()
    return parent / "out"


@pytest.fixture
def unbuilt(ended, monkeypatch):
    """Arms are known to be right: no trainer is built to find out."""
    settings = results_of(ended)["settings"]
    monkeypatch.setattr(running, "_check", lambda comparison: settings)


def listing(path):
    """All that lies below, with its content."""
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(path.rglob("*"))}


ELSEWHERE = "x/../../../../elsewhere"


@pytest.mark.parametrize("option", ["resume", "overwrite"])
@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda r: r.pop("runs"), "field `runs`"),
        (lambda r: r["runs"][0].pop("error"), r"field `error` - at `\$.runs\[0\]`"),
        (lambda r: r["runs"][0].update(curve=None), "neither an error nor an end"),
        (lambda r: r["runs"][1]["final"].pop("test_accuracy"), "field `test_accuracy`"),
        (
            lambda r: r["runs"][1]["final"].update(test_accuracy=float("nan")),
            "Expected `float` .* - at `.*final.test_acc",
        ),
        (lambda r: r["runs"][1]["final"].update(passive_updates="1"), "Expected `int`, got `str`"),
        (lambda r: r["runs"][1]["final"].update(updates=10**400), "Expected `int` <= 9223372036854775807"),
        (lambda r: r["runs"][1]["final"].update(updates=7), "has 1 epochs of updates, or another end of them"),
        (lambda r: r["runs"][0]["curve"].update(updates=[]), "has 0 epochs of updates"),
        (lambda r: r["runs"][0]["curve"].update(updates=[0]), "`int` >= 1"),
        (
            lambda r: r["runs"][0].update(curve={"more": 7} | r["runs"][0]["curve"] | {"updates": []}),
            "has 0 epochs of upd",
        ),
        (lambda r: r.update(environment=None), "got `null` - at `.*environment"),
        (lambda r: r["settings"].update(seeds=[ELSEWHERE]), "Expected `int`, got `str` - at `.*settings.seeds"),
        (lambda r: r["settings"].update(seeds=[-1]), "`int` >= 0"),
        (lambda r: r["settings"].update(seeds=[True]), "got `bool`"),
        (lambda r: r["settings"]["arm_epochs"]["trimming"].update(updates=ELSEWHERE), "Expected `int`, got `str`"),
        (lambda r: r["settings"]["arm_epochs"].pop("trimming"), "the arm 'trimming' has no epochs"),
        (lambda r: r["settings"].update(arms=["trimming"]), "the arm 'baseline' has no epochs"),
        (lambda r: r["settings"].update(budgets=["cost"]), "has no epochs for each budget"),
        (lambda r: r["runs"][0].update(directory="../../elsewhere"), "the directory of a run is '../../elsewhere'"),
        (lambda r: r["runs"][0].update(seed=0.0), "Expected `int`, got `float`"),
        (lambda r: r.update(kind="mine"), "kind"),
    ],
)
def test_damaged_results_are_a_sentence_and_nothing_is_removed(
    tmp_path, monkeypatch, ended, unbuilt, option, damage, sentence
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ended, "out")
    Path("elsewhere/seed-0").mkdir(parents=True)
    Path("elsewhere/seed-0", CHECKPOINT).write_text("mine")
    results = results_of("out")
    damage(results)
    Path("out", RESULTS).write_text(json.dumps(results))
    before = listing(tmp_path)
    with pytest.raises(UserError, match=f"out exists and is not a batchkern comparison .results.json .*{sentence}"):
        compared(**{option: True})
    assert listing(tmp_path) == before


@pytest.mark.parametrize("text", ["[" * 100_000, "", "{}", "\ufeff{}", '{"kind": NaN}', None])
def test_results_that_are_no_json_are_a_sentence(tmp_path, monkeypatch, ended, unbuilt, text):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ended, "out")
    Path("out", RESULTS).unlink()
    if text is None:
        os.mkfifo(Path("out", RESULTS))  # which would be waited for
    else:
        Path("out", RESULTS).write_text(text)
    with pytest.raises(UserError, match="out exists and is not a batchkern comparison .results.json is damaged"):
        compared(overwrite=True)


@pytest.mark.parametrize("place", ["trimming", "trimming/1-epochs", "trimming/1-epochs/seed-0"])
@pytest.mark.parametrize("option", ["resume", "overwrite"])
def test_links_in_place_of_directories_are_not_followed(tmp_path, monkeypatch, ended, unbuilt, place, option):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ended, "out")
    shutil.move(Path("out", place), "elsewhere")
    Path("out", place).symlink_to(tmp_path / "elsewhere")
    before = listing(tmp_path)
    with pytest.raises(UserError, match=f"out/{place} is a link, which a comparison does not follow"):
        compared(**{option: True})
    assert listing(tmp_path) == before


def test_a_run_whose_metrics_are_damaged_trains_again(tmp_path, monkeypatch, ended, quick_plots):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ended, "out")
    directory = Path("out/trimming/1-epochs/seed-0")
    (directory / METRICS).write_text("")
    (directory / CHECKPOINT).unlink()
    assert without_seconds(compared(resume=True)) == without_seconds(results_of(ended))
    assert len((directory / METRICS).read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"training": {"epochs": 1, "batch_size": 600, "device": "cpu"}}, "batch_size was 700, now 600"),
        ({"noise": 0.1}, "noise was 0.0, now 0.1; train was"),
        ({"train_rows": 1000}, "train was .*'rows': 1438.* now .*'rows': 1000"),
        ({"image_size": 8, "center_crop": True}, r"train was .*\[1, 8, 8\].* now .*\[1, 8, 8\]"),
        ({"arms": ("baseline",)}, "finished arm trimming, 1 epochs, seed 0, which is not requested"),
        ({"resume": True, "overwrite": True}, "overwrite and resume exclude each other"),
    ],
)
def test_another_comparison_does_not_go_on(tmp_path, monkeypatch, quick_plots, changes, sentence):
    monkeypatch.chdir(tmp_path)
    compared()
    before = Path("out", RESULTS).read_bytes()
    with pytest.raises(UserError, match=sentence):
        compared(**{"resume": True} | changes)
    assert Path("out", RESULTS).read_bytes() == before


def test_two_comparisons_do_not_share_a_directory(tmp_path, monkeypatch, quick_plots):
    monkeypatch.chdir(tmp_path)
    refused = []

    def second(*_):
        with pytest.raises(UserError, match="out is in use by another training or comparison"):
            compared(resume=True)
        refused.append(True)

    run(Comparison("digits", "cnn", Path("out"), arms=("baseline",), seeds=1, training=tiny()), jobs=1, report=second)
    assert refused


def test_a_comparison_whose_directory_was_moved_leaves_the_new_one_alone(tmp_path, monkeypatch, quick_plots):
    monkeypatch.chdir(tmp_path)

    def moved(*_):
        os.rename("out", "old")
        Path("out").mkdir()

    with pytest.raises(UserError, match="out is not the directory that this began in, which was moved"):
        run(Comparison("digits", "cnn", "out", arms=("baseline",), seeds=1, training=tiny()), jobs=1, report=moved)
    assert list(Path("out").iterdir()) == []


def test_what_a_training_writes_to_is_not_removed(tmp_path, monkeypatch, quick_plots):
    monkeypatch.chdir(tmp_path)
    compared()
    directory = Path("out", "trimming", "1-epochs", "seed-0")
    files = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    with (
        locked(directory),
        pytest.raises(UserError, match="trimming/1-epochs/seed-0 is in use by another training or comparison"),
    ):
        compared(overwrite=True)
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == files
    compared(overwrite=True)


@pytest.mark.slow
def test_six_kills_give_the_table_of_none(tmp_path):
    """Killed at random moments of its start-up, its trainings and its report; twice as soon as a training has begun.
    The last one starts cold, so that nothing hangs on how warm.py starts the others."""
    words = "--arms trimming(end=0.3),passive(every=3) --budget updates --seeds 1 --epochs 3 --batch-size 128"
    command = ["-m", "batchkern", "compare", *words.split(), "--resume"]
    assert warm.run(*command, "--jobs", "1", "--out", "whole", cwd=tmp_path).returncode == 0
    started = time.monotonic()
    assert warm.run(*command, "--jobs", "1", "--out", "whole", cwd=tmp_path).returncode == 0
    idle = time.monotonic() - started  # start-up and report, with no run between them
    moments = random.Random(7)
    hit = set()

    def unfinished():
        begun = {path.parent for path in (tmp_path / "killed").rglob(CONFIG)}
        return {path for path in begun if not (path / WEIGHTS).exists()}

    for kill in range(6):
        jobs = "2" if kill in (1, 3) else "1"
        with warm.Process(*command, "--jobs", jobs, "--out", "killed", cwd=tmp_path, own_session=True) as process:
            if jobs == "2":
                latest = time.monotonic() + 60
                while not unfinished() - hit and time.monotonic() < latest:
                    time.sleep(0.001)
            else:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=moments.uniform(0.35, 0.95) * idle)
        assert process.wait() in (0, -signal.SIGKILL)
        hit |= unfinished()
    assert len(hit) > 1
    last = [sys.executable, *command, "--jobs", "1", "--out", "killed"]
    assert subprocess.run(last, cwd=tmp_path, capture_output=True).returncode == 0
    whole, killed = (results_of(tmp_path / name) for name in ("whole", "killed"))
    assert without_seconds(killed) == without_seconds(whole)
    assert len(whole["runs"]) == 4
    for o in whole["runs"]:
        paths = (tmp_path / name / o["directory"] / WEIGHTS for name in ("whole", "killed"))
        assert len({path.read_bytes() for path in paths}) == 1


# --- what is found ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_planted_effect_is_found_in_trainings_and_none_where_none_is(tmp_path, monkeypatch, quick_plots):
    """An arm that learns from one image in fifty; one that is the baseline by another name; one that is but another
    order of the same batches."""
    monkeypatch.chdir(tmp_path)
    planted, same, order = (
        "random(start=0.02,end=0.02)",
        "trimming(start=1.0,end=1.0)",
        "random(select=batches,delta=1.0)",
    )
    training = {"epochs": 2, "batch_size": 64, "device": "cpu"}
    results = compared(arms=(planted, same, order), seeds=5, train_rows=600, training=training)
    found = {entry["arm"]: entry["difference"].get("baseline") for entry in results["summary"]}
    assert found[planted]["mean"] < -0.1
    assert found[planted]["p_corrected"] < 0.05
    assert (found[same]["mean"], found[same]["half_width"], found[same]["p"]) == (0, None, 1)
    assert found[order]["half_width"] > 0
    assert found[order]["p_corrected"] > 0.05


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"out": 3}, "out must be a path, got 3"),
        ({"training": {"seed": 3}}, "training must have arguments of Trainer that hold for all runs, got seed"),
        ({"training": {"foo": 3}}, "training must have arguments of Trainer that hold for all runs, got foo"),
        ({"training": 3}, "training must be a dictionary"),
        ({"seeds": None}, "seeds must be a whole number of at least 1, got None"),
        ({"seeds": 10**9}, "seeds must be at most 100000, got 1000000000"),
        ({"arms": "trimming"}, "arms must be a tuple of strings, got 'trimming'"),
        ({"budgets": (3,)}, r"budgets must be a tuple of strings, got \(3,\)"),
        ({"data": ["digits"]}, "data must be the name of a data set"),
        ({"center_crop": "no"}, "center_crop must be True or False, got 'no'"),
        ({"overwrite": "no"}, "overwrite must be True or False, got 'no'"),
        ({"noise": "much"}, "noise must be a number, got 'much'"),
    ],
)
def test_arguments_of_another_kind_are_named(options, said):
    with pytest.raises(UserError, match=said):
        Comparison(**{"data": "digits", "model": "cnn", "out": "out", "arms": ("baseline",)} | options)


def test_a_path_as_text_and_numbers_of_numpy_are_taken(tmp_path):
    noise, seeds = np.float32(0.25), np.int64(2)
    comparison = Comparison("digits", "cnn", str(tmp_path), arms=["baseline"], noise=noise, seeds=seeds)
    assert (comparison.out, comparison.arms) == (tmp_path, ("baseline",))
    assert json.loads(json.dumps([comparison.noise, comparison.seeds])) == [0.25, 2]
