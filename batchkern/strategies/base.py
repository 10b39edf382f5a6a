"""The hooks by which a training strategy changes the trainer. A strategy overrides only those that it needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from batchkern.data.labelled import IGNORED, Labelled, rows_of
from batchkern.description import describe_choice
from batchkern.distributed import Ranks, Share
from batchkern.errors import UserError
from batchkern.ops import cross_entropy, trimmed_cross_entropy, trimmed_mean
from batchkern.parts.virtual_samples import stacked
from batchkern.plan import Batch, EpochBatches, count_batches
from batchkern.validation import check_flags, check_number, count


@dataclass
class Run:
    """The properties of a training run that its strategies may use."""

    model: nn.Module
    shape: tuple[int, ...] | None
    """Shape of one input, (C, H, W) for an image; ``None`` if an input is more than one tensor."""
    classes: int
    rows: int
    """Size of the training set."""
    epochs: int
    batch_size: int
    device: torch.device
    seed: int
    label_smoothing: float = 0.0
    classifier: str | None = None
    """Name of the model's last linear layer, if the user gave one."""
    extras: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    """Additional modules that are trained together with the model, but do not belong to it."""
    least_rows: int = 1
    """The smallest number of rows of a training batch; batch norm may need two on each rank."""
    drop_last: bool = False
    """Whether the last batch of an epoch is left out if it is smaller."""
    inputs: Any = None
    """The inputs of two rows, for :meth:`example`."""
    masks: bool = False
    """Whether targets are masks, with a class at each place of an input."""
    accumulate: int = 1
    """Number of batches whose gradients make up one update."""
    ranks: Ranks = field(default_factory=Ranks)
    """The processes of the training; a loss takes ``group=run.ranks.group``."""
    fresh: Callable[[int], nn.Module] | None = None
    """Builds the network with random weights from a seed, even if the training starts from a weights file. A module
    given by the user is copied with its weights."""
    images_vary: bool = True
    """Whether a row that is in a batch twice may give two different images, by augmentation or a strategy's
    transform."""

    def example(self, rows: int) -> Any:
        """A batch of ``rows`` inputs to try the model with; images are all zeros."""
        if self.inputs is None:
            assert self.shape is not None
            return torch.zeros(rows, *self.shape, device=self.device, dtype=torch.float32)
        return rows_of(self.inputs, torch.arange(rows) % 2)

    def require(self, who: str, *, images: bool = False, labels: bool = True) -> None:
        """Checks that the data fit a strategy; the error message names ``who`` needs it.

        Raises:
            UserError: inputs are not a floating-point tensor, or with ``images`` they are not images; or, with
                ``labels``, there is more than one label per row.
        """
        shape = self.shape
        if shape is None or not self.example(1).is_floating_point() or (images and len(shape) != 3):
            what = "more than one tensor" if shape is None else f"{self.example(1).dtype} of shape {shape}"
            raise UserError(
                f"{who} needs {'images (C, H, W)' if images else 'inputs of floats'}, but inputs are {what}"
            )
        if labels:
            self.require_labels(who)

    def require_labels(self, who: str) -> None:
        """
        Raises:
            UserError: there is more than one label a row. The sentence says that ``who`` needs it.
        """
        if self.masks:
            raise UserError(f"{who} needs one label a row, but the labels are masks")

    @property
    def batches_per_epoch(self) -> int:
        return count_batches(self.rows, self.batch_size, self.least_rows, self.drop_last)


@dataclass
class Step:
    """One batch of the plan and its state, as passed to the hooks of strategies."""

    run: Run
    batch: Batch
    update: int
    """Number of active batches before this one in the whole training; without accumulation, the number of updates."""
    narrowed: bool = False
    """Whether the batch was already reduced to the rows that get a full pass."""
    kept: int | None = None
    """Number of rows that the loss counts; ``None`` means all."""
    scores: Tensor | None = None
    """``(B,)``: :meth:`Strategy.score` of the whole batch, for ``observe``."""
    share: Share = field(init=False)
    """Which rows of the batch belong to this rank, and so to its images and logits. After narrowing, of the reduced
    batch."""

    def __post_init__(self) -> None:
        self.share = self.run.ranks.share(len(self.batch.indices))


@dataclass(frozen=True)
class Perturbation:
    """Virtual samples at the input of one module, and a penalty on their outputs."""

    layer: nn.Module
    virtual: Callable[[Tensor], Tensor]
    """Maps hidden inputs ``(B, ...)`` to ``((1 + M) * B, ...)``, the batch itself first."""
    penalty: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Maps raw logits ``(B, C)``, virtual logits ``(M * B, C)`` and the targets to a 0-dim penalty. Its average over
    ranks must be the penalty of the whole batch."""
    own_update: bool = False
    """Whether the penalty gets a second update of its own, after the update for the loss."""


def run_with_virtual(
    model: nn.Module, layer: nn.Module, virtual: Callable[[Tensor], Tensor], images: Tensor
) -> tuple[Tensor, Tensor]:
    """Runs ``model`` with the input of ``layer`` replaced by ``virtual(input)``; returns raw and virtual logits."""
    with stacked(layer, model, virtual) as stack:
        model(images)
    assert stack.logits is not None
    return stack.logits


Beside = Callable[[nn.Module, Iterable[Batch], Tensor], Iterator[Tensor]]
"""Trains another model on the batches, without strategies, with the data and the settings of this training. After each
epoch it yields the losses ``(n,)``, float32 on the CPU, of rows ``(n,)`` of the training set without augmentation."""


def row_losses(logits: Tensor, target: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor | None]:
    """The loss of each row ``(B,)`` and, if targets are masks, the number of places of each row that are not ignored
    ``(B,)``. The loss of a row is then the mean over these places, and their number is its weight."""
    losses = cross_entropy(logits, target, label_smoothing=label_smoothing, reduction="none")
    if losses.dim() == 1:
        return losses, None
    places = (target != IGNORED).flatten(1).sum(1).float()
    # A row whose places are all ignored has no loss and no gradient; alone in a batch, it must not divide by 0.
    return losses.flatten(1).sum(1) / places.clamp(min=1), places.clamp(min=1e-12)


Fetch = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps positions ``(q,)`` in the whole batch to the images and targets there."""


def as_probabilities(target: Tensor, classes: int) -> Tensor:
    """Targets as probabilities ``(B, classes)`` float32, from labels ``(B,)`` or from probabilities."""
    return target if target.is_floating_point() else one_hot(target, classes).float()


def selected_mean(
    step: Step, logits: Tensor, target: Tensor, keep: float, *, among: Tensor | None = None, **band: Any
) -> tuple[Tensor, Tensor]:
    """The mean loss of the rows that ``trimmed_mean`` keeps, and the losses ``(B,)`` detached, as :meth:`Strategy.loss`
    returns them. ``among`` ``(B,)`` bool marks the rows that may be kept."""
    losses, places = row_losses(logits, target, step.run.label_smoothing)
    mask = step.share.counts(target)
    mask = mask if among is None else mask & among.to(mask.device)
    return trimmed_mean(losses, keep, mask=mask, weight=places, group=step.run.ranks.group, **band), losses.detach()


def weighted_mean(step: Step, logits: Tensor, target: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of each loss times its weight, divided by the number of rows (not by the sum of the weights); and the
    losses, as :meth:`Strategy.loss` returns them. ``weights`` ``(rows,)`` are those of the batch of all ranks, and
    constants: weights that are to be differentiated multiply ``row_losses`` before ``trimmed_mean``."""
    losses, places = row_losses(logits, target, step.run.label_smoothing)
    weighted, mask = losses * step.share.take(weights).to(losses), step.share.counts(target)
    return trimmed_mean(weighted, 1.0, mask=mask, weight=places, group=step.run.ranks.group), losses.detach()


class Strategy:
    """A way to choose samples and batches and to weight them. Subclasses are dataclasses whose fields are options.

    Examples:
        >>> import torch
        >>> from dataclasses import dataclass
        >>> from batchkern.strategies import Strategy
        >>> from batchkern.trainer import Trainer
        >>> @dataclass
        ... class EveryOther(Strategy):
        ...     name, owns = "every-other", frozenset({"the loss"})
        ...     def narrow(self, step, score):
        ...         return torch.arange(0, len(step.batch.indices), 2)  # these rows get a full pass
        >>> data = torch.arange(64.0).view(64, 1), torch.arange(64) // 32
        >>> Trainer("mlp", data, data, strategies=[EveryOther()], epochs=1).fit()["samples_backward"]
        32
    """

    name: ClassVar[str]
    owns: frozenset[str] = frozenset()
    """The things that this strategy decides, each of which only one strategy of a run may decide: ``"the batch plan"``,
    ``"the loss"``, ..."""
    divides_epochs: ClassVar[bool] = False
    """Whether the plan depends on the number of epochs, so that a run cannot be resumed for more epochs."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"{type(self).__name__} is not a function: give it to batchkern.trainer.Trainer as one of its strategies; "
            "for your own training loop, its parts are in batchkern.parts"
        )

    def __post_init__(self) -> None:
        """Checks that numbers and flags have the annotated type; NumPy numbers are converted to Python numbers."""
        for option in fields(self):  # type: ignore[arg-type]
            kind = str(option.type)
            value: Any = getattr(self, option.name) if option.init else None
            if value is None and (kind.endswith("None") or not option.init):
                continue
            if kind.startswith("float"):
                setattr(self, option.name, check_number(option.name, value))
            elif kind == "bool":
                check_flags(**{option.name: value})
            elif kind.startswith("int") and not callable(value):
                setattr(self, option.name, count(option.name, value, None))
            elif kind.startswith("tuple") and not isinstance(value, list | tuple | str):
                raise UserError(f"{option.name} must be a tuple, such as (a, b), got {value!r:.60}")

    def setup(self, run: Run) -> None:
        """Called once, before the optimizer is built: check the options against the run, add heads to
        ``run.extras``."""

    def prepare(self, beside: Beside) -> None:
        """Called once before the first update, and not again when a training is resumed."""

    def preparation(self) -> tuple[int, int]:
        """The numbers of samples that :meth:`prepare` passes forward and backward."""
        return 0, 0

    def plan(self, batches: EpochBatches, upstream: Iterator[Batch]) -> Iterator[Batch]:
        """The stream of batches, made from ``upstream``. After ``load_state_dict`` it continues from the loaded
        state."""
        return upstream

    def transform(
        self, step: Step, positions: Tensor, images: Tensor, target: Tensor, fetch: Fetch
    ) -> tuple[Tensor, Tensor]:
        """Changes the images ``(p, C, H, W)`` and targets of a training batch before the model gets them.

        Strategies transform in the order in which the trainer was given them. The rows may be the whole batch, the rows
        of one rank, or those chosen for a full pass. So this must be a pure function of the seed, the update and the
        positions of the rows in the whole batch.

        Args:
            positions: ``(p,)`` int64 on the CPU, the positions of these rows in ``step.batch.indices``.
            target: labels ``(p,)`` int64, or probabilities ``(p, classes)``; either may be returned.
            fetch: returns other rows of the batch, as this strategy would get them.
        """
        return images, target

    def narrow(self, step: Step, score: Callable[[], Tensor]) -> Tensor | None:
        """Positions in the batch of the rows that get a full pass, or ``None`` for all. ``score()`` returns the scores
        ``(B,)`` of all rows, which are their losses unless :meth:`score` is overridden."""
        return None

    def score(self, step: Step, logits: Tensor, target: Tensor, losses: Tensor) -> Tensor:
        """The scores ``(B,)`` of this rank's rows, by which the strategy that decides the loss chooses rows; ``losses``
        are detached."""
        return losses

    def perturb(self, step: Step) -> Perturbation | None:
        return None

    def penalty(self, step: Step) -> Tensor | None:
        """A 0-dim term of the weights, added to the loss of an active update; the same on every rank."""
        return None

    def loss(self, step: Step, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the cross entropy ``(B,)`` of each row of this rank (``step.share``), detached and unweighted.

        The first is ``train_objective`` in the metrics. The second are what ``train_loss``, the log of samples and
        everything that ranks by losses use. Both take ``step.run.label_smoothing``, or :meth:`setup` rejects any but 0.

        The average over ranks of the gradient of the loss must be the gradient of the whole batch, which ``group`` of
        the operations ensures. Targets are labels ``(B,)``, masks ``(B, *places)`` for logits ``(B, classes, *places)``
        or, if a strategy mixes images, probabilities ``(B, classes)``. Rows that only pad a share must not count:
        ``step.share.counts(target)`` marks the others.
        """
        if target.dim() > 1 and not (target.is_floating_point() and step.share.world == 1):
            return selected_mean(step, logits, target, 1.0)
        smoothing, group = step.run.label_smoothing, step.run.ranks.group
        return trimmed_cross_entropy(logits, target, 1.0, label_smoothing=smoothing, per_sample=True, group=group)

    def observe(self, step: Step, losses: Tensor) -> None:
        """Called with the detached losses ``(B,)`` of every row of an active batch, before the next batch is planned.

        They are the losses of the whole batch, in its order, and the same on every rank.
        """

    def infer(self, run: Run, images: Tensor) -> Tensor | None:
        """Class scores ``(B, C)`` for prediction, or ``None`` for the model's own logits."""
        return None

    def kept(self, step: Step, losses: Tensor) -> Tensor | None:
        """Positions in the batch of the rows that the loss counted, or ``None`` for all. ``losses`` ``(B,)`` are those
        of all rows."""
        return None

    def diagnostics(self, row: Mapping[str, Any]) -> dict[str, float]:
        """Figures of the epoch for the metrics; called once at its end. ``row`` holds the other metrics of the
        epoch."""
        return {}

    def finish(self, run: Run) -> None:
        """Called once, after the last update and evaluation: remove what was added."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"{self.name} keeps no state, got {sorted(state)}")

    def describe(self) -> dict[str, Any]:
        """Name and options, as written to the run's config.json."""
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.init}  # type: ignore[arg-type]
        return {"name": self.name, **{key: _plain(value) for key, value in options.items()}}


def _plain(value: Any) -> Any:
    """``value`` in a form that JSON can represent."""
    if isinstance(value, Labelled):
        return value.name
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if callable(value):
        return describe_choice(value)
    return list(value) if isinstance(value, tuple) else value
