"""Streaming moments and the transform in the metric of the loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantcache.coding.allocation import Group, allocate
from quantcache.coding.codebook import gaussian_codebook
from quantcache.coding.spectral import METRIC_SHRINKAGE, Moments, klt, matrix_power, shrink, split_klt

HEADS, DIM = 3, 24
ROUNDING = 1e-12
"""Of float64 eigendecompositions of 24 dimensions and condition numbers up to 1e3: DIM * 1e3 * 2e-16, relative."""


def spread_matrix(seed: int, low: float = 1e-2, high: float = 10.0) -> Tensor:
    """Random symmetric positive definite matrices with eigenvalues from ``low`` to ``high``."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(HEADS, DIM, DIM, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(float(torch.tensor(low).log10()), float(torch.tensor(high).log10()), DIM).double()
    return (vectors * values) @ vectors.transpose(-1, -2)


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Equal to rounding, relative to the largest entry of each matrix."""
    scale = expected.abs().amax(dim=(-1, -2), keepdim=True) if expected.ndim > 2 else expected.abs().max()
    assert ((found - expected).abs() <= ROUNDING * scale).all()


def rate_distortion(spectrum: Tensor, bits: float) -> float:
    """Least cost of coding one head's coefficients at a mean width."""
    groups = [Group(float(variance), 1) for variance in spectrum]
    widths = allocate(groups, bits)
    return sum(g.weight * gaussian_codebook(w).distortion for g, w in zip(groups, widths, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moments_of_a_stream_are_those_of_the_whole(dtype: torch.dtype) -> None:
    x = (torch.randn(HEADS, 500, DIM) * 3 + 7).to(dtype)
    stream, whole = Moments(HEADS, DIM), Moments(HEADS, DIM)
    for chunk in x.split((1, 63, 200, 236), dim=1):
        stream.add(chunk)
    whole.add(x)
    assert stream.count == whole.count == 500
    assert_near(stream.mean, whole.mean)
    assert_near(stream.second_moment, whole.second_moment)
    exact = x.double()
    mean = exact.mean(1)
    centred = exact - mean[:, None]
    assert_near(whole.mean, mean)
    assert_near(whole.second_moment, exact.transpose(1, 2) @ exact / 500)
    # The covariance is a difference of numbers up to 100 times its size.
    assert_near(whole.covariance / 100, centred.transpose(1, 2) @ centred / 500 / 100)


def test_moments_take_no_more_memory_for_more_tokens() -> None:
    moments = Moments(HEADS, DIM)
    before = {name: t.nbytes for name, t in vars(moments).items() if isinstance(t, Tensor)}
    moments.add(torch.randn(HEADS, 1000, DIM))
    assert {name: t.nbytes for name, t in vars(moments).items() if isinstance(t, Tensor)} == before


def test_moments_of_nothing_are_zero() -> None:
    moments = Moments(HEADS, DIM)
    assert not moments.mean.any()
    assert not moments.covariance.any()


@pytest.mark.parametrize("exponent", [0.5, -0.5, -1.0])
def test_matrix_power(exponent: float) -> None:
    matrix = spread_matrix(1)
    power = matrix_power(matrix, exponent)
    assert_near(power, power.transpose(-1, -2))
    inverse = matrix_power(matrix, -exponent)
    assert_near(power @ inverse, torch.eye(DIM, dtype=torch.float64).expand(HEADS, -1, -1))
    if exponent == 0.5:
        assert_near(power @ power, matrix)


def test_shrink_adds_a_share_of_the_mean_eigenvalue() -> None:
    matrix = spread_matrix(2)
    before, after = torch.linalg.eigvalsh(matrix), torch.linalg.eigvalsh(shrink(matrix, 0.1))
    assert_near(after, before + 0.1 * before.mean(-1, keepdim=True))
    assert torch.equal(shrink(matrix, 0.0), matrix)


@pytest.mark.parametrize("rounding", [0.0, 1e-20, -1e-20])
def test_what_is_nothing_becomes_little_of_the_identity(rounding: float) -> None:
    """It was the identity itself, beside which all that is measured in other units may be next to nothing."""
    eye = torch.eye(DIM, dtype=torch.float64)
    matrix = 1e-4 * spread_matrix(2)
    matrix[0] = rounding
    found = shrink(matrix, 0.1)
    assert torch.equal(found[1:], shrink(matrix[1:], 0.1))
    assert 0 < float(found[0, 0, 0]) < 1e-8 * float(matrix[1:].diagonal(dim1=-2, dim2=-1).mean(-1).max())
    for each in (found[0], *shrink(torch.zeros_like(matrix), 0.1)):
        assert torch.equal(each, each[0, 0] * eye)
        assert 0 < float(each[0, 0]) < 1e-12


def test_klt_decorrelates() -> None:
    covariance, metric = spread_matrix(3), spread_matrix(4)
    transform = klt(covariance, metric)
    analysis = transform.analysis
    assert_near(analysis @ covariance @ analysis.transpose(-1, -2), torch.diag_embed(transform.spectrum))
    assert (transform.spectrum.diff(dim=-1) <= 0).all()
    assert (transform.spectrum >= 0).all()


def test_squared_error_in_coefficients_is_the_metric() -> None:
    covariance, metric = spread_matrix(3), spread_matrix(4)
    analysis = klt(covariance, metric).analysis
    assert_near(analysis.transpose(-1, -2) @ analysis, shrink(metric, METRIC_SHRINKAGE))
    exact = klt(covariance, metric, shrinkage=0.0).analysis
    assert_near(exact.transpose(-1, -2) @ exact, metric)


def test_klt_of_the_identity_metric_is_orthogonal() -> None:
    covariance = spread_matrix(3)
    eye = torch.eye(DIM, dtype=torch.float64).expand(HEADS, -1, -1)
    transform = klt(covariance, eye, shrinkage=0.0)
    assert_near(transform.analysis @ transform.analysis.transpose(-1, -2), eye)
    assert_near(transform.spectrum, torch.linalg.eigvalsh(covariance).flip(-1))


@pytest.mark.parametrize("bits", [1.0, 2.0, 3.0, 4.0])
def test_less_weighted_distortion_than_other_transforms(bits: float) -> None:
    covariance, metric = spread_matrix(3), spread_matrix(4)
    ours = klt(covariance, metric, shrinkage=0.0).spectrum
    # An independent error of variance d in dimension i costs M_ii d; the plain KLT likewise, in its own coordinates.
    identity = metric.diagonal(dim1=-2, dim2=-1) * covariance.diagonal(dim1=-2, dim2=-1)
    values, vectors = torch.linalg.eigh(covariance)
    plain = values * (vectors.transpose(-1, -2) @ metric @ vectors).diagonal(dim1=-2, dim2=-1)
    for head in range(HEADS):
        cost = rate_distortion(ours[head], bits)
        assert cost < rate_distortion(identity[head], bits)
        assert cost < rate_distortion(plain[head], bits)


def test_split_klt_is_block_diagonal() -> None:
    covariance, metric = spread_matrix(5), spread_matrix(6)
    parts = (16, 0, 8)
    transform = split_klt(covariance, metric, parts, METRIC_SHRINKAGE)
    assert not transform.analysis[:, :16, 16:].any()
    assert not transform.analysis[:, 16:, :16].any()
    for part in (slice(0, 16), slice(16, 24)):
        alone = klt(covariance[:, part, part], metric[:, part, part])
        assert_near(transform.analysis[:, part, part], alone.analysis)
        assert_near(transform.spectrum[:, part], alone.spectrum)
        assert (transform.spectrum[:, part].diff(dim=-1) <= 0).all()


def test_signs_do_not_depend_on_the_eigensolver(monkeypatch: pytest.MonkeyPatch) -> None:
    covariance, metric = spread_matrix(7), spread_matrix(8)
    expected = klt(covariance, metric)
    eigh = torch.linalg.eigh

    def flipped(matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = eigh(matrix)
        return values, vectors * torch.where(torch.arange(DIM) % 3 == 0, -1.0, 1.0).double()

    monkeypatch.setattr(torch.linalg, "eigh", flipped)
    assert_near(klt(covariance, metric).analysis, expected.analysis)


def test_equal_moments_give_equal_transforms() -> None:
    first, second = (klt(spread_matrix(7), spread_matrix(8)) for _ in range(2))
    assert torch.equal(first.analysis, second.analysis)
    assert torch.equal(first.spectrum, second.spectrum)


def test_singular_covariance_and_metric() -> None:
    direction = torch.randn(HEADS, DIM, 1, dtype=torch.float64)
    flat = direction @ direction.transpose(-1, -2)
    transform = klt(flat, flat)
    assert torch.isfinite(transform.analysis).all()
    assert (transform.spectrum >= 0).all()
    assert torch.linalg.cond(transform.analysis).max() < 1e3
