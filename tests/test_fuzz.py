"""That the fuzzer can fail: it finds faults that are planted. And what it has found, so that it stays mended."""

from __future__ import annotations

import time
from dataclasses import fields

import pytest

pytest.importorskip("msgspec")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

import fuzz
from test_rundir import row
from training import single_thread

from batchkern import records, strategies

one_thread = single_thread()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(fuzz, "SHRINKING", 2.0)
    monkeypatch.setattr(fuzz, "plot_run", lambda directory: None)


def test_text_that_is_read_without_care(monkeypatch):
    assert fuzz.fuzz("text", inputs=40)[1] == []
    monkeypatch.setattr(strategies, "_value", lambda node: node.value)
    tried, found = fuzz.fuzz("text", inputs=40)
    assert any(one.startswith(f"AttributeError at {__file__}") and "\n  ('text', [(" in one for one in found), found
    assert tried >= 40


def test_metrics_that_are_read_without_care(monkeypatch):
    def check(value, schema):
        assert "settings" in value or sum(value[key] for key in row(0)) is not None

    monkeypatch.setattr(records, "check", check)
    _, found = fuzz.fuzz("metrics", inputs=30)
    assert any("Error at" in one and "\n  ('metrics', ([((" in one for one in found), found


def test_preprocessing_that_is_read_without_care(monkeypatch):
    assert fuzz.fuzz("preprocessing", inputs=100)[1] == []
    monkeypatch.setattr(
        records, "made", lambda value, cls: cls(**{field.name: value[field.name] for field in fields(cls)})
    )
    _, found = fuzz.fuzz("preprocessing", inputs=100)
    assert any("\n  ('preprocessing', ([((" in one for one in found), found


def test_a_hang_is_found(monkeypatch):
    monkeypatch.setattr(fuzz, "LIMIT", 0.4)
    monkeypatch.setattr(strategies, "_value", lambda node: time.sleep(60))
    _, found = fuzz.fuzz("text", inputs=30)
    assert [one.partition(":")[0] for one in found] == ["it takes longer than 0.4 s"]


FOUND = [
    ("text", [("random(end=", 1), ("-", 9000), ("1)", 1)]),
    ("text", [("augmentation(gaussian=0x", 1), ("f", 9000), ("1)", 1)]),
    ("text", [("random(end=1", 1), ("0", 400), ("1)", 1)]),
]
"""Rows that the fuzzer printed, where no table of the module's own tests has them."""


@pytest.mark.parametrize(("target", "value"), FOUND)
def test_what_was_found_stays_mended(tmp_path, target, value):
    _, check = fuzz.TARGETS[target](tmp_path)
    check(value)
