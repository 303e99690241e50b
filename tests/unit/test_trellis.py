"""The trellis: its path is the best there is, and decoding by words is the convolution it is defined by."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from quantcache import Calibration, SpectralCache
from quantcache.backends import BackendName
from quantcache.coding.packing import BLOCK, pack, unpack
from quantcache.coding.schema import CodecSettings
from quantcache.coding.trellis import (
    CODES,
    branch_subsets,
    code_distortions,
    search,
    subset_words,
    subsets_of_path,
    union_levels,
)


@pytest.mark.parametrize("states", CODES)
@pytest.mark.parametrize("width", [1, 2, 3])
def test_no_path_is_better(states: int, width: int) -> None:
    generator = torch.Generator().manual_seed(10 * states + width)
    levels = torch.tensor(union_levels(width), dtype=torch.float32)
    tokens = 8
    values = 1.2 * torch.randn(20, tokens, generator=generator)
    weights = 0.1 + torch.rand(20, tokens, generator=generator)
    (path,) = search([values], [weights], [levels], states)
    every = torch.tensor(list(itertools.product((0, 1), repeat=tokens)), dtype=torch.uint8)
    subsets = subsets_of_path(every, states)  # [256, tokens]
    by_subset = torch.stack([(values[..., None] - levels[s::4]).square().amin(-1) * weights for s in range(4)])
    costs = by_subset.permute(1, 2, 0)[:, None].expand(-1, len(every), -1, -1)
    best = costs.gather(-1, subsets[None, :, :, None].expand(len(values), -1, -1, -1)).sum((-1, -2)).amin(-1)
    found = ((values - path.quantized).square() * weights).sum(-1)
    torch.testing.assert_close(found, best, rtol=1e-5, atol=1e-6)


@given(st.sampled_from(sorted(CODES)), st.integers(0, 2**32 - 1))
def test_words_are_the_convolution(states: int, seed: int) -> None:
    bits = torch.randint(0, 2, (3, BLOCK), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    c1, c0 = (unpack(plane, 1) for plane in subset_words(pack(bits, 1), states))
    assert torch.equal(2 * c1 + c0, subsets_of_path(bits, states).int())


@pytest.mark.parametrize("states", CODES)
def test_branches_are_the_convolution(states: int) -> None:
    bits = torch.randint(0, 2, (50,), generator=torch.Generator().manual_seed(states))
    state, subsets = 0, []
    for bit in bits.tolist():
        oldest, state = state // (states // 2), (2 * state + bit) % states
        subsets.append(int(branch_subsets(states)[state, oldest]))
    assert subsets == subsets_of_path(bits, states).tolist()


@pytest.mark.parametrize("width", range(1, 9))
def test_union_levels_ascend_and_are_symmetric(width: int) -> None:
    levels = torch.tensor(union_levels(width), dtype=torch.float64)
    assert len(levels) == 2 << width
    assert bool((levels.diff() > 0).all())
    torch.testing.assert_close(levels, -levels.flip(0))


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_the_distortion_is_what_is_recorded(width: int) -> None:
    values = torch.randn(4096, BLOCK, generator=torch.Generator().manual_seed(7))
    levels = torch.tensor(union_levels(width), dtype=torch.float32)
    (path,) = search([values], [torch.ones_like(values)], [levels])
    errors = (values - path.quantized).square().mean(-1)
    deviation = float(errors.std()) / len(errors) ** 0.5
    assert abs(float(errors.mean()) - code_distortions("trellis")[width]) < 5 * deviation


def _error(cache: SpectralCache, keys: torch.Tensor, values: torch.Tensor) -> float:
    layer = cache.spectral_layers[0]
    layer.update(keys, values)
    layer.flush()
    view = layer.snapshot()
    return float((view.dense("key") - keys).square().mean() + (view.dense("value") - values).square().mean())


def test_a_calibration_serves_both_codings(tmp_path: Path) -> None:
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=32, hidden_size=64)
    trellis = Calibration.synthetic(config, 3.0)
    scalar = trellis.with_coding("scalar")
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, 2, 4 + 64 * 4, 32, generator=generator)
    errors = [_error(SpectralCache(each, config, residual_length=0), keys, values) for each in (scalar, trellis)]
    assert errors[1] < 0.85 * errors[0]
    sizes = [
        sum(int(layer.side(s).widths.sum()) for s in ("key", "value"))
        for layer in (scalar.layers[0], trellis.layers[0])
    ]
    assert sizes[0] == sizes[1]
    trellis.save_pretrained(tmp_path)
    assert Calibration.from_pretrained(tmp_path).metadata.codec.coding == "trellis"
    assert trellis.with_coding("scalar").metadata.codec == CodecSettings(coding="scalar")
    with pytest.raises(ValueError, match="coding must be one of scalar, trellis, got 'turbo'"):
        scalar.with_coding("turbo")  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [2.0, 3.0, 4.0])
def test_every_pass_lessens_the_error(bits: float) -> None:
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=32, hidden_size=64)
    calibration = Calibration.synthetic(config, bits)
    keys, values = torch.randn(2, 1, 2, 4 + 64 * 8, 32, generator=torch.Generator().manual_seed(3))
    codings = [calibration.with_coding("trellis", passes) for passes in (1, 2, 3)]
    errors = [_error(SpectralCache(coding, config, residual_length=0), keys, values) for coding in codings]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("passes", [0, 9, -1])
def test_passes_out_of_range(passes: int) -> None:
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=32, hidden_size=32)
    with pytest.raises(ValueError, match=f"passes must be an integer from 1 to 8, got {passes}"):
        Calibration.synthetic(config, 3.0).with_coding("trellis", passes)


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("cuts", [(64, 64, 64), (1, 63, 128), (100, 50, 42), (192,)])
def test_codes_do_not_depend_on_how_tokens_arrive(cuts: tuple[int, ...], backend: BackendName) -> None:
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=32, hidden_size=32)
    calibration = Calibration.synthetic(config, 2.5).with_coding("trellis", 1 + len(cuts) % 2)
    keys, values = torch.randn(2, 2, 1, 192, 32, generator=torch.Generator().manual_seed(1))
    fields = []
    for sizes in ((192,), cuts):
        cache = SpectralCache(calibration, config, residual_length=0, sink_length=0, backend=backend)
        layer = cache.spectral_layers[0]
        for piece in zip(keys.split(sizes, dim=2), values.split(sizes, dim=2), strict=True):
            layer.update(*piece)
            layer.flush()
        fields.append({side: store.slice(0, store.count) for side, store in layer.stores.items()})
    for side in ("key", "value"):
        for name in ("codes", "gains"):
            assert torch.equal(fields[0][side][name], fields[1][side][name])
