"""The C++ kernels of ``quantcache_kernels.cpu``."""

from __future__ import annotations

import torch
from torch import Tensor

from quantcache.backends.base import Backend, Fields, kept, refused_by_kernels
from quantcache.backends.view import CacheView
from quantcache.coding.blocks import SideCodec
from quantcache.coding.codec import SpectralCodec
from quantcache_kernels import cpu
from quantcache_kernels.interface import AttentionCall


class CpuBackend(Backend):
    """Encodes, attends and decodes in C++."""

    name = "cpu"

    def unavailable(self, device: torch.device) -> str | None:
        """The device is another one, or there is no compiled library."""
        return cpu.unavailable(device)

    def lacks(self, codec: SideCodec, dtype: torch.dtype) -> str | None:
        """Another kind of blocks, or dtype."""
        if not isinstance(codec, SpectralCodec):
            return f"blocks are coded by {type(codec).__name__}"
        return None if dtype in cpu.DTYPES else f"keys or values are of {dtype}"

    def refuses(self, query: Tensor, view: CacheView, call: AttentionCall) -> str | None:
        """What no kernel takes, and the queries' dtype and device."""
        if query.dtype not in cpu.DTYPES or not query.is_cpu:
            return f"the queries are of {query.dtype} on {query.device}"
        return refused_by_kernels(query, view, call)

    def attend(self, query: Tensor, view: CacheView, call: AttentionCall) -> Tensor:
        """Attend with one call of the library."""
        prepared = view.prepared.get(self.name)
        if prepared is None:
            keys, values = view.spectral_codecs
            key_codes, key_gains, value_codes, value_gains = view.packed()
            places = (view.block_table, view.left_padding, view.encoded_end)
            blocks = cpu.Blocks(key_codes, key_gains, value_codes, value_gains, *places)
            prepared = (constants(keys), constants(values), blocks)
            view.prepared[self.name] = prepared
        key, value, blocks = prepared
        return cpu.attend(query, key, value, blocks, view.dense_parts(), call)

    def _encode(self, codec: SpectralCodec, x: Tensor, block_table: Tensor, left_padding: Tensor | None) -> Fields:
        codes, gains = cpu.encode(x, constants(codec), block_table, left_padding)
        return {"codes": codes, "gains": gains}

    def _decode(self, codec: SpectralCodec, fields: Fields, block_table: Tensor, left_padding: Tensor | None) -> Tensor:
        codes, gains = fields["codes"].contiguous(), fields["gains"].contiguous()
        return cpu.decode(codes, gains, constants(codec), block_table, left_padding)


def constants(codec: SpectralCodec) -> cpu.Constants:
    """A codec's constants in the form of the CPU kernels, made once.

    Args:
        codec: The codec, on the CPU.

    Returns:
        The constants.
    """
    return kept(codec, "cpu", cpu.Constants, lambda: cpu.prepare(codec.constants()))
