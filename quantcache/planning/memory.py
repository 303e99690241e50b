"""How much memory a model with a cache takes: the cache to the byte, weights by their layout, activations by a formula.

Shape legend as in docs/notation.md: B rows, T cached tokens, Hkv key/value heads of dimension D.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from quantcache.accounting.memory import CacheMemory
from quantcache.accounting.predicting import predict_layers, predict_quantized
from quantcache.artifact import cache_layout
from quantcache.artifact.calibration import Calibration
from quantcache.backends.reference import QUERY_CHUNK, TILE_BLOCKS
from quantcache.coding.growth import TAIL_GROWTH, capacity, largest_capacity, num_blocks, tail_capacity
from quantcache.coding.packing import BLOCK
from quantcache.common.defaults import PREFILL_CHUNK, RESIDUAL_LENGTH, SINK_LENGTH
from quantcache.common.errors import QuantCacheError
from quantcache.evaluation.methods.installed import FP8_BITS, GROUP
from quantcache.planning.formats import Format, coded_layers, parse_format, require_full_attention
from quantcache.planning.geometry import Geometry, load_config, read_geometry


def estimate_memory(
    config: PreTrainedConfig | str | Path,
    format: str,
    tokens: int,
    batch: int = 1,
    *,
    calibration: Calibration | None = None,
    dtype: torch.dtype | str = torch.bfloat16,
    sink_length: int = SINK_LENGTH,
    residual_length: int = RESIDUAL_LENGTH,
    prefill: int | None = None,
    tiles: bool = False,
) -> CacheMemory:
    """Bytes that a cache will hold, from the model's config alone.

    Exactly what ``SpectralCache.memory()`` will say, shared constants and recurrent states apart, and for ``dense``
    what a DynamicCache will hold; sliding-window layers are counted as they are. The codes of ours are exact where
    the dimension of every head is a multiple of the codec's group size, or the calibration is given. transformers'
    quantized caches (quanto, hqq, fp8) are counted after one update, everything coded; of simulated formats it is the
    size that codes would take.

    Args:
        config: The model's config, or what :func:`quantcache.planning.geometry.load_config` takes.
        format: Name of the format: ``dense``, ``spectral-3``, ``quanto-4`` and so on.
        tokens: T, for rows without left padding.
        batch: B, rows of the batch.
        calibration: The model's calibration, for ours; its allocation then says what codes take.
        dtype: The model's dtype or its name, in which sinks, recent tokens and layers that are not compressed stay.
        sink_length: First tokens kept as they are.
        residual_length: Recent tokens kept as they are.
        prefill: How many of the tokens arrive in the first update, the others one by one; all if None.
        tiles: Whether ours stores codes as the CUDA kernels do, which models in bfloat16 get on newer GPUs: exact with
            the calibration, else as much as we have seen them take.

    Returns:
        The sizes by kind, ``constants`` zero.

    Raises:
        CalibrationMismatch: The calibration is for another geometry.
        FileNotFoundError: The config is to come from a GGUF file that does not exist.
        QuantCacheError: The format is unknown, a number is out of range, the config cannot be loaded, or the model's
            cache cannot be estimated.
    """
    if not isinstance(config, PreTrainedConfig):
        config = load_config(config)
    if calibration is not None:
        calibration.check_compatible(config)
    lengths = (("tokens", tokens, 1), ("batch", batch, 1), ("sink_length", sink_length, 0))
    for name, value, least in (*lengths, ("residual_length", residual_length, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise QuantCacheError(f"{name} must be a whole number from {least} up, got {value!r}")
    if prefill is not None and (type(prefill) is not int or not 1 <= prefill <= tokens):
        raise QuantCacheError(f"prefill must be a whole number between 1 and tokens ({tokens}), got {prefill!r}")
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(named, torch.dtype):
        raise QuantCacheError(f"dtype must be torch's or its name, such as 'bfloat16', got {dtype!r}")
    return cache_memory(
        parse_format(format),
        read_geometry(config),
        tokens,
        batch,
        calibration=calibration,
        element_bytes=named.itemsize,
        sink_length=sink_length,
        residual_length=residual_length,
        prefill=prefill,
        tiles=tiles,
    )


def cache_memory(
    form: Format,
    geometry: Geometry,
    tokens: int,
    batch: int = 1,
    *,
    calibration: Calibration | None = None,
    element_bytes: int = 2,
    sink_length: int = SINK_LENGTH,
    residual_length: int = RESIDUAL_LENGTH,
    prefill: int | None = None,
    tiles: bool = False,
) -> CacheMemory:
    """As :func:`estimate_memory`, for a model whose geometry is known.

    Args:
        form: How the cache is stored.
        geometry: The model's cache.
        tokens: T, cached tokens of each row.
        batch: B, rows of the batch.
        calibration: The model's calibration, for ours.
        element_bytes: Bytes per element of the model's dtype.
        sink_length: First tokens kept as they are.
        residual_length: Recent tokens kept as they are.
        prefill: How many of the tokens arrive in the first update; all if None.
        tiles: Whether ours stores codes as the CUDA kernels do.

    Returns:
        The sizes by kind.

    Raises:
        UnsupportedModel: The format cannot hold this model's cache.
    """
    if form.layout == "dense":
        return predict_layers(geometry.dense(), tokens, batch=batch, element_bytes=element_bytes)
    if form.layout == "quantized":
        recent = 0 if prefill is None else (tokens - prefill) % max(1, residual_length)
        return _quantized(form, geometry, tokens, batch, recent, element_bytes)
    blocks = num_blocks(tokens, sink_length, residual_length)
    prefilled = tokens if prefill is None else prefill
    first = num_blocks(prefilled, sink_length, residual_length)
    return predict_layers(
        coded_layers(form, geometry, calibration, tiles),
        tokens,
        batch=batch,
        sink_length=sink_length,
        residual_length=residual_length,
        element_bytes=element_bytes,
        room=capacity(blocks, first) if form.layout == "spectral" else None,
        tail_room=tail_capacity(tokens, prefilled, sink_length, residual_length, form.blocks_at_once),
        blocks_at_once=form.blocks_at_once,
    )


def _quantized(
    form: Format, geometry: Geometry, tokens: int, batch: int, recent: int, element_bytes: int = 2
) -> CacheMemory:
    """Sizes of transformers' quantized cache; fp8, which has no number of bits, has no groups and codes all tokens."""
    require_full_attention(form, geometry)
    return predict_quantized(
        geometry.layers,
        tokens,
        bits=int(form.bits or FP8_BITS),
        group=GROUP if form.bits else None,
        batch=batch,
        recent=recent if form.bits else 0,
        element_bytes=element_bytes,
    )


def largest_cache(
    form: Format, geometry: Geometry, tokens: int, batch: int, calibration: Calibration | None = None
) -> int:
    """Bytes that a 16-bit model's cache holds at most while it grows to T tokens, in whatever steps.

    Blocks are encoded when 64 tokens (or those of a longer tile) have gathered, stores grow by a sixteenth and tails by
    an eighth, so that a cache may hold a little more than its size after one update. Codes are counted in tiles, in
    which some kernels store them. It never decreases with T.

    Args:
        form: How the cache is stored.
        geometry: The model's cache.
        tokens: T, cached tokens of each row.
        batch: B, rows of the batch.
        calibration: The model's calibration, for ours.

    Returns:
        Bytes, the states of recurrent layers included.
    """
    states = batch * geometry.state_bytes
    if form.layout == "dense":
        return states + cache_memory(form, geometry, tokens, batch).total
    if form.layout == "quantized":
        return _quantized(form, geometry, tokens, batch, min(tokens, RESIDUAL_LENGTH - 1)).total
    once = form.blocks_at_once
    blocks = num_blocks(tokens, SINK_LENGTH, RESIDUAL_LENGTH, once)
    full = SINK_LENGTH + RESIDUAL_LENGTH + BLOCK * (blocks + once) - 1 if blocks else tokens
    layers = coded_layers(form, geometry, calibration, tiles=True)
    tail_room = largest_capacity(full - BLOCK * blocks - (SINK_LENGTH if blocks else 0), TAIL_GROWTH)
    rooms = {"room": largest_capacity(blocks), "tail_room": tail_room}
    return states + predict_layers(layers, full, batch=batch, blocks_at_once=once, **rooms).total


def constants_bytes(form: Format, geometry: Geometry, calibration: Calibration | None = None) -> int:
    """Bytes of the constants that all caches of a model share: 8·D² + 25·D for each head and side, and 16 for each bit.

    That is encoder and decoder in float32, and tables of each coefficient. What kernels keep beside them is not in it.

    Args:
        form: How the cache is stored.
        geometry: The model's cache.
        calibration: The model's calibration, for ours.

    Returns:
        Bytes; 0 for formats other than ours.
    """
    if form.layout != "spectral":
        return 0
    layers = [layer for layer in coded_layers(form, geometry, calibration) if layer.blocks]
    sides = [side for layer in layers for side in (layer.key, layer.value) if side.code_bits is not None]
    return sum(side.elements * (8 * side.dim + 25) + 16 * int(side.code_bits or 0) for side in sides)


@dataclass(frozen=True)
class Activations:
    """What a forward pass needs beside weights and cache, estimated for 16 bits.

    Attributes:
        layer: Hidden states of one layer for one chunk of the prompt: 2·B·C·(3·hidden + max(2·Hq·D + new keys and
            values, 3·width of the MLP)).
        logits: Of the last token, in 16 bits and in float32: 6·B·vocabulary.
        mask: Of a chunk that is not the first: B·C·T.
        reading: What reading the cache of the largest layer makes for a moment. Dense: keys or values once more while
            a step is appended, or both for every query head while a chunk is read under a mask, whichever is more.
            transformers' quantized caches: keys and values in 16 bits twice, or once and for every query head; fp8
            keeps two copies of one side in float32 besides. Ours: its blocks once more, because stores grow by
            copying, a chunk's queries and outputs in float32, and the scores of a tile (at most 256 queries of every
            head against 512 keys) in float32 four times.
        windows: Tokens behind the window, at most a chunk, of all sliding layers: transformers' caches hold them until
            the next step. Ours hold those of one layer while it attends.
    """

    layer: int
    logits: int
    mask: int
    reading: int
    windows: int

    @property
    def total(self) -> int:
        """Bytes."""
        return self.layer + self.logits + self.mask + self.reading + self.windows


@dataclass(frozen=True)
class Widths:
    """How wide a model's activations are.

    Attributes:
        hidden: Features of a hidden state.
        heads: Query heads.
        mlp: Intermediate features of one token, of all experts that see it.
        vocabulary: Tokens that are known.
    """

    hidden: int
    heads: int
    mlp: int
    vocabulary: int


def read_widths(config: PreTrainedConfig) -> Widths:
    """The widths that a config declares.

    Args:
        config: ``model.config``.

    Returns:
        The largest of any layer.
    """
    text = config.get_text_config(decoder=True)
    return Widths(
        hidden=cache_layout.largest(text, "hidden_size") or 0,
        heads=cache_layout.largest(text, "num_attention_heads") or 1,
        mlp=_mlp_width(text),
        vocabulary=text.vocab_size,
    )


def estimate_activations(
    widths: Widths, form: Format, geometry: Geometry, tokens: int, batch: int, chunk: int = PREFILL_CHUNK
) -> Activations:
    """Estimate what a forward pass needs beside weights and cache, with attention that keeps no scores.

    Args:
        widths: From :func:`read_widths`.
        form: How the cache is stored.
        geometry: The model's cache.
        tokens: T, cached tokens of each row.
        batch: B, rows of the batch.
        chunk: Prompt tokens that go through the model at once, C.

    Returns:
        The estimate; its fields state the formulas.
    """
    masked = tokens > chunk
    chunk = min(chunk, tokens)
    widest = max(geometry.layers, key=lambda layer: layer.elements, default=None)
    queries = widths.heads * (0 if widest is None else widest.key.dim)
    new = 0 if widest is None else widest.elements
    tile = batch * widths.heads * min(chunk, QUERY_CHUNK) * min(tokens, TILE_BLOCKS * BLOCK)
    left = [
        2 * batch * each.elements * (min(tokens, each.window - 1 + chunk) - each.kept(tokens))
        for each in geometry.layers
        if each.window is not None
    ]
    windows = max(left, default=0) if form.layout in ("spectral", "blocks") else sum(left)
    return Activations(
        layer=2 * batch * chunk * (3 * widths.hidden + max(2 * queries + new, 3 * widths.mlp)),
        logits=6 * batch * widths.vocabulary,
        mask=batch * chunk * tokens if masked else 0,
        reading=_reading(form, geometry, tokens, batch, widths.heads if masked else 0)
        + (8 * batch * chunk * queries + 16 * tile if form.layout in ("spectral", "blocks") else 0),
        windows=windows,
    )


def _reading(form: Format, geometry: Geometry, tokens: int, batch: int, heads: int) -> int:
    """Bytes that reading the largest layer that grows with the context makes; ``heads`` read it under a mask."""
    layer = max((each for each in geometry.layers if each.blocks), key=lambda each: each.elements, default=None)
    if layer is None:
        return 0
    if form.layout in ("spectral", "blocks"):
        share = layer.elements / geometry.elements
        return round(share * largest_cache(form, geometry, tokens, batch))
    larger = max(layer.key.elements, layer.value.elements)
    grouped = heads > layer.key.heads
    repeated = 2 * heads * (layer.key.dim + layer.value.dim) if grouped else 0
    if form.layout == "dense":
        return batch * tokens * max(2 * larger, repeated)
    floats = 0 if form.bits else 8 * larger
    return batch * tokens * (2 * layer.elements + max(2 * layer.elements, repeated) + floats)


def _mlp_width(text: PreTrainedConfig) -> int:
    """Intermediate features of one token, of all experts that see it."""
    dense = cache_layout.largest(text, "intermediate_size", "ffn_dim") or 4 * (
        cache_layout.largest(text, "hidden_size") or 0
    )
    per_expert = cache_layout.largest(text, "moe_intermediate_size")
    experts = cache_layout.largest(text, "num_experts_per_tok")
    if experts is None:
        return dense
    return max(dense, experts * (per_expert or dense)) if per_expert else experts * dense
