"""The kernels at work: trainings by them and by the reference, and one compiled training step with every operation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from training import DIFFERENT, EXACT, furthest, images, single_thread, trainer

import batchkern
from batchkern import _backend
from batchkern.strategies import (
    HardBatches,
    PassiveInjection,
    RandomSelection,
    Stepwise,
    StochasticAugmentation,
    Strategy,
    Trimming,
)

one_thread = single_thread()

STRATEGIES: dict[str, tuple[Callable[[], Strategy], set[str]]] = {
    # Name -> what builds it, and the operations that it must have run.
    "trimming": (lambda: Trimming(start=0.5, end=0.3, backward="masked"), {"trimmed_cross_entropy"}),
    "trimming compact": (lambda: Trimming(start=0.5, end=0.3, backward="compact"), {"trimmed_cross_entropy"}),
    "hard batches": (lambda: HardBatches(delta=0.4), {"trimmed_cross_entropy", "rank_batches"}),
    "stepwise": (lambda: Stepwise(fractions=(0.5, 1.0), batch_multiples=(1, 1)), {"trimmed_cross_entropy"}),
    "augmentation": (
        lambda: StochasticAugmentation(omega=0.3),
        {"trimmed_cross_entropy", "augment_latent", "soft_label_kl"},
    ),
    "passive": (lambda: PassiveInjection(images(30, seed=5), every=3), {"trimmed_cross_entropy"}),
    "random rows": (lambda: RandomSelection(select="rows", start=0.5, end=0.3), {"cross_entropy", "trimmed_mean"}),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_training_by_kernels_is_that_by_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, needed = STRATEGIES[name]
    ran: set[str] = set()

    def spy(op: str, x: Tensor) -> bool:
        ran.add(op)
        return has_kernel(op, x)

    has_kernel = _backend.has_kernel
    monkeypatch.setattr(_backend, "has_kernel", spy)
    by_kernels = trainer([build()], train=images(160), epochs=2)
    by_kernels.fit()
    assert needed <= ran
    monkeypatch.setattr(_backend, "has_kernel", lambda op, x: False)
    by_reference = trainer([build()], train=images(160), epochs=2)
    by_reference.fit()
    assert furthest(by_kernels.weights, by_reference.weights) < EXACT
    # One other row in the selection of any step would show.
    assert furthest(by_kernels.weights[:-1], by_kernels.weights[1:]) > DIFFERENT


def step(weight: Tensor, x: Tensor, target: Tensor, signs: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """A loss that runs every operation, and the ranking of its parts."""
    stacked = batchkern.augment_latent(
        x @ weight, gaussian=1, dropout=1, sigma=0.3, tau=0.5, drop_prob=0.2, basis=batchkern.Hadamard(signs), seed=3
    )
    logits, virtual = stacked[: len(x)], stacked[len(x) :]
    loss, losses = batchkern.trimmed_cross_entropy(logits, target, keep, label_smoothing=0.1, per_sample=True)
    loss = loss + 0.5 * batchkern.soft_label_kl(logits, virtual, temperature=2.0, reference_grad=True)
    loss = loss + batchkern.trimmed_mean(F.mse_loss(logits, x, reduction="none").mean(1), 0.3)
    loss = loss + batchkern.linear_trimmed_cross_entropy(x, weight, target, 0.5)
    return loss, batchkern.rank_batches(losses, 0.25)


def test_a_compiled_step_with_every_operation() -> None:
    torch.manual_seed(0)
    x, target = torch.randn(24, 12), torch.randint(12, (24,))
    signs = torch.randint(2, (12,)) * 2.0 - 1
    results = []
    for keep in (0.5, 0.25):  # as a tensor: another value needs no other graph
        row = []
        for call in (torch.compile(step, fullgraph=True, dynamic=False), step):
            weight = torch.eye(12).add_(0.1 * torch.randn(12, 12, generator=torch.Generator().manual_seed(1)))
            weight.requires_grad_()
            loss, ranked = call(weight, x, target, signs, torch.tensor(keep, dtype=torch.float64))
            loss.backward()
            row.append((loss.detach(), weight.grad, ranked))
        (loss, grad, ranked), (eager_loss, eager_grad, eager_ranked) = row
        torch.testing.assert_close(loss, eager_loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(grad, eager_grad, rtol=1e-5, atol=1e-6)
        assert torch.equal(ranked, eager_ranked)
        results.append(loss)
    assert abs(results[0] - results[1]) > 1e-2


def test_gradients_in_float64() -> None:
    logits, target = torch.randn(6, 4, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 2, 3, 0, 1])
    assert torch.autograd.gradcheck(lambda z: batchkern.trimmed_cross_entropy(z, target, 0.5), logits)
    virtual = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda p, q: batchkern.soft_label_kl(p, q, temperature=1.5, reference_grad=True), (logits, virtual)
    )
    assert torch.autograd.gradcheck(lambda z: batchkern.trimmed_mean(z[:, 0], 0.4), logits)
    assert torch.autograd.gradcheck(
        lambda z: batchkern.augment_latent(
            z, gaussian=2, dropout=2, sigma=1.0, tau=0.5, drop_prob=0.3, seed=1, rescale_dropout=True
        ),
        logits,
    )


def loss_of(logits: Tensor, target: Tensor, keep: float) -> Tensor:
    return batchkern.trimmed_cross_entropy(logits, target, keep) + batchkern.trimmed_mean(logits[:, 0], keep)


def test_a_schedule_of_keep_does_not_recompile() -> None:
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    logits, target = torch.randn(50, 4), torch.arange(50) % 4
    for step in range(12):  # more values than the compiler makes graphs
        keep = 1 - 0.07 * step
        torch.testing.assert_close(compiled(logits, target, keep), loss_of(logits, target, keep))


def hessian(loss: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    return torch.autograd.functional.hessian(loss, z)


def penalty(loss: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(loss(z), z, create_graph=True)
    return torch.autograd.grad(grad.sum(), z)[0]


@pytest.mark.parametrize("second", [hessian, penalty])
def test_a_second_derivative_is_never_silently_zero(second: Callable[..., Tensor]) -> None:
    target, reference = torch.tensor([0, 1, 2]), torch.randn(3, 4)
    for loss in (
        lambda z: batchkern.trimmed_cross_entropy(z, target, 0.5),
        lambda z: batchkern.soft_label_kl(reference, z),
    ):
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            second(loss, torch.randn(3, 4, requires_grad=True))


def test_inplace_backward_lets_go_of_the_logits() -> None:
    logits = torch.randn(6, 4, requires_grad=True) * 1
    loss = batchkern.trimmed_cross_entropy(logits, torch.zeros(6, dtype=torch.long), 0.5, inplace_backward=True)
    loss.backward(retain_graph=True)
    assert loss.grad_fn.inplace[0] is None
    with pytest.raises(RuntimeError, match="inplace_backward=True: the first backward pass"):
        loss.backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inplace_backward_where_there_is_none(mode: Callable[[], torch.no_grad]) -> None:
    leaf, target = torch.randn(6, 4, requires_grad=True), torch.zeros(6, dtype=torch.long)
    with mode():
        inner = torch.randn(6, 4)
        for logits in (leaf, inner):
            loss = batchkern.trimmed_cross_entropy(logits, target, 0.5, inplace_backward=True)
            torch.testing.assert_close(loss, batchkern.trimmed_cross_entropy(logits, target, 0.5))


@pytest.mark.parametrize(
    "view",
    [
        lambda flat: flat.unfold(0, 5, 1),
        lambda flat: flat.as_strided((8, 5), (3, 1)),
        lambda flat: torch.view_as_complex(flat[:80].view(8, 5, 2)).conj().imag,
    ],
    ids=["unfolded", "strided", "negated"],
)
def test_inplace_backward_refuses_logits_that_cannot_hold_a_gradient(view: Callable[[Tensor], Tensor]) -> None:
    logits = view(torch.randn(100, requires_grad=True) * 1)
    target = torch.zeros(len(logits), dtype=torch.long)
    with pytest.raises(ValueError, match="inplace_backward must be False"):
        batchkern.trimmed_cross_entropy(logits, target, 0.5, inplace_backward=True)


LOGITS, TARGET = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"ignore_index": None}, TypeError, "ignore_index must be an int"),
        ({"ignore_index": True}, TypeError, "ignore_index must be an int"),
        ({"ignore_index": 2**70}, ValueError, "ignore_index must fit"),
        ({"group": "world"}, TypeError, "group must be"),
        ({"class_weight": torch.ones(3, requires_grad=True)}, ValueError, "class_weight must not require"),
        ({"keep": torch.tensor(0.5, dtype=torch.float64, requires_grad=True)}, ValueError, "keep must not require"),
        ({"logits": LOGITS.to_sparse()}, TypeError, "logits must be a dense tensor"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_in_one_sentence(options: dict, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word) as raised:
        batchkern.trimmed_cross_entropy(**{"logits": LOGITS, "target": TARGET, "keep": 0.5, **options})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("name", "number"), [("gaussian", 2**62), ("dropout", 2**63)])
def test_more_copies_than_memory_are_refused(name: str, number: int) -> None:
    counts = {"gaussian": 1, "dropout": 1, name: number}
    with pytest.raises(ValueError, match=f"{name} must be at most"):
        batchkern.augment_latent(torch.randn(4, 5), sigma=0.1, tau=0.2, drop_prob=0.5, **counts)
    with pytest.raises((ValueError, RuntimeError)):  # the second: no 64-bit number
        torch.ops.batchkern.augment_latent(
            torch.randn(4, 5), torch.tensor(1), sigma=0.1, tau=0.2, drop_prob=0.5, **counts
        )


def test_any_byte_but_zero_is_a_true_mask() -> None:
    mask = torch.tensor([2, 2, 3, 0], dtype=torch.uint8).view(torch.bool)
    assert batchkern.trimmed_mean(torch.arange(4.0), 0.5, mask=mask) == 1.5


def test_virtual_samples_of_a_meta_tensor() -> None:
    options = {"gaussian": 1, "dropout": 1, "sigma": 0.1, "tau": 0.2, "drop_prob": 0.5}
    assert batchkern.augment_latent(torch.empty(4, 5, device="meta"), **options).shape == (12, 5)
