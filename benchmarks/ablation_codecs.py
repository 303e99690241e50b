"""Codecs that differ from ours in one choice, simulated: how a token's gain is formed and stored, and the codebooks.

Gains and anchors are those of either coding, as the codec's settings say; fitted codebooks are of scalar codes only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

import torch
from ablation_statistics import AnchoredFrame
from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from quantcache import Calibration
from quantcache.attention.probe import RecordingCache, run
from quantcache.coding.blocks import SideCodec, block_positions, join_blocks, split_blocks
from quantcache.coding.codebook import lloyd_max
from quantcache.coding.codec import SpectralCodec
from quantcache.coding.gains import GAIN_CENTER, GAIN_STEPS
from quantcache.coding.packing import BLOCK
from quantcache.coding.rope import Rope, anchor_of
from quantcache.coding.schema import SIDES
from quantcache.coding.trellis import best_path, nearest_by_subset, subsets_of_path
from quantcache.common.defaults import SINK_LENGTH
from quantcache.evaluation.methods.base import Setting, simulated_cache

Gain = Literal["none", "plain", "corrected", "searched"]

COARSE_STEPS = {4: 2, 6: 8}
"""Steps per octave of gains of fewer than 8 bits; 16 bits are a float16."""


class SimulatedCodec:
    """Blocks kept as what they decode to.

    Args:
        codec: Ours, whose constants are used.
    """

    bits: float | None

    def __init__(self, codec: SpectralCodec):
        self.codec, self.bits = codec, codec.bits

    def decode(self, fields: dict[str, Tensor], block_table: Tensor, left_padding: Tensor | None) -> Tensor:
        """Return n blocks ``[n, B, H, 64, D]`` as ``[B, H, n * 64, D]``."""
        return join_blocks(fields["simulated"])

    def tensors(self) -> list[Tensor]:
        """The constants."""
        return self.codec.tensors()


class AnchorCodec(SimulatedCodec):
    """Our codec with anchors of another length, which attention on codes could not read: it takes them from blocks.

    Args:
        codec: Ours; its frame is changed in place. Values, and keys without RoPE, have no anchors.
        length: Tokens that share an anchor.
    """

    def __init__(self, codec: SpectralCodec, length: int):
        super().__init__(codec)
        if not codec.frame.is_identity:
            codec.frame = AnchoredFrame(codec.dim, codec.frame.rope, codec.frame.fast_wavelength, length)

    def encode(self, x: Tensor, block_table: Tensor, left_padding: Tensor | None) -> dict[str, Tensor]:
        """Quantize and dequantize n blocks ``[B, H, n * 64, D]``."""
        decoded = self.codec.decode(self.codec.encode(x, block_table, left_padding), block_table, left_padding)
        return {"simulated": split_blocks(decoded.to(x.dtype))}


class ReconstructingCodec(SimulatedCodec):
    """Our frame and transform around another way to code coefficients."""

    def encode(self, x: Tensor, block_table: Tensor, left_padding: Tensor | None) -> dict[str, Tensor]:
        """Quantize and dequantize n blocks ``[B, H, n * 64, D]``."""
        blocks = zip(x.split(BLOCK, dim=2), block_table.split(1), strict=True)
        done = [self._reconstruct(block.contiguous(), place, left_padding) for block, place in blocks]
        return {"simulated": split_blocks(torch.cat(done, dim=2).to(x.dtype))}

    def _reconstruct(self, x: Tensor, place: Tensor, left_padding: Tensor | None) -> Tensor:
        return self._leave(self._coded(self.codec.coefficients(x, place, left_padding)), place, left_padding)

    def _coded(self, y: Tensor) -> Tensor:
        """What is left of the coefficients ``[B, H, D, 64]`` of one block."""
        raise NotImplementedError

    def _leave(self, scaled: Tensor, place: Tensor, left_padding: Tensor | None) -> Tensor:
        """From scaled coefficients ``[B, H, D, 64]`` back to vectors ``[B, H, 64, D]``."""
        framed = (self.codec.decoder @ scaled).transpose(-1, -2) + self.codec.mean[:, None]
        if self.codec.frame.is_identity:
            return framed
        positions, anchors = block_positions(place, left_padding)
        return self.codec.frame.leave(framed, positions[:, None], anchors[:, None])


def root_mean_square(codec: SpectralCodec, y: Tensor) -> Tensor:
    """Of every token's coded coefficients, ``[B, H, 64]``, from all of them, ``[B, H, D, 64]``."""
    count = codec.coded.sum(-1).clamp_min(1)[:, None]
    return (torch.where(codec.coded[..., None], y * y, 0.0).sum(-2) / count).sqrt()


def trellis_levels(codec: SpectralCodec, u: Tensor, weights: Tensor) -> Tensor:
    """Levels of the best paths, those of all widths sought at once.

    Args:
        codec: Ours, with trellis codes.
        u: Coefficients over the tokens' steps, ``[B, H, D, 64]``.
        weights: What a token's squared error weighs, ``[B, H, 1, 64]``.

    Returns:
        ``[B, H, D, 64]``; 0 where a coefficient has no bits.
    """
    flat, weights = u.flatten(1, 2), weights.expand_as(u).flatten(1, 2)
    quantized = torch.zeros_like(flat)
    if codec.classes:
        columns = torch.cat([c.columns for c in codec.classes])
        books = [(c.columns, c.union) for c in codec.classes if c.union is not None]
        near = torch.cat([nearest_by_subset(flat[:, own], book)[1] for own, book in books], dim=2)  # [4, B, m, 64]
        errors = (flat[:, columns] - near).square() * weights[:, columns]
        taken = subsets_of_path(best_path(errors.flatten(1, 2)))
        quantized[:, columns] = near.flatten(1, 2).gather(0, taken[None])[0].view_as(near[0])
    return quantized.view_as(u)


class GainCodec(ReconstructingCodec):
    """Our codec with another gain.

    Args:
        codec: Ours, for transform, widths and codebooks.
        gain: ``none`` leaves the calibrated scale; ``plain`` is the root mean square of the coded coefficients;
            ``corrected`` fits the decoded to the exact coefficients; ``searched`` tries several, as ours does.
        gain_bits: Width of the stored gain.
        steps: Its steps per octave; None for ours, or :data:`COARSE_STEPS`.
    """

    def __init__(self, codec: SpectralCodec, gain: Gain, gain_bits: int = 8, steps: int | None = None):
        super().__init__(codec)
        self.gain, self.gain_bits = gain, 0 if gain == "none" else gain_bits
        self.steps = steps or COARSE_STEPS.get(gain_bits, GAIN_STEPS)
        self.factors = codec.gain_search if gain == "searched" else (1.0,)
        self.bits = codec.bits + (self.gain_bits - 8) / codec.dim

    def _coded(self, y: Tensor) -> Tensor:
        codec = self.codec
        rms = root_mean_square(codec, y)
        best: tuple[Tensor, ...] | None = None
        for factor in self.factors:
            step = torch.ones_like(rms) if self.gain == "none" else rms * factor
            _, rounded = codec._nearest(y / step.clamp_min(1e-30).unsqueeze(-2))
            gain, saved = self._gain(y, rounded, step)
            found = saved, step, gain, rounded
            if best is not None:
                better = saved > best[0]
                found = tuple(
                    torch.where(better if new.ndim == better.ndim else better.unsqueeze(-2), new, old)
                    for new, old in zip(found, best, strict=True)
                )
            best = found
        assert best is not None
        _, step, gain, rounded = best
        for _ in range(codec.passes if codec.coding == "trellis" else 0):
            weights = step.square().unsqueeze(-2)
            rounded = trellis_levels(codec, y / step.clamp_min(1e-30).unsqueeze(-2), weights)
            step = gain = self._gain(y, rounded, step)[0]
        return rounded * self._stored(gain).unsqueeze(-2)

    def _gain(self, y: Tensor, rounded: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """The gain that is stored for some levels, and how much of <y, y> it explains."""
        weighted = rounded * self.codec.weights[..., None]
        cross, energy = (weighted * y).sum(-2), (weighted * rounded).sum(-2)
        gain = step if self.gain in ("none", "plain") else (cross / energy.clamp_min(1e-30)).clamp_min(0.0)
        return gain, 2 * gain * cross - gain * gain * energy

    def _stored(self, gain: Tensor) -> Tensor:
        """What is left of a gain that is stored."""
        if self.gain == "none":
            return gain
        if self.gain_bits == 16:
            return gain.half().float()
        # With 8 bits and our steps this is quantcache.coding.codec.quantize_gain.
        codes = 1 << self.gain_bits
        centre = GAIN_CENTER if self.gain_bits == 8 else codes // 2
        code = (torch.log2(gain.clamp_min(1e-30)) * self.steps + centre).round().clamp(0, codes - 1)
        return torch.where(code > 0, torch.exp2((code - centre) / self.steps), 0.0)


def codec_cache(
    calibration: Calibration,
    config: PreTrainedConfig,
    change: Callable[[SpectralCodec], SideCodec],
    sink_length: int,
    residual_length: int,
) -> Callable[[], Cache]:
    """A maker of caches with changed codecs.

    Args:
        calibration: With widths.
        config: The model's config.
        change: Makes each side's codec from ours.
        sink_length: First tokens kept.
        residual_length: Recent tokens kept.

    Returns:
        Makes an empty cache.
    """
    codecs = {key: change(codec) for key, codec in side_codecs(calibration).items()}
    setting = Setting(config, calibration, None, sink_length, residual_length)
    return simulated_cache(setting, lambda index, side, x, device: codecs[index, side])


def side_codecs(calibration: Calibration) -> dict[tuple[int, str], SpectralCodec]:
    """Our codecs of every layer and side, not shared with any cache."""
    return {
        (index, side): SpectralCodec(
            layer.side(side), layer.rope if side == "key" else Rope(), calibration.metadata.codec
        )
        for index, layer in calibration.layers.items()
        for side in SIDES
    }


def block_coefficients(codec: SpectralCodec, x: Tensor) -> Iterator[Tensor]:
    """Coefficients ``[1, H, D, 64]`` of every whole block of one sequence's keys or values ``[1, H, T, D]``."""
    for first in range(SINK_LENGTH, x.shape[2] - BLOCK + 1, BLOCK):
        place = torch.tensor([[first, BLOCK, anchor_of(torch.tensor(first), SINK_LENGTH)]], dtype=torch.int32)
        yield codec.coefficients(x[:, :, first : first + BLOCK], place, None)


def fitted_books(model: PreTrainedModel, calibration: Calibration, tokens: Tensor) -> dict[int, Tensor]:
    """Codebooks fitted to what is coded, one for each width over all layers and sides: Lloyd's algorithm on samples.

    Args:
        model: The model.
        calibration: With widths, and scalar codes.
        tokens: Calibration tokens, ``[T]``, one sequence.

    Returns:
        Levels by width, ``[2**width]`` ascending and symmetric.
    """
    codecs = side_codecs(calibration)
    samples: dict[int, list[Tensor]] = {}

    def record(index: int, keys: Tensor, values: Tensor) -> None:
        if index not in calibration.layers:
            return
        for side, x in zip(SIDES, (keys, values), strict=True):
            codec = codecs[index, side]
            for y in block_coefficients(codec, x):
                flat = (y / root_mean_square(codec, y).clamp_min(1e-30).unsqueeze(-2)).flatten(1, 2)
                for c in codec.classes:
                    samples.setdefault(c.width, []).append(flat[:, c.columns].flatten()[::4])

    with torch.no_grad():
        run(model, tokens[None], RecordingCache(model.config, record))
    return {width: _lloyd(torch.cat(found).double(), width) for width, found in samples.items()}


def _lloyd(samples: Tensor, width: int, rounds: int = 60) -> Tensor:
    """Levels that fit samples and their mirror images; a level without samples stays where it was."""
    samples = torch.cat((samples, -samples))
    levels = torch.tensor(lloyd_max(width).levels, dtype=torch.float64)
    for _ in range(rounds):
        cells = torch.bucketize(samples, (levels[1:] + levels[:-1]) / 2)
        counts = torch.bincount(cells, minlength=len(levels))
        sums = torch.bincount(cells, weights=samples, minlength=len(levels))
        levels = torch.where(counts > 0, sums / counts.clamp_min(1), levels)
    return levels.float()


def with_books(codec: SpectralCodec, books: dict[int, Tensor]) -> SpectralCodec:
    """The same codec on other codebooks; widths without one keep theirs.

    Args:
        codec: Changed in place; its codes are scalar.
        books: Levels by width.

    Returns:
        The codec.

    Raises:
        ValueError: Its codes are paths through a trellis, which has codebooks of another kind.
    """
    if codec.coding != "scalar":
        raise ValueError(f"fitted codebooks are of scalar codes, the codec's are {codec.coding}")
    codec.classes = tuple(
        replace(c, levels=books[c.width], boundaries=(books[c.width][1:] + books[c.width][:-1]) / 2)
        if c.width in books
        else c
        for c in codec.classes
    )
    return codec
