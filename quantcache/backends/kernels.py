"""Which implementation encodes blocks and attends on them: device kernels where they can, else torch.

Kernels live in ``quantcache_kernels`` and never import quantcache. They are reached through three calls; their
plain-torch counterparts are :meth:`quantcache.coding.codec.SpectralCodec.encode`, its ``decode`` and
:func:`quantcache.attention.function.spectral_attention`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from quantcache.backends import trials
from quantcache.backends.padding import shows_padding
from quantcache.backends.view import CacheView
from quantcache.coding.codebook import POLYNOMIALS, gaussian_codebook
from quantcache.coding.codec import SideCodec, SpectralCodec, dequantize_gain
from quantcache.coding.packing import BLOCK, MAX_WIDTH
from quantcache.common.ambient import without_autocast
from quantcache.common.errors import QuantCacheError
from quantcache_kernels import cpu

if TYPE_CHECKING:
    from quantcache_kernels.triton.ops import PreparedSide

Backend = Literal["auto", "native", "triton", "torch"]
BACKENDS: tuple[str, ...] = ("auto", "native", "triton", "torch")

logger = logging.getLogger(__name__)


@without_autocast
def encode(codec: SideCodec, x: Tensor, places: Tensor, starts: Tensor | None, backend: Backend) -> dict[str, Tensor]:
    """Encode n blocks.

    Args:
        codec: The side's codec.
        x: ``[B, H, n * 64, D]``.
        places: The blocks' places, ``[n, 3]``.
        starts: Left padding of every row, ``[B]``, or None; ``[B, n * 64]`` where tokens of a row differ.
        backend: Which implementation is wanted.

    Returns:
        The codec's fields, ``[n, B, ...]`` each.
    """
    if starts is not None and starts.ndim == 2:
        return codec.encode(x, places, starts)
    if isinstance(codec, SpectralCodec) and codec.coding == "scalar" and _native_takes(x, backend):
        codes, gains = cpu.encode(x, _native_constants(codec), places, starts)
        return {"codes": codes, "gains": gains}
    if isinstance(codec, SpectralCodec) and _triton_takes(x, backend, codec):
        work = functools.partial(_encoding_trial, codec, x, places, starts)
        if _trusted("encode", x.device, (codec.dim, codec.frame.num_fast, x.dtype, starts is None), work):
            return _triton_encode(codec, x, places, starts)
    return codec.encode(x, places, starts)


@without_autocast
def decode(
    codec: SideCodec, fields: dict[str, Tensor], places: Tensor, starts: Tensor | None, backend: Backend
) -> Tensor:
    """Decode n blocks for a long query.

    Args:
        codec: The side's codec.
        fields: The codec's fields, ``[n, B, ...]`` each.
        places: The blocks' places, ``[n, 3]``.
        starts: Left padding of every row, ``[B]``, or None.
        backend: Which implementation is wanted.

    Returns:
        ``[B, H, n * 64, D]`` float32, slots beyond a block's valid length included.
    """
    if isinstance(codec, SpectralCodec) and "shifts" not in fields and _triton_takes(fields["codes"], backend, codec):
        work = functools.partial(_decoding_trial, codec, fields, places, starts)
        geometry = (codec.dim, codec.frame.num_fast, codec.frame.is_identity, starts is None)
        if _trusted("decode", fields["codes"].device, geometry, work):
            return _triton_decode(codec, fields, places, starts)
    return codec.decode(fields, places, starts).float()


def attend_view(
    query: Tensor,
    view: CacheView,
    mask: Tensor | None,
    scaling: float | None,
    causal: bool,
    softcap: float | None,
    s_aux: Tensor | None,
    beside: Beside | None = None,
) -> Tensor | None:
    """Attend on a whole view, encoded blocks and dense tokens, with one call of a kernel.

    Args:
        query: ``[B, Hq, Tq, D]``; the last Tq tokens of the view are the queries' own.
        view: What may be read; it holds encoded blocks.
        mask: The call's mask, or None.
        scaling: Factor of the scores; D^-½ if None.
        causal: What a missing mask means.
        softcap: Soft cap of the scores, or None.
        s_aux: One attention-sink logit for each query head, ``[Hq]``, or None.
        beside: Plain torch, to try a kernel beside before its first use; without it the kernel is not tried.

    Returns:
        ``[B, Tq, Hq, Dv]`` in the query's dtype; None where no kernel supports the case, or it has failed its trial.
    """
    keys, values = view.key, view.value
    if not isinstance(keys.codec, SpectralCodec) or not isinstance(values.codec, SpectralCodec):
        return None
    if keys.codec.coding != "scalar" or values.codec.coding != "scalar":
        return None
    assert keys.sinks is not None
    assert values.sinks is not None
    dense: tuple[Tensor, ...] = (keys.sinks, values.sinks, keys.tail, values.tail)
    if keys.tail.dtype != values.tail.dtype:  # autocast gives some models such
        wide = torch.promote_types(keys.tail.dtype, values.tail.dtype)
        dense = tuple(x.to(wide) for x in dense)
    problem = None
    if mask is not None and not _is_plain(mask, query, view.length):
        problem = "the mask is not boolean, differs between heads or does not cover the cache"
    elif s_aux is not None and s_aux.requires_grad and torch.is_grad_enabled():
        problem = "gradients are wanted"
    elif view.shifted or view.origins is not None:
        problem = "the positions of some row are not its slots behind its padding"
    elif shows_padding(mask, view.starts, view.length):
        problem = "some query looks at padding"
    if problem is None and mask is not None and mask.shape[2] != query.shape[2]:
        mask = mask.expand(-1, -1, query.shape[2], -1)
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    causal = causal and mask is None and query.shape[2] > 1
    if problem is None and all(x.dtype in cpu.DTYPES for x in dense) and _native_takes(query, view.layer.backend):
        return _native_attend(query, view, dense, mask, s_aux, scaling, causal, softcap)
    if _triton_takes(query, view.layer.backend, keys.codec, values.codec, problem=problem):
        attend = functools.partial(_triton_attend, query, scaling=scaling, causal=causal, softcap=softcap)
        trusted = not trials.rejected("attend", "triton", query.device)
        if trusted and beside is not None:
            work = functools.partial(_attention_trial, view, mask, s_aux, attend, beside)
            heads, count = query.shape[1] // keys.codec.num_heads, query.shape[2]
            dims = (keys.codec.dim, keys.codec.frame.num_fast, values.codec.dim, heads, count > 1, heads * count <= 8)
            kinds = (query.dtype, view.starts is None, mask is None, s_aux is None, softcap is None, view.cut)
            trusted = _trusted("attend", query.device, (*dims, *kinds), work)
        if trusted:
            return attend(view=view, dense=dense, mask=mask, s_aux=s_aux)
    return None


def _is_plain(mask: Tensor, query: Tensor, length: int) -> bool:
    """Whether kernels take a mask: boolean, ``[B or 1, 1, Tq or 1, T or more]``, beside the queries."""
    batch, _, count, _ = query.shape
    return (
        mask.dtype == torch.bool
        and mask.device == query.device
        and mask.dim() == 4
        and mask.shape[0] in (1, batch)
        and mask.shape[1] == 1
        and mask.shape[2] in (1, count)
        and mask.shape[3] >= length
    )


# ----------------------------------------------------------------------- first use

Beside = Callable[[CacheView, Tensor | None], tuple[Tensor, Tensor]]
"""Plain torch on a view with a mask: exactly, and in the model's precision."""

Trial = tuple[Callable[[], Tensor], Tensor, Tensor]
"""See :func:`quantcache.backends.trials.passes`."""

TRIAL_BLOCKS = 2

UNTRIED = {"cpu"}
"""Devices where a Triton kernel is not tried: on a CPU it is the interpreter's, which nobody uses but tests."""


def _trusted(operation: str, device: torch.device, geometry: Hashable, work: Callable[[], Trial]) -> bool:
    """Whether a Triton kernel may be used."""
    return device.type in UNTRIED or trials.passes(operation, "triton", device, geometry, work)


@torch.no_grad()
def _attention_trial(
    view: CacheView, mask: Tensor | None, s_aux: Tensor | None, attend: Callable[..., Tensor], beside: Beside
) -> Trial:
    small = view.first_blocks(TRIAL_BLOCKS)
    if mask is not None:
        mask = mask.new_ones(*mask.shape[:3], small.length)
    dense = (small.key.sinks, small.value.sinks, small.key.tail, small.value.tail)
    return (functools.partial(attend, view=small, dense=dense, mask=mask, s_aux=s_aux), *beside(small, mask))


@torch.no_grad()
def _encoding_trial(codec: SpectralCodec, x: Tensor, places: Tensor, starts: Tensor | None) -> Trial:
    """The kernel's error on some tokens beside plain torch's."""
    some, where = x[:, :, : TRIAL_BLOCKS * BLOCK].nan_to_num(0.0, 0.0, 0.0), places[:TRIAL_BLOCKS]
    decoded = codec.decode(codec.encode(some, where, starts), where, starts)
    return lambda: codec.decode(_triton_encode(codec, some, where, starts), where, starts), some.float(), decoded


@torch.no_grad()
def _decoding_trial(codec: SpectralCodec, fields: dict[str, Tensor], places: Tensor, starts: Tensor | None) -> Trial:
    """The kernel's distance from the reference in float64 beside that of the reference in float32."""
    some, where = {name: field[:TRIAL_BLOCKS] for name, field in fields.items()}, places[:TRIAL_BLOCKS]
    exact = codec.decode(some, where, starts, torch.float64)
    return lambda: _triton_decode(codec, some, where, starts), exact, codec.decode(some, where, starts)


# ---------------------------------------------------------------------- CPU kernels


def _native_takes(x: Tensor, backend: Backend) -> bool:
    """Whether the CPU kernels are to work on a tensor, and can."""
    if backend not in ("auto", "native"):
        return False
    if backend == "native" and (x.device.type != "cpu" or not cpu.available()):
        reason = cpu.reason() if x.device.type == "cpu" else f"the keys and values are on {x.device}"
        raise QuantCacheError(f'backend="native" cannot be used here: {reason}')
    if x.device.type != "cpu" or x.dtype not in cpu.DTYPES or (x.requires_grad and torch.is_grad_enabled()):
        return False
    if not cpu.available():
        _warn_once(f"attending in plain torch, which is slower: {cpu.reason()}")
        return False
    return True


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _native_attend(
    query: Tensor,
    view: CacheView,
    dense: tuple[Tensor, ...],
    mask: Tensor | None,
    s_aux: Tensor | None,
    scaling: float,
    causal: bool,
    softcap: float | None,
) -> Tensor:
    assert isinstance(view.key.codec, SpectralCodec)
    assert isinstance(view.value.codec, SpectralCodec)
    return cpu.attend(
        query,
        _native_constants(view.key.codec),
        _native_constants(view.value.codec),
        cpu.Blocks(*_packed(view), view.places, view.starts, view.encoded_end),
        dense,
        mask,
        s_aux,
        scaling=scaling,
        softcap=softcap or 0.0,
        causal=causal,
    )


def _packed(view: CacheView) -> list[Tensor]:
    """Codes and gains of a view's blocks, the keys' first."""
    sides, count = (view.key, view.value), view.num_blocks
    return [side.store.buffers[name][:count] for side in sides for name in ("codes", "gains")]


def _native_constants(codec: SpectralCodec) -> cpu.Constants:
    """A codec's constants in the form of the CPU kernels, made once."""
    found = codec.derived.get("native")
    if not isinstance(found, cpu.Constants):
        made = cpu.make(
            cpu.Source(
                mean=codec.mean,
                encoder=codec.encoder,
                decoder=codec.decoder,
                weights=codec.weights,
                widths=codec.widths,
                offsets=codec.offsets,
                order=codec.frame.order,
                frequencies=codec.frame.frequencies,
                slow_pairs=codec.frame.slow_pairs,
                fast_pairs=codec.frame.fast_pairs,
                levels={c.width: c.levels for c in codec.classes},
                boundaries={c.width: c.boundaries for c in codec.classes},
                gains=dequantize_gain(torch.arange(256, dtype=torch.int64, device="cpu")),
                factors=codec.gain_search,
                words=codec.num_words,
            )
        )
        # What another thread has made in the meantime stays: its kernels may be reading it.
        found = codec.derived.setdefault("native", made)
        assert isinstance(found, cpu.Constants)
    return found


# ------------------------------------------------------------------- Triton kernels

# quantcache_kernels.triton.ops is imported where it is used: importing it imports Triton.


def _triton_takes(x: Tensor, backend: Backend, *codecs: SpectralCodec, problem: str | None = None) -> bool:
    """Whether the Triton kernels are to work on a tensor, and can."""
    if backend != "triton" and (backend != "auto" or x.device.type not in ("cuda", "xpu")):
        return False
    from quantcache_kernels.triton.runtime import unavailable

    reason = unavailable(x.device)
    if reason is not None and backend == "triton":
        raise QuantCacheError(f'backend="triton" cannot be used here: {reason}')
    if problem is None and x.requires_grad and torch.is_grad_enabled():
        problem = "gradients are wanted"
    for codec in codecs:
        if problem is None:
            problem = _triton_lacks(codec)
    if reason or problem:
        _inform_once(f"not using the Triton kernels: {reason or problem}")
        return False
    return True


def _triton_lacks(codec: SpectralCodec) -> str | None:
    from quantcache_kernels.triton.ops import unsupported

    if codec.coding != "scalar":
        return "codes are coded by a trellis"
    return unsupported(codec.dim, codec.frame.num_fast, codec.num_words)


@functools.cache
def _inform_once(message: str) -> None:
    logger.info(message)


def _triton_constants(codec: SpectralCodec, dtype: torch.dtype) -> PreparedSide:
    """A codec's constants in the form of the Triton kernels for a model's dtype, made once."""
    from quantcache_kernels.triton.ops import PreparedSide, compute_dtype, prepare
    from quantcache_kernels.triton.tables import Frame, SideConstants

    name = f"triton {compute_dtype(dtype)}"
    found = codec.derived.get(name)
    if not isinstance(found, PreparedSide):
        frame = codec.frame
        constants = SideConstants(
            widths=codec.widths.cpu(),
            offsets=codec.offsets.cpu(),
            encoder=codec.encoder.cpu(),
            decoder=codec.decoder.cpu(),
            mean=codec.mean.cpu(),
            weights=codec.weights.cpu(),
            levels=[gaussian_codebook(width).levels for width in range(MAX_WIDTH + 1)],
            polynomials=POLYNOMIALS,
            frame=None
            if frame.is_identity
            else Frame(frame.order.cpu(), frame.frequencies.cpu(), frame.slow_pairs, frame.num_slow),
            gain_search=codec.gain_search,
        )
        found = codec.derived.setdefault(name, prepare(constants, dtype, codec.mean.device))
        assert isinstance(found, PreparedSide)
    return found


def _triton_encode(codec: SpectralCodec, x: Tensor, places: Tensor, starts: Tensor | None) -> dict[str, Tensor]:
    from quantcache_kernels.triton.ops import encode_blocks

    prepared = _triton_constants(codec, x.dtype).encode
    codes, gains = encode_blocks(x, places, starts, prepared.tensors, prepared.sizes)
    return {"codes": codes, "gains": gains}


def _triton_decode(codec: SpectralCodec, fields: dict[str, Tensor], places: Tensor, starts: Tensor | None) -> Tensor:
    from quantcache_kernels.triton.ops import decode_blocks

    prepared = _triton_constants(codec, torch.float32).decode
    codes, gains = fields["codes"], fields["gains"]
    decoded: Tensor = decode_blocks(codes, gains, places, starts, prepared.tensors, prepared.sizes, torch.float32)
    return decoded


def _triton_attend(
    query: Tensor,
    view: CacheView,
    dense: tuple[Tensor, ...],
    mask: Tensor | None,
    s_aux: Tensor | None,
    scaling: float,
    causal: bool,
    softcap: float | None,
) -> Tensor:
    from quantcache_kernels.triton.ops import attend

    assert isinstance(view.key.codec, SpectralCodec)
    assert isinstance(view.value.codec, SpectralCodec)
    dtype = dense[2].dtype
    keys, values = _triton_constants(view.key.codec, dtype).keys, _triton_constants(view.value.codec, dtype).values
    output, _ = attend(
        query,
        _packed(view),
        list(dense),
        view.places,
        view.starts,
        mask,
        s_aux,
        keys.tensors,
        keys.sizes,
        values.tensors,
        values.sizes,
        view.encoded_end,
        scaling,
        softcap,
        causal,
        not view.cut,
    )
    return output
