"""The parts of the reference that the operations share: selection, and Philox4x32-10."""

from __future__ import annotations

import json
import math
import struct

import pytest
import torch
from golden import philox as golden
from hypothesis import example, given
from hypothesis import strategies as st

from batchkern import reference

VECTORS = json.loads(golden.PATH.read_text())
KEEPS = sorted({i / 64 for i in range(1, 65)} | {i / 100 for i in range(1, 101)} | {1e-9, 1 / 3, 2 / 3, 0.999})


# --- selection -------------------------------------------------------------------------------------------------


def test_kept_count_is_python_rounding() -> None:
    n = torch.arange(1, 513)
    ties = 0
    for keep in KEEPS:
        k = reference.kept_count(n, keep)
        assert k.dtype == torch.float64
        assert k.tolist() == [max(round(keep * i), 1) for i in range(1, 513)]
        ties += sum((keep * i) % 1 == 0.5 for i in range(1, 513))
    assert ties > 1000  # half-way cases, where round-half-up and round-half-even differ


@pytest.mark.parametrize("keep", [0.01, 0.5, 1.0])
def test_kept_count_of_nothing_is_zero(keep: float) -> None:
    assert reference.kept_count(torch.tensor(0), keep) == 0


def test_kept_count_with_keep_as_tensor() -> None:
    for keep in KEEPS:
        k = reference.kept_count(torch.tensor(37), torch.tensor(keep, dtype=torch.float64))
        assert k.item() == max(round(keep * 37), 1)


def descending(losses: list[float], valid: list[bool]) -> list[int]:
    """Indices of the valid rows by the documented rule."""
    rows = [i for i, ok in enumerate(valid) if ok]
    return sorted(rows, key=lambda i: (0, 0.0, i) if math.isnan(losses[i]) else (1, -losses[i], i))


NEGATIVE_NAN = struct.unpack("f", struct.pack("I", 0xFFC00001))[0]
# Few values, so that most rows tie; zeros of both signs and two NaNs must tie as well.
TIED = st.sampled_from([math.nan, NEGATIVE_NAN, math.inf, -math.inf, 0.0, -0.0, 1e-40, -1e-40, 1.0, -1.0, 3.5])
LOSS = st.one_of(TIED, st.floats(width=32))
ROWS = st.lists(st.tuples(LOSS, st.booleans()), max_size=40)


@given(rows=ROWS, dtype=st.sampled_from([torch.float32, torch.float64]))
@example(rows=[(0.0, True), (-0.0, True), (0.0, True)], dtype=torch.float32)
@example(rows=[(-math.inf, False), (-math.inf, True), (math.nan, False)], dtype=torch.float32)
def test_descending_order(rows: list[tuple[float, bool]], dtype: torch.dtype) -> None:
    losses, valid = [loss for loss, _ in rows], [ok for _, ok in rows]
    data = torch.tensor(losses, dtype=dtype)
    assert reference.in_order(data).tolist() == descending(losses, [True] * len(rows))
    expected = descending(losses, valid)
    order = reference.in_order(data, torch.tensor(valid, dtype=torch.bool)).tolist()
    assert order[: len(expected)] == expected
    assert sorted(order) == list(range(len(rows)))


@given(rows=ROWS, keep=st.floats(0, 1, exclude_min=True))
def test_select(rows: list[tuple[float, bool]], keep: float) -> None:
    losses, valid = [loss for loss, _ in rows], [ok for _, ok in rows]
    kept, k = reference.select(torch.tensor(losses), torch.tensor(valid, dtype=torch.bool), keep)
    count = max(round(keep * sum(valid)), 1) if any(valid) else 0
    assert k.item() == count
    assert kept.dtype == torch.bool
    assert set(kept.nonzero().flatten().tolist()) == set(descending(losses, valid)[:count])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_descending_order_of_narrow_types(dtype: torch.dtype) -> None:
    losses = torch.tensor([1.0, -0.0, math.nan, 0.0, math.inf, 1.0, -math.inf], dtype=dtype)
    assert reference.in_order(losses).tolist() == [2, 4, 0, 5, 1, 3, 6]


def test_wide() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert reference.wide(torch.ones(2, dtype=dtype)).dtype == torch.float32
    assert reference.wide(torch.ones(2, dtype=torch.float64)).dtype == torch.float64


# --- Philox ----------------------------------------------------------------------------------------------------


def test_golden_file_is_what_the_generator_writes() -> None:
    fresh = json.loads(json.dumps(golden.vectors()))
    assert VECTORS.keys() == fresh.keys()
    assert VECTORS["known_answers"] == fresh["known_answers"]
    for stored, drawn in zip(VECTORS["draws"], fresh["draws"], strict=True):
        # libm's log and cos may differ in the last digit from one platform to the next.
        normals = pytest.approx(drawn["normals"], rel=1e-12, abs=1e-12)
        assert stored == {**drawn, "normals": normals}


def test_golden_generator_gives_the_known_answers() -> None:
    for counter, key, words in golden.KNOWN_ANSWERS:
        assert golden.philox4x32(counter, key) == words


def test_philox_known_answers() -> None:
    for counter, (low, high), words in golden.KNOWN_ANSWERS:
        key = low | high << 32
        signed = key - 2**64 if key >= 2**63 else key
        result = reference.philox(tuple(torch.tensor([c]) for c in counter), torch.tensor(signed))
        assert tuple(int(w) for w in result) == words


def as_seed(seed: int) -> torch.Tensor:
    return torch.tensor(seed, dtype=torch.int64)


@pytest.mark.parametrize("draw", VECTORS["draws"], ids=lambda d: f"{d['seed']}-{d['row']}-{d['first_column']}")
def test_golden_draws(draw: dict) -> None:
    rows, start = torch.tensor([draw["row"]]), draw["first_column"]
    columns = start + len(draw["words"])
    words = reference.random_words(rows, columns, as_seed(draw["seed"]))[0, start:]
    assert words.tolist() == draw["words"]
    kept = words >= round(0.3 * 2**32)
    assert kept.int().tolist() == draw["kept_at_drop_prob_0.3"]
    normals = reference.random_normals(rows, columns, as_seed(draw["seed"]))[0, start:]
    assert normals.dtype == torch.float64
    assert normals.tolist() == pytest.approx(draw["normals"], rel=1e-12, abs=1e-12)


SEEDS = st.integers(-(2**63), 2**63 - 1)


@given(seed=SEEDS, row=st.integers(0, 2**62), columns=st.integers(1, 11))
@example(seed=-1, row=2**32, columns=1)
@example(seed=-(2**63), row=2**32 - 1, columns=7)
@example(seed=2**63 - 1, row=2**33 + 5, columns=6)
def test_random_words_and_normals(seed: int, row: int, columns: int) -> None:
    rows = torch.tensor([row, 0, row + 1])
    words = reference.random_words(rows, columns, as_seed(seed))
    assert words.tolist() == [[golden.word(seed, r, c) for c in range(columns)] for r in rows.tolist()]
    normals = reference.random_normals(rows, columns, as_seed(seed))
    for r, drawn in zip(rows.tolist(), normals.tolist(), strict=True):
        assert drawn == pytest.approx([golden.normal(seed, r, c) for c in range(columns)], rel=1e-12, abs=1e-12)


@given(a=st.integers(0, 2**32 - 1), b=st.integers(0, 2**32 - 1))
@example(a=2**32 - 1, b=2**32 - 1)
def test_multiply_32x32(a: int, b: int) -> None:
    high, low = reference.multiply_32x32(torch.tensor([a]), b)
    assert (int(high), int(low)) == (a * b >> 32, a * b % 2**32)


def test_random_words_of_nothing() -> None:
    seed = as_seed(3)
    assert reference.random_words(torch.arange(0), 5, seed).shape == (0, 5)
    assert reference.random_words(torch.arange(3), 0, seed).shape == (3, 0)
    assert reference.random_normals(torch.arange(0), 5, seed).shape == (0, 5)
    assert reference.random_normals(torch.arange(3), 0, seed).shape == (3, 0)


def test_random_words_as_an_operator() -> None:
    torch.library.opcheck(reference.random_words, (torch.arange(3), 5, as_seed(7)))


@pytest.mark.parametrize("word", [0, 2**32 - 1, 2**31, 511, 512])
def test_normals_are_finite_for_every_word(monkeypatch: pytest.MonkeyPatch, word: int) -> None:
    monkeypatch.setattr(reference, "random_words", lambda rows, columns, seed: torch.full((1, columns), word))
    normals = reference.random_normals(torch.arange(1), 4, as_seed(0))
    assert normals.isfinite().all()
    # u is at least 2^-24, which bounds the radius.
    assert normals.abs().max() <= math.sqrt(2 * 24 * math.log(2))
    u = (word // 512 + 0.5) / 2**23
    assert torch.tensor(u, dtype=torch.float32).item() == u  # float32 kernels hold it exactly
    assert normals[0, 0].item() == pytest.approx(math.sqrt(-2 * math.log(u)) * math.cos(2 * math.pi * u), rel=1e-12)
