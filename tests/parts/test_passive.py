"""Passive batches in any loop: the updates of the trainer, and a model that is itself again at the end."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from batchkern.errors import UserError
from batchkern.models import find_classifier
from batchkern.parts import EpochBatchSampler, SecondHead, WholeEpochs, inject, is_passive

ACTIVE = TensorDataset(torch.randn(23, 5), torch.arange(23) % 3)
PASSIVE = TensorDataset(torch.randn(11, 5), torch.arange(11) % 4)


def stateful(dataset: TensorDataset, size: int = 4, workers: int = 0) -> WholeEpochs:
    return WholeEpochs(DataLoader(dataset, batch_sampler=EpochBatchSampler(len(dataset), size), num_workers=workers))


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


def test_every_gth_batch_over_all_passes() -> None:
    loader = inject([(i,) for i in range(4)], [[7], [8]], every=3)
    passes = [[(is_passive(batch), batch[0]) for batch in loader] for _ in range(3)]
    assert passes == [
        [(False, 0), (False, 1), (False, 2), (True, 7), (False, 3)],
        [(False, 0), (False, 1), (True, 8), (False, 2), (False, 3)],
        [(False, 0), (True, 7), (False, 1), (False, 2), (False, 3), (True, 7 + 1)],
    ]
    assert (loader.active, loader.injected) == (12, 4)
    with pytest.raises(TypeError):
        len(loader)  # type: ignore[arg-type]
    assert [is_passive(x) for x in inject([{"x": 1}] * 5, [{"x": 2}], every=lambda n: n == 2)] == [0, 0, 1, 0, 0, 0]


def test_marks_are_kept_by_what_moves_batches_to_a_device() -> None:
    tensor = torch.zeros(2)
    kinds = ({"x": tensor}, (tensor, tensor), [tensor])
    batches = [next(filter(is_passive, inject([0], [kind], every=1))) for kind in kinds]
    moved = []
    try:
        from accelerate.utils import send_to_device

        moved += [send_to_device(batch, torch.device("cpu")) for batch in batches]
    except ImportError:
        pass
    try:
        from lightning.fabric.utilities import move_data_to_device

        moved += [move_data_to_device(batch, torch.device("cpu")) for batch in batches]
    except ImportError:
        pass
    assert all(map(is_passive, moved))
    assert not is_passive((tensor, tensor))


@pytest.mark.parametrize(("stop", "workers"), [(1, 0), (5, 0), (6, 0), (7, 0), (12, 0), (13, 2), (20, 0)])
def test_a_state_goes_on_where_training_was(stop: int, workers: int) -> None:
    def loader() -> inject:
        return inject(stateful(ACTIVE, workers=workers), stateful(PASSIVE), every=5)

    def train(batches: inject, seen: list[list[float]], until: int) -> None:
        while len(seen) < until:
            for batch in batches:
                seen.append([float(is_passive(batch)), *batch[0][:, 0].tolist()])
                if len(seen) == until:
                    break

    whole: list[list[float]] = []
    train(loader(), whole, 24)
    first, seen = loader(), []  # type: ignore[var-annotated]
    train(first, seen, stop)
    state, second = first.state_dict(), loader()
    train(first, [], 3)
    second.load_state_dict(state)
    train(second, seen, 24)
    assert seen == whole
    assert sum(row[0] for row in seen) == 4


def test_updates_are_those_of_algorithm_1_and_the_idle_head_rests() -> None:
    torch.manual_seed(0)
    model = net()
    trunk, own, theirs = copy.deepcopy(model[:3]), copy.deepcopy(model[3]), nn.Linear(6, 4)
    head = SecondHead(model, 4)
    head.layers["3"].load_state_dict(theirs.state_dict())
    optimizer, plain = sgd(model), sgd(nn.ModuleList([trunk, own, theirs]))
    for batch in inject(stateful(ACTIVE), stateful(PASSIVE), every=2):
        x, y = batch
        with head.used_by(batch):
            loss = F.cross_entropy(model(x), y)
        idle = own if is_passive(batch) else theirs
        expected = F.cross_entropy((theirs if is_passive(batch) else own)(trunk(x)), y)
        for update, value in ((optimizer, loss), (plain, expected)):
            update.zero_grad()
            value.backward()
            update.step()
        assert all(p.grad is None for p in idle.parameters())
    pairs = ((model[:3], trunk), (model[3], own), (head.layers["3"], theirs))
    for ours, reference in pairs:
        for name, value in reference.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=1e-6)
    head.detach()
    assert list(model.state_dict()) == list(net().state_dict())
    head.detach()


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.classifier = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        hidden = self.body(self.embed(input_ids)).mean(1)
        return type("Output", (), {"logits": self.classifier(hidden)})()


def test_any_module_and_any_part_of_it() -> None:
    model, tokens = Text(), torch.randint(9, (2, 4))
    head = SecondHead(model, 5, {"input_ids": tokens, "attention_mask": None}, shared="embed")
    assert list(head.layers) == ["body", "classifier"]
    batch = next(x for x in inject([0], [{"input_ids": tokens}], every=1) if is_passive(x))
    with head.used_by(batch):
        assert model(**batch).logits.shape == (2, 5)
    assert model(tokens).logits.shape == (2, 3)
    with head.used_by({"input_ids": tokens}):
        assert model(tokens).logits.shape == (2, 3)
    assert find_classifier(model)[0] == "classifier"  # the model's own
    with pytest.raises(UserError, match=r"the classifier 'classifier' already has a second_head; detach\(\) it first"):
        SecondHead(model, 5)
    head.detach()
    assert list(SecondHead(model, 5).layers) == ["classifier"]


def test_a_compiled_model_runs_the_head_that_is_meant() -> None:
    torch.manual_seed(0)
    model = net()
    head = SecondHead(model, 4)
    compiled = torch.compile(model, backend="aot_eager")
    for batch in inject(stateful(ACTIVE), stateful(PASSIVE), every=2):
        with head.used_by(batch):
            assert compiled(batch[0]).shape[1] == (4 if is_passive(batch) else 3)


def test_wrong_arguments() -> None:
    with pytest.raises(UserError, match="every must be a whole number of at least 1, got 0"):
        inject([], [], every=0)
    with pytest.raises(UserError, match="passive must have batches whenever it is iterated, but it has none"):
        list(inject([(1,)], [], every=1))
    with pytest.raises(UserError, match="passive batches must be mappings, tuples or lists, got Tensor"):
        list(inject([(1,)], [torch.zeros(2)], every=1))
    with pytest.raises(UserError, match="shared is '0', which needs an example"):
        SecondHead(net(), 4, shared="0")
    with pytest.raises(UserError, match="has no classifier that could be found"):
        SecondHead(nn.ReLU(), 4)
    with pytest.raises(UserError, match="it is itself the only Linear layer"):
        SecondHead(nn.Linear(2, 3), 4)
    with pytest.raises(UserError, match=r"classes must be a whole number of at least 1, got 2\.5"):
        SecondHead(net(), 2.5)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the model cannot take the example: mat1 and mat2"):
        SecondHead(net(), 4, torch.zeros(2, 9))


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


def test_a_batch_keeps_its_class_beside_its_mark() -> None:
    pair = next(filter(is_passive, inject([0], [Pair(torch.zeros(2), torch.ones(2))], every=1)))
    assert isinstance(pair, Pair)
    assert torch.equal(pair.y, torch.ones(2))
    encoding = pytest.importorskip("transformers").BatchEncoding({"x": torch.zeros(2)})
    assert is_passive(next(filter(is_passive, inject([0], [encoding], every=1))).to("cpu"))


def test_marks_that_a_loop_loses_are_an_error() -> None:
    """The second head would never train, and the model's own would, on labels that are not its."""
    head, seen = SecondHead(model := net(), 4), []

    def train() -> None:
        for batch in inject(stateful(ACTIVE), stateful(PASSIVE), every=1):
            seen.append(moved := [tensor.to("cpu") for tensor in batch])
            with head.used_by(moved):
                model(moved[0])

    with pytest.raises(RuntimeError, match=r"3 passive batches were delivered and none was recognised: call head\."):
        train()
    assert len(seen) == 7


def test_a_loader_without_a_state_is_read_from_its_beginning() -> None:
    accelerate = pytest.importorskip("accelerate")
    prepared = accelerate.Accelerator(cpu=True).prepare(DataLoader(PASSIVE, batch_size=4))
    loader = inject(stateful(ACTIVE), prepared, every=2)  # which has a method state_dict, and no state
    next(iter(loader))
    assert set(loader.state_dict()) == {"active", "injected", "pending", "begun", "loader"}
    plain = inject(DataLoader(ACTIVE, batch_size=4), DataLoader(PASSIVE, batch_size=4), every=2)
    whole = plain.state_dict()
    next(iter(plain))
    state = plain.state_dict()
    plain.load_state_dict(whole)
    with pytest.raises(
        ValueError, match=r"saved within a pass, and a DataLoader cannot continue there: inject into WholeEpochs"
    ):
        plain.load_state_dict(state)
