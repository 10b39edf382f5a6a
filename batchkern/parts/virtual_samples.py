"""Virtual samples at the input of a layer: Q. Li, Q. Hu, Y. Qi, S. Qi, J. Ma, J. Zhang, "Stochastic Batch Augmentation
with An Effective Distilled Dynamic Soft Label Regularizer", IJCAI 2020, section 3."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchkern.basis import KINDS, Basis, BasisKind, random_basis
from batchkern.distributed import Share
from batchkern.errors import UserError
from batchkern.models import find_classifier
from batchkern.ops import augment_latent, soft_label_kl
from batchkern.schedules import bernoulli
from batchkern.seeding import derived_seed, generator
from batchkern.validation import check_number

DENSE_LIMIT = 8192
"""The largest latent space, Q, for which a dense Q x Q basis is built (256 MiB)."""


@dataclass(frozen=True)
class LatentNoise:
    """A batch with Gaussian and dropout copies of itself in the latent space of a layer (eqs. 5-8).

    Args:
        gaussian, dropout: number of copies of each kind; their sum is M, at least 1.
        sigma, tau: standard deviation and clip of the noise, in the units of the layer's input; not in the paper.
        drop_prob: drop probability of the dropout copies, in [0, 1).
        basis: ``"normalized"`` (the paper's), ``"orthogonal"``, ``"hadamard"`` (no Q x Q matrix) or ``"none"``.

    Raises:
        UserError: an argument is out of its range.
    """

    gaussian: int = 2
    dropout: int = 2
    sigma: float = 0.1
    tau: float = 0.2
    drop_prob: float = 0.1
    basis: BasisKind | Literal["none"] = "normalized"

    def __post_init__(self) -> None:
        copies = (self.gaussian, self.dropout)
        if any(type(n) is not int or n < 0 for n in copies) or sum(copies) < 1:
            raise UserError(f"gaussian and dropout must be whole numbers that add up to at least 1, got {copies}")
        if not 0 <= check_number("drop_prob", self.drop_prob) < 1:
            raise UserError(f"drop_prob must be in [0, 1), got {self.drop_prob}")
        if not 0 <= check_number("sigma", self.sigma) < math.inf:
            raise UserError(f"sigma must be at least 0, got {self.sigma}")
        if not check_number("tau", self.tau) > 0:
            raise UserError(f"tau must be above 0, got {self.tau}")
        if self.basis not in (*KINDS, "none"):
            raise UserError(f"basis must be one of {', '.join(KINDS)}, none, got {self.basis!r}")

    @property
    def copies(self) -> int:
        """M, the number of virtual samples of each sample."""
        return self.gaussian + self.dropout

    def __call__(self, hidden: Tensor, seed: int, basis_seed: int, share: Share | None = None) -> Tensor:
        """``hidden (B, ...)`` and its virtual samples, ``((1 + M) * B, ...)``, the batch itself first.

        The latent space is that of a whole sample, Q numbers; for a sequence ``(B, T, H)`` it is that of one position,
        H.

        Random numbers depend on the row in the batch. With ``share``, ``hidden`` is one rank's part of a batch. The
        rank then makes the virtual samples of the whole batch, with zeros in place of the rows of other ranks, and
        keeps its own rows. So the numbers are the same as in one process, but on W ranks the noise of this layer costs
        W times the work, and needs the memory of ``(1 + M)`` whole batches at this layer.
        """
        if hidden.dim() < 2:
            raise UserError(f"virtual samples need a layer whose input is (B, ...), got {tuple(hidden.shape)}")
        flat = hidden.flatten(1)
        share = share or Share(len(flat))
        whole = share.spread(flat)
        latent = whole.reshape(-1, hidden.shape[-1]) if hidden.dim() == 3 else whole
        stacked = augment_latent(
            latent,
            gaussian=self.gaussian,
            dropout=self.dropout,
            sigma=self.sigma,
            tau=self.tau,
            drop_prob=self.drop_prob,
            basis=self._basis(latent, basis_seed),
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


def majority(raw: Tensor, virtual: Tensor) -> Tensor:
    """The votes ``(B, C)`` for each class by samples ``raw (B, C)`` and their virtual samples ``(M * B, C)``. The raw
    prediction gets an extra half vote, so that it wins ties (section 3.4)."""
    votes = torch.stack([raw, *virtual.chunk(len(virtual) // len(raw))]).argmax(dim=2)
    counts = nn.functional.one_hot(votes, raw.shape[1]).sum(dim=0).float()
    return counts + 0.5 * nn.functional.one_hot(votes[0], raw.shape[1])


class Stack:
    """Hooks that run the layers from ``layer`` on with a batch and its virtual samples stacked, and split them again
    after ``end``, which returns only the rows of the batch.

    Args:
        virtual: maps the layer's first argument ``(B, ...)`` to ``((1 + M) * B, ...)``, or to None if this pass gets no
            virtual samples.
    """

    def __init__(self, layer: nn.Module, end: nn.Module, virtual: Callable[[Tensor], Tensor | None]) -> None:
        self.virtual = virtual
        self.forget()
        self._handles = [layer.register_forward_pre_hook(self._stack), end.register_forward_hook(self._split)]

    def forget(self) -> None:
        self.calls = 0
        """Number of calls of the layer."""
        self.rows: int | None = None
        """Number of rows of the stacked batch, without virtual samples."""
        self.parts = 1
        """1 + M."""
        self.logits: tuple[Tensor, Tensor] | None = None
        """Logits of the batch, and of its virtual samples."""

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    @torch.compiler.disable
    def begin(self, *_: Any) -> None:
        """Starts a forward pass, even if the one before was not completed."""
        self.forget()

    @torch.compiler.disable
    def _stack(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or not isinstance(args[0], Tensor):
            raise UserError("virtual samples need a layer whose first argument, not a keyword, is a tensor")
        if self.logits is not None:  # of an earlier pass: parts of the model are called directly
            self.forget()
        self.rows = None
        stacked = self.virtual(args[0])
        if stacked is None:
            return None
        self.calls += 1
        if self.calls > 1:
            raise UserError("virtual samples need a layer that runs once in a forward pass; this one ran twice")
        self.rows, self.parts = len(args[0]), len(stacked) // max(len(args[0]), 1)
        return (stacked, *args[1:])

    @torch.compiler.disable
    def _split(self, _: nn.Module, args: tuple[Any, ...], logits: Any) -> Tensor | None:
        if self.rows is None:
            return None
        if not isinstance(logits, Tensor):
            raise UserError(f"virtual samples need logits that are a tensor, got {type(logits).__name__}")
        if len(logits) == self.rows or len(logits) % self.parts:
            raise UserError(
                f"virtual samples need a layer that the logits depend on, but {self.parts} x {self.rows} rows gave "
                f"{len(logits)} rows of logits"
            )
        own = len(logits) // self.parts  # more than self.rows if positions of sequences become rows
        self.logits = logits[:own], logits[own:]
        self.rows = None
        return self.logits[0]


@contextlib.contextmanager
def stacked(layer: nn.Module, end: nn.Module, virtual: Callable[[Tensor], Tensor]) -> Iterator[Stack]:
    """A :class:`Stack` for one forward pass.

    Raises:
        UserError: raised at its end if the layer did not run.
    """
    stack = Stack(layer, end, virtual)
    try:
        yield stack
    finally:
        stack.remove()
    if stack.logits is None:
        raise UserError("virtual samples need a layer that runs once in a forward pass; this one did not run")


class VirtualSamples(nn.Module):
    """Virtual samples at the input of a layer of any model, in training, and their penalty.

    After construction, each forward pass of the model in training mode with gradients runs the layers from ``layer`` on
    with additional virtual samples, with probability cos(omega). The model still returns only the outputs of the batch.

        virtual = VirtualSamples(model, gaussian=4, dropout=4, eta=0.1)
        for x, y in loader:
            loss = F.cross_entropy(model(x), y) + virtual.penalty()
            ...  # the update

    Construct it before the model is compiled; it causes graph breaks in a compiled model, so ``fullgraph=True`` does
    not work. It has no parameters; its state is the number of passes. The layers from ``layer`` on get 1 + M times as
    many
    rows: they must run once per pass, with the batch as dimension 0, and have no other input with one entry per row,
    such as a padding mask or a skip connection around ``layer``. The classifier always fulfils this.

    Args:
        model: any module. Inputs of the layer are ``(B, ...)``; with ``(B, T, H)``, each position is perturbed
            separately.
        layer: name of the module; default: the classifier.
        classifier: name of the model's last linear layer, whose outputs are the logits ``(B, ..., C)``; default: the
            last one registered.
        omega: in [0, pi / 2]; pi / 3 augments every second pass on average.
        eta: weight of the penalty, at least 0.
        labels: ``"soft"``: the outputs of the batch are the labels of its virtual samples, as constants (eq. 10);
            ``"trained"``: with a gradient into them (eq. 11 as it is written).
        seed: seed of the random decisions and the noise.
        noise: ``gaussian``, ``dropout``, ``sigma``, ``tau``, ``drop_prob``, ``basis``, as for :class:`LatentNoise`.

    Raises:
        UserError: an argument is out of its range, or there is no such module.

    Examples:
        >>> import torch
        >>> from batchkern.parts import VirtualSamples
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(3, 2)), torch.ones(4, 3)
        >>> plain = model(x)
        >>> virtual = VirtualSamples(model, gaussian=4, dropout=4, eta=0.1, omega=0)  # in every pass
        >>> logits = model(x)  # of the batch alone, as before
        >>> torch.equal(logits, plain), bool(virtual.penalty() > 0)
        (True, True)
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str | None = None,
        *,
        classifier: str | None = None,
        omega: float = math.pi / 3,
        eta: float = 0.1,
        labels: Literal["soft", "trained"] = "soft",
        seed: int = 0,
        **noise: Any,
    ) -> None:
        super().__init__()
        unknown = set(noise) - {field.name for field in fields(LatentNoise)}
        if unknown:
            raise TypeError(f"VirtualSamples() got an unexpected keyword argument {min(unknown)!r}")
        self.noise = LatentNoise(**noise)
        self.omega, self.eta = check_omega("omega", omega), check_eta(eta)
        if labels not in ("soft", "trained"):
            raise UserError(f"labels must be soft or trained, got {labels!r}")
        self.labels, self.seed = labels, seed
        name, end = find_classifier(model, classifier)
        modules = dict(model.named_modules())
        if layer is not None and (not layer or layer not in modules):
            raise UserError(f"layer: the model has no module {layer!r}; it has {', '.join(filter(None, modules))}")
        chosen = modules[name if layer is None else layer]
        if any(isinstance(getattr(hook, "__self__", None), Stack) for hook in chosen._forward_pre_hooks.values()):
            raise UserError(f"layer {name if layer is None else layer!r} already has virtual samples; remove() them")
        self.passes = 0
        """Number of forward passes in training so far; random numbers are drawn for this iteration."""
        self._idle = False
        """Whether the latest pass got no virtual samples by its random decision."""
        self._modules_of_model = (chosen, end)  # a tuple, so that they do not become submodules
        self._stack = Stack(*self._modules_of_model, self._virtual)
        self._of_model = (
            model.register_forward_pre_hook(self._stack.begin, prepend=True),
            model.register_forward_hook(self._check),
        )

    def _virtual(self, hidden: Tensor) -> Tensor | None:
        layer, _ = self._modules_of_model
        again = torch._C._current_graph_task_id() != -1  # a checkpointed layer runs again in the backward pass
        if not layer.training or not (torch.is_grad_enabled() or again):
            return None
        if not again:
            self.passes += 1
        moment = self.passes - 1
        fires = coin(self.omega, self.seed, "iteration", moment)
        self._idle = not fires and not again
        if not fires:
            return None
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        place = derived_seed(self.seed, "augment numbers", moment, *([rank] if rank else []))
        return self.noise(hidden, place, place)

    @property
    def shape(self) -> torch.Size | None:
        """Shape of the rows of the latest pass, ``(B,)`` or ``(B, T)``; None if it had no virtual samples."""
        return None if self._stack.logits is None else self._stack.logits[0].shape[:-1]

    @torch.compiler.disable
    def _check(self, model: nn.Module, args: Any, output: Any) -> None:
        logits = self._stack.logits
        if logits is not None and isinstance(output, Tensor) and output.shape[-1:] != logits[0].shape[-1:]:
            raise UserError(
                f"classifier must name the layer that the logits come from: the model returns {tuple(output.shape)}, "
                f"but the last registered Linear returns {tuple(logits[0].shape)}"
            )

    def penalty(self, mask: Tensor | None = None) -> Tensor:
        """eta times the divergence of the virtual samples of the latest pass from their batch; 0 if it had none.

        Args:
            mask: for logits ``(B, T, C)``, ``(B, T)`` bool: the positions that count, such as ``labels != -100``.

        Raises:
            UserError: the mask has a wrong shape or type.
            RuntimeError: no pass went through the layer in training since the last call.
        """
        if self._idle:
            self._idle = False
            return torch.zeros(())
        if self._stack.logits is None:
            raise RuntimeError(
                "no virtual samples went through the model: call penalty() once after each of its forward passes in "
                "training mode with gradients, and construct VirtualSamples before the model is compiled"
            )
        raw, virtual = self._stack.logits
        self._stack.forget()
        copies = virtual.view(-1, *raw.shape)
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape != raw.shape[:-1]:
                raise UserError(
                    f"mask must be bool of shape {tuple(raw.shape[:-1])}, got {mask.dtype} of {tuple(mask.shape)}"
                )
            raw, copies = raw[mask], copies[:, mask]
        rows = raw.reshape(-1, raw.shape[-1])
        if not len(rows):
            return 0.0 * virtual.sum()  # the mean over no samples would be NaN
        virtual = copies.reshape(-1, raw.shape[-1])
        penalty = soft_label_kl(rows, virtual, scale=self.eta, reference_grad=self.labels == "trained")
        assert isinstance(penalty, Tensor)
        return penalty

    def remove(self) -> None:
        """Removes the hooks from the model."""
        for handle in self._of_model:
            handle.remove()
        self._stack.remove()

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.passes)

    def set_extra_state(self, state: Tensor) -> None:
        self.passes = int(state)


def coin(omega: float, seed: int, *place: int | str) -> bool:
    """True with probability cos(omega)."""
    return bernoulli(min(1.0, max(0.0, math.cos(omega))))(generator(seed, "augment", *place))


def check_omega(name: str, value: float) -> float:
    if not 0 <= check_number(name, value) <= math.pi / 2:
        raise UserError(f"{name} must be in [0, pi/2], got {value}")
    return value


def check_eta(value: float) -> float:
    if not 0 <= check_number("eta", value) < math.inf:
        raise UserError(f"eta must be at least 0, got {value}")
    return value
