"""Safetensors files: written with errors of files, read into memory without keeping them mapped.

The library maps a file and hands out views of the mapping: a file that is cut short or rewritten in place then takes
the process down, or changes numbers that had been checked. Here every byte is read once, and nothing refers to the
file afterwards.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import torch
from safetensors import SafetensorError
from safetensors import torch as library
from torch import Tensor

from quantcache.common.errors import ArtifactError
from quantcache.common.jsonfile import parse_json

MAX_HEADER = 100_000_000
"""Largest header in bytes; the library's own limit."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""torch's dtypes by their names in a header; of others no tensors are read."""


class Entry(NamedTuple):
    """What a header says of a tensor.

    Attributes:
        dtype: The name of its dtype.
        shape: Its shape.
        first: Its first byte in the file.
        last: The byte behind its last.
    """

    dtype: str
    shape: tuple[int, ...]
    first: int
    last: int


class TensorFile:
    """A safetensors file, open for reading; a context manager.

    Args:
        path: File to read.
        max_header: Largest header in bytes; it is parsed before anything else is known.

    Attributes:
        metadata: The strings of its header, by name.
        entries: What it says of every tensor, by name, in its own order.

    Raises:
        ArtifactError: The file cannot be opened, or its header is malformed or larger.
    """

    def __init__(self, path: Path, max_header: int = MAX_HEADER):
        self.path = path
        try:
            self._file: BinaryIO = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise self._unreadable(str(error)) from error
        try:
            self.metadata, self.entries = self._read_header(max_header)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _unreadable(self, reason: str) -> ArtifactError:
        return ArtifactError(f"{self.path} cannot be read: {reason}")

    def _bytes(self, offset: int, count: int) -> Tensor:
        """Some bytes of the file, in memory of their own."""
        data = torch.empty(count, dtype=torch.uint8, device="cpu")
        view, done = memoryview(data.numpy().data), 0
        try:
            self._file.seek(offset)
            while done < count and (read := self._file.readinto(view[done:])):  # type: ignore[attr-defined]
                done += read
        except OSError as error:
            raise self._unreadable(str(error)) from error
        if done < count:
            raise self._unreadable(f"it ends after {offset + done} bytes, {offset + count} are needed")
        return data

    def _read_header(self, most: int) -> tuple[dict[str, str], dict[str, Entry]]:
        size = os.fstat(self._file.fileno()).st_size
        (length,) = struct.unpack("<Q", self._bytes(0, 8).numpy().tobytes())
        if not 2 <= length <= min(most, size - 8):
            claim = f"its header claims {length:,} bytes of {size:,}, at most {most:,} are read"
            raise self._unreadable(f"it is damaged, or not a safetensors file: {claim}")
        try:
            header = parse_json(self._bytes(8, length).numpy().tobytes(), most)
            metadata = header.pop("__metadata__", {})
            if not all(isinstance(value, str) for value in metadata.values()):
                raise ValueError("its metadata are not strings")
            entries = {name: _entry(name, entry, 8 + length) for name, entry in header.items()}
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise self._unreadable(f"the header is malformed: {error}") from error
        start = end = 8 + length
        for name, (_, _, first, last) in sorted(entries.items(), key=lambda item: item[1][2:]):
            if first != end:
                raise self._unreadable(f"{name} begins at byte {first - start} of the data, expected {end - start}")
            end = last
        if end != size:
            raise self._unreadable(f"its tensors take {end - start} bytes, it has {size - start}")
        return metadata, entries

    def keys(self) -> set[str]:
        """Names of the tensors."""
        return set(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it.

        Args:
            name: Name in the file.

        Returns:
            The shape.
        """
        return self.entries[name].shape

    def read(self, name: str) -> Tensor:
        """Read a tensor.

        Args:
            name: Name in the file.

        Returns:
            The tensor, in CPU memory of its own.

        Raises:
            ArtifactError: The file is shorter than it was, or has a dtype that artifacts do not use.
        """
        dtype, shape, first, last = self.entries[name]
        if dtype not in DTYPES:
            raise ArtifactError(f"{self.path}: {name} has dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
        return self._bytes(first, last - first).view(DTYPES[dtype]).reshape(shape)


def _entry(name: str, entry: Any, start: int) -> Entry:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [*shape, *offsets]
    if len(offsets) != 2 or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{name} has shape {shape!r} at {offsets!r}")
    first, last = offsets
    if last < first:
        raise ValueError(f"{name} ends at {last}, before its beginning at {first}")
    if not isinstance(dtype, str):
        raise TypeError(f"{name} has dtype {dtype!r}")
    if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != last - first:
        raise ValueError(f"{name} has {last - first} bytes for {dtype} of shape {shape!r}")
    return Entry(dtype, tuple(shape), start + first, start + last)


def save_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file.

    Args:
        tensors: Contiguous tensors by name, no two in the same memory.
        path: File to write.
        metadata: Strings of its header, by name.

    Raises:
        OSError: The disk is full, or the file cannot be written.
    """
    try:
        library.save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def content_bytes(tensor: Tensor) -> bytes:
    """The elements of a tensor in order.

    Args:
        tensor: Any dtype, shape and stride.

    Returns:
        Their bytes.
    """
    flat = tensor.detach().contiguous().cpu().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def checksum(tensors: dict[str, Tensor], text: str = "") -> str:
    """Digest of tensors by name, and of a text.

    Args:
        tensors: Tensors by name, in any order.
        text: What else is to be told apart.

    Returns:
        SHA-256 in hex.
    """
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(content_bytes(tensor))
    return digest.hexdigest()
