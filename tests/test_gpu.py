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

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

OPS = ("trimmed_cross_entropy", "trimmed_mean", "rank_batches")
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
