"""Results of anyone's trainings: the tables of a comparison from its own file, one family of tests, bad files named."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("scipy")
pytest.importorskip("statsmodels")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from scipy import stats

from batchkern.analysis import JSON, PAGE, Analysis, Run, analyse, read_results, write_analysis
from batchkern.compare.statistics import paired_difference
from batchkern.errors import UserError


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "results.csv"
    path.write_text(text)
    return path


def of(tmp_path: Path, text: str, metrics: tuple[str, ...] = (), **options: Any) -> Analysis:
    return analyse(read_results(written(tmp_path, text), metrics), **options)


LINES = [
    ("sam", [0.70, 0.74, 0.69, 0.72, 0.73], [0.90, 0.80, 0.95, 0.85, 0.84]),
    ("plain", [0.66, 0.71, 0.68, 0.69, 0.70], [1.10, 0.95, 1.00, 0.99, 1.02]),
    ("noisy", [0.60, 0.80, 0.55, 0.85, 0.66], [1.30, 0.70, 1.40, 0.60, 1.05]),
]


def test_several_metrics_and_data_sets_are_one_family_of_tests(tmp_path: Path) -> None:
    """Against scipy's paired test, and Holm's method by hand."""
    text, values = "data,arm,seed,top1,loss\n", {}
    for data, shift in (("cifar", 0.0), ("digits", 0.05)):
        for arm, top1, loss in LINES:
            own = [x + shift * (arm == "sam") + 1e-3 * k for k, x in enumerate(top1)]
            values[data, arm] = own, loss
            text += "".join(f"{data},{arm},s{k},{a},{b}\n" for k, (a, b) in enumerate(zip(own, loss, strict=True)))
    found = of(tmp_path, text, baseline="plain", controls={"sam": "noisy"})
    assert [table.title for table in found.tables] == ["top1, cifar", "loss, cifar", "top1, digits", "loss, digits"]
    expected = {}
    for data, metric in itertools.product(("cifar", "digits"), (0, 1)):
        for arm, other in (("sam", "plain"), ("sam", "noisy"), ("noisy", "plain")):
            pair = values[data, arm][metric], values[data, other][metric]
            expected[data, metric, arm, other] = float(stats.ttest_rel(*pair).pvalue)
    ordered, worst, holm = sorted(expected.items(), key=lambda item: item[1]), 0.0, {}
    for rank, (key, p) in enumerate(ordered):
        worst = max(worst, min(1.0, (len(ordered) - rank) * p))
        holm[key] = worst
    assert found.tests == 12
    for table, (data, metric) in zip(found.tables, itertools.product(("cifar", "digits"), (0, 1)), strict=True):
        entries = {entry["arm"]: entry for entry in table.entries}
        for arm, name, other in (
            ("sam", "baseline", "plain"),
            ("sam", "control", "noisy"),
            ("noisy", "baseline", "plain"),
        ):
            test = entries[arm]["difference"][name]
            assert test["p_corrected"] == pytest.approx(holm[data, metric, arm, other])
            mean = sum(a - b for a, b in zip(values[data, arm][metric], values[data, other][metric], strict=True)) / 5
            assert test["mean"] == pytest.approx(mean)
    assert found.tables[1].metric.lower
    assert not found.tables[0].metric.percent
    assert any("all 12 tests" in note for note in found.notes)


def test_less_is_better_where_the_metric_says_so(tmp_path: Path) -> None:
    text = "arm,seed,loss,drift\n" + "".join(
        f"{arm},{k},{x * (1 + 0.01 * k)},{x * (1 + 0.02 * k)}\n"
        for arm, x in (("baseline", 2), ("good", 1))
        for k in range(6)
    )
    loss, drift = of(tmp_path, text).tables
    assert loss.verdict[0].startswith("Better than the baseline: good (-")
    assert drift.verdict[0].startswith("Worse than the baseline: good (-")
    assert of(tmp_path, text, ("drift",), lower=["drift"]).tables[0].verdict[0].startswith("Better than")
    with pytest.raises(UserError, match="lower: there is no metric 'top1'; there are loss, drift"):
        of(tmp_path, text, lower=["top1"])


def course(arm: str, seed: int) -> list[float]:
    numbers = random.Random(f"{arm} {seed}")
    return [0.1 + 0.2 * k + 0.05 * numbers.random() + (0.12 if arm == "sam" else 0) for k in range(4)]


@pytest.mark.parametrize("lower", [False, True])
def test_courses_in_lines_and_in_columns_are_the_same(tmp_path: Path, lower: bool) -> None:
    sign = -1 if lower else 1
    runs = [(arm, seed) for arm in ("baseline", "sam") for seed in range(3)]
    lines = [f"{arm},{seed},{100 * (k + 1)},{sign * y}" for arm, seed in runs for k, y in enumerate(course(arm, seed))]
    random.Random(0).shuffle(lines)
    tall = of(tmp_path, "arm,seed,steps,score\n" + "\n".join(lines), lower=["score"] if lower else [])
    wide = "arm,seed," + ",".join(f"score[{100 * (k + 1)}]" for k in range(4)) + "\n"
    wide += "\n".join(f"{arm},{seed}," + ",".join(str(sign * y) for y in course(arm, seed)) for arm, seed in runs)
    flat = of(tmp_path, wide, lower=["score"] if lower else [])
    for table in (tall.tables[0], flat.tables[0]):
        entries = {entry["arm"]: entry for entry in table.entries}
        assert sorted(entries["sam"]["reached"]["values"]) == sorted(
            sign * course("sam", seed)[-1] for seed in range(3)
        )
        shares = []
        for seed in range(3):
            best = max(course("baseline", seed))
            shares.append(next((0.25 * (k + 1) for k, y in enumerate(course("sam", seed)) if y >= best), math.inf))
        assert entries["sam"]["reach"]["median"] == pytest.approx(sorted(shares)[1])
        assert entries["baseline"]["reach"]["values"] == [1.0] * 3
    assert tall.tables[0].effects == flat.tables[0].effects
    assert [row[:2] for row in tall.tables[0].usage] == [("arm", "seeds"), ("baseline", "3"), ("sam", "3")]


def test_failed_runs_and_missing_seeds_are_told(tmp_path: Path) -> None:
    text = "arm,seed,accuracy,error,cost,note\nbaseline,0,0.5,,10,x\nbaseline,1,0.6,,10,\nbaseline,2,0.61,,12,\n"
    text += "sam,0,0.7,,20,\nsam,1,,out of memory,,\nsam,2,0.9,killed,20,\n\nrandom,0,0.55,,5,y\nrandom,1,0.7,,5,\n"
    found = of(tmp_path, text)
    rows = {row[0]: row[1:] for row in found.tables[0].effects}
    assert list(rows) == ["arm", "baseline", "sam (2 failed)", "random"]
    assert rows["arm"][0] == "accuracy (%)"
    assert rows["sam (2 failed)"][:3] == ("70.00", "+20.00", "")
    assert rows["random"][1] == "+7.50 ± 31.77"
    assert found.tables[0].usage[2:] == [("sam (2 failed)", "1", "2.00"), ("random", "2", "0.50")]
    assert any(note.startswith("random: some seeds of the other arms are missing;") for note in found.notes)
    assert "Not metrics, since they have no number: note." in found.notes


BAD = [
    ("", "has no column arm; its first line has nothing"),
    ("arm,sed,x\n", "has no column seed; its first line has arm, sed, x"),
    ("arm;seed;x\na;0;1\n", "has no column arm; .* it seems to be separated by ';', not by commas"),
    ("arm,seed,x\n", "has no run: only a first line"),
    ("arm,seed,x,x\na,0,1,1\n", "has two columns 'x'"),
    ("arm,seed,x[1],x[1.0]\na,0,1,1\n", "has two columns of x after 1.0 steps"),
    ("arm,seed,x\na,0,1\nb,0\n", "line 3: must have 3 cells, as the first line, got 2"),
    ("arm,seed,x\na,0,1\n\nb,0,abc\n", "line 4, column x: must be a number .*, or empty if a run failed, got 'abc'"),
    ("arm,seed,x\na,0,diverged\nb,0,1\n", "line 2, column x: must be a number .* got 'diverged'"),
    ("arm,seed,x\na,0,1\na,1,nan\n", "line 3, column x: must be a number .* got 'nan'"),
    ("arm,seed,x\na,0,1\na,1,1e300\n", r"line 3, column x: must be a number up to 1e\+150"),
    ("arm,seed,x,cost\na,0,1,-3\n", "line 2, column cost: must be a number of at least 0"),
    ("arm,seed,x\n,0,1\n", "line 2, column arm: must not be empty"),
    ("arm,seed,x\na,,1\n", "line 2, column seed: must not be empty"),
    (
        "arm,seed,x\nb,0,1\na,0,1\na,0,2\n",
        "line 4, column arm: 'a', seed '0' is already in line 3; lines of one run",
    ),
    ("arm,seed,x,steps\na,0,1,5\na,0,2,5\n", "line 3, column arm: 'a', seed '0' is already in line 2"),
    ("arm,seed,x,steps\na,0,1,5\na,0,2,\n", "line 3, column arm: 'a', seed '0' is already in line 2"),
    ("arm,seed,x[1],x[2]\na,0,1,5\na,0,2,6\n", "line 3, column arm: is the same run as in line 2; in this file"),
    ("arm,seed,word\na,0,hello\n", "has no metric: no column has a number"),
    ('arm,seed,x\na,0,"1\n', "line 2: unexpected end of data"),
    ("arm,seed,x\na,0,1\n", "baseline: there is no arm 'baseline'; there are a"),
    ("arm,seed,x,control\nbaseline,0,1,\na,0,1,r\n", "control: there is no arm 'r'; there are baseline, a"),
    ("arm,seed,x,control\nbaseline,0,1,\na,0,1,a\n", "control: arm 'a' is its own"),
    ("arm,seed,x,control\nbaseline,0,1,\na,0,1,baseline\na,1,1,r\nr,0,1,\n", "arm 'a' has two, 'baseline' and 'r'"),
    (
        "arm,seed,x,error\nbaseline,0,1,killed\n",
        "line 2, column error: has a word in a line of every run, here 'killed': all runs have failed",
    ),
    ("arm,seed,x,data\nbaseline,0,1,c\nsam,0,1,d\n", "there is no run of the baseline 'baseline' on 'd'"),
    ("arm,seed,x,budget\nbaseline,0,1,u c\nbaseline,1,1,u\n", "arm 'baseline' appears twice at the budget 'u'"),
]


@pytest.mark.parametrize(("text", "says"), BAD)
def test_bad_files_are_named_with_line_and_column(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        of(tmp_path, text)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_bytes(b"arm,seed\n\xff\xfe,0\n")
    with pytest.raises(UserError, match=r"results\.csv is not a text in UTF-8 \(invalid start byte at byte 9\)"):
        read_results(path)
    with pytest.raises(UserError, match="has no metric 'top9'; it has x"):
        of(tmp_path, "arm,seed,x\na,0,1\n", ("top9",))


def test_a_page_with_plots_and_json_is_written_once(tmp_path: Path) -> None:
    lines = [
        f"{a},{s},{k},{y}" for a in ("baseline", "<b>sam$") for s in range(3) for k, y in enumerate(course(a, s), 1)
    ]
    found = of(tmp_path, "arm,seed,steps,accuracy\n" + "\n".join(lines))
    names = write_analysis(found, tmp_path / "out", "results.csv")
    assert names == [PAGE, JSON, "differences-1.png", "curves-1.png"]
    assert all((tmp_path / "out" / name).stat().st_size > 500 for name in names)
    page = (tmp_path / "out" / PAGE).read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "&lt;b&gt;sam$" in page
    assert "<b>sam" not in page
    assert all(note in page.replace("&#39;", "'") for note in found.notes)
    kept = json.loads((tmp_path / "out" / JSON).read_text())
    assert kept["tables"][0]["arms"][1]["reached"] == found.tables[0].entries[1]["reached"]
    with pytest.raises(UserError, match=r"analysis\.html already exists; give overwrite"):
        write_analysis(found, tmp_path / "out", "results.csv")
    assert write_analysis(found, tmp_path / "out", "results.csv", overwrite=True) == names


def test_a_metric_that_is_logged_less_often_counts_with_its_last_value(tmp_path: Path) -> None:
    text = "arm,seed,steps,loss,acc\n"
    for arm, gain in (("baseline", 0.0), ("sam", 0.1)):
        for seed in range(3):
            text += f"{arm},{seed},1,3.0,{10 + gain}\n{arm},{seed},2,2.0,{20 + gain * (seed + 2)}\n"
            text += f"{arm},{seed},3,{1 - gain * (seed + 1)},\n"
    loss, acc = of(tmp_path, text).tables
    assert acc.entries[1]["reached"]["values"] == [20.2, 20.3, 20.4]
    assert acc.entries[1]["failed"] == []
    assert acc.metric.lower is False
    assert loss.metric.lower is True


def test_names_of_metrics_may_be_anything(tmp_path: Path) -> None:
    """Those of our own figures among them, of top-1 and top-5, and of errors."""
    text = ",arm,Seed,difference,seeds,failed,acc@1,acc@5,error,\n" + "".join(
        f"{n},{arm},{seed}{'.0' * n},{x + seed},{x * seed},{seed},{x},{2 * x},{seed * x},\n"
        for n, (arm, x) in enumerate((("baseline", 1.0), ("sam", 1.5)))
        for seed in range(3)
    )
    found = of(tmp_path, text)
    names = ["difference", "seeds", "failed", "acc@1", "acc@5", "error"]
    assert [table.metric.name for table in found.tables] == names
    assert [table.effects[1][0] for table in found.tables] == ["baseline"] * 6
    assert found.tests == 6
    assert found.tables[-1].metric.lower
    assert of(tmp_path, text, ("acc@1",)).tables[0].entries[1]["reached"]["mean"] == 1.5
    assert write_analysis(found, tmp_path / "page", "it")


def test_budgets_that_share_runs_lose_none(tmp_path: Path) -> None:
    text = "arm,seed,x,budget\n"
    for seed in range(4):
        text += f"baseline,{seed},{1 + 0.1 * seed},u\nbaseline,{seed},{2 - 0.1 * seed},c\n"
        text += f"sam,{seed},{1.5 + 0.2 * seed},c u\nonce,{seed},{1.2 + 0.01 * seed**2},u\n"
    first, second = of(tmp_path, text).tables
    assert [row[0] for row in first.effects] == ["arm", "baseline", "sam", "once"]
    assert [row[0] for row in second.effects] == ["arm", "baseline", "sam"]
    assert first.entries[1]["difference"]["baseline"]["mean"] == pytest.approx(0.65)
    assert second.entries[1]["difference"]["baseline"]["mean"] == pytest.approx(-0.05)
    shared = "arm,seed,x,budget\n" + "".join(
        f"{a},{k},{k * x},u c\n" for a, x in (("baseline", 1), ("b", 2)) for k in range(3)
    )
    tables = of(tmp_path, shared).tables
    assert [len(table.entries) for table in tables] == [2, 1]
    assert tables[1].verdict == ["All other arms have the same runs at the first budget: see there."]


def test_what_is_missing_on_a_data_set_is_told(tmp_path: Path) -> None:
    text = "data,arm,seed,x,f1,control\n"
    for data, seeds in (("a", range(3)), ("b", range(10, 13))):
        for seed in seeds:
            f1 = seed if data == "a" else ""
            rows = [
                ("baseline", 0.1, ""),
                ("sam", 0.3, "r" if data == "a" else "q"),
                ("r" if data == "a" else "z", 0.2, ""),
            ]
            text += "".join(f"{data},{arm},{seed},{seed * x},{f1},{control}\n" for arm, x, control in rows)
    text += "a,q,0,1,1,\n"
    found = of(tmp_path, text)
    assert [table.title for table in found.tables] == ["x, a", "f1, a", "x, b"]
    assert "No run has a value: f1, b." in found.notes
    assert "sam has no control q: x, b." in found.notes
    assert found.notes[0].startswith("Means over 3 seeds")
    alone = of(tmp_path, "arm,seed,x\nbaseline,0,1\nbaseline,1,2\nsam,5,1\nsam,6,1\n")
    assert "sam has no seed in common with its baseline." in alone.notes
    assert not any("tests" in note for note in alone.notes)


def test_differences_are_judged_at_the_scale_of_their_values() -> None:
    """Rounding of large values is no deviation; small values are no zeros."""
    large = paired_difference({k: 1e5 + 0.1 * k + 0.3 for k in range(5)}, {k: 1e5 + 0.1 * k for k in range(5)})
    assert large is not None
    assert (large["p"], large["half_width"]) == (2.0**-4, None)
    values = [3e-13, 4e-13, 5e-13, 3.5e-13]
    small = paired_difference(dict(enumerate(values)), dict.fromkeys(range(4), 1e-13))
    assert small is not None
    assert small["p"] == pytest.approx(float(stats.ttest_1samp([x - 1e-13 for x in values], 0).pvalue))


def test_an_overwriting_page_leaves_no_plot_of_the_old_one(tmp_path: Path) -> None:
    two = "arm,seed,x,y\n" + "".join(f"{a},{k},{k},{k * k}\n" for a in ("baseline", "b") for k in range(3))
    write_analysis(of(tmp_path, two), tmp_path / "page", "it")
    (tmp_path / "page" / "mine.png").write_text("mine")
    write_analysis(of(tmp_path, two, ("x",)), tmp_path / "page", "it", overwrite=True)
    names = sorted(path.name for path in (tmp_path / "page").iterdir())
    assert names == [PAGE, JSON, "differences-1.png", "mine.png"]


@pytest.mark.parametrize("name", ["val_losses", "RMSE", "valLoss", "top1_err", "nll", "WER"])
def test_usual_names_of_metrics_of_which_less_is_better(tmp_path: Path, name: str) -> None:
    assert of(tmp_path, f"arm,seed,{name}\nbaseline,0,1\nsam,0,2\n").tables[0].metric.lower
    with pytest.raises(UserError, match=f"lower and higher: '{name}' is in both"):
        of(tmp_path, f"arm,seed,{name}\nbaseline,0,1\nsam,0,2\n", lower=[name], higher=[name])


def test_seeds_of_64_bits_are_told_apart(tmp_path: Path) -> None:
    """As floats the first of both arms are the same number."""
    baseline, sam = (2**64 - 7, 2, 3), (2**64 - 3, 4, 3)
    lines = [
        f"{arm},{seed},{k}\n" for arm, seeds in (("baseline", baseline), ("sam", sam)) for k, seed in enumerate(seeds)
    ]
    (entry,) = of(tmp_path, "arm,seed,x\n" + "".join(lines)).tables[0].entries[1:]
    assert entry["difference"]["baseline"]["seeds"] == 1


def test_a_course_in_columns_stays_beside_a_column_of_its_end(tmp_path: Path) -> None:
    text = "arm,seed,x,x[1],x[2]\nbaseline,0,5,1,4\nsam,0,6,4,5\n"
    table = of(tmp_path, text).tables[0]
    assert table.curves == {"baseline": [([1.0, 2.0], [1.0, 4.0])], "sam": [([1.0, 2.0], [4.0, 5.0])]}
    assert [entry["reached"]["mean"] for entry in table.entries] == [5, 6]


def test_a_control_may_stand_in_any_line_of_a_course(tmp_path: Path) -> None:
    arms = (("baseline", ""), ("sam", "random"), ("random", "None"))
    lines = [
        f"{arm},{k},{step},{control if step == 1 else ''},{k + step}"
        for arm, control in arms
        for k in (0, 1)
        for step in (1, 2)
    ]
    found = of(tmp_path, "arm,seed,steps,control,x\n" + "\n".join(lines))
    assert set(found.tables[0].entries[1]["difference"]) == {"baseline", "control"}


def test_what_is_not_looked_at_or_ends_early_is_told(tmp_path: Path) -> None:
    lines = [
        f"{arm},0,{step},{'' if arm == 'sam' and step > 10 else step},1"
        for arm in ("baseline", "sam")
        for step in (10, 20, 30)
    ]
    found = of(tmp_path, "arm,seed,steps,test_accuracy,f1\n" + "\n".join(lines))
    assert "Not analysed, since not selected (--metric): f1." in found.about
    assert "The last lines of sam have no value; an earlier one counts: test accuracy." in found.about


def test_an_error_that_is_a_number_and_a_word_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 3, column error: 'OOM' is a word, but other lines have numbers"):
        of(tmp_path, "arm,seed,x,error\nbaseline,0,1,0\nbaseline,1,2,OOM\n")


def test_runs_made_by_hand_need_no_curves() -> None:
    runs = [Run(arm, seed, {"accuracy": value}) for arm, seed, value in (("baseline", "0", 0.5), ("sam", "0", 0.75))]
    (table,) = analyse(runs).tables
    entries = {entry["arm"]: entry for entry in table.entries}
    assert entries["sam"]["difference"]["baseline"]["mean"] == 0.25
    assert entries["sam"]["reach"] is None
