"""KVarN, vLLM's int4 and llama.cpp's formats: each against a few lines of numpy, and through whole caches."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from builders import llama_config
from torch import Tensor

from quantcache.accounting.measuring import measure
from quantcache.cache.spectral_cache import BlockCache
from quantcache.evaluation.methods import parse_methods
from quantcache.evaluation.methods.base import SimulatedCodec, hadamard
from quantcache.evaluation.methods.kvarn import KVarNCodec, level
from quantcache.evaluation.methods.rotated import GgmlCodec, Int4TokenHeadCodec
from quantcache.planning import formats
from quantcache.planning.geometry import read_geometry
from quantcache.planning.memory import cache_memory, largest_cache
from tests.helpers import few

DIM = 64
CONFIG = llama_config(head_dim=DIM, layers=1, kv_heads=2)


def outliers(*shape: int, seed: int = 0) -> Tensor:
    """Gaussians with channels and tokens of several sizes, as keys have them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    x *= 1 + 9 * torch.rand(shape[-1], generator=generator) ** 4
    return 3 * x * (0.5 + torch.rand(shape[-2], 1, generator=generator)) + torch.randn(shape[-1], generator=generator)


def sylvester(size: int) -> np.ndarray:
    """An orthonormal Hadamard matrix by the parity of shared bits."""
    numbers = np.arange(size)
    odd = np.vectorize(lambda pair: bin(pair).count("1") % 2)(numbers[:, None] & numbers)
    return (1 - 2 * odd) / np.sqrt(size)


# ---------------------------------------------------------------------- KVarN


def kvarn_by_hand(matrix: np.ndarray, bits: int) -> np.ndarray:
    """One tile of rotated tokens, ``[R, C]``, coded by row, as the released code does it."""

    def apart(m: np.ndarray) -> float:
        return sum(s.max() / s.min() for s in (m.std(0, ddof=1), m.std(1, ddof=1)))

    rows, columns = np.zeros((len(matrix), 1)), np.zeros((1, matrix.shape[1]))
    best, kept = apart(matrix), (rows, columns)
    for _ in range(16):
        columns = np.clip(columns + np.log((matrix / np.exp(rows + columns)).std(0, ddof=1)), -0.3, 10)
        rows = np.clip(rows + np.log((matrix / np.exp(rows + columns)).std(1, ddof=1))[:, None], -0.3, 10)
        if (now := apart(matrix / np.exp(rows + columns))) <= best:
            best, kept = now, (rows, columns)
    own, other = np.exp(kept[0]), np.exp(kept[1])
    even = matrix / own / other
    low, step = even.min(1, keepdims=True), np.ptp(even, 1)[:, None] / (2**bits - 1)
    codes = np.rint((even - low) / step)
    half = [part.astype(np.float16).astype(np.float64) for part in (own * step, own * low, other)]
    return (codes * half[0] + half[1]) * half[2]


@pytest.mark.parametrize(
    ("side", "tile", "bits"), [("key", 64, 4), ("key", 128, 2), ("value", 64, 2), ("value", 128, 3)]
)
def test_kvarn_is_its_formula(side: str, tile: int, bits: int) -> None:
    x = outliers(1, 2, 128, DIM, seed=tile + bits)
    turn = sylvester(DIM)
    found = KVarNCodec(side, DIM, bits, tile).reconstruct(x)
    expected = torch.empty_like(x)
    for head in range(2):
        for first in range(0, 128, tile):
            turned = x[0, head, first : first + tile].double().numpy() @ turn
            back = kvarn_by_hand(turned.T, bits).T if side == "key" else kvarn_by_hand(turned, bits)
            expected[0, head, first : first + tile] = torch.from_numpy(back @ turn.T)
    # A code that lies between two levels may go either way in float32; it touches one token of a channel, or all of it.
    apart = (found - expected).norm() / (found - x).norm()
    assert float(apart) < 0.02
    torch.testing.assert_close((found - x).norm(), (expected - x).norm(), rtol=1e-3, atol=0)


def test_kvarn_levels_what_it_can() -> None:
    x = 5 * outliers(3, 64, 128, seed=1)
    rows, columns = level(x)
    assert (rows.shape, columns.shape) == ((3, 64, 1), (3, 1, 128))
    even = x / rows / columns
    for dim in (-1, -2):
        assert float(x.std(dim).amax() / x.std(dim).amin()) > 3
        assert float(even.std(dim).amax() / even.std(dim).amin()) < 1.02
    # What is level already is best left as it is: no later round is closer than the first.
    rows, columns = level(torch.eye(4)[None] * 0.1)
    assert torch.equal(rows, rows[:, :1].expand_as(rows))


def test_kvarn_survives_constant_tiles() -> None:
    for side in ("key", "value"):
        for value in (0.0, 2.0):
            x = torch.full((1, 1, 64, DIM), value)
            torch.testing.assert_close(KVarNCodec(side, DIM, 2, 64).reconstruct(x), x, rtol=2e-3, atol=1e-3)


# ---------------------------------------------------------------------- int4, q4_0, q8_0


def test_int4_is_its_formula() -> None:
    x = outliers(1, 2, 16, DIM, seed=2)
    codec = Int4TokenHeadCodec(DIM)
    turn = codec.rotation.double().numpy()
    np.testing.assert_allclose(turn @ turn.T, np.eye(DIM), atol=1e-6)
    np.testing.assert_allclose(np.abs(turn), DIM**-0.5, rtol=1e-6)
    found = codec.reconstruct(x)
    for head in range(2):
        for token in range(16):
            turned = x[0, head, token].double().numpy() @ turn
            step = np.ptp(turned) / 15
            zero = np.clip(np.rint(-turned.min() / step), 0, 15)
            back = (np.clip(np.rint(turned / step + zero), 0, 15) - zero) * step @ turn.T
            np.testing.assert_allclose(found[0, head, token].numpy(), back, rtol=0, atol=2e-5 * np.abs(turned).max())


def q4_0(block: np.ndarray) -> np.ndarray:
    """ggml's reference, number by number."""
    scale = max(block, key=abs) / -8
    codes = [min(15, int(value / scale + 8.5)) - 8 for value in block]
    return np.array(codes) * float(np.float16(scale))


def q8_0(block: np.ndarray) -> np.ndarray:
    scale = np.abs(block).max() / 127
    return np.rint(block / scale) * float(np.float16(scale))


@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize(("bits", "by_hand"), [(4, q4_0), (8, q8_0)])
@pytest.mark.parametrize("side", ["key", "value"])
def test_llama_cpp_formats_are_their_formula(
    side: str, bits: int, by_hand: Callable[[np.ndarray], np.ndarray], dim: int
) -> None:
    x = outliers(1, 1, 8, dim, seed=3)
    size = dim if side == "key" else 64
    turn = np.eye(dim) if dim % 64 else np.kron(np.eye(dim // size), sylvester(size))
    found = GgmlCodec(side, dim, bits).reconstruct(x)
    for token in range(8):
        turned = x[0, 0, token].double().numpy() @ turn
        back = np.concatenate([by_hand(block) for block in turned.reshape(-1, 32)]) @ turn.T
        np.testing.assert_allclose(found[0, 0, token].numpy(), back, rtol=0, atol=2e-5 * np.abs(turned).max())


def test_blocks_of_zeros_stay_zero() -> None:
    x = torch.zeros(1, 1, 64, DIM)
    for codec in (GgmlCodec("key", DIM, 4), GgmlCodec("value", DIM, 8), Int4TokenHeadCodec(DIM)):
        assert torch.equal(codec.reconstruct(x), x)


def test_rotation_helps_keys_with_large_channels() -> None:
    x = outliers(1, 1, 64, DIM, seed=4)
    x[..., 7] += 60

    def error(codec: SimulatedCodec) -> float:
        return float((codec.reconstruct(x) - x).square().mean())

    turned, plain = GgmlCodec("key", DIM, 4), GgmlCodec("key", DIM, 4)
    plain.rotation = torch.eye(DIM)
    assert error(turned) < error(plain)
    assert torch.equal(turned.rotation, hadamard(DIM))


# ---------------------------------------------------------------------- whole caches

BITS = {
    "kvarn-k4v2-64": (4.75 + 2.75) / 2,
    "kvarn-k4v4-64": 4.75,
    "kvarn-k3v3-64": 3.75,
    "kvarn-k2v2-64": 2.75,
    "kvarn-k4v2-128": (4.5 + 2.625) / 2,
    "kvarn-k4v4-128": (4.5 + 4.625) / 2,
    "kvarn-k3v3-128": (3.5 + 3.625) / 2,
    "kvarn-k2v2-128": (2.5 + 2.625) / 2,
    "int4-token-head": 4.5,
    "q4_0": 4.5,
    "q8_0": 8.5,
}


def filled(name: str, x: Tensor, chunks: list[int], residual: int = 0) -> BlockCache:
    """A cache of a method, fed in chunks."""
    cache = parse_methods([name], CONFIG, None, 4, residual)[0].make_cache()
    assert isinstance(cache, BlockCache)
    for part in x.split(chunks, dim=2):
        cache.update(part, part.flip(-1), 0)
    cache.layers[0].flush()
    return cache


def keys_of(cache: BlockCache) -> Tensor:
    """What a cache has kept of the keys."""
    return cache.layers[0].snapshot().dense("key")


@pytest.mark.parametrize("name", BITS)
def test_sizes_are_exact(name: str) -> None:
    cache = filled(name, torch.randn(2, 2, 4 + 256 + 70, DIM), [330])
    memory = measure(cache)
    tile = 128 if name.endswith("128") else 64
    assert memory.encoded_elements == 2 * 2 * 2 * DIM * (326 // tile * tile)
    assert memory.bits_per_element == BITS[name]
    assert memory.codes == memory.encoded_elements * BITS[name] / 8
    form, known = formats.parse_format(name), read_geometry(CONFIG)
    assert formats.bits_per_element(form, known) == BITS[name]
    estimated = cache_memory(form, known, 330, 2, element_bytes=4, residual_length=0)
    assert (estimated.codes, estimated.residual) == (memory.codes, memory.residual)
    for tokens in (64, 140, 250, 330):
        assert cache_memory(form, known, tokens, 2).total <= largest_cache(form, known, tokens, 2)
    assert form.scheme.simulated
    assert not form.runs


@pytest.mark.parametrize(
    "name", few(["kvarn-k4v2-64", "kvarn-k2v2-128", "int4-token-head", "q4_0"], ["int4-token-head", "q4_0"])
)
def test_chunks_make_no_difference(name: str) -> None:
    x = outliers(2, 2, 400, DIM, seed=5)
    whole = filled(name, x, [400], residual=16).layers[0]
    for chunks in ([1] * 400, [4, 64, 64, 128, 140], [399, 1], [131, 269]):
        parts = filled(name, x, chunks, residual=16).layers[0]
        assert [span.length for span in parts.spans] == [span.length for span in whole.spans]
        for side in ("key", "value"):
            assert torch.equal(parts.snapshot().dense(side), whole.snapshot().dense(side))


@pytest.mark.parametrize("name", ["kvarn-k4v4-64", "kvarn-k4v4-128", "q8_0"])
def test_crop_and_reorder_keep_the_codes(name: str) -> None:
    x = outliers(2, 2, 300, DIM, seed=6)
    cache = filled(name, x, [300])
    before = keys_of(cache).clone()
    twin = copy.deepcopy(cache)
    cache.crop(-110)  # within a block, and within a tile of 128
    assert torch.equal(keys_of(cache), before[:, :, :190])
    cache.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(keys_of(cache), before[[1, 1], :, :190])
    # What comes after makes tiles of its own, as in a copy that was treated alike.
    twin.crop(-110)
    twin.reorder_cache(torch.tensor([1, 1]))
    new = outliers(2, 2, 150, DIM, seed=7)
    cache.update(new, new, 0)
    for part in new.split([50, 100], dim=2):
        twin.update(part, part, 0)
    for one in (cache, twin):
        one.layers[0].flush()
    assert len(cache.layers[0].spans) == 3 + 2
    assert torch.equal(keys_of(cache), keys_of(twin))
    assert torch.equal(keys_of(cache)[:, :, :190], before[[1, 1], :, :190])


def test_blocks_at_once_are_checked() -> None:
    for number in (0, 1.5):
        with pytest.raises(ValueError, match=f"blocks_at_once must be a whole number from 1 up, got {number}"):
            BlockCache(CONFIG, lambda index: (lambda *_: {}, None), blocks_at_once=number)


@pytest.mark.parametrize("name", ["kvarn-k3v3-64", "kvarn-k3v3-128", "int4-token-head", "q4_0", "q8_0"])
def test_odd_dimensions_are_coded(name: str) -> None:
    config = llama_config(head_dim=80, layers=1, kv_heads=2)
    cache = parse_methods([name], config, None, 4, 0)[0].make_cache()
    x = outliers(1, 2, 132, 80, seed=8)
    cache.update(x, x, 0)
    cache.layers[0].flush()
    error = (keys_of(cache) - x)[:, :, 4:].square().mean() / x.square().mean()
    assert 0 < float(error) < 0.05
    form, side = formats.parse_format(name), cache.layers[0].codecs
    assert {s: c.bits for s, c in side.items()} == {s: form.scheme.bits(form.bits, s, 80) for s in side}
