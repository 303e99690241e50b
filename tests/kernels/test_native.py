"""The CPU kernels against plain torch: no further from float64 than twice torch's own error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quantcache import backends
from quantcache.artifact import Calibration
from quantcache.attention import spectral_attention
from quantcache.cache import SpectralCache, SpectralLayer
from quantcache.codec import SpectralCodec
from quantcache_kernels import cpu
from tests.builders import llama_config
from tests.kernels import truth

pytestmark = pytest.mark.skipif(not cpu.available(), reason=f"no CPU kernels: {cpu.reason()}")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def calibration_for(head_dim: int, bits: float = 3.0) -> Calibration:
    """A synthetic calibration whose heads have widths of their own."""
    return Calibration.synthetic(llama_config(head_dim, layers=1), bits, seed=head_dim)


def filled_layer(
    head_dim: int,
    tokens: int,
    *,
    bits: float = 3.0,
    dtype: torch.dtype = torch.float32,
    pads: tuple[int, ...] = (0,),
    scale: float = 1.0,
    backend: backends.Backend = "torch",
) -> SpectralLayer:
    """A layer that holds some random tokens, encoded by plain torch unless told otherwise."""
    cache = SpectralCache(calibration_for(head_dim, bits), residual_length=0, backend=backend)
    layer = cache.spectral_layers[0]
    generator = torch.Generator().manual_seed(tokens)
    shape = (len(pads), 2, tokens, head_dim)
    layer.update(*(scale * torch.randn(shape, generator=generator).to(dtype) for _ in range(2)))
    layer.finish(causal_mask(tokens, tokens, pads) if any(pads) else None)
    return layer


def causal_mask(length: int, count: int, pads: tuple[int, ...]) -> Tensor:
    """The mask of the last ``count`` of ``length`` tokens over left-padded rows, ``[B, 1, count, length]``."""
    slots = torch.arange(length)
    mask = (slots <= torch.arange(length - count, length)[:, None]) & (slots >= torch.tensor(pads)[:, None, None])
    return mask[:, None]


def assert_near_truth(layer: SpectralLayer, groups: int, count: int, mask: Tensor | None = None, **more: Any) -> None:
    """Compare the kernel with plain torch and with float64."""
    view = layer.snapshot()
    batch, heads, _, dim = view.key.tail.shape
    query = torch.randn(batch, heads * groups, count, dim, generator=torch.Generator().manual_seed(groups))
    query = query.to(view.key.tail.dtype)
    expected = truth.attention(query, view, mask, **more)
    layer.backend = "torch"
    reference = spectral_attention(query, view, mask, **more)
    layer.backend = "native"
    found = spectral_attention(query, view, mask, **more)
    assert found.dtype == query.dtype
    own, theirs = ((output.double() - expected).norm() for output in (reference, found))
    assert theirs <= 2 * own + 1e-6 * expected.norm(), (float(theirs), float(own))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("groups", [1, 3, 4, 7, 8])
def test_native_attention(head_dim: int, groups: int) -> None:
    assert_near_truth(filled_layer(head_dim, 263), groups, 1)


@pytest.mark.parametrize("count", [1, 2, 5, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_attention_of_several_queries(dtype: torch.dtype, count: int) -> None:
    assert_near_truth(filled_layer(64, 300, dtype=dtype), 3, count)


@pytest.mark.parametrize("tokens", [68, 69, 127, 131, 132, 196, 1000])
def test_native_attention_over_lengths(tokens: int) -> None:
    assert_near_truth(filled_layer(64, tokens), 4, 1)


@pytest.mark.parametrize("bits", [0, 0.5, 1, 2, 4, 5, 6, 7, 8])
def test_native_attention_over_widths(bits: float) -> None:
    assert_near_truth(filled_layer(64, 200, bits=bits), 3, 2)


@pytest.mark.parametrize("count", [1, 4])
def test_native_attention_of_padded_rows(count: int) -> None:
    pads = (0, 5, 100, 199)
    assert_near_truth(filled_layer(64, 260, pads=pads), 3, count, causal_mask(260, count, pads))


def test_native_attention_with_holes_in_the_mask() -> None:
    mask = causal_mask(260, 3, (0, 0)) & (torch.rand(2, 1, 3, 260, generator=torch.Generator().manual_seed(1)) < 0.5)
    assert_near_truth(filled_layer(64, 260, pads=(0, 0)), 3, 3, mask)


def test_native_attention_over_cut_blocks() -> None:
    layer = filled_layer(64, 260)
    layer.crop(-30)
    layer.update(torch.randn(1, 2, 150, 64), torch.randn(1, 2, 150, 64))
    layer.finish()
    assert layer.cut
    assert_near_truth(layer, 3, 2)


def test_native_attention_with_soft_cap_and_sinks() -> None:
    assert_near_truth(filled_layer(128, 260), 4, 2, softcap=2.0, s_aux=torch.randn(8))


@pytest.mark.parametrize("scale", [1e4, 1e-6, 0.0])
def test_native_attention_at_magnitudes(scale: float) -> None:
    assert_near_truth(filled_layer(64, 260, scale=scale), 3, 1)


@pytest.mark.parametrize("threads", [1, 2])
def test_native_attention_on_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_near_truth(filled_layer(64, 1000), 3, 1)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_native_codes(head_dim: int, dtype: torch.dtype) -> None:
    assert_same_codes(*(filled_layer(head_dim, 332, dtype=dtype, backend=b) for b in ("torch", "native")))


@pytest.mark.parametrize("bits", [0.5, 1, 2, 4, 6, 8])
def test_native_codes_over_widths(bits: float) -> None:
    assert_same_codes(*(filled_layer(64, 332, bits=bits, backend=b) for b in ("torch", "native")))


@pytest.mark.parametrize("scale", [1e4, 1e-6, 0.0])
def test_native_codes_at_magnitudes(scale: float) -> None:
    assert_same_codes(*(filled_layer(64, 332, scale=scale, backend=b) for b in ("torch", "native")))


def test_native_codes_of_padded_rows() -> None:
    assert_same_codes(*(filled_layer(64, 332, pads=(0, 7, 150), backend=b) for b in ("torch", "native")))


def assert_same_codes(reference: SpectralLayer, found: SpectralLayer) -> None:
    """Codes are equal but for near-ties, which float32 rounding decides: what they decode to is equally far off.

    The two differ where a coefficient lies within rounding of a decision boundary, or two gain factors explain a token
    equally well; either choice then has the same error, so the errors are compared, and the ties counted.
    """
    for side in ("key", "value"):
        codec = reference.codecs[side]
        assert isinstance(codec, SpectralCodec)
        ours, theirs = (layer.stores[side].slice(0, layer.stores[side].count) for layer in (found, reference))
        different = (ours["gains"] != theirs["gains"]).double().mean()
        assert different <= 0.01, f"{float(different):.2%} of gains differ"
        same_token = (ours["gains"] == theirs["gains"]).unsqueeze(-2)
        apart = (codec.dequantize(ours) - codec.dequantize(theirs)).abs() * same_token
        ties = (apart > 1e-5 * apart.new_tensor(1.0)).double().mean()
        assert ties <= 2e-3, f"{float(ties):.2%} of codes differ"
