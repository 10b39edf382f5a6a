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


@pytest.mark.parametrize("op", [batchkern.linear_cross_entropy, batchkern.linear_trimmed_cross_entropy])
def test_a_parameter_that_its_trainer_took_away(op: Any) -> None:
    keep = () if op is batchkern.linear_cross_entropy else (0.5,)
    with pytest.raises(ValueError, match=r"weight is empty: its trainer keeps it sharded.*GatheredParameters.*FSDP2"):
        op(torch.zeros(4, 3), torch.zeros(0), torch.zeros(4, dtype=torch.long), *keep)
