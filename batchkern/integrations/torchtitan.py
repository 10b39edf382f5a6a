"""For torchtitan: a loss in place of its ``ChunkedLossWrapper`` (tried with 0.3, its loss alone)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torchtitan.components.loss import IGNORE_INDEX, ChunkedLossWrapper

from batchkern.ops import linear_trimmed_cross_entropy


class TrimmedLossWrapper(ChunkedLossWrapper):
    """The mean over the tokens of highest loss, times the tokens that have a label: ``Config(keep=0.5)``.

    As that of the base class, it is called with the last hidden state, does the output layer itself and returns the sum
    over a process's tokens divided by ``global_valid_tokens``; the gradient is made in one backward pass, in which a
    weight that FSDP2 has sharded is gathered once. Tokens are ranked within a process. ``num_chunks`` and ``loss_fn``
    are not used.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLossWrapper.Config):
        keep: float = 1.0
        """Fraction of the tokens kept, in (0, 1]."""

    def __init__(self, config: Config, **options: Any) -> None:
        super().__init__(config, **options)
        self.keep = config.keep

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **loss_inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if not isinstance(self.lm_head, nn.Linear):
            raise TypeError(f"lm_head must be an nn.Linear, got {type(self.lm_head).__name__}")
        keep = self.keep if pred.requires_grad else 1.0  # validation is of all tokens
        mean = linear_trimmed_cross_entropy(
            pred.flatten(0, 1),
            self.lm_head.weight,
            labels.flatten(),
            keep,
            bias=self.lm_head.bias,
            ignore_index=IGNORE_INDEX,
        )
        count = (labels != IGNORE_INDEX).sum()
        loss = mean.where(count > 0, 0.0) * count
        return loss if global_valid_tokens is None else loss / global_valid_tokens, {}
