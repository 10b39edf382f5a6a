"""The figures of a run, a comparison and a benchmark. Nothing here touches matplotlib's global state or a display."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchkern.errors import UserError, require
from batchkern.files import write_file
from batchkern.rundir import CONFIG, CURVES, METRICS

# Okabe and Ito's colours, which stay apart for colour-blind readers too; grey in place of yellow, which is
# hardly seen on white.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#56B4E9", "#CC79A7", "#E69F00", "#808080")
DPI = 120

Rows = Sequence[Mapping[str, Any]]
"""The epochs of a run, as in its metrics.jsonl."""
Curve = tuple[Sequence[float], Sequence[float]]
"""Increasing x values, and y values."""


def plot_run(directory: Path) -> None:
    """Writes curves.png beside the metrics.jsonl it shows: losses, accuracies, the fraction kept, learning rate,
    and further figures of the strategies.

    Raises:
        OSError, ValueError: metrics.jsonl or config.json cannot be read, is damaged, or there is no epoch to show.
        UserError: matplotlib is missing, or the file cannot be written.
    """
    from batchkern import records

    rows = records.read_metrics(directory / METRICS)
    if not rows:
        raise UserError(f"{directory / METRICS} has no epoch to show")
    settings = records.read_json(directory / CONFIG, records.Config)["settings"]
    strategies = " + ".join(strategy["name"] for strategy in settings["strategies"]) or "baseline"
    told = _told(rows)
    lines = 2 + -(-len(told) // 2)
    figure = _figure(10, 0.7 + 2.9 * lines)
    # Fixed margins: matplotlib's automatic layout would take twice as long as everything else.
    room = {"left": 0.07, "right": 0.98, "bottom": 0.26 / lines * 0.62, "top": 1 - 0.22 / lines}
    room |= {"wspace": 0.16, "hspace": 0.24}
    title = f"{strategies}: {settings['model']} on {settings['train']['name']}, seed {settings['seed']}"
    figure.suptitle(_literal(title))
    panels = figure.subplots(lines, 2, sharex=True, gridspec_kw=room).flat
    loss, accuracy, kept, rate, *others = panels
    _curves(
        loss, rows, "loss", train_loss="train, all samples", train_objective="objective, as minimised", test_loss="test"
    )
    if all(row["train_loss"] > 0 and row["test_loss"] > 0 and row["train_objective"] > 0 for row in rows):
        loss.set_yscale("log")
    # In percent, as everywhere else. The two test accuracies differ only if a strategy changes the prediction.
    percent = [{key: 100 * value for key, value in row.items() if "accuracy" in key} for row in rows]
    curves = {"train_accuracy": "train", "test_accuracy": "test"}
    if any(row["test_accuracy"] != row["test_accuracy_plain"] for row in rows):
        curves |= {"test_accuracy": "test, as the strategy predicts", "test_accuracy_plain": "test, model alone"}
    _curves(accuracy, percent, "accuracy (%)", **curves)
    fractions = [{"kept": 100 * fraction} for fraction in kept_fractions(rows)]
    _curves(kept, fractions, "samples that the loss counts (%)", kept="")
    kept.set_ylim(0, 105)
    _curves(rate, rows, "learning rate, end of epoch", lr="")
    rate.set_ylim(bottom=0)
    for axes, (title, values) in zip(others, told.items(), strict=False):
        _curves(axes, values, title, **{name: name for name in values[0]})
    for axes in others[len(told) :]:
        axes.set_axis_off()
    for axes in list(figure.axes)[-2:]:
        axes.set_xlabel("epoch")
    _save(figure, directory / CURVES)


def _told(rows: Rows) -> dict[str, list[dict[str, float]]]:
    """Panels that only some trainings have: by title, the values of each epoch by the name of their line."""
    selects = any(row.get("dropped_loss") for row in rows)
    panels: dict[str, dict[str, str]] = {
        "median last loss": {"kept_loss": "kept", "dropped_loss": "dropped"} if selects else {},
        "of the samples kept (%)": {
            "kept_overlap": "kept the epoch before, too",
            "kept_overlap_by_chance": "the same by chance",
            "kept_mislabelled": "mislabelled",
        }
        if selects or "kept_mislabelled" in rows[-1]
        else {},
        "how often samples were kept so far": {"times_kept": "times (median)"} if selects else {},
        "accuracy on passive batches (%)": {"passive_accuracy": "before each update"},
        "KL of virtual samples": {"virtual_kl": "mean of the epoch"},
        "deviation from an isometry": {"srip_sigma": "sum over layers, mean of the epoch"},
        "samples that are pruned (%)": {"pruned": "of the epoch"},
        "importance sampling": {"tau": "tau, at the end of the epoch"},
        "noise scale": {"noise_scale": "rate x subset / batch"},
    }
    told = {}
    for title, names in panels.items():
        shown = {key: label for key, label in names.items() if any(row.get(key) is not None for row in rows)}
        factor = 100 if "%" in title else 1
        if shown:
            told[title] = [{label: factor * _scalar(row.get(key)) for key, label in shown.items()} for row in rows]
    return told


def kept_fractions(rows: Rows) -> list[float]:
    """Of the samples in each epoch's batches, the fraction that the loss counted."""
    seen = np.diff([row["samples_seen"] for row in rows], prepend=0)
    kept = np.diff([row["samples_kept"] for row in rows], prepend=0)
    return (kept / np.maximum(seen, 1)).tolist()


def plot_accuracy(path: Path, arms: Mapping[str, Sequence[Rows]], key: str, label: str, title: str) -> None:
    """Writes test accuracy over ``key``: a line for each arm, the mean of its seeds, and a band for their range.

    Args:
        arms: the runs of each arm, one a seed. An arm without runs is left out.
        key: the key of the rows for the horizontal axis; ``label`` is its name.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    curves = {
        arm: [([row[key] for row in rows], [100 * row["test_accuracy"] for row in rows]) for rows in runs]
        for arm, runs in arms.items()
    }
    plot_metric(path, curves, label, "test accuracy (%)", title, least=0.0)


def plot_metric(
    path: Path, arms: Mapping[str, Sequence[Curve]], xlabel: str, ylabel: str, title: str, least: float | None = None
) -> None:
    """Writes any metric over what was used: a line for each arm, the mean of its seeds, and a band for their range.

    Args:
        arms: for each arm, the curves of its seeds, x and y. An arm without any is left out.
        least: the smallest possible value of the metric; the axis is then limited to the range of the last values. By
            default all values are shown.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    figure = _figure(9, 6, layout="constrained")
    axes = figure.subplots()
    ends: list[float] = []
    for place, (arm, runs) in enumerate(arms.items()):
        if runs:
            x, values = common_grid(runs)
            _band(axes, x, values, arm, place)
            ends += [*values[:, -1], values.max()]
    if ends and least is not None:
        # The first values are not shown completely: they would compress the last values, which matter, into a line.
        span = max(max(ends) - min(ends), 1.0)
        axes.set_ylim(max(least, min(ends) - span), max(ends) + 0.1 * span)
    if ends:
        _legend(figure, list(arms), 120)
    axes.set(title=_literal(title), xlabel=_literal(xlabel), ylabel=_literal(ylabel))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    _save(figure, path)


def plot_differences(
    path: Path,
    groups: Mapping[str, Sequence[tuple[str, Mapping[str, Any]]]],
    label: str = "difference in test accuracy (points)",
    factor: float = 100.0,
) -> None:
    """Writes a panel for each group of paired differences: means and 95 % intervals.

    Args:
        groups: by title, pairs of a name and a paired difference as in results.json.
        label: label of the axis, on which differences are multiplied by ``factor``.
    """
    heights = [len(group) + 2 for group in groups.values()] or [1]
    figure = _figure(9, 1 + 0.35 * sum(heights), layout="constrained")
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, group) in zip(panels, groups.items(), strict=False):
        for place, (_, difference) in enumerate(group):
            told = difference["p_corrected"] is not None and difference["p_corrected"] < 0.05
            axes.errorbar(
                factor * difference["mean"],
                -place,
                xerr=None if difference["half_width"] is None else factor * difference["half_width"],
                fmt="o",
                color=COLOURS[2] if told else COLOURS[1],
                capsize=3,
            )
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks([-place for place in range(len(group))], [_literal(name) for name, _ in group])
        axes.set_ylim(-len(group) + 0.4, 0.6)
        axes.set_title(_literal(title), fontsize="medium")
        axes.set_xlabel(_literal(label))
        axes.grid(alpha=0.25, axis="x")
    _save(figure, path)


def plot_fractions(path: Path, lines: Mapping[str, Sequence[tuple[float, float]]], along: str, title: str) -> None:
    """Writes a roofline: over the size, the fraction of the floor that each implementation reaches.

    Args:
        lines: by implementation, pairs of a size and a fraction.
        along: label of the axis of sizes.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    figure = _figure(8, 5, layout="constrained")
    axes = figure.subplots()
    for place, (name, points) in enumerate(lines.items()):
        sizes, fractions = zip(*sorted(points), strict=True)
        axes.plot(sizes, [100 * fraction for fraction in fractions], marker="o", markersize=3, **_look(name, place))
    axes.axhline(100, color="black", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set(title=_literal(title), xlabel=_literal(along), ylabel="fraction of the floor (%)")
    axes.grid(alpha=0.25)
    _legend(figure, list(lines), 110)
    _save(figure, path)


DIAGNOSTICS = {
    "kept fraction": "samples that the loss counts (%)",
    "never_kept": "samples never kept so far (%)",
    "kept_overlap": "of those kept, kept the epoch before too (%)",
    "kept_mislabelled": "of those kept, mislabelled (%)",
    "kept_loss": "median last loss of those kept",
    "dropped_loss": "median last loss of those dropped",
    "noise_scale": "noise scale of stepwise",
    "virtual_kl": "KL of virtual samples",
    "srip_sigma": "deviation of weights from an isometry",
    "pruned": "samples that are pruned (%)",
    "tau": "tau of importance",
    "passive_accuracy": "accuracy on passive batches (%)",
}
"""Panels of the diagnostics of a comparison: key in the rows, title."""


def plot_diagnostics(path: Path, arms: Mapping[str, Sequence[Rows]]) -> None:
    """Writes a panel for each diagnostic that any run has: a line for each arm that has it, the mean of its seeds."""
    curves = {
        key: {arm: values for arm, runs in arms.items() if (values := _mean_curve(runs, key)) is not None}
        for key in DIAGNOSTICS
    }
    shown = {key: lines for key, lines in curves.items() if lines}
    rows = max(1, -(-len(shown) // 3))
    figure = _figure(12, 3.2 * rows + 0.6, layout="constrained")
    panels = figure.subplots(rows, 3, squeeze=False).flat
    places = {arm: place for place, arm in enumerate(arms)}
    for axes, (key, lines) in zip(panels, shown.items(), strict=False):
        for arm, values in lines.items():
            factor = 100 if "%" in DIAGNOSTICS[key] else 1
            progress = np.arange(1, len(values) + 1) / len(values)
            axes.plot(progress, factor * values, **_look(arm, places[arm]), linewidth=1.4)
        axes.set_title(DIAGNOSTICS[key], fontsize="medium", loc="left")
        axes.set_xlim(0, 1)
        axes.grid(alpha=0.25)
    for axes in list(figure.axes)[len(shown) :]:
        axes.set_axis_off()
    for axes in list(figure.axes)[: len(shown)][-3:]:
        axes.set_xlabel("share of the training")
    handles = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    if handles:
        _legend(figure, list(handles), 160, handles)
    _save(figure, path)


def _mean_curve(runs: Sequence[Rows], key: str) -> NDArray[np.float64] | None:
    """The mean over seeds for each epoch, NaN if no seed has a value; of quantiles, the median is used. ``None`` if no
    epoch has a value."""
    if key == "kept fraction":
        columns = [[f if f < 1 else np.nan for f in kept_fractions(rows)] for rows in runs]
    else:
        columns = [[_scalar(row.get(key)) for row in rows] for rows in runs]
    values = np.array(columns, dtype=float)
    if values.size == 0 or np.isnan(values).all():
        return None
    known = ~np.isnan(values)
    sums: NDArray[np.float64] = np.where(known, values, 0.0).sum(axis=0)
    counts = known.sum(axis=0)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _scalar(value: Any) -> float:
    if value is None:
        return float("nan")
    return float(value[len(value) // 2] if isinstance(value, list) else value)


def on_common_grid(runs: Sequence[Rows], key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Test accuracy in percent of all seeds at the same values of ``key``: x ``(points,)`` and ``(seeds, points)``.

    Seeds take different times. Values are interpolated between the epochs of a seed, and constant after its last epoch.
    """
    return common_grid([([row[key] for row in rows], [100 * row["test_accuracy"] for row in rows]) for rows in runs])


def common_grid(runs: Sequence[Curve]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The curves of all seeds at the same x ``(points,)``: ``(seeds, points)``."""
    xs, ys = ([np.array(values, dtype=float) for values in axis] for axis in zip(*runs, strict=True))
    if all(np.array_equal(x, xs[0]) for x in xs):
        return xs[0], np.stack(ys)
    grid = np.linspace(max(x[0] for x in xs), max(x[-1] for x in xs), 200)
    return grid, np.stack([np.interp(grid, x, y) for x, y in zip(xs, ys, strict=True)])


def _band(axes: Any, x: NDArray[np.float64], accuracies: NDArray[np.float64], arm: str, place: int) -> None:
    look = _look(arm, place)
    axes.fill_between(x, accuracies.min(axis=0), accuracies.max(axis=0), color=look["color"], alpha=0.1, linewidth=0)
    marker = "o" if len(x) == 1 else None  # a single point has no line
    axes.plot(x, accuracies.mean(axis=0), marker=marker, linewidth=1.6, **look)


def _legend(figure: Any, names: Sequence[str], room: int, handles: Mapping[str, Any] | None = None) -> None:
    """Draws a legend under the plots, in as many columns as fit into ``room`` letters across the figure."""
    columns = max(1, min(4, room // (max(map(len, names)) + 8)))
    given = (list(handles.values()), list(handles)) if handles else ()
    figure.legend(*given, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")


def _look(arm: str, place: int) -> dict[str, Any]:
    dashes = "--" if arm.startswith("random") or place >= len(COLOURS) else "-"
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": dashes, "label": _literal(arm)}


def _curves(axes: Any, rows: Rows, title: str, **labels: str) -> None:
    """A line over the epochs for each key of ``rows`` in ``labels``."""
    epochs = range(1, len(rows) + 1)
    for (key, label), colour, dashes in zip(labels.items(), COLOURS[1:], ("-o", "--o", "-o"), strict=False):
        values = [row[key] for row in rows]  # the second line often lies on another
        axes.plot(
            epochs, values, dashes, color=colour, markersize=3, linewidth=1.6, label=label, zorder=2 + (dashes == "--o")
        )
    axes.set_title(title, fontsize="medium", loc="left")
    axes.grid(alpha=0.25)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if any(labels.values()):
        axes.legend(frameon=False, fontsize="small")


def _literal(text: str) -> str:
    """``text`` with escaped dollar signs, which matplotlib would otherwise take for mathematics."""
    return text.replace("$", r"\$")


def _figure(width: float, height: float, **options: Any) -> Any:
    return require("matplotlib.figure", "train").Figure(figsize=(width, height), **options)


def _save(figure: Any, path: Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=DPI)
    write_file(path, image.getvalue())
