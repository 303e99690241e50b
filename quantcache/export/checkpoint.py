"""Safetensors checkpoints, read and rewritten tensor by tensor.

A safetensors file is the length of its header (8 bytes, little-endian), a JSON header with dtype, shape and place of
every tensor, and their bytes. Absorption changes neither dtypes nor shapes, so a shard is copied as it is and the bytes
of the tensors that change are overwritten: nothing else can change, and one tensor is all that memory has to hold.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantcache.common.errors import QuantCacheError
from quantcache.common.jsonfile import MAX_RESULT_BYTES, parse_json, read_json
from quantcache.export.projections import TensorInfo

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Checkpoint:
    """The weights of a model's folder.

    Args:
        folder: Folder with safetensors files, with or without an index.

    Raises:
        QuantCacheError: The folder holds no safetensors weights, or they are truncated, malformed or incomplete.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.shards: list[str] = [SINGLE_NAME]
        """File names, in the order of the index."""
        weight_map: dict[str, str] | None = None
        if (folder / INDEX_NAME).is_file():
            weight_map = _read_index(folder / INDEX_NAME)
            self.shards = list(dict.fromkeys(weight_map.values()))
        missing = [name for name in self.shards if not (folder / name).is_file()]
        if missing:
            found = "its index names them" if weight_map else "weights in other formats are not read"
            raise QuantCacheError(f"{folder} is missing {', '.join(missing)} ({found})")
        self._places: dict[str, tuple[str, int, int]] = {}  # shard, first byte, number of bytes
        self.tensors: dict[str, TensorInfo] = {}
        """Every tensor, by name."""
        for shard in self.shards:
            self._add(shard)
        for name, shard in (weight_map or {}).items():
            actual = self._places[name][0] if name in self._places else "no shard"
            if actual != shard:
                raise QuantCacheError(f"{folder / INDEX_NAME} lists {name} in {shard}, but it is in {actual}")

    def _add(self, shard: str) -> None:
        path = self.folder / shard
        try:
            with safe_open(path, framework="pt"):  # checks the header, and that the file is as long as it says
                pass
        except (SafetensorError, OSError) as error:
            raise QuantCacheError(f"{path} cannot be read: {error}") from error
        with open(path, "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = parse_json(file.read(size), MAX_RESULT_BYTES)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if name in self._places:
                raise QuantCacheError(f"{self.folder}: {name} is in {self._places[name][0]} and in {shard}")
            first, last = entry["data_offsets"]
            self._places[name] = (shard, 8 + size + first, last - first)
            self.tensors[name] = TensorInfo(tuple(entry["shape"]), _DTYPES.get(entry["dtype"]))

    def read(self, name: str) -> Tensor:
        """Read one tensor.

        Args:
            name: Its name; its dtype must be a float.

        Returns:
            The tensor, in memory of its own.
        """
        shard, first, size = self._places[name]
        info = self.tensors[name]
        assert info.dtype is not None
        data = bytearray(size)
        with open(self.folder / shard, "rb") as file:
            file.seek(first)
            if file.readinto(data) != size:
                raise QuantCacheError(f"{self.folder / shard} changed while it was read: {name} is cut short")
        return torch.frombuffer(data, dtype=info.dtype).reshape(info.shape)

    def find(self, name: str) -> Tensor | None:
        """Read a tensor by its name in the loaded model, whose first part some checkpoints leave out.

        Args:
            name: Its name there.

        Returns:
            The tensor; None if there is none of this name, or not of floats.
        """
        for each in (name, name.partition(".")[2]):
            if each in self.tensors and self.tensors[each].dtype is not None:
                return self.read(each)
        return None

    def write(self, folder: Path, name: str, tensor: Tensor) -> None:
        """Overwrite a tensor in a copy of this checkpoint.

        Args:
            folder: Copy to write into.
            name: Tensor to overwrite.
            tensor: What it becomes, of the same shape and dtype.
        """
        shard, first, size = self._places[name]
        info = self.tensors[name]
        assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype)
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        assert data.nbytes == size
        with open(folder / shard, "r+b") as file:
            file.seek(first)
            file.write(data.data)


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = read_json(path, MAX_RESULT_BYTES)["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise QuantCacheError(
            f"{path} is not the index of a sharded checkpoint: {type(error).__name__} {error}"
        ) from error
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise QuantCacheError(f"{path} is not the index of a sharded checkpoint: weight_map must map names to files")
    outside = [name for name in weight_map.values() if os.path.basename(name) != name]
    if outside:
        raise QuantCacheError(f"{path} names a shard outside its folder: {outside[0]}")
    return weight_map
