"""rank_batches and BatchLedger against a sort in plain Python."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import batchkern


def highest(losses: list[float], fraction: float) -> list[int]:
    """NaN first, then by loss, then by index."""
    order = sorted(range(len(losses)), key=lambda i: (0, 0.0, i) if math.isnan(losses[i]) else (1, -losses[i], i))
    return order[: max(1, math.floor(fraction * len(losses)))]


# Few values, so that most of them tie.
LOSS = st.one_of(
    st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, 2.5]),
    st.floats(width=32),
)
FRACTION = st.one_of(st.floats(0, 1, exclude_min=True), st.sampled_from([0.2, 0.29, 0.5, 1.0]))
DTYPES = st.sampled_from([torch.float32, torch.float64])


@given(losses=st.lists(LOSS, max_size=40), fraction=FRACTION, dtype=DTYPES)
@example(losses=[-0.0, 0.0, -0.0, 0.0], fraction=1.0, dtype=torch.float32)
@example(losses=[math.inf, math.nan, 1.0, math.nan], fraction=0.75, dtype=torch.float32)
@example(losses=[], fraction=1.0, dtype=torch.float32)
def test_ranks(losses: list[float], fraction: float, dtype: torch.dtype) -> None:
    indices = batchkern.rank_batches(torch.tensor(losses, dtype=dtype), fraction)
    assert indices.dtype == torch.int64
    assert indices.tolist() == highest(losses, fraction)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_types(dtype: torch.dtype) -> None:
    losses = torch.randn(500).to(dtype)  # many ties
    assert len(losses.unique()) < 500
    assert batchkern.rank_batches(losses, 0.3).tolist() == highest(losses.tolist(), 0.3)


@pytest.mark.cpu  # the count is Python's, whatever ranks
def test_count_is_the_floor_and_at_least_one() -> None:
    for n in (*range(1, 40), 100, 512, 999):
        for fraction in (1e-6, 0.1, 0.2, 1 / 3, 0.5, 0.7, 0.99, 1.0):
            expected = max(1, int(fraction * n))
            assert len(batchkern.rank_batches(torch.zeros(n), fraction)) == expected


def test_large_with_few_values() -> None:
    losses = torch.randint(5, (200_000,)).float()
    indices = batchkern.rank_batches(losses, 0.5)
    expected = torch.cat([(losses == value).nonzero().flatten() for value in (4, 3, 2, 1, 0)])
    assert torch.equal(indices, expected[:100_000])


def test_strided_losses_that_require_grad() -> None:
    losses = torch.randn(40, 3, requires_grad=True)[::2, 1]
    assert batchkern.rank_batches(losses, 0.5).tolist() == highest(losses.tolist(), 0.5)
    assert batchkern.rank_batches(torch.tensor(1.0).expand(6), 0.5).tolist() == [0, 1, 2]


def test_compiled_equals_eager() -> None:
    compiled = torch.compile(batchkern.rank_batches, fullgraph=True, backend="aot_eager")
    losses = torch.randint(4, (37,)).float()
    assert torch.equal(compiled(losses, 0.4), batchkern.rank_batches(losses, 0.4))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"losses": [1.0]}, TypeError, ["losses", "list", "tensor"]),
        ({"losses": torch.zeros(3).int()}, TypeError, ["losses", "int32", "float32"]),
        ({"losses": torch.zeros(3, 1)}, ValueError, ["losses", "(3, 1)", "1 dimension"]),
        ({"fraction": 0.0}, ValueError, ["fraction", "0.0", "(0, 1]"]),
        ({"fraction": 1.2}, ValueError, ["fraction", "1.2", "(0, 1]"]),
        ({"fraction": math.nan}, ValueError, ["fraction", "nan", "(0, 1]"]),
        ({"fraction": "0.2"}, TypeError, ["fraction", "str"]),
        ({"fraction": torch.tensor(0.2).double()}, TypeError, ["fraction", "tensor", "float"]),
    ],
)
def test_wrong_arguments(arguments: dict, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as raised:
        batchkern.rank_batches(**{"losses": torch.zeros(3), "fraction": 0.5, **arguments})
    for word in words:
        assert word in str(raised.value)


# --- the ledger ------------------------------------------------------------------------------------------


def test_ledger_ranks_unseen_above_finite_and_below_nan() -> None:
    ledger = batchkern.BatchLedger(5)
    assert len(ledger) == 5
    assert ledger.rank(1.0).tolist() == [0, 1, 2, 3, 4]
    ledger.update(torch.tensor([0, 1, 3]), torch.tensor([torch.finfo(torch.float32).max, 2.0, math.nan]))
    assert ledger.rank(1.0).tolist() == [3, 2, 4, 0, 1]
    assert ledger.rank(0.4).tolist() == [3, 2]


def test_ledger_remembers_the_last_loss() -> None:
    ledger = batchkern.BatchLedger(4)
    ledger.update(torch.arange(4), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    ledger.update(0, 10.0)
    ledger.update(torch.tensor(3), torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True))
    ledger.update(torch.tensor([], dtype=torch.int64), torch.tensor([]))
    assert ledger.losses.tolist() == [10.0, 2.0, 3.0, 0.5]
    assert not ledger.losses.requires_grad
    assert ledger.rank(0.5).tolist() == [0, 2]


def test_ledger_state() -> None:
    ledger = batchkern.BatchLedger(3)
    ledger.update(torch.tensor([2, 0]), torch.tensor([0.25, math.nan]))
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(2, 2), "ledger": ledger})
    state = copy.deepcopy(model.state_dict())
    assert list(state) == ["layer.weight", "layer.bias", "ledger.losses"]
    ledger.update(1, 7.0)
    model.load_state_dict(state)
    torch.testing.assert_close(ledger.losses, torch.tensor([math.nan, math.inf, 0.25]), equal_nan=True)
    assert not list(ledger.parameters())
    assert model.to("meta")["ledger"].losses.device.type == "meta"


def test_ledger_state_survives_a_safe_load(tmp_path) -> None:
    ledger = batchkern.BatchLedger(3)
    ledger.update(1, 0.1)
    torch.save(ledger.state_dict(), tmp_path / "ledger.pt")
    other = batchkern.BatchLedger(3)
    other.load_state_dict(torch.load(tmp_path / "ledger.pt", weights_only=True))
    assert torch.equal(other.losses, ledger.losses)


def test_ledger_refuses_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"size must be at least 1, got 0"):
        batchkern.BatchLedger(0)
    with pytest.raises(TypeError, match=r"size must be an int, got float"):
        batchkern.BatchLedger(3.0)
    ledger = batchkern.BatchLedger(3)
    with pytest.raises(ValueError, match=r"indices must be in \[0, 3\), got \[1, 3\]"):
        ledger.update(torch.tensor([1, 3]), torch.zeros(2))
    with pytest.raises(ValueError, match=r"indices must be in \[0, 3\), got \[-1\]"):
        ledger.update(-1, 0.0)
    with pytest.raises(ValueError, match=r"losses must have shape \(2,\) to match indices, got \(1,\)"):
        ledger.update(torch.tensor([0, 1]), 1.0)
    with pytest.raises(TypeError, match=r"indices must be int64, got torch.float32"):
        ledger.update(torch.tensor([0.0]), 1.0)
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\], got 0"):
        ledger.rank(0)
    with pytest.raises(RuntimeError, match=r"size mismatch for losses"):
        ledger.load_state_dict(batchkern.BatchLedger(4).state_dict())
    assert ledger.losses.tolist() == [math.inf] * 3  # nothing was written
