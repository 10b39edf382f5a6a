"""linear_trimmed_cross_entropy against the unfused definition, in float64 and through autograd."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import warm
from torch import Tensor

import batchkern

ROWS, WIDTH, WORDS = 24, 5, 11
FLOATS = [torch.float32, torch.float64]


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias, target; some targets are the default ignore_index."""
    target = torch.randint(WORDS, (ROWS,))
    target[torch.rand(ROWS) < 0.2] = -100
    hidden, weight, bias = torch.randn(ROWS, WIDTH), torch.randn(WORDS, WIDTH), torch.randn(WORDS)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), target


def run(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, keep: float | Tensor, **options: Any):
    """The loss and the gradients of hidden, weight and bias, with an upstream factor."""
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    extra = {} if bias is None else {"bias": leaves[2]}
    loss = batchkern.linear_trimmed_cross_entropy(*leaves[:2], target, keep, **extra, **options)
    return loss.detach(), torch.autograd.grad(1.5 * loss, leaves)


def expected_step(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    keep: float,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
):
    """The definition in float64: the mean of the k highest of the row losses."""
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    logits = leaves[0] @ leaves[1].t() + (0 if bias is None else leaves[2])
    losses = F.cross_entropy(
        logits, target, reduction="none", ignore_index=ignore_index, label_smoothing=label_smoothing
    )
    valid = losses[target != ignore_index]
    loss = valid.sort(descending=True).values[: max(round(keep * len(valid)), 1)].mean()
    return loss.detach(), torch.autograd.grad(1.5 * loss, leaves), losses.detach()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("keep", [0.05, 0.3, 0.5, 0.8, 1.0])  # on both sides of 2/3, where the schedule changes
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"ignore_index": 4}], ids=str)
def test_definition(dtype: torch.dtype, with_bias: bool, keep: float, options: dict[str, Any]) -> None:
    hidden, weight, bias, target = problem(dtype)
    bias = bias if with_bias else None
    target[target == -100] = options.get("ignore_index", -100)
    expected, expected_grads, expected_losses = expected_step(hidden, weight, bias, target, keep, **options)
    loss, grads = run(hidden, weight, bias, target, keep, **options)
    assert loss.dtype == dtype
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(loss.double(), expected, **tolerance)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), expected_grad, **tolerance)
    alone, losses = batchkern.linear_trimmed_cross_entropy(
        hidden, weight, target, keep, bias=bias, per_sample=True, **options
    )
    assert torch.equal(alone, loss)
    assert not losses.requires_grad
    torch.testing.assert_close(losses.double(), expected_losses, **tolerance)


@pytest.mark.parametrize("chunk_rows", [1, 7, 24, 1000])
def test_chunks_change_nothing(chunk_rows: int) -> None:
    for keep in (0.3, 1.0):
        hidden, weight, bias, target = problem()
        expected = run(hidden, weight, bias, target, keep)
        torch.testing.assert_close(run(hidden, weight, bias, target, keep, chunk_rows=chunk_rows), expected)


def test_per_sample_with_gradient_is_detached() -> None:
    hidden, weight, _, target = problem()
    loss, losses = batchkern.linear_trimmed_cross_entropy(
        hidden.requires_grad_(), weight.requires_grad_(), target, 0.5, per_sample=True
    )
    assert loss.requires_grad
    assert not losses.requires_grad


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_frozen_arguments(frozen: str) -> None:
    hidden, weight, bias, target = problem()
    _, grads = run(hidden, weight, bias, target, 0.4)
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name != frozen)
    (1.5 * batchkern.linear_trimmed_cross_entropy(target=target, keep=0.4, **leaves)).backward()
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        if name == frozen:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, grad)


@pytest.mark.parametrize("keep", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("chunk_rows", [5, None])
def test_ignored_rows_with_nan_leave_no_trace(keep: float, chunk_rows: int | None) -> None:
    # Where a whole sequence is padding, attention may give NaN.
    hidden, weight, bias, target = problem()
    target[:2] = -100
    expected = run(hidden, weight, bias, target, keep, chunk_rows=chunk_rows)
    hidden[0], hidden[1] = math.nan, math.inf
    torch.testing.assert_close(run(hidden, weight, bias, target, keep, chunk_rows=chunk_rows), expected)


def test_dropped_rows_have_zero_gradient() -> None:
    hidden, weight, _, target = problem()
    _, losses = batchkern.linear_trimmed_cross_entropy(hidden, weight, target, 0.25, per_sample=True)
    k = round(0.25 * int((target != -100).sum()))
    kept = losses.sort(descending=True, stable=True).indices[:k]
    _, (hidden_grad, _) = run(hidden, weight, None, target, 0.25)
    assert set(hidden_grad.any(1).nonzero().flatten().tolist()) == set(kept.tolist())


def test_keep_as_tensor() -> None:
    hidden, weight, bias, target = problem()
    for value in (0.1, 0.5, 1.0):
        keep = torch.tensor(value, dtype=torch.float64)
        expected = run(hidden, weight, bias, target, value)
        torch.testing.assert_close(run(hidden, weight, bias, target, keep), expected, rtol=0, atol=0)


def test_all_ignored_and_empty() -> None:
    hidden, weight, bias, target = problem()
    loss, grads = run(hidden, weight, bias, torch.full_like(target, -100), 0.5)
    assert loss.isnan()
    assert not any(grad.any() for grad in grads)
    loss, grads = run(hidden[:0], weight, bias, target[:0], 0.5)
    assert loss.isnan()
    assert [grad.shape for grad in grads] == [(0, WIDTH), (WORDS, WIDTH), (WORDS,)]
    assert not any(grad.any() for grad in grads)


def test_strided_arguments() -> None:
    hidden, weight, bias, target = problem()
    expected = run(hidden, weight, bias, target, 0.4)
    leaves = [
        torch.cat([hidden, hidden], dim=1)[:, :WIDTH].requires_grad_(),
        weight.t().contiguous().t().requires_grad_(),
        bias.repeat_interleave(2)[::2].requires_grad_(),
    ]
    loss = batchkern.linear_trimmed_cross_entropy(*leaves[:2], target, 0.4, bias=leaves[2])
    torch.testing.assert_close((loss.detach(), torch.autograd.grad(1.5 * loss, leaves)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_types(dtype: torch.dtype) -> None:
    hidden, weight, bias, target = problem(dtype)
    loss, grads = run(hidden, weight, bias, target, 1.0)
    expected, expected_grads, _ = expected_step(hidden, weight, bias, target, 1.0)
    assert loss.dtype == torch.float32
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(loss.double(), expected, rtol=4 * step, atol=4 * step)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), expected_grad, rtol=8 * step, atol=8 * step)


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_is_that_of_a_linear_layer(hidden_dtype: torch.dtype) -> None:
    # In a model under autocast the last hidden state is bfloat16 and the head's parameters are float32.
    hidden, weight, bias, target = problem()
    hidden = hidden.to(hidden_dtype)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    unfused = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = batchkern.linear_trimmed_cross_entropy(*leaves[:2], target, 0.4, bias=leaves[2])
        logits = F.linear(*unfused)
        assert logits.dtype == torch.bfloat16
        expected = batchkern.trimmed_cross_entropy(logits, target, 0.4)
    loss.backward()
    expected.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    for leaf, other in zip(leaves, unfused, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        torch.testing.assert_close(leaf.grad, other.grad, rtol=2**-6, atol=2**-8)


def test_autocast_leaves_float64_alone() -> None:
    hidden, weight, bias, target = problem(torch.float64)
    expected = run(hidden, weight, bias, target, 0.4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(run(hidden, weight, bias, target, 0.4), expected, rtol=0, atol=0)


def test_gradcheck() -> None:
    hidden, weight, bias, target = problem(torch.float64)
    leaves = [x[:8].requires_grad_() for x in (hidden, weight, bias)]
    target = target[:8] % 8
    assert torch.autograd.gradcheck(
        lambda h, w, b: batchkern.linear_trimmed_cross_entropy(h, w, target, 0.4, bias=b, label_smoothing=0.1),
        leaves,
    )


def test_second_derivative_raises() -> None:
    hidden, weight, bias, target = problem()
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    loss = batchkern.linear_trimmed_cross_entropy(hidden, weight, target, 0.4, bias=bias)
    for grad in torch.autograd.grad(loss, leaves, create_graph=True):
        with pytest.raises(RuntimeError):
            grad.square().sum().backward()


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_equals_eager(autocast: bool) -> None:
    hidden, weight, bias, target = problem()

    def step(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, keep: float | Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return batchkern.linear_trimmed_cross_entropy(hidden, weight, target, keep, bias=bias)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for keep in (0.3, torch.tensor(0.8, dtype=torch.float64)):
        results = []
        for function in (compiled, step):
            leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
            loss = function(*leaves, target, keep)
            results.append((loss.detach(), torch.autograd.grad(loss, leaves)))
        torch.testing.assert_close(*results, rtol=1e-2 if autocast else None, atol=1e-3 if autocast else None)


def test_meta_tensors() -> None:
    hidden, weight, target = (x.to("meta") for x in (HIDDEN, WEIGHT, TARGET))
    loss, losses = batchkern.linear_trimmed_cross_entropy(hidden, weight, target, 0.5, per_sample=True)
    assert (loss.device.type, loss.shape, losses.shape) == ("meta", (), (4,))


HIDDEN, WEIGHT, TARGET = torch.zeros(4, 3), torch.zeros(6, 3), torch.tensor([0, 5, 2, 0])
ON_META = {"device": "meta"}


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"hidden": [[0.0]]}, TypeError, ["hidden", "list", "tensor"]),
        ({"hidden": torch.zeros(4, 3).long()}, TypeError, ["hidden", "int64", "float32"]),
        ({"hidden": torch.zeros(())}, ValueError, ["hidden", "(..., H)", "()"]),
        ({"hidden": torch.zeros(2, 2, 3)}, ValueError, ["target", "(2, 2)", "(4,)"]),
        ({"weight": [[0.0]]}, TypeError, ["weight", "list", "tensor"]),
        ({"weight": WEIGHT.double()}, TypeError, ["weight", "float64", "float32"]),
        ({"weight": torch.zeros(6)}, ValueError, ["weight", "(6,)", "2 dimension"]),
        ({"weight": torch.zeros(6, 2)}, ValueError, ["weight", "(6, 2)", "(V, 3)"]),
        ({"weight": torch.zeros(6, 3, **ON_META)}, ValueError, ["weight", "meta", "cpu"]),
        ({"bias": [0.0] * 6}, TypeError, ["bias", "list", "tensor"]),
        ({"bias": torch.zeros(6).half()}, TypeError, ["bias", "float16", "float32"]),
        ({"bias": torch.zeros(5)}, ValueError, ["bias", "(5,)", "(6,)"]),
        ({"bias": torch.zeros(6, 1)}, ValueError, ["bias", "(6, 1)", "1 dimension"]),
        ({"target": TARGET.float()}, TypeError, ["target", "float32", "int64"]),
        ({"target": TARGET[:3]}, ValueError, ["target", "(3,)", "(4,)"]),
        ({"target": torch.tensor([0, 6, 2, 0])}, ValueError, ["target[1]", "6", "[0, 6)", "-100"]),
        ({"keep": 0}, ValueError, ["keep", "0", "(0, 1]"]),
        ({"keep": 1.01}, ValueError, ["keep", "1.01", "(0, 1]"]),
        ({"keep": torch.tensor(1)}, TypeError, ["keep", "int64"]),
        ({"label_smoothing": 1.5}, ValueError, ["label_smoothing", "1.5", "[0, 1]"]),
        ({"softcap": 0}, ValueError, ["softcap", "0", "[1e-30, 1e+30]"]),
        ({"logit_scale": -1.0}, ValueError, ["logit_scale", "-1.0", "[1e-30, 1e+30]"]),
        ({"logit_scale": math.inf}, ValueError, ["logit_scale", "inf", "[1e-30, 1e+30]"]),
        ({"chunk_rows": 0}, ValueError, ["chunk_rows", "0", "at least 1"]),
        ({"chunk_rows": 2.0}, TypeError, ["chunk_rows", "float", "int"]),
        ({"chunk_rows": True}, TypeError, ["chunk_rows", "bool", "int"]),
    ],
)
def test_wrong_arguments(arguments: dict, error: type[Exception], words: list[str]) -> None:
    valid = {"hidden": HIDDEN, "weight": WEIGHT, "target": TARGET, "keep": 0.5}
    with pytest.raises(error) as raised:
        batchkern.linear_trimmed_cross_entropy(**{**valid, **arguments})
    for word in words:
        assert word in str(raised.value)


def test_wrong_arguments_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(TypeError, match="weight must be a tensor, got list"):
            batchkern.linear_trimmed_cross_entropy(HIDDEN, [[0.0]], TARGET, 0.5)
        with pytest.raises(TypeError, match="weight must have dtype float32, bfloat16, float16, got int64"):
            batchkern.linear_trimmed_cross_entropy(HIDDEN, WEIGHT.long(), TARGET, 0.5)


# --- two processes ---------------------------------------------------------------------------------------

WORLD = 2


def _worker(rank: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=WORLD)
    hidden, weight, bias, target = torch.load(folder / "problem.pt")
    mine, my_target = hidden.chunk(WORLD)[rank], target.chunk(WORLD)[rank]
    torch.save(run(mine, weight, bias, my_target, 0.4, group=dist.group.WORLD), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_group_ranks_the_concatenated_batch(tmp_path: Path) -> None:
    whole = problem()
    torch.save(whole, tmp_path / "problem.pt")
    warm.spawn(_worker, WORLD, tmp_path)
    losses, grads = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)), strict=True)
    loss, (hidden_grad, weight_grad, bias_grad) = run(*whole, 0.4)
    torch.testing.assert_close(sum(losses) / WORLD, loss)
    torch.testing.assert_close(torch.cat([g[0] for g in grads]) / WORLD, hidden_grad)
    torch.testing.assert_close(sum(g[1] for g in grads) / WORLD, weight_grad)  # what DDP computes
    torch.testing.assert_close(sum(g[2] for g in grads) / WORLD, bias_grad)
