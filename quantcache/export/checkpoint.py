"""Safetensors checkpoints, read and rewritten tensor by tensor.

Absorption changes neither dtypes nor shapes, so a shard is copied as it is and the bytes
of the tensors that change are overwritten: nothing else can change, and one tensor is all that memory has to hold.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from quantcache.common.errors import QuantCacheError
from quantcache.common.jsonfile import MAX_RESULT_BYTES, read_json
from quantcache.common.tensor_file import DTYPES, Entry, TensorFile
from quantcache.export.projections import TensorInfo

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


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
        self._places: dict[str, tuple[str, Entry]] = {}  # shard, and where in it
        self.tensors: dict[str, TensorInfo] = {}
        """Every tensor, by name."""
        for shard in self.shards:
            self._add(shard)
        for name, shard in (weight_map or {}).items():
            actual = self._places[name][0] if name in self._places else "no shard"
            if actual != shard:
                raise QuantCacheError(f"{folder / INDEX_NAME} lists {name} in {shard}, but it is in {actual}")

    def _add(self, shard: str) -> None:
        with TensorFile(self.folder / shard) as file:
            entries = file.entries
        for name, entry in entries.items():
            if name in self._places:
                raise QuantCacheError(f"{self.folder}: {name} is in {self._places[name][0]} and in {shard}")
            self._places[name] = shard, entry
            self.tensors[name] = TensorInfo(entry.shape, DTYPES.get(entry.dtype))

    def read(self, name: str) -> Tensor:
        """Read one tensor.

        Args:
            name: Its name.

        Returns:
            The tensor, in memory of its own.

        Raises:
            QuantCacheError: The file has changed, or torch has no name for the dtype.
        """
        shard, entry = self._places[name]
        with TensorFile(self.folder / shard) as file:
            if file.entries.get(name) != entry:
                raise QuantCacheError(f"{self.folder / shard} changed while it was read: {name} is not where it was")
            return file.read(name)

    def find(self, name: str) -> Tensor | None:
        """Read a tensor by its name in the loaded model, whose first part some checkpoints leave out.

        Args:
            name: Its name there.

        Returns:
            The tensor; None if there is none of this name, or not of floats.
        """
        for each in (name, name.partition(".")[2]):
            dtype = self.tensors[each].dtype if each in self.tensors else None
            if dtype is not None and dtype.is_floating_point:
                return self.read(each)
        return None

    def write(self, folder: Path, name: str, tensor: Tensor) -> None:
        """Overwrite a tensor in a copy of this checkpoint.

        Args:
            folder: Copy to write into.
            name: Tensor to overwrite.
            tensor: What it becomes, of the same shape and dtype.
        """
        shard, entry = self._places[name]
        info = self.tensors[name]
        assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype)
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        assert data.nbytes == entry.last - entry.first
        with open(folder / shard, "r+b") as file:
            file.seek(entry.first)
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
