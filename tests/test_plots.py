"""The figures: what lines they hold, beside that they are small PNG files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.text import Text

from batchkern import plots
from batchkern.errors import UserError
from batchkern.plots import (
    kept_fractions,
    on_common_grid,
    plot_accuracy,
    plot_diagnostics,
    plot_differences,
    plot_run,
)
from batchkern.rundir import CONFIG, CURVES, METRICS


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved, by the name of its file."""
    saved = {}
    save = plots._save

    def remember(figure, path):
        saved[path.name] = figure
        save(figure, path)

    monkeypatch.setattr(plots, "_save", remember)
    return saved


def rows(epochs=4, *, seed=0, speed=1.0, vote=0.0):
    return [
        {
            "epoch": epoch,
            "updates": 10 * (epoch + 1),
            "seconds": speed * (epoch + 1),
            "samples_seen": 100 * (epoch + 1),
            "samples_forward": 200 * (epoch + 1),
            "samples_backward": 100 * (epoch + 1),
            "samples_kept": 100 + 50 * epoch,
            "lr": 0.1 / (epoch + 1),
            "train_loss": 2.0 / (epoch + 1),
            "train_objective": 2.5 / (epoch + 1),
            "test_loss": 1.0 / (epoch + 1),
            "train_accuracy": 0.5 + 0.1 * epoch,
            "test_accuracy": 0.4 + 0.1 * epoch + 0.01 * seed + vote,
            "test_accuracy_plain": 0.4 + 0.1 * epoch + 0.01 * seed,
        }
        for epoch in range(epochs)
    ]


def write_run(directory, content, strategies=("trimming",)):
    settings = {
        "strategies": [{"name": name} for name in strategies],
        "model": "cnn",
        "train": {"name": "digits"},
        "seed": 3,
    }
    (directory / CONFIG).write_text(json.dumps({"settings": settings}))
    (directory / METRICS).write_text("".join(json.dumps(row) + "\n" for row in content))


def assert_small_png(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n")
    assert 5_000 < len(content) < 200_000


def lines(axes):
    return {line.get_label(): line.get_ydata() for line in axes.get_lines()}


def test_curves_of_a_run(tmp_path, figures):
    content = rows()
    write_run(tmp_path, content, ["trimming", "passive"])
    plot_run(tmp_path)
    assert_small_png(tmp_path / CURVES)
    figure = figures[CURVES]
    assert figure.get_suptitle() == "trimming + passive: cnn on digits, seed 3"
    loss, accuracy, kept, rate = figure.get_axes()
    expected = {"train, all samples": "train_loss", "objective, as minimised": "train_objective", "test": "test_loss"}
    assert {k: list(v) for k, v in lines(loss).items()} == {k: [r[v] for r in content] for k, v in expected.items()}
    assert loss.get_yscale() == "log"
    shown = lines(accuracy)
    assert set(shown) == {"train", "test"}
    assert shown["test"] == pytest.approx([40, 50, 60, 70])
    assert kept.get_lines()[0].get_ydata() == pytest.approx([100, 50, 50, 50])
    assert list(rate.get_lines()[0].get_ydata()) == [row["lr"] for row in content]
    assert all(list(axes.get_lines()[0].get_xdata()) == [1, 2, 3, 4] for axes in figure.get_axes())


def test_panels_for_what_strategies_tell(tmp_path, figures):
    content = [
        row | {"kept_loss": [0, 2.0 + e, 9], "dropped_loss": [0, 1.0, 9] if e else None, "times_kept": [0, 0, e, 9, 9]}
        for e, row in enumerate(rows())
    ]
    for e, row in enumerate(content):
        row |= {"kept_mislabelled": 0.1 * e, "passive_accuracy": 0.5} | ({"kept_overlap": 0.6} if e else {})
    write_run(tmp_path, content)
    plot_run(tmp_path)
    assert_small_png(tmp_path / CURVES)
    panels = {axes.get_title(loc="left"): lines(axes) for axes in figures[CURVES].get_axes()[4:] if axes.axison}
    assert {title: list(shown) for title, shown in panels.items()} == {
        "median last loss": ["kept", "dropped"],
        "of the samples kept (%)": ["kept the epoch before, too", "mislabelled"],
        "how often samples were kept so far": ["times (median)"],
        "accuracy on passive batches (%)": ["before each update"],
    }
    assert list(panels["median last loss"]["kept"]) == [2, 3, 4, 5]
    assert list(panels["median last loss"]["dropped"][1:]) == [1, 1, 1]
    assert panels["of the samples kept (%)"]["mislabelled"] == pytest.approx([0, 10, 20, 30])
    assert list(panels["how often samples were kept so far"]["times (median)"]) == [0, 1, 2, 3]


def test_two_test_accuracies_where_a_strategy_predicts_in_its_own_way(tmp_path, figures):
    write_run(tmp_path, rows(vote=0.05), [])
    plot_run(tmp_path)
    accuracy = lines(figures[CURVES].get_axes()[1])
    assert accuracy["test, as the strategy predicts"] == pytest.approx([45, 55, 65, 75])
    assert accuracy["test, model alone"] == pytest.approx([40, 50, 60, 70])
    assert figures[CURVES].get_suptitle().startswith("baseline: ")


def test_odd_runs_have_curves_too(tmp_path, figures):
    """One epoch alone is a point; a loss of zero has no logarithm."""
    only = rows(1)
    only[0]["train_loss"] = 0.0
    write_run(tmp_path, only)
    plot_run(tmp_path)
    assert_small_png(tmp_path / CURVES)
    assert all(line.get_marker() == "o" for axes in figures[CURVES].get_axes() for line in axes.get_lines())
    assert figures[CURVES].get_axes()[0].get_yscale() == "linear"


def test_kept_fractions_are_of_each_epoch():
    assert kept_fractions(rows()) == [1.0, 0.5, 0.5, 0.5]
    assert kept_fractions([]) == []


def test_the_same_updates_need_no_grid():
    x, accuracies = on_common_grid([rows(seed=0), rows(seed=1)], "updates")
    assert list(x) == [10, 20, 30, 40]
    assert accuracies == pytest.approx(np.array([[40, 50, 60, 70], [41, 51, 61, 71]]))


def test_seconds_are_interpolated_and_the_end_is_held():
    x, accuracies = on_common_grid([rows(2, speed=1.0), rows(2, speed=2.0)], "seconds")  # at 1, 2 and at 2, 4 seconds
    assert (x[0], x[-1]) == (2, 4)  # before 2 s the second has no accuracy yet
    assert accuracies[0] == pytest.approx(np.full(len(x), 50))  # the first is through at 2 s
    assert accuracies[1] == pytest.approx(np.linspace(40, 50, len(x)))


@pytest.mark.parametrize("key", ["updates", "seconds"])
def test_lines_and_bands_of_a_comparison(tmp_path, figures, key):
    arms = {f"arm-{n}": [rows(seed=n), rows(seed=n + 2)] for n in range(7)} | {"random(select=rows)": [rows(seed=9)]}
    plot_accuracy(tmp_path / "it.png", {**arms, "all failed": []}, key, "a label", "a title")
    assert_small_png(tmp_path / "it.png")
    (axes,) = figures["it.png"].get_axes()
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("a title", "a label", "test accuracy (%)")
    assert [text.get_text() for text in figures["it.png"].legends[0].get_texts()] == list(arms)
    for number, (line, band) in enumerate(zip(axes.get_lines()[:7], axes.collections[:7], strict=True)):
        assert line.get_ydata() == pytest.approx(np.array([41, 51, 61, 71]) + number)
        assert list(line.get_xdata()) == [row[key] for row in arms["arm-0"][0]]
        corners = band.get_paths()[0].vertices
        first = corners[corners[:, 0] == line.get_xdata()[0], 1]
        assert (first.min(), first.max()) == pytest.approx((40 + number, 42 + number))
    assert len({line.get_color() for line in axes.get_lines()}) == 8
    assert [line.get_linestyle() for line in axes.get_lines()] == ["-"] * 7 + ["--"]
    # All ends are on the page, and no page goes far beyond.
    low, high = axes.get_ylim()
    ends = [100 * run[-1]["test_accuracy"] for runs in arms.values() for run in runs]
    assert low < min(ends)
    assert max(ends) < high < max(ends) + 5


def test_arms_that_are_more_than_colours_differ_by_dashes(tmp_path, figures):
    arms = {f"arm-{n}": [rows(seed=n)] for n in range(10)}
    plot_accuracy(tmp_path / "it.png", arms, "updates", "updates", "many")
    looks = [(line.get_color(), line.get_linestyle()) for line in figures["it.png"].get_axes()[0].get_lines()]
    assert len(set(looks)) == 10


@pytest.mark.parametrize("arms", [{}, {"baseline": []}, {"baseline": [rows(1)]}])
def test_comparisons_with_little_to_show(tmp_path, figures, arms):
    plot_accuracy(tmp_path / "it.png", arms, "updates", "updates", "little")
    assert all(line.get_marker() == "o" for line in figures["it.png"].get_axes()[0].get_lines())
    plot_diagnostics(tmp_path / "what.png", arms)
    plot_differences(tmp_path / "differences.png", {})
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_differences_are_points_with_their_intervals(tmp_path, figures):
    def test(mean, half, p):
        return {"mean": mean, "half_width": half, "p": p, "p_corrected": p, "seeds": 3}

    one = [("a", test(0.02, 0.01, 0.01)), ("b", test(-0.03, 0.04, 0.2))]
    other = [("a", test(0.01, None, None))]
    plot_differences(tmp_path / "it.png", {"less baseline": one, "less control": other})
    assert_small_png(tmp_path / "it.png")
    first, second = figures["it.png"].get_axes()
    assert [axes.get_title() for axes in (first, second)] == ["less baseline", "less control"]
    assert [text.get_text() for text in first.get_yticklabels()] == ["a", "b"]
    (a, _, (bar_a,)), (b, _, (bar_b,)) = first.containers
    assert (a.get_xdata()[0], b.get_xdata()[0]) == pytest.approx((2, -3))
    assert a.get_ydata()[0] > b.get_ydata()[0]  # the first arm is the upper one
    for bar, ends in ((bar_a, (1, 3)), (bar_b, (-7, 1))):
        assert bar.get_segments()[0][:, 0] == pytest.approx(ends)
    assert a.get_color() != b.get_color() == second.containers[0][0].get_color()  # found after correction, or not


def test_diagnostics_have_a_panel_where_an_arm_has_the_figure(tmp_path, figures):
    def with_figures(**figures):
        return [row | {key: f(row["epoch"]) for key, f in figures.items()} for row in rows()]

    arms = {
        "baseline": [rows()],
        "a": [with_figures(kept_loss=lambda e: [0, e, 9], never_kept=lambda e: 0.1 * e), rows()],
        "b": [with_figures(kept_loss=lambda e: [0, 2 * e, 9]), with_figures(kept_loss=lambda e: [0, 4 * e, 9])],
        "c": [with_figures(dropped_loss=lambda e: None, passive_accuracy=lambda e: 0.5)],
    }
    plot_diagnostics(tmp_path / "it.png", arms)
    panels = {axes.get_title(loc="left"): lines(axes) for axes in figures["it.png"].get_axes() if axes.axison}
    kept = [50 * e for e in (2, 1, 1, 1)]
    assert set(panels) == {
        "samples that the loss counts (%)",
        "samples never kept so far (%)",
        "median last loss of those kept",
        "accuracy on passive batches (%)",
    }
    assert list(panels["samples that the loss counts (%)"]["baseline"][1:]) == kept[1:]
    assert panels["samples never kept so far (%)"]["a"] == pytest.approx([0, 10, 20, 30])
    losses = panels["median last loss of those kept"]
    assert list(losses) == ["a", "b"]
    assert losses["b"] == pytest.approx([0, 3, 6, 9])  # the mean of both seeds
    assert losses["a"] == pytest.approx([0, 1, 2, 3])  # of the one seed that has it
    assert list(panels["accuracy on passive batches (%)"]["c"]) == [50] * 4


def test_a_file_that_cannot_be_written_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"it\.png cannot be written"):
        plot_accuracy(tmp_path / "missing" / "it.png", {}, "updates", "updates", "nowhere")
    write_run(tmp_path, rows())
    (tmp_path / CURVES).mkdir()
    with pytest.raises(UserError, match=r"curves\.png cannot be written"):
        plot_run(tmp_path)


@pytest.mark.parametrize("name", ["$", "a$b", "$x_1$", "$\\frac{$", "\\$5$", "$$", "50% $\\alpha$ \n_x"])
def test_dollar_signs_are_no_mathematics(tmp_path, figures, name):
    write_run(tmp_path, rows(), [name])
    plot_run(tmp_path)
    difference = {"mean": 0.1, "half_width": 0.2, "p_corrected": 0.5}
    plot_differences(tmp_path / "differences.png", {"arm": [(name, difference)]})
    plot_accuracy(tmp_path / "accuracy.png", {name: [rows()]}, "updates", "updates", name)
    plot_diagnostics(tmp_path / "diagnostics.png", {name: [rows()]})
    shown = [text for figure in figures.values() for text in figure.findobj(Text) if "$" in text.get_text()]
    literal = {text._preprocess_math(text.get_text()) for text in shown if "mathdefault" not in text.get_text()}
    assert {mathematics for _, mathematics in literal} == {False}
    assert name in {text for text, _ in literal}


def test_no_display_and_no_global_state(tmp_path):
    write_run(tmp_path, rows())
    code = (
        "import sys; from pathlib import Path; from batchkern.plots import plot_run; "
        f"plot_run(Path({str(tmp_path)!r})); sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    environment = {"PATH": "", "PYTHONPATH": str(Path(plots.__file__).parents[1]), "MPLBACKEND": "qtagg"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
    assert_small_png(tmp_path / CURVES)


def test_a_run_without_an_epoch_has_no_figure(tmp_path):
    write_run(tmp_path, [])
    with pytest.raises(UserError, match=r"metrics.jsonl has no epoch to show"):
        plot_run(tmp_path)
