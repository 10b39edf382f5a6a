"""Runs all arms and seeds, each in its own run directory, so that a comparison killed at any moment can be resumed."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from batchkern._version import __version__
from batchkern.compare.arms import (
    BASELINE,
    control_of,
    described,
    forecast,
    matched_epochs,
    spent,
)
from batchkern.compare.comparison import Comparison, RunOf, load_data
from batchkern.compare.report import REPORT_FILES, write_report
from batchkern.compare.summary import summarise
from batchkern.compare.workers import in_processes
from batchkern.errors import UserError, out_of_memory, require
from batchkern.files import check_place, contents, locked, make_directory, remove_parts, write_file
from batchkern.rundir import CONFIG, METRICS, RUN_FILES, identity
from batchkern.trainer import Interrupted, Trainer
from batchkern.validation import check_counts, check_one_process, count, pick_device

RESULTS = "results.json"
KIND = "batchkern comparison"
NEEDED = (
    "jinja2",
    "matplotlib.figure",
    "msgspec",
    "safetensors.torch",
    "scipy.stats",
    "statsmodels.stats.multitest",
)

Report = Callable[[dict[str, Any], int, int], None]


# --- running ---------------------------------------------------------------------------------------------------------


def run(
    comparison: Comparison, *, jobs: int | None = None, report: Report = lambda outcome, ended, runs: None
) -> dict[str, Any]:
    """Trains all arms; writes results.json after each run, and at the end the plots, results.csv and report.html.

    On a CPU each run uses one thread, whatever ``jobs`` is, so that results do not depend on it; for a small model this
    is also the fastest. If a run fails or its process dies, it is marked failed in the results, and other runs
    continue.

    Args:
        comparison: the definition of the comparison, with its directory.
        jobs: number of parallel runs, each in its own process unless it is 1; default: the usable CPU cores, or one per
            GPU.
        report: called when a run ends, with its entry of ``runs``, the number of finished runs and the number of runs.

    Returns:
        The contents of results.json: settings, environment, runs, summary.

    Raises:
        UserError: an argument is invalid; everything that can be checked before training is checked first.
        Interrupted: Ctrl-C was pressed. Finished runs are in results.json, the others in their checkpoints.

    Examples:
        >>> from pathlib import Path
        >>> from batchkern.compare import Comparison, run
        >>> small = {"train_rows": 64, "test_rows": 64, "seeds": 1, "training": {"epochs": 1}}
        >>> results = run(Comparison("digits", "mlp", Path("out"), arms=("cutout",), **small), jobs=1)
        >>> [(entry["arm"], entry["seed"]) for entry in results["runs"]]
        [('baseline', 0), ('cutout', 0)]
    """
    for module in NEEDED:
        require(module, "train")  # now, and not after the trainings
    check_counts(jobs=jobs)
    check_one_process()
    device = pick_device(comparison.training.get("device"))
    try:
        with _threads(1 if device.type == "cpu" else torch.get_num_threads()):
            settings = _check(comparison)
            with _claimed(comparison, settings) as (earlier, check):
                finished = {RunOf.recorded(outcome) for outcome in earlier.get("runs", ())}
                tasks = [task for task in _tasks(settings) if task not in finished]
                devices = _devices(device, jobs, len(tasks))
                environment = _environment(device, len(devices)) if tasks else earlier["environment"]
                results: dict[str, Any] = {"kind": KIND, "settings": settings, "environment": environment}
                results |= {"runs": [*earlier.get("runs", ())], "summary": []}
                _write(comparison.out, results)
                with contextlib.closing(_outcomes(comparison, tasks, devices)) as outcomes:
                    for outcome in outcomes:
                        results["runs"].append(outcome)
                        check()
                        _write(comparison.out, results)
                        report(outcome, len(results["runs"]), len(finished) + len(tasks))
                check()
                _conclude(comparison, results)
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; finished runs are in {comparison.out}; resume it to continue from there"
        ) from None
    finally:
        load_data.cache_clear()
    return results


def _conclude(comparison: Comparison, results: dict[str, Any]) -> None:
    # In the order of the tasks, whatever the order in which the runs ended.
    order = {task: place for place, task in enumerate(_tasks(results["settings"]))}
    results["runs"].sort(key=lambda outcome: order[RunOf.recorded(outcome)])
    results["summary"] = summarise(results["settings"], results["runs"])
    _write(comparison.out, results)
    write_report(comparison.out, results)


def usable_cores() -> int:
    """The number of cores that this process may use, which in a container or batch job may be few."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _devices(device: torch.device, jobs: int | None, runs: int) -> list[str]:
    """The device of each process, at most one per run. If no GPU was named, processes are assigned to all GPUs in
    turn."""
    if device.type == "cpu":
        return ["cpu"] * min(jobs or usable_cores(), runs)
    names = [str(device)] if device.index is not None else [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return [names[i % len(names)] for i in range(min(jobs or len(names), runs))]


def _check(comparison: Comparison) -> dict[str, Any]:
    """Builds every trainer once, so that errors are reported before any training; returns the settings of all runs."""
    epochs = count("epochs", comparison.training.get("epochs", 15))

    def build(arm: str, epochs: int) -> Trainer:
        try:
            return comparison.trainer(RunOf(arm, epochs, 0), write=False)
        except UserError as error:
            raise UserError(str(error) if arm == BASELINE else f"arm {arm}: {error}") from error

    baseline = build(BASELINE, epochs)
    settings = baseline.settings
    plain = vars(forecast(baseline))

    def epochs_of(arm: str, budget: str) -> int:
        if budget == "epochs":
            build(arm, epochs)
            return epochs
        return matched_epochs(partial(build, arm), epochs, budget, spent(budget, plain))

    arm_epochs = {arm: {budget: epochs_of(arm, budget) for budget in comparison.budgets} for arm in comparison.arms}
    by_training = {described(arm): arm for arm in comparison.arms}
    controls = {arm: by_training.get(described(control)) for arm in comparison.arms if (control := control_of(arm))}
    shared = {key: value for key, value in settings.items() if key not in ("strategies", "seed")}
    return shared | {
        "passive": comparison.passive,
        "noise": comparison.noise,
        "arms": list(comparison.arms),
        "controls": {arm: control for arm, control in controls.items() if control},
        "seeds": list(range(comparison.seeds)),
        "budgets": list(comparison.budgets),
        "arm_epochs": arm_epochs,
    }


def _tasks(settings: dict[str, Any]) -> list[RunOf]:
    """All runs, with all arms of a seed before the next seed."""
    return [
        RunOf(arm, epochs, seed)
        for seed in settings["seeds"]
        for arm in settings["arms"]
        for epochs in dict.fromkeys(settings["arm_epochs"][arm].values())
    ]


def _environment(device: torch.device, jobs: int) -> dict[str, Any]:
    return {
        "batchkern": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "cores": usable_cores(),
        "jobs": jobs,
        "threads_per_run": torch.get_num_threads(),
    }


def _outcomes(comparison: Comparison, tasks: Sequence[RunOf], devices: Sequence[str]) -> Generator[dict[str, Any]]:
    """The outcomes of the runs, as they end."""
    if len(devices) == 1:
        yield from (_run(comparison, task, devices[0]) for task in tasks)
        return
    load_data.cache_clear()  # workers load their own
    yield from in_processes(partial(_run, comparison), _died, tasks, devices)


def _record(task: RunOf) -> dict[str, Any]:
    return {
        "arm": task.arm,
        "epochs": task.epochs,
        "seed": task.seed,
        "directory": str(task.directory),
        "error": None,
        "curve": None,
        "final": None,
    }


def _died(task: RunOf, how: str) -> dict[str, Any]:
    hint = ", perhaps because memory ran out; fewer --jobs need less" if how.startswith("was killed") else ""
    return _record(task) | {"error": f"its process {how}{hint}"}


def _run(comparison: Comparison, task: RunOf, device: str) -> dict[str, Any]:
    """The outcome of one run: its results, or the error."""
    outcome = _record(task)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they were shown when the arms were checked
            trainer = comparison.trainer(task, write=True, device=device)
        trainer.fit()
        keys = ("test_accuracy", "train_loss", "updates", "samples_forward", "samples_backward")
        outcome["curve"] = {key: [row[key] for row in trainer.history] for key in keys}
        outcome["final"] = trainer.history[-1]
    except UserError as error:
        outcome["error"] = str(error)
    except Exception as error:  # a bug, or a model that fails in training; the other runs must continue
        short = "out of memory; fewer --jobs or a smaller --batch-size need less"
        outcome["error"] = short if out_of_memory(error) else f"{type(error).__name__}: {error}"
    return outcome


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- the directory ---------------------------------------------------------------------------------------------------


def _write(out: Path, results: dict[str, Any]) -> None:
    """Writes results.json with one line for each run and each entry of the summary; one line per number would make it
    twice as large."""

    def text(value: Any) -> str:
        if not isinstance(value, list):
            return json.dumps(value)
        return "[" + ",".join("\n " + json.dumps(entry) for entry in value) + "\n]"

    lines = ",\n".join(f"{json.dumps(key)}: {text(value)}" for key, value in results.items())
    write_file(out / RESULTS, f"{{\n{lines}\n}}\n".encode())


@contextlib.contextmanager
def _claimed(comparison: Comparison, settings: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Callable[[], None]]]:
    """Locks the directory for this comparison while it runs. Yields the earlier results, if it is resumed, and a
    function that raises if the directory was replaced by another one.

    The rules are those of a run's directory: existing files are an error unless the comparison is resumed or
    overwritten, and only files written by a comparison are replaced.
    """
    out = comparison.out
    make_directory(out)
    with locked(out) as descriptor:
        try:
            earlier = _finished(comparison, settings)
        except OSError as error:
            raise UserError(f"{out} cannot be written: {error.strerror}") from None
        yield earlier, partial(check_place, out, descriptor)


def _finished(comparison: Comparison, settings: dict[str, Any]) -> dict[str, Any]:
    out = comparison.out
    _check_no_links(out, _tasks(settings))
    written = (RESULTS, *REPORT_FILES)
    # A kill during the very first write leaves only a partial file, which counts as an empty directory.
    if not contents(out, written):
        remove_parts(out, written)
        return {}
    earlier = _earlier(out)
    if comparison.resume:
        found = _same(out, earlier, settings)
    elif comparison.overwrite:
        found = {}
        _remove(out, earlier, _tasks(settings))
    else:
        raise UserError(f"{out} already holds a comparison; resume it, overwrite it, or give another directory")
    remove_parts(out, written)
    return found


def _check_no_links(out: Path, tasks: Iterable[RunOf]) -> None:
    """Rejects links in place of directories: the files of all runs must lie below ``out``."""
    for place in {place for task in tasks for place in (task.directory, *task.directory.parents)} - {Path()}:
        if (out / place).is_symlink():
            raise UserError(
                f"{out / place} is a link, which a comparison does not follow; put a directory in its place"
            )


def _earlier(out: Path) -> dict[str, Any]:
    """The results of the comparison in ``out``.

    Raises:
        UserError: there are none, or they were not written by a comparison. This is checked strictly, because files at
            their paths may be removed.
    """
    from batchkern import records

    try:
        results: dict[str, Any] = records.read_json(out / RESULTS, records.Results)
        settings = results["settings"]
        for arm in (BASELINE, *settings["arms"], *settings["controls"], *settings["controls"].values()):
            if arm not in settings["arms"] or set(settings["arm_epochs"].get(arm, ())) != set(settings["budgets"]):
                raise ValueError(f"the arm {arm!r} has no epochs for each budget")
        for outcome in results["runs"]:
            if outcome["directory"] != str(RunOf.recorded(outcome).directory):
                raise ValueError(f"the directory of a run is {outcome['directory']!r}")
            if outcome["error"] is None and not (outcome["final"] and outcome["curve"]):
                raise ValueError(f"{outcome['directory']} has neither an error nor an end")
            curve = outcome["curve"] or {}
            for key in (key for key in records.Curve.__annotations__ if key in curve):
                values = curve[key]
                if len(values) != outcome["epochs"] or (outcome["final"] and values[-1] != outcome["final"][key]):
                    raise ValueError(
                        f"{outcome['directory']} has {len(values)} epochs of {key}, or another end of them"
                    )
    except (OSError, ValueError) as error:
        reason = f"{RESULTS} is missing" if isinstance(error, FileNotFoundError) else f"{RESULTS} is damaged: {error}"
        raise UserError(
            f"{out} exists and is not a batchkern comparison ({reason}); give another output directory"
        ) from None
    _check_no_links(out, map(RunOf.recorded, results["runs"]))
    _check_no_links(out, _tasks(settings))
    return results


def _same(out: Path, earlier: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The results of an earlier comparison without the failed runs, if this comparison can continue it."""
    own = {"arms", "controls", "seeds", "budgets", "arm_epochs"}
    was, now = identity(earlier["settings"]), identity(settings)
    if was["passive"] is None:  # no arm has injected anything so far
        own.add("passive")
    changed = [
        f"{key} was {was.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(was.keys() | now.keys())
        if key not in own and was.get(key) != now.get(key)
    ]
    if changed:
        raise UserError(f"{out} was compared with other settings and cannot be resumed: {'; '.join(changed)}")
    asked = set(_tasks(settings))
    # A run whose metrics are missing or damaged cannot be shown, and is trained again.
    finished = [o for o in earlier["runs"] if not o["error"] and _is_shown(out, o)]
    for task in map(RunOf.recorded, finished):
        if task not in asked:
            raise UserError(
                f"{out} has finished arm {task.arm}, {task.epochs} epochs, seed {task.seed}, which is not requested "
                "now; resuming may add arms, seeds and budgets, but not remove any"
            )
    return earlier | {"runs": finished}


def _is_shown(out: Path, outcome: dict[str, Any]) -> bool:
    from batchkern.records import read_metrics

    try:
        return len(read_metrics(out / outcome["directory"] / METRICS)) == outcome["epochs"]
    except (OSError, ValueError):
        return False


def _remove(out: Path, earlier: dict[str, Any], tasks: Sequence[RunOf]) -> None:
    """Removes the files that the comparison wrote, but no files of the user."""
    kept = {out / task.directory for task in tasks}
    directories = [out / task.directory for task in _tasks(earlier["settings"])]
    present = [directory for directory in directories if directory.is_dir()]
    for directory in present:  # fails if any of them is in use, before the first is changed
        with locked(directory):
            pass
    for name in REPORT_FILES:
        (out / name).unlink(missing_ok=True)
    for directory in present:
        with locked(directory):
            remove_parts(directory, RUN_FILES)
            for name in RUN_FILES:
                # config.json is kept if the new comparison has a run here: it marks the directory as a run's.
                if name != CONFIG or directory not in kept:
                    (directory / name).unlink(missing_ok=True)
    for directory in directories:
        for emptied in (directory, directory.parent, directory.parent.parent):
            with contextlib.suppress(OSError):  # it holds files of the user, or does not exist
                emptied.rmdir()
