"""The distilled soft-label regulariser of stochastic batch augmentation (Li et al., 2020, eqs. 10-11)."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from batchkern import _backend
from batchkern import reference as plain
from batchkern.ops import _checks as check
from batchkern.ops._autograd import boundary, is_batched, once_differentiable
from batchkern.ops._public import public


@overload
def soft_label_kl(
    reference_logits: Tensor,
    virtual_logits: Tensor,
    *,
    temperature: float = ...,
    scale: float = ...,
    reference_grad: bool = ...,
    per_sample: Literal[False] = ...,
) -> Tensor: ...
@overload
def soft_label_kl(
    reference_logits: Tensor,
    virtual_logits: Tensor,
    *,
    temperature: float = ...,
    scale: float = ...,
    reference_grad: bool = ...,
    per_sample: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def soft_label_kl(
    reference_logits: Tensor,
    virtual_logits: Tensor,
    *,
    temperature: float = ...,
    scale: float = ...,
    reference_grad: bool = ...,
    per_sample: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
@public
def soft_label_kl(
    reference_logits: Tensor,
    virtual_logits: Tensor,
    *,
    temperature: float = 1.0,
    scale: float = 1.0,
    reference_grad: bool = False,
    per_sample: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``scale`` times the mean over virtual rows of KL(softmax(reference_i / T) || softmax(virtual_ij / T)).

    Divergences are never negative, and are accurate even if a virtual row is close to its reference. A class at -inf in
    both rows adds nothing; with -inf only in the virtual row, the divergence is +inf.

    Args:
        reference_logits: ``(B, C)`` float32, bfloat16, float16 or float64: their softmax is the soft labels.
        virtual_logits: ``(M * B, C)``, copy-major as :func:`batchkern.augment_latent` stacks them; same dtype.
        temperature: T, a normal number of float32: from 1.2e-38 to 3.4e38.
        scale: a factor of the mean that is known beforehand, such as eta of eq. 11; finite in float32. The gradient,
            computed in the forward pass, includes it: if the upstream gradient is then 1, the backward pass only rounds
            a gradient that is stored in a wider type.
        reference_grad: let the gradient flow into the soft labels too. By default they are constants.
        per_sample: also return the divergences ``(M * B,)``, detached, and without ``scale``.

    Returns:
        The 0-dim scaled mean (float32, or float64 for float64 logits), or ``(mean, divergences)``. NaN when B is 0.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or range; M is 0, for example because a hook
            that makes virtual samples did not run.

    Examples:
        >>> import torch
        >>> from batchkern import soft_label_kl
        >>> reference = torch.tensor([[3.0, 1.0]]).log()  # probabilities 0.75 and 0.25
        >>> virtual = torch.tensor([[1.0, 1.0], [3.0, 1.0]]).log()  # two virtual samples of it
        >>> mean, divergences = soft_label_kl(reference, virtual, per_sample=True)
        >>> [round(divergence, 4) for divergence in divergences.tolist()], round(float(mean), 4)
        ([0.1308, 0.0], 0.0654)
    """
    check.tensor("reference_logits", reference_logits, dims=2)
    check.tensor("virtual_logits", virtual_logits, dims=2, dtypes=(reference_logits.dtype,))
    check.same_device("virtual_logits", virtual_logits, reference_logits)
    batch, classes = reference_logits.shape
    rows = len(virtual_logits)
    if virtual_logits.shape[1] != classes or (rows % batch or not rows if batch else rows):
        raise ValueError(
            f"virtual_logits must have shape (M * {batch}, {classes}) to match reference_logits, with M at least 1, "
            f"got {tuple(virtual_logits.shape)}"
        )
    largest = torch.finfo(torch.float32).max
    check.number("temperature", temperature, torch.finfo(torch.float32).tiny, largest)
    check.number("scale", scale, -largest, largest)
    reference = reference_logits if reference_grad else reference_logits.detach()
    if _backend.has_kernel("soft_label_kl", reference):
        wanted = [x.requires_grad and torch.is_grad_enabled() for x in (reference, virtual_logits)]
        options = {
            "temperature": temperature,
            "scale": scale,
            "reference_grad": wanted[0],
            "virtual_grad": wanted[1],
        }
        with torch.no_grad():
            mean, divergences, to_virtual, to_reference = torch.ops.batchkern.soft_label_kl.default(
                reference, virtual_logits, **options
            )
        forward = _Forward(mean, to_virtual, to_reference, options)
        mean = _SoftLabelKL.apply(reference, virtual_logits, forward)
    else:
        divergences = plain.soft_label_kl(boundary(reference), boundary(virtual_logits), temperature=temperature)
        mean = (scale * divergences).mean()  # a 0-dim tensor times a number has a float64 tangent
    return (mean, divergences.detach()) if per_sample else mean


class _Forward(NamedTuple):
    """The results of the forward pass, which also computes the gradients, that the backward pass needs."""

    mean: Tensor
    """``()``, scaled; the only result with a gradient."""
    to_virtual: Tensor
    """``(M * B, C)``: the gradient of ``mean`` with respect to the virtual logits; no rows if they need no gradient."""
    to_reference: Tensor
    """``(B, C)``: the same for the reference logits."""
    options: dict[str, Any]
    """Options of the operator."""


class _SoftLabelKL(torch.autograd.Function):
    """Adds the gradient to the mean of a forward pass that has already run.

    With p = softmax(r / T) of a reference row r and q = softmax(v / T) of a virtual row v, the divergence of the pair
    is D = sum_c p_c (log p_c - log q_c), and the mean has the factor s = scale / (M B) in front of each:

    1. dD/dv_c = (q_c - p_c) / T;
    2. dD/dr_c = p_c (log p_c - log q_c - D) / T, added up over the M copies of the row;
    3. the forward pass multiplies both by s; the backward pass multiplies them by the upstream gradient, in place.

    A second backward pass (``retain_graph=True``) runs the kernel again, because the gradients were overwritten.
    """

    @staticmethod
    def forward(ctx: Any, reference: Tensor, virtual: Tensor, forward: _Forward) -> Tensor:
        ctx.save_for_backward(reference, virtual, forward.to_virtual, forward.to_reference)
        ctx.options = forward.options
        ctx.used = False
        return forward.mean.detach()  # as in trimmed_cross_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        reference, virtual, *grads = ctx.saved_tensors
        if ctx.used:
            _, _, *grads = torch.ops.batchkern.soft_label_kl.default(reference, virtual, **ctx.options)
        in_place = not (
            torch.compiler.is_compiling() or is_batched(grad)
        )  # in place, there is room for only one gradient
        if in_place:
            ctx.used = True

        def multiplied(x: Tensor) -> Tensor:
            return _multiplied(x, grad, virtual.dtype) if in_place else (grad * x).to(virtual.dtype)

        to_virtual, to_reference = grads
        return (
            multiplied(to_reference) if ctx.needs_input_grad[0] else None,
            multiplied(to_virtual) if ctx.needs_input_grad[1] else None,
            None,
        )


def _multiplied(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradient * factor`` as ``dtype``; in place if ``gradient`` already has that type."""
    gradient = gradient.data  # otherwise autograd would raise an error about a modified tensor
    out = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    torch.ops.batchkern.scale_gradient_.default(out, gradient, factor)
    return out


if _backend.extension is not None:

    @torch.library.register_fake("batchkern::scale_gradient_")
    def _(out: Tensor, gradient: Tensor, factor: Tensor) -> None: ...

    @torch.library.register_fake("batchkern::soft_label_kl")
    def _(
        reference_logits: Tensor,
        virtual_logits: Tensor,
        *,
        temperature: float = 1.0,
        scale: float = 1.0,
        reference_grad: bool = False,
        virtual_grad: bool = True,
    ) -> Any:
        rows, classes = virtual_logits.shape
        divergences = virtual_logits.new_empty(rows, dtype=torch.float32)
        # The Triton kernel stores the gradient in bfloat16, which needs less memory but rounds once more.
        narrow = virtual_logits.is_cuda and virtual_logits.dtype == torch.bfloat16
        to_virtual = divergences.new_empty(
            rows if virtual_grad else 0, classes, dtype=torch.bfloat16 if narrow else torch.float32
        )
        to_reference = divergences.new_empty(reference_logits.shape[0] if reference_grad else 0, classes)
        return divergences.new_empty(()), divergences, to_virtual, to_reference
