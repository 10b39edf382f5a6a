"""The stream of batches: every row once an epoch, in another order each time, from wherever it was left."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchkern.plan import EpochBatches, Replay, count_batches, cut
from batchkern.seeding import derived_seed, generator


@given(rows=st.integers(1, 60), batch_size=st.integers(1, 20), epochs=st.integers(1, 4), seed=st.integers(0, 2**63 - 1))
def test_every_row_once_an_epoch(rows, batch_size, epochs, seed):
    batches = EpochBatches(rows, batch_size, epochs, seed)
    plan = list(batches)
    per_epoch = (rows + batch_size - 1) // batch_size
    assert batches.per_epoch == per_epoch
    assert len(plan) == epochs * per_epoch
    for epoch in range(epochs):
        of_epoch = plan[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert [b.epoch for b in of_epoch] == [epoch] * per_epoch
        assert [b.ends_epoch for b in of_epoch] == [False] * (per_epoch - 1) + [True]
        assert [len(b.indices) for b in of_epoch[:-1]] == [batch_size] * (per_epoch - 1)
        assert torch.cat([b.indices for b in of_epoch]).sort().values.tolist() == list(range(rows))
    assert [b.progress for b in plan] == [i / len(plan) for i in range(len(plan))]
    assert all(b.rate is None and b.number is None and b.inject is None and not b.reset_optimizer for b in plan)


@given(rows=st.integers(1, 60), size=st.integers(1, 20))
def test_the_last_smaller_batch_is_dropped_if_it_is_not_the_only_one(rows, size):
    order = torch.randperm(rows)
    batches = cut(order, size, min(2, size), drop_last=True)
    assert count_batches(rows, size, min(2, size), drop_last=True) == len(batches)
    if rows < size:
        assert [len(batch) for batch in batches] == [rows]
    else:
        assert [len(batch) for batch in batches] == [size] * (rows // size)
        assert torch.equal(torch.cat(batches), order[: size * (rows // size)])


def hints(plan):
    """How many of the batches after it each batch names, in order; all that it names are checked."""
    plan = list(plan)
    for place, batch in enumerate(plan):
        following = plan[place + 1 : place + 1 + len(batch.ahead)]
        assert all(torch.equal(rows, b.indices) for rows, b in zip(batch.ahead, following, strict=True))
    return [len(batch.ahead) for batch in plan]


@pytest.mark.parametrize("taken", [0, 4, 5, 14])
def test_each_batch_names_the_next_ones_of_its_epoch_and_the_last_that_of_the_next(taken):
    batches = EpochBatches(9, 2, 3, 0)
    batches.taken = taken
    stream = iter(batches)
    for number in range(taken + 1, 16):
        next(stream)
        assert batches.state_dict() == {"taken": number}  # the hint has taken nothing
    assert hints(EpochBatches(9, 2, 3, 0)) == [4, 3, 2, 1, 1] * 2 + [4, 3, 2, 1, 0]
    assert hints(EpochBatches(40, 2, 1, 0))[:5] == [16, 16, 16, 16, 15]


def test_a_replay_names_the_next_batch_within_a_round():
    """Rounds of three begin after 5, 8, 11 and 14 updates of 15; which batches they have is not known before."""
    asked = []

    def choose(round_):
        asked.append(round_)
        return [(round_ + 2 * i) % 5 for i in range(3)]

    replay = Replay()
    stream = replay.plan(EpochBatches(9, 2, 3, 0), choose)
    for number in range(1, 16):
        next(stream)
        assert asked == list(range(-(-max(0, number - 5) // 3)))
    expected = [4, 3, 2, 1, 0] + [2, 1, 0] * 3 + [0]
    assert hints(Replay().plan(EpochBatches(9, 2, 3, 0), choose)) == expected


def test_each_epoch_has_another_order_and_the_same_seed_the_same():
    orders = [torch.cat(EpochBatches(50, 7, 3, seed).epoch(e)).tolist() for seed in (0, 1) for e in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == 6
    again = EpochBatches(50, 7, 3, 0)
    assert torch.cat(again.epoch(2)).tolist() == orders[2]  # whatever was asked before
    assert torch.cat(again.epoch(0)).tolist() == orders[0]


def test_the_batch_size_changes_where_the_order_is_cut_not_the_order():
    assert torch.equal(torch.cat(EpochBatches(50, 7, 1, 0).epoch(0)), torch.cat(EpochBatches(50, 20, 1, 0).epoch(0)))


@pytest.mark.parametrize("taken", [0, 1, 4, 5, 6, 14, 15])
def test_continues_where_it_was_left(taken):
    whole = list(EpochBatches(9, 2, 3, 0))
    first = EpochBatches(9, 2, 3, 0)
    stream = iter(first)
    for _ in range(taken):
        next(stream)
    second = EpochBatches(9, 2, 3, 0)
    second.load_state_dict(first.state_dict())
    rest = list(second)
    assert len(rest) == 15 - taken
    for ours, theirs in zip(rest, whole[taken:], strict=True):
        assert torch.equal(ours.indices, theirs.indices)
        assert (ours.epoch, ours.progress, ours.ends_epoch) == (theirs.epoch, theirs.progress, theirs.ends_epoch)
    assert list(second) == []


@pytest.mark.parametrize("left", range(16))
def test_a_replay_continues_where_it_was_left(left):
    """Also in the middle of a round: its order is that of the ledger as it was when the round began."""

    def chooser(asked):
        def choose(round_):
            asked.append(round_)
            return [(round_ + i) % 5 for i in range(3)]

        return choose

    asked, asked_of_first, asked_of_second = [], [], []
    whole = list(Replay().plan(EpochBatches(9, 2, 3, 0), chooser(asked)))
    assert asked == [0, 1, 2, 3]  # ten updates are three rounds of three, and one cut short
    first, second = Replay(), Replay()
    stream = first.plan(EpochBatches(9, 2, 3, 0), chooser(asked_of_first))
    numbers = [next(stream).number for _ in range(left)]
    second.load_state_dict(first.state_dict(), 5, 3)
    rest = list(second.plan(EpochBatches(9, 2, 3, 0), chooser(asked_of_second)))
    assert numbers + [b.number for b in rest] == [b.number for b in whole]
    assert asked_of_first + asked_of_second == asked
    assert [b.progress for b in rest] == [b.progress for b in whole[left:]]


def test_state_is_a_copy():
    replay = Replay()
    stream = replay.plan(EpochBatches(4, 2, 3, 0), lambda round_: [0, 1])
    for _ in range(3):
        next(stream)
    state = replay.state_dict()
    replay.order.clear()
    assert state == {"updates": 3, "round": 1, "order": [0, 1], "place": 1}


def test_derived_seeds():
    places = [("epoch", 1), ("epoch", 11), ("epoch", "1"), ("epoch1",), ("order",), (1, "epoch"), ()]
    seeds = [derived_seed(seed, *place) for seed in (0, 1, 11) for place in places]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derived_seed(3, "a", 5) == derived_seed(3, "a", 5)
    # The same on every machine and in every release, or a run could not be resumed elsewhere.
    assert derived_seed(0, "epoch", 0) == 7517732205036318746
    first, second = (torch.rand(4, generator=generator(0, "x")) for _ in range(2))
    assert torch.equal(first, second)


@given(rows=st.integers(1, 60), size=st.integers(5, 20), least=st.integers(1, 5))
def test_a_last_batch_that_is_too_small_joins_the_one_before(rows, size, least):
    batches = cut(torch.arange(rows), size, least)
    assert torch.cat(batches).tolist() == list(range(rows))
    assert len(batches) == count_batches(rows, size, least) == EpochBatches(rows, size, 1, 0, least).per_epoch
    assert {len(batch) for batch in batches[:-1]} <= {size}
    if rows >= least:
        assert least <= len(batches[-1]) < size + least


@pytest.mark.parametrize("value", [-1, 7, 1.0, "1", None, True, [1]])
def test_saved_numbers_are_whole_and_in_range(value):
    with pytest.raises(ValueError, match=r"taken is .*, which must be a whole number from 0 to 6"):
        EpochBatches(4, 2, 3, 0).load_state_dict({"taken": value})


@pytest.mark.parametrize(
    "change",
    [
        {"updates": -1},
        {"updates": 7},
        {"round": None},
        {"place": 3},
        {"order": [0, -1]},
        {"order": [0, 2]},
        {"order": [0.0]},
        {"order": None},
    ],
)
def test_a_replay_takes_no_impossible_state(change):
    replay = Replay()
    replay.load_state_dict({"updates": 6, "round": 1, "order": [1, 0], "place": 2}, 2, 3)
    with pytest.raises((TypeError, ValueError)):
        replay.load_state_dict({"updates": 4, "round": 1, "order": [1, 0], "place": 2} | change, 2, 3)
