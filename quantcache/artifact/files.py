"""Reading and writing the files of a calibration. Malformed files raise ArtifactError."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantcache.artifact.checks import (
    MAX_ARTIFACT_HEADER,
    MAX_LAYERS,
    check_description,
    check_rope,
    check_side,
    check_sizes,
    check_widths,
)
from quantcache.coding.packing import BLOCK, MAX_WIDTH
from quantcache.coding.rope import ANCHOR_LENGTH, Rope
from quantcache.coding.schema import (
    SIDES,
    CodecSettings,
    LayerCalibration,
    Metadata,
    Rate,
    SideBits,
    SideCalibration,
    spelled_out,
)
from quantcache.common.errors import ArtifactError, SettingsError
from quantcache.common.jsonfile import read_json
from quantcache.common.tensor_file import TensorFile, checksum
from quantcache.common.writing import TornFiles

TENSORS_NAME = "calibration.safetensors"
CONFIG_NAME = "calibration_config.json"
ARTIFACT_FILES = (CONFIG_NAME, TENSORS_NAME)
FORMAT = "quantcache-calibration"
SCHEMA_VERSION = "1.1"
DIGEST = "digest"
"""Where both files of an artifact carry one text: checksums of the tensors and of the JSON as they were written.

The first is compared with the tensors. The JSON may be edited: what it says is checked, and somebody may know better.
"""


def to_files(layers_by_index: dict[int, LayerCalibration], meta: Metadata) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON of an artifact."""
    tensors: dict[str, Tensor] = {}
    ropes: list[Rope] = []
    layers = []
    for index, layer in layers_by_index.items():
        if layer.rope not in ropes:
            ropes.append(layer.rope)
            tensors[f"rope.{len(ropes) - 1}.inv_freq"] = torch.tensor(
                layer.rope.inv_freq, dtype=torch.float64, device="cpu"
            )
        for name in SIDES:
            side = layer.side(name)
            prefix = f"layers.{index}.{name}"
            tensors[f"{prefix}.mean"] = side.mean.contiguous()
            tensors[f"{prefix}.analysis"] = side.analysis.contiguous()
            tensors[f"{prefix}.spectrum"] = side.spectrum.contiguous()
            if side.widths is not None:
                tensors[f"{prefix}.widths"] = side.widths.contiguous()
        layers.append(
            {
                "index": index,
                "num_key_value_heads": layer.key.num_heads,
                "key_dim": layer.key.dim,
                "value_dim": layer.value.dim,
                "rope": ropes.index(layer.rope),
            }
        )
    config = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "base_model": meta.base_model,
        "cache_config": meta.cache_config,
        "layers": layers,
        "rope": [{"layout": rope.layout, "num_pairs": len(rope.inv_freq)} for rope in ropes],
        "codec": {
            "block": BLOCK,
            "anchor_length": ANCHOR_LENGTH,
            "group_size": meta.codec.group_size,
            "profile": meta.codec.profile,
            "fast_wavelength": None if meta.codec.fast_wavelength == math.inf else meta.codec.fast_wavelength,
            "gain_search": list(meta.codec.gain_search),
            "coding": meta.codec.coding,
            # One pass is not said, so that files without a choice are those of before.
            **({} if meta.codec.passes == 1 else {"passes": meta.codec.passes}),
        },
        "rate": {
            **meta.rate.to_dict(),
            "joint": meta.joint,
        },
        "recipe": meta.recipe,
        "environment": meta.environment,
    }
    config[DIGEST] = f"{checksum(tensors)}-{checksum({}, json.dumps(config, sort_keys=True))}"
    return tensors, config


_KNOWN_KEYS = {
    "": {
        "format",
        "schema_version",
        "base_model",
        "cache_config",
        "layers",
        "rope",
        "codec",
        "rate",
        "recipe",
        "environment",
    },
    "codec": {"block", "anchor_length", "group_size", "profile", "fast_wavelength", "gain_search", "coding", "passes"},
    "rate": {"bits", "key_bits", "value_bits", "min_bits", "joint"},
}


_DEFAULTS: dict[str, dict[str, Any]] = {"codec": {"coding": "scalar", "passes": 1}}
"""What artifacts mean that were written before there was a choice."""


def from_files(config_path: Path, tensors_path: Path) -> tuple[dict[int, LayerCalibration], Metadata]:
    """Read and check an artifact."""
    config = _read_config(config_path)
    codec, rate = config["codec"], spelled_out(config["rate"])
    metadata = Metadata(
        base_model=config["base_model"],
        cache_config=config["cache_config"],
        recipe=config["recipe"],
        codec=_codec_settings(config_path, codec),
        rate=Rate(rate["bits"], rate["key_bits"], rate["value_bits"], rate["min_bits"]),
        joint=rate["joint"],
        environment=config["environment"],
    )
    with TensorFile(tensors_path, MAX_ARTIFACT_HEADER) as file:
        _require_pair(config_path, config.get(DIGEST), tensors_path, file.metadata.get(DIGEST))
        reader = TensorReader(file, tensors_path)
        ropes = _read_ropes(config, reader)
        layers = {}
        for entry in config["layers"]:
            index = _integer(entry, "index", "layer", 0, MAX_LAYERS - 1)
            if index in layers:
                raise ArtifactError(f"{config_path}: layer {index} is listed twice")
            heads = _integer(entry, "num_key_value_heads", f"layer {index}")
            rope = ropes[_integer(entry, "rope", f"layer {index}", 0, len(ropes) - 1)]
            key_dim = _integer(entry, "key_dim", f"layer {index}", max(1, rope.rotary_dim))
            value_dim = _integer(entry, "value_dim", f"layer {index}")
            wavelength = metadata.codec.fast_wavelength
            keys = _read_side(reader, f"layers.{index}.key", (heads, key_dim), metadata.rate.key_bits, rope, wavelength)
            values = _read_side(
                reader, f"layers.{index}.value", (heads, value_dim), metadata.rate.value_bits, Rope(), wavelength
            )
            layers[index] = LayerCalibration(rope, keys, values)
        reader.warn_unknown()
    check_widths(tensors_path, layers, metadata)
    _require_whole(tensors_path, reader.found, str(config.get(DIGEST)))
    return layers, metadata


def _require_pair(config_path: Path, ours: Any, tensors_path: Path, theirs: str | None) -> None:
    """Refuse the config of one artifact with the tensors of another; those of old versions have no digests."""
    if ours != theirs:
        told = [str(digest)[:12] if digest is not None else "no digest" for digest in (ours, theirs)]
        raise TornFiles(
            f"{config_path} ({told[0]}) and {tensors_path.name} ({told[1]}) were not written together: one belongs "
            "to another calibration, or saving was interrupted; save the calibration again"
        )


def _require_whole(path: Path, tensors: dict[str, Tensor], digest: str) -> None:
    """Refuse tensors that are not those that were written; digests of older versions do not tell."""
    expected, dash, _ = digest.partition("-")
    if dash and (found := checksum(tensors)) != expected:
        raise ArtifactError(
            f"{path} is damaged: its tensors have checksum {found[:12]}, expected {expected[:12]}; save it again"
        )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise ArtifactError(f"{path} has format {found!r}, expected {FORMAT!r}")
    version = str(config.get("schema_version"))
    if version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise ArtifactError(f"{path} has schema version {version}, this quantcache reads {SCHEMA_VERSION}")
    for section, known in _KNOWN_KEYS.items():
        found = config if not section else config[section]
        if not isinstance(found, dict):
            raise ArtifactError(f"{path}: {section} must be an object, got {type(found).__name__}")
        for name, value in _DEFAULTS.get(section, {}).items():
            found.setdefault(name, value)
        missing = known - found.keys()
        if missing:
            raise ArtifactError(f"{path}: {section or 'file'} lacks {', '.join(sorted(missing))}")
        unknown = found.keys() - known - {DIGEST}
        if unknown:
            names = ", ".join(sorted(map(str, unknown)))
            warnings.warn(f"{path}: ignoring unknown {section} keys {names}", stacklevel=4)
    for name in ("base_model", "cache_config", "recipe", "environment"):
        if not isinstance(config[name], dict):
            raise ArtifactError(f"{path}: {name} must be an object, got {type(config[name]).__name__}")
    for name in ("layers", "rope"):
        if not isinstance(config[name], list) or not all(isinstance(entry, dict) for entry in config[name]):
            raise ArtifactError(f"{path}: {name} must be a list of objects")
    _check_rate(path, config["rate"])
    check_description(path, config)
    return config


def _codec_settings(path: Path, codec: dict[str, Any]) -> CodecSettings:
    for name, expected in (("block", BLOCK), ("anchor_length", ANCHOR_LENGTH)):
        if codec[name] != expected:
            raise ArtifactError(f"{path}: {name} is {codec[name]!r}, this quantcache reads {expected}")
    codec = {field.name: codec[field.name] for field in fields(CodecSettings)}
    if codec["fast_wavelength"] is None:  # JSON has no infinity
        codec["fast_wavelength"] = math.inf
    else:
        _number(codec, "fast_wavelength", str(path))
    try:
        return CodecSettings(**codec)
    except SettingsError as error:
        raise ArtifactError(f"{path}: {error}") from error


def _check_rate(path: Path, rate: dict[str, Any]) -> None:
    if not isinstance(rate["joint"], bool):
        raise ArtifactError(f"{path}: joint must be true or false, got {rate['joint']!r}")
    _number(rate, "bits", str(path), MAX_WIDTH)
    _integer(rate, "min_bits", str(path), 0, MAX_WIDTH)
    for name in ("key_bits", "value_bits"):
        if rate[name] not in (None, "joint", "dense"):
            _number(rate, name, str(path), MAX_WIDTH)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _number(section: dict[str, Any], name: str, where: str, most: float = 1e9) -> float:
    value: Any = section.get(name)
    if not _is_number(value) or not 0 <= value <= most:
        raise ArtifactError(f"{where}: {name} must be a number from 0 to {most:g}, got {value!r}")
    return float(value)


def _integer(section: dict[str, Any], name: str, where: str, least: int = 1, most: int = 1 << 20) -> int:
    value = section.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ArtifactError(f"{where}: {name} must be an integer from {least} to {most}, got {value!r}")
    return value


class TensorReader:
    """Hands out tensors of a safetensors file after checking name, shape, dtype and finiteness.

    Args:
        file: An open safetensors file.
        path: Its path, for messages.
        finite: Whether NaN and infinity are refused.

    Attributes:
        unread: Names not read yet.
        found: Tensors read, by name.
    """

    def __init__(self, file: TensorFile, path: Path, finite: bool = True):
        self.file, self.path, self.finite = file, path, finite
        self.unread = set(file.keys())
        self.found: dict[str, Tensor] = {}

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """One tensor.

        Args:
            name: Name in the file.
            shape: The shape it must have; checked before anything is read.
            dtype: The dtype it must have.

        Returns:
            The tensor.

        Raises:
            ArtifactError: The tensor is missing, or has another dtype or shape.
        """
        if name not in self.unread:
            raise ArtifactError(f"{self.path} lacks the tensor {name}")
        self.unread.discard(name)
        found = self.file.shape(name)
        if found != shape:
            raise ArtifactError(f"{self.path}: {name} has shape {list(found)}, expected {list(shape)}")
        tensor = self.file.read(name)
        if tensor.dtype != dtype:
            raise ArtifactError(f"{self.path}: {name} is {tensor.dtype}, expected {dtype}")
        if self.finite and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"{self.path}: {name} has NaN or infinite values")
        self.found[name] = tensor
        return tensor

    def warn_unknown(self) -> None:
        """Name the tensors that nobody has read."""
        if self.unread:
            warnings.warn(f"{self.path}: ignoring unknown tensors {', '.join(sorted(self.unread)[:5])}", stacklevel=4)


def _read_ropes(config: dict[str, Any], reader: TensorReader) -> list[Rope]:
    ropes = []
    for i, entry in enumerate(config["rope"]):
        layout = entry.get("layout")
        if layout not in ("none", "half", "interleaved"):
            raise ArtifactError(f"rope {i}: layout is {layout!r}, expected 'none', 'half' or 'interleaved'")
        pairs = _integer(entry, "num_pairs", f"rope {i}", 0)
        inv_freq = reader.read(f"rope.{i}.inv_freq", (pairs,), torch.float64)
        check_rope(f"rope {i}", layout, inv_freq)
        ropes.append(Rope(layout, tuple(inv_freq.tolist())))
    return ropes


def _read_side(
    reader: TensorReader, prefix: str, size: tuple[int, int], bits: SideBits, rope: Rope, fast_wavelength: float
) -> SideCalibration:
    heads, dim = size
    check_sizes(f"{reader.path}: {prefix}", heads, dim)
    mean = reader.read(f"{prefix}.mean", size, torch.float32)
    analysis = reader.read(f"{prefix}.analysis", (heads, dim, dim), torch.float32)
    spectrum = reader.read(f"{prefix}.spectrum", size, torch.float64)
    widths = None
    if bits != "dense":
        widths = reader.read(f"{prefix}.widths", size, torch.uint8)
        if int(widths.max()) > MAX_WIDTH:
            raise ArtifactError(f"{reader.path}: {prefix}.widths has {int(widths.max())} bits, at most {MAX_WIDTH}")
    side = SideCalibration(mean, analysis, spectrum, widths)
    check_side(f"{reader.path}: {prefix}", side, rope, fast_wavelength)
    return side
