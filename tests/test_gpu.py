"""What only a GPU can show: graphs, streams, large offsets, the device-side assert, the number of launches.

That the kernels are right is tested by tests/ops, on a GPU too: ``pytest tests/ops --through cuda``.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import batchkern
from batchkern import _backend, reference
from batchkern.basis import Hadamard

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

OPS = _backend.OPS
# One shape for each way of sharing rows among threads, and of selecting.
SHAPES = [
    (128, 10),  # eight lanes for a row, one block in all
    (1000, 19),  # rows that begin at every alignment
    (3000, 1000),  # a warp
    (300, 5003),  # a block of 256
    (600, 40_000),  # a block of 512
    (3, 300_001),  # several blocks
    (20_011, 33),  # a selection of its own
]


def batch(rows: int, classes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    logits = (3 * torch.randn(rows, classes, device="cuda")).to(dtype)
    target = torch.randint(classes, (rows,), device="cuda")
    target[::7] = -100
    return logits, target


def step(logits: Tensor, target: Tensor, keep: float | Tensor, **options: object) -> tuple[Tensor, Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    loss, losses = batchkern.trimmed_cross_entropy(leaf, target, keep, per_sample=True, **options)
    return loss.detach(), losses, torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("op", OPS)
def test_a_kernel_serves_this_device(op: str) -> None:
    status = next(s for s in _backend.status() if (s.op, s.device) == (op, "cuda"))
    assert status.backend == "kernel", status.why
    assert _backend.has_kernel(op, torch.empty(1, device="cuda"))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_path(shape: tuple[int, int], dtype: torch.dtype, smoothing: float) -> None:
    logits, target = batch(*shape, dtype)
    loss, losses, grad = step(logits, target, 0.3, label_smoothing=smoothing)
    exact = F.cross_entropy(logits.double(), target, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(losses.double(), exact, rtol=1e-6, atol=1e-6)
    kept, k = reference.select(losses, target != -100, 0.3)
    assert torch.equal(grad.any(1), kept)
    torch.testing.assert_close(loss.double(), losses[kept].double().mean(), rtol=3e-7, atol=0)
    leaf = logits.double().requires_grad_()
    F.cross_entropy(leaf[kept], target[kept], label_smoothing=smoothing).backward()
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert ((grad - leaf.grad).abs() <= 1e-6 / k + rounding * leaf.grad.abs() + 6e-8 * (rounding > 0)).all()


@pytest.mark.parametrize("size", [1, 400, 16_384, 16_385, 1_000_000])
@pytest.mark.parametrize("fraction", [1e-3, 0.2, 1.0])
def test_ranks(size: int, fraction: float) -> None:
    losses = torch.randn(size, device="cuda").mul(50).round()
    losses[:: size // 3 + 1] = torch.nan
    indices = batchkern.rank_batches(losses, fraction)
    assert torch.equal(indices.cpu(), batchkern.rank_batches(losses.cpu(), fraction))


@pytest.mark.parametrize("shape", [(100, 50), (5000, 50), (70_000, 50), (3, 300_001)], ids=str)
def test_a_captured_graph_follows_keep_and_its_inputs(shape: tuple[int, int]) -> None:
    keep = torch.tensor(0.5, dtype=torch.float64, device="cuda")
    logits, target = batch(*shape)

    def everything(logits: Tensor, target: Tensor, keep: float | Tensor) -> list[Tensor]:
        loss, losses, grad = step(logits, target, keep)
        orders = [batchkern.rank_batches(losses, fraction) for fraction in (0.01, 0.1)]
        return [loss, losses, grad, batchkern.trimmed_mean(losses, keep), *orders]

    everything(logits, target, keep)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = everything(logits, target, keep)
    for seed, value in enumerate([0.1, 1.0, 0.37, 1e-9]):
        torch.manual_seed(seed)
        fresh, labels = batch(*shape)
        logits.copy_(fresh)
        target.copy_(labels)
        keep.fill_(value)
        graph.replay()
        step(fresh, labels, 0.9)  # eager calls in between do not disturb the graph's own memory
        for ours, expected in zip(outputs, everything(fresh, labels, value)):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("rows", [5000, 70_000])
def test_two_streams_at_once(rows: int) -> None:
    batches = [batch(rows, 300) for _ in range(2)]
    expected = [step(*each, 0.4) for each in batches]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    results: list[list[tuple[Tensor, Tensor, Tensor]]] = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(step(*batches[i], 0.4))
    torch.cuda.synchronize()
    for i in range(2):
        for outputs in results[i]:
            assert all(torch.equal(a, b) for a, b in zip(outputs, expected[i]))


@pytest.mark.parametrize("shape", [(128, 10), (4096, 1000), (300, 40_000), (70_000, 33)], ids=str)
def test_a_hundred_repeats_change_no_bit(shape: tuple[int, int]) -> None:
    logits, target = batch(*shape)
    expected = step(logits, target, 0.4)
    order = batchkern.rank_batches(expected[1], 0.05)
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(step(logits, target, 0.4), expected))
        assert torch.equal(batchkern.rank_batches(expected[1], 0.05), order)


def test_offsets_beyond_32_bits() -> None:
    rows, classes = 30_000, 100_001  # 3 x 10^9 elements, 6 GB each way
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of free memory on the GPU")
    logits = torch.randn(rows, classes, device="cuda", dtype=torch.bfloat16)
    target = torch.randint(classes, (rows,), device="cuda")
    logits[-3:] *= 8  # the hardest rows are the last ones
    loss, losses, grad = step(logits, target, 3 / rows)
    exact = F.cross_entropy(logits[-3:].double(), target[-3:], reduction="none")
    torch.testing.assert_close(losses[-3:].double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss.double(), losses.double().topk(3).values.mean(), rtol=3e-7, atol=0)
    kept = losses >= losses.topk(3).values[-1]
    assert torch.equal(grad.any(1), kept)


def test_compiled_step_equals_eager() -> None:
    def both(logits: Tensor, target: Tensor, keep: float) -> Tensor:
        loss, losses = batchkern.trimmed_cross_entropy(logits * 2, target, keep, per_sample=True)
        order = batchkern.rank_batches(losses, 0.2)
        return loss + batchkern.trimmed_mean((logits - 1).square().mean(1), keep) + 0 * order.sum()

    torch.compiler.reset()
    compiled = torch.compile(both, fullgraph=True)
    logits, target = batch(500, 40)
    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    for keep in (0.3, 0.6):
        results = [f(leaf, target, keep) for f, leaf in zip((compiled, both), leaves)]
        torch.testing.assert_close(*results)
    for result in results:
        result.backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def launches(call: Callable[[], object]) -> list[str]:
    """The kernels, and the clearing of memory, that a call launches."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        call()
        torch.cuda.synchronize()
    events = recorded.events()
    return [e.name for e in events if e.device_type == torch.autograd.DeviceType.CUDA and "Memcpy" not in e.name]


@pytest.mark.parametrize(("shape", "most"), [((128, 10), 1), ((4096, 1000), 1), ((20_011, 33), 2)], ids=str)
def test_launches(shape: tuple[int, int], most: int) -> None:
    logits, target = batch(*shape)
    logits.requires_grad_()
    forward = launches(lambda: batchkern.trimmed_cross_entropy(logits, target, 0.3))
    assert len(forward) == most, forward
    loss = batchkern.trimmed_cross_entropy(logits, target, 0.3)
    one = torch.ones((), device="cuda")
    backward = launches(lambda: torch.autograd.grad(loss, logits, one, retain_graph=True))
    assert len(backward) == 1, backward


def test_a_captured_small_step_is_two_launches() -> None:
    logits, target = batch(128, 10)
    step(logits, target, 0.3)
    graph = torch.cuda.CUDAGraph()
    leaf, one = logits.requires_grad_(), torch.ones((), device="cuda")
    with torch.cuda.graph(graph):
        torch.autograd.grad(batchkern.trimmed_cross_entropy(leaf, target, 0.3), leaf, one)
    kernels = launches(graph.replay)
    assert len(kernels) == 2, kernels


WRONG_TARGET = """
import torch, batchkern
logits = torch.randn(100, 10, device="cuda")
target = torch.zeros(100, dtype=torch.int64, device="cuda")
target[57] = 10
batchkern.trimmed_cross_entropy(logits, target, 0.5)
torch.cuda.synchronize()
"""


def test_a_wrong_target_trips_an_assert_on_the_device() -> None:
    run = subprocess.run([sys.executable, "-c", WRONG_TARGET], capture_output=True, text=True)
    assert run.returncode != 0
    assert "target must be in [0, C) or ignore_index" in run.stderr
    assert "device-side assert triggered" in run.stderr


# --- linear_trimmed_cross_entropy: cuBLAS and the row kernels ----------------------------------------------------


def layer(rows: int, width: int, words: int, dtype: torch.dtype) -> list[Tensor]:
    """hidden, weight, bias, target"""
    hidden, weight = torch.randn(rows, width, device="cuda"), torch.randn(words, width, device="cuda") / width**0.5
    _, target = batch(rows, words)
    return [hidden.to(dtype), weight.to(dtype), torch.randn(words, device="cuda").to(dtype), target]


def linear_step(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, keep: float | Tensor, **options: object
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
    loss, losses = batchkern.linear_trimmed_cross_entropy(
        *leaves[:2], target, keep, bias=leaves[2], per_sample=True, **options
    )
    return [loss.detach(), losses, *torch.autograd.grad(1.5 * loss, leaves)]


def error(x: Tensor, exact: Tensor) -> Tensor:
    return (x.double() - exact).square().mean().sqrt()


@pytest.mark.parametrize("shape", [(100, 16, 50), (700, 64, 5003), (1000, 256, 32_000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk_rows", [64, None])
@pytest.mark.parametrize("keep", [0.2, 0.9, 1.0])
def test_linear(shape: tuple[int, int, int], dtype: torch.dtype, chunk_rows: int | None, keep: float) -> None:
    hidden, weight, bias, target = layer(*shape, dtype)
    loss, losses, *grads = linear_step(hidden, weight, bias, target, keep, chunk_rows=chunk_rows)
    kept, _ = reference.select(losses, target != -100, keep)
    assert torch.equal(grads[0].any(1), kept)
    steps = []
    for oracle in (torch.float64, dtype):
        leaves = [x.detach().to(oracle).requires_grad_() for x in (hidden, weight, bias)]
        mean = F.cross_entropy(F.linear(*leaves)[kept], target[kept])
        steps.append([mean.detach(), *torch.autograd.grad(1.5 * mean, leaves)])
    for ours, exact, theirs in zip([loss, *grads], *steps):
        assert error(ours, exact) <= 1.2 * error(theirs, exact) + 1e-6 * exact.abs().max()


def test_linear_under_autocast() -> None:
    hidden, weight, bias, target = layer(600, 64, 3000, torch.float32)
    for keep, chunk_rows in ((0.2, 64), (0.9, 64), (1.0, 64), (0.5, None)):
        with torch.autocast("cuda", torch.bfloat16):
            wide = linear_step(hidden.bfloat16(), weight, bias, target, keep, chunk_rows=chunk_rows)
        narrow = linear_step(*(x.bfloat16() for x in (hidden, weight, bias)), target, keep, chunk_rows=chunk_rows)
        assert [x.dtype for x in wide[2:]] == [torch.bfloat16, torch.float32, torch.float32]
        for ours, theirs in zip(wide, narrow):
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=2**-7, atol=1e-4)


def test_a_captured_linear_step_follows_keep_and_its_inputs() -> None:
    for keep in (torch.tensor(0.5, dtype=torch.float64, device="cuda"), 0.3, 1.0):
        inputs = layer(500, 32, 2000, torch.float32)
        linear_step(*inputs, keep, chunk_rows=100)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = linear_step(*inputs, keep, chunk_rows=100)
        for seed, value in enumerate([0.1, 1.0]):
            torch.manual_seed(seed)
            fresh = layer(500, 32, 2000, torch.float32)
            for x, y in zip(inputs, fresh):
                x.copy_(y)
            if isinstance(keep, Tensor):
                keep.fill_(value)
            graph.replay()
            expected = linear_step(*fresh, value if isinstance(keep, Tensor) else keep, chunk_rows=100)
            torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-6)


def test_no_linear_step_waits_for_the_device() -> None:
    inputs = layer(500, 32, 2000, torch.bfloat16)
    for keep in (0.2, 0.9, 1.0):
        linear_step(*inputs, keep, chunk_rows=100)
        torch.cuda.set_sync_debug_mode("error")
        try:
            linear_step(*inputs, keep, chunk_rows=100)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_all_logits_never_exist() -> None:
    hidden, weight, bias, target = layer(8192, 64, 64_000, torch.bfloat16)  # logits of 1 GB
    for keep in (0.2, 1.0):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        linear_step(hidden, weight, bias, target, keep)
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before < 0.7e9


def test_compiled_linear_step_equals_eager() -> None:
    hidden, weight, bias, target = layer(500, 32, 2000, torch.float32)

    def loss(hidden: Tensor, keep: float) -> Tensor:
        return batchkern.linear_trimmed_cross_entropy(hidden.tanh(), weight, target, keep, bias=bias, chunk_rows=100)

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True)
    for keep in (1.0, 0.9, 0.5, 0.2):
        leaves = [hidden.clone().requires_grad_() for _ in range(2)]
        results = [f(leaf, keep) for f, leaf in zip((compiled, loss), leaves)]
        torch.testing.assert_close(*results)
        for result in results:
            result.backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


# --- augment_latent and soft_label_kl: kernels in Triton ---------------------------------------------------------

NUMBERS = {"gaussian": 2, "dropout": 2, "sigma": 0.5, "tau": 0.6, "drop_prob": 0.3}
HALF_STEP = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def basis_of(kind: str, width: int) -> Tensor | Hadamard | None:
    return None if kind == "none" else batchkern.random_basis(width, kind, device="cuda")


@pytest.mark.parametrize("width", [1, 10, 300, 4096, 20_000])
@pytest.mark.parametrize("kind", ["none", "normalized", "hadamard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_virtual_samples(width: int, kind: str, dtype: torch.dtype) -> None:
    if kind == "normalized" and width > 4096:
        return  # 3 GB in float64, and nothing that 4096 has not
    x, basis, seed = torch.randn(50, width, device="cuda").to(dtype), basis_of(kind, width), torch.tensor(-7).cuda()
    leaf, exact_leaf = x.requires_grad_(), x.double().detach().requires_grad_()
    out = batchkern.augment_latent(leaf, basis=basis, seed=seed, **NUMBERS)
    exact = reference.augment_latent(exact_leaf, seed, basis=basis, **NUMBERS)
    # A dense basis is rounded to the type of x; each of its columns has norm 1.
    noise = 0.0 if kind == "none" else {torch.float32: 1e-5}.get(dtype, 2 * HALF_STEP[dtype])
    allowed = 2e-6 + noise + HALF_STEP[dtype] * exact.abs()
    assert ((out - exact).abs() <= allowed).all()
    assert torch.equal(out[150:] == 0, exact[150:] == 0)  # the masks
    weight = torch.randn_like(out)
    out.backward(weight)
    exact.backward(weight.double())
    assert ((leaf.grad - exact_leaf.grad).abs() <= 4e-6 + HALF_STEP[dtype] * exact_leaf.grad.abs()).all()


@pytest.mark.parametrize("classes", [10, 19, 1000, 5003, 8192, 32_000, 131_072])
@pytest.mark.parametrize("distance", [1e-3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_divergences(classes: int, distance: float, dtype: torch.dtype) -> None:
    p = 2 * torch.randn(20, classes, device="cuda")
    q = p.repeat(3, 1) + distance * torch.randn(60, classes, device="cuda")
    p, q = (x.to(dtype).requires_grad_() for x in (p, q))
    mean, rows = batchkern.soft_label_kl(p, q, reference_grad=True, per_sample=True)
    exact_p, exact_q = (x.detach().double().requires_grad_() for x in (p, q))
    exact = reference.soft_label_kl(exact_p, exact_q)
    torch.testing.assert_close(rows.double(), exact.detach(), rtol=2e-6, atol=1e-12)
    torch.testing.assert_close(mean.double(), exact.mean(), rtol=2e-6, atol=1e-12)
    mean.backward()
    exact.mean().backward()
    for ours, theirs in ((p.grad, exact_p.grad), (q.grad, exact_q.grad)):
        allowed = 1e-6 / 60 + 2 * HALF_STEP[dtype] * theirs.abs() + 2**-25 * (dtype == torch.float16)
        assert ((ours - theirs).abs() <= allowed).all()


@pytest.mark.parametrize("kind", ["none", "normalized", "hadamard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_graph_draws_fresh_virtual_samples(kind: str, dtype: torch.dtype) -> None:
    x, basis = torch.randn(64, 256, device="cuda").to(dtype), basis_of(kind, 256)

    def everything() -> tuple[Tensor, Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        virtual = batchkern.augment_latent(leaf, basis=basis, **NUMBERS)
        loss = batchkern.soft_label_kl(virtual[:64].detach(), virtual[64:])
        return virtual.detach(), loss.detach(), torch.autograd.grad(loss, leaf)[0]

    everything()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = everything()
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append([x.clone() for x in outputs])
        virtual, loss, _ = seen[-1]
        exact = reference.soft_label_kl(virtual[:64].double(), virtual[64:].double()).mean()
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    assert not any(torch.equal(a, b) for a, b in zip(seen[0], seen[1]))
    assert not any(torch.equal(a, b) for a, b in zip(seen[1], seen[2]))


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 30e9, reason="needs 30 GB of free memory on the GPU"
)
def test_virtual_samples_beyond_32_bits() -> None:
    rows, width = 40_000, 30_000  # 2.4 x 10^9 elements with one copy
    x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    numbers = {**NUMBERS, "gaussian": 0, "dropout": 1}
    out = batchkern.augment_latent(x, seed=3, **numbers)
    last = torch.arange(2 * rows - 5, 2 * rows, device="cuda")
    kept = reference.random_words(last, width, torch.tensor(3, device="cuda")) >= round(0.3 * 2**32)
    assert torch.equal(out[-5:], x[-5:] * kept)
    kl = batchkern.soft_label_kl(x[:20_000], out[:40_000], per_sample=True)[1]
    exact = reference.soft_label_kl(x[19_995:20_000].double(), out[39_995:40_000].double())
    torch.testing.assert_close(kl[-5:].double(), exact, rtol=3e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["none", "normalized", "hadamard"])
def test_compiled_augmentation_equals_eager(kind: str) -> None:
    basis = basis_of(kind, 64)

    def step(x: Tensor) -> Tensor:
        virtual = batchkern.augment_latent(x, basis=basis, seed=5, **NUMBERS)
        return batchkern.soft_label_kl(virtual[:32], virtual[32:], reference_grad=True)

    torch.compiler.reset()
    x = torch.randn(32, 64, device="cuda")
    results = []
    for function in (torch.compile(step, fullgraph=True), step):
        leaf = x.clone().requires_grad_()
        loss = function(leaf)
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    torch.testing.assert_close(*results)


def test_fifty_repeats_of_virtual_samples_change_no_bit() -> None:
    x, basis = torch.randn(100, 1000, device="cuda"), basis_of("hadamard", 1000)

    def everything() -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        virtual = batchkern.augment_latent(leaf, basis=basis, seed=3, **NUMBERS)
        loss, rows = batchkern.soft_label_kl(virtual[:100], virtual[100:], reference_grad=True, per_sample=True)
        return [virtual.detach(), loss.detach(), rows, torch.autograd.grad(loss, leaf)[0]]

    first = everything()
    for _ in range(50):
        assert all(torch.equal(a, b) for a, b in zip(everything(), first))


def test_launches_of_virtual_samples() -> None:
    x, seed, one = torch.randn(128, 64, device="cuda"), torch.tensor(3).cuda(), torch.ones((), device="cuda")
    for kind, most in (("none", 1), ("hadamard", 2), ("normalized", 2)):
        basis = basis_of(kind, 64)
        names = launches(lambda basis=basis: batchkern.augment_latent(x, basis=basis, seed=seed, **NUMBERS))
        assert len(names) <= most + (kind == "normalized"), names  # cuBLAS may take one more
    p, q = torch.randn(128, 10, device="cuda"), torch.randn(512, 10, device="cuda", requires_grad=True)
    assert len(launches(lambda: batchkern.soft_label_kl(p, q))) == 2
    loss = batchkern.soft_label_kl(p, q)
    assert len(launches(lambda: torch.autograd.grad(loss, q, one, retain_graph=True))) <= 3  # runs the kernel again
    assert len(launches(lambda: torch.autograd.grad(batchkern.soft_label_kl(p, q), q, one))) == 3
