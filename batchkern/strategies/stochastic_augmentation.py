"""Stochastic batch augmentation: Q. Li, Q. Hu, Y. Qi, S. Qi, J. Ma, J. Zhang, "Stochastic Batch Augmentation with An
Effective Distilled Dynamic Soft Label Regularizer", IJCAI 2020, section 3."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from batchkern.basis import BasisKind
from batchkern.errors import UserError
from batchkern.models import find_classifier
from batchkern.ops import cross_entropy, soft_label_kl
from batchkern.parts.virtual_samples import LatentNoise, check_eta, check_omega, coin, majority
from batchkern.saved_state import saved_number
from batchkern.schedules import linear
from batchkern.seeding import derived_seed, generator
from batchkern.strategies.base import Perturbation, Run, Step, Strategy, run_with_virtual


@dataclass
class StochasticAugmentation(Strategy):
    """At random iterations, virtual samples are made around the batch in latent space, with a penalty if their
    predictions differ from those of the batch.

    With probability cos(omega) per iteration, the input of a random eligible layer is stacked with Gaussian and dropout
    copies (eqs. 5-8); the rest of the network runs on the stack, and eta * soft_label_kl (eqs. 10-11) is added to the
    loss. The raw rows' outputs are the soft labels and are constants of the penalty. Logarithms are natural; in bits,
    as in eq. 13, the penalty would be 1 / ln 2 = 1.44 times as large. The basis is drawn anew each time the random
    decision is to augment. At inference, the prediction is the majority vote over a sample and its virtual samples
    (section 3.4).

    Args:
        omega: in [0, pi / 2]; pi / 3 augments every second iteration on average.
        omega_end: omega of the last epoch, linear in between; by default omega is constant (section 3.2 calls a
            changing probability the more delicate case).
        eta: weight of the penalty, at least 0; the paper's search found 0.01 and 0.1.
        gaussian, dropout, sigma, tau, drop_prob, basis: settings of the virtual samples; see
            :class:`batchkern.parts.virtual_samples.LatentNoise`.
        layers: names of eligible modules; default: the model's classifier, its last linear layer.
        two_step: as in Algorithm 1, one update for the loss, then one for the penalty, instead of the one update of eq.
            11.
        per: decide, and draw the basis, once per ``"iteration"`` (eq. 4 and Algorithm 1) or once per ``"epoch"``
            (section 3's opening).
        labels: the labels of virtual samples. ``"soft"``: the raw rows' outputs, as constants (eq. 10); ``"trained"``:
            the same, with a gradient into them (eq. 11 as it is written); ``"hard"``: the rows' own labels, with the
            cross entropy of the loss (eq. 9, with which the paper compares its method).
        vote: decide by majority at inference; ties go to the raw prediction, then to the lower class.
        vote_layer: the module at whose input the virtual samples of the vote are made; default: the first of
            ``layers``.

    Examples:
        >>> import torch
        >>> from batchkern.strategies import StochasticAugmentation
        >>> from batchkern.trainer import Trainer
        >>> data = torch.arange(64.0).view(64, 1), torch.arange(64) // 32
        >>> strategy = StochasticAugmentation(omega=0, gaussian=2, dropout=2)
        >>> trainer = Trainer("mlp", data, data, strategies=[strategy], epochs=2, batch_size=16)
        >>> trainer.fit()["augmented_updates"]  # with omega = 0 each of the eight
        8
    """

    name: ClassVar[str] = "augmentation"
    owns = frozenset({"the virtual samples"})

    omega: float = math.pi / 3
    gaussian: int = 2
    dropout: int = 2
    eta: float = 0.1
    sigma: float = 0.1
    tau: float = 0.2
    drop_prob: float = 0.1
    basis: BasisKind | Literal["none"] = "normalized"
    layers: tuple[str, ...] = ()
    two_step: bool = False
    per: Literal["iteration", "epoch"] = "iteration"
    vote: bool = True
    labels: Literal["soft", "trained", "hard"] = "soft"
    vote_layer: str | None = None
    omega_end: float | None = None
    fired: int = field(default=0, init=False, repr=False)
    kl_sum: float | Tensor = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.layers = (self.layers,) if isinstance(self.layers, str) else tuple(self.layers)
        if not all(isinstance(name, str) for name in self.layers):
            raise UserError(f"layers must be names of modules, got {self.layers}")
        for name, value in (("omega", self.omega), ("omega_end", self.omega_end)):
            if value is not None:
                check_omega(name, value)
        check_eta(self.eta)
        self.noise = LatentNoise(**{option.name: getattr(self, option.name) for option in fields(LatentNoise)})
        if self.per not in ("iteration", "epoch"):
            raise UserError(f"per must be iteration or epoch, got {self.per!r}")
        if self.labels not in ("soft", "trained", "hard"):
            raise UserError(f"labels must be soft, trained or hard, got {self.labels!r}")
        if not isinstance(self.vote_layer, str | None):
            raise UserError(f"vote_layer must be the name of a module, got {self.vote_layer!r}")
        if self.vote_layer is not None and not self.vote:
            raise UserError(f"vote_layer is {self.vote_layer!r}, but vote is False: leave it out")

    def setup(self, run: Run) -> None:
        if self.two_step and run.accumulate > 1:
            raise UserError(
                f"two_step makes two updates of a batch, but gradient_accumulation_steps is {run.accumulate}: "
                "use one of them"
            )
        run.require_labels(self.name)
        self.fired = self.fired_in_epoch = 0
        self.kl_sum = 0.0
        modules = dict(run.model.named_modules())
        chosen = [("layers", name) for name in self.layers or (find_classifier(run.model, run.classifier)[0],)]
        if self.vote_layer is not None:
            chosen.append(("vote_layer", self.vote_layer))
        for option, name in chosen:
            if not name or name not in modules:
                found = ", ".join(filter(None, modules))
                raise UserError(f"{option}: the model has no module {name!r}; it has {found}")
            self._try(run, option, name, modules[name])
        self.modules = [modules[name] for option, name in chosen if option == "layers"]
        self.voting = modules[chosen[-1][1]] if self.vote_layer is not None else self.modules[0]

    def _try(self, run: Run, option: str, name: str, module: nn.Module) -> None:
        """Rejects layers that cannot hold virtual samples before the training, not at the first augmented iteration."""
        training = run.model.training
        run.model.eval()
        try:
            with torch.no_grad():
                run_with_virtual(run.model, module, lambda hidden: self.noise(hidden, 0, 0), run.example(2))
        except UserError as error:
            raise UserError(f"{option}: {name!r} cannot hold virtual samples: {error}") from error
        except (RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"{option}: virtual samples at the input of {name!r} do not fit the rest of the model, "
                f"such as a skip connection around it ({str(error).splitlines()[0]})"
            ) from error
        finally:
            run.model.train(training)

    def perturb(self, step: Step) -> Perturbation | None:
        seed, moment = step.run.seed, step.update
        decision = ("epoch", step.batch.epoch) if self.per == "epoch" else ("iteration", moment)
        omega = linear(self.omega, self.omega if self.omega_end is None else self.omega_end)
        if not coin(omega(step.batch.epoch, step.run.epochs), seed, *decision):
            return None
        self.fired += 1
        self.fired_in_epoch += 1
        numbers = generator(seed, "augment layer", moment)
        layer = self.modules[int(torch.randint(len(self.modules), (), generator=numbers))]
        place = derived_seed(seed, "augment numbers", moment)
        of_basis = derived_seed(seed, "augment basis", *decision) if self.per == "epoch" else place
        share = step.share
        return Perturbation(
            layer,
            lambda hidden: self.noise(hidden, place, of_basis, share),
            lambda raw, virtual, target: self._penalty(step, raw, virtual, target),
            own_update=self.two_step,
        )

    def _penalty(self, step: Step, raw: Tensor, virtual: Tensor, target: Tensor) -> Tensor:
        share = step.share
        if share.real < share.each:  # padding rows are not samples
            virtual = virtual.view(-1, *raw.shape)[:, : share.real].flatten(0, 1)
            raw, target = raw[: share.real], target[: share.real]
        weight = share.real * share.world / share.rows  # the average over ranks is the batch mean
        if share.real and self.labels != "hard":
            result = soft_label_kl(
                raw, virtual, scale=self.eta * weight, reference_grad=self.labels == "trained", per_sample=True
            )
            assert isinstance(result, tuple)
            penalty, mean = result[0], result[1].mean()
        else:
            mean = virtual.sum()  # the mean over no samples would be NaN
            if share.real:
                copies = torch.cat([target] * self.noise.copies)
                mean = cross_entropy(virtual, copies, label_smoothing=step.run.label_smoothing)
            penalty = self.eta * weight * mean
        self.kl_sum = self.kl_sum + step.run.ranks.mean(weight * mean.detach())
        return penalty

    def infer(self, run: Run, images: Tensor) -> Tensor | None:
        if not self.vote:
            return None
        seed = derived_seed(run.seed, "vote")
        raw, virtual = run_with_virtual(run.model, self.voting, lambda hidden: self.noise(hidden, seed, seed), images)
        return majority(raw, virtual)

    def diagnostics(self, row: Mapping[str, Any]) -> dict[str, float]:
        """The mean divergence (with hard labels the mean loss) of the virtual samples of the epoch, not multiplied by
        eta."""
        kl, self.kl_sum = float(self.kl_sum) / max(self.fired_in_epoch, 1), 0.0
        self.fired_in_epoch = 0
        return {"augmented_updates": self.fired, "virtual_loss" if self.labels == "hard" else "virtual_kl": kl}

    def state_dict(self) -> dict[str, Any]:
        return {"fired": self.fired, "fired_in_epoch": self.fired_in_epoch, "kl_sum": float(self.kl_sum)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.fired = saved_number(state, "fired")
        self.fired_in_epoch = saved_number(state, "fired_in_epoch", self.fired)
        self.kl_sum = float(state["kl_sum"])
