"""Several processes train as one does: the same weights, the same files, the same sentence when something is wrong.

The oracle is the training of one process, whose updates have their own tests against the papers' loops. What the ranks
do is in ranks.py; all jobs of two ranks share one pair of processes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
import warm
from test_resume import difference, outcome
from training import DIFFERENT, flat, furthest, images, net, single_thread, trainer, without_plots

from batchkern import compare
from batchkern.data import Feed
from batchkern.distributed import IGNORED, Share
from batchkern.errors import UserError
from batchkern.rundir import CHECKPOINT, CONFIG, METRICS

CLOSE = 1e-5
ROOT = Path(__file__).parent.parent
JOBS = ("all_scenarios", "idle_heads", "timing", "batch_norm", "resumed", "stopped", "wrong", "snippet", "loop")
one_thread = single_thread()


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    without_plots(monkeypatch)


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more


def finished(processes: list[Any]) -> list[tuple[int, str, str]]:
    """Exit status and both outputs of each process, none of which outlives the test."""
    try:
        outputs = [process.communicate(timeout=150) for process in processes]
        return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]
    finally:
        for process in processes:
            process.kill()


def spawn(folder: Path, world: int, *jobs: str) -> list[dict]:
    """What each rank's jobs returned. The last rank starts cold, so that strings have other hashes there, and sets of
    them another order."""
    words = [str(Path(__file__).with_name("ranks.py")), str(folder)]
    processes: list[Any] = [
        warm.Process(*words, str(rank), str(world), *jobs, env=environment()) for rank in range(world - 1)
    ]
    last = [sys.executable, *words, str(world - 1), str(world), *jobs]
    processes.append(subprocess.Popen(last, env=environment(), stdout=PIPE, stderr=PIPE, text=True))
    ended = finished(processes)
    assert [code for code, _, _ in ended] == [0] * world, "\n".join(errors for _, _, errors in ended)
    assert all("find_unused_parameters" not in errors for _, _, errors in ended)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def pair(folder):
    """The jobs of two ranks; FOLDER/one is a run of one process."""
    ranks.build([], out=folder / "one")
    return spawn(folder, 2, *JOBS)


@cache
def one_process(name: str) -> dict:
    return ranks.trained(name)


# --- the training of one process ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ranks.SCENARIOS)
def test_two_ranks_train_as_one_process(name, pair):
    one = one_process(name)
    for rank in pair:
        assert_same_training(one, rank["all_scenarios"][name])


def test_three_ranks_train_as_one_process(tmp_path):
    for rank in spawn(tmp_path, 3, "some_scenarios"):
        for name, several in rank["some_scenarios"].items():
            assert_same_training(one_process(name), several)


def numbers(row: dict) -> dict:
    """A row of the metrics with each number of a list under a name of its own, and -1 where there is none."""
    lists = {key: value for key, value in row.items() if isinstance(value, list)}
    single = {key: -1 if value is None else value for key, value in row.items() if key not in lists}
    return single | {f"{key} {place}": x for key, value in lists.items() for place, x in enumerate(value)}


def assert_same_training(one: dict, several: dict) -> None:
    assert furthest(several["weights"], one["weights"]) <= CLOSE
    if one["heads"][0].numel():
        assert furthest(several["heads"], one["heads"]) <= CLOSE
    assert numbers(several["row"]) == pytest.approx(numbers(one["row"]), abs=CLOSE, rel=CLOSE)
    assert torch.equal(several["predicted"], one["predicted"])
    for ours, theirs in zip(several["strategies"], one["strategies"], strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if key == "ledger" or isinstance(value, float | torch.Tensor):
                torch.testing.assert_close(ours[key], value, atol=CLOSE, rtol=CLOSE)
            else:
                assert ours[key] == value


def test_the_scenarios_differ():
    """Or a strategy that does nothing on several ranks would pass: all but one have 12 updates of the same batches."""
    base = flat_end(one_process("trimming"))
    for name in ("compact trimming", "hard batches", "augmentation", "passive", "random rows", "random batches"):
        assert (flat_end(one_process(name)) - base).abs().max() > 100 * CLOSE
    heads = one_process("passive")["heads"]
    assert (heads[-1] - heads[0]).abs().max() > 100 * CLOSE


def flat_end(result: dict) -> torch.Tensor:
    return result["weights"][-1]


NARROWED = ("compact trimming", "random rows alone", "importance", "rho")
"""Scenarios in which not all rows of a batch are fetched for the pass that counts."""
MIXED = tuple(name for name in ranks.SCENARIOS if "mixed" in name)
"""Those in which a rank fetches the rows that its own are mixed with, too."""


def test_rows_that_are_chosen_without_losses_are_alone_fetched_and_dealt_out_evenly(pair):
    chosen = [positions.tolist() for _, positions in one_process("random rows alone")["taken"]]
    lefts, rights = ([p.tolist() for _, p in rank["all_scenarios"]["random rows alone"]["taken"]] for rank in pair)
    assert [len(rows) for rows in chosen] == [5] * 5 + [4] + [2] * 6  # .7 and .3 of batches of 7, the last one of 6
    for rows, left, right in zip(chosen, lefts, rights, strict=True):
        assert [*left, *right][: len(rows)] == rows
        assert len(left) == len(right) == -(-len(rows) // 2)


@pytest.mark.parametrize("name", [name for name in ranks.SCENARIOS if name not in (*NARROWED, *MIXED)])
def test_the_plan_is_sharded_without_overlap(name, pair):
    plan = [indices for indices, _ in one_process(name)["taken"]]
    shares = [rank["all_scenarios"][name]["taken"] for rank in pair]
    if "trimmed" not in name:  # which fetches the rows that it keeps again
        assert len(shares[0]) == len(plan)
    for (batch, left), (same, right) in zip(*shares, strict=True):
        assert torch.equal(batch, same)
        assert len(left) == len(right) == -(-len(left.tolist() + right.tolist()) // 2)
    for batch, (_, left), (_, right) in zip(plan, *shares, strict="trimmed" not in name):
        if "trimmed" in name:
            break
        together = [*left.tolist(), *right.tolist()]
        assert together[: len(batch)] == list(range(len(batch)))
        assert len(together) - len(batch) == len(batch) % 2  # at most one row that counts nowhere


def test_ledgers_and_losses_are_the_same_bits_on_both_ranks(pair):
    for name in ranks.SCENARIOS:
        ours, theirs = (rank["all_scenarios"][name] for rank in pair)
        for key in ("weights", "heads", "row", "predicted", "strategies"):
            assert difference(ours[key], theirs[key]) == "", (name, key)


# --- shares ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "world"), [(1, 1), (7, 1), (6, 2), (7, 2), (1, 2), (4, 3), (1, 5), (12, 5)])
def test_shares_make_up_the_batch(rows, world):
    x = torch.randn(rows, 3)
    target = torch.arange(rows)
    shares = [Share(rows, rank, world) for rank in range(world)]
    assert torch.cat([share.take(x)[: share.real] for share in shares]).equal(x)
    assert sum(share.spread(share.take(x)) for share in shares).equal(x)
    targets = torch.cat([share.ignore_filling(share.take(target)) for share in shares])
    assert targets.tolist() == [*range(rows), *[IGNORED] * (len(targets) - rows)]
    assert len({len(share.take(x)) for share in shares}) == 1
    assert all(torch.equal(share.take(x), x[share.positions]) for share in shares)


@pytest.mark.parametrize("augment", ["none", "flip", "crop+flip", "resized-crop+flip"])
def test_rows_of_a_batch_are_augmented_as_in_the_whole(augment):
    data = images(30)
    mean, std = data.statistics()
    feed = Feed(data, mean=mean, std=std, device="cpu", augment=augment, seed=3)
    indices, positions = torch.randperm(30)[:11], torch.tensor([7, 8, 0])
    whole, labels = feed.batch(indices, 5)
    part, part_labels = feed.batch(indices, 5, positions)
    assert torch.equal(part, whole[positions])
    assert torch.equal(part_labels, labels[positions])


# --- what idles, what decides ---------------------------------------------------------------------------------------


def test_an_idle_head_is_left_alone_on_every_rank(pair):
    for rank in pair:
        assert rank["idle_heads"] == {"head": 3, "fc": 12, "trunk": 15}


def test_an_idle_layer_has_no_weight_decay(pair):
    idle = [weights[-12:-3] for weights in pair[1]["all_scenarios"]["an idle layer"]["weights"]]
    assert all(torch.equal(weights, torch.full((9,), 0.5).double()) for weights in idle)


def test_the_timing_of_the_first_rank_decides(pair):
    assert [rank["timing"] for rank in pair] == [0.75, 0.75]


def test_with_batch_norm_all_ranks_predict_by_the_statistics_that_are_saved(pair, folder):
    assert pair[0]["batch_norm"] == pair[1]["batch_norm"]
    saved = torch.load(folder / "norm" / CHECKPOINT, weights_only=True)["model"]
    assert float(saved["norm.running_mean"].sum()) == pair[1]["batch_norm"][1]["running mean"] != 0
    assert not any("module" in key for key in saved)


# --- resume and stop ------------------------------------------------------------------------------------------------


def test_a_resume_is_bit_for_bit(pair, folder):
    assert pair[0]["resumed"] == pair[1]["resumed"] < 24
    assert difference(outcome(folder / "killed"), outcome(folder / "whole")) == ""
    state = torch.load(folder / "whole" / CHECKPOINT, weights_only=True)
    (other, _), *rest = state["rng_of_other_ranks"]
    assert rest == []
    assert not torch.equal(other, state["rng"])  # each rank drops out by numbers of its own


def test_a_resume_on_another_number_of_ranks_is_refused(pair, folder):
    with pytest.raises(UserError, match="cannot be resumed: ranks was 2, now 1$"):
        ranks.everything(folder / "whole", resume=True)
    for rank in pair:
        assert re.search("cannot be resumed: ranks was 1, now 2$", rank["wrong"]["other ranks"])


def test_all_ranks_stop_at_the_same_update_and_go_on_from_there(pair, folder):
    for said, made, restored in (rank["stopped"] for rank in pair):
        assert re.match(r"interrupted after update \d+; checkpoint written to .*stopped; resume it", said)
        assert made == pair[0]["stopped"][1] < 20
        assert restored
    assert difference(outcome(folder / "stopped"), outcome(folder / "whole")) == ""


# --- what is wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("holds a run", "one already holds a run; resume it, overwrite it, or give another directory"),
        ("not writable", f"{METRICS} cannot be written: Is a directory"),
        ("diverged", "the loss is not finite at update 4; the last finite checkpoint is kept in .*; a lower learning"),
    ],
)
def test_what_one_rank_finds_wrong_ends_all_with_the_same_sentence(case, said, pair):
    assert re.search(said, pair[0]["wrong"][case])
    assert pair[0]["wrong"][case] == pair[1]["wrong"][case]


def test_the_command_line_says_it_once_and_exits_2_on_every_rank(tmp_path):
    """With the environment and the store that torchrun provides, which itself ends the others at the first failure."""
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "thesis.tex").write_text("years of work")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": "2",
    }
    words = ["-m", "batchkern", "train", "--data", "digits", "--out", str(tmp_path / "occupied")]
    both = [environment(**variables, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
    ended = finished([warm.Process(*words, env=variables) for variables in both])
    assert [code for code, _, _ in ended] == [2, 2]
    assert [output for _, output, _ in ended] == ["", ""]
    said = f"batchkern: error: {tmp_path / 'occupied'} exists and is not a batchkern run; give another output directory"
    assert sorted(errors for _, _, errors in ended) == ["", said + "\n"]


def test_a_comparison_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE is 2: a comparison runs in one process"):
        compare.run(None)


def test_without_torchrun_the_others_cannot_be_joined(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE is 2, but the other processes cannot be joined; .*torchrun"):
        trainer()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "2"}, "RANK is '2', and WORLD_SIZE '2'; torchrun sets them to whole numbers, counted from 0"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"RANK": "x"}, "RANK is 'x'"),
        ({"RANK": "0", "LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
        ({"RANK": "0", "WORLD_SIZE": "x"}, "RANK is '0', and WORLD_SIZE 'x'"),
        ({"RANK": "0", "MASTER_PORT": "99999"}, "WORLD_SIZE is 2, but the other processes cannot be joined"),
    ],
)
def test_a_process_whose_number_cannot_be(variables, said, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(said)):
        trainer()


def test_torchrun(tmp_path):
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "batchkern", "train"]
    options = ["--data", "digits", "--epochs", "1", "--strategy", "trimming(start=0.5)", "--out", str(tmp_path / "run")]
    ((code, output, errors),) = finished([warm.Process(*words, *options, env=environment())])
    if "terminate called without an active exception" in errors:  # now and then gloo's threads outlive a rank's end
        ((code, output, errors),) = finished([warm.Process(*words, *options, "--overwrite", env=environment())])
    assert code == 0, errors
    lines = output.splitlines()
    assert [line.split()[0] for line in lines] == ["epoch", "test", CONFIG]
    assert json.loads((tmp_path / "run" / CONFIG).read_text())["settings"]["ranks"] == 2
    assert len((tmp_path / "run" / METRICS).read_text().splitlines()) == 1


# --- your own training loop ----------------------------------------------------------------------------------------


def test_the_documented_loop_selects_over_all_ranks(pair):
    model = net()
    x, target = ranks.halves(0, 1)
    losses = F.cross_entropy(model(x), target, reduction="none")
    hardest = losses.topk(round(0.3 * len(losses)))
    assert (hardest.indices < 6).sum() == 3  # of four: each rank's own hardest would be others
    hardest.values.mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for rank in pair:
        assert (rank["snippet"] - flat(model)).abs().max() <= CLOSE
    assert (flat(net()) - flat(model)).abs().max() > DIFFERENT


def test_a_loop_with_hard_batches_on_two_ranks_is_that_of_one_process(pair, folder):
    weights, losses = ranks.loop(folder)
    for each in pair:
        assert furthest(each["loop"][0], weights) < CLOSE
        torch.testing.assert_close(each["loop"][1], losses)
