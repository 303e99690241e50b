"""Encoding and decoding of blocks: distortion against theory, gains against least squares, edge cases."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quantcache.coding.blocks import DenseCodec, block_positions, join_blocks, split_blocks
from quantcache.coding.codebook import gaussian_codebook
from quantcache.coding.codec import SpectralCodec
from quantcache.coding.gains import GAIN_STEPS, dequantize_gain, quantize_gain
from quantcache.coding.packing import BLOCK, MAX_WIDTH, unpack
from quantcache.coding.rope import Frame, Rope
from quantcache.coding.schema import CodecSettings, SideCalibration
from quantcache.common.errors import SettingsError
from tests.builders import gaussian_vectors, random_side

HEADS, DIM, BLOCKS = 2, 64, 8
ROPE = Rope("half", tuple(10_000.0 ** (-i / 32) for i in range(32)))
PARTS = (32, 32)
SETTINGS = CodecSettings(coding="scalar")
HALF_STEP = 2.0 ** (1 / 32)
"""Largest ratio of a gain to its 8-bit form: half of a sixteenth of an octave."""


def block_table_of(blocks: int, first: int = 4) -> Tensor:
    """Places of an uninterrupted run of blocks, two to an anchor."""
    rows = [(first + BLOCK * i, BLOCK, first + 2 * BLOCK * (i // 2)) for i in range(blocks)]
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 0}, "group_size must be an integer from 1 to 1048576, got 0"),
        ({"profile": "model"}, "profile must be one of head, layer, got 'model'"),
        ({"fast_wavelength": float("nan")}, "fast_wavelength must be a number from 0 up, got nan"),
        ({"gain_search": ()}, r"gain_search must be a list of numbers between 0 and 16, got \(\)"),
        ({"gain_search": (1.0, float("inf"))}, r"gain_search must be .*, got \(1.0, inf\)"),
        ({"gain_search": (1.0,) * 65}, "gain_search has 65 numbers, at most 64 are tried"),
        ({"coding": "turbo"}, "coding must be one of scalar, trellis, got 'turbo'"),
        ({"passes": 0}, "passes must be an integer from 1 to 8, got 0"),
        ({"passes": True}, "passes must be an integer from 1 to 8, got True"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        CodecSettings(**settings)


def test_settings_are_those_of_new_calibrations() -> None:
    assert (CodecSettings().coding, CodecSettings(group_size=4).coding) == ("trellis", "trellis")
    assert CodecSettings(gain_search=[1.0]) == CodecSettings(gain_search=(1.0,))  # type: ignore[arg-type]
    assert CodecSettings(fast_wavelength=math.inf).fast_wavelength == math.inf


def key_codec(side: SideCalibration, settings: CodecSettings = SETTINGS) -> SpectralCodec:
    """A codec of rotated keys."""
    return SpectralCodec(side, ROPE, settings)


def cached_keys(
    side: SideCalibration, block_table: Tensor, left_padding: Tensor | None = None, batch: int = 2
) -> Tensor:
    """Keys as a model caches them, with the side's statistics in the frame, ``[B, H, n * 64, D]`` float32."""
    framed = gaussian_vectors(side, batch, BLOCK * block_table.shape[0])
    positions, anchors = block_positions(block_table, left_padding)
    return Frame(side.dim, ROPE).leave(framed, positions[:, None], anchors[:, None]).float()


def coefficient_error(side: SideCalibration, block_table: Tensor, x: Tensor, decoded: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error and squared size of every token's coefficients in the metric, ``[B, H, T]`` float64."""
    positions, anchors = block_positions(block_table, None)
    frame = Frame(side.dim, ROPE)
    framed, restored = (frame.enter(t.double(), positions[:, None], anchors[:, None]) for t in (x, decoded))
    analysis = side.analysis.double().transpose(-1, -2)
    centred = (framed - side.mean.double()[:, None]) @ analysis
    return ((framed - restored) @ analysis).square().sum(-1), centred.square().sum(-1)


@functools.cache
def scaled_moments(width: int, scale: float) -> tuple[float, float]:
    """E[z q] and E[q²] of the quantizer q = scale * Q(z / scale) of a unit Gaussian z, on a fine grid."""
    book = gaussian_codebook(width)
    z = np.linspace(-10, 10, 400_001)
    measure = np.exp(-0.5 * z * z)
    measure /= measure.sum()
    q = scale * np.array(book.levels)[np.searchsorted(book.boundaries, z / scale)]
    return float((z * q * measure).sum()), float((q * q * measure).sum())


def theory(spectrum: Tensor, widths: Tensor) -> float:
    """An upper bound of the relative cost of coding one head's Gaussian coefficients.

    For one factor s of the gain search, the best common gain leaves Σλ - (Σ λ E[z q])² / Σ λ E[q²]. Encoding fits the
    gain to every token and takes the best of all factors, so it does no worse than the best single s. Rounding the gain
    by a ratio of at most r adds at most (r - 1)² of what the gain explains. A token divided by its own rms is uniform
    on a sphere, with lighter tails than a Gaussian: no more distortion.
    """
    costs = []
    for scale in SETTINGS.gain_search:
        moments = [scaled_moments(int(w), scale) for w in widths]
        cross = sum(float(v) * m[0] for v, m in zip(spectrum, moments, strict=True))
        energy = sum(float(v) * m[1] for v, m in zip(spectrum, moments, strict=True))
        costs.append(1 - (cross * cross / energy if energy else 0.0) / float(spectrum.sum()))
    return min(costs) + (HALF_STEP - 1) ** 2


@pytest.mark.parametrize("width", range(MAX_WIDTH + 1))
def test_distortion_of_matching_gaussians(width: int) -> None:
    side, block_table = random_side(HEADS, DIM, width, PARTS, decay=1.0), block_table_of(BLOCKS)
    codec = key_codec(side)
    x = cached_keys(side, block_table)
    error, power = coefficient_error(
        side, block_table, x, codec.decode(codec.encode(x, block_table, None), block_table, None)
    )
    relative = error.sum(-1) / power.sum(-1)
    assert (relative <= theory(side.spectrum[0], torch.full((DIM,), width))).all()
    # Shannon: no code of this many bits, gains included, does better; by more than sampling noise it would be a leak.
    assert (relative >= 2.0 ** (-2 * codec.bits) * (1 - 3 / math.sqrt(BLOCK * BLOCKS))).all()


def test_distortion_of_mixed_widths() -> None:
    widths = torch.tensor([8, 6, 5, 4, 3, 2, 1, 0]).repeat_interleave(DIM // 16).repeat(2).expand(HEADS, -1)
    side, block_table = random_side(HEADS, DIM, widths, PARTS, decay=0.85), block_table_of(BLOCKS)
    codec = key_codec(side)
    x = cached_keys(side, block_table)
    error, power = coefficient_error(
        side, block_table, x, codec.decode(codec.encode(x, block_table, None), block_table, None)
    )
    assert (error.sum(-1) / power.sum(-1) <= theory(side.spectrum[0], widths[0])).all()


def test_eight_bits_are_nearly_exact() -> None:
    side, block_table = random_side(HEADS, DIM, 8, PARTS), block_table_of(2)
    codec = key_codec(side)
    x = cached_keys(side, block_table)
    error, power = coefficient_error(
        side, block_table, x, codec.decode(codec.encode(x, block_table, None), block_table, None)
    )
    # Every single token: the rounded gain costs (2^(1/32) - 1)² at most, the codes on average 4.4e-5 and in one token
    # of 64 coefficients at most a few times that.
    assert ((error / power).sqrt() < 0.025).all()


def test_finer_widths_cost_less() -> None:
    block_table, costs = block_table_of(BLOCKS), []
    for width in range(MAX_WIDTH + 1):
        side = random_side(HEADS, DIM, width, PARTS)
        codec = key_codec(side)
        x = cached_keys(side, block_table)
        error, _ = coefficient_error(
            side, block_table, x, codec.decode(codec.encode(x, block_table, None), block_table, None)
        )
        costs.append(float(error.sum()))
    assert (np.diff(costs) < 0).all()


def test_values_are_not_rotated() -> None:
    side, block_table = random_side(HEADS, DIM, 8), block_table_of(2)
    codec = SpectralCodec(side, Rope(), SETTINGS)
    x = gaussian_vectors(side, 2, 2 * BLOCK).float()
    here = codec.encode(x, block_table, None)
    elsewhere = codec.encode(x, block_table_of(2, first=1000), torch.tensor([3, 5]))
    assert all(torch.equal(here[name], elsewhere[name]) for name in here)
    assert torch.equal(codec.decode(here, block_table, None), codec.decode(here, block_table_of(2, first=1000), None))


def dequantized_by_hand(codec: SpectralCodec, side: SideCalibration, codes: Tensor) -> Tensor:
    """Levels û of one block of one row, ``[H, D, 64]``, read field by field from its words."""
    levels, offset = torch.zeros(side.num_heads, side.dim, BLOCK, dtype=torch.float64), 0
    for head in range(side.num_heads):
        for dim in range(side.dim):
            width = int(side.widths[head, dim])
            assert int(codec.offsets[head, dim]) == offset
            index = unpack(codes[offset : offset + 2 * width], width).long()
            levels[head, dim] = torch.tensor(gaussian_codebook(width).levels, dtype=torch.float64)[index]
            offset += 2 * width
    assert offset == codec.num_words == codes.numel()
    return levels


def mixed_side(seed: int = 0) -> SideCalibration:
    """A side whose heads and dimensions have all widths in no particular order."""
    generator = torch.Generator().manual_seed(seed)
    widths = torch.randint(0, MAX_WIDTH + 1, (HEADS, DIM), generator=generator)
    return random_side(HEADS, DIM, widths, PARTS, seed)


def test_payload_is_head_major_and_decodes_by_hand() -> None:
    side, block_table = mixed_side(), block_table_of(1)
    codec = key_codec(side)
    x = cached_keys(side, block_table, batch=1)
    fields = codec.encode(x, block_table, None)
    levels = dequantized_by_hand(codec, side, fields["codes"][0, 0])
    gain = 2.0 ** ((fields["gains"][0, 0].double() - 128) / 32) * (fields["gains"][0, 0] > 0)
    coefficients = side.spectrum.sqrt()[..., None] * gain[:, None] * levels
    framed = (torch.linalg.inv(side.analysis.double()) @ coefficients).transpose(-1, -2) + side.mean.double()[:, None]
    positions, anchors = block_positions(block_table, None)
    expected = Frame(DIM, ROPE).leave(framed, positions[:, None], anchors[:, None])
    found = codec.decode(fields, block_table, None).double()
    # float32: a sum of D products, each term rounded twice, then the rotation.
    size = (torch.linalg.inv(side.analysis.double()).abs() @ coefficients.abs()).transpose(-1, -2).norm(dim=-1)
    bound = (DIM + 8) * 2.0**-24 * (size + side.mean.double().norm(dim=-1)[:, None])
    assert ((found - expected).abs().amax(-1) <= bound).all()


def test_gain_is_the_weighted_least_squares_optimum() -> None:
    side, block_table = mixed_side(), block_table_of(1)
    codec = key_codec(side)
    x = cached_keys(side, block_table, batch=1)
    fields = codec.encode(x, block_table, None)
    levels = dequantized_by_hand(codec, side, fields["codes"][0, 0])
    weights = (side.spectrum * (side.widths > 0))[..., None]
    y = codec.coefficients(x, block_table, None)[0].double()
    optimum = (weights * y * levels).sum(1) / (weights * levels * levels).sum(1)
    ratio = dequantize_gain(fields["gains"][0, 0]).double() / optimum
    assert (ratio.log2().abs() <= 0.5 / GAIN_STEPS + 1e-5).all()


def test_gain_search_keeps_the_best_candidate() -> None:
    side, block_table = mixed_side(), block_table_of(1)
    codec = key_codec(side)
    x = cached_keys(side, block_table, batch=1)
    y = codec.coefficients(x, block_table, None)[0].double()
    coded = (side.widths > 0)[..., None]
    weights = side.spectrum[..., None] * coded
    rms = ((y * y * coded).sum(1) / coded.sum(1)).sqrt()
    explained = []
    for factor in SETTINGS.gain_search:
        unit = y / (rms * factor)[:, None]
        levels = torch.zeros_like(y)
        for head, dim in coded[..., 0].nonzero().tolist():
            book = torch.tensor(gaussian_codebook(int(side.widths[head, dim])).levels, dtype=torch.float64)
            levels[head, dim] = book[(unit[head, dim, :, None] - book).abs().argmin(-1)]
        explained.append((weights * y * levels).sum(1) ** 2 / (weights * levels * levels).sum(1))
    kept = dequantized_by_hand(codec, side, codec.encode(x, block_table, None)["codes"][0, 0])
    found = (weights * y * kept).sum(1) ** 2 / (weights * kept * kept).sum(1)
    best = torch.stack(explained).amax(0)
    # A coefficient within float32 rounding of a boundary may take the other level, at next to no difference in error.
    assert (found >= best * (1 - 1e-5)).all()
    assert (torch.stack(explained).argmax(0).unique() == torch.arange(len(SETTINGS.gain_search))).all()
    single = SpectralCodec(side, ROPE, CodecSettings(gain_search=(1.0,), coding="scalar"))
    plain = dequantized_by_hand(single, side, single.encode(x, block_table, None)["codes"][0, 0])
    assert float(found.sum()) > float(((weights * y * plain).sum(1) ** 2 / (weights * plain * plain).sum(1)).sum())


def test_gain_codes() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    gains = dequantize_gain(codes)
    assert gains[0] == 0
    assert gains[128] == 1
    assert torch.equal(quantize_gain(gains), codes)
    steps = gains[2:].double() / gains[1:-1].double()
    assert torch.allclose(steps, torch.full_like(steps, 2 ** (1 / GAIN_STEPS)), rtol=2.0**-22, atol=0)


def test_gain_rounding_and_saturation() -> None:
    gains = torch.logspace(-3.95, 3.95, 10_000, base=2.0)
    ratio = dequantize_gain(quantize_gain(gains)).double() / gains.double()
    assert (ratio.log2().abs() <= 0.5 / GAIN_STEPS + 1e-5).all()
    assert quantize_gain(torch.tensor([0.0, 1e-38, 2.0**-5])).tolist() == [0, 0, 0]
    assert quantize_gain(torch.tensor([2.0**5, 1e38, math.inf])).tolist() == [255, 255, 255]


def test_mean_vectors_decode_exactly_to_the_mean() -> None:
    side, block_table = random_side(HEADS, DIM, 3), block_table_of(2)
    codec = SpectralCodec(side, Rope(), SETTINGS)
    x = side.mean[None, :, None].expand(2, -1, 2 * BLOCK, -1)
    fields = codec.encode(x, block_table, None)
    assert not fields["gains"].any()
    # Zero lies on the middle boundary, and a value on a boundary takes the lower level.
    assert (unpack(fields["codes"].unflatten(-1, (-1, 6)), 3) == 3).all()
    assert torch.equal(codec.decode(fields, block_table, None), x)


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-12, 1e-3, 1e3, 1e9, 1e18, 1e30])
def test_any_magnitude_is_finite_and_costs_no_more_than_coding_nothing(scale: float) -> None:
    side, block_table = mixed_side(), block_table_of(2)
    codec = key_codec(side)
    x = (cached_keys(side, block_table).double() * scale).float()
    decoded = codec.decode(codec.encode(x, block_table, None), block_table, None)
    assert torch.isfinite(decoded).all()
    error, power = coefficient_error(side, block_table, x, decoded)
    # The gain lies between zero and the optimum or half a step above it; float32 rounding comes on top.
    assert (error <= power * (1 + (HALF_STEP - 1) ** 2 + 1e-5)).all()


@pytest.mark.parametrize("peak", [torch.finfo(torch.bfloat16).max, -3e38])
def test_single_outliers_leave_other_tokens_alone(peak: float) -> None:
    side, block_table = mixed_side(), block_table_of(1)
    codec = key_codec(side)
    x = cached_keys(side, block_table)
    clean = codec.encode(x, block_table, None)
    x[0, 0, 7, 3] = peak
    fields = codec.encode(x, block_table, None)
    decoded = codec.decode(fields, block_table, None)
    assert torch.isfinite(decoded).all()
    others = [t for t in range(BLOCK) if t != 7]
    reference = codec.decode(clean, block_table, None)
    assert torch.equal(fields["gains"][..., others], clean["gains"][..., others])
    assert torch.equal(decoded[:, :, others], reference[:, :, others])
    assert torch.equal(decoded[1], reference[1])


@pytest.mark.parametrize("unit", [1e-15, 1e-6, 1e6, 1e15])
def test_unit_of_the_metric_does_not_matter(unit: float) -> None:
    """Loss may be measured in any unit: A scales with its root, the spectrum with it, codes and vectors stay."""
    side, block_table = mixed_side(), block_table_of(1)
    scaled = SideCalibration(side.mean, side.analysis * unit, side.spectrum * unit**2, side.widths)
    x = cached_keys(side, block_table)
    fields, others = (key_codec(s).encode(x, block_table, None) for s in (side, scaled))
    agreeing = [float((fields[name] == others[name]).double().mean()) for name in fields]
    # Rounding the scaled constants moves a value across a boundary about once in 1e5.
    assert min(agreeing) > 0.99


def test_no_bits_at_all() -> None:
    side, block_table = random_side(HEADS, DIM, 0), block_table_of(1)
    codec = SpectralCodec(side, Rope(), SETTINGS)
    x = gaussian_vectors(side, 2, BLOCK).float()
    fields = codec.encode(x, block_table, None)
    assert fields["codes"].shape == (1, 2, 0)
    assert torch.equal(codec.decode(fields, block_table, None), side.mean[None, :, None].expand(2, -1, BLOCK, -1))
    assert codec.bits == 8 / DIM


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_shapes_and_bits(dtype: torch.dtype) -> None:
    side, block_table = mixed_side(), block_table_of(3)
    codec = key_codec(side)
    fields = codec.encode(cached_keys(side, block_table, batch=3).to(dtype), block_table, None)
    total = int(side.widths.sum())
    assert fields["codes"].shape == (3, 3, 2 * total)
    assert fields["codes"].dtype == torch.int32
    assert fields["gains"].shape == (3, 3, HEADS, BLOCK)
    assert fields["gains"].dtype == torch.uint8
    stored_bits = 32 * fields["codes"][0, 0].numel() + 8 * fields["gains"][0, 0].numel()
    assert codec.bits == pytest.approx(stored_bits / (HEADS * BLOCK * DIM), rel=1e-15)
    assert codec.decode(fields, block_table, None).shape == (3, HEADS, 3 * BLOCK, DIM)


def test_a_block_encodes_alike_alone_and_among_others() -> None:
    side, block_table = mixed_side(), block_table_of(5)
    codec = key_codec(side)
    x = cached_keys(side, block_table).bfloat16()
    together = codec.encode(x, block_table, None)
    wider = torch.cat((torch.zeros_like(x), x), dim=2)[:, :, 5 * BLOCK :]  # the same numbers in a larger buffer
    for i in range(5):
        block = slice(i * BLOCK, (i + 1) * BLOCK)
        for source in (x, wider):
            alone = codec.encode(source[:, :, block], block_table[i : i + 1], None)
            assert torch.equal(alone["codes"][0], together["codes"][i])
            assert torch.equal(alone["gains"][0], together["gains"][i])


def test_rows_encode_alike_alone_and_together() -> None:
    side, block_table = mixed_side(), block_table_of(2)
    codec = key_codec(side)
    x = cached_keys(side, block_table, batch=3)
    together = codec.decode(codec.encode(x, block_table, None), block_table, None)
    for row in range(3):
        alone = codec.decode(codec.encode(x[row : row + 1], block_table, None), block_table, None)
        # The products of another batch may be summed in another order: a code on a boundary may tip.
        assert ((alone[0] - together[row]).abs().amax(-1) > 1e-4).double().mean() < 0.01


def test_padded_rows_encode_as_the_same_row_without_padding() -> None:
    side, block_table = mixed_side(), block_table_of(2, first=40)
    codec = key_codec(side)
    left_padding = torch.tensor([0, 33])
    x = cached_keys(side, block_table, left_padding)
    fields = codec.encode(x, block_table, left_padding)
    decoded = codec.decode(fields, block_table, left_padding)
    shifted = block_table - torch.tensor([33, 0, 33], dtype=torch.int32)
    for row, own in ((0, block_table), (1, shifted)):
        pair = x[row : row + 1].expand(2, -1, -1, -1)  # the same shapes, so the same order of sums
        alone = codec.encode(pair, own, None)
        assert torch.equal(alone["codes"][:, 0], fields["codes"][:, row])
        assert torch.equal(alone["gains"][:, 0], fields["gains"][:, row])
        assert torch.equal(codec.decode(alone, own, None)[0], decoded[row])


def test_positions_of_blocks() -> None:
    block_table = torch.tensor([[4, 64, 4], [68, 30, 4], [98, 64, 98]], dtype=torch.int32)
    positions, anchors = block_positions(block_table, torch.tensor([0, 4]))
    assert positions.shape == anchors.shape == (2, 3 * BLOCK)
    assert positions[0].tolist() == [*range(4, 68), *range(68, 132), *range(98, 162)]
    assert anchors[0].tolist() == [4] * 128 + [98] * 64
    assert torch.equal(positions[1], positions[0] - 4)
    assert torch.equal(anchors[1], anchors[0] - 4)


def test_constants_are_listed_in_full() -> None:
    codec = key_codec(mixed_side())

    def walk(value: object) -> list[Tensor]:
        if isinstance(value, Tensor):
            return [value]
        if isinstance(value, dict):
            value = tuple(value.values())
        if isinstance(value, tuple | list):
            return [t for item in value for t in walk(item)]
        return [t for item in vars(value).values() for t in walk(item)] if hasattr(value, "__dict__") else []

    held = {t.data_ptr() for t in walk(codec) if t.numel()}
    assert held == {t.data_ptr() for t in codec.tensors() if t.numel()}


def test_dense_side_has_no_codec() -> None:
    with pytest.raises(ValueError, match="no widths"):
        SpectralCodec(random_side(HEADS, DIM, None), Rope(), SETTINGS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_codec_keeps_every_bit(dtype: torch.dtype) -> None:
    codec, block_table = DenseCodec(), block_table_of(3)
    x = torch.randn(2, HEADS, 3 * BLOCK, DIM).to(dtype)
    fields = codec.encode(x, block_table, None)
    assert fields["dense"].shape == (3, 2, HEADS, BLOCK, DIM)
    assert fields["dense"].dtype == dtype
    assert torch.equal(codec.decode(fields, block_table, torch.tensor([1, 2])), x)
    assert codec.bits is None
    assert codec.tensors() == []


def test_split_and_join_of_blocks() -> None:
    x = torch.arange(2 * 3 * 128 * 5).view(2, 3, 128, 5)
    blocks = split_blocks(x)
    assert blocks.shape == (2, 2, 3, BLOCK, 5)
    assert torch.equal(blocks[1], x[:, :, BLOCK:])
    assert torch.equal(join_blocks(blocks), x)
