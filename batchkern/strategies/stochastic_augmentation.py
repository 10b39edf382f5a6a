"""Stochastic batch augmentation: Q. Li, Q. Hu, Y. Qi, S. Qi, J. Ma, J. Zhang, "Stochastic Batch Augmentation with An
Effective Distilled Dynamic Soft Label Regularizer", IJCAI 2020, section 3."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from batchkern.basis import KINDS, Basis, BasisKind, random_basis
from batchkern.distributed import Share
from batchkern.errors import UserError
from batchkern.models import find_classifier
from batchkern.ops import augment_latent, soft_label_kl
from batchkern.plan import saved_number
from batchkern.schedules import bernoulli
from batchkern.seeding import derived_seed, generator
from batchkern.strategies.base import Perturbation, Run, Step, Strategy, run_with_virtual

DENSE_LIMIT = 8192
"""Widest latent space for which a dense Q x Q basis is formed (256 MiB)."""


@dataclass
class StochasticAugmentation(Strategy):
    """At random iterations, virtual samples around the batch in latent space, and a penalty for predicting them
    differently from it.

    With probability cos(omega) per iteration, the input of a random eligible layer is stacked with Gaussian and dropout
    copies (eqs. 5-8); the rest of the network runs on the stack, and eta * soft_label_kl (eqs. 10-11) is added to the
    loss. The raw rows' outputs are the soft labels and are constants of the penalty. The basis is drawn anew each time.
    At inference, the majority vote over a sample and its virtual samples decides (section 3.4).

    Args:
        omega: in [0, pi / 2]; pi / 3 augments every second iteration on average.
        gaussian, dropout: copies of each kind; together M, at least 1.
        eta: weight of the penalty, at least 0; the paper's search found 0.01 and 0.1.
        sigma, tau: standard deviation and clip of the noise, in the units of the layer's input; not in the paper.
        drop_prob: of the dropout copies, in [0, 1).
        basis: ``"normalized"`` (the paper's), ``"orthogonal"``, ``"hadamard"`` (no Q x Q matrix) or ``"none"``.
        layers: names of eligible modules; default: the model's classifier, its last linear layer.
        two_step: Algorithm 1: one update for the loss, then one for the penalty, in place of the one update of eq. 11.
        per: decide once per ``"iteration"`` (eq. 4 and Algorithm 1) or once per ``"epoch"`` (section 3's opening).
        vote: decide by majority at inference; ties go to the raw prediction, then to the lower class.
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
    fired: int = field(default=0, init=False, repr=False)
    kl_sum: float | Tensor = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.layers = (self.layers,) if isinstance(self.layers, str) else tuple(self.layers)
        if not all(isinstance(name, str) for name in self.layers):
            raise UserError(f"layers must be names of modules, got {self.layers}")
        if not 0 <= self.omega <= math.pi / 2:
            raise UserError(f"omega must be in [0, pi/2], got {self.omega}")
        copies = (self.gaussian, self.dropout)
        if any(type(n) is not int or n < 0 for n in copies) or sum(copies) < 1:
            raise UserError(f"gaussian and dropout must be whole numbers that add up to at least 1, got {copies}")
        if not 0 <= self.drop_prob < 1:
            raise UserError(f"drop_prob must be in [0, 1), got {self.drop_prob}")
        for name, value in (("eta", self.eta), ("sigma", self.sigma)):
            if not 0 <= value < math.inf:
                raise UserError(f"{name} must be at least 0, got {value}")
        if not self.tau > 0:
            raise UserError(f"tau must be above 0, got {self.tau}")
        if self.basis not in (*KINDS, "none"):
            raise UserError(f"basis must be one of {', '.join(KINDS)}, none, got {self.basis!r}")
        if self.per not in ("iteration", "epoch"):
            raise UserError(f"per must be iteration or epoch, got {self.per!r}")
        self._fires = bernoulli(min(1.0, max(0.0, math.cos(self.omega))))

    def setup(self, run: Run) -> None:
        self.fired = self.fired_in_epoch = 0
        self.kl_sum = 0.0
        modules = dict(run.model.named_modules())
        for name in self.layers:
            if not name or name not in modules:
                raise UserError(f"layers: the model has no module {name!r}; it has {', '.join(filter(None, modules))}")
        names = self.layers or (find_classifier(run.model, run.classifier)[0],)
        self.modules = [modules[name] for name in names]
        for name, module in zip(names, self.modules, strict=True):
            self._try(run, name, module)

    def _try(self, run: Run, name: str, module: nn.Module) -> None:
        """Layers that cannot hold virtual samples should say so now, not at the first augmented iteration."""
        training = run.model.training
        run.model.eval()
        try:
            with torch.no_grad():
                images = torch.zeros(2, *run.shape, device=run.device, dtype=torch.float32)
                run_with_virtual(run.model, module, lambda hidden: self.virtual(hidden, 0), images)
        except UserError as error:
            raise UserError(f"layers: {name!r} cannot hold virtual samples: {error}") from error
        except (RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"layers: virtual samples at the input of {name!r} do not fit the rest of the model, "
                f"such as a skip connection around it ({str(error).splitlines()[0]})"
            ) from error
        finally:
            run.model.train(training)

    def perturb(self, step: Step) -> Perturbation | None:
        seed, moment = step.run.seed, step.update
        decision = ("epoch", step.batch.epoch) if self.per == "epoch" else ("iteration", moment)
        if not self._fires(generator(seed, "augment", *decision)):
            return None
        self.fired += 1
        self.fired_in_epoch += 1
        numbers = generator(seed, "augment layer", moment)
        layer = self.modules[int(torch.randint(len(self.modules), (), generator=numbers))]
        place = derived_seed(seed, "augment numbers", moment)
        share = step.share
        return Perturbation(
            layer,
            lambda hidden: self.virtual(hidden, place, share),
            lambda raw, virtual: self._penalty(step, raw, virtual),
            own_update=self.two_step,
        )

    def virtual(self, hidden: Tensor, seed: int, share: Share | None = None) -> Tensor:
        """``hidden (B, ...)`` and its virtual samples, ``((1 + M) * B, ...)``.

        Numbers are drawn by the row of the batch, so a rank makes the virtual samples of the whole batch, around zeros
        where the rows are others', and keeps its own: on W ranks W times the work of this layer's noise, and the memory
        of ``(1 + M)`` whole batches at this layer, for the numbers of one process.
        """
        flat = hidden.flatten(1)
        share = share or Share(len(flat))
        whole = share.spread(flat)
        stacked = augment_latent(
            whole,
            gaussian=self.gaussian,
            dropout=self.dropout,
            sigma=self.sigma,
            tau=self.tau,
            drop_prob=self.drop_prob,
            basis=self._basis(flat, seed),
            seed=derived_seed(seed, "noise"),
        )
        return share.take(stacked.view(-1, *whole.shape), dim=1).reshape(-1, *hidden.shape[1:])

    def _basis(self, flat: Tensor, seed: int) -> Basis | None:
        width = flat.shape[1]
        if self.basis == "none":
            return None
        if self.basis != "hadamard" and width > DENSE_LIMIT:
            raise UserError(
                f"basis={self.basis!r} needs a {width} x {width} matrix at this layer; "
                f"use basis='hadamard' above {DENSE_LIMIT} features"
            )
        numbers = generator(seed, "basis", device=flat.device)
        return random_basis(width, self.basis, device=flat.device, generator=numbers)

    def _penalty(self, step: Step, raw: Tensor, virtual: Tensor) -> Tensor:
        share = step.share
        if share.real < share.each:  # the filling of a share is no sample
            virtual = virtual.view(-1, *raw.shape)[:, : share.real].flatten(0, 1)
            raw = raw[: share.real]
        # The mean over no samples would be NaN.
        kl = soft_label_kl(raw, virtual) if share.real else virtual.sum()
        assert isinstance(kl, Tensor)
        kl = kl * (share.real * share.world / share.rows)  # averaged over ranks, the mean over the whole batch
        self.kl_sum = self.kl_sum + step.run.ranks.mean(kl.detach())
        return self.eta * kl

    def infer(self, run: Run, images: Tensor) -> Tensor | None:
        if not self.vote:
            return None
        layer, seed = self.modules[0], derived_seed(run.seed, "vote")
        raw, virtual = run_with_virtual(run.model, layer, lambda hidden: self.virtual(hidden, seed), images)
        votes = torch.stack([raw, *virtual.chunk(self.gaussian + self.dropout)]).argmax(dim=2)
        counts = nn.functional.one_hot(votes, run.classes).sum(dim=0).float()
        return counts + 0.5 * nn.functional.one_hot(votes[0], run.classes)

    def diagnostics(self, row: Mapping[str, Any]) -> dict[str, float]:
        """The mean divergence of virtual samples in the epoch, before eta."""
        kl, self.kl_sum = float(self.kl_sum) / max(self.fired_in_epoch, 1), 0.0
        self.fired_in_epoch = 0
        return {"augmented_updates": self.fired, "virtual_kl": kl}

    def state_dict(self) -> dict[str, Any]:
        return {"fired": self.fired, "fired_in_epoch": self.fired_in_epoch, "kl_sum": float(self.kl_sum)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.fired = saved_number(state, "fired")
        self.fired_in_epoch = saved_number(state, "fired_in_epoch", self.fired)
        self.kl_sum = float(state["kl_sum"])
