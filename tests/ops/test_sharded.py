"""Parameters on several processes: the step of FSDP2 is that of one process."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import warm
from torch import Tensor, nn

import batchkern

WORDS, WIDTH, TOKENS = 7, 4, 12  # 7 words do not divide by 2 or 3
FORMS = ["head", "head, mixed", "root", "root, mixed", "root, tied", "both, tied"]


class Model(nn.Module):
    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.body(self.embedding(tokens)).tanh()


def loss_of(model: Model, tokens: Tensor, target: Tensor, upstream: Tensor, group: Any = None) -> Tensor:
    """Some weighting of the tokens, and a selection among those of the group."""
    layer = model(tokens), model.head.weight, target
    losses = batchkern.linear_cross_entropy(*layer, bias=model.head.bias, reduction="none")
    trimmed = batchkern.linear_trimmed_cross_entropy(*layer, 0.4, bias=model.head.bias, group=group)
    return (losses * upstream).mean() + trimmed


def sharded(model: Model, form: str) -> Model:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)} if "mixed" in form else {}
    if form.startswith("head"):
        fully_shard(model.head, **options)
    if form.startswith("both"):
        fully_shard([model.embedding, model.head], **options)
    return fully_shard(model, **options)


def _worker(rank: int, folder: Path, world: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)
    results = {}
    for form, (model, *batch) in torch.load(folder / "problems.pt", weights_only=False).items():
        model = sharded(model, form)
        loss = loss_of(model, *(x.chunk(world)[rank] for x in batch), group=dist.group.WORLD)
        loss.backward()
        results[form] = {name: x.grad.full_tensor() for name, x in model.named_parameters()}
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.cpu
@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("world", [2, 3])
def test_a_group_of_processes_is_one_process(world: int, tmp_path: Path) -> None:
    problems, expected = {}, {}
    for form in FORMS:
        model = Model(tied="tied" in form)
        tokens, target = torch.randint(WORDS, (2, TOKENS))
        problems[form] = model, tokens, target, torch.randn(TOKENS)
        alone = copy.deepcopy(model)
        alone = alone.bfloat16() if "mixed" in form else alone
        loss_of(alone, *problems[form][1:]).backward()
        expected[form] = {name: x.grad.float() for name, x in alone.named_parameters()}
    torch.save(problems, tmp_path / "problems.pt")
    warm.spawn(_worker, world, tmp_path, world)
    for rank in range(world):
        for form, found in torch.load(tmp_path / f"{rank}.pt").items():
            step = 2**-6 if "mixed" in form else 1e-6
            assert found.keys() == expected[form].keys()
            for name, grad in found.items():
                wanted = expected[form][name]
                assert grad.dtype == torch.float32
                assert (grad - wanted).abs().max() <= step * wanted.abs().max(), (form, name)


# --- a part of the vocabulary on each process ---------------------------------------------------------------------

PARTS = {"uneven": [4, 7, 2], "one has none": [6, 0, 7], "masked": [5, 5, 3], "DTensor": [5, 5, 3]}
CALLS: list[dict[str, Any]] = [{}, {"label_smoothing": 0.1, "chunk_rows": 7}, {"softcap": 2.0, "logit_scale": 0.5}]


def of_the_vocabulary(layer: list[Tensor], target: Tensor, upstream: Tensor, **options: Any) -> list[Tensor]:
    """Rows, and gradients of a loss that has all the ways in it, on one process or on several."""
    hidden, weight, bias = leaves = [x.detach().clone().requires_grad_() for x in layer]
    rows = batchkern.linear_cross_entropy(hidden, weight, target, bias=bias, stats=True, **options)
    total = (rows.loss * upstream).sum() + (rows.lse * upstream.flip(0)).sum()
    for reduction in ("mean", "sum"):
        total = total + batchkern.linear_cross_entropy(
            hidden, weight, target, bias=bias, reduction=reduction, **options
        )
    total = total + batchkern.linear_trimmed_cross_entropy(hidden, weight, target, 0.3, bias=bias, **options)
    return [*(x.detach() for x in rows), *torch.autograd.grad(total, leaves)]


def _vocabulary_worker(rank: int, folder: Path, world: int) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)
    mesh = dist.init_device_mesh("cpu", (world,))
    results = {}
    for name, (hidden, weight, bias, target, upstream) in torch.load(folder / "problems.pt").items():
        if name == "DTensor":
            parts = [distribute_tensor(x, mesh, [Shard(0)]) for x in (weight, bias)]
        else:
            parts = [x.split(PARTS[name])[rank] for x in (weight, bias)]
        for i, options in enumerate(CALLS):
            found = of_the_vocabulary([hidden, *parts], target, upstream, vocab_group=dist.group.WORLD, **options)
            results[name, i] = [x.to_local() if name == "DTensor" and j > 4 else x for j, x in enumerate(found)]
    hidden[0], target[3] = torch.nan, 99
    for wrong, words in ((hidden, r"target\[3\] is 99; it must be in \[0, 13\)"), (hidden.double(), "must be float32")):
        with pytest.raises((ValueError, TypeError), match=words):
            batchkern.linear_cross_entropy(wrong, parts[0], target, vocab_group=dist.group.WORLD)
    target[3] = 0
    losses = batchkern.linear_cross_entropy(hidden, parts[0], target, reduction="none", vocab_group=dist.group.WORLD)
    assert losses.isnan().tolist() == [True, *[False] * (len(losses) - 1)]
    leaf = hidden[1:].clone().requires_grad_()
    losses = batchkern.linear_cross_entropy(leaf, parts[0], target[1:], reduction="none", vocab_group=dist.group.WORLD)
    with pytest.raises(ValueError, match="must be equal on all processes of vocab_group"):
        losses[rank].backward()
    alone = [dist.new_group([other]) for other in range(world)][rank]
    with pytest.raises(ValueError, match=r"the group of weight's mesh, ranks \[0, 1, 2\], got ranks"):
        batchkern.linear_cross_entropy(leaf, distribute_tensor(weight, mesh, [Shard(0)]), target[1:], vocab_group=alone)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.cpu
@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_a_group_that_shares_a_vocabulary_out_is_one_process(tmp_path: Path) -> None:
    words, rows, world = 13, 20, 3
    problems = {}
    for name in PARTS:
        bias = torch.randn(words)
        target = torch.randint(words - 4, (rows,))
        target[torch.rand(rows) < 0.2] = -100
        if name == "masked":
            bias[-4:] = -torch.inf  # the padding: all of the last part, and one word of the part before
        hidden, weight = torch.randn(rows, WIDTH), torch.randn(words, WIDTH)
        hidden[5], bias[1], bias[8], target[5] = 0, 9.0, 9.0, 8  # equal logits on two processes: the first predicts
        upstream = torch.where(torch.rand(rows) < 0.5, torch.randn(rows), 0)
        problems[name] = hidden, weight, bias, target, upstream
    torch.save(problems, tmp_path / "problems.pt")
    warm.spawn(_vocabulary_worker, world, tmp_path, world)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for name, (*layer, target, upstream) in problems.items():
        for i, options in enumerate(CALLS):
            if name == "masked" and "label_smoothing" in options:
                continue  # smoothing gives masked words a share, and the loss is infinite
            expected = of_the_vocabulary(layer, target, upstream, **options)
            for rank in range(world):
                ours = found[rank][name, i]
                for value, wanted in zip(ours[:5], expected[:5], strict=True):
                    torch.testing.assert_close(value, wanted, rtol=1e-5, atol=2e-6)
                for value, wanted in zip(ours[5:], expected[5:], strict=True):
                    part = wanted.split(PARTS[name])[rank]
                    torch.testing.assert_close(value, part, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("op", [batchkern.linear_cross_entropy, batchkern.linear_trimmed_cross_entropy])
def test_a_parameter_that_its_trainer_took_away(op: Any) -> None:
    keep = () if op is batchkern.linear_cross_entropy else (0.5,)
    with pytest.raises(ValueError, match=r"weight is empty: its trainer keeps it sharded.*GatheredParameters.*FSDP2"):
        op(torch.zeros(4, 3), torch.zeros(0), torch.zeros(4, dtype=torch.long), *keep)
