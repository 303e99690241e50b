"""A filled cache on disk: one safetensors file with its description as JSON in the header.

The file holds what the cache stores, codes as codes. The calibration's constants are not in it: their fingerprint is,
and a file is read only with the calibration it was written with. Every flaw of a file gives one clear error.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import astuple
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from quantcache.artifact.calibration import Calibration
from quantcache.artifact.checks import MAX_ARTIFACT_HEADER
from quantcache.artifact.files import TensorReader
from quantcache.backends.padding import Grid
from quantcache.backends.spans import Span
from quantcache.backends.store import BlockStore
from quantcache.cache.fingerprints import calibration_digest, model_digest, model_settings
from quantcache.cache.layer import SpectralLayer
from quantcache.cache.mixed_layers import MIXED
from quantcache.cache.state import NO_BLOCKS, LayerState
from quantcache.coding.blocks import SideCodec
from quantcache.coding.codec import SpectralCodec
from quantcache.coding.packing import BLOCK
from quantcache.coding.rope import ANCHOR_LENGTH
from quantcache.coding.schema import SIDES, LayerCalibration, Rate, spelled_out
from quantcache.common import compat
from quantcache.common.errors import ArtifactError, CalibrationMismatch, QuantCacheError
from quantcache.common.jsonfile import as_type, parse_json
from quantcache.common.tensor_file import TensorFile, checksum, save_file
from quantcache.common.writing import destination, partial_folder, put_in_place

FORMAT = "quantcache-cache"
SCHEMA_VERSION = "2.3"
DESCRIPTION = "quantcache"
"""Key of the JSON description in the safetensors header."""

TOKENS = "tokens"
"""The tensor that names a prefix's tokens, in the files of a PrefixStore."""

MAX_LENGTH = 1 << 30
"""More tokens than any cache holds."""

_DTYPES = {str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


# ---------------------------------------------------------------------- writing


def write_cache(
    path: Path,
    cache: Cache,
    calibration: Calibration,
    model: PreTrainedModel | None,
    unchanged: Callable[[], bool] = lambda: True,
    prefix: tuple[Tensor, str] | None = None,
) -> None:
    """Write a cache, complete or not at all.

    Args:
        path: File to write; an existing one is replaced.
        cache: Cache between two forward passes.
        calibration: Calibration the cache was filled with.
        model: The model that filled it.
        unchanged: Says, once all is written, whether the cache still holds what was read.
        prefix: The token ids that the cache holds, ``[T]`` int64, and what identifies model and calibration together.

    Raises:
        QuantCacheError: The cache holds something that cannot be written, a forward pass was interrupted, or another
            thread has changed the cache in the meantime.
    """
    lengths = [layer.get_seq_length() for layer in cache.layers if isinstance(layer, SpectralLayer)]
    if len(set(lengths)) > 1:
        raise QuantCacheError(
            f"some layers hold {min(lengths)} tokens and others {max(lengths)}: call rollback() or reset() first"
        )
    tensors: dict[str, Tensor] = {} if prefix is None else {TOKENS: prefix[0]}
    layers = []
    for index, layer in enumerate(cache.layers):
        entry: dict[str, Any] = {"kind": type(layer).__name__}
        if isinstance(layer, SpectralLayer) and not isinstance(layer, MIXED):
            held = layer.get_seq_length() > 0
            tensors |= _layer_tensors(layer, calibration, index) if held else {}
            entry |= _describe(layer) if held else {"tokens": 0}
        else:
            state = None if isinstance(layer, MIXED) else compat.stock_layer_state(layer)
            if state is None:
                raise QuantCacheError(f"layer {index} is a {entry['kind']}, which cannot be written to a file")
            tensors |= {f"layers.{index}.{name}": tensor for name, tensor in state.tensors.items()}
            entry |= state.numbers
        layers.append(entry)
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    spectral = [layer for layer in cache.layers if isinstance(layer, SpectralLayer)]
    description = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "cache_config": calibration.metadata.cache_config,
        "rate": calibration.metadata.rate.to_dict(),
        "sink_length": spectral[0].sink_length if spectral else 0,
        "residual_length": spectral[0].residual_length if spectral else 0,
        "calibration": calibration_digest(calibration),
        "model": None if model is None else model_digest(model),
        "settings": None if model is None else model_settings(model),
        "layers": layers,
        "sha256": checksum(tensors),
        "environment": compat.versions(),
    }
    if prefix is not None:
        description["identity"] = prefix[1]
    path = destination(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial_folder(path.parent) as folder:
        temporary = folder / path.name
        save_file(tensors, temporary, metadata={"format": "pt", DESCRIPTION: json.dumps(description)})
        if not unchanged():
            raise QuantCacheError(f"another thread changed the cache while it was being written to {path}")
        put_in_place(temporary, path)


def _layer_tensors(layer: SpectralLayer, calibration: Calibration, index: int) -> dict[str, Tensor]:
    """What a layer stores, by name in the file."""
    layer.flush_if_finite()
    heads, whole = layer.tails["key"].shape[1], calibration.layers[index].key.num_heads
    if heads != whole:
        raise QuantCacheError(f"layer {index} holds {heads} of {whole} heads: a tensor-parallel cache cannot be saved")
    prefix = f"layers.{index}"
    state, blocks = layer.state, layer.state.blocks
    told = {"starts": blocks.left_padding, "origins": blocks.origins, "trail": state.trail}
    found = {f"{prefix}.{name}": tensor for name, tensor in told.items() if tensor is not None}
    if blocks.spans:
        found[f"{prefix}.places"] = blocks.table.buffers["block_table"][: blocks.table.count]
    for side in SIDES:
        found[f"{prefix}.{side}.tail"] = state.tails[side]
        if blocks.spans:
            found[f"{prefix}.{side}.sinks"] = blocks.sinks[side]
            if side in blocks.leads:
                found[f"{prefix}.{side}.lead"] = blocks.leads[side]
            found |= {f"{prefix}.{side}.{name}": buffer for name, buffer in layer.fields(side).items()}
    return found


def _describe(layer: SpectralLayer) -> dict[str, Any]:
    state, blocks = layer.state, layer.state.blocks
    return {
        "tokens": state.length,
        "rows": state.tails["key"].shape[0],
        "blocks": len(blocks.spans),
        "tail": state.tails["key"].shape[2],
        "dtypes": [str(state.tails[side].dtype) for side in SIDES],
        "padded": blocks.left_padding is not None,
        "displaced": blocks.origins is not None,
        "shifted": "shifts" in blocks.stores["key"].buffers,
        "trail": state.trail is not None,
    }


# ---------------------------------------------------------------------- reading


def read_description(path: Path) -> dict[str, Any]:
    """The description of a cache file.

    Args:
        path: File that ``save`` has written.

    Returns:
        The JSON object; its bits and lengths have been checked.

    Raises:
        ArtifactError: The file cannot be read, or is something else.
    """
    try:
        with TensorFile(path, MAX_ARTIFACT_HEADER) as file:
            description = parse_json(file.metadata.get(DESCRIPTION, "null"))
    except ValueError as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ArtifactError(f"{path} is not a saved cache: its header has no {FORMAT!r} description")
    version = str(description.get("schema_version"))
    if version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise ArtifactError(f"{path} has schema version {version}, this quantcache reads {SCHEMA_VERSION}")
    for name in ("sink_length", "residual_length"):
        if type(description.get(name)) is not int or not 0 <= description[name] < MAX_LENGTH:
            raise ArtifactError(f"{path}: {name} must be a number of tokens, got {description.get(name)!r}")
    return description


def read_prefix(path: Path) -> tuple[str, Tensor]:
    """What a file of a PrefixStore holds; the checksum is for :func:`read_cache` to compare.

    Args:
        path: A file with the tokens of its prefix.

    Returns:
        What identifies model and calibration, and the token ids, ``[T]``.

    Raises:
        ArtifactError: The file cannot be read, or does not name its tokens.
    """
    identity = read_description(path).get("identity")
    with TensorFile(path, MAX_ARTIFACT_HEADER) as file:
        names = file.keys()
        if not isinstance(identity, str) or TOKENS not in names or len(file.shape(TOKENS)) != 1:
            raise ArtifactError(f"{path} does not say which tokens it holds")
        return identity, TensorReader(file, path).read(TOKENS, file.shape(TOKENS), torch.int64)


def calibration_at(description: dict[str, Any], calibration: Calibration, path: Path) -> Calibration:
    """A calibration at the bits that a file was written at.

    Args:
        description: From :func:`read_description`.
        calibration: The model's calibration at any bits.
        path: The file, for messages.

    Returns:
        The calibration.

    Raises:
        ArtifactError: The bits in the description are malformed.
    """
    try:
        rate: Rate = as_type(Rate, spelled_out(description.get("rate")), "rate")
        return calibration if rate == calibration.metadata.rate else calibration.with_rate(rate)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{path}: the rate is malformed: {error}") from error


def read_cache(path: Path, description: dict[str, Any], cache: Cache, calibration: Calibration) -> None:
    """Fill an empty cache from a file.

    Args:
        path: File that ``save`` has written.
        description: From :func:`read_description`.
        cache: An empty SpectralCache of the bits and lengths described.
        calibration: Calibration at the file's bits.

    Raises:
        ArtifactError: The file is damaged or malformed.
        CalibrationMismatch: The file was written with another calibration.
    """
    ours, theirs = calibration_digest(calibration), description.get("calibration")
    if ours != theirs:
        raise CalibrationMismatch(f"{path} was written with calibration {str(theirs)[:12]}, this one is {ours[:12]}")
    entries = description.get("layers")
    if not isinstance(entries, list) or len(entries) != len(cache.layers):
        found = len(entries) if isinstance(entries, list) else entries
        raise ArtifactError(f"{path} describes {found} layers, the model has {len(cache.layers)}")
    with TensorFile(path, MAX_ARTIFACT_HEADER) as file:
        reader = TensorReader(file, path, finite=False)  # a model's tokens may hold anything
        for index, (layer, entry) in enumerate(zip(cache.layers, entries, strict=True)):
            _read_layer(reader, layer, entry, index, calibration)
        if TOKENS in reader.unread:
            reader.read(TOKENS, (cache.get_seq_length(),), torch.int64)
        if reader.unread:
            raise ArtifactError(f"{path} has unknown tensors {', '.join(sorted(reader.unread)[:5])}")
        found = checksum(reader.found)
    if found != description.get("sha256"):
        raise ArtifactError(
            f"{path} is damaged: its tensors have checksum {found[:12]}, expected {str(description.get('sha256'))[:12]}"
        )
    lengths = {layer.get_seq_length() for layer in cache.layers if isinstance(layer, SpectralLayer)}
    if len(lengths) > 1:
        raise ArtifactError(f"{path}: layers hold {sorted(lengths)} tokens, all must hold the same")


def _read_layer(reader: TensorReader, layer: Any, entry: Any, index: int, calibration: Calibration) -> None:
    kind = entry.get("kind") if isinstance(entry, dict) else entry
    if kind != type(layer).__name__:
        raise ArtifactError(f"{reader.path}: layer {index} is a {kind}, the model has a {type(layer).__name__}")
    if not isinstance(layer, SpectralLayer):
        shapes = compat.stock_layer_shapes(layer, entry, f"{reader.path}: layer {index}")
        found = {
            name: reader.read(f"layers.{index}.{name}", shape, _dtype(reader, entry, i))
            for i, (name, shape) in enumerate(shapes.items())
        }
        compat.restore_stock_layer(layer, found, entry)
    elif _size(reader, entry, "tokens"):
        _read_spectral(reader, layer, entry, index, calibration.layers[index])


def _size(reader: TensorReader, entry: dict[str, Any], name: str) -> int:
    value = entry.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 40:
        raise ArtifactError(f"{reader.path}: {name} must be a whole number from 0 up, got {value!r}")
    return value


def _dtype(reader: TensorReader, entry: dict[str, Any], place: int) -> torch.dtype:
    names = entry.get("dtypes")
    name = names[place] if isinstance(names, list) and len(names) == len(SIDES) else names
    if not isinstance(name, str) or name not in _DTYPES:
        raise ArtifactError(f"{reader.path}: dtypes must be two of {', '.join(_DTYPES)}, got {names!r}")
    return _DTYPES[name]


def _read_spectral(
    reader: TensorReader, layer: SpectralLayer, entry: dict[str, Any], index: int, constants: LayerCalibration
) -> None:
    rows, blocks, tail = (_size(reader, entry, name) for name in ("rows", "blocks", "tail"))
    prefix = f"layers.{index}"
    sizes = {side: (constants.side(side).num_heads, constants.side(side).dim) for side in SIDES}
    empty = {
        side: torch.zeros(rows, heads, 0, dim, dtype=torch.float32, device="cpu")
        for side, (heads, dim) in sizes.items()
    }
    codecs = layer.make_codecs(torch.device("cpu"), empty, Grid())
    padded, displaced = entry.get("padded") is True, entry.get("displaced") is True
    left_padding = reader.read(f"{prefix}.starts", (rows,), torch.int64) if padded else None
    origins = reader.read(f"{prefix}.origins", (rows,), torch.int64) if displaced else None
    # A crop may have left rows that begin behind all tokens.
    if left_padding is not None and bool(((left_padding < 0) | (left_padding > MAX_LENGTH)).any()):
        raise ArtifactError(f"{reader.path}: {prefix}.starts must lie between 0 and {MAX_LENGTH}")
    trail = reader.read(f"{prefix}.trail", (rows, 2, tail), torch.int32) if entry.get("trail") is True else None
    tails, sinks, leads, stores = {}, {}, {}, {side: BlockStore() for side in SIDES}
    for place, side in enumerate(SIDES):
        codec, dtype = codecs[side], _dtype(reader, entry, place)
        heads, dim = sizes[side]
        tails[side] = reader.read(f"{prefix}.{side}.tail", (rows, heads, tail, dim), dtype)
        if blocks:
            shape = (rows, heads, layer.sink_length, dim)
            sinks[side] = reader.read(f"{prefix}.{side}.sinks", shape, dtype)
            if padded:
                # Files of schema 2.0 lack it: what lay before the first block was padding, which nobody may look at.
                name, known = f"{prefix}.{side}.lead", f"{prefix}.{side}.lead" in reader.unread
                leads[side] = (
                    reader.read(name, shape, dtype) if known else torch.zeros(shape, dtype=dtype, device="cpu")
                )
            fields = _field_shapes(codec, (blocks, rows, heads, dim), dtype)
            if side == "key" and entry.get("shifted") is True:
                fields["shifts"] = ((blocks, rows, BLOCK), torch.int32)
            stores[side] = BlockStore(
                blocks, {name: reader.read(f"{prefix}.{side}.{name}", *expected) for name, expected in fields.items()}
            )
    layer.lazy_initialization(*(tails[side] for side in SIDES))
    encoded = NO_BLOCKS._replace(left_padding=left_padding, origins=origins)
    if blocks:
        block_table = reader.read(f"{prefix}.places", (blocks, 3), torch.int32)
        spans = _read_spans(reader, block_table, layer.sink_length)
        table, cut = BlockStore(blocks, {"block_table": block_table}), any(span.length < BLOCK for span in spans)
        encoded = encoded._replace(
            codecs=codecs, spans=spans, table=table, stores=stores, sinks=sinks, leads=leads, cut=cut
        )
    layer._put(LayerState(encoded, tails, trail))
    if layer.get_seq_length() != entry["tokens"]:
        raise ArtifactError(
            f"{reader.path}: layer {index} holds {layer.get_seq_length()} tokens, the header says {entry['tokens']}"
        )


def _field_shapes(
    codec: SideCodec, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of a codec's fields for (blocks, rows, heads, dimension)."""
    blocks, rows, heads, dim = shape
    if isinstance(codec, SpectralCodec):
        return {
            "codes": ((blocks, rows, codec.num_words), torch.int32),
            "gains": ((blocks, rows, heads, BLOCK), torch.uint8),
        }
    return {"dense": ((blocks, rows, heads, BLOCK, dim), dtype)}


def _read_spans(reader: TensorReader, block_table: Tensor, sink_length: int) -> list[Span]:
    """The spans of a block table, if they follow each other as a layer's do."""
    spans = [Span(*place) for place in block_table.tolist()]
    previous = Span(sink_length, 0, sink_length)
    for first, second in pairwise([previous, *spans]):
        fits = second.start == first.end and 1 <= second.length <= BLOCK
        anchored = (
            second.anchor in (first.anchor, second.start) and second.start + BLOCK <= second.anchor + ANCHOR_LENGTH
        )
        if not fits or not anchored:
            raise ArtifactError(f"{reader.path}: a block at {astuple(second)} cannot follow one at {astuple(first)}")
    return spans
