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
"""Widest latent space for which a dense Q x Q basis is formed (256 MiB)."""


@dataclass(frozen=True)
class LatentNoise:
    """A batch with Gaussian and dropout copies of itself in the latent space of a layer (eqs. 5-8).

    Args:
        gaussian, dropout: copies of each kind; together M, at least 1.
        sigma, tau: standard deviation and clip of the noise, in the units of the layer's input; not in the paper.
        drop_prob: of the dropout copies, in [0, 1).
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
        """M."""
        return self.gaussian + self.dropout

    def __call__(self, hidden: Tensor, seed: int, basis_seed: int, share: Share | None = None) -> Tensor:
        """``hidden (B, ...)`` and its virtual samples, ``((1 + M) * B, ...)``, the batch itself first.

        The latent space is all that a sample has, Q numbers; of a sequence ``(B, T, H)`` it is that of a position, H.

        Numbers are drawn by the row of the batch. With ``share``, ``hidden`` is a rank's part of a batch. The rank then
        makes the virtual samples of the whole batch, around zeros where the rows are others', and keeps its own: on W
        ranks W times the work of this layer's noise, and the memory of ``(1 + M)`` whole batches at this layer, for the
        numbers of one process.
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
    """Votes ``(B, C)`` for each class, of a sample ``raw (B, C)`` and its virtual samples ``(M * B, C)``; the raw
    prediction has half a vote more, which decides ties it is part of (section 3.4)."""
    votes = torch.stack([raw, *virtual.chunk(len(virtual) // len(raw))]).argmax(dim=2)
    counts = nn.functional.one_hot(votes, raw.shape[1]).sum(dim=0).float()
    return counts + 0.5 * nn.functional.one_hot(votes[0], raw.shape[1])


class Stack:
    """Hooks that put a batch and its virtual samples through the layers from ``layer`` on, and take them apart again
    behind ``end``, which returns the rows of the batch alone.

    Args:
        virtual: the layer's first argument ``(B, ...)`` -> ``((1 + M) * B, ...)``, or None: this pass has none.
    """

    def __init__(self, layer: nn.Module, end: nn.Module, virtual: Callable[[Tensor], Tensor | None]) -> None:
        self.virtual = virtual
        self.forget()
        self._handles = [layer.register_forward_pre_hook(self._stack), end.register_forward_hook(self._split)]

    def forget(self) -> None:
        self.calls = 0
        """Of the layer."""
        self.rows: int | None = None
        """Of the batch that is stacked."""
        self.parts = 1
        """1 + M."""
        self.logits: tuple[Tensor, Tensor] | None = None
        """Of the batch, and of its virtual samples."""

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    @torch.compiler.disable
    def begin(self, *_: Any) -> None:
        """A forward pass begins, whatever became of the one before."""
        self.forget()

    @torch.compiler.disable
    def _stack(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or not isinstance(args[0], Tensor):
            raise UserError("virtual samples need a layer whose first argument, not a keyword, is a tensor")
        if self.logits is not None:  # of a pass before, where parts of a model are called, not the model
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
                f"virtual samples need a layer that the logits depend on, but of {self.parts} x {self.rows} rows "
                f"{len(logits)} logits are made"
            )
        own = len(logits) // self.parts  # more than there are rows, where positions of sequences become rows
        self.logits = logits[:own], logits[own:]
        self.rows = None
        return self.logits[0]


@contextlib.contextmanager
def stacked(layer: nn.Module, end: nn.Module, virtual: Callable[[Tensor], Tensor]) -> Iterator[Stack]:
    """A :class:`Stack` for one forward pass.

    Raises:
        UserError: at its end, the layer did not run.
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

    Once made, every forward pass of the model in training mode, with gradients, runs the layers from ``layer`` on with
    virtual samples beside the batch, with probability cos(omega). The model still returns what it would for the batch.

        virtual = VirtualSamples(model, gaussian=4, dropout=4, eta=0.1)
        for x, y in loader:
            loss = F.cross_entropy(model(x), y) + virtual.penalty()
            ...  # the update

    Make it before the model is compiled; a compiled model takes it with breaks of the graph, so not with
    ``fullgraph=True``. It has no parameters; its state is the number of passes. The layers from ``layer`` on see
    1 + M times the rows: they must run once a pass, with the batch as dimension 0, and take nothing else that has its
    rows, such as a mask of padding or a skip connection around ``layer``. The classifier always fulfils this.

    Args:
        model: any module. Inputs of the layer are ``(B, ...)``; of ``(B, T, H)`` each position is perturbed by itself.
        layer: name of the module; default: the classifier.
        classifier: name of the model's last linear layer, whose outputs are the logits ``(B, ..., C)``; default: the
            last one registered.
        omega: in [0, pi / 2]; pi / 3 augments every second pass on average.
        eta: weight of the penalty, at least 0.
        labels: ``"soft"``: outputs of the batch are the labels of its virtual samples, as constants (eq. 10);
            ``"trained"``: with a gradient into them (eq. 11 as it is written).
        seed: seed of the coin and the noise.
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
            raise UserError(f"layer {name if layer is None else layer!r} has virtual samples already; remove() those")
        self.passes = 0
        """Forward passes in training so far, the iteration that random numbers are drawn for."""
        self._idle = False
        """The coin of the latest pass fell on no virtual samples."""
        self._modules_of_model = (chosen, end)  # a tuple: they are no submodules
        self._stack = Stack(*self._modules_of_model, self._virtual)
        self._of_model = (
            model.register_forward_pre_hook(self._stack.begin, prepend=True),
            model.register_forward_hook(self._check),
        )

    def _virtual(self, hidden: Tensor) -> Tensor | None:
        layer, _ = self._modules_of_model
        again = torch._C._current_graph_task_id() != -1  # a checkpointed layer runs once more in the backward pass
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
        """Of the latest pass's rows, ``(B,)`` or ``(B, T)``; None: it had no virtual samples."""
        return None if self._stack.logits is None else self._stack.logits[0].shape[:-1]

    @torch.compiler.disable
    def _check(self, model: nn.Module, args: Any, output: Any) -> None:
        logits = self._stack.logits
        if logits is not None and isinstance(output, Tensor) and output.shape[-1:] != logits[0].shape[-1:]:
            raise UserError(
                f"classifier must name the layer that the logits come from: the model gives {tuple(output.shape)}, and "
                f"the last Linear that is registered {tuple(logits[0].shape)}"
            )

    def penalty(self, mask: Tensor | None = None) -> Tensor:
        """eta times the divergence of the latest pass, of virtual samples from their batch; 0 where it had none.

        Args:
            mask: of logits ``(B, T, C)``, ``(B, T)`` bool: the positions that count, such as ``labels != -100``.

        Raises:
            UserError: the mask is of another shape or type.
            RuntimeError: no pass went through the layer in training since the last call.
        """
        if self._idle:
            self._idle = False
            return torch.zeros(())
        if self._stack.logits is None:
            raise RuntimeError(
                "no virtual samples went through the model: call penalty() once after each of its forward passes in "
                "training mode with gradients, and make VirtualSamples before the model is compiled"
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
        """Takes the hooks off the model."""
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
