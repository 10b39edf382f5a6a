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

from batchkern.analysis import JSON, PAGE, Analysis, analyse, read_results, write_analysis
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
    text = "arm,seed,loss,wer\n" + "".join(
        f"{arm},{k},{x * (1 + 0.01 * k)},{x * (1 + 0.02 * k)}\n"
        for arm, x in (("baseline", 2), ("good", 1))
        for k in range(6)
    )
    loss, wer = of(tmp_path, text).tables
    assert loss.verdict[0].startswith("Better than the baseline: good (-")
    assert wer.verdict[0].startswith("Worse than the baseline: good (-")
    assert of(tmp_path, text, ("wer",), lower=["wer"]).tables[0].verdict[0].startswith("Better than")
    with pytest.raises(UserError, match="lower: there is no metric 'top1'; there are loss, wer"):
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
    wide = "arm,seed," + ",".join(f"score@{100 * (k + 1)}" for k in range(4)) + "\n"
    wide += "\n".join(f"{arm},{seed}," + ",".join(str(sign * y) for y in course(arm, seed)) for arm, seed in runs)
    flat = of(tmp_path, wide, lower=["score"] if lower else [])
    for table in (tall.tables[0], flat.tables[0]):
        entries = {entry["arm"]: entry for entry in table.entries}
        assert sorted(entries["sam"]["score"]["values"]) == sorted(sign * course("sam", seed)[-1] for seed in range(3))
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
    assert found.tables[0].usage[2:] == [("sam (2 failed)", "1", "1.88"), ("random", "2", "0.47")]
    assert any(note.startswith("Of random, sam not all 3 seeds have ended") for note in found.notes)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no column arm; its first line has nothing"),
        ("arm,sed,x\n", "has no column seed; its first line has arm, sed, x"),
        ("arm,seed,x\n", "has no run: only a first line"),
        ("arm,seed,x,x\na,0,1,1\n", "has two columns 'x'"),
        ("arm,seed,x\na,0,1\nb,0\n", "line 3: must have 3 cells, as the first line, got 2"),
        (
            "arm,seed,x\na,0,1\n\nb,0,abc\n",
            "line 4, column x: must be a number, or empty where a run failed, got 'abc'",
        ),
        ("arm,seed,x\na,0,nan\n", "line 2, column x: must be a number, .* got 'nan'"),
        ("arm,seed,x,cost\na,0,1,much\n", "line 2, column cost: must be a number"),
        ("arm,seed,x\n,0,1\n", "line 2, column arm: must not be empty"),
        ("arm,seed,x\na,,1\n", "line 2, column seed: must not be empty"),
        (
            "arm,seed,x\na,0,1\na,0,2\n",
            "line 3: arm 'a', seed '0' stands in line 2 already; a run with several lines needs",
        ),
        ("arm,seed,x,steps\na,0,1,5\na,0,2,5\n", "line 3: arm 'a', seed '0' stands in line 2 already"),
        ("arm,seed,word\na,0,hello\n", "has no metric: a column of numbers beside arm, seed, word"),
        ('arm,seed,x\na,0,"1\n', "line 2: unexpected end of data"),
        ("arm,seed,x\na,0,1\n", "baseline: there is no arm 'baseline'; there are a"),
        ("arm,seed,x,control\nbaseline,0,1,r\n", "control: there is no arm 'r'; there are baseline"),
        ("arm,seed,x,error\nbaseline,0,1,killed\n", "no run has a metric: all have failed"),
        ("arm,seed,x,data\nbaseline,0,1,c\nsam,0,1,d\n", "there is no run of the baseline 'baseline' on 'd'"),
        ("arm,seed,x,budget\nbaseline,0,1,u c\nbaseline,1,1,u\n", "arm 'baseline' is twice in the budget 'u'"),
    ],
)
def test_bad_files_are_named_with_line_and_column(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        of(tmp_path, text)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_bytes(b"arm,seed\n\xff\xfe,0\n")
    with pytest.raises(UserError, match=r"results\.csv is no text in UTF-8 \(invalid start byte at byte 9\)"):
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
    assert kept["tables"][0]["arms"][1]["accuracy"] == found.tables[0].entries[1]["accuracy"]
    with pytest.raises(UserError, match=r"analysis\.html is there; give overwrite to replace it"):
        write_analysis(found, tmp_path / "out", "results.csv")
    assert write_analysis(found, tmp_path / "out", "results.csv", overwrite=True) == names
