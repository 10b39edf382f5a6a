"""cross_entropy against F.cross_entropy, by PyTorch's own samples of its inputs, and against formulas in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.func import grad, hessian, jvp, vmap

from batchkern import Rows, cross_entropy, trimmed_cross_entropy, trimmed_mean

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]
OPTIONS = [{}, {"label_smoothing": 0.1}, {"weight": True}, {"weight": True, "label_smoothing": 0.3}]
CPU = pytest.mark.cpu


def ids(options: dict[str, Any]) -> str:
    return "+".join(options) or "plain"


def pixels(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits ``(2, 6, 5, 7)`` and classes, some of which are 255."""
    target = torch.randint(6, (2, 5, 7))
    target[torch.rand(2, 5, 7) < 0.25] = 255
    return (3 * torch.randn(2, 6, 5, 7)).to(dtype), target


def gradients(loss: Tensor, *leaves: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves, torch.ones_like(loss) if upstream is None else upstream, retain_graph=True)


# --- PyTorch's samples ------------------------------------------------------------------------------------------


def samples(dtype: torch.dtype) -> list[Any]:
    """The inputs with which PyTorch tests F.cross_entropy: read from the PyTorch that is installed."""
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = (x for x in op_db if x.name == "nn.functional.cross_entropy")
    return list(info.sample_inputs("cpu", dtype, requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_sample_of_pytorch(dtype: torch.dtype) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    cases = samples(dtype)
    assert len(cases) == 21
    for case in cases:
        target, options = case.args[0], dict(case.kwargs)
        soft = target.is_floating_point()
        leaves = [case.input, target] if soft and target.requires_grad else [case.input]
        # PyTorch in the type that our losses have, for its own in 16 bits are rounded.
        exact = {k: x.to(wide) if isinstance(x, Tensor) else x for k, x in options.items()}
        expected = F.cross_entropy(case.input.to(wide), target.to(wide) if soft else target, **exact)
        loss = cross_entropy(case.input, target, **options)
        upstream = torch.randn_like(expected)
        torch.testing.assert_close(loss, expected, msg=str(options))
        for ours, theirs in zip(
            gradients(loss, *leaves, upstream=upstream), gradients(expected, *leaves, upstream=upstream), strict=True
        ):
            torch.testing.assert_close(ours, theirs, msg=str(options))


# --- what the rows are ------------------------------------------------------------------------------------------


def rows_by_hand(logits: Tensor, target: Tensor, weight: Tensor | None, smoothing: float, ignore_index: int) -> Rows:
    """From the definitions, in float64, with classes last. The target holds indices or probabilities."""
    z = logits.double().movedim(1, -1)
    if target.is_floating_point():
        aim, valid = target.double().movedim(1, -1), torch.ones(z.shape[:-1], dtype=torch.bool)
        label = aim.argmax(-1)
    else:
        valid = target.long() != ignore_index
        label = torch.where(valid, target.long(), 0)
        aim = F.one_hot(label, z.shape[-1]).double()
    aim = (1 - smoothing) * aim + smoothing / z.shape[-1]
    if weight is not None:
        aim = aim * weight.double()
    lse = z.exp().sum(-1).log()
    log_p = z - lse[..., None]
    loss, entropy = -(aim * log_p).sum(-1), -(log_p.exp() * log_p).sum(-1)
    correct = (z.argmax(-1) == label) & valid
    return Rows(*(torch.where(valid, x, 0) for x in (loss, lse, entropy)), correct)


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("options", OPTIONS, ids=ids)
def test_rows(kind: str, options: dict[str, Any]) -> None:
    logits, target = pixels()
    ignore_index = 255
    if kind == "probabilities":
        target, ignore_index = torch.rand_like(logits).softmax(1), -100
    weight = torch.rand(6) if "weight" in options else None
    smoothing = options.get("label_smoothing", 0.0)
    leaf = logits.clone().requires_grad_()
    options = {"weight": weight, "ignore_index": ignore_index, "label_smoothing": smoothing}
    rows = cross_entropy(leaf, target, stats=True, reduction="sum", **options)
    exact_leaf = logits.double().requires_grad_()
    exact = rows_by_hand(exact_leaf, target, weight, smoothing, ignore_index)
    for name in ("loss", "lse", "entropy"):
        got = getattr(rows, name)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), getattr(exact, name), rtol=1e-6, atol=1e-6, msg=name)
    assert torch.equal(rows.correct, exact.correct)
    assert rows.loss.requires_grad
    assert rows.lse.requires_grad
    assert not rows.entropy.requires_grad
    assert not rows.correct.requires_grad
    # A weighted loss and a z-loss at once, of some of the rows.
    a, b = torch.randn(2, 5, 7), torch.randn(2, 5, 7).double().round().float()
    ours = gradients((a * rows.loss).sum() + (b * rows.lse.square()).sum(), leaf)[0]
    theirs = gradients((a * exact.loss).sum() + (b * exact.lse.square()).sum(), exact_leaf)[0]
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    alone = gradients(cross_entropy(leaf, target, stats=True, **options).lse.sum(), leaf)[0]
    torch.testing.assert_close(alone.double(), gradients(exact.lse.sum(), exact_leaf)[0], rtol=1e-5, atol=1e-6)


def test_the_first_of_equal_logits_is_the_prediction() -> None:
    logits = torch.zeros(3, 4)
    assert cross_entropy(logits, torch.tensor([0, 1, 3]), stats=True).correct.tolist() == [True, False, False]
    target = torch.tensor([[0.2, 0.2, 0.2, 0.4], [0.3, 0.3, 0.2, 0.2], [0.0, 0.0, 0.0, 0.0]])
    assert cross_entropy(logits, target, stats=True).correct.tolist() == [False, True, True]
    dense = logits.t()[None]
    assert cross_entropy(dense, torch.tensor([[0, 1, 3]]), stats=True).correct.tolist() == [[True, False, False]]
    assert cross_entropy(dense, target.t()[None], stats=True).correct.tolist() == [[False, True, True]]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("function", [cross_entropy, lambda *args, **kw: trimmed_cross_entropy(*args, 0.5, **kw)])
def test_every_integer_type(function: Any, dtype: torch.dtype) -> None:
    logits, target = pixels()
    ignored = min(255, torch.iinfo(dtype).max)
    target = target.where(target != 255, ignored)
    leaf = logits.clone().requires_grad_()
    expected = function(leaf, target, ignore_index=ignored)
    loss = function(leaf, target.to(dtype), ignore_index=ignored)
    assert torch.equal(loss, expected)
    assert torch.equal(*gradients(loss, leaf), *gradients(expected, leaf))
    # No integer wraps around: -100 is no uint8.
    signed = target.clamp(max=5)
    assert torch.equal(function(logits, signed.to(dtype)), function(logits, signed))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (4, 5, 3), (2, 5, 3, 2, 2), (0, 5), (2, 5, 0)])
def test_shapes_and_reductions(shape: tuple[int, ...], reduction: str) -> None:
    logits = torch.randn(shape)
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    for target in (torch.randint(5, rows), torch.rand(shape)):
        leaf, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        loss = cross_entropy(leaf, target, reduction=reduction)
        expected = F.cross_entropy(other, target, reduction=reduction)
        assert loss.shape == expected.shape
        torch.testing.assert_close(loss, expected, equal_nan=True)
        torch.testing.assert_close(*gradients(loss, leaf), *gradients(expected, other), equal_nan=True)


# --- layouts ----------------------------------------------------------------------------------------------------

LAYOUTS = {
    "channels first": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "rows swapped with columns": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "cropped": lambda x: F.pad(x, (2, 1, 1, 0), value=77.0)[:, :, 1:, 2:-1],
    "cropped, channels last": lambda x: F.pad(x, (0, 0, 1, 1), value=77.0).contiguous(
        memory_format=torch.channels_last
    )[:, :, 1:-1],
    "some of the channels": lambda x: torch.cat([x, x + 1], dim=1)[:, : x.shape[1]],
    "every other sample": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "every other pixel": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "one sample expanded": lambda x: x[:1].expand(len(x), -1, -1, -1),
    "classes last but one": lambda x: x.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["indices", "probabilities", "probabilities, channels last"])
def test_layouts(layout: str, kind: str) -> None:
    logits, target = pixels()
    laid = LAYOUTS[layout](logits)
    options: dict[str, Any] = {"ignore_index": 255}
    if kind != "indices":
        target, options = torch.rand_like(logits).softmax(1), {}
        if "last" in kind:
            target = target.contiguous(memory_format=torch.channels_last)
    leaf = laid.detach().requires_grad_()
    expected_leaf = laid.double().contiguous().requires_grad_()
    loss = cross_entropy(leaf, target, reduction="none", **options)
    expected = F.cross_entropy(
        expected_leaf, target if kind == "indices" else target.double(), reduction="none", **options
    )
    upstream = torch.randn(2, 5, 7)
    (grad_,) = gradients(loss, leaf, upstream=upstream)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        grad_.double(), *gradients(expected, expected_leaf, upstream=upstream.double()), rtol=1e-5, atol=1e-6
    )
    assert grad_.stride() == torch.empty_like(laid).stride()
    # The same rows are kept, whatever the layout; and the gradient has it.
    fused = trimmed_cross_entropy(leaf, target, 0.3, **options)
    torch.testing.assert_close(fused, trimmed_cross_entropy(laid.contiguous(), target, 0.3, **options))
    assert gradients(fused, leaf)[0].stride() == torch.empty_like(laid).stride()


def test_shifted_logits_of_a_language_model_are_not_copied() -> None:
    # (B, V, T - 1) as people write it: classes lie side by side, and samples further apart than their rows.
    logits, labels = torch.randn(3, 9, 50), torch.randint(50, (3, 9))
    labels[1, 4:] = -100
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy(leaf[:, :-1].transpose(1, 2), labels[:, 1:])
    flat = logits.clone().requires_grad_()
    expected = F.cross_entropy(flat[:, :-1].reshape(-1, 50), labels[:, 1:].reshape(-1))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*gradients(loss, leaf), *gradients(expected, flat))


@CPU
def test_dense_logits_are_not_copied() -> None:
    logits, target = torch.randn(2, 19, 256, 256), torch.randint(19, (2, 256, 256))
    for laid in (logits, logits.contiguous(memory_format=torch.channels_last)):
        with torch.profiler.profile(profile_memory=True) as profile:
            trimmed_cross_entropy(laid, target, 0.2)
        allocated = sum(max(event.self_device_memory_usage, event.self_cpu_memory_usage) for event in profile.events())
        assert allocated < laid.nbytes / 2  # losses, their states and the mask: 17 bytes of 76 for a pixel


# --- rows that no gradient reaches --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_rows_without_a_gradient_are_not_read(kind: str, dense: bool, dtype: torch.dtype) -> None:
    shape = (2, 6, 5, 7) if dense else (40, 6)
    logits = torch.randn(shape).to(dtype)
    rows = shape[:1] + shape[2:]
    target = torch.randint(6, rows) if kind == "indices" else torch.rand(shape).to(dtype)
    live = torch.rand(rows) < 0.3
    poisoned = torch.where(live.unsqueeze(1), logits, math.nan).requires_grad_()
    leaf = logits.clone().requires_grad_()
    for weigh in (
        lambda x: (x.loss * live).nan_to_num(0).sum(),
        lambda x: trimmed_mean(x.loss, 0.6, mask=live),
        lambda x: torch.where(live, x.loss - 0.5 * x.lse, 0).sum(),
    ):
        ours = gradients(weigh(cross_entropy(poisoned, target, stats=True)), poisoned)[0]
        theirs = gradients(weigh(cross_entropy(leaf, target, stats=True)), leaf)[0]
        assert torch.equal(ours, theirs)
        dropped = ours.movedim(1, -1)[~live]
        assert not dropped.any()
        assert not dropped.signbit().any()
        assert ours.any()


@CPU
def test_the_backward_pass_leaves_out_what_does_not_count() -> None:
    logits, target = torch.randn(64, 40), torch.randint(40, (64,))
    logits[3:] = math.nan  # a gradient computed from these rows is NaN, also where it is multiplied by zero
    logits.requires_grad_()
    (gradient,) = gradients(cross_entropy(logits, target, reduction="none")[:3].sum(), logits)
    (wanted,) = gradients(F.cross_entropy(logits[:3], target[:3], reduction="sum"), logits)
    torch.testing.assert_close(gradient[:3], wanted[:3])
    assert not gradient[3:].any()


@given(
    rows=st.lists(st.sampled_from(["a", "b", "c", "nan", "ignored"]), min_size=1, max_size=40),
    keep=st.floats(0.01, 1),
    dense=st.booleans(),
    soft=st.booleans(),
    weighted=st.booleans(),
)
def test_composed_and_fused_keep_the_same_rows(
    rows: list[str], keep: float, dense: bool, soft: bool, weighted: bool
) -> None:
    palette = {"a": [0.0, 0.0, 0.0], "b": [2.0, 0.0, 0.0], "c": [0.0, 3.0, 1.0], "nan": [math.nan] * 3}
    logits = torch.tensor([palette.get(row, [5.0, 1.0, 0.0]) for row in rows])
    target = torch.tensor([-100 if row == "ignored" else i % 2 for i, row in enumerate(rows)])
    weight = torch.tensor([0.5, 2.0, 1.0]) if weighted else None
    mask = target != -100
    if soft:
        target, mask = F.one_hot(target.clamp(min=0), 3) * 0.75 + 0.0625, torch.ones_like(mask)
    if dense:
        logits, mask = logits.t()[None], mask[None]
        target = target.t()[None] if soft else target[None]
    fused_leaf, leaf = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    fused = trimmed_cross_entropy(fused_leaf, target, keep, class_weight=weight)
    losses = cross_entropy(leaf, target, reduction="none", weight=weight)
    divisor = None
    if weighted and not soft:
        divisor = weight[target.clamp(min=0)]
    composed = trimmed_mean(
        losses if divisor is None else losses / divisor, keep, score=losses.detach(), mask=mask, weight=divisor
    )
    torch.testing.assert_close(fused, composed, equal_nan=True)
    ours, theirs = gradients(fused, fused_leaf)[0], gradients(composed, leaf)[0]
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert torch.equal(ours.isnan() | (ours != 0), theirs.isnan() | (theirs != 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dense", [False, True])
def test_a_class_that_does_not_occur_may_have_an_infinite_weight(dtype: torch.dtype, dense: bool) -> None:
    # As 1 / count makes it.
    shape = (5, 4, 3) if dense else (5, 4)
    logits, target = torch.randn(shape).to(dtype).requires_grad_(), torch.randint(3, shape[:1] + shape[2:])
    weight = torch.tensor([1.0, 2.0, 0.5, math.inf])
    for reduction in ("mean", "sum", "none"):
        loss = cross_entropy(logits, target, weight=weight, reduction=reduction).sum()
        wide = logits.detach().double().requires_grad_()
        expected = F.cross_entropy(wide, target, weight=weight.double(), reduction=reduction).sum()
        step = torch.finfo(dtype).eps
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
        ours, theirs = gradients(loss, logits)[0].double(), torch.autograd.grad(expected, wide)[0]
        torch.testing.assert_close(ours, theirs, rtol=4 * step, atol=4 * step)
    loss = trimmed_cross_entropy(logits, target, 0.5, class_weight=weight)
    assert gradients(loss, logits)[0].isfinite().all()


def test_a_row_of_minus_infinity_predicts_the_first_class() -> None:
    for logits in (torch.full((1, 3), -math.inf), torch.full((1, 3, 1), -math.inf)):
        for label in (0, 1):
            target = torch.full((1, *logits.shape[2:]), label)
            assert cross_entropy(logits, target, stats=True).correct.item() == (label == 0)


def test_mixup_is_one_call_with_probabilities() -> None:
    # Two calls with the labels that were mixed each keep rows of their own.
    logits, a, b = torch.randn(8, 6), torch.randint(6, (8,)), torch.randint(6, (8,))
    share = 0.3
    mixed = share * F.one_hot(a, 6) + (1 - share) * F.one_hot(b, 6)
    losses = share * F.cross_entropy(logits, a, reduction="none") + (1 - share) * F.cross_entropy(
        logits, b, reduction="none"
    )
    torch.testing.assert_close(trimmed_cross_entropy(logits, mixed, 0.25), losses.topk(2).values.mean())
    trap = share * trimmed_cross_entropy(logits, a, 0.25) + (1 - share) * trimmed_cross_entropy(logits, b, 0.25)
    assert trap > losses.topk(2).values.mean() + 0.1


# --- autograd, torch.func, compile -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=ids)
@pytest.mark.parametrize("dense", [False, True])
def test_gradcheck(dense: bool, options: dict[str, Any]) -> None:
    shape = (2, 4, 3) if dense else (5, 4)
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(4, dtype=torch.float64) if "weight" in options else None
    options = {"weight": weight, "label_smoothing": options.get("label_smoothing", 0.0), "stats": True}
    indices = torch.randint(4, shape[:1] + shape[2:])
    indices.view(-1)[1] = -100
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, indices, **options)[:2], logits)
    target = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, q: cross_entropy(z, q, **options)[:2], (logits, target))
    assert torch.autograd.gradcheck(lambda z, q: trimmed_cross_entropy(z, q, 0.4), (logits, target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_second_derivative_raises(dtype: torch.dtype) -> None:
    leaf = torch.randn(5, 4, dtype=dtype, requires_grad=True)
    losses = cross_entropy(leaf, torch.randint(4, (5,)), reduction="none")
    (first,) = torch.autograd.grad(losses.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        first.sum().backward()


def test_probabilities_that_require_a_gradient_get_one() -> None:
    logits, target = torch.randn(6, 4, requires_grad=True), torch.rand(6, 4, requires_grad=True)
    for ours, theirs in (
        (cross_entropy(logits, target), F.cross_entropy(logits, target)),
        (trimmed_cross_entropy(logits, target, 1.0), F.cross_entropy(logits, target)),
    ):
        for a, b in zip(gradients(ours, logits, target), gradients(theirs, logits, target), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_transforms_of_torch_func(reduction: str) -> None:
    logits, target = torch.randn(4, 3, 5), torch.randint(5, (4, 3))

    def ours(z: Tensor, t: Tensor) -> Tensor:
        return cross_entropy(z, t, reduction=reduction)

    def theirs(z: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(z, t, reduction=reduction)

    torch.testing.assert_close(vmap(grad(ours))(logits, target), vmap(grad(theirs))(logits, target))
    tangent = torch.randn_like(logits[0])
    for a, b in zip(
        jvp(lambda z: ours(z, target[0]), (logits[0],), (tangent,)),
        jvp(lambda z: theirs(z, target[0]), (logits[0],), (tangent,)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(hessian(ours)(logits[0], target[0]), hessian(theirs)(logits[0], target[0]))
    rows = vmap(lambda z, t: cross_entropy(z, t, stats=True))(logits, target)
    for a, b in zip(rows, cross_entropy(logits.flatten(0, 1), target.flatten(), stats=True), strict=True):
        torch.testing.assert_close(a.flatten(), b)
    kept = vmap(lambda z, t: trimmed_cross_entropy(z, t, 0.4))(logits, target)
    torch.testing.assert_close(
        kept, torch.stack([trimmed_cross_entropy(z, t, 0.4) for z, t in zip(logits, target, strict=True)])
    )


@pytest.mark.slow
def test_transforms_in_a_compiled_function() -> None:
    logits, target = torch.randn(3, 5), torch.randint(5, (3,))
    compiled = torch.compile(lambda z: grad(lambda y: cross_entropy(y, target))(z), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits), grad(lambda y: F.cross_entropy(y, target))(logits))


@pytest.mark.slow
def test_twenty_sizes_are_compiled_at_most_three_times() -> None:
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    def step(z: Tensor, t: Tensor) -> Tensor:
        rows = cross_entropy(z, t, stats=True, ignore_index=255)
        return trimmed_mean(rows.loss, 0.3, score=rows.entropy, skip=0.1, mask=t != 255) + trimmed_cross_entropy(
            z, t, 0.5, ignore_index=255
        )

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for size in range(20):
        z = torch.randn(2 + size % 3, 4, 3 + size, 5 + 2 * size, requires_grad=True)
        t = torch.randint(4, (z.shape[0], *z.shape[2:]))
        loss, expected = compiled(z, t), step(z, t)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(*gradients(loss, z), *gradients(expected, z))
    assert graphs <= 3
    torch._dynamo.reset()


# --- wrong arguments ----------------------------------------------------------------------------------------------

LOGITS, TARGET = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"logits": torch.zeros(())}, ValueError, ["logits", "(C,)", "no dimension"]),
        ({"logits": torch.zeros(4, 0)}, ValueError, ["logits", "at least one class in dimension 1", "(4, 0)"]),
        ({"logits": torch.zeros(0), "target": TARGET[0]}, ValueError, ["logits", "class", "dimension 0"]),
        ({"logits": LOGITS.long()}, TypeError, ["logits", "int64"]),
        ({"logits": LOGITS.to_sparse()}, TypeError, ["logits", "dense", "sparse"]),
        (
            {"logits": torch.masked.masked_tensor(LOGITS, LOGITS == 0)},
            TypeError,
            ["logits", "MaskedTensor", "get_data()"],
        ),
        (
            {"logits": torch.nested.nested_tensor([LOGITS, LOGITS], layout=torch.jagged)},
            TypeError,
            ["logits", "NestedTensor", "values()"],
        ),
        ({"target": TARGET[:3]}, ValueError, ["target", "(4,)", "(4, 3)", "int64 (3,)"]),
        ({"target": TARGET[:, None]}, ValueError, ["target", "(4,)", "int64 (4, 1)"]),
        ({"target": torch.zeros(4)}, ValueError, ["target", "probabilities", "(4, 3)", "float32 (4,)"]),
        ({"target": torch.zeros(4).bool()}, TypeError, ["target", "bool", "uint8", "float32"]),
        ({"target": torch.zeros(4, 3), "ignore_index": 2}, ValueError, ["ignore_index", "probabilities", "2"]),
        ({"target": TARGET.to("meta")}, ValueError, ["target", "meta", "cpu"]),
        ({"weight": torch.ones(4)}, ValueError, ["weight", "(3,)", "(4,)"]),
        ({"weight": torch.ones(3, requires_grad=True)}, ValueError, ["weight", "gradient"]),
        ({"label_smoothing": 2}, ValueError, ["label_smoothing", "[0.0, 1]".replace("0.0", "0"), "2"]),
        ({"reduction": "batchmean"}, ValueError, ["reduction", "'none', 'mean', 'sum'", "batchmean"]),
        pytest.param({"target": torch.tensor([0, 1, 3, 7])}, ValueError, ["target[2]", "3", "[0, 3)"], marks=CPU),
        pytest.param(
            {"logits": torch.zeros(1, 3, 2, 2), "target": torch.tensor([[[0, 1], [255, 2]]], dtype=torch.uint8)},
            ValueError,
            ["target[0, 1, 0] is 255", "[0, 3)", "(-100)"],
            marks=CPU,
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wrong_arguments(arguments: dict, error: type[Exception], words: list[str], dtype: torch.dtype) -> None:
    arguments = {"logits": LOGITS, "target": TARGET, **arguments}
    if arguments["logits"].dtype == torch.float32 and type(arguments["logits"]) is Tensor:
        arguments["logits"] = arguments["logits"].to(dtype)
    for function, extra in ((cross_entropy, {}), (trimmed_cross_entropy, {"keep": 0.5})):
        if extra:
            if "weight" in arguments:
                arguments["class_weight"] = arguments.pop("weight")
            if "reduction" in arguments:
                continue
        with pytest.raises(error) as raised:
            function(**arguments, **extra)
        for word in words:
            assert word in str(raised.value)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_a_dtensor_is_named_with_what_to_do() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        logits = distribute_tensor(LOGITS, init_device_mesh("cpu", (1,)), [Shard(0)])
        for call in (
            lambda: cross_entropy(logits, TARGET),
            lambda: trimmed_cross_entropy(logits, TARGET, 0.5),
            lambda: trimmed_mean(logits, 0.5),
        ):
            with pytest.raises(TypeError, match=r"got a DTensor: call the operation on its to_local\(\)"):
                call()
        assert cross_entropy(logits.to_local(), TARGET) == cross_entropy(LOGITS, TARGET)
    finally:
        dist.destroy_process_group()


def test_probabilities_are_what_pytorch_makes_of_them() -> None:
    logits = torch.randn(3, 4)
    target = torch.tensor([[-1.0, 2.0, 0.0, 0.0], [math.nan, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    loss, expected = (f(logits, target, reduction="none") for f in (cross_entropy, F.cross_entropy))
    torch.testing.assert_close(loss, expected, equal_nan=True)


def test_keep_is_a_number_of_any_library() -> None:
    logits, target = torch.randn(9, 4), torch.randint(4, (9,))
    expected = trimmed_cross_entropy(logits, target, 0.5)
    for keep in (numpy.float32(0.5), torch.tensor(0.5), torch.tensor(0.5, dtype=torch.bfloat16)):
        assert torch.equal(trimmed_cross_entropy(logits, target, keep), expected)


def test_not_a_gradient_without_need() -> None:
    leaf = torch.randn(5, 4, requires_grad=True)
    rows = cross_entropy(leaf, torch.randint(4, (5,)), stats=True)
    (of_loss,) = torch.autograd.grad(rows.loss.sum(), leaf)  # nothing for lse
    torch.testing.assert_close(of_loss.sum(), torch.tensor(0.0), atol=1e-6, rtol=0)
    with torch.no_grad():
        assert not cross_entropy(leaf, torch.randint(4, (5,))).requires_grad
