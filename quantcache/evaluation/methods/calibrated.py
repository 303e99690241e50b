"""Rivals that are fitted to a calibration text: PCA water-filling, an OSCAR-like rotation, and rank reduction."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig

from quantcache.accounting.memory import DENSE_BITS
from quantcache.artifact import cache_layout
from quantcache.coding.allocation import Group, allocate
from quantcache.coding.codebook import lloyd_max
from quantcache.coding.spectral import Moments
from quantcache.evaluation.methods.base import (
    MethodUnavailable,
    Scheme,
    Setting,
    SimulatedCodec,
    hadamard,
    simulated_cache,
    two_to_four,
)
from quantcache.evaluation.methods.integer import QuarotCodec, quarot_bits
from quantcache.evaluation.methods.spectral import GAIN_BITS
from quantcache.evaluation.methods.statistics import LayerMoments, eigenbasis

OSCAR_CLIPS = {"key": 0.96, "value": 0.92}
"""Share of a token's range that the codes span, as in OSCAR's serving scripts."""


class PcaCodec(SimulatedCodec):
    """Principal components of every head, water-filled widths, Lloyd-Max codes with a fixed scale per component.

    No token has a scale of its own, so codes are all that is stored. Source: the SpectralQuant recipe
    (github.com/Dynamis-Labs/spectralquant); widths by exact water-filling instead of a split at an effective rank.

    Args:
        moments: Moments of the keys or values, per head.
        bits: Mean width over the components of a head.
        device: Where the constants live.
    """

    def __init__(self, moments: Moments, bits: float, device: torch.device | str = "cpu"):
        values, vectors = eigenbasis(moments.covariance.cpu())
        allocated = [allocate([Group(float(v), 1) for v in head], bits) for head in values]
        widths = torch.tensor(allocated, dtype=torch.int64, device="cpu")
        self.mean = moments.mean.float().to(device)[:, None]  # [H, 1, D]
        self.basis = vectors.float().to(device)  # [H, D, D]
        self.sigma = values.sqrt().clamp_min(1e-30).float().to(device)[:, None]
        self.books = []
        for width in widths.unique().tolist():
            book = lloyd_max(width)
            chosen = (widths == width).flatten().nonzero().flatten().to(device)
            tables = (torch.tensor(t, dtype=torch.float32, device=device) for t in (book.levels, book.boundaries))
            self.books.append((chosen, *tables))
        held = [self.mean, self.basis, self.sigma, *(t for book in self.books for t in book)]
        super().__init__(float(widths.double().mean()), held)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Round every component to its nearest level."""
        unit = ((x - self.mean) @ self.basis / self.sigma).transpose(1, 2).flatten(2)  # [B, T, H * D]
        rounded = torch.empty_like(unit)
        for chosen, levels, boundaries in self.books:
            rounded[..., chosen] = levels[torch.bucketize(unit[..., chosen], boundaries)]
        components = rounded.unflatten(2, (x.shape[1], -1)).transpose(1, 2) * self.sigma
        return components @ self.basis.transpose(-1, -2) + self.mean


def rank_bits(rank: float, dim: int) -> float:
    """Bits per element of K of D components."""
    return DENSE_BITS * rank / dim


class RankCodec(SimulatedCodec):
    """The first K principal components of every head, in bfloat16.

    Args:
        moments: Moments of the keys or values, per head.
        rank: K, components kept of D.
        device: Where the constants live.
    """

    def __init__(self, moments: Moments, rank: int, device: torch.device | str = "cpu"):
        _, vectors = eigenbasis(moments.covariance.cpu())
        self.mean = moments.mean.float().to(device)[:, None]  # [H, 1, D]
        self.basis = vectors[..., :rank].float().contiguous().to(device)  # [H, D, K]
        super().__init__(rank_bits(rank, vectors.shape[-1]), [self.mean, self.basis])

    def reconstruct(self, x: Tensor) -> Tensor:
        """Project onto the components, and back."""
        components = ((x - self.mean) @ self.basis).bfloat16().float()
        return components @ self.basis.transpose(-1, -2) + self.mean


def oscar_codec(layer: LayerMoments, side: str, bits: int, device: torch.device | str = "cpu") -> QuarotCodec:
    """Rotation into the eigenbasis of what attention does with a vector, then Hadamard and codes per token.

    Keys: the eigenbasis of E[q qᵀ] over the queries of the group. Values: that of VᵀSᵀSV, S the attention weights.
    Source: Z. Zhou et al., "OSCAR: Offline Spectral Covariance-Aware Rotation for 2-bit KV Cache Quantization" (2026);
    rotations here are per key/value head.

    Args:
        layer: Moments of one layer, and of the queries and outputs of its attention.
        side: ``"key"`` or ``"value"``.
        bits: Width of every code.
        device: Where the constants live.

    Returns:
        The codec.

    Raises:
        MethodUnavailable: No queries of the keys' dimension, or no outputs of the values', were seen.
    """
    seen = layer.query if side == "key" else layer.output
    if not seen.count:
        raise MethodUnavailable(f"attention showed no {'queries' if side == 'key' else 'outputs'} that fit the {side}s")
    _, vectors = eigenbasis(seen.second_moment.cpu())
    return QuarotCodec((vectors.float() @ hadamard(vectors.shape[-1])).to(device), bits, OSCAR_CLIPS[side])


def our_rates(config: PreTrainedConfig) -> tuple[float, ...]:
    """Bits per element of ours at its usual rates, gains included: what a method of any rate is compared at."""
    _, dim = cache_layout.kv_geometry(config.get_text_config(decoder=True))
    return tuple(bits + GAIN_BITS / dim for bits in (2, 2.5, 3, 4))


def matched_ranks(config: PreTrainedConfig) -> tuple[float, ...]:
    """The smallest ranks that store at least as much as ours."""
    _, dim = cache_layout.kv_geometry(config.get_text_config(decoder=True))
    return tuple(dict.fromkeys(float(math.ceil(dim * bits / DENSE_BITS)) for bits in our_rates(config)))


def _fitted(
    setting: Setting, make_codec: Callable[[LayerMoments, str, torch.device], SimulatedCodec]
) -> Callable[[], Cache]:
    statistics = setting.statistics
    if statistics is None:
        raise MethodUnavailable("needs statistics of a calibration text")
    return simulated_cache(setting, lambda index, side, x, device: make_codec(statistics.layers[index], side, device))


def _pca(bits: float, setting: Setting) -> Callable[[], Cache]:
    return _fitted(setting, lambda layer, side, device: PcaCodec(layer.side(side), bits, device))


def _oscar(bits: float, setting: Setting) -> Callable[[], Cache]:
    return _fitted(setting, lambda layer, side, device: oscar_codec(layer, side, int(bits), device))


def _rank(rank: float, setting: Setting) -> Callable[[], Cache]:
    return _fitted(setting, lambda layer, side, device: RankCodec(layer.side(side), int(rank), device))


SCHEMES = (
    Scheme(
        stem="pca",
        family="rival",
        simulated=True,
        description="principal components of every head, water-filled Lloyd-Max codes, no scale per token",
        source="the SpectralQuant recipe",
        make=_pca,
        bits=lambda bits, side, dim: bits,
        parameter="B",
        defaults=our_rates,
        own_lengths=(0, 0),
        needs="statistics",
    ),
    Scheme(
        stem="oscar",
        family="rival",
        simulated=True,
        description="rotation by the queries' (values: the attention outputs') second moment and Hadamard, flat codes",
        source="an OSCAR-like recipe (2026)",
        make=_oscar,
        bits=quarot_bits,
        parameter="B",
        numbers=tuple(range(1, 9)),
        defaults=two_to_four,
        own_lengths=(64, 256),
        needs="statistics",
    ),
    Scheme(
        stem="rank",
        family="rival",
        simulated=True,
        description="the first K principal components of every head, in bfloat16",
        source="rank reduction",
        make=_rank,
        bits=lambda rank, side, dim: rank_bits(rank, dim),
        parameter="K",
        defaults=matched_ranks,
        own_lengths=(0, 0),
        needs="statistics",
    ),
)
