"""The CUDA kernels of ``quantcache_kernels.cuda``: attention on blocks in the order of the tensor cores.

They attend and encode (cuda_blocks.py). Decoding, and encoding what that kernel does not take, are left to the Triton
kernels, or to plain torch where there is no Triton.
"""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from torch import Tensor

from quantcache.backends import trials
from quantcache.backends.base import Backend, Fields, Stage, refused_by_kernels
from quantcache.backends.cuda_blocks import DTYPE, NAME, encoder, encodes, from_portable, is_ours, prepared, to_portable
from quantcache.backends.padding import shows_padding
from quantcache.backends.reference import REFERENCE
from quantcache.backends.trials import FAILED, attends_rightly, rejected
from quantcache.backends.triton import TritonBackend
from quantcache.backends.view import CacheView
from quantcache.coding.blocks import SideCodec
from quantcache.coding.codec import SpectralCodec
from quantcache.common.errors import GraphCaptureError
from quantcache.common.logs import log_once
from quantcache_kernels.cuda import calls
from quantcache_kernels.cuda import codes as kernels
from quantcache_kernels.cuda.compiler import CudaError
from quantcache_kernels.cuda.constants import unsupported
from quantcache_kernels.cuda.driver import unavailable
from quantcache_kernels.cuda.memory import Memory
from quantcache_kernels.cuda.near import NearTokens
from quantcache_kernels.cuda.places import Blocks, Lasting, Starts, units_of
from quantcache_kernels.interface import AttentionCall

logger = logging.getLogger(__name__)

LOOP_BLOCKS = 10
"""Blocks of a trial of attention: one split has three units, the other two."""


class CudaBackend(Backend):
    """Attends on a GPU of compute capability 8.0 or more.

    Args:
        portable: What decodes, in the portable layout, where it can, and encodes what the kernel does not take.
    """

    name = NAME
    layout = "cuda"

    def __init__(self, portable: TritonBackend) -> None:
        self._fallback = portable

    def unavailable(self, device: torch.device) -> str | None:
        """Another kind of device or an older one, no compiler, or a kernel that has failed its trial."""
        if rejected("attend", self.name, device):
            return FAILED
        emulated = device.type != "cuda" and device.type in kernels.LOADERS
        return None if emulated else unavailable(device)

    def lacks(self, codec: SideCodec, dtype: torch.dtype) -> str | None:
        """Another kind of blocks, geometry or dtype."""
        if not isinstance(codec, SpectralCodec):
            return f"blocks are coded by {type(codec).__name__}"
        if dtype != DTYPE:
            return f"keys or values are of {dtype}"
        return unsupported(codec.dim, codec.frame.num_fast)

    def refuses(self, query: Tensor, view: CacheView, call: AttentionCall) -> str | None:
        """What no kernel takes, and a kernel that has failed its trial."""
        if query.dtype != DTYPE:
            return f"the queries are of {query.dtype}"
        if reason := refused_by_kernels(query, view, call):
            return reason
        given = call.mask is None, call.sink_logits is None, call.softcap is None
        kind = query.shape, given, query.device.type in trials.UNTRIED
        served = view.prepared.setdefault("cuda serves", set())
        if kind not in served:  # a trial that fails later makes everything that is prepared anew
            if reason := self._refuses_blocks(query, view, call):
                return reason
            served.add(kind)
        return None

    def _refuses_blocks(self, query: Tensor, view: CacheView, call: AttentionCall) -> str | None:
        """The part of :meth:`refuses` that is the same while blocks are."""
        heads = view.key.tail.shape[1]
        rows = query.shape[1] // heads * query.shape[2]
        lines = calls.lines_of(query.shape[0], rows, heads)
        if lines > kernels.MAX_LINES:
            return f"{query.shape[0]} rows of {heads} heads are {lines} lines of queries, more than a launch takes"
        if reason := _too_large(view, rows):
            return reason
        shape = rows, view.num_blocks >= LOOP_BLOCKS
        if not attends_rightly(self, query, view, call, shape, LOOP_BLOCKS):
            return FAILED
        return None

    def attend(self, query: Tensor, view: CacheView, call: AttentionCall) -> Tensor:
        """Attend with the kernels of queries, codes, other tokens and their merge."""
        return _attend(query, view, call)

    def attend_on_trial(self, query: Tensor, view: CacheView, call: AttentionCall) -> Tensor:
        """Attend by two splits: a warp then goes on to blocks that come while it works, as in a long view.

        Their warps share a head's constants.
        """
        return _attend(query, view, call, min(2, -(-view.num_blocks // 4)))

    def stage(
        self,
        view: CacheView,
        room: dict[str, Tensor],
        count: Tensor,
        blocks: int,
        masked: bool,
        shared: dict[str, Any],
    ) -> Stage:
        """Lay out the arguments that do not change."""
        if view.report is None or view.report.attends is not None:
            raise GraphCaptureError(f"attention runs in plain torch: {view.report and view.report.attends}")
        memory = shared.setdefault(self.name, Memory())
        lasting = Lasting.of(units_of(blocks, not view.cut), memory, count.device)
        try:
            return CudaStage(self, view, room, count, masked, lasting)
        except CudaError as error:  # of a plain step a trial says so
            raise GraphCaptureError(f"the kernels cannot be used: {error}") from error

    def encode(self, codec: SideCodec, x: Tensor, block_table: Tensor, left_padding: Tensor | None) -> Fields:
        """Encode into this layout; what the kernel does not take in the portable one, to be brought into this."""
        if encodes(codec, x, block_table, left_padding):
            codes, gains = encoder(codec).encode(x, block_table, left_padding)
            return {"codes": codes, "gains": gains}
        return self.from_portable(codec, self._portable(x.device).encode(codec, x, block_table, left_padding))

    def decode(self, codec: SideCodec, fields: Fields, block_table: Tensor, left_padding: Tensor | None) -> Tensor:
        """Bring the blocks into the portable layout, then decode them."""
        return self._portable(block_table.device).decode(
            codec, self.to_portable(codec, fields), block_table, left_padding
        )

    def to_portable(self, codec: SideCodec, fields: Fields) -> Fields:
        """Blocks in the portable layout; gains are the same in both."""
        return {**fields, "codes": to_portable(codec, fields["codes"])} if is_ours(codec) else fields

    def from_portable(self, codec: SideCodec, fields: Fields) -> Fields:
        """Blocks in this layout."""
        return {**fields, "codes": from_portable(codec, fields["codes"])} if is_ours(codec) else fields

    def gains(self, codec: SideCodec, fields: Fields) -> Tensor:
        """Gains, which need no conversion."""
        return fields["gains"]

    def _portable(self, device: torch.device) -> Backend:
        """Who decodes, and encodes what the kernel does not take."""
        reason = self._fallback.unavailable(device)
        if reason is None:
            return self._fallback
        log_once(
            logger,
            logging.WARNING,
            f"plain torch does what is left to {self._fallback.name}'s kernels, and is slower: {reason}",
        )
        return REFERENCE


class CudaStage(Stage):
    """A layer's launches of a step of one token; arguments are those of :meth:`Backend.stage`.

    They find in memory whatever changes when a block is encoded.
    """

    def __init__(
        self, backend: Backend, view: CacheView, room: dict[str, Tensor], count: Tensor, masked: bool, lasting: Lasting
    ) -> None:
        self._backend, self._view, self._masked, self._lasting = backend, view, masked, lasting
        self._sides = prepared(cast(SpectralCodec, view.key.codec)), prepared(cast(SpectralCodec, view.value.codec))
        near = _near(view, room, count)
        if near is None:
            raise GraphCaptureError("the kernels cannot read the tail where it lies")
        self._near, self._count = near, count
        self._blocks = _blocks(view)
        kernels.announce(lasting, self._blocks, near, *self._sides, view.key.tail.shape[2])

    def append(self, key: Tensor, value: Tensor) -> None:
        """One launch."""
        kernels.append(key, value, self._near, *self._sides, self._lasting)

    def attend(self, query: Tensor, call: AttentionCall) -> Tensor:
        """Three launches, whose results go where those of the step before went."""
        if not self._masked:
            call = call._replace(mask=None)
        if self._lasting.out is None:
            reason = "it brings several tokens at once" if query.shape[2] > 1 else None
            reason = reason or self._backend.refuses(query, self._view, call)
            if reason is not None:
                raise GraphCaptureError(f"the {self._backend.name} backend does not serve this step: {reason}")
        return kernels.attend(query, self._blocks, self._near, *self._sides, call, lasting=self._lasting)

    def follow(self, view: CacheView, room: dict[str, Tensor], held: int) -> bool:
        """One launch."""
        before, near = self._view, _near(view, room, self._count)
        if near is None or view.origins is not None:
            return False
        same = (
            [part.shape for part in near.parts] == [part.shape for part in self._near.parts]
            and (view.key.codec, view.value.codec) == (before.key.codec, before.value.codec)
            and (view.backend, view.cut, view.shifted) == (before.backend, before.cut, before.shifted)
            and (view.left_padding is None) == (before.left_padding is None)
            and units_of(view.num_blocks, not view.cut) <= self._lasting.units
        )
        if same:
            self._view, self._near, self._blocks = view, near, _blocks(view)
            kernels.announce(self._lasting, self._blocks, near, *self._sides, held)
        return same

    def require_hidden(self, mask: Tensor | None) -> None:
        """The kernels hide padding whatever a mask says."""
        if shows_padding(mask if self._masked else None, self._view.left_padding, self._view.length):
            raise GraphCaptureError("the cuda backend does not serve this step: a query attends to padding")


def _attend(query: Tensor, view: CacheView, call: AttentionCall, splits: int | None = None) -> Tensor:
    keys, values = map(prepared, view.spectral_codecs)
    return kernels.attend(query, _blocks(view), NearTokens(*view.dense_parts()), keys, values, call, splits)


def _too_large(view: CacheView, rows: int) -> str | None:
    """Why one warp of the kernel does not fit the device, as with wide codes of large heads on smaller GPUs."""
    keys, values = map(prepared, view.spectral_codecs)
    room = calls.room_of(keys, values, calls.rows_of(rows), view.key.tail.device)
    if room.warps_that_fit(1):
        return None
    taken, there = room.constants + room.warp, room.device.block_bytes
    return f"a head's constants and blocks take {taken} bytes of shared memory, and the device has {there}"


def _near(view: CacheView, room: dict[str, Tensor], count: Tensor) -> NearTokens | None:
    """Sinks, and a tail of which the device knows how long it is; None where the kernels cannot read that in place."""
    near = NearTokens(*view.sinks, room["key"], room["value"], count).readable()
    return near if near.key_tail is room["key"] and near.value_tail is room["value"] else None


def _blocks(view: CacheView) -> Blocks:
    """A view's blocks as the kernels are given them, made once for all views of the same blocks."""
    found = view.prepared.get("cuda blocks")
    if found is None:
        found = Blocks(view.packed(), view.block_table, _starts(view), view.encoded_end, not view.cut).readable()
        view.prepared["cuda blocks"] = found
    assert isinstance(found, Blocks)
    return found


def _starts(view: CacheView) -> Starts | None:
    """Where padded rows begin."""
    if view.left_padding is None:
        return None
    origins = view.left_padding.int()
    return Starts(origins, origins + view.sinks[0].shape[2])
