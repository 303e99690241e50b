"""Attention on a cache's blocks: one call, and what launches need that serve while blocks are added.

Shapes: B batch, Hq / H query / key-value heads, Tq queries, D dimension, n blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from quantcache_kernels.cuda.calls import PreparedCall, cut_of, lines_of, room_of, rows_of
from quantcache_kernels.cuda.constants import PreparedCodes
from quantcache_kernels.cuda.driver import load
from quantcache_kernels.cuda.launching import Launched, on_device, stream_of
from quantcache_kernels.cuda.near import NearTokens, append_arguments, readable
from quantcache_kernels.cuda.places import Blocks, Lasting
from quantcache_kernels.cuda.structures import PlacesArguments, pointer
from quantcache_kernels.interface import AttentionCall

MAX_LINES = (1 << 16) - 1
"""Of a launch: the second dimension of a grid ends there."""


def _on_cuda(device: torch.device, key_trellis: bool, value_trellis: bool) -> Mapping[str, Launched]:
    return load(device.index or 0, "codes.h", f"KEY_TRELLIS={int(key_trellis)}", f"VALUE_TRELLIS={int(value_trellis)}")


LOADERS: dict[str, Callable[[torch.device, bool, bool], Mapping[str, Launched]]] = {"cuda": _on_cuda}
"""By type of device, who finds the kernels for codings of keys and values; tests add an emulation."""


def attend(
    query: Tensor,
    blocks: Blocks,
    near: NearTokens,
    keys: PreparedCodes,
    values: PreparedCodes,
    call: AttentionCall,
    splits: int | None = None,
    lasting: Lasting | None = None,
) -> Tensor:
    """Attention over packed blocks, sinks and recent tokens.

    Args:
        query: ``[B, Hq, Tq, D]``, any strides.
        blocks: The blocks, readable; they remember how calls on them are launched.
        near: Sinks and the tokens behind the last block; the last Tq of them are the queries' own.
        keys: The keys' constants.
        values: The values'.
        call: The rest of the call.
        splits: Parts of the context, whose warps go together as far as they fit; None for what is best for the device.
        lasting: What launches need that are to serve more blocks than these; its ``out`` is written. None for a call by
            itself.

    Returns:
        ``[B, Tq, Hq, Dv]`` in the query's dtype, float32 or bfloat16.
    """
    device, prepared, logits = query.device, None, call.sink_logits
    given = call.mask is None, None if logits is None else logits.dtype, near.key_sinks.shape[2]
    kind = query.shape, query.dtype, call.scaling, call.softcap, call.hides_the_future(query.shape[2]), given, splits
    if lasting is None:
        prepared = blocks.calls.pop(kind, None)  # no other thread may have it meanwhile
    elif lasting.room is None:
        _prepare_lasting(query, blocks, near, keys, values, lasting)
    if prepared is None:
        prepared = PreparedCall(query, blocks, near, keys, values, call, splits, lasting)
    with on_device(device):
        out = prepared.launch(query, near, call, LOADERS[device.type](device, keys.is_trellis, values.is_trellis))
    if lasting is None:
        blocks.calls[kind] = prepared
    return out


def _prepare_lasting(
    query: Tensor, blocks: Blocks, near: NearTokens, keys: PreparedCodes, values: PreparedCodes, lasting: Lasting
) -> None:
    """What launches that outlive these blocks keep of the first call."""
    batch, query_heads, count, _ = query.shape
    total = query_heads // keys.layout.heads * count
    lasting.room = room_of(keys, values, rows_of(total), query.device)
    lasting.lines = lines_of(batch, total, keys.layout.heads)
    lasting.warps = cut_of(lasting.room, blocks.units, lasting.lines).warps
    announce(lasting, blocks, near.readable(), keys, values)


def announce(
    lasting: Lasting,
    blocks: Blocks,
    near: NearTokens,
    keys: PreparedCodes,
    values: PreparedCodes,
    tokens: int | None = None,
) -> None:
    """Tell launches that outlive a block where everything is now, and how long the tail is.

    Args:
        lasting: Where they find it.
        blocks: The blocks, readable; whoever calls keeps them.
        near: Sinks and tail, readable and kept likewise.
        keys: The keys' constants: they say which module is loaded.
        values: The values'.
        tokens: What the tail holds; None leaves the device's count as it is.
    """
    device = lasting.there.device
    places = blocks.places(near, lasting.units_of_a_split(blocks.units))
    count = None if tokens is None else pointer(near.tail_tokens)
    arguments = PlacesArguments(places, pointer(lasting.there), count, tokens or 0)
    with on_device(device):
        kernels = LOADERS[device.type](device, keys.is_trellis, values.is_trellis)
        kernels["set_places"].launch((1, 1), 32, 0, arguments, stream_of(device))


def append(
    key: Tensor, value: Tensor, near: NearTokens, keys: PreparedCodes, values: PreparedCodes, lasting: Lasting
) -> None:
    """Put new tokens into a tail of which only the device knows where it is and how long.

    Args:
        key: ``[B, H, Tnew, D]`` bfloat16.
        value: ``[B, H, Tnew, Dv]``.
        near: The tail, and how many tokens it has, these included.
        keys: The keys' constants: they say which module is loaded.
        values: The values'.
        lasting: Where the place of the tail is.
    """
    key, value, device = readable(key), readable(value), key.device
    arguments = append_arguments(key, value, near, lasting.there.data_ptr())
    with on_device(device):
        kernels = LOADERS[device.type](device, keys.is_trellis, values.is_trellis)
        kernels["append_tail"].launch((arguments.vectors, 2), 32, 0, arguments, stream_of(device))
