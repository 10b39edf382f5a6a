"""Random bases of the latent space: the projection Sigma of stochastic batch augmentation (eq. 7).

A basis is either a dense matrix ``(Q, Q)`` or a :class:`Hadamard`, which is applied without forming one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

BasisKind = Literal["normalized", "orthogonal", "hadamard"]
KINDS = ("normalized", "orthogonal", "hadamard")


@dataclass(frozen=True)
class Hadamard:
    """Randomised Hadamard transform s * H D of width Q, applied in O(Q log Q).

    D holds the ``signs (Q,)``, +-1 float32; H is the top-left Q x Q block of the Sylvester-Hadamard matrix of the next
    power of two; s = 1 / sqrt(Q) gives every column unit norm, whatever Q is. Orthogonal when Q is a power of two.

    Args:
        signs: ``(Q,)`` float32, each +1 or -1.

    Examples:
        >>> import torch
        >>> from batchkern import Hadamard
        >>> Hadamard(torch.tensor([1.0, 1.0, 1.0, -1.0])).matrix()[:2].tolist()
        [[0.5, 0.5, 0.5, -0.5], [0.5, -0.5, 0.5, 0.5]]
    """

    signs: Tensor

    def matrix(self) -> Tensor:
        """The dense ``(Q, Q)`` matrix, for tests and inspection."""
        return apply_basis(torch.eye(len(self.signs), device=self.signs.device), self).T


Basis = Tensor | Hadamard


def random_basis(
    width: int,
    kind: BasisKind = "normalized",
    *,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Basis:
    """A fresh random basis of a latent space of ``width`` Q (stochastic batch augmentation, section 3.3).

    Args:
        width: Q, at least 1.
        kind: ``"normalized"``: independent random columns of unit norm, the paper's. ``"orthogonal"``: Haar-random
            orthogonal. ``"hadamard"``: randomised Hadamard transform; no Q x Q matrix is ever formed.
        device: where the basis is made; default: torch's default device.
        generator: default: torch's default generator for that device.

    Returns:
        float32 ``(Q, Q)``, or a :class:`Hadamard`.

    Raises:
        ValueError: unknown ``kind`` or ``width`` below 1.

    Examples:
        >>> import torch
        >>> from batchkern import random_basis
        >>> basis = random_basis(4, "orthogonal")
        >>> torch.allclose(basis @ basis.T, torch.eye(4), atol=1e-6)
        True
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    if kind == "hadamard":
        signs = torch.randint(2, (width,), device=device, generator=generator)
        return Hadamard((2 * signs - 1).float())
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    columns = torch.randn(width, width, device=device, generator=generator, dtype=torch.float32)
    if kind == "normalized":
        return columns / columns.norm(dim=0, keepdim=True)
    q, r = torch.linalg.qr(columns)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)  # QR alone is not Haar: its R fixes the signs of Q


def apply_basis(noise: Tensor, basis: Basis | None) -> Tensor:
    """``noise (N, Q) @ basis.T``; ``None`` is the identity."""
    if basis is None:
        return noise
    if isinstance(basis, Tensor):
        return noise @ basis.to(noise.dtype).T
    width = noise.shape[1]
    x = noise * basis.signs.to(noise.dtype)
    x = torch.nn.functional.pad(x, (0, (1 << (width - 1).bit_length()) - width))
    return hadamard_transform(x)[:, :width] / width**0.5


def hadamard_transform(x: Tensor) -> Tensor:
    """Unnormalised Walsh-Hadamard transform of each row of ``x (N, 2^p)``, in natural (Sylvester) order."""
    rows, width = x.shape
    step = 1
    while step < width:
        pairs = x.reshape(rows, width // (2 * step), 2, step)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        x = torch.stack([a + b, a - b], dim=2).reshape(rows, width)
        step *= 2
    return x
