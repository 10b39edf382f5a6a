"""A loop without any library and without the patch, which trainings in the libraries must equal."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORDS, RATE = 300, 0.5


def model(seed: int = 1) -> Any:
    import transformers

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=WORDS, **sizes, num_key_value_heads=2, pad_token_id=0)
    return transformers.AutoModelForCausalLM.from_config(config).train()


def rows(count: int, length: int = 12) -> list[dict[str, list[int]]]:
    """Examples of tokens, of whose first three nobody asks anything."""
    tokens = torch.randint(1, WORDS, (count, length), generator=torch.Generator().manual_seed(2)).tolist()
    return [{"input_ids": row, "labels": [-100] * 3 + row[3:]} for row in tokens]


def collate(examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    return {key: torch.tensor([example[key] for example in examples]) for key in ("input_ids", "labels")}


def batches(examples: list[dict[str, list[int]]], micro_batches: int = 1) -> list[list[dict[str, Tensor]]]:
    """Batches of four, in the order of the examples; those of one step together."""
    each = [collate(examples[i : i + 4]) for i in range(0, len(examples), 4)]
    return [each[i : i + micro_batches] for i in range(0, len(each), micro_batches)]


def token_losses(language_model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = language_model(input_ids=batch["input_ids"]).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none")
    return losses[batch["labels"][:, 1:].flatten() != -100]


def hardest(losses: Tensor, keep: float) -> Tensor:
    return losses.topk(max(1, round(keep * len(losses)))).values.mean()


def train(language_model: nn.Module, batches: list[list[dict[str, Tensor]]], keeps: list[float]) -> list[float]:
    """Plain gradient descent, a step for each list of micro-batches; a micro-batch counts by its tokens with a label.
    Returns the losses of the steps."""
    losses = []
    for micro_batches, keep in zip(batches, keeps, strict=True):
        language_model.zero_grad()
        count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in micro_batches)
        loss = torch.zeros(())
        for batch in micro_batches:
            of_each = token_losses(language_model, batch)
            if len(of_each):
                loss = loss + hardest(of_each, keep) * len(of_each) / count
        loss.backward()
        with torch.no_grad():
            for parameter in language_model.parameters():
                if parameter.grad is not None:
                    parameter -= RATE * parameter.grad
        losses.append(float(loss.detach()))
    return losses


def assert_same_weights(trained: nn.Module, expected: nn.Module) -> None:
    weights = {name: x.detach() for name, x in trained.named_parameters()}
    theirs = {name: x.detach() for name, x in expected.named_parameters()}
    torch.testing.assert_close(weights, theirs, rtol=0, atol=1e-6)
    assert max(float((weights[name] - x.detach()).abs().max()) for name, x in model().named_parameters()) > 1e-3


def logged(trained: Any, name: str = "loss") -> list[float]:
    """What a Trainer of transformers has logged."""
    return [entry[name] for entry in trained.state.log_history if name in entry]
