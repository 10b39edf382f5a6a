"""For torchtitan: a loss that replaces its ``ChunkedLossWrapper`` (tested with version 0.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import IGNORE_INDEX, ChunkedLossWrapper

from batchkern.ops import linear_trimmed_cross_entropy


class TrimmedLossWrapper(ChunkedLossWrapper):
    """The mean loss of the tokens with the highest loss, times the number of tokens with a label: ``Config(keep=0.5)``.

    Like the base class, it is called with the last hidden state, applies the output layer ``lm_head`` itself, and
    returns the sum over the tokens of this process, divided by ``global_valid_tokens`` if that is given. Tokens are
    ranked within each process. Validation uses all tokens. ``num_chunks`` and ``loss_fn`` are not used.

    Args:
        config: ``TrimmedLossWrapper.Config``, with ``keep`` in (0, 1], the fraction of the tokens kept.
        options: the other arguments of ``ChunkedLossWrapper``.

    Raises:
        TypeError: when called, if ``lm_head`` is not an ``nn.Linear``, or its weight is sharded over the vocabulary
            (tensor parallelism).

    Examples:
        >>> import torch
        >>> from batchkern.integrations.torchtitan import TrimmedLossWrapper
        >>> loss = TrimmedLossWrapper.Config(keep=0.5).build()
        >>> head = torch.nn.Linear(2, 2, bias=False)
        >>> head.weight.data = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log()
        >>> loss.set_lm_head(head)
        >>> hidden, labels = torch.eye(2)[None].requires_grad_(), torch.tensor([[0, 1]])  # losses 0.2877 and 0.6931
        >>> value, metrics = loss(hidden, labels)
        >>> round(value.item(), 4)  # the harder one, times two tokens
        1.3863
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
        head = self.lm_head
        if not isinstance(head, nn.Linear):
            raise TypeError(f"lm_head must be an nn.Linear, got {type(head).__name__}")
        keep = self.keep if pred.requires_grad else 1.0

        def mean(hidden: Tensor) -> Tensor:
            if isinstance(head.weight, DTensor):
                raise TypeError("lm_head must have all words in each process, its weight is a DTensor")
            target = labels.flatten()
            return linear_trimmed_cross_entropy(
                hidden.flatten(0, 1), head.weight, target, keep, bias=head.bias, ignore_index=IGNORE_INDEX
            )

        # The loss is computed within a call of the layer, so that FSDP2 gathers its weight and reduces its gradient.
        head.forward = mean  # type: ignore[method-assign, assignment]
        try:
            loss = head(pred)
        finally:
            del head.forward
        count = (labels != IGNORE_INDEX).sum()
        loss = loss.where(count > 0, 0.0) * count
        return loss if global_valid_tokens is None else loss / global_valid_tokens, {}
