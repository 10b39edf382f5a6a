"""The distilled soft-label regulariser of stochastic batch augmentation (Li et al., 2020, eqs. 10-11)."""

from __future__ import annotations

from torch import Tensor

from batchkern import _backend
from batchkern.ops import _checks as check
from batchkern.ops._autograd import boundary


def soft_label_kl(
    reference_logits: Tensor,
    virtual_logits: Tensor,
    *,
    temperature: float = 1.0,
    reference_grad: bool = False,
    per_sample: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mean over virtual rows of KL(softmax(reference_i / T) || softmax(virtual_ij / T)).

    Never negative, and accurate where a virtual row sits next to its reference. A class at -inf in both rows adds
    nothing; at -inf in the virtual row alone the divergence is +inf. The factor eta of eq. 11 is the caller's.

    Args:
        reference_logits: ``(B, C)`` float32, bfloat16, float16 or float64: the soft labels.
        virtual_logits: ``(M * B, C)``, copy-major as :func:`batchkern.augment_latent` stacks them; same dtype.
        temperature: T above 0.
        reference_grad: let the gradient flow into the soft labels too. By default they are constants.
        per_sample: also return the divergences ``(M * B,)``, detached.

    Returns:
        The 0-dim mean (float32, or float64 for float64 logits), or ``(mean, divergences)``. NaN when M * B is 0.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or range.
    """
    check.tensor("reference_logits", reference_logits, dims=2)
    check.tensor("virtual_logits", virtual_logits, dims=2, dtypes=(reference_logits.dtype,))
    check.same_device("virtual_logits", virtual_logits, reference_logits)
    batch, classes = reference_logits.shape
    rows = len(virtual_logits)
    if virtual_logits.shape[1] != classes or (rows % batch if batch else rows):
        raise ValueError(
            f"virtual_logits must have shape (M * {batch}, {classes}) to match reference_logits, "
            f"got {tuple(virtual_logits.shape)}"
        )
    check.number("temperature", temperature, 0, open_low=True)
    reference = boundary(reference_logits) if reference_grad else reference_logits.detach()
    compute = _backend.implementation("soft_label_kl", reference_logits.device)
    divergences: Tensor = compute(reference, boundary(virtual_logits), temperature=temperature)
    mean = divergences.mean()
    return (mean, divergences.detach()) if per_sample else mean
