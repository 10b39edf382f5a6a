"""What comparisons found, beside what the papers print."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from batchkern.compare.arms import BASELINE
from batchkern.compare.statistics import converged, interval, paired_difference
from batchkern.errors import UserError
from batchkern.files import read_file
from batchkern.recipes.base import EPOCHS, MEDIAN, MILLISECONDS, TOP5, TRAINING, Recipe, passive_of

KIND = "batchkern reproduction"
FILE = "reproduction.json"
HEADINGS = ("recipe", "arm", "published", "measured", "published difference", "measured difference")

Outcome = Mapping[str, Any]


def measured(recipe: Recipe, results: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    """What a comparison found, by arm, in per cent of the recipe's metric: mean and half of the 95 % interval.

    Under ``"difference"`` that of the strategy less the baseline, paired by seed. An arm that failed is not there.
    """
    if recipe.published.metric == "gap":
        return _gaps(recipe, results)
    error = recipe.published.metric == "error"
    found: dict[str, tuple[float, float | None]] = {}
    for entry in results["summary"]:
        if entry["test_accuracy"] is not None:
            found[entry["arm"]] = _per_cent(entry["test_accuracy"], 100.0 if error else 0.0, -100 if error else 100)
        if entry["arm"] == recipe.strategy and (entry.get("difference") or {}).get("baseline"):
            found["difference"] = _per_cent(entry["difference"]["baseline"], 0.0, -100 if error else 100)
    return found


def _gaps(recipe: Recipe, results: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Accuracy on the training set less that on the test set."""
    by_arm: dict[str, dict[int, float]] = {}
    for run in results["runs"]:
        if not run["error"]:
            last = run["final"]
            gap = 100 * (last["train_set_accuracy"] - last["test_accuracy"])
            by_arm.setdefault(run["arm"], {})[run["seed"]] = gap
    found = {arm: interval([*gaps.values()]) for arm, gaps in by_arm.items()}
    difference = paired_difference(by_arm.get(recipe.strategy, {}), by_arm.get(BASELINE, {}))
    if difference:
        found["difference"] = difference["mean"], difference["half_width"]
    return found


def _per_cent(figure: dict[str, Any], offset: float, factor: float) -> tuple[float, float | None]:
    half = figure["half_width"]
    return offset + factor * figure["mean"], None if half is None else 100 * half


# --- beside the main figure ------------------------------------------------------------------------------------------


def _of_last(name: str) -> Callable[[Outcome], float | None]:
    def per_cent(outcome: Outcome) -> float | None:
        value = outcome["final"].get(name)
        return None if value is None else 100 * value

    return per_cent


def _median_of_last_five(outcome: Outcome) -> float | None:
    accuracies = outcome["curve"]["test_accuracy"][-5:]
    return None if len(accuracies) < 5 else 100 - 100 * statistics.median(accuracies)


def _converged(outcome: Outcome) -> float | None:
    losses = outcome["curve"].get("train_loss")
    return converged(losses) if losses else None


BESIDE: dict[str, tuple[Callable[[Outcome], float | None], Callable[[list[float]], float]]] = {
    TOP5: (_of_last("test_top5_accuracy"), statistics.fmean),
    TRAINING: (_of_last("train_set_accuracy"), statistics.fmean),
    MEDIAN: (_median_of_last_five, statistics.fmean),
    EPOCHS: (_converged, statistics.median),
    MILLISECONDS: (lambda run: 1000 * run["final"]["seconds"] / run["final"]["updates"], statistics.fmean),
}
"""Of a run, and over the seeds."""


def beside(recipe: Recipe, results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What the paper gives beside its main figure: the name, published and measured, of baseline, strategy, difference.

    The paper on hard batches does not say when a loss has converged, so that differences are to be compared, and not
    epochs. It gives them relative to its strategy's own epochs; here they are relative to the baseline's.
    """
    rows = []
    for name, published in recipe.published.beside.items():
        of, over_seeds = BESIDE[name]
        found: list[float | None] = []
        for arm in (BASELINE, recipe.strategy):
            values = [value for run in _ended(results, arm) if (value := of(run)) is not None]
            found.append(over_seeds(values) if values else None)
        relative = name in (EPOCHS, MILLISECONDS)
        for arm, value, own in zip((BASELINE, recipe.strategy), published, found, strict=True):
            rows.append((f"{name}, {arm}", f"{value:g}", _figure(own)))
        rows.append((f"{name}, difference", _difference(published, relative), _difference(found, relative)))
    return rows + _steps(recipe, results)


def _steps(recipe: Recipe, results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The accuracy at the end of each step of the strategy."""
    published = recipe.published.steps
    rows = []
    for place, value in enumerate(published, 1):
        ends = place * recipe.training.epochs // len(published)
        found = [100 * run["curve"]["test_accuracy"][ends - 1] for run in _ended(results, recipe.strategy)]
        own = statistics.fmean(found) if found else None
        rows.append((f"accuracy (%) after step {place}, {recipe.strategy}", f"{value:g}", _figure(own)))
    return rows


def _ended(results: dict[str, Any], arm: str) -> list[dict[str, Any]]:
    return [run for run in results.get("runs", ()) if run["arm"] == arm and not run["error"]]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _difference(pair: Sequence[float | None], relative: bool) -> str:
    before, after = pair
    if before is None or after is None:
        return "-"
    return f"{100 * (after - before) / before:+.1f} %" if relative else f"{after - before:+.2f}"


# --- several rows ----------------------------------------------------------------------------------------------------


def reproduction(group: Sequence[Recipe], results: dict[str, Any]) -> dict[str, Any]:
    """A group of recipes and what became of them, as JSON can hold it: a row for the baseline, each recipe, and each
    control, with what the paper has of it."""
    first = group[0]
    figures = {recipe.strategy: measured(recipe, results) for recipe in group}
    of_baseline = first.published.baseline, first.published.intervals[0]
    rows = [_row(None, BASELINE, of_baseline, figures[first.strategy].get(BASELINE), None, None)]
    for recipe in group:
        published, found = recipe.published, figures[recipe.strategy]
        own = published.method, published.intervals[1]
        of_arm, difference = found.get(recipe.strategy), found.get("difference")
        rows.append(_row(recipe.name, recipe.strategy, own, of_arm, published.difference, difference))
    named = {row["arm"] for row in rows} | {"difference"}
    controls = {arm: figure for arm, figure in figures[first.strategy].items() if arm not in named}
    rows += [_row(None, arm, (None, None), figure, None, None) for arm, figure in controls.items()]
    return {
        "data": first.data,
        "passive": passive_of(group),
        "test": results["settings"]["test"]["name"],
        "share": first.share,
        "model": first.model,
        "weights": results["settings"].get("weights"),
        "metric": first.published.metric,
        "epochs": first.training.epochs,
        "train_rows": results["settings"]["train"]["rows"],
        "seeds": first.seeds,
        "rows": rows,
    }


def record(
    name: str, scale: float, amp: str, groups: Sequence[Mapping[str, Any]], environment: Mapping[str, Any]
) -> bytes:
    """What reproduction.json holds."""
    head = {"kind": KIND, "name": name, "scale": scale, "amp": amp, "environment": environment}
    return (json.dumps(head | {"groups": groups}, indent=1) + "\n").encode()


def check_replaceable(path: Path, name: str, *, overwrite: bool, resume: bool) -> None:
    """
    Raises:
        UserError: a file of that name is there, and is not of a reproduction, or is of one that is neither overwritten
            nor goes on.
    """
    try:
        content = json.loads(read_file(path))
        earlier = content["name"] if content["kind"] == KIND else None
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (KeyError, TypeError, ValueError):
        earlier = None
    if earlier is None:
        raise UserError(f"{path} is there, and is not of a reproduction; give another directory")
    if not (overwrite or (resume and earlier == name)):
        raise UserError(
            f"{path} holds the reproduction of {earlier} already; resume it, overwrite it, or give another directory"
        )


def _row(
    recipe: str | None,
    arm: str,
    published: tuple[float | None, float | None],
    found: tuple[float, float | None] | None,
    published_difference: float | None,
    difference: tuple[float, float | None] | None,
) -> dict[str, Any]:
    return {
        "recipe": recipe,
        "arm": arm,
        "published": published,
        "measured": found,
        "published_difference": published_difference,
        "difference": difference,
    }


def cells(groups: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The rows of :func:`reproduction`, as text under :data:`HEADINGS`."""
    rows: list[tuple[str, ...]] = []
    for group in groups:
        where = f"{group['model']}, {group['data']}"
        for row in group["rows"]:
            rows.append(
                (
                    row["recipe"] or (f"({where})" if row["arm"] == BASELINE else ""),
                    row["arm"],
                    with_half(row["published"], digits="g"),
                    with_half(row["measured"]),
                    with_half((row["published_difference"], None), sign="+"),
                    with_half(row["difference"], sign="+"),
                )
            )
    return rows


def with_half(figure: Sequence[float | None] | None, *, sign: str = "", digits: str = ".2f") -> str:
    """A mean and half of its interval, as far as they are there."""
    mean, half = figure or (None, None)
    if mean is None:
        return "-"
    return f"{mean:{sign}{digits}}" + ("" if half is None else f" ± {half:{digits}}")


def tally(groups: Sequence[Mapping[str, Any]]) -> str:
    """In how many rows the published difference, and zero, lie within the measured interval."""
    rows = [row for group in groups for row in group["rows"] if row["recipe"]]
    known = [row for row in rows if row["difference"] and row["difference"][1] is not None]
    if not known:
        return "There is no interval of a measured difference: it takes two seeds whose runs all end."
    agree = [row for row in known if abs(row["published_difference"] - row["difference"][0]) <= row["difference"][1]]
    chance = [row for row in known if abs(row["difference"][0]) <= row["difference"][1]]
    return (
        "The published difference lies within the interval of the measured one (95 %, Student's t, paired by seed) in "
        f"{len(agree)} of {len(known)} rows, and zero in {len(chance)}: where it does, the runs do not tell an effect "
        "from chance."
    )
