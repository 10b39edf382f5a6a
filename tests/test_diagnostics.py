"""The log of samples: by hand on a few rows, and in trainings against the batches that were fed and what was kept."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from training import images, net, single_thread, trainer

from batchkern.data import load, with_label_noise
from batchkern.diagnostics import SampleLog, quantiles
from batchkern.rundir import METRICS, SAMPLES
from batchkern.strategies import parse

one_thread = single_thread()


def log_of_five():
    log = SampleLog(5, torch.device("cpu"), torch.tensor([False, True, False, True, False]))
    log.observe(torch.tensor([2, 0, 1]), torch.tensor([0.2, 0.5, 0.9]), torch.tensor([2, 1]))
    log.observe(torch.tensor([3]), torch.tensor([0.3]), None)
    return log


def test_an_epoch_by_hand():
    """Kept are rows 1, 0 and 3; row 2 was dropped, row 4 never seen."""
    log = log_of_five()
    row = log.end_epoch()
    assert log.times_kept.tolist() == [1, 1, 0, 1, 0]
    assert row["times_kept"] == [0, 0, 1, 1, 1]
    assert row["never_kept"] == pytest.approx(2 / 5)
    assert row["kept_loss"] == pytest.approx([0.3, 0.5, 0.9])
    assert row["dropped_loss"] == pytest.approx([0.2, 0.2, 0.2])
    assert row["kept_mislabelled"] == pytest.approx(2 / 3)
    assert "kept_overlap" not in row


def test_the_next_epoch_by_hand():
    """Row 1 twice and row 4: of these two, one was kept before, as three of five were."""
    log = log_of_five()
    log.end_epoch()
    log.observe(torch.tensor([1, 4]), torch.tensor([0.1, 0.4]), None)
    log.observe(torch.tensor([1]), torch.tensor([0.7]), None)
    row = log.end_epoch()
    assert row["times_kept"] == [0, 0, 1, 3, 3]
    assert row["never_kept"] == pytest.approx(1 / 5)
    assert row["kept_loss"] == pytest.approx([0.4, 0.4, 0.7])  # the last losses
    assert row["dropped_loss"] == pytest.approx([0.2, 0.3, 0.5])  # last known, of an epoch ago
    assert (row["kept_overlap"], row["kept_overlap_by_chance"]) == pytest.approx((1 / 2, 3 / 5))
    assert row["kept_mislabelled"] == pytest.approx(2 / 3)  # two of three visits


def test_of_the_copies_of_a_row_the_highest_loss_is_kept():
    """Whatever it was before, and the row counts as often as it was kept."""
    log = log_of_five()
    log.observe(torch.tensor([1, 4, 1, 4, 0]), torch.tensor([0.3, 0.1, 0.2, 0.4, 0.6]), torch.tensor([0, 1, 2]))
    assert log.last_loss.tolist() == pytest.approx([0.6, 0.3, 0.2, 0.3, 0.4])
    assert log.times_kept.tolist() == [1, 3, 0, 1, 1]


def test_a_log_goes_on_from_its_state():
    one, other = log_of_five(), SampleLog(5, torch.device("cpu"), torch.zeros(5, dtype=torch.bool))
    one.end_epoch()
    other.load_state_dict(one.state_dict())
    for log in (one, other):
        log.observe(torch.tensor([4, 0]), torch.tensor([0.4, 0.1]), torch.tensor([0]))
    rows = [log.end_epoch() for log in (one, other)]
    assert rows[1].pop("kept_mislabelled") == 0 != rows[0].pop("kept_mislabelled") + 1
    assert rows[0] == rows[1]


def test_quantiles():
    values = torch.tensor([5.0, 1.0, 3.0, 2.0, 4.0])
    assert quantiles(values, (0.0, 0.5, 0.9, 1.0)) == [1, 3, 5, 5]
    assert quantiles(values[:0], (0.5,)) is None


# --- in trainings ----------------------------------------------------------------------------------------------------

NOISY = with_label_noise(images(44), 0.25, seed=1)
PASSIVE = images(20, seed=5, classes=3)
ARMS = [
    "baseline",
    "trimming(start=0.5)",
    "trimming(start=0.5,backward=compact)",
    "random(start=0.5)",
    "random(start=0.5,backward=compact)",
    "hard-batches(delta=0.4)",
    "hard-batches(delta=0.4)+trimming",
    "stepwise(fractions=(.5,1),batch_multiples=(1,2))+passive(every=2)",
    "augmentation(omega=0,two_step=True)+trimming(start=0.5)",
    "batch-augmentation(copies=2)+trimming(start=0.5)",
]


def watched(arm, monkeypatch, **options):
    """A training, and by epoch the rows that contributed to the gradient, in order."""
    contributed, kept = [[]], []
    run = trainer(parse(arm, passive=PASSIVE), net(), train=NOISY, epochs=3, **options)
    batch, end = run.feed.batch, run.samples.end_epoch

    def fed(indices, step, positions=None):
        images, labels = batch(indices, step, positions)
        if step is not None:
            kept.append(indices)
        return images.requires_grad_() if step is not None else images, labels

    gather = run.updater._accumulate

    def gathered(objective, *rows):
        fed_images = []
        forward = run.model.forward

        def remember(images):
            images = images.detach().requires_grad_()
            fed_images.append(images)
            return forward(images)

        monkeypatch.setattr(run.model, "forward", remember)
        value = gather(objective, *rows)
        monkeypatch.setattr(run.model, "forward", forward)
        gradient = fed_images[0].grad
        if kept and len(gradient) <= len(kept[-1]):
            rows = [tuple(image.flatten().tolist()) for image in fed_images[0].detach()]
            own = batch(kept[-1], None)[0].flatten(1).tolist()
            numbers = {tuple(pixels): int(row) for pixels, row in zip(own, kept[-1])}
            counted = [numbers[row] for row, g in zip(rows, gradient) if row in numbers and g.abs().sum() > 0]
            of_update = contributed[-1] and contributed[-1][-1][0] == run.updater.active
            if counted and not of_update:  # neither a passive batch nor the second update of two
                contributed[-1].append((run.updater.active, counted))
        return value

    def ended():
        contributed.append([])
        return end()

    monkeypatch.setattr(run.feed, "batch", fed)
    monkeypatch.setattr(run.updater, "_accumulate", gathered)
    monkeypatch.setattr(run.samples, "end_epoch", ended)
    run.fit()
    return run, [[rows for _, rows in epoch] for epoch in contributed[:-1]]


@pytest.mark.filterwarnings("ignore:BatchAugmentation")
@pytest.mark.parametrize("arm", ARMS)
def test_kept_is_what_the_gradient_sees(arm, monkeypatch):
    run, epochs = watched(arm, monkeypatch)
    times, before = torch.zeros(44), None
    wrong = NOISY.labels != NOISY.clean_labels
    for row, batches in zip(run.history, epochs, strict=True):
        rows = torch.tensor([r for batch in batches for r in batch])
        visits = rows.bincount(minlength=44)
        times += visits
        kept = visits > 0
        assert row["never_kept"] == pytest.approx(float((times == 0).float().mean()))
        assert (row["times_kept"][0], row["times_kept"][-1]) == (times.min(), times.max())
        assert row["kept_mislabelled"] == pytest.approx(float(wrong[rows].float().mean()))
        if before is not None:
            assert row["kept_overlap"] == pytest.approx(float((kept & before).sum() / kept.sum()))
            assert row["kept_overlap_by_chance"] == pytest.approx(float(before.float().mean()))
        before = kept
    assert torch.equal(run.samples.times_kept.float(), times)
    assert len({len(batch) for batches in epochs for batch in batches}) > 1


def test_trimming_keeps_what_loses_most_and_random_rows_do_not():
    for arm, apart in (("trimming(start=0.4,end=0.4)", True), ("random(start=0.4,end=0.4)", False)):
        row = trainer(parse(arm), train=images(200), epochs=2).fit()
        # Of the kept, nine in ten lose more than the median of the dropped does.
        assert (row["kept_loss"][0] > row["dropped_loss"][1]) == apart


def test_files_of_the_samples(tmp_path):
    run = trainer(parse("trimming(start=0.5)"), train=NOISY, out=tmp_path / "run")
    run.fit()
    samples = load_file(tmp_path / "run" / SAMPLES)
    assert samples.keys() == {"times_kept", "last_loss", "mislabelled"}
    assert torch.equal(samples["mislabelled"], NOISY.labels != NOISY.clean_labels)
    assert torch.equal(samples["times_kept"], run.samples.times_kept)
    rows = [json.loads(line) for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    assert rows == json.loads(json.dumps(run.history))
    plain = trainer(train=images(44), out=tmp_path / "plain")
    plain.fit()
    assert load_file(tmp_path / "plain" / SAMPLES).keys() == {"times_kept", "last_loss"}
    assert "kept_mislabelled" not in plain.history[-1]


def test_the_gap_is_measured_on_the_whole_training_set():
    """Without augmentation, in eval mode, at the end: not the running accuracy of batches that were selected."""
    run = trainer(parse("hard-batches(delta=0.4)"), train=images(44), augment="crop+flip", epochs=3)
    row = run.fit()
    accuracy = (run.predict(run.feed.data) == run.feed.data.labels).double().mean()
    assert row["train_set_accuracy"] == pytest.approx(float(accuracy))
    assert [("train_set_accuracy" in row) for row in run.history] == [False, False, True]


def test_figures_of_the_strategies():
    stepwise = trainer(parse("stepwise(fractions=(.5,1),batch_multiples=(2,1),gamma=1.0)"), epochs=4, lr=0.08)
    stepwise.fit()
    # Eq. 10 on mean gradients: rate times subset over batch size, 22 of 44 in batches of 16, then 44 in batches of 8.
    expected = [0.08 * 22 / 16] * 2 + [0.08 * 44 / 8] * 2
    assert [row["noise_scale"] for row in stepwise.history] == pytest.approx(expected)

    passive = trainer(parse("passive(every=1)", passive=PASSIVE), epochs=12, lr=0.05)
    passive.fit()
    accuracies = [row["passive_accuracy"] for row in passive.history]
    assert all(0 <= accuracy <= 1 for accuracy in accuracies)
    assert sum(accuracies[-3:]) > sum(accuracies[:3]) + 0.3  # the classes can be learnt
    rare = trainer(parse("passive(every=10)", passive=PASSIVE), epochs=2)
    rare.fit()
    assert ["passive_accuracy" in row for row in rare.history] == [False, True]  # of 6 + 6 updates the tenth

    augmented = trainer(parse("augmentation(omega=0,eta=0.0)"), epochs=3, lr=1e-9)
    augmented.fit()
    kl = [row["virtual_kl"] for row in augmented.history]
    # Weights that stand still: every epoch has the same divergence but for its noise; a running sum would grow.
    assert max(kl) < 1.5 * min(kl)


def test_digits_with_noise_are_told_apart_by_trimming():
    """What the diagnostic is for: the samples of highest loss are, before long, those with wrong labels."""
    train = with_label_noise(load("digits"), 0.1, seed=0)
    run = trainer(
        parse("trimming(start=1.0,end=0.2)"), "cnn", train, load("digits", split="test"), epochs=5, batch_size=64
    )
    run.fit()
    shares = [row["kept_mislabelled"] for row in run.history]
    assert shares[0] == pytest.approx(0.1, abs=1e-3)
    assert shares[-1] > 0.25
