"""Streaming second moments and the loss-aware Karhunen-Loève transform."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantcache.coding import linalg

METRIC_SHRINKAGE = 0.02
"""Share of isotropic metric mixed in: a metric of few samples over-concentrates at low rates."""

NEGLIGIBLE = 1e-9
"""Variance of a head that never varies, and metric of one that the loss does not see, in terms of the side's largest.

Not nothing, since a transform has an inverse, and so little that it takes no bits from anything else.
"""

NOTHING = 1e-14
"""The same where it is so of all heads. Spectra as small as the product of two can be stored."""


class Moments:
    """Count, mean and second moment of a stream of vectors per head, in memory independent of its length.

    Args:
        num_heads: Hkv; each head has moments of its own.
        dim: D, the dimension of the vectors.
        device: Where the sums are kept (float64).
    """

    def __init__(self, num_heads: int, dim: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.sum = torch.zeros(num_heads, dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(num_heads, dim, dim, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """Add vectors.

        Args:
            x: ``[Hkv, N, D]``.
        """
        x = x.to(device=self.sum.device, dtype=torch.float64)
        self.count += x.shape[1]
        self.sum += x.sum(1)
        self.outer += x.transpose(1, 2) @ x

    @property
    def mean(self) -> Tensor:
        """Mean vector of every head, ``[Hkv, D]``."""
        return self.sum / max(self.count, 1)

    @property
    def second_moment(self) -> Tensor:
        """E[x xᵀ] of every head, ``[Hkv, D, D]``."""
        return self.outer / max(self.count, 1)

    @property
    def covariance(self) -> Tensor:
        """E[(x - mean)(x - mean)ᵀ] of every head, ``[Hkv, D, D]``."""
        mean = self.mean
        return self.second_moment - mean.unsqueeze(-1) * mean.unsqueeze(-2)


@dataclass(frozen=True)
class Transform:
    """A biorthogonal analysis transform and the variances it produces.

    Attributes:
        analysis: A, ``[H, D, D]`` float64; coefficients are ``A (x - mean)``.
        spectrum: Variance of each coefficient, descending, ``[H, D]`` float64. Squared error in a coefficient costs
            one unit of the metric.
    """

    analysis: Tensor
    spectrum: Tensor


def shrink(matrix: Tensor, share: float) -> Tensor:
    """Add ``share`` of a matrix's mean eigenvalue to its diagonal.

    Args:
        matrix: Symmetric positive semi-definite, one of each head, ``[H, D, D]``.
        share: 0 leaves the matrix as it is.

    Returns:
        ``matrix + share * tr(matrix) / D * I``; where a trace is zero, or so small beside the largest of all that it is
        rounding, as small a multiple of the identity.
    """
    dim = matrix.shape[-1]
    level = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(dim, dtype=matrix.dtype, device=matrix.device)
    least = (NEGLIGIBLE * level.amax()).clamp_min(NOTHING)
    return torch.where(level > least, matrix + share * level * eye, least * eye)


def matrix_power(matrix: Tensor, exponent: float) -> Tensor:
    """Real power of symmetric positive definite matrices.

    Args:
        matrix: ``[..., D, D]`` float64.
        exponent: Such as 0.5 or -0.5.

    Returns:
        ``matrix ** exponent``, symmetric.
    """
    values, vectors = linalg.eigh(matrix)
    floor = values[..., -1:] * 1e-14
    powers: Tensor = (vectors * values.clamp_min(floor).pow(exponent).unsqueeze(-2)) @ vectors.transpose(-1, -2)
    return powers


def klt(covariance: Tensor, metric: Tensor, shrinkage: float = METRIC_SHRINKAGE) -> Transform:
    """The Karhunen-Loève transform in the metric of the loss.

    With M the metric and C = M^½ Σ M^½ = U Λ Uᵀ, the transform is A = Uᵀ M^½: its coefficients are uncorrelated with
    variances Λ, and a squared error in any of them costs the same loss. For M = I it is the ordinary KLT; for another M
    it is not orthogonal, and no orthogonal transform is optimal.

    Args:
        covariance: Σ, ``[H, D, D]`` float64.
        metric: M, ``[H, D, D]`` float64, in loss per squared unit of x.
        shrinkage: Share of isotropic metric added to M.

    Returns:
        The transform, coefficients in descending order of variance.
    """
    root = matrix_power(shrink(metric, shrinkage), 0.5)
    product = root @ covariance @ root
    # Where the metric hardly sees what varies most, rounding leaves the product less symmetric than it is.
    values, vectors = linalg.eigh((product + product.transpose(-1, -2)) / 2)
    values, vectors = values.flip(-1).clamp_min(0.0), vectors.flip(-1)
    # The sign of an eigenvector is arbitrary: fix it, so that equal moments give equal artifacts.
    rows = vectors.transpose(-1, -2)
    largest = rows.abs().argmax(-1, keepdim=True)
    rows = rows * rows.gather(-1, largest).sign()
    return Transform(rows @ root, values)


def split_klt(covariance: Tensor, metric: Tensor, parts: tuple[int, ...], shrinkage: float) -> Transform:
    """A block-diagonal :func:`klt`, one block for each part of the dimensions.

    Args:
        covariance: ``[H, D, D]`` float64.
        metric: ``[H, D, D]`` float64.
        parts: Sizes of the parts, summing to D (slow and fast dimensions of a key).
        shrinkage: As in :func:`klt`.

    Returns:
        The transform; the spectrum descends within each part.
    """
    analysis = torch.zeros_like(covariance)
    spectra = []
    offset = 0
    for size in parts:
        part = slice(offset, offset + size)
        if size:
            transform = klt(covariance[:, part, part], metric[:, part, part], shrinkage)
            analysis[:, part, part] = transform.analysis
            spectra.append(transform.spectrum)
        offset += size
    return Transform(analysis, torch.cat(spectra, dim=-1))
