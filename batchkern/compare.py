"""A comparison: arms x seeds, each run a run directory of its own, and what they reached.

A seed stands for the same initial weights and the same order of the data in every arm, so arms differ in nothing but
their strategies.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import signal
import statistics
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from batchkern._version import __version__
from batchkern.configure import check_counts, check_one_process, pick_device
from batchkern.data import ImageData, load, load_pair
from batchkern.errors import UserError, require
from batchkern.plots import SECONDS_PLOT, UPDATES_PLOT, plot_comparison
from batchkern.rundir import CHECKPOINT, CONFIG, CURVES, METRICS, WEIGHTS, write_file
from batchkern.strategies import PassiveInjection, parse, split_terms
from batchkern.trainer import Interrupted, Trainer

RESULTS = "results.json"
KIND = "batchkern comparison"
COUNTS = ("updates", "passive_updates", "samples_forward", "samples_backward", "seconds")
"""What of a run's last row is averaged over the seeds, beside the accuracy."""

ARMS = (
    "baseline",
    "trimming",
    "hard-batches",
    "stepwise",
    "augmentation",
    # The paper's 100 is for sets of 50,000 images: on digits it would fire 9 times in the whole training.
    "passive(every=10)",
    "random(select=rows)",
    "random(select=batches)",
)
"""The five strategies, and the controls of the two that select by loss."""


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Args:
        data, test: as :func:`batchkern.data.load_pair` takes them.
        model: a name for :func:`batchkern.models.build`.
        out: its directory, with a directory ``<arm>/seed-<s>`` for each run.
        passive: the passive set, where an arm injects one.
        arms: in the notation of :func:`batchkern.strategies.parse`.
        seeds: 0, 1, ... up to so many.
        training: further keyword arguments of :class:`Trainer`, the same in all runs.
        overwrite: replace the files of a comparison that is there.
    """

    data: str
    model: str
    out: Path
    test: str | None = None
    passive: str | None = None
    image_size: int | None = None
    arms: tuple[str, ...] = ARMS
    seeds: int = 3
    training: dict[str, Any] = field(default_factory=dict)
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_counts(seeds=self.seeds)
        if not self.arms:
            raise UserError("there is no arm to compare")
        slugs: dict[str, str] = {}
        for arm in self.arms:
            if (other := slugs.setdefault(slug(arm), arm)) is not arm:
                raise UserError(f"arms {other!r} and {arm!r} are the same, or their directories would be")
        check_passive(self.arms, self.passive)

    def directory(self, arm: str, seed: int) -> Path:
        return self.out / slug(arm) / f"seed-{seed}"

    def trainer(self, arm: str, seed: int, *, write: bool) -> Trainer:
        train, test, passive = _data(self.data, self.test, self.passive, self.image_size)
        return Trainer(
            self.model,
            train,
            test,
            strategies=parse(arm, passive=passive),
            seed=seed,
            out=self.directory(arm, seed) if write else None,
            overwrite=self.overwrite,
            progress=False,
            **self.training,
        )


def slug(text: str) -> str:
    """``text`` as the name of a file."""
    return re.sub(r"[^\w.]+", "-", text).strip("-.")


def split_arms(text: str) -> list[str]:
    """Arms joined by commas."""
    return [arm for arm in split_terms(text, ",") if arm]


def wants_passive(strategy: str) -> bool:
    """Whether a strategy needs a passive set that its text does not name."""
    placed = parse(strategy, passive="")
    return any(isinstance(s, PassiveInjection) and s.passive == "" for s in placed)


def check_passive(strategies: Sequence[str], passive: str | None) -> None:
    """Refuses a passive set that is missing, or that nothing uses; and strategies that cannot be read."""
    wanting = [strategy for strategy in strategies if wants_passive(strategy)]
    if wanting and passive is None:
        raise UserError(f"{wanting[0]} needs a data set to inject: --passive SOURCE, such as --passive photo-patches")
    if passive is not None and not wanting:
        raise UserError(f"--passive is {passive}, but no strategy here injects a data set: add the strategy passive")


@lru_cache(maxsize=1)
def _data(
    data: str, test: str | None, passive: str | None, image_size: int | None
) -> tuple[ImageData, ImageData, ImageData | None]:
    """Loaded once in each process."""
    injected = None if passive is None else load(passive, image_size=image_size)
    return *load_pair(data, test, image_size=image_size), injected


# --- running ---------------------------------------------------------------------------------------------------------


def run(
    comparison: Comparison, *, jobs: int | None = None, report: Callable[[dict[str, Any]], None] = lambda outcome: None
) -> dict[str, Any]:
    """Trains all arms and writes results.json, as it goes, and the plots.

    On a CPU each run uses one thread, whatever ``jobs`` is, so that results do not depend on it; for a small model
    that is also the fastest. A run that fails is part of the results and ends no other.

    Args:
        jobs: runs side by side, in processes of their own unless 1; default: usable CPU cores, or 1 on a GPU.
        report: called with each run as it ends: arm, seed, rows (as in metrics.jsonl) and error.

    Returns:
        What is in results.json: settings, environment, runs, summary.

    Raises:
        UserError: whatever can be known to be wrong before training.
        Interrupted: Ctrl-C. Finished runs are in results.json.
    """
    check_one_process()
    check_counts(jobs=jobs)
    device = pick_device(comparison.training.get("device"))
    tasks = [(arm, seed) for seed in range(comparison.seeds) for arm in comparison.arms]
    jobs = min(len(tasks), jobs or (usable_cores() if device.type == "cpu" else 1))
    results: dict[str, Any] = {"kind": KIND, "settings": {}, "environment": {}, "runs": [], "summary": []}
    try:
        with _threads(1 if device.type == "cpu" else torch.get_num_threads()):
            results |= {"settings": _check(comparison), "environment": _environment(device, jobs)}
            _claim(comparison, results)
            with contextlib.closing(_outcomes(comparison, tasks, jobs)) as outcomes:
                for outcome in outcomes:
                    results["runs"].append(outcome)
                    _write(comparison.out, results)
                    report(outcome)
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted: {len(results['runs'])} of {len(tasks)} runs have ended and are in {comparison.out}; "
            "a comparison cannot be resumed, only started anew with --overwrite"
        ) from None
    finally:
        _data.cache_clear()
    # In the order of the arms, however the runs took turns.
    results["runs"].sort(key=lambda outcome: (comparison.arms.index(outcome["arm"]), outcome["seed"]))
    results["summary"] = [summarise(arm, results["runs"]) for arm in comparison.arms]
    _write(comparison.out, results)
    _plot(comparison, results["runs"])
    return results


def usable_cores() -> int:
    """Those this process may run on, which in a container or batch job may be few."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _check(comparison: Comparison) -> dict[str, Any]:
    """Builds every trainer once, so that what is wrong is told now and not after an hour; the settings of all runs."""
    settings = comparison.trainer("baseline", 0, write=False).settings
    for arm in comparison.arms:
        try:
            comparison.trainer(arm, 0, write=False)
        except UserError as error:
            raise UserError(f"arm {arm}: {error}") from error
    shared = {key: value for key, value in settings.items() if key not in ("strategies", "seed")}
    own = {"arms": list(comparison.arms), "seeds": list(range(comparison.seeds)), "passive": comparison.passive}
    return shared | own


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


def _outcomes(comparison: Comparison, tasks: Sequence[tuple[str, int]], jobs: int) -> Generator[dict[str, Any]]:
    """The runs, as they end."""
    if jobs == 1:
        yield from (_run(comparison, arm, seed) for arm, seed in tasks)
        return
    _data.cache_clear()  # workers load their own
    others = set(active_children())
    # Not forked: a fork would inherit the state of torch's threads, but not the threads.
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_start_worker)
    try:
        with _ignored_sigint():  # by the workers too, which inherit it: Ctrl-C is for this process to deal with
            futures = [pool.submit(_run, comparison, arm, seed) for arm, seed in tasks]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        raise UserError("a worker process died, perhaps for want of memory; fewer --jobs need less") from None
    except BaseException:
        for worker in set(active_children()) - others:
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    torch.set_num_threads(1)
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        """A worker whose parent was killed would otherwise train to the end, and then wait for ever."""
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _run(comparison: Comparison, arm: str, seed: int) -> dict[str, Any]:
    """One run: its rows, or why it failed."""
    directory = comparison.directory(arm, seed).relative_to(comparison.out)
    outcome: dict[str, Any] = {"arm": arm, "seed": seed, "directory": str(directory), "rows": [], "error": None}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they were shown when the arms were checked
            trainer = comparison.trainer(arm, seed, write=True)
        trainer.fit()
        outcome["rows"] = trainer.history
    except UserError as error:
        outcome["error"] = str(error)
    except Exception as error:  # a bug, or a model that fails in training: the other runs should not be lost
        outcome["error"] = f"{type(error).__name__}: {error}"
    return outcome


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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


# --- the directory ---------------------------------------------------------------------------------------------------


def _write(out: Path, results: dict[str, Any]) -> None:
    write_file(out / RESULTS, json.dumps(results, indent=1).encode())


def _claim(comparison: Comparison, results: dict[str, Any]) -> None:
    """Makes the directory, by the rule of a run's: refuse what is there, or replace only what a comparison wrote."""
    out = comparison.out
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            earlier = _earlier(out)
            if earlier is None:
                raise UserError(f"{out} exists and is not a batchkern comparison; give another output directory")
            if not comparison.overwrite:
                raise UserError(f"{out} holds a comparison already; overwrite it, or give another directory")
            _remove(comparison, earlier)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from None
    _write(out, results)


def _earlier(out: Path) -> set[Path] | None:
    """The run directories of the comparison in ``out``; ``None`` where there is none."""
    try:
        results = json.loads((out / RESULTS).read_text())
        if results["kind"] != KIND:
            return None
        settings = results["settings"]
        return {out / slug(arm) / f"seed-{int(seed)}" for arm in settings["arms"] for seed in settings["seeds"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remove(comparison: Comparison, earlier: set[Path]) -> None:
    """What would be stale: the plots, and runs that the new comparison does not replace."""
    for name in (UPDATES_PLOT, SECONDS_PLOT):
        (comparison.out / name).unlink(missing_ok=True)
    replaced = {comparison.directory(arm, seed) for arm in comparison.arms for seed in range(comparison.seeds)}
    for directory in sorted(earlier - replaced):
        for name in (CONFIG, METRICS, CHECKPOINT, WEIGHTS, CURVES):
            (directory / name).unlink(missing_ok=True)
        for emptied in (directory, directory.parent):
            with contextlib.suppress(OSError):  # holds something of the user's, or is gone
                emptied.rmdir()


# --- what came out ---------------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % confidence interval by Student's t; ``None`` for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    quantile = float(require("scipy.stats", "train").t.ppf(0.975, len(values) - 1))
    return mean, quantile * statistics.stdev(values) / math.sqrt(len(values))


def summarise(arm: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """An arm's accuracy after the last epoch and what it cost, over the seeds that did not fail."""
    own = [outcome for outcome in runs if outcome["arm"] == arm]
    last = [outcome["rows"][-1] for outcome in own if outcome["error"] is None]
    summary: dict[str, Any] = {
        "arm": arm,
        "seeds": len(last),
        "failed": [{"seed": outcome["seed"], "error": outcome["error"]} for outcome in own if outcome["error"]],
        "test_accuracy": None,
        **dict.fromkeys(COUNTS),
    }
    if last:
        accuracies = [row["test_accuracy"] for row in last]
        mean, half = interval(accuracies)
        summary["test_accuracy"] = {"mean": mean, "half_width": half, "values": accuracies}
        for key in COUNTS:
            if key in last[0]:
                summary[key] = statistics.fmean(row[key] for row in last)
    return summary


def _plot(comparison: Comparison, runs: Sequence[dict[str, Any]]) -> None:
    arms = {
        arm: [outcome["rows"] for outcome in runs if outcome["arm"] == arm and outcome["error"] is None]
        for arm in comparison.arms
    }
    seeds = f"mean and range of {comparison.seeds} seeds" if comparison.seeds > 1 else "one seed"
    plot_comparison(comparison.out, arms, f"{comparison.model} on {comparison.data}: {seeds}")
