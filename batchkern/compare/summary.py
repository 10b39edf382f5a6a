"""The summary of a comparison by budget and arm: accuracies, costs and tests of their differences."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from batchkern.compare.arms import BASELINE, cost, spent
from batchkern.compare.statistics import converged, differences, first_reaching, interval, median_reach

COUNTS = ("updates", "passive_updates", "samples_forward", "samples_backward", "seconds")
"""Columns of a run's last row that are averaged over the seeds, besides the accuracies."""

Outcome = Mapping[str, Any]


def summarise(settings: Mapping[str, Any], runs: Sequence[Outcome]) -> list[dict[str, Any]]:
    """An entry for each budget and arm, in the order of the settings.

    - ``test_accuracy``: after the last epoch: mean, half of its 95 % interval, a value for each seed;
    - ``difference``: to the ``baseline`` and to the arm's ``control``, paired by seed; p-values are corrected over all
      tests of the comparison (a pair of arms that is the same in two budgets is one test);
    - ``reach``: the budget used, in epochs of the baseline, until the arm's test accuracy first reached the best
      accuracy of the baseline of the same seed: the median over the seeds (``None``: never), and how many reached it;
    - ``converged``: the epoch of the arm in which its training loss converged: the median, and a value for each seed;
    - ``gap``: accuracy on the training set minus accuracy on the test set, after the last epoch;
    - ``cost``: passes of samples, backward counted twice, relative to the baseline.
    """
    ended: dict[tuple[str, int], dict[int, Outcome]] = {}
    for outcome in runs:
        if outcome["error"] is None:
            ended.setdefault((outcome["arm"], outcome["epochs"]), {})[outcome["seed"]] = outcome
    entries, pairs = [], []
    for budget in settings["budgets"]:
        baseline = (BASELINE, settings["arm_epochs"][BASELINE][budget])
        for arm in settings["arms"]:
            key = (arm, settings["arm_epochs"][arm][budget])
            entry = _reached(budget, key, ended.get(key, {}), ended.get(baseline, {}))
            entry["failed"] = _failed(runs, key)
            entry["control"] = control = settings["controls"].get(arm)
            references = {} if arm == BASELINE else {"baseline": baseline}
            if control:
                references["control"] = (control, settings["arm_epochs"][control][budget])
            pairs += [(entry, name, (key, reference)) for name, reference in references.items()]
            entries.append(entry)
    accuracies = {key: {s: run["final"]["test_accuracy"] for s, run in own.items()} for key, own in ended.items()}
    tests = differences(accuracies, [pair for _, _, pair in pairs])
    for entry, name, pair in pairs:
        entry["difference"][name] = tests[pair]
    return entries


def _failed(runs: Sequence[Outcome], key: tuple[str, int]) -> list[dict[str, Any]]:
    own = [outcome for outcome in runs if (outcome["arm"], outcome["epochs"]) == key and outcome["error"]]
    return [{"seed": outcome["seed"], "error": outcome["error"]} for outcome in own]


def _reached(
    budget: str, key: tuple[str, int], ended: Mapping[int, Outcome], baseline: Mapping[int, Outcome]
) -> dict[str, Any]:
    arm, epochs = key
    entry: dict[str, Any] = {
        "budget": budget,
        "arm": arm,
        "epochs": epochs,
        "seeds": len(ended),
        "test_accuracy": None,
        "difference": {},
        "reach": None,
        "converged": None,
        "gap": None,
        "cost": None,
        **dict.fromkeys(COUNTS),
    }
    if not ended:
        return entry
    last = [outcome["final"] for outcome in ended.values()]
    entry["test_accuracy"] = _mean([row["test_accuracy"] for row in last])
    entry["gap"] = _mean([row["train_set_accuracy"] - row["test_accuracy"] for row in last])
    curves = [outcome["curve"] for outcome in ended.values()]
    if all("train_loss" in curve for curve in curves):  # a comparison started with an earlier version may have none
        epochs_to = [converged(curve["train_loss"]) for curve in curves]
        entry["converged"] = {"median": statistics.median(epochs_to), "values": epochs_to}
    for name in COUNTS:
        if name in last[0]:
            entry[name] = statistics.fmean(row[name] for row in last)
    if baseline:
        plain = statistics.fmean(spent("cost", outcome["final"]) for outcome in baseline.values())
        entry["cost"] = statistics.fmean(spent("cost", row) for row in last) / plain
        entry["reach"] = _reach(budget, ended, baseline)
    return entry


def _mean(values: Sequence[float]) -> dict[str, Any]:
    mean, half = interval(values)
    return {"mean": mean, "half_width": half, "values": list(values)}


def _reach(budget: str, ended: Mapping[int, Outcome], baseline: Mapping[int, Outcome]) -> dict[str, Any]:
    epochs = []
    common = sorted(ended.keys() & baseline.keys())
    for seed in common:
        plain, own = baseline[seed]["curve"], ended[seed]["curve"]
        one_epoch = _used(budget, plain)[-1] / len(plain["test_accuracy"])
        used = [x / one_epoch for x in _used(budget, own)]
        epochs.append(first_reaching(own["test_accuracy"], used, max(plain["test_accuracy"])))
    return median_reach(epochs)


def _used(budget: str, curve: Mapping[str, Sequence[float]]) -> list[float]:
    if budget != "cost":
        return list(curve["updates"]) if budget == "updates" else [n + 1.0 for n in range(len(curve["updates"]))]
    return [cost(f, b) for f, b in zip(curve["samples_forward"], curve["samples_backward"], strict=True)]
