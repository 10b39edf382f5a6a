"""Random bases: their laws, and the Hadamard transform against scipy."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from scipy.linalg import hadamard
from torch import Tensor

from batchkern import Hadamard, random_basis
from batchkern.basis import apply_basis, hadamard_transform

DENSE = ("normalized", "orthogonal")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("width", [1, 2, 3, 17, 128])
@pytest.mark.parametrize("kind", [*DENSE, "hadamard"])
def test_columns_have_unit_norm(kind: str, width: int) -> None:
    basis = random_basis(width, kind)
    matrix = basis.matrix() if isinstance(basis, Hadamard) else basis
    assert matrix.shape == (width, width)
    assert matrix.dtype == torch.float32
    torch.testing.assert_close(matrix.norm(dim=0), torch.ones(width))


@pytest.mark.parametrize(
    ("kind", "width"),
    [*[("orthogonal", w) for w in (1, 2, 3, 17, 128)], *[("hadamard", w) for w in (1, 2, 64)]],
)
def test_orthogonal(kind: str, width: int) -> None:
    basis = random_basis(width, kind)
    matrix = (basis.matrix() if isinstance(basis, Hadamard) else basis).double()
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(width).double(), rtol=0, atol=2e-6)


def test_normalized_is_not_orthogonal() -> None:
    matrix = random_basis(8, "normalized")
    assert (matrix.T @ matrix - torch.eye(8)).abs().max() > 0.1


@pytest.mark.parametrize("kind", DENSE)
def test_columns_are_uniform_on_the_sphere(kind: str) -> None:
    # Archimedes: each coordinate of a uniform point of the sphere in three dimensions is uniform in [-1, 1].
    source = generator()
    entries = torch.stack([random_basis(3, kind, generator=source).flatten() for _ in range(1500)])
    for entry in entries.T:
        # Nine tests of a fixed seed. A QR without its signs corrected puts the diagonal on one side of 0.
        assert stats.kstest(entry.numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-3


def test_orthogonal_is_haar_on_both_components() -> None:
    source = generator()
    bases = torch.stack([random_basis(3, "orthogonal", generator=source) for _ in range(1500)])
    reflections = int((torch.linalg.det(bases) < 0).sum())
    assert stats.binomtest(reflections, 1500).pvalue > 1e-3
    # The trace of a Haar rotation in three dimensions is 1 + 2 cos(a) with a of density (1 - cos a) / pi; for a
    # reflection it is minus that.
    traces = bases.diagonal(dim1=1, dim2=2).sum(1) * torch.linalg.det(bases)
    angles = torch.acos(((traces.double() - 1) / 2).clamp(-1, 1))
    result = stats.kstest(angles.numpy(), lambda a: (a - torch.as_tensor(a).sin().numpy()) / torch.pi)
    assert result.pvalue > 1e-3


@pytest.mark.parametrize("kind", [*DENSE, "hadamard"])
def test_the_generator_governs(kind: str) -> None:
    def draw(**options: torch.Generator) -> Tensor:
        basis = random_basis(16, kind, **options)
        return basis.signs if isinstance(basis, Hadamard) else basis

    assert torch.equal(draw(generator=generator(3)), draw(generator=generator(3)))
    assert not torch.equal(draw(generator=generator(3)), draw(generator=generator(4)))
    torch.manual_seed(5)
    first, second = draw(), draw()
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(draw(), first)
    state = torch.get_rng_state()
    draw(generator=generator(3))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", [*DENSE, "hadamard"])
def test_device(kind: str) -> None:
    basis = random_basis(4, kind, device="meta")
    assert (basis.signs if isinstance(basis, Hadamard) else basis).device.type == "meta"


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8, 12, 31, 32, 33])
def test_hadamard_is_scipys(width: int) -> None:
    basis = random_basis(width, "hadamard", generator=generator())
    assert set(basis.signs.tolist()) <= {-1.0, 1.0}
    size = 1
    while size < width:
        size *= 2
    block = torch.from_numpy(hadamard(size)[:width, :width]).double()
    expected = block * basis.signs.double() / width**0.5
    torch.testing.assert_close(basis.matrix().double(), expected)
    noise = torch.randn(7, width, dtype=torch.float64)
    torch.testing.assert_close(apply_basis(noise, basis), noise @ expected.T)


def test_hadamard_signs_are_fair() -> None:
    signs = random_basis(10_000, "hadamard", generator=generator()).signs
    assert stats.binomtest(int((signs > 0).sum()), 10_000).pvalue > 1e-3


@pytest.mark.parametrize("size", [1, 2, 4, 64])
def test_hadamard_transform(size: int) -> None:
    x = torch.randn(5, size, dtype=torch.float64)
    torch.testing.assert_close(hadamard_transform(x), x @ torch.from_numpy(hadamard(size)).double())
    assert hadamard_transform(x[:0]).shape == (0, size)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("width", [65536, 65537])
def test_wide_hadamard_forms_no_matrix(width: int) -> None:
    # A dense one would hold 16 GiB.
    basis = random_basis(width, "hadamard")
    noise = torch.randn(2, width)
    moved = apply_basis(noise, basis)
    assert moved.shape == noise.shape
    # Column j of the basis: its entries are +-1 / sqrt(Q), so its norm is 1.
    one = torch.zeros(1, width)
    one[0, 4242] = 1
    torch.testing.assert_close(apply_basis(one, basis).abs(), torch.full((1, width), width**-0.5))
    if width == 65536:
        torch.testing.assert_close(moved.norm(dim=1), noise.norm(dim=1))


@pytest.mark.parametrize("kind", DENSE)
def test_apply_dense(kind: str) -> None:
    basis = random_basis(6, kind)
    noise = torch.randn(4, 6, dtype=torch.float64)
    expected = [[sum(basis[q, j].item() * row[j].item() for j in range(6)) for q in range(6)] for row in noise]
    torch.testing.assert_close(apply_basis(noise, basis), torch.tensor(expected, dtype=torch.float64))


def test_apply_nothing() -> None:
    noise = torch.randn(4, 6)
    assert apply_basis(noise, None) is noise


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"width must be at least 1, got 0"):
        random_basis(0)
    with pytest.raises(ValueError, match=r"kind must be one of normalized, orthogonal, hadamard, got 'haar'"):
        random_basis(3, "haar")
