"""A run that is killed and resumed, as often as may be, ends as one that never was: bit for bit.

Compared are the last checkpoint, so that nothing is left out (weights, optimizer, heads, random numbers, ledgers, place
in the plan, counts), the saved weights, and metrics.jsonl; seconds alone may differ.

Most kills are an exception that nothing catches, with a fresh trainer after it. That a SIGKILL is no different is seen
for every strategy in processes that end themselves by one: forks of one process that has torch loaded.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from training import flat, furthest, images, net, single_thread, trainer, without_plots

from batchkern.errors import UserError
from batchkern.rundir import BEST, CHECKPOINT, CONFIG, METRICS, WEIGHTS
from batchkern.strategies import (
    RHO,
    SRIP,
    STRATEGIES,
    BatchAugmentation,
    CutMix,
    Cutout,
    HardBatches,
    ImportanceSampling,
    InfoBatch,
    Mixup,
    PassiveInjection,
    RandomSelection,
    SelectiveBackprop,
    SmallLoss,
    Stepwise,
    StochasticAugmentation,
    Trimming,
    trimming,
)

UPDATES = 18  # 3 epochs of 6
PASSIVE = images(20, seed=5, classes=3)
STRONG = {"eta": 1.0, "sigma": 0.5, "tau": 0.6}
SCENARIOS = {
    "baseline": lambda: [],
    "trimming": lambda: [Trimming(backward="compact")],
    "hard-batches": lambda: [HardBatches(0.5)],
    "stepwise": lambda: [Stepwise((0.5, 1.0), (1, 2), share_weights=False)],
    "augmentation": lambda: [StochasticAugmentation(**STRONG, layers=("conv2", "fc"), two_step=True)],
    "passive": lambda: [PassiveInjection(PASSIVE, 4)],
    "summed": lambda: [PassiveInjection(PASSIVE, 4, summed=True)],
    "random rows": lambda: [RandomSelection()],
    "random batches": lambda: [RandomSelection("batches", delta=0.5)],
    "mixed": lambda: [Cutout(3), Mixup(1.0), BatchAugmentation(2), SRIP(0.1)],
    "cutmix": lambda: [CutMix(probability=0.5), Trimming(0.7, 0.3), SRIP()],
    "knobs": lambda: [Trimming(0.9, 0.4), PassiveInjection(PASSIVE, 4), StochasticAugmentation(**STRONG)],
    "infobatch": lambda: [InfoBatch(0.6, 1.0)],
    "infobatch at random": lambda: [InfoBatch(0.6, at_random=True)],
    "selective backprop": lambda: [SelectiveBackprop(0.5, 30)],
    "importance": lambda: [ImportanceSampling(2, 0.3)],
    "rho": lambda: [RHO(0.5, reference_epochs=2)],
    "small loss": lambda: [SmallLoss(0.5, 2)],
    "all": lambda: [
        HardBatches(0.5),
        Trimming(),
        PassiveInjection(PASSIVE, 3),
        StochasticAugmentation(**STRONG),
    ],
}
FEWER = ("stepwise", "infobatch", "rho", "knobs")
SETTINGS = {
    "all": {"optimizer": "adamw", "lr": 1e-3, "schedule": "cosine", "label_smoothing": 0.1},
    "baseline": {"amp": "fp16", "schedule": "cosine"},
    "knobs": {
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.7,
        "ema_decay": 0.9,
        "warmup_epochs": 1,
        "schedule": "cosine",
        "keep_best": True,
    },
    "trimming": {"schedule": lambda progress: np.cos(np.float64(progress))},
}
# In CI a failure must not depend on what was drawn.
SEED = 0 if "CI" in os.environ else int(time.time())
one_thread = single_thread()


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    without_plots(monkeypatch)


class KilledError(BaseException):
    """Passes every ``except Exception``, as a signal would."""


def die() -> None:
    raise KilledError


def start(name: str, out: Path, every: int | None = None):
    """A new process' trainer on ``out``: whatever it needs of the past must come from the checkpoint."""
    going_on = (out / CHECKPOINT).exists()
    # Weights and random numbers of another run, where the checkpoint should bring its own.
    model = net(seed=99 if going_on else 0, dropout=0.25, norm=name == "all")
    torch.manual_seed(random.randrange(2**32))
    return trainer(
        SCENARIOS[name](),
        model,
        epochs=3,
        augment="crop+flip",
        out=out,
        resume=out.exists(),
        checkpoint_every=every,
        **SETTINGS.get(name, {}),
    )


def test_every_strategy_is_killed() -> None:
    killed = {strategy.name for make in SCENARIOS.values() for strategy in make()}
    assert killed == set(STRATEGIES), "SCENARIOS needs one with it"


MOMENTS = ("update", "descend", "updated", "metrics", "checkpoint", "checkpointed", "weights")


def arm(run, moment: str, number: int, die=die) -> None:
    """Lets ``run`` die at the ``number``-th time, counted from 1, that it comes to ``moment``."""
    times = 0

    def due() -> bool:
        nonlocal times
        times += 1
        return times == number

    def wrap(holder, method: str, before=None, after=None) -> None:
        inner = getattr(holder, method)

        def wrapped(*args):
            now = due()
            if now and before:
                before(*args)
            result = inner(*args)
            if now and after:
                after(*args)
            return result

        setattr(holder, method, wrapped)

    def half_a_checkpoint(state) -> None:
        part = run.directory.path / (CHECKPOINT + ".0123abcd.part")
        torch.save(state, part)
        part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
        die()

    def at(*_) -> None:
        die()

    match moment:
        case "update":
            wrap(run.updater, "update", before=at)
        case "step":
            wrap(run.updater, "_step", before=at)
        case "descend":  # the weights have changed, nothing else has
            wrap(run.updater, "_step", after=at)
        case "updated":
            wrap(run.updater, "update", after=at)
        case "metrics":  # the epoch is in the metrics, and not in the checkpoint
            wrap(run.directory, "append_metrics", after=at)
        case "checkpoint":
            wrap(run.directory, "save_checkpoint", before=half_a_checkpoint)
        case "checkpointed":
            wrap(run.directory, "save_checkpoint", after=at)
        case "weights":
            wrap(run.directory, "save_tensors", before=at)


def killed(name: str, out: Path, moment: str, number: int, every: int | None) -> bool:
    """Whether the run was killed there; if not, it came to its end."""
    run = start(name, out, every)
    arm(run, moment, number)
    try:
        run.fit()
    except KilledError:
        return True
    return False


@cache
def whole(name: str) -> tuple:
    """What a run ends with that is never interrupted; with nothing saved between epochs."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        start(name, out).fit()
        return outcome(out)


def outcome(out: Path) -> tuple:
    state = torch.load(out / CHECKPOINT, weights_only=True)
    assert state["counts"].pop("seconds") > 0
    rows = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    assert all(row.pop("seconds") > 0 for row in rows)
    best = (out / BEST).read_bytes() if (out / BEST).exists() else None
    return state, rows, (out / WEIGHTS).read_bytes(), best


def difference(ours, theirs, where="") -> str:
    """The first place where two trees of dicts, sequences and tensors are not the same, bit for bit."""
    if type(ours) is not type(theirs):
        return f"{where}: {type(ours)} and {type(theirs)}"
    if isinstance(ours, dict):
        if list(ours) != list(theirs):
            return f"{where}: {list(ours)} and {list(theirs)}"
        pairs = [(ours[key], theirs[key], f"{where}.{key}") for key in ours]
    elif isinstance(ours, list | tuple):
        if len(ours) != len(theirs):
            return f"{where}: {len(ours)} and {len(theirs)} items"
        pairs = [(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(ours, theirs, strict=True))]
    elif isinstance(ours, torch.Tensor):
        same = ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        return "" if same else f"{where}: {ours} and {theirs}"
    else:
        return "" if ours == theirs else f"{where}: {ours!r} and {theirs!r}"
    return next(filter(None, (difference(*pair) for pair in pairs)), "")


def assert_as_if_never_killed(name: str, out: Path) -> None:
    assert difference(outcome(out), whole(name)) == ""
    assert not list(out.glob("*.part"))


# --- every update, and random moments -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_after_every_single_update(name, tmp_path):
    """Each process makes one update, saves it, and dies in the next."""
    out, processes = tmp_path / "run", 0
    while killed(name, out, "step" if name == "knobs" else "update", 2, every=1):
        processes += 1
        state = torch.load(out / CHECKPOINT, weights_only=True)
        separate = 0 if name == "summed" else 1
        passive = separate * sum(strategy.get("injected", 0) for strategy in state["strategies"])
        scored = sum(strategy.get("scored", 0) for strategy in state["strategies"])
        assert state["counts"]["updates"] + passive + scored == processes <= 18 + 18
    assert processes >= 8
    assert_as_if_never_killed(name, out)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_at_random_moments(name, tmp_path):
    print(f"SEED {SEED}")  # shown where the test fails
    numbers = random.Random(f"{SEED} {name}")
    for case in range(4):
        out, kills, every = tmp_path / str(case), 0, numbers.choice([1, 2, 4, 5, None])
        while kills < 3:
            moment = numbers.choice(MOMENTS)
            print(f"case {case}: every {every}, killed at {moment}, ", end="")
            most = {"metrics": 3, "weights": 1, "checkpoint": 4, "checkpointed": 4}.get(moment, 14)
            number = numbers.randint(1, most)
            print(number)
            if not killed(name, out, moment, number, every):
                break
            kills += 1
        else:
            start(name, out, every).fit()
        assert_as_if_never_killed(name, out)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_while_writing_and_at_the_end_of_epochs(name, tmp_path):
    for moment, number in (("checkpoint", 2), ("metrics", 2), ("checkpointed", 3), ("weights", 1)):
        out = tmp_path / moment
        assert killed(name, out, moment, number, every=None)
        assert not (out / WEIGHTS).exists()
        start(name, out).fit()
        assert_as_if_never_killed(name, out)


# --- real kills -----------------------------------------------------------------------------------------------------


def zygote() -> None:
    """Forks a process for every job it reads, a line of JSON each, and answers with the way it ended."""
    import types

    sys.modules["batchkern.plots"] = types.SimpleNamespace(plot_run=lambda path: None)
    torch.set_num_threads(1)
    trainer(epochs=1).fit()  # what torch loads at its first update takes longer than a whole run
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                work(**json.loads(line))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def work(name: str, out: str, every: int | None, moment: str | None = None, number: int = 0) -> None:
    run = start(name, Path(out), every)
    if moment:
        arm(run, moment, number, lambda: os.kill(os.getpid(), signal.SIGKILL))
    run.fit()


@pytest.fixture(scope="module")
def processes():
    """Runs :func:`work` in a process of its own; its exit code, negative for a signal."""
    here = Path(__file__).parent
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",  # with a GPU in sight, autograd's threads would not survive a fork
    }
    command = [sys.executable, "-c", "import test_resume; test_resume.zygote()"]
    with subprocess.Popen(
        command, env=environment, cwd=here, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:

        def process(**job) -> int:
            parent.stdin.write(json.dumps(job) + "\n")
            parent.stdin.flush()
            answer = parent.stdout.readline()
            assert answer, "the process that forks has died"
            return int(answer)

        yield process
        parent.stdin.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_sigkill_at_a_random_update_and_another_one(name, tmp_path, processes):
    print(f"SEED {SEED}")
    numbers = random.Random(f"{SEED} {name} real")
    out, most = str(tmp_path / "run"), 4 if name in FEWER else 8  # some 9 updates, and 18
    for kill in range(2):
        every, moment, number = numbers.choice([2, 3, 5]), numbers.choice(MOMENTS[:3]), numbers.randint(1, most)
        print(f"kill {kill}: every {every}, at {moment} {number}")
        assert processes(name=name, out=out, every=every, moment=moment, number=number) == -signal.SIGKILL
    assert processes(name=name, out=out, every=3) == 0
    assert_as_if_never_killed(name, tmp_path / "run")


def test_a_sigkill_between_the_gth_active_batch_and_its_passive_one(tmp_path, processes):
    job = {"name": "passive", "out": str(tmp_path / "run"), "every": 1}
    assert processes(**job, moment="update", number=5) == -signal.SIGKILL
    state = torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)
    assert state["counts"]["updates"] == 4
    assert state["strategies"][0]["pending"] is not None
    assert state["strategies"][0]["injected"] == 0
    assert processes(**job) == 0
    assert_as_if_never_killed("passive", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hard-batches", "random batches"])
@pytest.mark.parametrize("updates", [6, 8, 9, 17])
def test_a_sigkill_in_a_replay_round(name, updates, tmp_path, processes):
    """Rounds of three begin after 6, 9, 12 and 15 updates: at a border, the next round has not been chosen."""
    job = {"name": name, "out": str(tmp_path / "run"), "every": 1}
    assert processes(**job, moment="update", number=updates + 1) == -signal.SIGKILL
    replay = torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)["strategies"][0]["replay"]
    assert replay["updates"] == updates
    assert replay["place"] == {6: 0, 8: 2, 9: 3, 17: 2}[updates]
    assert processes(**job) == 0
    assert_as_if_never_killed(name, tmp_path / "run")


@pytest.mark.parametrize("name", ["baseline", "all"])
def test_a_sigkill_before_the_first_checkpoint(name, tmp_path, processes):
    job = {"name": name, "out": str(tmp_path / "run"), "every": None}
    for number in (1, 5):
        assert processes(**job, moment="update", number=number) == -signal.SIGKILL
        assert not (tmp_path / "run" / CHECKPOINT).exists()
    assert processes(**job) == 0
    assert_as_if_never_killed(name, tmp_path / "run")


def test_a_sigkill_while_the_run_is_set_up(tmp_path, processes):
    """Before the trainer exists there is a directory, and the model has not been drawn from it."""
    out = tmp_path / "run"
    assert processes(name="trimming", out=str(out), every=None, moment="update", number=1) == -signal.SIGKILL
    (out / METRICS).unlink()
    assert processes(name="trimming", out=str(out), every=None) == 0
    assert_as_if_never_killed("trimming", out)


# --- what else a resume must and must not do ------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_finished_run_has_nothing_left_to_do(name, tmp_path):
    out = tmp_path / "run"
    start(name, out).fit()
    files = {entry.name: entry.read_bytes() for entry in out.iterdir()}
    run = start(name, out)
    last = run.fit()
    assert run.weights == []
    assert last == run.history[-1]
    assert list(run.run.extras) == []
    assert {entry.name: entry.read_bytes() for entry in out.iterdir()} == files
    state = whole(name)[0]
    weights = state["model"] if state["average"] is None else state["average"]["average"]
    assert torch.equal(flat(run.model), torch.cat([v.double().flatten() for v in weights.values()]))


def test_runs_that_are_resumed_side_by_side_do_not_share_their_random_numbers(tmp_path):
    """Trainers are made first and trained later, as a comparison does; each draws the dropout of its own run."""
    for name in ("trimming", "hard-batches"):
        assert killed(name, tmp_path / name, "update", 9, every=2)
    runs = {name: start(name, tmp_path / name, every=2) for name in ("trimming", "hard-batches")}
    torch.manual_seed(123)
    for run in runs.values():
        run.evaluate()
        run.fit()
    for name in runs:
        assert_as_if_never_killed(name, tmp_path / name)


def test_a_model_by_name_is_drawn_again_where_there_is_no_checkpoint(tmp_path):
    data = images(24, shape=(1, 8, 8))
    options = {"model": "cnn", "train": data, "test": data, "epochs": 2}
    whole = trainer(**options)
    whole.fit()
    run = trainer(**options, out=tmp_path / "run")
    arm(run, "update", 2)
    with pytest.raises(KilledError):
        run.fit()
    torch.manual_seed(77)
    resumed = trainer(**options, out=tmp_path / "run", resume=True)
    resumed.fit()
    assert all(torch.equal(a, b) for a, b in zip(resumed.weights, whole.weights, strict=True))


def test_what_auto_trimming_decided_is_not_decided_again(tmp_path, monkeypatch):
    def timed(forward, full):
        seconds = iter([forward, full] * 5)
        monkeypatch.setattr(trimming, "_seconds", lambda action, device: (action(), next(seconds))[1])

    def run(**options):
        return trainer([Trimming(backward="auto")], net(dropout=0.25), epochs=3, **options)

    timed(1.0, 4.0)
    whole = run()
    whole.fit()
    timed(1.0, 4.0)
    first = run(out=tmp_path / "run", checkpoint_every=1)
    arm(first, "update", 9)
    with pytest.raises(KilledError):
        first.fit()
    timed(1.0, 1.0)  # the machine is busy now: compact would not pay
    second = run(out=tmp_path / "run", checkpoint_every=1, resume=True)
    row = second.fit()
    assert second.strategies[0].compact_below == 0.75
    assert all(torch.equal(a, b) for a, b in zip(first.weights + second.weights, whole.weights, strict=True))
    assert row["samples_forward"] == whole.history[-1]["samples_forward"] > 3 * 44


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"epochs": 2}, "epochs was 3, now 2"),
        ({"lr": 0.5}, "lr was 0.03, now 0.5"),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"strategies": [Trimming(end=0.3)]}, "strategies was .*0.2.*, now .*0.3"),
        ({"train": images(44, seed=8)}, "train was .*noise-44-0.*, now .*noise-44-8"),
        ({"model": net(norm=True)}, "model was .*Net with .*, now"),
    ],
)
def test_another_run_is_not_resumed(tmp_path, change, named):
    options = {"strategies": [Trimming()], "epochs": 3}
    run = trainer(**options, out=tmp_path / "run", checkpoint_every=1)
    arm(run, "update", 3)
    with pytest.raises(KilledError):
        run.fit()
    before = (tmp_path / "run" / CHECKPOINT).read_bytes()
    with pytest.raises(UserError, match=f"cannot be resumed: {named}"):
        trainer(**options | change, out=tmp_path / "run", resume=True)
    assert (tmp_path / "run" / CHECKPOINT).read_bytes() == before


def test_functions_are_the_same_in_another_process(tmp_path):
    """Whatever sort of callable they are: where it lies in memory does not matter."""

    def options():
        class Every:
            def __call__(self, number):
                return number % 3 == 0

        def fraction(start, epoch, epochs):
            return start - 0.1 * epoch

        return [PassiveInjection(PASSIVE, Every()), Trimming(schedule=partial(fraction, 0.9))]

    run = trainer(options(), epochs=3, out=tmp_path / "run", checkpoint_every=1)
    arm(run, "update", 4)
    with pytest.raises(KilledError):
        run.fit()
    trainer(options(), epochs=3, out=tmp_path / "run", resume=True).fit()


def test_how_often_to_save_and_where_to_run_may_change(tmp_path):
    assert killed("passive", tmp_path / "run", "update", 9, every=4)
    assert killed("passive", tmp_path / "run", "update", 4, every=1)
    start("passive", tmp_path / "run", None).fit()
    assert_as_if_never_killed("passive", tmp_path / "run")


# --- more epochs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ended", [True, False])
def test_a_run_goes_on_for_more_epochs(ended, tmp_path):
    """As one in which the schedule had changed after the second epoch, or within it; and again if it is killed."""
    options = {"schedule": "cosine", "strategies": [HardBatches(0.5)], "checkpoint_every": 1}
    first = trainer(**options, epochs=2, out=tmp_path / "run")
    if not ended:
        arm(first, "update", 9)
    with contextlib.nullcontext() if ended else pytest.raises(KilledError):
        first.fit()
    done = 2 if ended else 1
    last, begins = first.history[-1]["lr"], 0.03 * 0.5 * (1 + math.cos(math.pi * done / 4))
    sentence = (
        f"was to end after 2 epochs, and now after 4: the schedule cosine, .*, reach over 4; after epoch {done} the "
        f"learning rate, {last:.3g} at its end, goes on at {begins:.3g}"
    )
    with pytest.warns(UserWarning, match=sentence):
        second = trainer(**options, epochs=4, out=tmp_path / "run", resume=True)
    arm(second, "update", 7)
    with pytest.raises(KilledError):
        second.fit()
    with pytest.raises(UserError, match="epochs was 4, now 2"):
        trainer(**options, epochs=2, out=tmp_path / "run", resume=True)
    third = trainer(**options, epochs=4, out=tmp_path / "run", resume=True)  # without a warning
    third.fit()
    assert [row["epoch"] for row in third.history] == [0, 1, 2, 3]
    config = json.loads((tmp_path / "run" / CONFIG).read_text())
    assert config["settings"]["epochs"] == 4
    assert config["extended"] == [{"epochs": 2, "trained": done}]

    switch = 12 if ended else 8
    expected = trainer(**options | {"schedule": "constant"}, epochs=4)
    expected.updater.schedule = lambda progress: (
        0.5 * (1 + math.cos(math.pi * progress * (1 if expected.updater.active >= switch else 2)))
    )
    expected.fit()
    assert furthest([*first.weights[:switch], *second.weights, *third.weights][-6:], expected.weights[-6:]) == 0


def test_steps_that_divide_the_epochs_are_not_given_more(tmp_path):
    options = {"strategies": [Stepwise((0.5, 1.0), (1, 2))], "out": tmp_path / "run"}
    trainer(**options, epochs=2).fit()
    with pytest.raises(UserError, match="epochs was 2, now 3: stepwise divides its epochs into steps"):
        trainer(**options, epochs=3, resume=True)
    assert trainer(**options, epochs=2, resume=True).fit()["epoch"] == 1


def test_a_killed_run_of_a_model_by_name_ends_as_one_that_was_not(tmp_path):
    """Its weights are laid out channels last, and so are the sums of its optimizer."""
    data = images(60, shape=(3, 8, 8))

    def made(name, **more):
        return trainer([], "cnn", data, data, epochs=2, checkpoint_every=1, out=tmp_path / name, **more)

    made("whole").fit()
    run = made("killed")
    arm(run, "step", 3)
    with pytest.raises(KilledError):
        run.fit()
    resumed = made("killed", resume=True)
    assert resumed.counts.updates > 0
    resumed.fit()
    assert difference(outcome(tmp_path / "whole"), outcome(tmp_path / "killed")) == ""
    with pytest.raises(UserError, match="channels_last was True, now None"):
        made("killed", resume=True, channels_last=False)


# --- compiled --------------------------------------------------------------------------------------------------------


class Noisy(torch.utils.data.Dataset):
    """Rows that are others each time."""

    def __init__(self, rows: int) -> None:
        self.data = images(rows)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        image = self.data.images[row] / 100 - 1
        return image + 0.2 * torch.randn(image.shape), int(self.data.labels[row])


def test_a_compiled_run_that_is_killed_ends_as_one_that_was_not(tmp_path):
    """With every setting of the update, and workers; all batches are of one shape, to be compiled soon."""

    def made(name, **more):
        return trainer(
            [Trimming(0.9, 0.4)],
            net(dropout=0.2),
            Noisy(48),
            Noisy(8),
            epochs=3,
            compile="inductor",
            workers=2,
            checkpoint_every=1,
            out=tmp_path / name,
            **SETTINGS["knobs"] | more,
        )

    made("whole").fit()
    run = made("killed")
    arm(run, "step", 4)
    with pytest.raises(KilledError):
        run.fit()
    torch._dynamo.reset()
    made("killed", resume=True).fit()
    assert difference(outcome(tmp_path / "whole"), outcome(tmp_path / "killed")) == ""
