"""The seams between the trainer and a training strategy. A strategy overrides only what it needs."""

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
    """What a strategy may know of the training it is part of."""

    model: nn.Module
    shape: tuple[int, ...] | None
    """Of one input, (C, H, W) of an image; ``None``: it is more than one tensor."""
    classes: int
    rows: int
    """Size of the training set."""
    epochs: int
    batch_size: int
    device: torch.device
    seed: int
    label_smoothing: float = 0.0
    classifier: str | None = None
    """Name of the model's last linear layer, where the user gave one."""
    extras: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    """Modules that train beside the model and are no part of it."""
    least_rows: int = 1
    """Fewest rows of a batch in training: batch norm may need two on each rank."""
    drop_last: bool = False
    """The last, smaller batch of an epoch is left out."""
    inputs: Any = None
    """Of two rows, for :meth:`example`."""
    masks: bool = False
    """Targets are masks, with a class at each place of an input."""
    accumulate: int = 1
    """So many batches make an update together."""
    ranks: Ranks = field(default_factory=Ranks)
    """The processes of the training; a loss takes ``group=run.ranks.group``."""
    fresh: Callable[[int], nn.Module] | None = None
    """The network with random weights from a seed (a module of the user's is copied as he gave it), whatever file the
    training's own weights are of."""
    images_vary: bool = True
    """A row that stands in a batch twice gives two images: by the trainer's augmentation or a strategy's transform."""

    def example(self, rows: int) -> Any:
        """What the model can be tried with: so many rows as a batch has them, images of zeros."""
        if self.inputs is None:
            assert self.shape is not None
            return torch.zeros(rows, *self.shape, device=self.device, dtype=torch.float32)
        return rows_of(self.inputs, torch.arange(rows) % 2)

    def require(self, who: str, *, images: bool = False, labels: bool = True) -> None:
        """
        Raises:
            UserError: inputs are no floating-point tensor, or with ``images`` none of images; or, with ``labels``,
                there is more than one label a row. The sentence says that ``who`` needs it.
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
    """One update, as the seams see it."""

    run: Run
    batch: Batch
    update: int
    """Active batches before this one, over the whole training: updates, where gradients are not accumulated."""
    narrowed: bool = False
    """The batch was already cut to the rows worth a full pass."""
    kept: int | None = None
    """Rows that the loss counts; ``None``: all."""
    scores: Tensor | None = None
    """``(B,)``: :meth:`Strategy.score` of the whole batch, for ``observe``."""
    share: Share = field(init=False)
    """Which rows of the batch, of the narrowed one after that, are this rank's: those of its images and logits."""

    def __post_init__(self) -> None:
        self.share = self.run.ranks.share(len(self.batch.indices))


@dataclass(frozen=True)
class Perturbation:
    """Virtual samples at the input of one module, and what their outputs cost."""

    layer: nn.Module
    virtual: Callable[[Tensor], Tensor]
    """Hidden ``(B, ...)`` -> ``((1 + M) * B, ...)``, the batch itself first."""
    penalty: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Raw logits ``(B, C)``, virtual logits ``(M * B, C)`` and the batch's targets -> 0-dim; averaged over ranks, the
    whole batch's."""
    own_update: bool = False
    """Apply the penalty in a second update of its own, after that of the loss."""


def run_with_virtual(
    model: nn.Module, layer: nn.Module, virtual: Callable[[Tensor], Tensor], images: Tensor
) -> tuple[Tensor, Tensor]:
    """Runs ``model`` with the input of ``layer`` replaced by ``virtual(input)``; raw and virtual logits."""
    with stacked(layer, model, virtual) as stack:
        model(images)
    assert stack.logits is not None
    return stack.logits


Beside = Callable[[nn.Module, Iterable[Batch], Tensor], Iterator[Tensor]]
"""Trains another model on the batches, plainly, with the data and the settings of this training; after each epoch gives
the losses ``(n,)`` float32 on the CPU of rows ``(n,)`` of the training set, of images that are not augmented."""


def row_losses(logits: Tensor, target: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor | None]:
    """The loss of each row ``(B,)``, and where targets are masks, how many places of each row count ``(B,)``: its loss
    is their mean, and these weigh it."""
    losses = cross_entropy(logits, target, label_smoothing=label_smoothing, reduction="none")
    if losses.dim() == 1:
        return losses, None
    places = (target != IGNORED).flatten(1).sum(1).float()
    # A row without a place that counts has no loss and no gradient; alone in a batch, it must not divide by 0.
    return losses.flatten(1).sum(1) / places.clamp(min=1), places.clamp(min=1e-12)


Fetch = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Positions ``(q,)`` in the whole batch -> the images and targets there."""


def as_probabilities(target: Tensor, classes: int) -> Tensor:
    """Targets as probabilities ``(B, classes)`` float32, whether they are labels ``(B,)`` or probabilities already."""
    return target if target.is_floating_point() else one_hot(target, classes).float()


def selected_mean(
    step: Step, logits: Tensor, target: Tensor, keep: float, *, among: Tensor | None = None, **band: Any
) -> tuple[Tensor, Tensor]:
    """The mean loss of the rows that ``trimmed_mean`` keeps, and the losses ``(B,)`` detached, as :meth:`Strategy.loss`
    returns them; ``among``: ``(B,)`` bool, the rows that may be kept."""
    losses, places = row_losses(logits, target, step.run.label_smoothing)
    mask = step.share.counts(target)
    mask = mask if among is None else mask & among.to(mask.device)
    return trimmed_mean(losses, keep, mask=mask, weight=places, group=step.run.ranks.group, **band), losses.detach()


def weighted_mean(step: Step, logits: Tensor, target: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over the rows of each loss times its weight, which is divided by their number and not by the sum of the
    weights ``(rows,)``, those of the batch of all ranks; and the losses, as :meth:`Strategy.loss` returns them. The
    weights are constants. Those that are to be differentiated multiply ``row_losses`` before ``trimmed_mean``."""
    losses, places = row_losses(logits, target, step.run.label_smoothing)
    weighted, mask = losses * step.share.take(weights).to(losses), step.share.counts(target)
    return trimmed_mean(weighted, 1.0, mask=mask, weight=places, group=step.run.ranks.group), losses.detach()


class Strategy:
    """A way of choosing samples, batches and what each counts. Subclasses are dataclasses: their fields are options.

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
    """What at most one strategy of a run may decide: ``"the batch plan"``, ``"the loss"``, ..."""
    divides_epochs: ClassVar[bool] = False
    """Its plan is laid out for the number of epochs, so that a run cannot get more of them later."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"{type(self).__name__} is no function: it is given to batchkern.trainer.Trainer as one of its strategies; "
            "what it is made of, for a loop of your own, is in batchkern.parts"
        )

    def __post_init__(self) -> None:
        """Numbers and flags are of the kind that their annotation says; those of NumPy become Python's."""
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
        """Called once, before the optimizer exists: check against the run, add heads to ``run.extras``."""

    def prepare(self, beside: Beside) -> None:
        """Called once before the first update, but not where a training goes on after it."""

    def preparation(self) -> tuple[int, int]:
        """Samples that :meth:`prepare` passes forward and backward."""
        return 0, 0

    def plan(self, batches: EpochBatches, upstream: Iterator[Batch]) -> Iterator[Batch]:
        """The stream of batches: ``upstream``, changed. Continues from loaded state."""
        return upstream

    def transform(
        self, step: Step, positions: Tensor, images: Tensor, target: Tensor, fetch: Fetch
    ) -> tuple[Tensor, Tensor]:
        """Images ``(p, C, H, W)`` and targets, changed: what the model is given of a batch of the training set.

        Strategies transform in the order in which the trainer was given them. Which rows are at hand differs: the whole
        batch, one rank's, or those worth a full pass. So this is a pure function of the seed, the update and the places
        of the rows in the whole batch.

        Args:
            positions: ``(p,)`` int64 on the CPU, the places of the rows at hand in ``step.batch.indices``.
            target: labels ``(p,)`` int64, or probabilities ``(p, classes)``; either may be returned.
            fetch: other rows of the batch, as this strategy would be given them.
        """
        return images, target

    def narrow(self, step: Step, score: Callable[[], Tensor]) -> Tensor | None:
        """Positions in the batch worth a full pass, or ``None`` for all; ``score()`` gives the scores ``(B,)`` of all:
        their losses, unless :meth:`score` says otherwise."""
        return None

    def score(self, step: Step, logits: Tensor, target: Tensor, losses: Tensor) -> Tensor:
        """What the one that decides the loss chooses rows by, ``(B,)`` of this rank's rows, ``losses`` detached."""
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

        Averaged over ranks, the gradient of the loss is to be that of the whole batch, as ``group`` makes it. Targets
        are labels ``(B,)``, masks of them ``(B, *places)`` for logits ``(B, classes, *places)`` or, where a strategy
        mixes images, probabilities ``(B, classes)``. Rows that fill up a share count nowhere:
        ``step.share.counts(target)`` has the others.
        """
        if target.dim() > 1 and not (target.is_floating_point() and step.share.world == 1):
            return selected_mean(step, logits, target, 1.0)
        smoothing, group = step.run.label_smoothing, step.run.ranks.group
        return trimmed_cross_entropy(logits, target, 1.0, label_smoothing=smoothing, per_sample=True, group=group)

    def observe(self, step: Step, losses: Tensor) -> None:
        """Sees the detached losses ``(B,)`` of every row of an active batch, before the next batch is planned.

        They are those of the whole batch, in its order, and the same on every rank.
        """

    def infer(self, run: Run, images: Tensor) -> Tensor | None:
        """Class scores ``(B, C)`` for prediction, or ``None`` for the model's own logits."""
        return None

    def kept(self, step: Step, losses: Tensor) -> Tensor | None:
        """Positions in the batch of the rows that the loss counted, or ``None`` for all; ``losses (B,)`` of all."""
        return None

    def diagnostics(self, row: Mapping[str, Any]) -> dict[str, float]:
        """Figures of the epoch, for the metrics; called once at its end. ``row``: what the metrics say already."""
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
    """``value`` as JSON can hold it."""
    if isinstance(value, Labelled):
        return value.name
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if callable(value):
        return describe_choice(value)
    return list(value) if isinstance(value, tuple) else value
