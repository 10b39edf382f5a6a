"""What a comparison shows: its tables, its verdict, its files, and a page that needs nothing but itself."""

from __future__ import annotations

import base64
import csv
import json
import re
from html.parser import HTMLParser

import pytest
from test_statistics import run

pytest.importorskip("scipy")
pytest.importorskip("statsmodels")
pytest.importorskip("matplotlib")

from batchkern.analysis import analyse, read_results
from batchkern.compare import report
from batchkern.compare.report import CSV, REPORT, REPORT_FILES, costs, effects, notes, verdict, write_report
from batchkern.compare.summary import summarise
from batchkern.compare.tables import about_tests
from batchkern.rundir import METRICS
from batchkern.strategies import Trimming

SEEDS = range(6)
COUNTS = ("updates", "samples_seen", "samples_forward", "samples_backward", "samples_kept")
LOSSES = ("lr", "train_loss", "train_objective", "train_accuracy", "test_accuracy_plain", "test_loss")
FIGURES = dict.fromkeys(COUNTS, 100) | dict.fromkeys(LOSSES, 0.5)
"""What a row of metrics.jsonl has beside what these tests look at."""


@pytest.fixture(autouse=True)
def _made_up_arms(monkeypatch):
    """good, bad and idle are no strategies."""
    monkeypatch.setattr(report, "parse", lambda arm, passive: [Trimming()] if arm == "good" else [])


def results(tmp_path=None, **changes):
    """A strategy that gains 10 points, as its control does; one that loses; one that does nothing; one that failed."""
    accuracies = {
        "baseline": [0.80, 0.81, 0.82, 0.80, 0.81, 0.82],
        "good": [0.90, 0.91, 0.92, 0.905, 0.915, 0.92],
        "bad": [0.70, 0.71, 0.72, 0.70, 0.715, 0.73],
        "idle": [0.81, 0.80, 0.82, 0.80, 0.80, 0.83],
        "random<of good>": [0.90, 0.91, 0.92, 0.91, 0.91, 0.92],
    }
    runs = [
        outcome(arm, seed, values[seed], passive_updates=3 if arm == "good" else 0)
        for arm, values in accuracies.items()
        for seed in SEEDS
    ]
    runs += [outcome("bad", seed, 0.805, epochs=4) for seed in SEEDS]
    runs += [run("broken", seed, [0.1], error="the loss <script>") | {"directory": "nowhere"} for seed in SEEDS]
    arms = [*accuracies, "broken"]
    settings = {
        "model": "cnn",
        "train": {"name": "digits", "rows": 1438, "classes": 10},
        "test": {"rows": 359},
        "noise": 0.1,
        "budgets": ["updates", "cost"],
        "arms": arms,
        "seeds": list(SEEDS),
        "controls": {"good": "random<of good>"},
        "arm_epochs": {arm: {"updates": 2, "cost": 4 if arm == "bad" else 2} for arm in arms},
    } | changes
    environment = {"batchkern": "0", "torch": "2", "python": "3", "device": "x", "jobs": 2, "threads_per_run": 1}
    found = {"settings": settings, "environment": environment | {"cores": 2}, "runs": runs}
    if tmp_path is not None:
        for o in runs:
            if not o["error"]:
                (tmp_path / o["directory"]).mkdir(parents=True)
                (tmp_path / o["directory"] / METRICS).write_text("\n".join(map(json.dumps, o["rows"])))
    return found | {"summary": summarise(settings, runs)}


def outcome(arm, seed, accuracy, *, epochs=2, passive_updates=0):
    made = run(arm, seed, [0.3] * (epochs - 1) + [accuracy], epochs=epochs, passive_updates=passive_updates)
    rows = [
        FIGURES
        | made["final"]
        | {"epoch": e, "updates": 10 * (e + 1), "seconds": e + 1.0, "test_accuracy": made["curve"]["test_accuracy"][e]}
        | {"samples_seen": 80 * (e + 1), "samples_kept": 80 * (e + 1) - (10 * e if arm == "good" else 0)}
        | {"kept_overlap": 0.5, "kept_loss": [0.1, 0.2, 0.3], "dropped_loss": None}
        for e in range(epochs)
    ]
    return made | {"directory": f"{arm}/{epochs}/{seed}", "rows": rows}


def test_verdicts_are_those_of_corrected_tests():
    said = verdict(results(), "updates")
    assert said == [
        "Better than the baseline: good (+10.17 ± 0.27), random<of good> (+10.17 ± 0.43).",
        "Worse than the baseline: bad (-9.75 ± 0.44).",
        "No difference found from the baseline: idle.",
        "No difference found from its random control: good.",
    ]
    nearly = results()
    for entry in nearly["summary"]:
        if entry["arm"] == "idle":
            entry["difference"]["baseline"] |= {"p": 0.02, "p_corrected": 0.08}
    assert verdict(nearly, "updates") == said
    # A second budget tells of those alone that train for another time in it.
    assert verdict(results(), "cost") == [
        "No difference found from the baseline: bad.",
        "All other arms have the same training as for the first budget: see there.",
    ]
    alike = results()
    alike["settings"]["arm_epochs"]["bad"]["cost"] = 2
    assert verdict(alike, "cost")[0].startswith("For this budget, every arm has the same training")


def test_the_table_of_effects():
    rows = {row[0]: row[1:] for row in effects(results(), "updates")}
    assert rows["arm"] == ("test accuracy (%)", "- baseline", "p", "- control", "p")
    assert rows["baseline"] == ("81.00 ± 0.94", "", "", "", "")
    # Student's t of 5 degrees is 2.5706; the differences are .1 four times, .105 and .105.
    assert rows["good"][:3] == ("91.17 ± 0.86", "+10.17 ± 0.27", "<0.001")
    assert any("all 6 tests" in note for note in notes(results()))
    assert rows["good"][3:] == ("+0.00 ± 0.33", "1.00")
    assert rows["idle"][2] == "1.00"
    assert rows["broken (6 failed)"] == ("-", "", "", "", "")
    assert [row[0] for row in effects(results(), "cost")] == ["arm", "baseline", "bad"]


def test_the_table_of_costs():
    rows = {row[0]: row[1:] for row in costs(results(), "updates")}
    assert rows["arm"] == ("reach", "gap (points)", "epochs", "updates", "passive", "cost", "seconds")  # of old results
    assert rows["good"] == ("2.0 (6/6)", "8.83 ± 0.86", "2", "20", "3", "1.00", "3.5")
    assert rows["bad"][:2] == ("never (0/6)", "28.75 ± 1.23")
    assert rows["bad"][4] == ""
    assert rows["broken (6 failed)"] == ("",) * 7
    assert {row[0]: row[1:] for row in costs(results(), "cost")}["bad"][2:] == ("4", "40", "2.00", "3.5")


def test_notes_warn_of_few_seeds():
    assert any("6 seeds" in note for note in notes(results()))
    assert not any("are few" in note for note in notes(results()))
    assert any("3 seeds are few" in note for note in notes(results(seeds=[0, 1, 2])))
    assert not any("paired" in note for note in notes(results(seeds=[0])))


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.links, self.images, self.cells, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [attrs[key] for key in ("src", "href") if key in attrs]
        if tag == "img":
            self.images.append(attrs)
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] in (["td"], ["th"]):
            self.cells.append(data)


def test_the_page_stands_alone(tmp_path):
    found = results(tmp_path)
    write_report(tmp_path, found)
    text = (tmp_path / REPORT).read_text()
    page = Page(text)
    assert page.open == []
    assert len(page.images) == 5
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    pngs = [base64.b64decode(link.partition(",")[2]) for link in page.links]
    assert all(png.startswith(b"\x89PNG") for png in pngs)
    assert sorted(pngs) == sorted(path.read_bytes() for path in tmp_path.glob("*.png"))
    assert not re.search(r"https?://|@import|url\(", text)
    assert "<script" not in text
    assert "<dt><code>trimming</code></dt><dd>The loss is the mean over the hardest fraction of each batch" in text
    assert "1,438 training images and 359 test images" in text
    assert "10% of the" in text
    assert "the loss &lt;script&gt;" in text
    for budget in ("updates", "cost"):
        for rows in (effects(found, budget), costs(found, budget)):
            assert [cell for row in rows for cell in row if cell] != []
            assert set(page.cells) >= {cell for row in rows for cell in row if cell}
        for sentence in verdict(found, budget):
            assert sentence.replace("<", "&lt;").replace(">", "&gt;") in text
    assert set(REPORT_FILES) - {path.name for path in tmp_path.iterdir()} == {"accuracy-epochs.png"}


def test_a_line_of_csv_for_each_run(tmp_path):
    found = results(tmp_path)
    write_report(tmp_path, found)
    with open(tmp_path / CSV, newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(found["runs"])
    for line, o in zip(lines, found["runs"], strict=True):
        assert (line["arm"], int(line["epochs"]), int(line["seed"])) == (o["arm"], o["epochs"], o["seed"])
        assert line["error"] == (o["error"] or "")
        assert line["test_accuracy"] == ("" if o["error"] else str(o["final"]["test_accuracy"]))
    assert "kept_loss" not in lines[0]


def test_the_csv_of_a_comparison_gives_its_very_tables(tmp_path):
    found_by_us = results()
    path = tmp_path / CSV
    path.write_text(report._csv(found_by_us))
    found = analyse(read_results(path))
    assert [table.effects for table in found.tables] == [effects(found_by_us, b) for b in ("updates", "cost")]
    assert found.tests == report._tests(found_by_us)
    ended = "\n".join(line for line in path.read_text().splitlines() if "script" not in line)
    path.write_text(ended)
    assert not any("without a number" in note for note in analyse(read_results(path)).notes)
    assert found.tables[0].verdict == [s.replace("random control", "control") for s in verdict(found_by_us, "updates")]
    assert [row[-1] for row in found.tables[0].usage] == [row[-2] for row in costs(found_by_us, "updates")]


def test_the_correction_names_the_number_of_tests():
    assert "for the one test of this comparison" in about_tests(3, 1, "Pairs share a seed.")[0]
    assert "for all 2 tests of this comparison" in about_tests(3, 2, "Pairs share a seed.")[0]
