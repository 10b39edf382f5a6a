"""Blocks of a page: found, filled in, out of date, wrong; and a newer file beside the one that they name."""

from __future__ import annotations

import json

import pytest
import small_results as small
from small_results import SHAPE, row

pytest.importorskip("jinja2")

from batchkern.bench_report import markers
from batchkern.bench_report.markers import blocks, check, rewrite
from batchkern.errors import UserError

OP = "trimmed_cross_entropy"
TABLE = """
| operation | shape | ours | of the floor | peak memory |
| --- | --- | --- | --- | --- |
| `trimmed_cross_entropy` | rows 4,096, classes 1,000, float32, keep 0.2 | 2.00 ms | 50 % | 131 MB |

A Processor, 2 threads, torch 2.11.0, commit abc1234, 2026-11-22. [JSON](results/a.json)
"""
BEGIN, END = "<!-- figures: operations results/a.json -->", "<!-- end of figures -->"


@pytest.fixture
def page(tmp_path):
    """A page of two blocks, each with a file."""
    small.write(tmp_path / "results" / "a.json", operations=[row(OP, SHAPE, "ours", 2e-3)])
    accuracy = [{"op": "soft_label_kl", "perturbation": 0.1, "classes": 10, "variant": "ours", "error": 1e-8}]
    small.write(tmp_path / "results" / "b.json", accuracy=accuracy)
    page = tmp_path / "PAGE.md"
    page.write_text(
        f"# Title\n\n{BEGIN}\nold\n{END}\n\nWords.  \n<!-- figures: accuracy results/b.json -->\n{END}\nThe end"
    )
    return page


def test_blocks_are_filled_in_and_nothing_else_changes(page):
    assert len(check(page)) == 2
    assert rewrite(page) == check(page) == []
    text = page.read_text()
    assert text.startswith(
        f"# Title\n\n{BEGIN}\n{TABLE}\n{END}\n\nWords.  \n<!-- figures: accuracy results/b.json -->\n\n`soft"
    )
    assert text.endswith(f" [JSON](results/b.json)\n\n{END}\nThe end")
    rewrite(page)
    assert page.read_text() == text


def test_a_block_is_out_of_date_once_its_file_or_itself_changes(page):
    rewrite(page)
    text = page.read_text()
    page.write_text(text.replace("2.00 ms", "1.00 ms"))
    said = f"{page}, line 3: the figures are not those of results/a.json; run batchkern bench report --readme {page}"
    assert check(page) == [said]
    page.write_text(text)
    small.write(page.parent / "results" / "a.json", operations=[row(OP, SHAPE, "ours", 3e-3)])
    assert check(page) == [said]
    page.write_text(text.replace(f"\n\n{END}\n\nWords", f"\n{END}\n\nWords"))
    assert check(page) == [said]


NEWER = {"date": "2026-11-23T04:00:00+00:00"}


@pytest.mark.parametrize(
    ("machine", "times", "found"),
    [
        (NEWER, [2e-3], True),
        ({"date": "2026-11-22T05:00:01Z"}, [2e-3], True),
        ({"date": "2026-11-22T06:30:00+02:00"}, [2e-3], False),
        ({}, [2e-3], False),
        ({"date": "2026-11-21T23:00:00+00:00"}, [2e-3], False),
        (NEWER | {"quick": True}, [2e-3], False),
        (NEWER, [None], False),
        (NEWER, [], False),
    ],
)
def test_a_newer_file_with_such_figures_is_to_be_named(page, machine, times, found):
    rewrite(page)
    (page.parent / "results" / "no.json").write_text("[]")
    rows = [row(OP, SHAPE, "ours", time) for time in times]
    small.write(page.parent / "results" / "c.json", machine, operations=rows)
    said = (
        f"{page}, line 3: results/a.json is older than results/c.json, which has figures for operations too: name that"
    )
    assert check(page) == rewrite(page) == [said] * found


def test_what_was_measured_comes_in_place_of_what_was_planned(tmp_path):
    plan = row(OP, SHAPE, "ours", None, target_s=1e-3)
    (tmp_path / "planned.json").write_text(
        json.dumps({"machine": {"device": "cuda", "planned": True}, "operations": [plan]})
    )
    page = tmp_path / "PAGE.md"
    page.write_text(f"<!-- figures: planned planned.json -->\n{END}\n")
    assert rewrite(page) == []
    assert "| 1.00 ms | 1.00 ms | not yet measured |" in page.read_text()
    small.write(
        tmp_path / "measured.json", {"device": "cuda"}, operations=[row(OP, SHAPE, "ours", 2e-3, target_s=1e-3)]
    )
    assert ["planned.json is older than measured.json" in sentence for sentence in rewrite(page)] == [True]


@pytest.mark.parametrize("changes", [{"dirty": True}, {"quick": True}, {"complete": False}, {"rows": 1}], ids=str)
def test_a_run_that_is_no_full_measurement_is_not_newer(page, changes):
    both = [row(OP, SHAPE, "ours", 2e-3), row(OP, {"rows": 8, "classes": 10}, "ours", 2e-3)]
    small.write(page.parent / "results" / "a.json", operations=both)
    rewrite(page)
    newer = {"date": "2026-11-30T00:00:00+00:00"}
    lists = {"operations": both[: changes.pop("rows", 2)], "complete": changes.pop("complete", True)}
    small.write(page.parent / "results" / "new.json", newer | changes, **lists)
    assert check(page) == []
    small.write(page.parent / "results" / "new.json", newer, operations=both)
    assert len(check(page)) == 1


@pytest.mark.parametrize("other", [{"threads": 1}, {"huge_pages": "never"}], ids=str)
def test_a_file_of_other_settings_is_not_newer(page, other):
    path = page.parent / "results" / "a.json"
    content = json.loads(path.read_text())
    content["machine"] |= {"huge_pages": "madvise"}
    path.write_text(json.dumps(content))
    rewrite(page)
    rows = [row(OP, SHAPE, "ours", 2e-3)]
    newer = {"date": "2026-11-30T00:00:00+00:00", "commit": "abc1235", "huge_pages": "madvise"}
    small.write(page.parent / "results" / "other.json", newer | other, operations=rows)
    assert check(page) == []
    small.write(page.parent / "results" / "same.json", newer, operations=rows)
    assert ["results/a.json is older than results/same.json" in sentence for sentence in check(page)] == [True]


def test_a_file_of_another_release_of_torch_is_not_newer(page):
    rewrite(page)
    rows = [row(OP, SHAPE, "ours", 2e-3)]
    newer = {"date": "2026-11-30T00:00:00+00:00", "commit": "abc1235"}
    small.write(page.parent / "results" / "other.json", {**newer, "torch": "2.15.0+cpu"}, operations=rows)
    assert check(page) == []
    small.write(page.parent / "results" / "same.json", {**newer, "torch": "2.11.1"}, operations=rows)
    assert ["results/a.json is older than results/same.json" in sentence for sentence in check(page)] == [True]


def test_comparisons_of_other_data_are_not_newer(tmp_path, monkeypatch):
    monkeypatch.setitem(markers.KINDS, "strategies", lambda results, budget: budget)
    page = tmp_path / "PAGE.md"
    names = {"2026-11-21-abc1234-compare.json": "digits", "2026-11-22-abc1234-compare.json": "cifar"}
    for name, data in names.items():
        settings = {"train": {"name": data}, "model": "cnn", "noise": 0.0, "budgets": ["cost"]}
        content = {"kind": "batchkern comparison", "settings": settings, "environment": {"torch": "2"}, "summary": []}
        (tmp_path / name).write_text(json.dumps(content))
    page.write_text("".join(f"<!-- figures: strategies {name} cost -->\n{END}\n" for name in names))
    assert rewrite(page) == []
    later = tmp_path / "2026-11-23-abc1234-compare.json"
    later.write_text(json.dumps(content))
    assert [sentence.split(":")[0] for sentence in check(page)] == [f"{page}, line 8"]
    assert later.name in check(page)[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"\n{BEGIN}\nx", "line 2: the figures that begin here do not end"),
        (f"{BEGIN}\n{BEGIN}\n{END}", "line 2: figures begin before those of line 1 end"),
        (f"{BEGIN}\n{END}\n{END}", "line 3: figures end that did not begin"),
        (
            f"<!-- figures: operation results/a.json -->\n{END}",
            "line 1: figures must be one of operations, .* got 'operation'",
        ),
        (f"<!-- figures:  -->\n{END}", "line 1: figures must be one of operations, .* got ''"),
        (f"<!-- figures: operations -->\n{END}", "line 1: operations is followed by FILE, got ''"),
        (f"<!-- figures: operations results/a.json x -->\n{END}", "line 1: operations is followed by FILE, got"),
        (f"<!-- figures: strategies results/a.json -->\n{END}", "line 1: strategies is followed by FILE BUDGET"),
        (f"<!-- figures: strategies results/a.json cost -->\n{END}", "line 1: .*a.json has nothing for strategies"),
        (f"<!-- figures: growth results/a.json -->\n{END}", "line 1: .*a.json has nothing for growth"),
        (f"<!-- figures: operations results/no.json -->\n{END}", "results/no.json cannot be read: No such file"),
        (f"<!-- figures: operations PAGE.md -->\n{END}", "PAGE.md is no JSON"),
        (f"<!--figures: operations results/a.json-->\n{END}", "line 1: a marker is a line of its own"),
        (f"{BEGIN} \n{END}", "line 1: a marker is a line of its own"),
        (f"{BEGIN}\n<!-- end of the figures -->", "line 2: a marker is a line of its own"),
    ],
)
def test_wrong_markers_are_told_and_change_nothing(page, text, words):
    good = page.read_text()
    page.write_text(f"{text}\n{good}" if text.endswith(END) else text)
    before = page.read_text()
    for does in (check, rewrite):
        with pytest.raises(UserError, match=words):
            does(page)
        assert page.read_text() == before


def test_quick_runs_are_not_quoted(page):
    small.write(page.parent / "results" / "a.json", {"quick": True}, operations=[row(OP, SHAPE, "ours", 2e-3)])
    with pytest.raises(UserError, match="line 3: .*a.json is of a quick run"):
        rewrite(page)


def test_blocks_know_where_they_are(page):
    found = blocks(page, page.read_text())
    assert [(block.line, block.kind, block.file, block.inside) for block in found] == [
        (3, "operations", "results/a.json", ["old"]),
        (8, "accuracy", "results/b.json", []),
    ]


def test_no_page(tmp_path):
    with pytest.raises(UserError, match=r"no\.md cannot be read: No such file"):
        check(tmp_path / "no.md")
