"""Factorizations of stacks of matrices, one matrix at a time, each verified against its definition.

What LAPACK returns cannot be taken on trust: once ``torch.set_num_threads`` has been called, torch 2.13 inverts a
stack of matrices of 160 and more wrongly on the CPU, mostly without an error. One matrix at a time is right, and there
are only as many as there are heads.

Shapes: D dimension; ``...`` any leading dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from quantcache.common.ambient import without_autocast
from quantcache.common.errors import QuantCacheError


def _each(matrices: Tensor, name: str, factorize: Callable[[Tensor], tuple[Tensor, ...]]) -> Iterator[Tensor]:
    """Factorize every matrix of a stack; yields each factor, stacked."""
    flat = matrices.reshape(math.prod(matrices.shape[:-2]), *matrices.shape[-2:])
    found = []
    for index, matrix in enumerate(flat):
        try:
            found.append(factorize(matrix))
        except torch.linalg.LinAlgError as error:
            raise QuantCacheError(f"{name}: matrix {index} of {len(flat)} cannot be factorized: {error}") from error
    for factors in zip(*found, strict=True):
        yield torch.stack(factors).reshape(*matrices.shape[:-2], *factors[0].shape)


def _require(residual: Tensor, dtype: torch.dtype, name: str, identity: str) -> None:
    """Refuse factors whose defining identity is broken; ``residual`` is relative, one for each matrix or column."""
    # Half the digits: far above what rounding leaves of an identity, far below what a wrong result does.
    _compare(residual, float(torch.finfo(dtype).eps ** 0.5), f"{name}: {identity}")


def _compare(residual: Tensor, bound: float, identity: str) -> None:
    if not bool((residual <= bound).all()):  # NaN is refused as well
        raise QuantCacheError(
            f"{identity} is violated by {float(residual.max()):.1e}, rounding explains {bound:.1e}: the linear algebra "
            "library returned a wrong result"
        )


@without_autocast
def require_product(left: Tensor, right: Tensor, diagonal: Tensor, identity: str) -> None:
    """Refuse a matrix that is not what its product with another says, by more than its own rounding to float32 can.

    Args:
        left: ``[..., D, D]`` float64 on the CPU.
        right: ``[..., D, D]`` float32 on any device.
        diagonal: What the product must be, ``[..., D]`` float64 on the CPU.
        identity: The identity, for the message.

    Raises:
        QuantCacheError: The identity does not hold.
    """
    bound = torch.finfo(torch.float32).eps  # twice what rounding to the nearest does
    _compare(product_residual(left, right.cpu().double(), diagonal), bound, f"{identity} on {right.device}")


@without_autocast
def product_residual(left: Tensor, right: Tensor, diagonal: Tensor) -> Tensor:
    """How far a product is from a diagonal matrix, in units of what rounding the right factor can do.

    Args:
        left: ``[..., D, D]`` float64.
        right: ``[..., D, D]`` float64.
        diagonal: What the product should be, ``[..., D]`` float64.

    Returns:
        ``‖left right_j - diagonal_j e_j‖ / ‖|left| |right_j|‖`` of every column j, ``[..., D]``.
    """
    off = (left @ right - torch.diag_embed(diagonal)).norm(dim=-2)
    relative: Tensor = off / (left.abs() @ right.abs()).norm(dim=-2)
    return relative


@without_autocast
def inverse(matrices: Tensor, name: str = "inverse") -> Tensor:
    """Inverses of square matrices.

    Args:
        matrices: ``[..., D, D]`` float64.
        name: What they are, for messages.

    Returns:
        ``[..., D, D]``.

    Raises:
        QuantCacheError: A matrix is singular, or an inverse is wrong.
    """
    (inverted,) = _each(matrices, name, lambda matrix: (torch.linalg.inv(matrix),))
    ones = torch.ones_like(matrices.diagonal(dim1=-2, dim2=-1))
    _require(product_residual(matrices, inverted, ones), matrices.dtype, name, "A A⁻¹ = 1")
    return inverted


@without_autocast
def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of symmetric matrices.

    Args:
        matrices: ``[..., D, D]``.

    Returns:
        Values ``[..., D]``, ascending, and vectors as columns ``[..., D, D]``.

    Raises:
        QuantCacheError: The values do not converge, or the vectors are wrong.
    """
    values, vectors = _each(matrices, "eigenvectors", lambda matrix: tuple(torch.linalg.eigh(matrix)))
    size = matrices.norm(dim=(-2, -1)).clamp_min(torch.finfo(matrices.dtype).tiny)
    off = (matrices @ vectors - vectors * values.unsqueeze(-2)).norm(dim=(-2, -1))
    _require(off / size, matrices.dtype, "eigenvectors", "M V = V Λ")
    _require(_skew(vectors), matrices.dtype, "eigenvectors", "Vᵀ V = 1")
    return values, vectors


@without_autocast
def qr(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Orthogonal and triangular factors.

    Args:
        matrices: ``[..., D, D]``.

    Returns:
        Q and R, ``[..., D, D]`` each.

    Raises:
        QuantCacheError: The factors are wrong.
    """
    orthogonal, triangular = _each(matrices, "QR", lambda matrix: tuple(torch.linalg.qr(matrix)))
    size = matrices.norm(dim=(-2, -1)).clamp_min(torch.finfo(matrices.dtype).tiny)
    _require((orthogonal @ triangular - matrices).norm(dim=(-2, -1)) / size, matrices.dtype, "QR", "Q R = A")
    _require(_skew(orthogonal), matrices.dtype, "QR", "Qᵀ Q = 1")
    return orthogonal, triangular


@without_autocast
def singular_values(matrices: Tensor, name: str = "singular values") -> Tensor:
    """Singular values, descending; the last is zero for a singular matrix.

    Args:
        matrices: ``[..., D, D]``.
        name: What they are, for messages.

    Returns:
        ``[..., D]``.

    Raises:
        QuantCacheError: The singular values are wrong.
    """
    (values,) = _each(matrices, name, lambda matrix: (torch.linalg.svdvals(matrix),))
    size = matrices.norm(dim=(-2, -1))
    off = (values.norm(dim=-1) - size).abs() / size.clamp_min(torch.finfo(matrices.dtype).tiny)
    _require(off, matrices.dtype, name, "Σ s² = ‖A‖²")
    return values


def _skew(vectors: Tensor) -> Tensor:
    """How far columns are from orthonormal, relative, one for each matrix."""
    eye = torch.eye(vectors.shape[-1], dtype=vectors.dtype, device=vectors.device)
    skew: Tensor = (vectors.transpose(-1, -2) @ vectors - eye).norm(dim=(-2, -1)) / max(vectors.shape[-1], 1) ** 0.5
    return skew


def is_diagonal(matrices: Tensor) -> bool:
    """Whether square matrices ``[..., D, D]`` have nothing off their diagonals."""
    return not bool((matrices - torch.diag_embed(matrices.diagonal(dim1=-2, dim2=-1))).any())
