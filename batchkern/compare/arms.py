"""The arms of a comparison, the random controls that match them, and the number of epochs of each for a budget."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from batchkern.errors import UserError
from batchkern.plan import Window
from batchkern.seeding import generator
from batchkern.strategies import (
    HardBatches,
    RandomSelection,
    Step,
    Strategy,
    Trimming,
    parse,
    split_terms,
)
from batchkern.trainer import Counts, Trainer

BASELINE = "baseline"
ARMS = (
    BASELINE,
    "trimming",
    "hard-batches",
    "stepwise",
    "augmentation",
    # The paper's 100 is for sets of 50,000 images: on digits it would give 9 passive batches in the whole training.
    "passive(every=10)",
)
"""The plain baseline and the five strategies."""
BUDGETS = {
    "epochs": "equal epochs, even if a strategy visits only a part of the data in an epoch",
    "updates": "equal updates of the model, to the nearest epoch",
    "cost": "equal cost to the nearest epoch: samples forward and backward, a backward pass counted twice",
}


def split_arms(text: str) -> list[str]:
    """The arms in a text, separated by commas; the word ``all`` stands for :data:`ARMS`.

    Args:
        text: arms in the notation of :func:`batchkern.strategies.parse`.

    Raises:
        UserError: the text has commas but no arm.

    Examples:
        >>> from batchkern.compare import split_arms
        >>> split_arms("baseline, trimming(end=0.3, skip=0.1)")
        ['baseline', 'trimming(end=0.3, skip=0.1)']
    """
    named = [arm for arm in split_terms(text, ",") if arm]
    if text and not named:
        raise UserError(f"arms must be strategies joined by commas, such as all, or baseline, got {text!r}")
    return [arm for name in named for arm in (ARMS if name == "all" else (name,))]


def control_of(arm: str) -> str | None:
    """The arm that selects the same amount as ``arm``, but at random; ``None`` if ``arm`` does not select by loss.

    Args:
        arm: in the notation of :func:`batchkern.strategies.parse`.

    Examples:
        >>> from batchkern.compare import control_of
        >>> control_of("trimming(end=0.5)")
        'random(select=rows,end=0.5)'
        >>> control_of("cutout") is None
        True
    """
    if not parse(arm, passive=""):
        return None
    terms = split_terms(arm, "+")
    controls = [_control_of_term(term) for term in terms]
    return "+".join(control or term for control, term in zip(controls, terms, strict=True)) if any(controls) else None


def _control_of_term(term: str) -> str | None:
    (strategy,) = parse(term, passive="")
    if isinstance(strategy, Trimming):
        backward = "compact" if strategy.backward == "compact" else "masked"
        default, options = RandomSelection("rows"), {"start": strategy.start, "end": strategy.end, "backward": backward}
    elif isinstance(strategy, HardBatches):
        default, options = RandomSelection("batches"), {"delta": strategy.delta}
    elif getattr(strategy, "at_random", True):
        return None
    else:
        return _written(type(strategy)(), strategy.describe() | {"at_random": True})
    return _written(default, options, f"select={default.select}")


def _written(default: Strategy, options: Mapping[str, Any], *first: str) -> str:
    """A strategy as on the command line: its name, and the options that differ from the default."""
    own = default.describe()
    changed = [f"{name}={value}" for name, value in options.items() if value != own[name]]
    return f"{default.name}({','.join([*first, *changed])})"


def described(arm: str) -> str:
    """A description of an arm that is the same for all ways to write it."""
    return json.dumps([strategy.describe() for strategy in parse(arm, passive="")])


def with_controls(arms: Sequence[str]) -> tuple[str, ...]:
    """The baseline, the arms, and then their controls, each training once.

    Args:
        arms: in the notation of :func:`batchkern.strategies.parse`.

    Examples:
        >>> from batchkern.compare import with_controls
        >>> with_controls(["hard-batches(delta=0.5)"])
        ('baseline', 'hard-batches(delta=0.5)', 'random(select=batches,delta=0.5)')
    """
    by_training: dict[str, str] = {}
    for arm in (BASELINE, *arms, *filter(None, map(control_of, arms))):
        by_training.setdefault(described(arm), arm)
    return tuple(by_training.values())


# --- budgets ---------------------------------------------------------------------------------------------------------


def cost(samples_forward: float, samples_backward: float) -> float:
    """The cost in forward passes of one sample; a backward pass has twice the flops of a forward pass."""
    return samples_forward + 2 * samples_backward


def spent(budget: str, row: Mapping[str, float]) -> float:
    """The updates or the cost that were used until a row of the metrics."""
    return row["updates"] if budget == "updates" else cost(row["samples_forward"], row["samples_backward"])


def forecast(trainer: Trainer) -> Counts:
    """The future cost of a training, from its plan without running the model. The trainer cannot be used afterwards.

    Samples that are augmented at a layer are counted once, since their virtual copies pass only through the layers
    after it. If the cost depends on losses (for example on which samples are below the mean), simulated losses are
    used, so the cost is an estimate.
    """
    counts = Counts()
    for strategy in trainer.strategies:
        forward, backward = strategy.preparation()
        counts.samples_forward += forward
        counts.samples_backward += backward
    window = Window(trainer.updater.window.size)
    active = 0
    for batch in trainer.plan():
        rows = len(batch.indices)
        full = rows
        if window.cut_by(batch):
            counts.updates += 1
            window.clear()
        if batch.inject is None:
            step = Step(trainer.run, batch, active)
            logits = _made_up_logits(step, trainer.samples.mislabelled)
            losses = F.softplus(-logits[:, 0])
            scores = trainer.updater.owner("the loss").score(step, logits, torch.zeros_like(losses).long(), losses)
            step.scores, scored = scores, list[int]()

            def score(scores: Tensor = scores, scored: list[int] = scored) -> Tensor:
                scored.append(len(scores))
                return scores

            if batch.only == "score":
                score()
                full = 0
            else:
                kept = trainer.updater.narrow(step, score)
                full = rows if kept is None else len(kept)
                perturbation = trainer.updater.owner("the virtual samples").perturb(step)
                full *= 2 if perturbation is not None and perturbation.own_update else 1
                full += 0 if batch.beside is None else len(batch.beside.indices)
            counts.samples_forward += sum(scored)
            for strategy in trainer.strategies:
                strategy.observe(step, losses)
            if batch.only != "score":
                active += 1
                due = window.add(batch)
            else:
                due = batch.ends_epoch and window.batches > 0
            if due:
                counts.updates += 1
                window.clear()
        counts.samples_forward += full
        counts.samples_backward += full
    return counts


def _made_up_logits(step: Step, mislabelled: Tensor | None) -> Tensor:
    """Simulated logits of two classes, ``(B, 2)``. The first class is the label; its logit is higher by a random normal
    number whose mean grows during the training. For labels known to be wrong, it is lower by the same amount."""
    numbers = generator(step.run.seed, "forecast", step.update)
    noise = torch.randn(len(step.batch.indices), generator=numbers, dtype=torch.float32)
    ahead = 6 * math.sqrt(step.batch.progress) + 3 * noise
    if mislabelled is not None:
        ahead = ahead.where(~mislabelled[step.batch.indices.to(mislabelled.device)].cpu(), -ahead)
    return torch.stack([ahead, torch.zeros_like(ahead)], dim=1).to(step.run.device)


def matched_epochs(build: Callable[[int], Trainer], epochs: int, budget: str, target: float) -> int:
    """The number of epochs, to the nearest one, in which an arm uses the same updates or cost as the baseline.

    Args:
        build: returns a trainer of the arm for a number of epochs.
        epochs: the epochs of the baseline, from which the search starts.
        target: the updates or cost that the baseline uses.
    """
    known: dict[int, float] = {}

    def uses(count: int) -> float:
        if count not in known:
            try:
                trainer = build(count)
                known[count] = spent(budget, vars(forecast(trainer)))
            except UserError:
                if count == epochs:
                    raise
                known[count] = math.inf  # too few epochs for the steps of Stepwise
            if known[count] == 0:
                names = "+".join(strategy.name for strategy in trainer.strategies)
                raise UserError(f"{names} selects too few samples for an update in {count} epochs of this training set")
        return known[count]

    guess = epochs
    for _ in range(4):  # the usage is nearly proportional to the epochs
        guess = max(1, round(guess * target / uses(guess)))
        if guess in known:
            break
    for count in (guess - 1, guess, guess + 1):
        if count > 0:
            uses(count)
    return min(known, key=lambda count: (abs(known[count] - target), count))
