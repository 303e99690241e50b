"""The Triton kernels of ``quantcache_kernels.triton``, each tried beside plain torch before its first use."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantcache.backends.base import Backend, Fields, kept, refused_by_kernels
from quantcache.backends.trials import FAILED, TRIAL_BLOCKS, Trial, attends_rightly, encoding_trial, passes
from quantcache.backends.view import CacheView
from quantcache.coding.blocks import SideCodec
from quantcache.coding.codec import SpectralCodec
from quantcache_kernels.interface import AttentionCall

if TYPE_CHECKING:
    from quantcache_kernels.triton.constants import PreparedSide

# Modules of quantcache_kernels.triton are imported where they are used: importing them imports Triton.

REACH = 1 << 31
"""Elements that the kernels' products of 32 bits can tell apart."""


class TritonBackend(Backend):
    """Encodes, decodes and attends on a GPU."""

    name = "triton"

    def unavailable(self, device: torch.device) -> str | None:
        """Triton is not installed, or does not know the device."""
        from quantcache_kernels.triton.runtime import unavailable

        return unavailable(device)

    def lacks(self, codec: SideCodec, dtype: torch.dtype) -> str | None:
        """Another kind of blocks, or geometry."""
        if not isinstance(codec, SpectralCodec):
            return f"blocks are coded by {type(codec).__name__}"
        from quantcache_kernels.triton.constants import unsupported

        return unsupported(codec.dim, codec.frame.num_fast, codec.num_words)

    def refuses(self, query: Tensor, view: CacheView, call: AttentionCall) -> str | None:
        """What no kernel takes, what is too large for these, and a kernel that has failed its trial."""
        reason = refused_by_kernels(query, view, call) or _too_large(query, view, call.mask)
        if reason is None and not self._attends_rightly(query, view, call):
            reason = FAILED
        return reason

    def attend(self, query: Tensor, view: CacheView, call: AttentionCall) -> Tensor:
        """Attend with the kernels of queries, codes, dense tokens and their merge."""
        from quantcache_kernels.triton.ops import attend

        key_codec, value_codec = view.spectral_codecs
        dense, count, mask = view.dense_parts(), query.shape[2], call.mask
        if mask is not None and mask.shape[2] != count:
            mask = mask.expand(-1, -1, count, -1)
        dtype = dense[2].dtype
        keys, values = prepared(key_codec, dtype).keys, prepared(value_codec, dtype).values
        output: Tensor = attend(
            query,
            view.packed(),
            list(dense),
            view.block_table,
            view.left_padding,
            mask,
            call.sink_logits,
            keys.tensors,
            keys.sizes,
            values.tensors,
            values.sizes,
            view.encoded_end,
            call.scaling,
            call.softcap,
            call.hides_the_future(count),
            not view.cut,
        )[0]
        return output

    def _encode(self, codec: SpectralCodec, x: Tensor, block_table: Tensor, left_padding: Tensor | None) -> Fields:
        work = functools.partial(encoding_trial, encode, codec, x, block_table, left_padding)
        dims = (codec.dim, codec.frame.num_fast, codec.frame.is_identity)
        geometry = (codec.coding, *dims, x.dtype, left_padding is not None)
        if not passes("encode", self.name, x.device, geometry, work):
            return codec.encode(x, block_table, left_padding)
        return encode(codec, x, block_table, left_padding)

    def _decode(self, codec: SpectralCodec, fields: Fields, block_table: Tensor, left_padding: Tensor | None) -> Tensor:
        work = functools.partial(_decoding_trial, codec, fields, block_table, left_padding)
        geometry = (codec.coding, codec.dim, codec.frame.num_fast, codec.frame.is_identity, left_padding is None)
        if not passes("decode", self.name, fields["codes"].device, geometry, work):
            return codec.decode(fields, block_table, left_padding)
        return decode(codec, fields, block_table, left_padding)

    def _attends_rightly(self, query: Tensor, view: CacheView, call: AttentionCall) -> bool:
        heads, count = query.shape[1] // view.key.tail.shape[1], query.shape[2]
        return attends_rightly(self, query, view, call, (heads, count > 1, heads * count <= 8))


def prepared(codec: SpectralCodec, dtype: torch.dtype) -> PreparedSide:
    """A codec's constants in the form of the Triton kernels, made once.

    Args:
        codec: The codec; the tables go to its device.
        dtype: The model's.

    Returns:
        The tables.
    """
    from quantcache_kernels.triton.constants import PreparedSide, compute_dtype, prepare

    name = f"triton {compute_dtype(dtype)}"
    return kept(codec, name, PreparedSide, lambda: prepare(codec.constants(), dtype, codec.mean.device))


def encode(codec: SpectralCodec, x: Tensor, block_table: Tensor, left_padding: Tensor | None) -> Fields:
    """Encode n blocks with the kernel; arguments as for :meth:`Backend.encode`."""
    from quantcache_kernels.triton.ops import encode_blocks

    tables = prepared(codec, x.dtype).encode
    codes, gains = encode_blocks(x, block_table, left_padding, tables.tensors, tables.sizes)
    return {"codes": codes, "gains": gains}


def decode(codec: SpectralCodec, fields: Fields, block_table: Tensor, left_padding: Tensor | None) -> Tensor:
    """Decode n blocks with the kernel; arguments as for :meth:`Backend.decode`."""
    from quantcache_kernels.triton.ops import decode_blocks

    tables = prepared(codec, torch.float32).decode
    codes, gains = fields["codes"], fields["gains"]
    decoded: Tensor = decode_blocks(
        codes, gains, block_table, left_padding, tables.tensors, tables.sizes, torch.float32
    )
    return decoded


# ----------------------------------------------------------------------- first use


@torch.no_grad()
def _decoding_trial(codec: SpectralCodec, fields: Fields, block_table: Tensor, left_padding: Tensor | None) -> Trial:
    """The kernel's distance from the reference in float64 beside that of the reference in float32."""
    some, where = {name: field[:TRIAL_BLOCKS] for name, field in fields.items()}, block_table[:TRIAL_BLOCKS]
    exact = codec.decode(some, where, left_padding, torch.float64)
    return lambda: decode(codec, some, where, left_padding), exact, codec.decode(some, where, left_padding)


def _too_large(query: Tensor, view: CacheView, mask: Tensor | None) -> str | None:
    """Of a row of the batch, queries, recent tokens or a mask whose last element the kernels cannot reach."""
    heads, count = query.shape[1] // view.key.tail.shape[1], query.shape[2]
    for tail in (view.key.tail, view.value.tail):
        if tail.shape[2] * tail.stride(2) + tail.shape[3] * tail.stride(3) >= REACH:
            return f"{tail.shape[2]} recent tokens lie too far apart"
    if heads * query.stride(1) + count * query.stride(2) >= REACH:
        return f"{count} queries lie too far apart"
    if mask is not None and count * mask.shape[3] >= REACH:
        return f"the mask of {count} queries and {mask.shape[3]} tokens has too many elements"
    return None
