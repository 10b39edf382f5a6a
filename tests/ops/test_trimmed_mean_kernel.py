"""The CPU kernel of trimmed_mean with every instruction set: rows, sum, gradient, and all three operators compiled."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import kernel_backend
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, INSTRUCTION_SETS, REPEATS, bits, excess, on_threads, with_instruction_set
from torch import Tensor

import batchkern
from batchkern import reference

OPS = torch.ops.batchkern
LAYOUTS = {
    "contiguous": lambda x: x,
    "every third": lambda x: x.repeat_interleave(3)[1::3],
    "column": lambda x: torch.stack([x, -x, x + 1], dim=1)[:, 0],
    "odd offset": lambda x: torch.cat([x.new_tensor([7.0]), x])[1:],
    "negative bit": lambda x: torch._neg_view(-x),
    "first expanded": lambda x: x[:1].expand(len(x)),
}


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest):
    with with_instruction_set(request.param):
        yield request.param


def draw(kind: str, n: int, generator: torch.Generator) -> Tensor:
    losses = torch.randn(n, generator=generator)
    if kind == "few":
        losses = (2 * losses).round()
    if kind == "special":
        values = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, -1e-40, 6e4])
        losses = values[torch.randint(len(values), (n,), generator=generator)]
    if kind == "close":  # keys that differ in their last digit alone
        losses = 1 + torch.randint(3, (n,), generator=generator) * 2.0**-23
    return losses


@settings(max_examples=75 if kernel_backend.chosen == "host" else 150)
@given(
    n=st.sampled_from([0, 1, 2, 3, 4, 5, 15, 17, 63, 65, 255, 256, 257, 1025, 5000]),
    kind=st.sampled_from(["random", "few", "special", "close"]),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(sorted(LAYOUTS)),
    keep=st.one_of(st.sampled_from([1e-9, 0.5, 1.0]), st.floats(0, 1, exclude_min=True)),
    masked=st.sampled_from([None, 0.0, 0.3, 1.0]),
    as_tensor=st.booleans(),
    upstream=st.sampled_from([1.0, -0.37, 1024.0]),
)
def test_drawn_losses(
    n: int,
    kind: str,
    seed: int,
    dtype: torch.dtype,
    layout: str,
    keep: float,
    masked: float | None,
    as_tensor: bool,
    upstream: float,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    losses = LAYOUTS[layout](draw(kind, n, generator).to(dtype))
    valid = torch.rand(n, generator=generator) >= (masked or 0.0)
    mask = None if masked is None else torch.stack([valid, ~valid], dim=1)[:, 0]
    expected, k = reference.select(losses.float(), valid, keep)
    chosen = losses.double()[expected]
    exact = float(chosen.sum()) / max(float(k), 1.0) if k else math.nan
    if chosen.isfinite().all() and k:
        exact = math.fsum(chosen.tolist()) / float(k)
    for name in INSTRUCTION_SETS:
        with with_instruction_set(name):
            number, tensor = (1.0, torch.tensor(keep, dtype=torch.float64)) if as_tensor else (keep, None)
            mean, kept, count = OPS.trimmed_mean(losses, number, keep_tensor=tensor, mask=mask)
            leaf = losses.detach().requires_grad_()
            public = batchkern.trimmed_mean(leaf, number if tensor is None else tensor, mask=mask)
            (grad,) = torch.autograd.grad(public, leaf, torch.tensor(upstream))
        assert torch.equal(kept, expected), name
        assert count == k, name
        assert torch.equal(bits(public.detach()), bits(mean)), name
        # The rounded exact mean, but for what a sum of doubles in another order than fsum's may be off.
        slack = 1e-15 * float(chosen.abs().sum().nan_to_num(0, 0))
        oracle = torch.tensor(exact, dtype=torch.float64)
        assert excess(mean, oracle, oracle.float()) <= slack, name
        # upstream / k in float32, then rounded; +0.0 elsewhere.
        share = (torch.tensor(upstream) / k.float()).to(dtype)
        assert torch.equal(bits(grad), bits(torch.where(expected, share, torch.zeros((), dtype=dtype)))), name


def test_many_small_batches_of_ties() -> None:
    path = Path(__file__).parents[2] / "tools" / "million_selections.py"
    spec = importlib.util.spec_from_file_location("million_selections", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    cases = 30_000
    if kernel_backend.chosen:  # a fiber for each thread takes its time
        cases, script.CHUNK = 300, 10
    wrong, counts = script.run(cases, seed=1)
    assert wrong == 0
    assert counts["that split a tie"] > cases / 3
    assert counts["whose keep * n ends in .5"] > cases / 6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_and_threads_change_no_bit(instruction_set: str, dtype: torch.dtype) -> None:
    losses = torch.randn(100_003).to(dtype)
    results = []
    for threads in (1, 2):
        with on_threads(threads):
            results += [OPS.trimmed_mean(losses, 0.37) for _ in range(REPEATS)]
    kept, _ = reference.select(losses.float(), torch.ones(len(losses), dtype=torch.bool), 0.37)
    assert torch.equal(results[0][1], kept)  # many blocks of a GPU, which do not divide the rows
    for outputs in results[1:]:
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(results[0], outputs, strict=True))


MANY = 20 if kernel_backend.chosen == "host" else 700
"""Of samples, so that blocks have several: on the host each is a thousand fibers."""


@pytest.mark.parametrize(("samples", "rows"), [(1, 40_001), (3, 20_011), (MANY, 33)])
def test_bands_of_many_rows(instruction_set: str, samples: int, rows: int) -> None:
    """More than one block of a GPU ranks together, or has samples of its own; most rows tie."""
    score = (8 * torch.randn(samples, rows)).round()
    score[torch.rand(samples, rows) < 0.05] = math.nan  # first of the highest, last of the lowest
    losses, weight, mask = torch.randn(samples, rows), torch.rand(samples, rows), torch.rand(samples, rows) < 0.9
    for order, skip, above in (("highest", 0.1, None), ("lowest", 0.2, None), ("highest", 0.05, 9.0)):
        band = {"order": order, "skip": skip, "above": above}
        expected, _ = reference.select(score, mask, 0.3, within="sample", **band)
        arguments = (order == "lowest", skip, above, samples)
        flat = [x.reshape(-1) for x in (losses, mask, score, weight)]
        mean, kept, total = OPS.trimmed_mean(flat[0], 0.3, None, *flat[1:], *arguments)
        assert torch.equal(kept.view(samples, rows), expected)
        chosen = torch.where(expected, weight, 0).double()
        torch.testing.assert_close(total.double(), chosen.sum(), rtol=1e-6, atol=0)
        torch.testing.assert_close(mean.double(), (chosen * losses).sum() / chosen.sum(), rtol=1e-5, atol=1e-6)
        _, again, count = OPS.trimmed_mean(flat[0], 0.3, None, flat[1], flat[2], None, *arguments)
        assert torch.equal(again, kept)
        assert count == expected.sum()


def test_subnormal_halves_are_told_apart_when_denormals_are_flushed(instruction_set: str) -> None:
    # They are normal numbers in float32, and so in the reference.
    losses = torch.tensor([0.0, 6e-8, -6e-8, 1.2e-7, 3e-6]).half()
    if not torch.set_flush_denormal(True):
        pytest.skip("not supported on this processor")
    try:
        mean, kept, _ = OPS.trimmed_mean(losses, 0.4)
        order = OPS.rank_batches(losses, 5)
    finally:
        torch.set_flush_denormal(False)
    assert kept.tolist() == [False, False, False, True, True]
    assert order.tolist() == [4, 3, 1, 0, 2]
    assert mean == losses[3:].float().mean()


def test_keep_tensor_changed_before_backward() -> None:
    leaf, keep = torch.randn(20, requires_grad=True), torch.tensor(0.25, dtype=torch.float64)
    mean = batchkern.trimmed_mean(leaf, keep)
    keep.fill_(1.0)
    mean.backward()
    assert sorted(leaf.grad.tolist()) == [0.0] * 15 + [pytest.approx(0.2)] * 5
    assert batchkern.trimmed_mean(leaf, keep) == batchkern.trimmed_mean(leaf, 1.0)


def test_a_penalty_on_the_gradient_raises() -> None:
    # The upstream gradient is a constant here, which torch's own once_differentiable lets pass without a word.
    leaf = torch.randn(20, requires_grad=True)
    mean = batchkern.trimmed_mean(leaf, 0.5)
    (grad,) = torch.autograd.grad(mean, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        (mean + grad.square().sum()).backward()


# --- the raw operator ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask": torch.arange(9) % 3 > 0},
        {"keep_tensor": torch.tensor(0.3).double()},
        {"score": torch.arange(9.0), "weight": torch.arange(9.0), "lowest": True, "skip": 0.2, "samples": 3},
        {"above": 0.5},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_opcheck(options: dict[str, Any], dtype: torch.dtype) -> None:
    losses = torch.randn(18).to(dtype)[::2]
    torch.library.opcheck(OPS.trimmed_mean.default, (losses, 0.6), options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"losses": torch.ones(3).double()}, TypeError, "losses must be float32, bfloat16 or float16, got Double"),
        ({"losses": torch.ones(3, 1)}, ValueError, r"losses must be \(B,\), got \[3, 1\]"),
        ({"losses": torch.tensor(1.0)}, ValueError, r"losses must be \(B,\), got \[\]"),
        ({"mask": torch.ones(3)}, ValueError, r"mask must be bool \(3,\)"),
        ({"mask": torch.ones(2).bool()}, ValueError, r"mask must be bool \(3,\)"),
        ({"keep": 0.0}, ValueError, r"keep must be in \(0, 1\], got 0"),
        ({"keep": math.nan}, ValueError, r"keep must be in \(0, 1\], got nan"),
        pytest.param(
            {"keep_tensor": torch.tensor(-1.0).double()},
            ValueError,
            r"keep must be in \(0, 1\], got -1",
            marks=pytest.mark.cpu,
        ),
        ({"keep_tensor": torch.ones(2)}, ValueError, "keep_tensor must be 0-dim float64"),
        ({"score": torch.ones(2)}, ValueError, r"score must be float32 \(3,\)"),
        ({"score": torch.ones(3).half()}, ValueError, r"score must be float32 \(3,\)"),
        ({"weight": torch.ones(3, 1)}, ValueError, r"weight must be float32 \(3,\)"),
        ({"skip": 1.0}, ValueError, r"skip must be in \[0, 1\), got 1"),
        ({"skip": math.nan}, ValueError, r"skip must be in \[0, 1\), got nan"),
        ({"samples": 2}, ValueError, "samples must divide 3 losses, got 2"),
        ({"samples": 0}, ValueError, "samples must divide 3 losses, got 0"),
        ({"above": 0.5, "lowest": True}, ValueError, "above is for the highest losses"),
    ],
)
def test_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        OPS.trimmed_mean(**{"losses": torch.ones(3), "keep": 0.5, **arguments})


# --- torch.compile ---------------------------------------------------------------------------------------------


def step(logits: Tensor, target: Tensor, keep: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All three operators in one graph, with work of the compiler's own before, between and after them."""
    loss, losses = batchkern.trimmed_cross_entropy(logits * 2, target, keep, per_sample=True)
    distance = (logits - 1).square().mean(1)
    mean = batchkern.trimmed_mean(distance, keep, mask=target != -100)
    return loss + 0.5 * mean.sqrt(), losses, batchkern.rank_batches(losses + distance.detach(), 0.4)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_step_equals_eager(backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    keep = torch.tensor(0.3, dtype=torch.float64)
    shapes = [(33, torch.float32), (47, torch.float32), (33, torch.bfloat16)]
    for rows, dtype in shapes[: 1 if backend == "inductor" else 3]:  # each is compiled anew, for seconds
        # Halves, whose sums and products are exact in every order: the compiler may not change which rows are kept.
        logits = (2 * torch.randn(rows, 8)).round() / 2
        target = torch.randint(8, (rows,))
        target[::7] = -100
        for value in (0.3, 0.8):
            keep.fill_(value)
            leaves = [logits.to(dtype, copy=True).requires_grad_() for _ in range(2)]
            results = [f(leaf, target, keep) for f, leaf in zip((compiled, step), leaves, strict=True)]
            for loss, _, _ in results:
                loss.backward()
            assert torch.equal(results[0][2], results[1][2])
            torch.testing.assert_close(*results)
            torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
            assert torch.equal(leaves[0].grad.any(1), leaves[1].grad.any(1))


@pytest.mark.cpu
def test_subnormal_losses_are_ranked_alike_whatever_a_thread_flushes() -> None:
    losses = (torch.rand(200_000) - 0.5) * 1e-40
    threads, found = torch.get_num_threads(), []
    try:
        for flushes in (False, True):
            assert torch.set_flush_denormal(flushes)
            for count in (1, 2):
                torch.set_num_threads(count)
                found.append(torch.ops.batchkern.trimmed_mean(losses, 0.3)[1])
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
    assert all(torch.equal(kept, found[0]) for kept in found)
    assert int(found[0].sum()) == 60_000
    assert losses[found[0]].min() >= losses[~found[0]].max()


def test_an_infinite_weight_of_a_dropped_row_does_not_count(instruction_set: str) -> None:
    losses, weight = torch.rand(130), torch.ones(130)
    ranked = losses.argsort(descending=True)
    weight[ranked[65:90]] = math.inf
    mean, kept, normalizer = torch.ops.batchkern.trimmed_mean(losses, 0.5, weight=weight)
    assert kept.nonzero().flatten().tolist() == sorted(ranked[:65].tolist())
    torch.testing.assert_close(mean, losses[ranked[:65]].mean())
    assert normalizer == 65
