"""What reproductions found, as Markdown."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("jinja2")

from batchkern.bench_report.comparisons import reproduced
from batchkern.bench_report.markers import check, rewrite
from batchkern.bench_report.report import page as whole_page
from batchkern.bench_report.results import load
from batchkern.recipes import RECIPES
from batchkern.recipes.reproduction import record, reproduction


@pytest.fixture
def file(tmp_path):
    """Of two rows that share a baseline: one as published, one whose difference lies outside its interval."""
    group = [RECIPES["passive/cifar10-resnet56-g10"], RECIPES["passive/cifar10-resnet56-g1000"]]
    figures = {"baseline": (0.80, 0.004), group[0].strategy: (0.808, 0.003), group[1].strategy: (0.797, 0.002)}
    entries = [
        {
            "arm": arm,
            "test_accuracy": {"mean": mean, "half_width": half},
            "difference": {} if arm == "baseline" else {"baseline": {"mean": mean - 0.8, "half_width": half}},
        }
        for arm, (mean, half) in figures.items()
    ]
    results = {"summary": entries, "runs": [], "settings": {"train": {"rows": 2000}, "test": {"name": "digits"}}}
    path = tmp_path / "some-machine" / "2026-11-29-abc1234-passive.json"
    path.parent.mkdir()
    rows = [reproduction(group, results)]
    path.write_bytes(record("passive/cifar10-*", 0.04, "none", rows, {"torch": "2.11.0", "threads_per_run": 1}))
    return path


TABLE = """\
`passive/cifar10-*` at scale 0.04: 250 epochs of 2,000 images, 5 seeds.

| recipe (test accuracy, %) | arm | published | measured | published difference | measured difference |
| --- | --- | --- | --- | --- | --- |
| (resnet56, uoft-cs/cifar10) | `baseline` | 93.4 | 80.00 ± 0.40 | - | - |
| passive/cifar10-resnet56-g10 | `passive(every=10)` | 94.1 | 80.80 ± 0.30 | +0.70 | +0.80 ± 0.30 |
| passive/cifar10-resnet56-g1000 | `passive(every=1000)` | 93.6 | 79.70 ± 0.20 | +0.20 | -0.30 ± 0.20 |

The published difference lies within the interval of the measured one (95 %, Student's t, paired by seed) in 1 of 2 \
rows, and zero in 0: where it does, the runs do not tell an effect from chance."""


def test_a_reproduction_is_shown_beside_what_was_published(file):
    assert reproduced(load(file)) == TABLE
    assert TABLE in whole_page([load(file)])


def test_a_page_has_it_between_markers(file, tmp_path):
    page = tmp_path / "PAGE.md"
    page.write_text(f"<!-- figures: reproduced some-machine/{file.name} -->\n<!-- end of figures -->\n")
    assert rewrite(page) == check(page) == []
    assert f"\n{TABLE}\n\nsome-machine, 1 thread a run, torch 2.11.0, commit abc1234, 2026-11-29." in page.read_text()
    content = json.loads(file.read_bytes())
    content["groups"][0]["rows"][1]["measured"][0] = 81
    file.write_text(json.dumps(content))
    assert len(check(page)) == 1
