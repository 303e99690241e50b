"""Factorizations of stacks of matrices: right, and refused where LAPACK is not.

``tests/integration/test_threads.py`` runs these tests at other numbers of threads, where batched LAPACK calls fail.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quantcache.artifact.calibration import Calibration
from quantcache.cache.codecs import calibrated_codecs
from quantcache.coding import linalg
from quantcache.coding.codec import SpectralCodec
from quantcache.coding.rope import Rope
from quantcache.coding.schema import CodecSettings
from quantcache.common.errors import QuantCacheError
from tests.builders import gaussian_vectors, llama_config, random_side

SHAPES = ((2, 160), (8, 160), (2, 256), (3, 16))
shapes = pytest.mark.parametrize(("heads", "dim"), SHAPES, ids=lambda n: str(n))
UNIT = float(torch.finfo(torch.float64).eps)


def stack(heads: int, dim: int) -> Tensor:
    """Well-conditioned matrices ``[heads, dim, dim]``."""
    generator = torch.Generator().manual_seed(heads + dim)
    noise = torch.randn(heads, dim, dim, generator=generator, dtype=torch.float64)
    return torch.eye(dim, dtype=torch.float64) + noise / (4 * dim**0.5)


@shapes
def test_inverse(heads: int, dim: int) -> None:
    matrices = stack(heads, dim)
    found = linalg.inverse(matrices).numpy()
    for ours, matrix in zip(found, matrices.numpy(), strict=True):  # numpy has a LAPACK of its own
        assert np.abs(ours - np.linalg.inv(matrix)).max() <= dim * UNIT


@shapes
def test_eigenvectors(heads: int, dim: int) -> None:
    matrices = stack(heads, dim) @ stack(heads, dim).transpose(-1, -2)
    values, vectors = linalg.eigh(matrices)
    for ours, basis, matrix in zip(values.numpy(), vectors.numpy(), matrices.numpy(), strict=True):
        assert np.abs(ours - np.linalg.eigvalsh(matrix)).max() <= dim * UNIT * ours[-1]
        assert np.abs((basis * ours) @ basis.T - matrix).max() <= dim * UNIT * ours[-1]


@shapes
def test_qr_and_singular_values(heads: int, dim: int) -> None:
    matrices = stack(heads, dim)
    orthogonal, triangular = linalg.qr(matrices)
    assert float((orthogonal @ triangular - matrices).abs().max()) <= dim * UNIT
    assert not triangular.tril(-1).any()
    expected = torch.tensor([np.linalg.cond(matrix) for matrix in matrices.numpy()], dtype=torch.float64)
    values = linalg.singular_values(matrices)
    assert float((values[:, 0] / values[:, -1] / expected - 1).abs().max()) <= dim * UNIT * float(expected.max())


@shapes
def test_a_decoder_undoes_its_encoder(heads: int, dim: int) -> None:
    side = random_side(heads, dim, 8)
    codec = SpectralCodec(side, Rope(), CodecSettings(coding="scalar"))
    x = gaussian_vectors(side, 1, 64).float()
    block_table = torch.tensor([[0, 64, 0]], dtype=torch.int32)
    decoded = codec.decode(codec.encode(x, block_table, None), block_table, None)
    # An 8-bit code of every coefficient: what is lost is at most what the coefficients lose, in the transform's norm.
    lost = (side.analysis.double() @ (decoded - x).double().transpose(-1, -2)).square().mean()
    kept = (side.analysis.double() @ (x.double() - side.mean.double()[:, None]).transpose(-1, -2)).square().mean()
    assert float(lost / kept) < 1e-3


def test_single_matrices_and_deeper_stacks() -> None:
    matrices = stack(6, 16)
    assert torch.equal(linalg.inverse(matrices[0]), linalg.inverse(matrices)[0])
    assert torch.equal(linalg.inverse(matrices.view(2, 3, 16, 16)).view(6, 16, 16), linalg.inverse(matrices))
    assert linalg.singular_values(matrices.view(2, 3, 16, 16)).shape == (2, 3, 16)
    assert linalg.qr(matrices[:, :0, :0])[0].shape == linalg.inverse(matrices[:, :0, :0]).shape == (6, 0, 0)
    assert torch.equal(linalg.eigh(matrices[1] + matrices[1].T)[0], linalg.eigh(matrices + matrices.mT)[0][1])


@pytest.mark.parametrize("name", ["inv", "eigh", "qr", "svdvals"])
@pytest.mark.parametrize("wrong", [1e-6, 1e9, float("nan")])
def test_wrong_results_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, wrong: float) -> None:
    call: dict[str, Callable[[Tensor], Any]] = {
        "inv": linalg.inverse,
        "eigh": lambda m: linalg.eigh(m + m.transpose(-1, -2)),
        "qr": linalg.qr,
        "svdvals": linalg.singular_values,
    }
    right = getattr(torch.linalg, name)

    def spoilt(matrix: Tensor) -> Any:
        factors = right(matrix)
        first, *rest = factors if isinstance(factors, tuple) else (factors,)
        first = first.clone(memory_format=torch.contiguous_format)
        first.view(-1)[3] += wrong
        return (first, *rest) if rest else first

    call[name](stack(2, 16))
    monkeypatch.setattr(torch.linalg, name, spoilt)
    with pytest.raises(QuantCacheError, match=r"is violated by .*, rounding explains 1\.5e-08"):
        call[name](stack(2, 16))


def test_singular_matrices_are_named() -> None:
    matrices = stack(3, 16)
    matrices[1] = 0
    with pytest.raises(QuantCacheError, match="the map: matrix 1 of 3 cannot be factorized"):
        linalg.inverse(matrices, "the map")
    assert not linalg.singular_values(matrices)[1].any()


@pytest.mark.support("a linear algebra library that returns wrong results", refused=True)
@pytest.mark.parametrize("side", ["key", "value"])
def test_a_wrong_decoder_is_named(monkeypatch: pytest.MonkeyPatch, side: str) -> None:
    """By layer, side and residual, also where only the copy on the device is wrong."""
    calibration = Calibration.synthetic(llama_config(layers=3), 3.0)
    make, _ = calibrated_codecs(calibration, 2)
    tails = {name: torch.zeros(1, 2, 0, 64) for name in ("key", "value")}
    inverse = linalg.inverse

    def spoilt(matrices: Tensor, name: str) -> Tensor:
        found = inverse(matrices, name)
        if side in name:
            found[1, 5] *= 1 + 1e-4
        return found

    monkeypatch.setattr(linalg, "inverse", spoilt)
    message = re.escape(f"layer 2, {side}s: with A the transform and F its decoder, A F = σ on cpu is violated by")
    with pytest.raises(QuantCacheError, match=message + r" \d\.\de-0[456], rounding explains 1\.2e-07"):
        make(torch.device("cpu"), tails, None)
