"""Virtual samples around a batch in latent space: stochastic batch augmentation (Li et al., 2020, eqs. 5-8)."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from batchkern import _backend, reference
from batchkern.basis import Basis, Hadamard
from batchkern.ops import _checks as check
from batchkern.ops._autograd import boundary, once_differentiable
from batchkern.ops._public import public


@public
def augment_latent(
    x: Tensor,
    *,
    gaussian: int,
    dropout: int,
    sigma: float,
    tau: float,
    drop_prob: float,
    basis: Basis | None = None,
    rescale_dropout: bool = False,
    seed: int | Tensor | None = None,
) -> Tensor:
    """The batch, its Gaussian copies and its dropout copies, stacked copy-major.

    ``x``; then ``gaussian`` copies x + clip(eps, -tau, tau) @ basis.T with eps ~ N(0, sigma^2) (eq. 7); then
    ``dropout`` copies mask * x with mask ~ Bernoulli(1 - drop_prob) (eq. 8).

    Args:
        x: ``(B, Q)`` float32, bfloat16, float16 or float64.
        gaussian, dropout: number of copies of each kind, at least 0.
        sigma: standard deviation of the noise, at least 0.
        tau: the noise is clipped to [-tau, tau]; above 0, in the units of ``x``.
        drop_prob: in [0, 1].
        basis: from :func:`batchkern.random_basis`; a dense one may be any float ``(Q, Q)``, and gets no gradient.
            ``None`` adds the clipped noise without a basis. On a GPU the product with a dense basis uses the type of
            ``x``; for float32, PyTorch's setting for matmuls (``torch.backends.cuda.matmul``) decides whether TF32 is
            used.
        rescale_dropout: multiply dropout copies by 1 / (1 - drop_prob); the paper does not.
        seed: an int or 0-dim int64 tensor fixes the numbers: Philox4x32-10, the same integers on every device. ``None``
            draws one from torch's default generator of the device, so that ``torch.manual_seed`` governs it. While a
            CUDA graph is captured an int is rejected, because each replay would draw the same numbers.

    Returns:
        ``((1 + gaussian + dropout) * B, Q)`` in the dtype of ``x``. Its gradient is the sum over copies.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or range.

    Examples:
        >>> import torch
        >>> from batchkern import augment_latent
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
        >>> stack = augment_latent(x, gaussian=2, dropout=1, sigma=0.5, tau=0.25, drop_prob=1.0, seed=0)
        >>> raw, *noisy, dropped = stack.unflatten(0, (-1, 2))
        >>> raw.tolist(), dropped.tolist()
        ([[0.0, 1.0], [2.0, 3.0]], [[0.0, 0.0], [0.0, 0.0]])
        >>> all(bool(((copy - x).abs() <= 0.25).all()) for copy in noisy)
        True
    """
    check.tensor("x", x, dims=2)
    check.count("gaussian", gaussian)
    check.count("dropout", dropout)
    check.number("sigma", sigma, 0)
    check.number("tau", tau, 0, open_low=True)
    check.number("drop_prob", drop_prob, 0, 1)
    if rescale_dropout and drop_prob == 1:
        raise ValueError("drop_prob must be below 1 with rescale_dropout=True: 1 / (1 - drop_prob) is infinite")
    if basis is not None:
        _check_basis(basis, x)
        basis = basis.detach() if isinstance(basis, Tensor) else basis
    numbers = _seed_tensor(seed, x.device)
    if _backend.has_kernel("augment_latent", x):
        matrix = basis.signs if isinstance(basis, Hadamard) else basis
        stacked: Tensor = _AugmentLatent.apply(
            x, numbers, gaussian, dropout, sigma, tau, drop_prob, rescale_dropout, matrix
        )
        return stacked
    # Autocast would round the noise to its own dtype.
    available = torch.amp.autocast_mode.is_autocast_available(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if available else contextlib.nullcontext():
        return reference.augment_latent(
            boundary(x),
            numbers,
            gaussian=gaussian,
            dropout=dropout,
            sigma=sigma,
            tau=tau,
            drop_prob=drop_prob,
            basis=basis,
            rescale_dropout=rescale_dropout,
        )


class _AugmentLatent(torch.autograd.Function):
    """Saves only the seed: the backward pass draws the masks again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        seed: Tensor,
        gaussian: int,
        dropout: int,
        sigma: float,
        tau: float,
        drop_prob: float,
        rescale_dropout: bool,
        basis: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.masks = gaussian, dropout, drop_prob, rescale_dropout
        stacked: Tensor = torch.ops.batchkern.augment_latent.default(
            x,
            seed,
            gaussian=gaussian,
            dropout=dropout,
            sigma=sigma,
            tau=tau,
            drop_prob=drop_prob,
            rescale_dropout=rescale_dropout,
            basis=basis,
        )
        return stacked

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (seed,) = ctx.saved_tensors
        gaussian, dropout, drop_prob, rescale_dropout = ctx.masks
        result: Tensor = torch.ops.batchkern.augment_latent_backward.default(
            grad, seed, gaussian=gaussian, dropout=dropout, drop_prob=drop_prob, rescale_dropout=rescale_dropout
        )
        return result, None, None, None, None, None, None, None, None


if _backend.extension is not None:

    @torch.library.register_fake("batchkern::augment_latent")
    def _(x: Tensor, seed: Tensor, *, gaussian: int, dropout: int, **options: Any) -> Tensor:
        return x.new_empty((1 + gaussian + dropout) * x.shape[0], x.shape[1])

    @torch.library.register_fake("batchkern::augment_latent_backward")
    def _(grad: Tensor, seed: Tensor, *, gaussian: int, dropout: int, **options: Any) -> Tensor:
        return grad.new_empty(grad.shape[0] // (1 + gaussian + dropout), grad.shape[1])


def _check_basis(basis: Basis, x: Tensor) -> None:
    width = x.shape[1]
    if isinstance(basis, Hadamard):
        check.vector("basis.signs", basis.signs, rows=width, like=x, dtypes=(torch.float32,))
        return
    check.tensor("basis", basis, dims=2)
    check.same_device("basis", basis, x)
    if basis.shape != (width, width):
        raise ValueError(f"basis must have shape ({width}, {width}) to match x, got {tuple(basis.shape)}")


def _seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """A 0-dim int64 tensor on ``device``, so that a captured graph can draw a new one at each replay."""
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), device=device)
    if isinstance(seed, Tensor):
        check.tensor("seed", seed, dims=0, dtypes=(torch.int64,))
        if seed.device != device:
            raise ValueError(f"seed must be on {device}, the device of x, got {seed.device}")
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, a 0-dim int64 tensor or None, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit in 64 bits, got {seed}")
    if device.type == "cuda" and _captures():
        raise ValueError(
            f"seed must be None or a 0-dim int64 tensor on {device} while a CUDA graph is captured, got {seed}: "
            "every replay would draw the same numbers"
        )
    return torch.full((), seed, dtype=torch.int64, device=device)


def _captures() -> bool:
    """Whether a CUDA graph is being captured. Under ``torch.compile`` a number is safe: another number compiles another
    graph."""
    if torch.compiler.is_compiling() or not torch.cuda.is_initialized():  # fake tensors need no GPU
        return False
    return torch.cuda.is_current_stream_capturing()
