"""What is a file of results, what is none, and what a file says about its machine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import small_results as small

pytest.importorskip("jinja2")

from batchkern.bench_report.results import facts, load, load_all, read_text
from batchkern.errors import UserError


def test_facts_name_the_machine(tmp_path):
    path = small.write(tmp_path / "x.json")
    assert facts(load(path)) == small.FACTS
    rates = {
        "copy": {"median": 1.234e10, "p20": 1e10, "p80": 1.5e10},
        "matmul": {"float32": {"median": 1.4e11}, "bfloat16": {"median": 9.89e14}},
    }
    small.write(path, {"dirty": True, "threads": 1}, rates=rates, failed=["one", "two"])
    assert facts(load(path)) == (
        "A Processor, 1 thread, torch 2.11.0, commit abc1234 with changes, 2026-11-22, 2 cases failed; "
        "copies 12.3 GB/s (10.0 GB/s - 15.0 GB/s); "
        "multiplies float32 matrices at 140 Gflop/s; multiplies bfloat16 matrices at 989 Tflop/s"
    )


def test_facts_tell_of_an_interrupted_run_of_huge_pages_and_of_the_load(tmp_path):
    path = tmp_path / "x.json"
    machine = small.MACHINE | {"load_average": [1.24, 0, 0], "load_average_at_end": [2.0, 0, 0], "huge_pages": "never"}
    path.write_text(json.dumps({"machine": machine, "complete": False}))
    assert facts(load(path)) == f"{small.FACTS}, interrupted; huge pages: never; load 1.2 to 2.0"


def test_facts_of_a_gpu_and_of_a_plan(tmp_path):
    path = tmp_path / "2026-11-22-abc1234.json"
    path.write_text(json.dumps({"machine": {"device": "cuda", "gpu": "NVIDIA H200", "cpu": "Host", "threads": 8}}))
    assert facts(load(path)) == "NVIDIA H200, commit abc1234, 2026-11-22"
    plan = tmp_path / "planned.json"
    plan.write_text(json.dumps({"machine": {"device": "cuda", "gpu": "NVIDIA H200", "planned": True}}))
    assert facts(load(plan)) == "NVIDIA H200, not measured yet"
    assert load(plan).date < load(path).date


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ('{"machine": {"device": ' + "9" * 5_000 + "}}", "is no JSON"),
        ("[]", "is no file of results"),
        ('{"rows": []}', "is no file of results"),
        ('{"machine": {"cpu": "x"}, "rows": []}', "is no file of results"),
        ('{"machine": {"device": "cpu"}, "operations": {}}', "is damaged: operations must be a list"),
        (
            '{"machine": {"device": "cpu"}, "operations": [{"op": "f", "shape": {}}]}',
            "row 0 of operations has no 'variant'",
        ),
        ('{"machine": {"device": "cpu"}, "growth": [3]}', "row 0 of growth has no 'op'"),
        (
            '{"machine": {"device": "cpu"}, "operations": [{"op": "f", "shape": {}, "variant": "ours", "time": {}}]}',
            "time of row 0 of operations has no median",
        ),
        (
            '{"kind": "batchkern token selection", "settings": {}, "arms": [{"noise": 0, "arm": "all"}]}',
            "row 0 of arms has no 'flops'",
        ),
    ],
)
def test_what_is_no_file_of_results(tmp_path, content, words):
    path = tmp_path / "some.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"some\.json is ") as told:
        load(path)
    assert words in str(told.value)


def test_lists_may_be_missing_or_null(tmp_path):
    results = load(small.write(tmp_path / "x.json", operations=None))
    assert results.rows("operations") == results.rows("growth") == []


def test_folders_are_searched_and_the_newest_comes_first(tmp_path):
    old = small.write(tmp_path / "m" / "old.json", {"date": "2025-01-01T00:00:00+00:00"})
    new = small.write(tmp_path / "n" / "new.json")
    stamped = tmp_path / "2026-01-02-abc1234.json"
    stamped.write_text('{"machine": {"device": "cpu"}}')
    (tmp_path / "m" / "other.json").write_text("{}")
    found, left_out = load_all([tmp_path])
    assert [results.path for results in found] == [new, stamped, old]
    assert len(left_out) == 1
    assert "other.json is no file of results" in left_out[0]
    assert [results.path for results in load_all([old, tmp_path / "n"])[0]] == [new, old]
    with pytest.raises(UserError, match="other.json is no file of results"):
        load_all([tmp_path / "m" / "other.json"])


def test_what_might_never_end_is_not_read(tmp_path):
    """A pipe without a writer, a device without an end."""
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "device.json").symlink_to("/dev/zero")
    good = small.write(tmp_path / "m" / "good.json")
    found, left_out = load_all([tmp_path])
    assert [results.path for results in found] == [good]
    assert [sentence.rpartition("/")[2] for sentence in left_out] == [
        f"{name}.json cannot be read: it is not a regular file" for name in ("device", "pipe")
    ]
    for name in ("pipe.json", "device.json", "folder.json"):
        with pytest.raises(UserError, match="cannot be read: (it is not a regular file|Is a directory)"):
            read_text(tmp_path / name)


def test_a_page_that_is_no_text(tmp_path):
    (tmp_path / "PAGE.md").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "PAGE.md", Path("a\0b")):
        with pytest.raises(UserError, match="cannot be read: it is no text in UTF-8"):
            read_text(path)


def test_nothing_found(tmp_path):
    with pytest.raises(UserError, match=f"no file of results in {tmp_path}"):
        load_all([tmp_path])
    with pytest.raises(UserError, match=r"nowhere\.json cannot be read: No such file"):
        load_all([tmp_path / "nowhere.json"])
