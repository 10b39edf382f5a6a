"""Files of a run and of a comparison that are damaged, or of something else: each is one sentence."""

import json
import re

import pytest
import torch
from test_rundir import row

pytest.importorskip("msgspec")

from batchkern import records


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"epoch": None}, "Expected `int`, got `null` - at `$.epoch`"),
        ({"epoch": 1}, "row 0 is of epoch 1"),
        ({"epoch": -1}, "Expected `int` >= 0 - at `$.epoch`"),
        ({"updates": 1.5}, "Expected `int`, got `float`"),
        ({"updates": True}, "Expected `int`, got `bool`"),
        ({"lr": "0.1"}, "Expected `float`, got `str`"),
        ({"test_accuracy": []}, "Expected `float`, got `array`"),
        ({"kept_loss": 1.0}, "Expected `array | null`, got `float`"),
        ({"kept_loss": ["a"]}, "Expected `float`, got `str` - at `$.kept_loss[0]`"),
    ],
)
def test_rows_of_metrics(tmp_path, change, sentence):
    (tmp_path / "metrics").write_text(json.dumps(row(0) | change) + "\n")
    with pytest.raises(ValueError, match=re.escape(sentence)):
        records.read_metrics(tmp_path / "metrics")


def test_figures_of_a_strategy_of_the_users_are_kept(tmp_path):
    mine = row(0) | {"my_figure": [1, "two"], "test_loss": float("inf")}
    (tmp_path / "metrics").write_text(json.dumps(mine) + "\n")
    assert records.read_metrics(tmp_path / "metrics") == [mine]


@pytest.mark.parametrize("missing", row(0))
def test_every_figure_is_needed(tmp_path, missing):
    (tmp_path / "metrics").write_text(json.dumps({key: value for key, value in row(0).items() if key != missing}))
    with pytest.raises(ValueError, match=f"missing required field `{missing}`"):
        records.read_metrics(tmp_path / "metrics")


@pytest.mark.parametrize("text", [b"[]", b"3", b"\xff\xfe", b"{", b"[" * 100_000, b"\0\0", b'{"a": ' * 100_000])
def test_lines_that_are_no_rows(tmp_path, text):
    (tmp_path / "metrics").write_bytes(text)
    with pytest.raises(ValueError):
        records.read_metrics(tmp_path / "metrics")
    with pytest.raises(ValueError):
        records.read_json(tmp_path / "metrics")


def test_the_last_line_may_lack_its_end(tmp_path):
    (tmp_path / "metrics").write_text("\n".join(json.dumps(row(epoch)) for epoch in range(3)))
    assert [found["epoch"] for found in records.read_metrics(tmp_path / "metrics")] == [0, 1, 2]
    (tmp_path / "metrics").write_text("")
    assert records.read_metrics(tmp_path / "metrics") == []
    with pytest.raises(ValueError, match="it has 0 rows, not 1"):
        records.read_metrics(tmp_path / "metrics", 1)


def test_tensors_are_told_from_numbers():
    state = {
        "epochs_done": 1,
        "active": 6,
        "counts": {name: row(0)[name] for name in records.Counts.__annotations__},
        "sums": torch.zeros(5),
        "rng": torch.get_rng_state(),
        "cuda_rng": None,
        "rng_of_other_ranks": [(torch.get_rng_state(), None)],
        "strategies": [{}],
    } | {name: {} for name in ("model", "extras", "average", "optimizer", "scaler", "batches", "samples")}
    records.check(state, records.Checkpoint)
    for name in state:
        for wrong in ({key: value for key, value in state.items() if key != name}, state | {name: "x"}):
            with pytest.raises(ValueError, match=name):
                records.check(wrong, records.Checkpoint)
