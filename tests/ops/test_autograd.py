"""Backward passes over a batch of upstream gradients, and torch.jit.trace: what PyTorch does around an operation."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from operations import OPERATIONS, B, C, H, operations
from torch import Tensor
from torch.autograd import forward_ad

import batchkern

Losses = Callable[[Tensor, Tensor], Any]
"""Of a differentiable (B, C) or (B, H), and a weight (C, H)."""

TARGET = torch.arange(B) % C


def kl(z: Tensor, _: Tensor, **options: Any) -> Any:
    return batchkern.soft_label_kl(z[: B // 2], z, **options)


def linear(h: Tensor, w: Tensor, **options: Any) -> Any:
    return batchkern.linear_cross_entropy(h, w, TARGET, **options)


def trimmed(h: Tensor, w: Tensor, keep: float, **options: Any) -> Any:
    return batchkern.linear_trimmed_cross_entropy(h, w, TARGET, keep, **options)


DIFFERENTIABLE: dict[str, Losses] = {
    "rows": lambda z, _: batchkern.cross_entropy(z, TARGET % z.shape[1], reduction="none"),
    "trimmed": lambda z, _: batchkern.trimmed_cross_entropy(z, TARGET, 0.5),
    "mean": lambda z, _: batchkern.trimmed_mean(z, 0.5),
    "copies": lambda z, _: batchkern.augment_latent(
        z, gaussian=1, dropout=1, sigma=0.1, tau=1.0, drop_prob=0.5, seed=3
    ),
    "kl": kl,
    "kl, reference too": lambda z, w: kl(z, w, reference_grad=True),
    "linear, kept logits": linear,
    "linear rows": lambda h, w: linear(h, w, reduction="none"),
    "linear rows, logits again": lambda h, w: linear(h, w, reduction="none", chunk_rows=3, softcap=2.0),
    "linear lse": lambda h, w: linear(h, w, stats=True).lse,
    "linear, bias": lambda h, w: linear(h, w, bias=w[:, 0], chunk_rows=3),
    "gradient of all": lambda h, w: trimmed(h, w, 0.9, chunk_rows=3),
    "logits again": lambda h, w: trimmed(h, w, 0.3, chunk_rows=3),
}


def leaves(dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((B, H), (C, H))]


def batched(losses: Tensor, inputs: Sequence[Tensor], upstream: Tensor, **options: Any) -> tuple[Any, ...]:
    return torch.autograd.grad(losses, inputs, upstream, is_grads_batched=True, allow_unused=True, **options)


def one_by_one(losses: Losses, inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor | None]:
    each = [torch.autograd.grad(losses(*inputs), inputs, x, allow_unused=True) for x in upstream]
    return [None if x[0] is None else torch.stack(x) for x in zip(*each, strict=True)]  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_batched_gradients_are_those_of_a_loop(name: str, dtype: torch.dtype) -> None:
    function, inputs = DIFFERENTIABLE[name], leaves(dtype)
    losses = function(*inputs)
    upstream = torch.randn(3, *losses.shape).to(losses.dtype)
    upstream.view(3, -1)[1, 0] = 0
    for _ in range(2):  # the first leaves all there for the second
        found = batched(losses, inputs, upstream, retain_graph=True)
        for a, b in zip(found, one_by_one(function, inputs, upstream), strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["kl", "gradient of all"])
def test_batched_gradients_come_after_and_before_a_single_one(name: str) -> None:
    function, inputs = DIFFERENTIABLE[name], leaves(torch.float32)
    losses, upstream = function(*inputs), torch.randn(3)
    expected = one_by_one(function, inputs, upstream)
    for _ in range(2):
        single = torch.autograd.grad(losses, inputs[0], upstream[0], retain_graph=True)[0]
        torch.testing.assert_close(single, expected[0][0])
        torch.testing.assert_close(batched(losses, inputs, upstream, retain_graph=True)[0], expected[0])


def test_rows_without_a_gradient_have_none_in_a_batch() -> None:
    hidden, weight = leaves(torch.float32)
    with torch.no_grad():
        hidden[0] = float("inf")  # of the highest loss, and left out by what comes after
    losses = linear(hidden, weight, reduction="none")
    found = batched(losses, (hidden, weight), torch.eye(B)[1:4])
    assert all(x.isfinite().all() for x in found)
    assert (found[0].flatten(1) != 0).any(1).all()


def test_an_infinite_upstream_gradient_does_not_reach_dropped_rows_of_a_batch() -> None:
    hidden, weight = leaves(torch.float32)
    loss = trimmed(hidden, weight, 0.9, chunk_rows=3)
    (found,) = batched(loss, (hidden,), torch.tensor([1.0, float("inf")]))
    assert torch.equal((found[0] == 0).all(1), (found[1] == 0).all(1))


def test_a_vectorised_jacobian() -> None:
    hidden, weight = leaves(torch.float32)

    def jacobian(**options: bool) -> Any:
        return torch.autograd.functional.jacobian(
            lambda h: linear(h, weight, reduction="none"), hidden, vectorize=True, **options
        )

    expected = one_by_one(DIFFERENTIABLE["linear rows"], (hidden, weight), torch.eye(B))[0]
    torch.testing.assert_close(jacobian(), expected)
    with pytest.raises(RuntimeError, match=r"create_graph must be False if .* differentiated twice"):
        jacobian(create_graph=True)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_vmap_around_a_backward_pass(name: str) -> None:
    function, inputs = DIFFERENTIABLE[name], leaves(torch.float32)
    losses = function(*inputs)
    upstream = torch.randn(3, *losses.shape)
    found = torch.func.vmap(lambda x: torch.autograd.grad(losses, inputs[0], x, retain_graph=True))(upstream)
    torch.testing.assert_close(found[0], one_by_one(function, inputs, upstream)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_inplace_backward_has_no_room_for_a_batch_of_gradients(dtype: torch.dtype) -> None:
    leaf = torch.randn(B, C, dtype=dtype, requires_grad=True)
    loss = batchkern.trimmed_cross_entropy(leaf * 1, TARGET, 0.5, inplace_backward=True)
    with pytest.raises(RuntimeError, match=r"inplace_backward must be False if .* batch of gradients"):
        batched(loss, (leaf,), torch.ones(3, dtype=dtype), retain_graph=True)
    loss.backward()  # nothing was overwritten
    torch.testing.assert_close(leaf.grad, *torch.autograd.grad(DIFFERENTIABLE["trimmed"](leaf, leaf), leaf))


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_batched_gradients_of_a_sharded_vocabulary() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        inputs, upstream = leaves(torch.float32), torch.randn(3, B)
        losses = linear(*inputs, reduction="none", vocab_group=dist.group.WORLD)
        found = batched(losses, inputs, upstream)
    finally:
        dist.destroy_process_group()
    for a, b in zip(found, one_by_one(DIFFERENTIABLE["linear rows"], inputs, upstream), strict=True):
        torch.testing.assert_close(a, b)


# --- forward mode, torch.func ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_forward_mode(name: str) -> None:
    """A directional derivative is the gradient's product with the direction, however it is asked for."""
    function = DIFFERENTIABLE[name]
    z, direction, weight = torch.randn(B, H), torch.randn(B, H), torch.randn(C, H)

    def f(z: Tensor) -> Tensor:
        out = function(z, weight)
        return (out[0] if isinstance(out, tuple) else out).double().square().sum()

    leaf = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(leaf), leaf)
    expected = (gradient * direction).sum().double()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(z, direction))).tangent
    assert tangent is not None
    found = [tangent, torch.func.jvp(f, (z,), (direction,))[1], torch.func.linearize(f, z)[1](direction)]
    for value in found:
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_transforms_of_soft_label_kl(dtype: torch.dtype) -> None:
    soft, virtual = torch.randn(4, C, dtype=dtype), torch.randn(8, C, dtype=dtype)
    soft[0, 2] = virtual[0, 2] = virtual[4, 2] = -torch.inf
    soft[1, 3] = -torch.inf

    def ours(v: Tensor, s: Tensor = soft) -> Tensor:
        return batchkern.soft_label_kl(s, v, temperature=1.5, reference_grad=True)

    def theirs(v: Tensor) -> Tensor:
        p = (soft / 1.5).softmax(1).repeat(2, 1)
        log_q = (v / 1.5).log_softmax(1).masked_fill(p == 0, 0.0)
        return (torch.xlogy(p, p) - p * log_q).sum(1).mean()

    leaf, other = virtual.clone().requires_grad_(), soft.clone().requires_grad_()
    plain = torch.autograd.grad(ours(leaf, other), (leaf, other))
    for a, b in zip(torch.func.grad(ours, (0, 1))(virtual, soft), plain, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(torch.func.jacrev(ours)(virtual), torch.func.grad(theirs)(virtual))
    torch.testing.assert_close(torch.func.jacfwd(ours)(virtual), torch.func.grad(theirs)(virtual))
    torch.testing.assert_close(torch.func.hessian(ours)(virtual), torch.func.hessian(theirs)(virtual))
    many = torch.stack([virtual, virtual + torch.randn(8, C, dtype=dtype)])
    torch.testing.assert_close(torch.func.vmap(ours)(many), torch.stack([ours(v) for v in many]))
    near = soft.repeat(2, 1) + 1e-4 * torch.randn(8, C, dtype=dtype)
    torch.testing.assert_close(torch.func.vmap(ours)(near[None])[0], ours(near), rtol=1e-3, atol=0)


# --- torch.jit.trace ------------------------------------------------------------------------------------------------


def as_list(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def traced(function: Callable[..., Any], example: tuple[Tensor, ...], *, saved: bool = True) -> Callable[..., Any]:
    """From a file, as it would be used elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated, and that shapes become constants
        trace: Any = torch.jit.trace(function, example)
        if not saved:
            return trace
        file = io.BytesIO()
        torch.jit.save(trace, file)
        file.seek(0)
        return torch.jit.load(file)


@pytest.mark.parametrize("name", OPERATIONS)
def test_traced_with_all_arguments(name: str) -> None:
    function, example = operations()[name]
    _, other = operations()[name]
    if "target" in other:
        other["target"] = example["target"].flip(0)
    saved = name != "soft_label_kl"  # which has no plain form that is as accurate
    by_place = lambda *tensors: function(**dict(zip(example, tensors, strict=True)))  # noqa: E731
    trace = traced(by_place, tuple(example.values()), saved=saved)
    for a, b in zip(as_list(trace(*other.values())), as_list(function(**other)), strict=True):
        torch.testing.assert_close(a, b)


OPTIONS = {
    "rows": (2, lambda z, t: batchkern.cross_entropy(z, t, reduction="none")),
    "stats": (2, lambda z, t: batchkern.cross_entropy(z, t, stats=True)),
    "images": (4, lambda z, t: batchkern.cross_entropy(z, t, ignore_index=1, label_smoothing=0.1)),
    "pair": (2, lambda z, t: batchkern.trimmed_cross_entropy(z, t, 0.5, per_sample=True)),
    "in place": (2, lambda z, t: batchkern.trimmed_cross_entropy(z * 1, t, 0.5, inplace_backward=True)),
    "linear stats": (2, lambda z, t: batchkern.linear_cross_entropy(z, z[:C].detach(), t, stats=True)),
    "linear, trimmed": (2, lambda z, t: batchkern.linear_trimmed_cross_entropy(z, z[:C].detach(), t, 0.9)),
    "module": (2, batchkern.TrimmedCrossEntropyLoss(0.5)),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_traced_with_a_gradient(name: str) -> None:
    dims, function = OPTIONS[name]
    shape = (B, C, 3, 3)[:dims]

    def example() -> tuple[Tensor, Tensor]:
        return torch.randn(shape, requires_grad=True), torch.randint(C, shape[:1] + shape[2:])

    trace = traced(function, example())
    logits, target = example()
    ours, expected = (as_list(f(logits, target)) for f in (trace, function))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    a, b = (torch.autograd.grad(x[0].sum(), logits)[0] for x in (ours, expected))
    torch.testing.assert_close(a, b)
