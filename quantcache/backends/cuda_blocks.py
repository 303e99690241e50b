"""Blocks of the CUDA kernels' layout: encoded into it, brought from the portable layout and back.

Each has a kernel, which is tried before its first use on a device, and plain torch beside it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor

from quantcache.backends.base import kept
from quantcache.backends.trials import TRIAL_BLOCKS, Trial, encoding_trial, passes
from quantcache.coding.blocks import SideCodec
from quantcache.coding.codec import SpectralCodec
from quantcache.coding.packing import pack, unpack
from quantcache_kernels.cuda import conversion, encoding
from quantcache_kernels.cuda.blocks import PATH_BIT
from quantcache_kernels.cuda.constants import PreparedCodes, prepare, unsupported
from quantcache_kernels.cuda.encoding import MOST_SLOTS, PreparedEncoder, prepare_encoder
from quantcache_kernels.cuda.room import device_of

logger = logging.getLogger(__name__)

NAME = "cuda"
"""Of the backend."""

DTYPE = torch.bfloat16
"""Of keys, values and queries. Products are of half precision: that is enough for models in bfloat16, but not always
for what the parity suite asks of models in float16."""

CONVERTED_BLOCKS = 64
"""Blocks that plain torch brings from one layout to the other at once, at a byte for every code."""


def is_ours(codec: SideCodec) -> TypeGuard[SpectralCodec]:
    """Whether blocks of a codec have this layout; those that the kernels lack stay portable."""
    return isinstance(codec, SpectralCodec) and unsupported(codec.dim, codec.frame.num_fast) is None


def prepared(codec: SpectralCodec) -> PreparedCodes:
    """A codec's constants in the form of the CUDA kernels, made once.

    Args:
        codec: The codec; the tables go to its device.

    Returns:
        The constants.
    """

    def make() -> PreparedCodes:
        _say_that_they_are_compiled()
        return prepare(codec.constants(), codec.mean.device, codec.holds_values)

    return kept(codec, "cuda", PreparedCodes, make)


@functools.cache
def _say_that_they_are_compiled() -> None:
    logger.info("the CUDA kernels are compiled at their first use on a machine, which takes some seconds")


# ----------------------------------------------------------------------- encoding


def encoder(codec: SpectralCodec) -> PreparedEncoder:
    """A codec's constants for the encoder, made once.

    Args:
        codec: The codec; the tables go to its device.

    Returns:
        The constants.
    """

    def make() -> PreparedEncoder:
        return prepare_encoder(codec.constants(), prepared(codec), codec.mean.device)

    return kept(codec, "cuda encoder", PreparedEncoder, make)


def encodes(codec: SideCodec, x: Tensor, block_table: Tensor, left_padding: Tensor | None) -> TypeGuard[SpectralCodec]:
    """Whether the kernel encodes these blocks: it takes them, and has passed its trial.

    Args:
        codec: Their side's codec.
        x: As of ``Backend.encode``.
        block_table: As of ``Backend.encode``.
        left_padding: As of ``Backend.encode``.

    Returns:
        True if so.
    """
    device = x.device
    if not is_ours(codec) or x.dtype != DTYPE or device.type not in encoding.LOADERS:
        return False
    if left_padding is not None and left_padding.ndim != 1:
        return False
    own = encoder(codec)
    if own.slots > MOST_SLOTS or own.shared_bytes > device_of(device).block_bytes:
        return False
    geometry = (codec.coding, codec.dim, codec.frame.num_fast, codec.holds_values, left_padding is not None)
    work = functools.partial(encoding_trial, _encoded, codec, x, block_table, left_padding)
    return passes("encode", NAME, device, geometry, work)


def _encoded(codec: SpectralCodec, x: Tensor, block_table: Tensor, left_padding: Tensor | None) -> dict[str, Tensor]:
    """What the kernel makes of some blocks, in the portable layout."""
    codes, gains = encoder(codec).encode(x, block_table, left_padding)
    return {"codes": _to_portable(codec, codes), "gains": gains}


# ----------------------------------------------------------------------- conversion


def to_portable(codec: SpectralCodec, words: Tensor) -> Tensor:
    """Blocks in the portable layout.

    Args:
        codec: Their codec.
        words: Words of tiles, ``[n, B, words]`` int32.

    Returns:
        Words ``[n, B, W]`` int32.
    """
    if _converts_rightly(codec, words.device, lambda: _to_portable(codec, words[:TRIAL_BLOCKS])):
        return prepared(codec).conversion.to_portable(words)
    return torch.cat([_to_portable(codec, part) for part in words.split(CONVERTED_BLOCKS)])


def from_portable(codec: SpectralCodec, words: Tensor) -> Tensor:
    """Invert :func:`to_portable`."""
    if _converts_rightly(codec, words.device, lambda: words[:TRIAL_BLOCKS]):
        return prepared(codec).conversion.from_portable(words)
    return torch.cat([_from_portable(codec, part) for part in words.split(CONVERTED_BLOCKS)])


def _converts_rightly(codec: SpectralCodec, device: torch.device, some: Callable[[], Tensor]) -> bool:
    """Whether the kernels that convert blocks may be used; ``some`` gives a few in the portable layout."""
    if device.type not in conversion.LOADERS:
        return False
    geometry = (codec.coding, codec.dim, codec.frame.num_fast, codec.holds_values)
    return passes("convert", NAME, device, geometry, functools.partial(_conversion_trial, codec, some))


def _conversion_trial(codec: SpectralCodec, some: Callable[[], Tensor]) -> Trial:
    """There and back, byte by byte: of so few blocks a single bit is more than a trial lets pass."""
    words = some().contiguous()

    def plainly() -> Tensor:
        return _bytes(tiles := _from_portable(codec, words), _to_portable(codec, tiles))

    def by_kernels() -> Tensor:
        found = prepared(codec).conversion
        return _bytes(tiles := found.from_portable(words), found.to_portable(tiles))

    plain = plainly()
    return by_kernels, plain, plain


def _bytes(*words: Tensor) -> Tensor:
    return torch.cat([each.contiguous().view(torch.uint8).flatten() for each in words])


def _from_portable(codec: SpectralCodec, words: Tensor) -> Tensor:
    """Words of some blocks, ``[n, B, W]``, in this layout."""
    codes = torch.zeros(*words.shape[:2], codec.num_heads * codec.dim, 64, dtype=torch.uint8, device=words.device)
    for c in codec.classes:
        own = words[..., c.words].unflatten(-1, (-1, 2 * c.width))
        if codec.coding == "trellis":
            path = unpack(own[..., -2:], 1).to(torch.uint8) << PATH_BIT
            codes[:, :, c.columns] = unpack(own[..., :-2], c.width - 1).to(torch.uint8) | path
        else:
            codes[:, :, c.columns] = unpack(own, c.width).to(torch.uint8)
    return prepared(codec).layout.pack(codes, codec.holds_values)


def _to_portable(codec: SpectralCodec, words: Tensor) -> Tensor:
    """Invert :func:`_from_portable`."""
    codes = prepared(codec).layout.unpack(words, codec.holds_values)
    out = torch.zeros(*words.shape[:2], codec.num_words, dtype=torch.int32, device=words.device)
    for c in codec.classes:
        own = codes[:, :, c.columns]
        if codec.coding == "trellis":
            packed = torch.cat((pack(own & (1 << PATH_BIT) - 1, c.width - 1), pack(own >> PATH_BIT, 1)), dim=-1)
        else:
            packed = pack(own, c.width)
        out[..., c.words] = packed.flatten(2)
    return out
