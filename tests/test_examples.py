"""The benchmark of token selection: arms do what they say, costs are counted, the file holds what was found."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")
pytest.importorskip("statsmodels")
pytest.importorskip("scipy")

from scipy import stats

from batchkern.bench_report.results import load
from batchkern.bench_report.tables import language

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "selective_lm.py"
SMALL = [*("--vocabulary", "400", "--width", "32", "--layers", "1", "--length", "16", "--batch", "4")]
SMALL += ["--test-batches", "2", "--rounds", "2"]
ARMS = ["all", "random", "hardest", "lowest", "entropy"]


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("selective_lm", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["selective_lm"] = module
    spec.loader.exec_module(module)
    return module


lm = load_script()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors: other threads would only be waited for
    yield
    torch.set_num_threads(threads)


def options(**changed: Any) -> argparse.Namespace:
    settings = {
        **{"text": None, "noise": [0.5], "clean": [0.1], "keep": 0.6, "seeds": 2, "updates": 8},
        **{"reference_updates": 3, "vocabulary": 400, "width": 32, "layers": 1, "length": 16, "batch": 4},
        **{"test_batches": 2, "rate": 2e-3, "rounds": 1, "workers": 1},
    }
    return argparse.Namespace(**{**settings, **changed})


def some_text(length: int = 16, batch: int = 4, vocabulary: int = 400) -> Any:
    """Words that follow one another by a rule, so that there is something to learn."""
    generator = torch.Generator().manual_seed(7)
    tokens = [1]
    for jump in torch.randint(3, (20_000,), generator=generator).tolist():
        tokens.append((5 * tokens[-1] + 7 * jump + 1) % vocabulary)
    train, test = torch.tensor(tokens[:16_000]), torch.tensor(tokens[16_000:])
    return lm.Text(train, test.unfold(0, length + 1, 100)[: 2 * batch], length, batch, vocabulary)


# --- text ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
def test_a_share_of_the_sequences_is_half_noise(noise: float) -> None:
    text = some_text(batch=50)
    plain, noisy = (text.batches(text.train, 3, share) for share in (0.0, noise))
    differ = torch.cat([next(plain) != next(noisy) for _ in range(40)])  # (2000, 17)
    counts = differ.sum(1)
    share = float((counts > 0).float().mean())
    assert share == pytest.approx(noise, abs=4 * math.sqrt(noise * (1 - noise) / 2000))
    if noise:
        assert counts.max() == 17 // 2
        assert counts[counts > 0].float().mean() == pytest.approx(8 * (1 - 1 / 400), abs=0.03)  # a few stay by chance
        assert (differ[counts > 0].float().mean(0) - 8 / 17).abs().max() < 0.1  # at any place


def test_batches_are_pieces_of_the_text_and_the_same_for_a_seed() -> None:
    text = some_text()
    places = {tuple(window) for window in text.train.unfold(0, 17, 1).tolist()}
    first, again, other = (text.batches(text.train, seed, 0.0) for seed in (0, 0, 1))
    for _ in range(5):
        batch = next(first)
        assert {tuple(row) for row in batch.tolist()} <= places
        assert torch.equal(batch, next(again))
        assert not torch.equal(batch, next(other))


def test_the_clean_part_is_a_share_of_the_training_text() -> None:
    text = some_text()
    pieces = [tuple(piece) for piece in text.train[:16_000].view(125, 128).tolist()]
    clean = [tuple(piece) for piece in text.clean(0.1, 0).view(-1, 128).tolist()]
    assert len(set(clean)) == len(clean) == 12  # of 125
    assert set(clean) <= set(pieces)
    assert [tuple(piece) for piece in text.clean(0.04, 0).view(-1, 128).tolist()] == clean[:5]
    assert not torch.equal(text.clean(0.1, 1), text.clean(0.1, 0))


def test_held_out_documents_are_neither_trained_on_nor_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    held_out, train = "0123456789" * 40, "abcdefghij" * 40
    monkeypatch.setattr(lm, "read_documents", lambda path: [train if i % 10 else held_out for i in range(60)])
    # With no more words than bytes a token is a byte: which documents it is of can be seen.
    text = lm.prepare(options(vocabulary=256, clean=[0.5, 1.0]))
    seen = set(text.train.tolist())
    assert len(seen) == 10
    assert set(text.clean(1.0, 0).tolist()) <= seen
    assert len(set(text.held_out.flatten().tolist())) == 10
    assert seen.isdisjoint(text.held_out.flatten().tolist())
    assert text.held_out.shape == (8, 17)


# --- arms ------------------------------------------------------------------------------------------------------


def losses_of(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and entropies in float64, from all logits."""
    logits = hidden.double() @ weight.double().t()
    return F.cross_entropy(logits, target, reduction="none"), torch.distributions.Categorical(logits=logits).entropy()


def kept(arm: str, losses: Tensor, entropy: Tensor, reference: Tensor) -> list[int]:
    """The tokens that an arm trains on, by plain sorting; of 64, at keep .6, these are 38."""
    score = {"hardest": losses, "lowest": -losses, "entropy": entropy, "excess": losses - reference}.get(arm)
    return list(range(len(losses))) if score is None else score.argsort(descending=True)[:38].sort().values.tolist()


def layer(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(rows, 8, generator=generator) for rows in (64, 50))
    return hidden.requires_grad_(), weight, torch.randint(50, (64,), generator=generator)


@pytest.mark.parametrize("arm", ["all", "hardest", "lowest", "entropy", "excess", "clean"])
def test_an_arm_trains_on_its_tokens(arm: str) -> None:
    hidden, weight, target = layer(0)
    reference = 3 * torch.rand(64, generator=torch.Generator().manual_seed(1))
    given = reference if arm == "excess" else None
    loss = lm.objective(arm, 0.6, (hidden, weight, target), given, torch.Generator())
    loss.backward()
    losses, entropy = losses_of(hidden.detach(), weight, target)
    wanted = kept(arm, losses, entropy, reference)
    assert hidden.grad is not None
    assert hidden.grad.any(1).nonzero().flatten().tolist() == wanted
    assert loss.item() == pytest.approx(float(losses[wanted].mean()), rel=1e-6)


def test_random_tokens_are_others_each_time() -> None:
    generator, seen = torch.Generator().manual_seed(0), []
    for _ in range(2):
        hidden, weight, target = layer(0)
        loss = lm.objective("random", 0.6, (hidden, weight, target), None, generator)
        loss.backward()
        assert hidden.grad is not None
        seen.append(hidden.grad.any(1).nonzero().flatten().tolist())
        losses, _ = losses_of(hidden.detach(), weight, target)
        assert loss.item() == pytest.approx(float(losses[seen[-1]].mean()), rel=1e-6)
    assert [len(set(rows)) for rows in seen] == [38, 38]
    assert seen[0] != seen[1]


@pytest.mark.parametrize("arm", ["all", "hardest", "lowest", "entropy", "excess", "clean"])
def test_updates_are_those_of_a_plain_loop(arm: str) -> None:
    """Three of them, two in the warm-up: tokens ranked by all logits in float64, the optimizer by PyTorch."""
    text, settings = some_text(), options(updates=20)
    torch.manual_seed(5)
    reference = lm.GPT(400, 16, 32, 1)
    given = copy_of(reference).requires_grad_(False) if arm == "excess" else None
    training = lm.Training(arm, 0, settings, text, text.train, 0.5, given)
    model, batches = copy_of(training.model), text.batches(text.train, 0, 0.5)
    with torch.no_grad():
        at_first = model(text.held_out[:, :-1]) @ model.embedding.weight.t()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.01)
    for update in range(3):
        training.update()
        batch = next(batches)
        hidden, target = model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()
        with torch.no_grad():
            losses, entropy = losses_of(hidden, model.embedding.weight, target)
            reference_losses, _ = losses_of(reference(batch[:, :-1]).flatten(0, 1), reference.embedding.weight, target)
        wanted = kept(arm, losses, entropy, reference_losses)
        optimizer.zero_grad()
        F.cross_entropy((hidden @ model.embedding.weight.t())[wanted], target[wanted]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (update + 1) / 2)
        optimizer.step()
    # Not the weights: the loss does not depend on the bias of keys, whose gradient is rounding that Adam blows up.
    with torch.no_grad():
        own, plain = (m(text.held_out[:, :-1]) @ m.embedding.weight.t() for m in (training.model, model))
    assert torch.allclose(own, plain, rtol=0, atol=1e-5)
    assert not torch.allclose(own, at_first, rtol=0, atol=0.05)
    if given is not None:
        assert all(torch.equal(x, y) for x, y in zip(given.parameters(), reference.parameters(), strict=True))


def copy_of(model: Any) -> Any:
    other = lm.GPT(400, 16, 32, 1)
    other.load_state_dict(model.state_dict())
    return other


def test_arms_of_a_seed_begin_with_the_same_weights_and_batches() -> None:
    text = some_text()
    first, second = (lm.Training(arm, 3, options(), text, text.train, 0.5) for arm in ("all", "random"))
    assert all(torch.equal(x, y) for x, y in zip(first.model.parameters(), second.model.parameters(), strict=True))
    second.update()  # what random draws must not change the batches
    next(first.batches)
    assert torch.equal(next(first.batches), next(second.batches))
    other = lm.Training("all", 4, options(), text, text.train, 0.5)
    assert not torch.equal(first.model.embedding.weight, other.model.embedding.weight)


def test_a_training_is_tested_on_all_tokens_held_out() -> None:
    text = some_text()
    training = lm.Training("hardest", 0, options(), text, text.train, 0.5)
    tested = training.advance({0, 4})
    hidden = training.model(text.held_out[:, :-1]).flatten(0, 1)
    losses, _ = losses_of(hidden.detach(), training.model.embedding.weight, text.held_out[:, 1:].flatten())
    assert tested[4] == pytest.approx(losses.mean().item(), abs=1e-5)
    assert tested[0] == pytest.approx(math.log(400), abs=0.3)  # before the first update
    assert list(tested) == [0, 4]


def test_the_reference_is_trained_on_the_clean_part_alone() -> None:
    text, settings = some_text(), options()
    bench = lm.Bench(settings, text, {arm: {"flops": 1.0, "seconds": 1.0} for arm in (*ARMS, "excess")})
    outcomes = bench.run((1, None, "0.1"))
    assert [outcome[:3] for outcome in outcomes] == [(None, "clean 0.1", 1), (0.5, "excess 0.1", 1)]
    reference = lm.Training("clean", 1, settings, text, text.clean(0.1, 1), 0.0)
    assert reference.advance({3})[3] == outcomes[0][3][3]
    excess = lm.Training("excess", 1, settings, text, text.train, 0.5, reference.model.requires_grad_(False))
    assert excess.advance({8})[8] == outcomes[1][3][8]


# --- costs -----------------------------------------------------------------------------------------------------


def test_operations_of_an_update_are_those_of_its_products() -> None:
    """Of N tokens, width H, length L: a block has products of 24 H^2 + 4 L H a token, the last layer F = 2 N H V."""
    costs = lm.measure(options(), some_text())
    tokens, width, length, words = 64, 32, 16, 400
    blocks = tokens * (24 * width**2 + 4 * length * width)
    last, share = 2 * tokens * width * words, 38 / 64
    selected = 3 * blocks + (1 + 2 * share) * last  # logits of all are kept for the backward pass
    assert {arm: cost["flops"] for arm, cost in costs.items()} == {
        "all": 3 * (blocks + last),
        "random": 3 * blocks + 3 * share * last,
        "hardest": selected,
        "lowest": selected,
        "entropy": selected,
        "excess": selected + blocks + last,  # the reference's forward pass
    }
    assert all(cost["seconds"] > 0 for cost in costs.values())


def test_a_budget_pays_for_the_reference_first() -> None:
    settings = options(updates=100, reference_updates=30)
    costs = {"all": {"flops": 10.0, "seconds": 2.0}, "random": {"flops": 8.0, "seconds": 2.5}}
    costs["excess"] = {"flops": 12.0, "seconds": 2.0}
    assert lm.plan("all", costs, settings) == {"updates": 100, "cost": 100, "seconds": 100}
    assert lm.plan("random", costs, settings) == {"updates": 100, "cost": 125, "seconds": 80}
    assert lm.plan("excess 0.01", costs, settings) == {"updates": 100, "cost": 58, "seconds": 70}  # 700 / 12
    assert lm.plan("clean 0.01", costs, settings) == {"updates": 100, "cost": 100, "seconds": 100}


# --- the whole -------------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"the {i % 7}th word of line {i} is {'abcdefgh'[i % 8] * (i % 5)}" for i in range(2000)))
    return path


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def selective_lm(monkeypatch: pytest.MonkeyPatch, cwd: Path, *arguments: str) -> int:
    """In this process; its exit status."""
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    try:
        return int(lm.main())
    except SystemExit as ended:
        return int(ended.code or 0)


def test_the_benchmark_in_two_processes(text: Path, tmp_path: Path) -> None:
    """Started cold: its workers start as the script does."""
    words = ["--updates", "21", "--clean", "0.1", "--noise", "0.5", "0", "--seeds", "2", "--workers", "2"]
    words += ["--json", "found.json"]
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--text", str(text), *words, *SMALL],
        **{"cwd": tmp_path, "env": ENVIRONMENT, "capture_output": True, "text": True, "timeout": 250},
    )
    assert run.returncode == 0, run.stderr
    written = json.loads((tmp_path / "found.json").read_text())
    assert run.stdout.endswith("\n" + language(load(tmp_path / "found.json")) + "\n")
    assert (written["settings"]["reference_updates"], written["settings"]["text"]) == (10, "text.txt")
    names = [*ARMS, "excess 0.1", "clean 0.1"]
    assert [(row["noise"], row["arm"]) for row in written["arms"]] == [(n, arm) for n in (0.5, 0.0) for arm in names]
    check_statistics(written)
    check_best(written)
    # One training of them, in this process, where no other came before.
    settings = options(text=text, updates=21, reference_updates=10)
    here = lm.prepare(settings)
    random = lm.Training("random", 1, settings, here, here.train, 0.5).advance({21})[21]
    assert written["arms"][1]["loss"]["updates"]["values"][1] == pytest.approx(random, abs=2e-4)


def check_statistics(written: dict[str, Any]) -> None:
    """Means, intervals, paired tests and Holm's correction, by scipy and a plain loop."""
    for noise in (0.5, 0.0):
        arms = {row["arm"]: row for row in written["arms"] if row["noise"] == noise}
        (reference,) = (row for row in written["references"] if row["noise"] == noise)
        for budget in ("updates", "cost", "seconds"):
            values = {}
            for name, row in arms.items():
                place = row["curve"]["updates"].index(row["updates"][budget])
                values[name] = [curve[place] for curve in row["curve"]["loss"]]
                shown = row["loss"][budget]
                assert shown["values"] == values[name]
                assert shown["mean"] == pytest.approx(statistics.fmean(values[name]))
                low, high = stats.t.interval(0.95, 1, shown["mean"], stats.sem(values[name]))
                assert shown["half_width"] == pytest.approx((high - low) / 2)
            tests = [
                (row["difference"][budget], values[arm], values["all"]) for arm, row in arms.items() if arm != "all"
            ]
            tests.append((reference["difference"][budget], values["excess 0.1"], values["clean 0.1"]))
            check_tests(tests)
        assert arms["all"]["difference"] == {}


def check_tests(tests: list[tuple[dict[str, Any], list[float], list[float]]]) -> None:
    raw = [float(stats.ttest_rel(own, other).pvalue) for _, own, other in tests]
    corrected, least = dict.fromkeys(range(len(raw)), 0.0), 0.0
    for rank, place in enumerate(sorted(corrected, key=lambda i: raw[i])):
        least = max(least, min(1.0, (len(raw) - rank) * raw[place]))
        corrected[place] = least
    for place, (shown, own, other) in enumerate(tests):
        assert shown["mean"] == pytest.approx(statistics.fmean(own) - statistics.fmean(other), abs=1e-9)
        assert shown["p"] == pytest.approx(raw[place])
        assert shown["p_corrected"] == pytest.approx(corrected[place])
        assert shown["seeds"] == 2


def check_best(written: dict[str, Any]) -> None:
    """The lowest mean of the curve of the clean part alone, within the budget."""
    (reference,) = (row for row in written["references"] if row["noise"] == 0.5)
    clean, excess = (next(row for row in written["arms"] if row["arm"] == f"{arm} 0.1") for arm in ("clean", "excess"))
    means = dict(zip(clean["curve"]["updates"], map(statistics.fmean, zip(*clean["curve"]["loss"])), strict=True))
    assert reference["best"]["loss"]["mean"] == pytest.approx(min(means.values()))
    assert means[reference["best"]["updates"]] == min(means.values())
    assert reference["tokens"] == 16 * 8 * round(0.1 * (written["tokens"] // (16 * 8)))
    assert reference["loss"]["mean"] == pytest.approx(means[10])
    wanted = excess["loss"]["updates"]["mean"] - min(means.values())
    assert reference["difference"]["best"]["mean"] == pytest.approx(wanted)


def test_one_seed_has_no_intervals(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--updates", "4", "--clean", "0.1", "--noise", "0.5", "--seeds", "1"]
    assert selective_lm(monkeypatch, tmp_path, "--text", str(text), *words, *SMALL) == 0
    told = capsys.readouterr().out
    assert "| `clean 0.1` | " in told
    assert "±" not in told
    assert list(tmp_path.iterdir()) == [text]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--keep", "0"], "must be in (0, 1], got '0'"),
        (["--keep", "half"], "must be in (0, 1], got 'half'"),
        (["--noise", "0", "1.5"], "must be in [0, 1], got '1.5'"),
        (["--noise", "nan"], "must be in [0, 1], got 'nan'"),
        (["--clean", "0.1", "0"], "must be in (0, 1], got '0'"),
        (["--updates", "0"], "must be a whole number from 2 to 1000000, got '0'"),
        (["--updates", "9", "--reference-updates", "9"], "must be fewer than --updates 9, got 9"),
        (["--seeds", "9" * 30], "must be a whole number from 1 to 1000, got '999"),
        (["--width", "48"], "--width must be a multiple of 32, got 48"),
        (["--json", "short.txt"], "--json must be a file that does not exist yet in a folder that does, got short.txt"),
        (["--json", "no/x.json"], "--json must be a file that does not exist yet in a folder that does, got no/x.json"),
        (["--text", "nowhere.txt"], "--text must be a file that can be read, got nowhere.txt: No such file"),
        (["--text", "."], "--text must be a file that can be read, got .: Is a directory"),
        (["--text", "short.txt"], "--text must have more than --length 64 tokens to train on, it has"),
        (
            ["--text", "long.txt", "--clean", "0.001"],
            "--clean 0.001 of the training text must be more than --length 64",
        ),
    ],
)
def test_selective_lm_refuses(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "long.txt").write_text("".join(f"{i * i} words, " for i in range(2000)))
    monkeypatch.setattr(lm, "measure", None)  # nothing is trained
    assert selective_lm(monkeypatch, tmp_path, *arguments) == 2
    told = capsys.readouterr()
    assert words in told.err
    assert "Traceback" not in told.err
    assert told.out == ""
