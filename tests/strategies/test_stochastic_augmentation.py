"""Stochastic batch augmentation against eqs. 4-11 and Algorithm 1, with the strategy's own random draws."""

import collections
import copy
import itertools
import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training import (
    DIFFERENT,
    EXACT,
    RecordingTrainer,
    descend,
    fake_run,
    fake_step,
    flat,
    furthest,
    images,
    net,
    normalised,
    sgd,
    single_thread,
    trainer,
)

from batchkern import models, parts, reference
from batchkern.basis import Hadamard, random_basis
from batchkern.errors import UserError
from batchkern.parts.virtual_samples import LatentNoise
from batchkern.seeding import derived_seed, generator
from batchkern.strategies import StochasticAugmentation, stochastic_augmentation

EPOCHS = 3
# Strong enough that every part of it shows in the weights.
STRONG = {"eta": 1.0, "sigma": 0.5, "tau": 0.6, "drop_prob": 0.3}
one_thread = single_thread()


class Draws:
    """Which updates were augmented, where, and the arbitrary numbers of each: basis, normals, uniform words."""

    def __init__(self, strategy: StochasticAugmentation) -> None:
        self.layers: list[nn.Module | None] = []
        self.seeds: list[int] = []
        self.strategy = strategy
        perturb = strategy.perturb

        def watched(step):
            perturbation = perturb(step)
            self.layers.append(perturbation and perturbation.layer)
            # The place of these numbers in the training: the strategy's seeds are arbitrary, but may not repeat.
            self.seeds.append(derived_seed(step.run.seed, "augment numbers", step.update))
            return perturbation

        strategy.perturb = watched

    def normals(self, place, copies, batch, width):
        """(copies, B, Q) standard normal numbers."""
        rows = torch.arange(batch, (1 + copies) * batch)
        seed = torch.tensor(derived_seed(self.seeds[place], "noise"))
        return reference.random_normals(rows, width, seed).float().view(copies, batch, width)

    def uniforms(self, place, copies, batch, width):
        """(copies, B, Q) uniform numbers in [0, 1)."""
        first = (1 + self.strategy.gaussian) * batch
        rows = torch.arange(first, first + copies * batch)
        seed = torch.tensor(derived_seed(self.seeds[place], "noise"))
        return (reference.random_words(rows, width, seed).double() / 2**32).view(copies, batch, width)

    def basis(self, place, width):
        """(Q, Q)"""
        kind = self.strategy.basis
        if kind == "none":
            return torch.eye(width)
        basis = random_basis(width, kind, generator=generator(self.seeds[place], "basis"))
        return basis.matrix() if isinstance(basis, Hadamard) else basis


def virtual_samples(draws: Draws, place: int, hidden: torch.Tensor, mutation="") -> list[torch.Tensor]:
    """Eqs. 5-8: the virtual copies of ``hidden (B, ...)``, one tensor each."""
    s, batch, x = draws.strategy, len(hidden), hidden.flatten(1)
    basis = draws.basis(0 if mutation == "basis drawn once" else place, x.shape[1])
    copies = []
    for normal in draws.normals(place, s.gaussian, batch, x.shape[1]):
        noise = s.sigma * normal
        if mutation != "not clipped":
            noise = noise.clamp(-s.tau, s.tau)
        copies.append(x + (noise if mutation == "no basis" else noise @ basis.T))
    for uniform in draws.uniforms(place, s.dropout, batch, x.shape[1]):
        mask = (uniform >= s.drop_prob).float()
        copies.append(mask * x / (1 - s.drop_prob if mutation == "rescaled dropout" else 1))
    return [c.view_as(hidden) for c in copies]


def paper_loop(run: RecordingTrainer, draws: Draws, mutation="", *, two_step=False, smoothing=0.0):
    """Eq. 11 in one update, or Algorithm 1 in two; at the input of ``fc``, or of ``conv2`` where that was drawn."""
    model = copy.deepcopy(run.initial).train()
    optimizer, weights, place = sgd(model), [], 0
    inputs, labels = normalised(run.feed.data), run.feed.data.labels
    eta = draws.strategy.eta * (2 if mutation == "eta doubled" else 1)

    def outputs(rows, augmented):
        """Logits of the batch and of each virtual copy of it."""
        if not augmented:
            return model(inputs[rows]), []
        at_conv = draws.layers[place] is run.model.conv2
        if mutation == "at the other layer":
            at_conv = not at_conv
        if at_conv:
            hidden, rest = model.early(inputs[rows]), lambda h: model.fc(model.late(h))
        else:
            hidden, rest = model.trunk(inputs[rows]), model.fc
        return rest(hidden), [rest(copy_) for copy_ in virtual_samples(draws, place, hidden, mutation)]

    def penalty(raw, virtual):
        soft = raw if mutation == "soft labels with a gradient" else raw.detach()
        divergences = []
        for j, copy_ in enumerate(virtual):
            log_p, log_q = soft.log_softmax(1), copy_.log_softmax(1)
            if mutation == "interleaved":  # row r of the stack of virtual rows taken for a copy of row r // M
                at = (j * len(soft) + torch.arange(len(soft))) // len(virtual)
                log_p = log_p[at]
            if mutation == "reversed":
                divergences.append((log_q.exp() * (log_q - log_p)).sum(1))
            elif mutation == "hard labels":
                divergences.append(-log_q[torch.arange(len(soft)), labels[rows]])
            else:
                divergences.append((log_p.exp() * (log_p - log_q)).sum(1))
        total = torch.stack(divergences)
        return eta * (total.sum() / len(soft) if mutation == "summed over the copies" else total.mean())

    for epoch in range(EPOCHS):
        for rows in run.batches.epoch(epoch):
            augmented = draws.layers[place] is not None
            if mutation == "one late":
                augmented = place > 0 and draws.layers[place - 1] is not None
            if mutation == "never":
                augmented = False
            raw, virtual = outputs(rows, augmented and not two_step)
            loss = F.cross_entropy(raw, labels[rows], label_smoothing=smoothing)
            descend(optimizer, loss + penalty(raw, virtual) if virtual else loss)
            weights.append(flat(model))
            if augmented and two_step:
                descend(optimizer, penalty(*outputs(rows, True)))
                weights.append(flat(model))
            place += 1
    return weights


def augmented_run(model=None, *, epochs=EPOCHS, options=None, **strategy_options):
    strategy = StochasticAugmentation(**STRONG | strategy_options)
    draws = Draws(strategy)
    run = trainer([strategy], model, epochs=epochs, **options or {})
    run.fit()
    return run, draws


@pytest.mark.parametrize("two_step", [False, True])
@pytest.mark.parametrize("basis", ["normalized", "orthogonal", "hadamard", "none"])
@pytest.mark.parametrize(("gaussian", "dropout"), [(2, 2), (3, 0), (0, 1)])
def test_each_update_is_the_papers(two_step, basis, gaussian, dropout):
    run, draws = augmented_run(two_step=two_step, basis=basis, gaussian=gaussian, dropout=dropout)
    fired = sum(layer is not None for layer in draws.layers)
    assert 4 <= fired <= 14
    assert len(run.weights) == 18 + two_step * fired
    assert furthest(run.weights, paper_loop(run, draws, two_step=two_step)) <= EXACT


@pytest.mark.parametrize("two_step", [False, True])
@pytest.mark.parametrize("layers", [("conv2",), ("conv2", "fc")])
def test_at_any_named_layer(layers, two_step):
    run, draws = augmented_run(layers=layers, basis="hadamard", two_step=two_step, eta=0.3)
    fired = [layer for layer in draws.layers if layer is not None]
    assert {layer is run.model.conv2 for layer in fired} == {"conv2" in layers, "fc" not in layers}
    assert furthest(run.weights, paper_loop(run, draws, two_step=two_step)) <= EXACT
    assert furthest(run.weights, paper_loop(run, draws, "at the other layer", two_step=two_step)) > DIFFERENT


def test_with_batch_norm_and_label_smoothing():
    run, draws = augmented_run(net(norm=True), options={"label_smoothing": 0.1, "lr": 0.03})
    assert furthest(run.weights, paper_loop(run, draws, smoothing=0.1)) <= EXACT


@cache
def finished(two_step):
    return augmented_run(two_step=two_step)


@pytest.mark.parametrize("two_step", [False, True])
@pytest.mark.parametrize(
    "mutation",
    [
        "eta doubled",
        "interleaved",
        "soft labels with a gradient",
        "reversed",
        "hard labels",
        "summed over the copies",
        "not clipped",
        "no basis",
        "basis drawn once",
        "rescaled dropout",
        "one late",
        "never",
    ],
)
def test_a_wrong_reading_would_show(mutation, two_step):
    run, draws = finished(two_step)
    assert furthest(run.weights, paper_loop(run, draws, mutation, two_step=two_step)) > DIFFERENT


@pytest.mark.parametrize(("labels", "reading"), [("trained", "soft labels with a gradient"), ("hard", "hard labels")])
@pytest.mark.parametrize("two_step", [False, True])
def test_other_labels_of_virtual_samples(labels, reading, two_step):
    """Eq. 11 as it is written, and eq. 9."""
    run, draws = augmented_run(labels=labels, two_step=two_step, eta=0.3)
    assert furthest(run.weights, paper_loop(run, draws, reading, two_step=two_step)) <= EXACT
    assert furthest(run.weights, paper_loop(run, draws, two_step=two_step)) > DIFFERENT


def test_hard_labels_are_smoothed_as_the_loss_is():
    run, _ = augmented_run(labels="hard", epochs=1, options={"label_smoothing": 0.2})
    step = fake_step(run.run)
    raw, virtual, target = torch.randn(8, 4), torch.randn(32, 4), torch.arange(8) % 4
    found = run.strategies[0]._penalty(step, raw, virtual, target)
    expected = F.cross_entropy(virtual, target.repeat(4), label_smoothing=0.2)
    assert float(found) == pytest.approx(STRONG["eta"] * float(expected), rel=1e-5)


def test_hard_labels_have_a_figure_of_their_own():
    run, _ = augmented_run(labels="hard", epochs=1)
    assert run.history[-1]["virtual_loss"] > 0
    assert "virtual_kl" not in run.history[-1]


def test_one_update_and_two_differ():
    run, draws = finished(two_step=False)
    assert furthest(run.weights[-1:], paper_loop(run, draws, two_step=True)[-1:]) > DIFFERENT


def test_diagnostics_are_the_penalty_before_eta():
    run, draws = augmented_run(epochs=1)
    row = run.history[-1]
    fired = [place for place, layer in enumerate(draws.layers) if layer is not None]
    model, total = copy.deepcopy(run.initial), 0.0
    optimizer = sgd(model)
    inputs, labels = normalised(run.feed.data), run.feed.data.labels
    for place, rows in enumerate(run.batches.epoch(0)):
        hidden = model.trunk(inputs[rows])
        raw = model.fc(hidden)
        loss = F.cross_entropy(raw, labels[rows])
        if place in fired:
            log_q = model.fc(torch.cat(virtual_samples(draws, place, hidden))).log_softmax(1)
            kl = F.kl_div(log_q, raw.detach().log_softmax(1).repeat(4, 1), log_target=True, reduction="batchmean")
            total += kl.item()
            loss = loss + STRONG["eta"] * kl
        descend(optimizer, loss)
    assert row["augmented_updates"] == len(fired)
    assert row["virtual_kl"] == pytest.approx(total / len(fired), rel=1e-4)


# --- when, and with which numbers -----------------------------------------------------------------------------------


def decisions(omega, per, count, seed=0):
    """Whether each of ``count`` iterations, or each of as many epochs, is augmented."""
    strategy, run = StochasticAugmentation(omega, per=per), fake_run(seed=seed)
    strategy.setup(run)
    by_epoch = per == "epoch"
    steps = (fake_step(run, epoch=i if by_epoch else 0, update=3 * i if by_epoch else i) for i in range(count))
    return [strategy.perturb(step) is not None for step in steps]


@pytest.mark.parametrize("per", ["iteration", "epoch"])
@pytest.mark.parametrize("omega", [math.pi / 3, math.pi / 4, 1.4])
def test_fires_at_the_rate_cos_omega(omega, per):
    p, count = math.cos(omega), 3000
    fired = decisions(omega, per, count)
    deviation = math.sqrt(count * p * (1 - p))
    assert abs(sum(fired) - count * p) < 4 * deviation
    # One decision says nothing about the next.
    both = sum(a and b for a, b in itertools.pairwise(fired))
    assert abs(both - count * p**2) < 5 * math.sqrt(count * p**2 * (1 - p**2))


@pytest.mark.parametrize("per", ["iteration", "epoch"])
def test_always_at_omega_0_and_never_at_a_right_angle(per):
    assert all(decisions(0.0, per, 500))
    assert not any(decisions(math.pi / 2, per, 500))


def test_another_seed_decides_otherwise():
    assert decisions(math.pi / 3, "iteration", 50) != decisions(math.pi / 3, "iteration", 50, seed=1)
    assert decisions(math.pi / 3, "iteration", 50) == decisions(math.pi / 3, "iteration", 50)


def test_per_epoch_decides_once_for_all_its_iterations():
    run, draws = augmented_run(per="epoch", epochs=10)
    by_epoch = [{layer is not None for layer in draws.layers[6 * e : 6 * e + 6]} for e in range(10)]
    assert all(len(decision) == 1 for decision in by_epoch)
    assert {True} in by_epoch
    assert {False} in by_epoch
    assert run.history[-1]["augmented_updates"] == 6 * sum(decision == {True} for decision in by_epoch)


def test_layers_are_drawn_evenly():
    strategy, run = StochasticAugmentation(0.0, layers=("conv2", "hidden", "fc")), fake_run()
    strategy.setup(run)
    drawn = collections.Counter(strategy.perturb(fake_step(run, update=i)).layer for i in range(900))
    assert len(drawn) == 3
    assert sum((n - 300) ** 2 / 300 for n in drawn.values()) < 13.8  # chi-square, 2 degrees of freedom, p = 0.001


def watch_bases(monkeypatch):
    bases, draw = [], LatentNoise._basis
    monkeypatch.setattr(LatentNoise, "_basis", lambda *args: bases.append(draw(*args)) or bases[-1])
    return bases


def test_the_basis_and_the_noise_are_redrawn_each_time(monkeypatch):
    strategy, run = StochasticAugmentation(0.0, dropout=1, gaussian=1), fake_run()
    strategy.setup(run)
    bases = watch_bases(monkeypatch)
    hidden = torch.randn(5, 16)
    stacks = [strategy.perturb(fake_step(run, update=i)).virtual(hidden) for i in range(4)]
    again = strategy.perturb(fake_step(run, update=0)).virtual(hidden)
    assert torch.equal(stacks[0], again)
    for i in range(4):
        assert torch.equal(stacks[i][:5], hidden)
        assert torch.allclose(bases[i].norm(dim=0), torch.ones(16), atol=1e-6)
        for j in range(i):
            assert not torch.equal(bases[i], bases[j])
            assert not torch.equal(stacks[i][5:10], stacks[j][5:10])
            assert not torch.equal(stacks[i][10:], stacks[j][10:])


def test_per_epoch_the_basis_is_that_of_the_epoch(monkeypatch):
    strategy, run = StochasticAugmentation(0.0, dropout=1, gaussian=1, per="epoch"), fake_run()
    strategy.setup(run)
    bases = watch_bases(monkeypatch)
    hidden = torch.randn(5, 16)
    places = ((0, 0), (0, 1), (1, 2))
    stacks = [strategy.perturb(fake_step(run, epoch=e, update=i)).virtual(hidden) for e, i in places]
    assert torch.equal(bases[0], bases[1])
    assert not torch.equal(bases[1], bases[2])
    for part in (slice(5, 10), slice(10, None)):  # the noise and the dropout of each iteration are its own
        assert not torch.equal(stacks[0][part], stacks[1][part])


def test_omega_moves_from_epoch_to_epoch():
    """From always to never: in the middle of three epochs at the rate of pi / 4, and the other way round."""
    for first, last in ((0.0, math.pi / 2), (math.pi / 2, 0.0)):
        strategy, run = StochasticAugmentation(first, omega_end=last), fake_run(epochs=3)
        strategy.setup(run)
        rates = [
            sum(strategy.perturb(fake_step(run, epoch=epoch, update=i)) is not None for i in range(1000)) / 1000
            for epoch in range(3)
        ]
        assert rates[0] == (first == 0)
        assert rates[2] == (last == 0)
        assert rates[1] == pytest.approx(math.cos(math.pi / 4), abs=0.06)  # 4 standard deviations


# --- inference ------------------------------------------------------------------------------------------------------


def test_the_majority_decides_and_ties_go_to_the_raw_prediction(monkeypatch):
    """Every outcome of five votes over four classes, against a count by hand."""
    strategy, run = StochasticAugmentation(), fake_run()
    strategy.setup(run)
    votes = torch.cartesian_prod(*[torch.arange(4)] * 5)  # (1024, 5), the first one being the raw prediction
    logits = F.one_hot(votes.T, 4).float() * torch.rand(5, len(votes), 1).clamp(min=0.1)
    monkeypatch.setattr(stochastic_augmentation, "run_with_virtual", lambda *_: (logits[0], logits[1:].reshape(-1, 4)))
    decided = strategy.infer(run, torch.zeros(len(votes), *run.shape)).argmax(1)
    for outcome, ballot in zip(decided.tolist(), votes.tolist(), strict=True):
        counts = collections.Counter(ballot)
        winners = [c for c in counts if counts[c] == max(counts.values())]
        assert outcome == (ballot[0] if ballot[0] in winners else min(winners))


def test_predictions_are_votes_of_the_model_around_each_sample():
    run, _ = augmented_run(net(dropout=0.5), sigma=2.0, tau=3.0, drop_prob=0.5)
    data, strategy = images(150, seed=9), run.strategies[0]
    model = copy.deepcopy(run.model).eval()
    draws = Draws(strategy)
    draws.seeds = [derived_seed(run.seed, "vote")]
    with torch.no_grad():
        hidden = model.trunk(normalised(data, run.feed.data))
        raw = model.fc(hidden)
        ballots = torch.stack([raw, *(model.fc(h) for h in virtual_samples(draws, 0, hidden))]).argmax(2).T.tolist()
    expected = []
    for ballot in ballots:
        counts = collections.Counter(ballot)
        winners = [c for c in counts if counts[c] == max(counts.values())]
        expected.append(ballot[0] if ballot[0] in winners else min(winners))
    predicted = run.predict(data)
    assert predicted.tolist() == expected
    assert predicted.tolist() != raw.argmax(1).tolist()
    assert run.predict(data).tolist() == expected

    plain = trainer([StochasticAugmentation(**STRONG, vote=False)], copy.deepcopy(run.model))
    assert plain.predict(data).tolist() == raw.argmax(1).tolist()


def test_the_vote_is_at_the_layer_that_is_named():
    data = images(150, seed=9)
    votes = {}
    for options in ({"layers": ("fc",)}, {"layers": ("conv2", "fc"), "vote_layer": "fc"}, {"layers": ("conv2", "fc")}):
        run = trainer([StochasticAugmentation(0.0, basis="hadamard", **options, **STRONG | {"sigma": 2.0})])
        votes[options.get("vote_layer", options["layers"])] = run.predict(data).tolist()
    assert votes["fc"] == votes["fc",]
    assert votes["fc"] != votes["conv2", "fc"]
    with pytest.raises(UserError, match=r"vote_layer: the model has no module 'conv9'; it has conv1"):
        trainer([StochasticAugmentation(vote_layer="conv9")])


def test_evaluation_reports_the_vote_and_the_plain_model():
    run, _ = augmented_run(options={"test": images(150, seed=9)}, sigma=2.0, tau=3.0, drop_prob=0.5)
    figures, data = run.evaluate(), images(150, seed=9)
    with torch.no_grad():
        logits = copy.deepcopy(run.model).eval()(normalised(data, run.feed.data))
    assert figures["test_accuracy_plain"] == pytest.approx(float((logits.argmax(1) == data.labels).float().mean()))
    assert figures["test_loss"] == pytest.approx(float(F.cross_entropy(logits, data.labels)), rel=1e-5)
    assert figures["test_accuracy"] == pytest.approx(float((run.predict(data) == data.labels).float().mean()))


# --- which layers can hold virtual samples --------------------------------------------------------------------------


class Odd(nn.Module):
    """A layer that runs twice, one that never does, one beside the path to the logits, one called by keyword."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(36, 36)
        self.twice = nn.Linear(36, 36)
        self.never = nn.Linear(36, 36)
        self.beside = nn.Linear(36, 1)
        self.keyword = nn.Linear(36, 36)
        self.fc = nn.Linear(36, 4)

    def forward(self, x):
        x = self.twice(torch.relu(self.twice(torch.relu(self.first(x.flatten(1))))))
        self.score = self.beside(x)
        return self.fc(self.keyword(input=x))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ("twice", "runs once in a forward pass; this one ran twice"),
        ("never", "runs once in a forward pass; this one did not run"),
        ("beside", "that the logits depend on"),
        ("keyword", "first argument, not a keyword, is a tensor"),
    ],
)
def test_layers_that_cannot_hold_virtual_samples_are_refused_at_setup(layer, reason):
    with pytest.raises(UserError, match=reason) as refusal:
        trainer([StochasticAugmentation(layers=layer)], Odd())
    assert repr(layer) in str(refusal.value)


@pytest.mark.parametrize("layer", ["stage1.0.conv1", "stage2.0.bn2"])
def test_a_layer_inside_a_residual_block_is_refused_at_setup(layer):
    model = models.build("resnet8", shape=(1, 8, 8), classes=4)
    data = images(20, shape=(1, 8, 8))
    with pytest.raises(UserError, match=f"layers: .*'{layer}'.* skip connection"):
        trainer([StochasticAugmentation(layers=(layer,), basis="hadamard")], model, data, data)
    # A whole block is fine, and so is the layer after the last.
    names = ("stage2.0", "fc")
    run = trainer([StochasticAugmentation(0.0, layers=names, basis="hadamard")], model, data, data, epochs=1)
    assert run.fit()["augmented_updates"] == 3


def test_a_layer_too_wide_for_a_matrix_is_refused_at_setup(monkeypatch):
    monkeypatch.setattr(parts.virtual_samples, "DENSE_LIMIT", 20)
    trainer([StochasticAugmentation(layers="fc")])
    with pytest.raises(UserError, match="layers: 'hidden'.* basis='normalized' needs a 54 x 54 matrix .*hadamard"):
        trainer([StochasticAugmentation(layers="hidden")])
    trainer([StochasticAugmentation(layers="hidden", basis="hadamard")])


def test_trying_the_layers_leaves_the_model_as_it_was():
    model = net(norm=True)
    before, state = flat(model), torch.get_rng_state()
    StochasticAugmentation(layers=("conv2", "fc")).setup(fake_run(model=model))
    assert torch.equal(before, flat(model))
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_model_of_timm_at_its_classifier():
    pytest.importorskip("timm")
    data = images(24, shape=(3, 32, 32))
    run = trainer([StochasticAugmentation(0.0)], "resnet10t", data, data, epochs=1)
    assert run.strategies[0].modules == [run.model.get_classifier()]
    row = run.fit()
    assert row["augmented_updates"] == 3
    assert row["virtual_kl"] > 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"omega": -0.1}, "omega"),
        ({"omega": 1.6}, "omega"),
        ({"omega_end": 1.6}, "omega_end must be in"),
        ({"labels": "firm"}, "labels must be soft, trained or hard, got 'firm'"),
        ({"vote_layer": 3}, "vote_layer must be the name of a module"),
        ({"vote_layer": "fc", "vote": False}, "vote_layer is 'fc', but vote is False"),
        ({"gaussian": 0, "dropout": 0}, "gaussian and dropout"),
        ({"gaussian": -1, "dropout": 3}, "gaussian and dropout"),
        ({"gaussian": 1.5}, "gaussian must be a whole number"),
        ({"dropout": True}, "dropout must be a whole number"),
        ({"drop_prob": 1.0}, "drop_prob"),
        ({"eta": -1.0}, "eta"),
        ({"eta": math.inf}, "eta"),
        ({"sigma": math.nan}, "sigma"),
        ({"tau": 0.0}, "tau"),
        ({"basis": "random"}, "basis"),
        ({"per": "batch"}, "per"),
    ],
)
def test_wrong_options_are_refused_at_once(options, named):
    with pytest.raises(UserError, match=named):
        StochasticAugmentation(**options)


@pytest.mark.parametrize("name", ["conv9", ""])
def test_an_unknown_layer_is_refused_at_setup(name):
    with pytest.raises(UserError, match=f"layers: the model has no module '{name}'; it has conv1"):
        trainer([StochasticAugmentation(layers=(name,))])


def test_a_strategy_serves_a_second_run():
    strategy = StochasticAugmentation(**STRONG)
    rows = []
    for _ in range(2):
        rows.append(trainer([strategy]).fit())
    assert rows[0] == rows[1] | {"seconds": rows[0]["seconds"]}
