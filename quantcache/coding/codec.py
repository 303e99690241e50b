"""Encoding and decoding blocks of 64 tokens in plain torch: the reference that every kernel is tested against.

For one side (keys or values) of one layer, with x a cached vector::

    y   = E (frame(x) - mean)             E = A / sigma: unit-variance coefficients, sigma² the spectrum
    u   = y / g                           g = rms of y over the coded coefficients, times a searched factor
    û   = codebook[nearest(u)]            of the coefficient's width; or the levels along the best of the paths that
                                          the 64 tokens' u may take through a trellis (trellis.py)
    γ   = <y, û>_σ² / <û, û>_σ²           the token's gain, of least error once u is quantized; stored in 8 bits
    x̂   = unframe(mean + F (γ û))         F = A⁻¹ sigma

Shapes: B batch, H key/value heads, D dimension, n blocks, W words of codes per block and batch row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quantcache.coding import linalg, trellis
from quantcache.coding.blocks import block_positions
from quantcache.coding.codebook import POLYNOMIALS, gaussian_codebook
from quantcache.coding.gains import LARGEST_GAIN_CODE, dequantize_gain, quantize_gain
from quantcache.coding.packing import BLOCK, MAX_WIDTH, pack, unpack
from quantcache.coding.rope import Frame, Rope
from quantcache.coding.schema import CodecSettings, Coding, SideCalibration
from quantcache.common.ambient import matmul, without_autocast
from quantcache_kernels import interface
from quantcache_kernels.interface import SideConstants


class DerivedConstants(Protocol):
    """Constants that a backend has arranged for its kernels."""

    def held(self) -> list[Tensor]:
        """Every tensor that they keep alive."""
        ...


@dataclass(frozen=True)
class WidthClass:
    """All coefficients of one width, over all heads of a side.

    Attributes:
        width: Bits.
        columns: Indices into the flattened (H, D) coefficients, ``[m]``.
        words: Indices of their words in a block's payload, ``[m * 2 * width]``.
        levels: Codebook levels, ``[2**width]`` float32.
        boundaries: Decision boundaries, ``[2**width - 1]`` float32.
        union: The trellis' codebook, ``[2**(width + 1)]`` float32; None where codes are scalar.
    """

    width: int
    columns: Tensor
    words: Tensor
    levels: Tensor
    boundaries: Tensor
    union: Tensor | None

    def dequantize(self, words: Tensor) -> Tensor:
        """Levels of packed codes.

        Args:
            words: ``[..., 2 * width]`` int32.

        Returns:
            ``[..., 64]`` float32.
        """
        if self.union is None:
            return self.levels[unpack(words, self.width)]
        return self.union[trellis.unpack_path(words, self.width)]


def _width_class(widths: Tensor, offsets: Tensor, width: int, coding: Coding, device: torch.device | str) -> WidthClass:
    """All coefficients of one width of a side with these ``[H, D]`` widths and word offsets."""
    columns = (widths.flatten() == width).nonzero().flatten()
    words = offsets.flatten()[columns].unsqueeze(-1) + torch.arange(2 * width, dtype=torch.int64, device=offsets.device)
    book = gaussian_codebook(width)
    return WidthClass(
        width,
        columns.to(device),
        words.flatten().to(device),
        torch.tensor(book.levels, dtype=torch.float32, device=device),
        torch.tensor(book.boundaries, dtype=torch.float32, device=device),
        torch.tensor(trellis.union_levels(width), dtype=torch.float32, device=device) if coding == "trellis" else None,
    )


class SpectralCodec:
    """The codec of one side of one layer.

    A block's payload is head-major: dimension d of head h has ``2 * width`` words starting at ``offsets[h, d]``. A side
    whose transform is diagonal (its basis is in the model's weights) is scaled, never multiplied by a matrix; kernels
    get the matrices all the same.

    Args:
        side: The side's constants; ``side.widths`` must be given.
        rope: The rotation of the vectors; ``Rope()`` for values.
        settings: Codec choices of the artifact.
        device: Where the constants live.
        name: What the vectors are, for messages.
        holds_values: Whether they are values; None where vectors that do not rotate are.

    Raises:
        QuantCacheError: The decoder on the device is not the inverse of the transform.
    """

    @torch.inference_mode(False)  # the constants outlive it, and what reads them may be differentiated
    @without_autocast
    def __init__(
        self,
        side: SideCalibration,
        rope: Rope,
        settings: CodecSettings,
        device: torch.device | str = "cpu",
        name: str = "decoder",
        holds_values: bool | None = None,
    ):
        if side.widths is None:
            raise ValueError("the side is dense: it has no widths")
        self.frame = Frame(side.dim, rope, settings.fast_wavelength, device)
        self.holds_values = self.frame.is_identity if holds_values is None else holds_values
        self.gain_search, self.passes = settings.gain_search, settings.passes
        self.num_heads, self.dim = side.num_heads, side.dim
        widths = side.widths.to(torch.int64)
        spectrum = side.spectrum.double()
        # A coefficient that never varied would be divided by nothing; the floor is far below any coded one.
        sigma = spectrum.clamp_min(1e-12 * float(spectrum.max().clamp_min(1e-30))).sqrt()
        analysis = side.analysis.double()
        self.mean = side.mean.float().clone().to(device)
        self.encoder = (analysis / sigma.unsqueeze(-1)).float().to(device)  # E [H, D, D]
        self.decoder = (linalg.inverse(analysis, name) * sigma.unsqueeze(-2)).float().to(device)  # F [H, D, D]
        linalg.require_product(
            analysis, self.decoder, sigma, f"{name}: with A the transform and F its decoder, A F = σ"
        )
        self.is_diagonal = linalg.is_diagonal(analysis)
        coded = widths > 0
        self.weights = torch.where(coded, spectrum, 0.0).float().to(device)  # [H, D]
        self.coded = coded.to(device)
        offsets = (2 * widths.flatten()).cumsum(0).sub(2 * widths.flatten()).reshape(widths.shape)
        self.widths = widths.to(device=device, dtype=torch.int32)  # [H, D]
        self.offsets = offsets.to(device=device, dtype=torch.int32)  # first word of each dimension, [H, D]
        self.num_words = int(2 * widths.sum())
        self.coding = settings.coding
        classes = (_width_class(widths, offsets, width, self.coding, device) for width in range(1, MAX_WIDTH + 1))
        self.classes = tuple(c for c in classes if c.columns.numel())
        self.derived: dict[str, DerivedConstants] = {}  # the same constants in the form of a backend's kernels

    @property
    def bits(self) -> float:
        """Bits of codes and gains per element."""
        return (32 * self.num_words / BLOCK + 8 * self.num_heads) / (self.num_heads * self.dim)

    def constants(self) -> SideConstants:
        """The constants as kernels are given them, on the CPU."""
        frame = self.frame
        books = [gaussian_codebook(width) for width in range(MAX_WIDTH + 1)]
        return SideConstants(
            widths=self.widths.cpu(),
            offsets=self.offsets.cpu(),
            encoder=self.encoder.cpu(),
            decoder=self.decoder.cpu(),
            mean=self.mean.cpu(),
            weights=self.weights.cpu(),
            levels=[book.levels for book in books],
            boundaries=[book.boundaries for book in books],
            polynomials=POLYNOMIALS,
            gains=dequantize_gain(torch.arange(256, dtype=torch.int64, device="cpu")),
            gain_search=self.gain_search,
            frame=interface.Frame(frame.order.cpu(), frame.frequencies.cpu(), frame.slow_pairs, frame.num_slow),
            words=self.num_words,
            coding=self.coding,
            passes=self.passes,
            unions=[trellis.union_levels(width) for width in range(MAX_WIDTH + 1)],
            union_terms=[trellis.union_terms(width) for width in range(MAX_WIDTH + 1)],
        )

    def tensors(self) -> list[Tensor]:
        """The constants held on the device."""
        own = [self.mean, self.encoder, self.decoder, self.weights, self.coded, self.widths, self.offsets]
        own += [self.frame.order, self.frame.inverse_order, self.frame.frequencies]
        own += [t for c in self.classes for t in (c.columns, c.words, c.levels, c.boundaries)]
        own += [c.union for c in self.classes if c.union is not None]
        return own + [t for constants in list(self.derived.values()) for t in constants.held()]

    # ------------------------------------------------------------------ encode

    @without_autocast
    def encode(self, x: Tensor, block_table: Tensor, left_padding: Tensor | None) -> dict[str, Tensor]:
        """Encode whole blocks.

        Blocks are encoded one at a time, always in the same shapes, so that the codes do not depend, bit for bit, on
        how many tokens arrived together.

        Args:
            x: ``[B, H, n * 64, D]`` as the model caches them.
            block_table: Where the blocks lie, ``[n, 3]``.
            left_padding: Left padding of every row, ``[B]``, or None; ``[B, n * 64]`` where tokens of a row differ, to
                be kept as the field ``shifts``.

        Returns:
            ``codes`` ``[n, B, W]`` int32 and ``gains`` ``[n, B, H, 64]`` uint8.
        """
        paddings: Sequence[Tensor | None] = [left_padding] * len(block_table)
        if left_padding is not None and left_padding.ndim == 2:
            paddings = left_padding.split(BLOCK, dim=1)
        blocks = [
            self.encode_block(block.contiguous(), place, padding)
            for block, place, padding in zip(x.split(BLOCK, dim=2), block_table.split(1), paddings, strict=True)
        ]
        codes, gains = zip(*blocks, strict=True)
        return {"codes": torch.stack(codes), "gains": torch.stack(gains)}

    def coefficients(self, x: Tensor, place: Tensor, left_padding: Tensor | None) -> Tensor:
        """Unit-variance coefficients y of one block.

        Args:
            x: ``[B, H, 64, D]`` as the model caches them.
            place: The block's place, ``[1, 3]``.
            left_padding: Left padding of every row, ``[B]``, or None.

        Returns:
            ``[B, H, D, 64]`` float32.
        """
        if not self.frame.is_identity:
            positions, anchors = block_positions(place, left_padding)
            x = self.frame.enter(x, positions[:, None], anchors[:, None])
        centred = (x.float() - self.mean[:, None]).transpose(-1, -2).contiguous()
        coefficients: Tensor
        if self.is_diagonal:
            coefficients = centred * self.encoder.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        else:
            coefficients = matmul(self.encoder, centred)
        return coefficients

    def synthesize(self, coefficients: Tensor) -> Tensor:
        """Vectors that coefficients stand for, without the mean: the product with F.

        Args:
            coefficients: Scaled coefficients or weighted sums of them, ``[..., H, N, D]``.

        Returns:
            The same shape.
        """
        vectors: Tensor
        if self.is_diagonal:
            vectors = coefficients * self.decoder.diagonal(dim1=-2, dim2=-1).unsqueeze(-2).to(coefficients.dtype)
        else:
            vectors = matmul(coefficients, self.decoder.transpose(-1, -2).to(coefficients.dtype))
        return vectors

    def encode_block(self, x: Tensor, place: Tensor, left_padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """Encode one block.

        Args:
            x: ``[B, H, 64, D]`` as the model caches them.
            place: The block's place, ``[1, 3]``.
            left_padding: Left padding of every row, ``[B]``, or None.

        Returns:
            Codes ``[B, W]`` int32 and gains ``[B, H, 64]`` uint8.
        """
        y = self.coefficients(x, place, left_padding)
        count = self.coded.sum(-1).clamp_min(1)[:, None]  # [H, 1]
        rms = (torch.where(self.coded[..., None], y * y, 0.0).sum(-2) / count).sqrt()  # [B, H, 64]
        best: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        for factor in self.gain_search:
            step = (rms * factor).unsqueeze(-2)
            codes, quantized = self._nearest(torch.where(step > 0, y / step, 0.0))
            gain, saved = self._corrected_gain(y, quantized)
            if best is not None:
                better = saved > best[2]  # [B, H, 64]
                codes, step = (torch.where(better.unsqueeze(-2), *each) for each in ((codes, best[0]), (step, best[3])))
                gain, saved = (torch.where(better, *each) for each in ((gain, best[1]), (saved, best[2])))
            best = codes, gain, saved, step
        assert best is not None
        codes, gain, _, step = best
        if self.coding == "scalar":
            return self._pack(codes), quantize_gain(gain)
        for _ in range(self.passes):
            payload, quantized = self._pack_trellis(torch.where(step > 0, y / step, 0.0), step.square())
            step = (gain := self._corrected_gain(y, quantized)[0]).unsqueeze(-2)
        return payload, quantize_gain(gain)

    def _corrected_gain(self, y: Tensor, quantized: Tensor) -> tuple[Tensor, Tensor]:
        """The gain of least weighted error for levels ``[B, H, D, 64]``, and how much of <y, y> it explains."""
        weighted = quantized * self.weights[..., None]
        cross, energy = (weighted * y).sum(-2), (weighted * quantized).sum(-2)
        gain = torch.where(energy > 0, cross / energy, 0.0).clamp_min(0.0)
        return gain, gain * cross

    def _nearest(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest codes (uint8) and their levels, both ``[B, H, D, 64]``."""
        flat = u.flatten(1, 2)
        codes = torch.zeros(flat.shape, dtype=torch.uint8, device=u.device)
        quantized = torch.zeros_like(flat)
        for c in self.classes:
            index = torch.bucketize(flat[:, c.columns], c.boundaries, out_int32=True)
            codes[:, c.columns] = index.to(torch.uint8)
            quantized[:, c.columns] = c.levels[index]
        return codes.view(u.shape), quantized.view(u.shape)

    def _pack(self, codes: Tensor) -> Tensor:
        flat = codes.flatten(1, 2)
        payload = torch.zeros(codes.shape[0], self.num_words, dtype=torch.int32, device=codes.device)
        for c in self.classes:
            payload[:, c.words] = pack(flat[:, c.columns], c.width).flatten(1)
        return payload

    def _pack_trellis(self, u: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Payload and levels of the best paths, for values ``[B, H, D, 64]`` whose tokens weigh ``[B, H, 1, 64]``."""
        flat, weights = u.flatten(1, 2), weights.expand_as(u).flatten(1, 2)
        quantized = torch.zeros_like(flat)
        payload = torch.zeros(u.shape[0], self.num_words, dtype=torch.int32, device=u.device)
        own, weigh = ([x[:, c.columns].flatten(0, 1) for c in self.classes] for x in (flat, weights))
        unions = [c.union for c in self.classes if c.union is not None]
        for c, path in zip(self.classes, trellis.search(own, weigh, unions), strict=True):
            quantized[:, c.columns] = path.quantized.view(u.shape[0], -1, BLOCK)
            payload[:, c.words] = trellis.pack_path(path, c.width).view(u.shape[0], -1)
        return payload, quantized.view(u.shape)

    def saturated(self, gains: Tensor, block_table: Tensor, first: Tensor | None) -> Tensor:
        """How many gains lie at the ends of what 8 bits can say, among the tokens that are read.

        Args:
            gains: ``[n, B, H, 64]`` uint8.
            block_table: Where the blocks lie, ``[n, 3]``.
            first: First slot of every row that is read from blocks, ``[B]``, or None.

        Returns:
            Gains of the largest code, which may have been larger, gains of zero, and all gains, in heads that have
            codes at all, ``[3]``.
        """
        tokens = torch.arange(BLOCK, dtype=torch.int64, device=gains.device)
        coded = self.coded.any(-1)
        if coded.device != gains.device:  # blocks that are offloaded
            coded = coded.to(gains.device)
        counted = (tokens < block_table[:, 1:2])[:, None, None] & coded[:, None]
        if first is not None:
            counted = counted & (block_table[:, :1] + tokens >= first[:, None, None]).transpose(0, 1)[:, :, None]
        ends = [((gains == code) & counted).sum() for code in (LARGEST_GAIN_CODE, 0)]
        return torch.stack((*ends, counted.expand_as(gains).sum()))

    # ------------------------------------------------------------------ decode

    def dequantize(self, fields: dict[str, Tensor]) -> Tensor:
        """Scaled coefficients γ û of n blocks.

        Args:
            fields: ``codes`` ``[n, B, W]`` and ``gains`` ``[n, B, H, 64]``.

        Returns:
            ``[n, B, H, D, 64]`` float32.
        """
        codes, gains = fields["codes"], dequantize_gain(fields["gains"])
        n, batch = codes.shape[:2]
        flat = torch.zeros(n, batch, self.num_heads * self.dim, BLOCK, dtype=torch.float32, device=codes.device)
        for c in self.classes:
            words = codes[..., c.words].unflatten(-1, (-1, 2 * c.width))
            flat[:, :, c.columns] = c.dequantize(words)
        scaled: Tensor = flat.unflatten(2, (self.num_heads, self.dim)) * gains.unsqueeze(-2)
        return scaled

    @without_autocast
    def decode(
        self,
        fields: dict[str, Tensor],
        block_table: Tensor,
        left_padding: Tensor | None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Decode blocks to the vectors the model cached.

        Args:
            fields: ``codes`` ``[n, B, W]``, ``gains`` ``[n, B, H, 64]`` and maybe ``shifts`` ``[n, B, 64]``.
            block_table: Where the blocks lie, ``[n, 3]``.
            left_padding: Left padding of every row, ``[B]``, or None; not looked at where there are shifts.
            dtype: What to compute in.

        Returns:
            ``[B, H, n * 64, D]`` (slots beyond a block's valid length included).
        """
        coefficients = self.dequantize(fields).transpose(-1, -2).to(dtype)
        framed = self.synthesize(coefficients) + self.mean[:, None]  # [n, B, H, 64, D]
        framed = framed.permute(1, 2, 0, 3, 4).flatten(2, 3)
        if self.frame.is_identity:
            return framed
        if "shifts" in fields:
            left_padding = fields["shifts"].transpose(0, 1).flatten(1)
        positions, anchors = block_positions(block_table, left_padding)
        return self.frame.leave(framed, positions[:, None], anchors[:, None])
