"""RHO-LOSS against a loop over Algorithm 1, reference models and all."""

import copy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from training import DIFFERENT, EXACT, descend, flat, furthest, images, net, normalised, sgd, single_thread, trainer

from batchkern import models
from batchkern.errors import UserError
from batchkern.seeding import derived_seed, generator
from batchkern.strategies import RHO

ROWS, SIZE, EPOCHS, FRACTION, OF_REFERENCE = 44, 4, 3, 0.25, 4
one_thread = single_thread()


def reference_losses(network, half, others, seed, inputs, labels, mutation="", smoothing=0.0):
    """The losses of ``others`` under a network that was trained on ``half``, at the end of its best epoch."""
    network.train()
    optimizer, found = sgd(network), []
    for epoch in range(OF_REFERENCE):
        for places in torch.randperm(len(half), generator=generator(seed, "epoch", epoch)).split(SIZE):
            rows = half[places]
            descend(optimizer, F.cross_entropy(network(inputs[rows]), labels[rows], label_smoothing=smoothing))
        network.eval()
        with torch.no_grad():
            found.append(
                F.cross_entropy(network(inputs[others]), labels[others], reduction="none", label_smoothing=smoothing)
            )
        network.train()
    means = [float(losses.mean()) for losses in found]
    return found[-1 if mutation == "the last epoch" else means.index(min(means))]


def irreducible_losses(run, networks, mutation="", smoothing=0.0):
    inputs, labels = normalised(run.feed.data), run.feed.data.labels
    halves = torch.randperm(ROWS, generator=generator(run.seed, "halves")).split(ROWS // 2)
    irreducible = torch.zeros(ROWS)
    for number, network in enumerate(networks):
        half, others = halves[number], halves[1 - number]
        if mutation == "the half that was seen":
            others = half
        seed = derived_seed(run.seed, "reference", number)
        irreducible[others] = reference_losses(network, half, others, seed, inputs, labels, mutation, smoothing)
    return irreducible


def paper_loop(run, mutation="", *, smoothing=0.0, at_random=False):
    model = copy.deepcopy(run.initial).train()
    scorer = copy.deepcopy(model).train()
    inputs, labels = normalised(run.feed.data), run.feed.data.labels
    irreducible = irreducible_losses(run, [copy.deepcopy(run.initial) for _ in range(2)], mutation, smoothing)
    optimizer, weights = sgd(model), []
    for epoch in range(EPOCHS):
        order = torch.randperm(ROWS, generator=generator(run.batches.seed, "epoch", epoch))
        for rows in order.split(round(SIZE / FRACTION)):
            scorer.load_state_dict(model.state_dict())
            with torch.no_grad():
                losses = F.cross_entropy(
                    scorer(inputs[rows]), labels[rows], reduction="none", label_smoothing=smoothing
                )
            count = round(FRACTION * len(rows))
            if mutation != "the loss alone":
                losses = losses - irreducible[rows]
            kept = losses.topk(count, largest=mutation != "lowest").indices
            if at_random:
                kept = torch.randperm(len(rows), generator=generator(run.seed, "random rows", len(weights)))[:count]
            kept = rows[kept]
            descend(optimizer, F.cross_entropy(model(inputs[kept]), labels[kept], label_smoothing=smoothing))
            weights.append(flat(model))
    return weights, irreducible


def rho(**options):
    return RHO(FRACTION, reference_epochs=OF_REFERENCE, **options)


def rho_run(strategy=None, **options):
    run = trainer([strategy or rho()], options.pop("model", net()), epochs=EPOCHS, batch_size=SIZE, **options)
    run.fit()
    return run


@pytest.mark.parametrize(
    ("smoothing", "at_random", "norm"), [(0.0, False, False), (0.2, False, True), (0.0, True, False)]
)
def test_each_update_is_the_papers(smoothing, at_random, norm):
    strategy = rho(at_random=at_random)
    run = rho_run(strategy, model=net(norm=norm), label_smoothing=smoothing)
    weights, irreducible = paper_loop(run, smoothing=smoothing, at_random=at_random)
    assert torch.allclose(strategy.irreducible, irreducible, atol=EXACT)
    assert len(weights) == EPOCHS * 3
    assert furthest(run.weights, weights) <= EXACT
    row = run.history[-1]
    assert row["irreducible_loss"] == pytest.approx(float(irreducible.mean()), abs=EXACT)
    # Candidates of 16, 16 and 12, of which 4, 4 and 3 are trained on.
    kept, before = EPOCHS * 11, OF_REFERENCE * ROWS
    assert (row["samples_seen"], row["samples_kept"]) == (EPOCHS * ROWS, kept)
    assert (row["samples_forward"], row["samples_backward"]) == (2 * before + EPOCHS * ROWS + kept, before + kept)
    assert run.history[0]["samples_backward"] == before + 11


@cache
def finished():
    return rho_run()


@pytest.mark.parametrize("mutation", ["the loss alone", "lowest", "the half that was seen", "the last epoch"])
def test_a_wrong_selection_would_show(mutation):
    run = finished()
    assert furthest(run.weights, paper_loop(run)[0]) <= EXACT
    other, irreducible = paper_loop(run, mutation)
    if mutation == "the last epoch":  # which may choose the same rows all the same
        assert not torch.allclose(run.strategies[0].irreducible, irreducible, atol=1e-3)
    else:
        assert furthest(run.weights, other) > DIFFERENT


@pytest.mark.parametrize("reference", [None, "cnn"])
def test_reference_models_by_name_have_weights_of_their_own(reference):
    data = images(ROWS, shape=(1, 8, 8))
    strategy = rho(reference=reference)
    model = "cnn" if reference is None else net()
    if reference:
        model.hidden = torch.nn.Linear(96, 16)  # of images of 8 x 8
    run = rho_run(strategy, model=model, train=data, test=data)
    networks = []
    for number in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(derived_seed(run.seed, "reference", number))
            networks.append(models.build("cnn", shape=(1, 8, 8), classes=4))
    assert torch.allclose(strategy.irreducible, irreducible_losses(run, networks), atol=EXACT)


def test_nothing_but_the_rows_of_an_update_depends_on_the_references():
    """Their dropout draws other numbers than the training's, which goes on with its own."""
    runs = []
    for epochs in (1, 3):
        strategy = RHO(1.0, reference_epochs=epochs)
        runs.append(trainer([strategy], net(dropout=0.5), epochs=2, augment="crop+flip"))
        runs[-1].fit()
    plain = trainer([], net(dropout=0.5), epochs=2, augment="crop+flip")
    plain.fit()
    assert furthest(runs[0].weights, plain.weights) == 0
    assert furthest(runs[1].weights, plain.weights) == 0


def test_a_resumed_run_trains_no_reference_again(tmp_path, monkeypatch):
    first = trainer([rho()], epochs=EPOCHS, batch_size=SIZE, out=tmp_path / "run")

    class KilledError(BaseException):
        pass

    def killed(batch):
        raise KilledError

    first.updater.update = killed
    with pytest.raises(KilledError):
        first.fit()
    second = trainer([rho()], epochs=EPOCHS, batch_size=SIZE, out=tmp_path / "run", resume=True)
    monkeypatch.setattr(second.updater, "beside", None)
    second.fit()
    assert furthest(second.weights, finished().weights) == 0
    assert second.history[-1]["samples_forward"] == finished().history[-1]["samples_forward"]


def test_a_reference_that_diverges_is_named():
    with pytest.raises(UserError, match="not finite .* of a model that is trained beside; a lower learning rate"):
        trainer([rho()], epochs=1, batch_size=SIZE, lr=1e30).fit()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"fraction": 0.0}, r"fraction must be in \(0, 1\], got 0.0"),
        ({"reference_epochs": 0}, "reference_epochs must be"),
        ({"reference": 3}, "reference must be the name of a model"),
    ],
)
def test_wrong_options_are_refused_at_once(options, sentence):
    with pytest.raises(UserError, match=sentence):
        RHO(**options)


def test_what_does_not_fit_the_training_is_refused_before_it():
    with pytest.raises(
        UserError, match="chooses among batch_size / fraction = 80 samples, and the training set has 44"
    ):
        trainer([RHO(0.1)])
    with pytest.raises(UserError, match="unknown model|cann"):
        trainer([RHO(0.5, "cann")])
