"""A trained model with its preprocessing and the classes of its logits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchkern import models
from batchkern.data import Labelled, as_labelled
from batchkern.data.datasets import Data
from batchkern.data.labelled import IGNORED, check_labels
from batchkern.errors import UserError
from batchkern.initial_weights import load_all_weights
from batchkern.model_checks import check_logits, check_model_kind
from batchkern.preprocessing import ImagePreprocessing, Preprocessing, read
from batchkern.rundir import BEST, CONFIG, PREPROCESSING, WEIGHTS
from batchkern.validation import AMP_TYPES, check_kind, pick_device


@dataclass(frozen=True)
class TrainedModel:
    """The result of :func:`load_model`.

    Attributes:
        model: the model, in eval mode, on the CPU.
        preprocessing: converts images, or other inputs, to the model's input when it is called.
        data: the name of the training set.
        amp: the mixed precision of the training and its evaluations: ``"none"``, ``"bf16"`` or ``"fp16"``.

    Examples:
        >>> import batchkern, torch
        >>> from batchkern.trainer import Trainer
        >>> data = torch.linspace(-1, 1, 64).view(64, 1), torch.arange(64) // 32
        >>> _ = Trainer("mlp", data, data, epochs=2, out="run").fit()
        >>> trained = batchkern.load_model("run")
        >>> logits = trained.model(trained.preprocessing(torch.zeros(1, 1)))
        >>> logits.shape, trained.classes, trained.amp
        (torch.Size([1, 2]), ('0', '1'), 'none')
    """

    model: nn.Module
    preprocessing: Preprocessing
    data: str
    amp: str

    @property
    def classes(self) -> tuple[str, ...]:
        """The name of the class of each logit."""
        return self.preprocessing.classes

    @torch.no_grad()
    def batches(
        self, data: Labelled | Data, device: torch.device | str | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Labels ``(b,)`` and logits ``(b, classes)`` of each batch of ``data``, in the order of its rows. They are
        computed as in the trainer's evaluations, but without the vote of a strategy.

        Args:
            data: labelled data in any form that the trainer takes, or unlabelled data from ``preprocessing.data``.
            device: the device to which the model is moved, where it stays; default: CUDA if available, else the CPU.

        Raises:
            UserError: the inputs do not have the shape that the model takes.
        """
        from batchkern.updater import EVALUATION_BATCH

        data = as_labelled("data", data, self.classes)
        if data.shape != self.preprocessing.shape:
            raise UserError(f"data has inputs of shape {data.shape}; the model takes {self.preprocessing.shape}")
        place, amp = pick_device(device), AMP_TYPES[self.amp]
        feed, model = self.preprocessing.feed(data, place), self.model.to(place).eval()
        batches = torch.arange(len(data)).split(EVALUATION_BATCH)
        try:
            for number, rows in enumerate(batches):
                for due in batches[number : number + 1 + feed.depth]:
                    feed.prepare(due, None)
                images, labels = feed.batch(rows, None)
                with torch.autocast(place.type, dtype=amp, enabled=amp is not None):
                    logits = model(images)
                yield labels, logits.float()
        finally:
            feed.forget()

    def evaluate(self, data: Labelled | Data, device: torch.device | str | None = None) -> dict[str, Any]:
        """Evaluates the model on labelled data, in any form that the trainer takes.

        Returns:
            ``rows`` (for masks, the number of places that are not ignored); ``accuracy`` and ``loss`` (mean cross
            entropy), which on the run's own test data are ``test_accuracy_plain`` and ``test_loss`` of its last epoch;
            with more than five classes ``top5_accuracy``; and ``per_class``: for each class its name, its rows, and its
            accuracy, or ``None`` if it has no rows.

        Raises:
            UserError: as for :meth:`batches`; or the data have other classes than the model.
        """
        data = as_labelled("data", data, self.classes)
        if data.classes not in (None, self.classes):
            raise UserError(f"{data.name} has other classes than the model, or in another order")
        counts, right = torch.zeros(2, len(self.classes), dtype=torch.int64)
        top = loss = 0.0
        several = len(self.classes) > 5
        for labels, logits in self.batches(data, device):
            if logits.argmax(1).shape != labels.shape:
                shapes = tuple(labels.shape), tuple(logits.shape)
                raise UserError(f"{data.name} has labels of shape {shapes[0]}, for logits of shape {shapes[1]}")
            check_labels(data.name, labels, len(self.classes), masks=labels.dim() > 1)
            correct = logits.argmax(1) == labels
            counts += labels[labels != IGNORED].cpu().bincount(minlength=len(counts))
            right += labels[correct].cpu().bincount(minlength=len(counts))
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            top += float((logits.topk(5, 1).indices == labels[:, None]).sum()) if several else 0.0
        rows = int(counts.sum())
        if not rows:
            raise UserError(f"{data.name} has no place that counts: all labels are {IGNORED}")
        return {
            "rows": rows,
            "accuracy": int(right.sum()) / rows,
            "loss": loss / rows,
            **({"top5_accuracy": top / rows} if several else {}),
            "per_class": [
                {"class": name, "rows": count, "accuracy": hits / count if count else None}
                for name, count, hits in zip(self.classes, counts.tolist(), right.tolist(), strict=True)
            ],
        }


def load_model(run: str | os.PathLike[str], *, model: nn.Module | None = None, best: bool = False) -> TrainedModel:
    """The model of a finished run, as it was after the last epoch.

    Args:
        run: the run's directory.
        best: load the weights of the epoch with the highest test accuracy; only for a run with ``keep_best``.
        model: a module into which the weights are loaded, instead of a new one. It is needed if the model of the run
            was a module, and must have the same layers.

    Raises:
        UserError: there is no run, it is not finished, it was written by a version of batchkern without
            preprocessing.json, one of its files is damaged, it needs a module, or the weights belong to another module.

    Examples:
        >>> import batchkern, torch
        >>> from batchkern.trainer import Trainer
        >>> data = torch.linspace(-1, 1, 64).view(64, 1), torch.arange(64) // 32
        >>> result = Trainer("mlp", data, data, epochs=2, out="run").fit()
        >>> trained = batchkern.load_model("run")
        >>> trained.evaluate(data)["accuracy"] == result["test_accuracy"]
        True
    """
    from batchkern import records

    check_kind("run", run, str | os.PathLike, "the directory of a run")
    path = Path(os.path.expanduser(os.fspath(run)))
    try:
        settings = records.read_json(path / CONFIG, records.ModelConfig)["settings"]
    except (OSError, ValueError):
        raise UserError(f"{path} is no directory of a run: {CONFIG} is missing or unreadable") from None
    if not (path / WEIGHTS).exists():
        raise UserError(f"the run in {path} has not ended, since it has no {WEIGHTS}; resume it (--resume) to its end")
    if best and not (path / BEST).exists():
        raise UserError(f"{path} has no {BEST}, as runs have that keep the best epoch (--keep-best)")
    if not (path / PREPROCESSING).exists():
        raise UserError(
            f"{path} has no {PREPROCESSING}, as runs have not that older versions of batchkern wrote: the same "
            "training with resume (--resume) writes it, and trains no further"
        )
    preprocessing, trained = read(path / PREPROCESSING), settings["train"]
    classes = len(preprocessing.classes)
    shape = None if preprocessing.shape is None else [*preprocessing.shape]
    if (shape, classes) != (trained["shape"], trained["classes"] or classes):
        raise UserError(
            f"{path / PREPROCESSING} is of inputs {shape} in {classes} classes, and the run, by its {CONFIG}, of "
            f"{trained['shape']} in {trained['classes']}: one of the two files was changed"
        )
    if model is not None:
        check_kind("model", model, nn.Module, "a module")
        check_model_kind(model)
    elif preprocessing.model is None:
        raise UserError(
            f"the model of {path} was a module, {settings['model']}: give one of the same layers, "
            "batchkern.load_model(run, model=...)"
        )
    else:
        with torch.random.fork_rng(devices=[]):
            model = models.build(preprocessing.model, shape=preprocessing.shape or (), classes=classes)
    load_all_weights(model, path / (BEST if best else WEIGHTS))
    model = model.cpu().eval()
    if settings.get("channels_last"):  # as in training, so that the figures are bitwise equal
        models.in_channels_last(model)
    if isinstance(preprocessing, ImagePreprocessing):
        check_logits(model, torch.zeros(2, *preprocessing.shape), classes, ())
    if preprocessing.classifier is not None:
        models.find_classifier(model, preprocessing.classifier)
    return TrainedModel(model, preprocessing, trained["name"], settings["amp"])
