"""The splits of a context merged by the CUDA kernel, on an emulated warp."""

from __future__ import annotations

import math

import pytest
import torch

from quantcache_kernels.cuda.structures import MergeArguments, Rows, pointer
from tests.kernels import emulation

pytestmark = pytest.mark.skipif(emulation.COMPILER is None, reason="no C++ compiler here")


@pytest.mark.parametrize("dense_splits", [0, 2])
def test_more_splits_than_the_merge_has_threads(dense_splits: int) -> None:
    batch, heads, rows, dim, coefficients, splits = 2, 2, 3, 16, 32, 150
    lines = batch * heads
    drawn = torch.Generator().manual_seed(0)
    partial = torch.randn(splits, lines, rows, coefficients, generator=drawn)
    peaks = 4 * torch.randn(splits, lines, rows, generator=drawn)
    sums = torch.rand(splits, lines, rows, generator=drawn)
    sums[:, 1] = 0  # a line that sees no block
    peaks[:, 1] = -1e30
    partial[:, 1] = 0
    dense = torch.randn(dense_splits, lines, rows, dim, generator=drawn)
    dense_lse = torch.randn(dense_splits, lines, rows, generator=drawn) + 6
    decoder, mean = (torch.randn(heads, *shape, generator=drawn) for shape in ((coefficients, dim), (dim,)))
    stats, out = torch.stack((peaks, sums), dim=-1), torch.full((batch, 1, heads * rows, dim), torch.nan)
    call = MergeArguments(
        *map(pointer, (partial, stats, dense, dense_lse, decoder, mean, out)), None,
        Rows(heads, 1, rows, 1, rows), lines, dim, coefficients, splits, dense_splits, 0,
    )  # fmt: skip
    assert splits > 4 * dim
    emulation.Emulated("merge", "scalar_scalar").launch((rows, lines), 4 * dim, call.shared_bytes, call, 0)

    weights = torch.exp2(peaks.double() - peaks.double().amax(0))
    total = (weights * sums).sum(0)
    vectors = (weights[..., None] * partial).sum(0) / total.clamp_min(1e-30)[..., None]
    of_line = torch.arange(lines) % heads
    coded = torch.einsum("lrc,lcd->lrd", vectors, decoder[of_line].double()) + mean[of_line].double()[:, None]
    coded_lse = (peaks.double().amax(0) + total.log2()).clamp_min(-1e30)
    shares = torch.softmax(torch.cat((coded_lse[None], dense_lse.double())) * math.log(2), dim=0)[..., None]
    expected = (shares * torch.cat((coded[None], dense.double()))).sum(0)
    torch.testing.assert_close(out.view(lines, rows, dim), expected.float(), atol=2e-5, rtol=2e-5)
