"""The loss for torchtitan: beside its own wrapper at keep 1, beside a plain loop, and with a sharded output layer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import warm
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

pytest.importorskip("torchtitan.components.loss")

from torchtitan.components.loss import ChunkedLossWrapper

from batchkern.integrations.torchtitan import TrimmedLossWrapper

WORDS, WIDTH = 50, 16


def layers() -> tuple[nn.Module, nn.Linear]:
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)), nn.Linear(WIDTH, WORDS, bias=False)


def batch() -> tuple[Tensor, Tensor]:
    labels = torch.randint(WORDS, (2, 8))
    labels[0, :3] = -100
    return torch.randint(WORDS, (2, 8)), labels


def step(loss: Any, tokens: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
    body, head = layers()
    loss.set_lm_head(head)
    value, metrics = loss(body(tokens), labels, torch.tensor(20.0))
    value.backward()
    assert metrics == {}
    return value.detach(), [x.grad for x in (*body.parameters(), *head.parameters())]


def test_keep_1_is_its_own_wrapper() -> None:
    tokens, labels = batch()
    expected = step(ChunkedLossWrapper(ChunkedLossWrapper.Config(num_chunks=2)), tokens, labels)
    torch.testing.assert_close(step(TrimmedLossWrapper.Config(keep=1.0).build(), tokens, labels), expected)


def test_the_loss_is_that_of_the_hardest_tokens() -> None:
    tokens, labels = batch()
    body, head = layers()
    losses = F.cross_entropy(head(body(tokens)).flatten(0, 1), labels.flatten(), reduction="none")
    expected = losses[labels.flatten() != -100].topk(4).values.mean() * 13 / 20
    expected.backward()
    grads = [x.grad for x in (*body.parameters(), *head.parameters())]
    torch.testing.assert_close(
        step(TrimmedLossWrapper.Config(keep=0.3).build(), tokens, labels), (expected.detach(), grads)
    )


def test_validation_is_of_all_tokens_and_an_empty_batch_is_nothing() -> None:
    tokens, labels = batch()
    loss, plain = TrimmedLossWrapper.Config(keep=0.3).build(), ChunkedLossWrapper.Config(num_chunks=2).build()
    body, head = layers()
    loss.set_lm_head(head)
    plain.set_lm_head(head)
    with torch.no_grad():
        torch.testing.assert_close(loss(body(tokens), labels)[0], plain(body(tokens), labels)[0])
    value, grads = step(loss, tokens, torch.full_like(labels, -100))
    assert float(value) == 0
    assert all(float(grad.abs().sum()) == 0 for grad in grads)


def test_another_output_layer_is_refused() -> None:
    tokens, labels = batch()
    loss = TrimmedLossWrapper.Config(keep=0.3).build()
    loss.set_lm_head(nn.Identity())
    with pytest.raises(TypeError, match="lm_head must be an nn.Linear, got Identity"):
        loss(layers()[0](tokens), labels)


def _worker(rank: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    torch.manual_seed(3)
    tokens, labels = [batch() for _ in range(2)][rank]
    body, head = layers()
    for part in (body, head):
        fully_shard(part)
        part.set_force_sum_reduction_for_comms(True)  # for gloo
        part.set_gradient_divide_factor(1.0)  # as torchtitan does, whose losses are sums
    loss = TrimmedLossWrapper.Config(keep=0.3).build()
    loss.set_lm_head(head)
    loss(body(tokens), labels, torch.tensor(20.0))[0].backward()
    torch.save([x.grad.full_tensor() for x in (*body.parameters(), *head.parameters())], folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_sharded_output_layer(tmp_path: Path) -> None:
    torch.manual_seed(3)
    each = [step(TrimmedLossWrapper.Config(keep=0.3).build(), *problem)[1] for problem in [batch() for _ in range(2)]]
    warm.spawn(_worker, 2, tmp_path)
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), [sum(grads) for grads in zip(*each)])
