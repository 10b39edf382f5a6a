"""Virtual samples in any loop: the numbers of the trainer, any rank of tensor, and no pass without them unnoticed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from training import fake_run, fake_step

from batchkern.errors import UserError
from batchkern.parts import VirtualSamples
from batchkern.parts.virtual_samples import LatentNoise
from batchkern.strategies import StochasticAugmentation
from batchkern.strategies.base import run_with_virtual

ALWAYS = {"omega": 0.0, "gaussian": 1, "dropout": 2, "sigma": 0.5, "tau": 1.0, "drop_prob": 0.3}


class Text(nn.Module):
    """(B, T) tokens -> (B, T, C) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.mix(self.embed(tokens))))


class Pictures(nn.Module):
    """(B, C, H, W) -> (B, classes), with a layer whose input has four dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.head = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 3, 3), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(torch.relu(self.first(x)))).mean(dim=(2, 3)))


def table() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], str]] = {
    "a table": (table, lambda: torch.randn(7, 5), "2"),
    "pictures": (Pictures, lambda: torch.randn(7, 1, 8, 8), "conv"),
    "text": (Text, lambda: torch.randint(11, (7, 3)), "mix"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layer", [None, "another"])
def test_the_penalty_is_that_of_a_loop_with_the_numbers_of_the_trainer(case: str, layer: str | None) -> None:
    torch.manual_seed(0)
    make, inputs, inner = CASES[case]
    model, name = make(), None if layer is None else inner
    if case == "a table" and layer is not None:
        name = "0"
    plain = copy.deepcopy(model)
    virtual = VirtualSamples(model, name, seed=3, eta=0.7, **ALWAYS)  # type: ignore[arg-type]
    strategy, run = StochasticAugmentation(eta=0.7, **ALWAYS), fake_run(seed=3)  # type: ignore[arg-type]
    strategy.fired = strategy.fired_in_epoch = 0
    strategy.modules = [plain.get_submodule(name) if name else list(plain.modules())[-1]]
    for update in range(3):
        x = inputs()
        step = fake_step(run, update=update, rows=7)
        perturbation = strategy.perturb(step)
        assert perturbation is not None
        raw, rows = run_with_virtual(plain, perturbation.layer, perturbation.virtual, x)
        logits = model(x)
        assert logits.shape == raw.shape
        torch.testing.assert_close(logits, plain(x))
        mean = divergence(raw, rows)
        penalty = virtual.penalty()
        torch.testing.assert_close(penalty, 0.7 * mean.float(), rtol=1e-4, atol=1e-7)
        assert penalty > 1e-4
        grads = torch.autograd.grad(penalty, list(model.parameters())[-2:])
        theirs = torch.autograd.grad(0.7 * mean, list(plain.parameters())[-2:])
        for ours, expected in zip(grads, theirs, strict=True):
            torch.testing.assert_close(ours, expected.float(), rtol=1e-4, atol=1e-7)


def divergence(raw: Tensor, virtual: Tensor) -> Tensor:
    """Mean over virtual rows, in float64."""
    labels = raw.detach().double().log_softmax(-1).repeat(len(virtual) // len(raw), *[1] * (raw.dim() - 1))
    return F.kl_div(virtual.double().log_softmax(-1), labels, reduction="none", log_target=True).sum(-1).mean()


def test_each_position_of_a_sequence_is_perturbed_by_itself() -> None:
    noise, hidden = LatentNoise(sigma=0.5), torch.randn(7, 3, 6)
    stacked = noise(hidden, 1, 2)
    assert torch.equal(stacked.view(5, 7 * 3, 6), noise(hidden.view(7 * 3, 6), 1, 2).view(5, 7 * 3, 6))
    assert torch.equal(stacked[:7], hidden)
    assert noise(torch.randn(7, 3, 4, 5), 1, 2).shape == (35, 3, 4, 5)


def test_a_pass_that_was_left_half_way_is_forgotten() -> None:
    model, x = table(), torch.randn(6, 5)
    virtual = VirtualSamples(model, "0", **ALWAYS)  # type: ignore[arg-type]
    assert len(model[0](x)) == 24
    with torch.no_grad():
        assert len(model[2](model[1](model[0](x)))) == 6
    assert len(model(x)) == 6
    assert virtual.penalty() > 0


def test_positions_that_do_not_count() -> None:
    model, tokens = Text(), torch.randint(11, (5, 4))
    mask = torch.tensor([[True, True, False, False]] * 3 + [[True, False, False, False]] * 2)
    virtual = VirtualSamples(model, **ALWAYS)  # type: ignore[arg-type]
    model(tokens)
    assert virtual._stack.logits is not None
    raw, rows = virtual._stack.logits
    expected = 0.1 * divergence(raw[mask], rows.view(3, 5, 4, 4)[:, mask].reshape(-1, 4))
    torch.testing.assert_close(virtual.penalty(mask), expected.float(), rtol=1e-4, atol=1e-8)
    model(tokens)
    nothing = virtual.penalty(torch.zeros_like(mask))
    nothing.backward()
    assert float(nothing) == 0


def test_the_coin_falls_by_omega_and_the_model_is_itself_elsewhere() -> None:
    model, x = table(), torch.randn(6, 5)
    expected = model(x)
    virtual = VirtualSamples(model, omega=math.pi / 3)
    penalties = []
    for _ in range(60):
        torch.testing.assert_close(model(x), expected)
        penalties.append(float(virtual.penalty()))
    assert 18 < sum(penalty > 0 for penalty in penalties) < 42
    passes = virtual.passes
    with torch.no_grad():
        model(x)
    model.eval()(x)
    assert virtual.passes == passes == 60
    model.train()
    virtual.remove()
    model(x)
    assert virtual.passes == 60


def test_a_pass_without_virtual_samples_is_an_error() -> None:
    model, x = table(), torch.randn(6, 5)
    virtual = VirtualSamples(model, **ALWAYS)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="no virtual samples went through the model: call penalty"):
        virtual.penalty()
    model(x)
    virtual.penalty()
    for run in (lambda: None, lambda: model.eval()(x)):
        run()
        with pytest.raises(RuntimeError, match=r"once after each of its forward passes in training mode"):
            virtual.penalty()


def test_a_compiled_model_has_them_or_says_that_it_has_not() -> None:
    """The counter-example: a hook on a model that had been compiled and run was ignored, and the loss was NaN."""
    torch.manual_seed(0)
    model, x = table(), torch.randn(6, 5)
    plain = copy.deepcopy(model)
    expected = VirtualSamples(plain, **ALWAYS)  # type: ignore[arg-type]
    virtual = VirtualSamples(model, **ALWAYS)  # type: ignore[arg-type]
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(3):
        torch.testing.assert_close(compiled(x), plain(x))
        torch.testing.assert_close(virtual.penalty(), expected.penalty())

    late = Pictures()
    compiled = torch.compile(late, backend="aot_eager")
    compiled(torch.randn(6, 1, 8, 8))
    virtual = VirtualSamples(late, **ALWAYS)  # type: ignore[arg-type]
    compiled(torch.randn(6, 1, 8, 8))
    with pytest.raises(RuntimeError, match="construct VirtualSamples before the model is compiled"):
        virtual.penalty()

    torch.compiler.reset()
    whole = table()
    VirtualSamples(whole, **ALWAYS)  # type: ignore[arg-type]
    with pytest.raises(Exception, match=r"torch\.compiler\.disable"):
        torch.compile(whole, backend="aot_eager", fullgraph=True)(x)


def test_a_checkpointed_layer_draws_the_same_again() -> None:
    torch.manual_seed(0)
    plain, x = table(), torch.randn(6, 5)
    saving = copy.deepcopy(plain)
    virtual = [VirtualSamples(model, "2", omega=0.7, seed=1) for model in (plain, saving)]
    for _ in range(6):  # with and without virtual samples
        for model, samples in zip((plain, saving), virtual, strict=True):
            model.zero_grad()
            logits = model(x) if model is plain else checkpoint(model, x, use_reentrant=False)
            (logits.square().mean() + samples.penalty()).backward()
        for ours, theirs in zip(saving.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)
        assert virtual[0].passes == virtual[1].passes
        with torch.no_grad():
            assert saving(x).shape == (6, 4)


def test_its_state_goes_on_with_the_same_numbers() -> None:
    model, x = table(), torch.randn(6, 5)
    virtual = VirtualSamples(model, seed=2, omega=0.5)

    def penalties(count: int) -> list[float]:
        found = []
        for _ in range(count):
            model(x)
            found.append(float(virtual.penalty()))
        return found

    penalties(4)
    state = virtual.state_dict()
    expected = penalties(5)
    virtual.remove()
    virtual = VirtualSamples(model, seed=2, omega=0.5)
    virtual.load_state_dict(state)
    assert penalties(5) == expected
    assert len(set(expected)) > 2
    assert not list(virtual.parameters())


class Tuple(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Any:
        return self.head(x) + 0 * self.body(x.mean()[None].expand(5)).sum()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda m: VirtualSamples(m, "5"), "layer: the model has no module '5'; it has 0, 1, 2"),
        (lambda m: VirtualSamples(m, omega=2.0), r"omega must be in \[0, pi/2\], got 2.0"),
        (lambda m: VirtualSamples(m, eta=-1.0), "eta must be at least 0, got -1.0"),
        (lambda m: VirtualSamples(m, gaussian=0, dropout=0), "add up to at least 1"),
        (lambda m: VirtualSamples(m, labels="hard"), "labels must be soft or trained, got 'hard'"),  # type: ignore[arg-type]
        (lambda m: VirtualSamples(m, sigmas=1.0), "unexpected keyword argument 'sigmas'"),
        (lambda m: VirtualSamples(nn.ReLU()), "has no classifier that could be found"),
    ],
)
def test_wrong_arguments(make: Any, says: str) -> None:
    with pytest.raises((UserError, TypeError), match=says):
        make(table())


def test_layers_that_cannot_hold_them_say_so_in_the_first_pass() -> None:
    model = Tuple()
    VirtualSamples(model, "body", **ALWAYS)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"a layer whose input is \(B, ...\), got \(5,\)"):
        model(torch.randn(3, 5))
    twice = nn.Sequential(layer := nn.Linear(5, 5), layer, nn.Linear(5, 4))
    VirtualSamples(twice, "0", **ALWAYS)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="runs once in a forward pass; this one ran twice"):
        twice(torch.randn(3, 5))


class Positions(nn.Module):
    """Each position of a sequence is a row of the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.mix(x)).flatten(0, 1))


class HeadFirst(nn.Module):
    """The classifier is not the last that is registered."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Linear(7, 4), nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def test_models_of_other_shapes() -> None:
    model, x = Positions(), torch.randn(7, 3, 6)
    plain = model(x)
    virtual = VirtualSamples(model, "mix", **ALWAYS)  # type: ignore[arg-type]
    torch.testing.assert_close(model(x), plain)
    assert virtual.shape == (7 * 3,)
    assert virtual.penalty() > 0
    alone = nn.Linear(5, 3)
    virtual = VirtualSamples(alone, **ALWAYS)  # type: ignore[arg-type]
    assert alone(torch.randn(6, 5)).shape == (6, 3)
    assert virtual.penalty() > 0
    VirtualSamples(wrong := HeadFirst(), **ALWAYS)  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match=r"classifier must name the layer that the logits come from: .* \(6, 4\), .* \(6, 7\)"
    ):
        wrong(torch.randn(6, 5))
    right = HeadFirst()
    virtual = VirtualSamples(right, classifier="head", **ALWAYS)  # type: ignore[arg-type]
    right(torch.randn(6, 5))
    assert virtual.penalty() > 0
    with pytest.raises(UserError, match=r"layer 'head' already has virtual samples; remove\(\) them"):
        VirtualSamples(right, classifier="head")


def test_masks_of_another_kind() -> None:
    model = Text()
    virtual = VirtualSamples(model, **ALWAYS)  # type: ignore[arg-type]
    for mask in (torch.ones(5, 4, dtype=torch.int64), torch.ones(4, dtype=torch.bool)):
        model(torch.randint(11, (5, 4)))
        with pytest.raises(UserError, match=r"mask must be bool of shape \(5, 4\), got torch\."):
            virtual.penalty(mask)
