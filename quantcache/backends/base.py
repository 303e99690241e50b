"""What a backend is: one implementation of encoding blocks, decoding them and attending on their codes.

A backend is chosen once for each layer and device (:func:`quantcache.backends.choose`). It may keep blocks in a layout
of its own; files, other devices and plain torch get the portable one, that of
:meth:`quantcache.coding.codec.SpectralCodec.encode`.

Shapes: B batch, Hq / H query / key-value heads, Tq queries, D dimension, n blocks of 64 tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from quantcache.backends.padding import shows_padding
from quantcache.backends.view import CacheView
from quantcache.coding.blocks import SideCodec
from quantcache.coding.codec import DerivedConstants, SpectralCodec
from quantcache.common.ambient import without_autocast
from quantcache.common.errors import GraphCaptureError
from quantcache_kernels.interface import AttentionCall

CODE_QUERIES = 16
"""Up to this many queries attend on codes; for more, decoding each tile once is cheaper."""

Derived = TypeVar("Derived", bound=DerivedConstants)

Fields = dict[str, Tensor]
"""Encoded blocks, ``[n, B, ...]`` each: in every layout blocks come first and rows second."""


class Stage(ABC):
    """One layer's part in steps of one token that are repeated without the host: what is launched is always the same.

    It serves while the layer is as it was made for; :meth:`follow` makes it serve what has become of the layer.
    """

    @abstractmethod
    def append(self, key: Tensor, value: Tensor) -> None:
        """Put a token where the device's own count of tokens says.

        Args:
            key: ``[B, H, 1, D]``.
            value: ``[B, H, 1, Dv]``.
        """

    @abstractmethod
    def attend(self, query: Tensor, call: AttentionCall) -> Tensor:
        """Attend on encoded blocks, sinks and as many tokens of the tail as the device counts.

        Args:
            query: ``[B, Hq, 1, D]``.
            call: The rest of the call; its mask covers all the room in the tail.

        Returns:
            ``[B, 1, Hq, Dv]`` in the query's dtype, overwritten by the next call.

        Raises:
            GraphCaptureError: The backend refuses the call.
        """

    @abstractmethod
    def follow(self, view: CacheView, room: dict[str, Tensor], held: int) -> bool:
        """Let the same launches serve other blocks and another tail, such as after a block has been encoded.

        Args:
            view: What may be read now.
            room: As of :meth:`Backend.stage`, of the same shapes.
            held: How many tokens the tail has: what the device counts from now on.

        Returns:
            Whether they can; if not, a new stage is needed.
        """

    @abstractmethod
    def require_hidden(self, mask: Tensor | None) -> None:
        """Refuse a mask that shows what has become padding.

        Args:
            mask: As of the calls; None for none.

        Raises:
            GraphCaptureError: The mask shows such a token.
        """


class Backend(ABC):
    """One implementation; all of them give the same results as :class:`quantcache.backends.reference.Reference`.

    A backend has no state but what it keeps with a codec (``codec.derived``), so one object serves all layers. A side
    whose codec is not a SpectralCodec is encoded and decoded by that codec itself.
    """

    name: str

    layout: str = "portable"
    """Name of the layout of its blocks; another one than the portable needs :meth:`to_portable` and its inverse."""

    by_token = False
    """Whether ``_encode`` and ``_decode`` know tokens of a row that differ in what is to be taken from their slots.

    Where they do not, keys are turned to where their slots say before one and back after the other.
    """

    @abstractmethod
    def unavailable(self, device: torch.device) -> str | None:
        """Why this backend cannot run on a device of this machine.

        Args:
            device: Where keys and values are.

        Returns:
            The reason, None if it can.
        """

    @abstractmethod
    def lacks(self, codec: SideCodec, dtype: torch.dtype) -> str | None:
        """Why this backend cannot serve a side of a layer, whatever the call.

        Args:
            codec: The side's codec.
            dtype: Of its keys or values.

        Returns:
            The reason, None if it can.
        """

    @abstractmethod
    def refuses(self, query: Tensor, view: CacheView, call: AttentionCall) -> str | None:
        """Why this backend does not serve one call; what :meth:`lacks` says is not asked again.

        Args:
            query: ``[B, Hq, Tq, D]``, at most :data:`CODE_QUERIES` of them.
            view: What may be read; it holds encoded blocks.
            call: The rest of the call.

        Returns:
            The reason, None if it does.
        """

    @abstractmethod
    def attend(self, query: Tensor, view: CacheView, call: AttentionCall) -> Tensor:
        """Attend on encoded blocks, sinks and tail.

        Args:
            query: ``[B, Hq, Tq, D]``; the last Tq tokens of the view are the queries' own.
            view: What may be read; it holds encoded blocks.
            call: The rest of the call.

        Returns:
            ``[B, Tq, Hq, Dv]`` in the query's dtype.
        """

    def attend_on_trial(self, query: Tensor, view: CacheView, call: AttentionCall) -> Tensor:
        """:meth:`attend` on the small view of a trial, the way that it goes on long ones.

        Args:
            query: As of :meth:`attend`.
            view: As of :meth:`attend`.
            call: As of :meth:`attend`.

        Returns:
            As of :meth:`attend`.
        """
        return self.attend(query, view, call)

    def stage(
        self,
        view: CacheView,
        room: dict[str, Tensor],
        count: Tensor,
        blocks: int,
        masked: bool,
        shared: dict[str, Any],
    ) -> Stage:
        """Get ready for steps of one token that are to be repeated without the host.

        Args:
            view: What may be read before them; it holds encoded blocks.
            room: Memory of the tails by side, ``[B, H, any, D]``: the view's tokens, and room for those to come.
            count: How many tokens the tails have, ``[1]`` int32 on the device; it grows before each step.
            blocks: How many blocks there is to be room for.
            masked: Whether the calls' masks hide anything.
            shared: What the stages of a model's layers, which follow each other, have in common.

        Returns:
            The stage.

        Raises:
            GraphCaptureError: The backend has no such steps, or cannot serve these.
        """
        raise GraphCaptureError(f"attention by the {self.name} backend depends on lengths that the host knows")

    @without_autocast
    def encode(self, codec: SideCodec, x: Tensor, block_table: Tensor, left_padding: Tensor | None) -> Fields:
        """Encode n blocks of one side.

        Args:
            codec: The side's codec.
            x: ``[B, H, n * 64, D]``.
            block_table: Where the blocks lie, ``[n, 3]`` (see ``SideCodec``).
            left_padding: What is to be taken from a slot for its position, by row ``[B]``, or None;
                ``[B, n * 64]`` where tokens of a row differ.

        Returns:
            The blocks in this backend's layout.
        """
        if not isinstance(codec, SpectralCodec) or self.lacks(codec, x.dtype) is not None:
            return Backend._encode(self, codec, x, block_table, left_padding)
        if left_padding is not None and left_padding.ndim == 2 and not self.by_token:
            x, left_padding = codec.frame.turn(x, left_padding[:, None]), None
        return self._encode(codec, x, block_table, left_padding)

    @without_autocast
    def decode(self, codec: SideCodec, fields: Fields, block_table: Tensor, left_padding: Tensor | None) -> Tensor:
        """Decode n blocks of one side, for a long query.

        Args:
            codec: The side's codec.
            fields: The blocks in this backend's layout.
            block_table: Where they lie, ``[n, 3]``.
            left_padding: What is to be taken from a slot for its position, by row ``[B]``, or None.

        Returns:
            ``[B, H, n * 64, D]`` float32, slots beyond a block's valid length included.
        """
        if not isinstance(codec, SpectralCodec) or self.lacks(codec, torch.float32) is not None:
            return Backend._decode(self, codec, fields, block_table, left_padding)
        if "shifts" in fields and not self.by_token:
            fields = dict(fields)
            shifts = fields.pop("shifts").transpose(0, 1).flatten(1)
            return codec.frame.turn(self._decode(codec, fields, block_table, None), -shifts[:, None])
        return self._decode(codec, fields, block_table, left_padding)

    def _encode(self, codec: Any, x: Tensor, block_table: Tensor, left_padding: Tensor | None) -> Fields:
        """:meth:`encode` for a codec that the backend does not lack; plain torch unless a backend overrides this."""
        return self.from_portable(codec, codec.encode(x, block_table, left_padding))

    def _decode(self, codec: Any, fields: Fields, block_table: Tensor, left_padding: Tensor | None) -> Tensor:
        """:meth:`decode`, likewise."""
        decoded: Tensor = codec.decode(self.to_portable(codec, fields), block_table, left_padding)
        return decoded.float()

    def to_portable(self, codec: SideCodec, fields: Fields) -> Fields:
        """Blocks in the portable layout, made of this backend's.

        Args:
            codec: The side's codec.
            fields: Whole blocks in this backend's layout.

        Returns:
            The same blocks as the codec's own ``encode`` gives them; fields that are not the codec's as they are.
        """
        return fields

    def gains(self, codec: SideCodec, fields: Fields) -> Tensor:
        """Gains of a SpectralCodec's blocks.

        Args:
            codec: The side's codec.
            fields: Blocks in this backend's layout.

        Returns:
            ``[n, B, H, 64]`` uint8.
        """
        return self.to_portable(codec, fields)["gains"]

    def from_portable(self, codec: SideCodec, fields: Fields) -> Fields:
        """Invert :meth:`to_portable`.

        Args:
            codec: The side's codec.
            fields: Whole blocks in the portable layout.

        Returns:
            The same blocks in this backend's layout.
        """
        return fields


def kept(codec: SpectralCodec, name: str, kind: type[Derived], make: Callable[[], Derived]) -> Derived:
    """A codec's constants in the form of a backend's kernels, made once and kept with it.

    Args:
        codec: The codec.
        name: What they are kept under.
        kind: Their type.
        make: Makes them.

    Returns:
        The constants.
    """
    found = codec.derived.get(name)
    if not isinstance(found, kind):
        # What another thread has made in the meantime stays: its kernels may be reading it.
        found = codec.derived.setdefault(name, make())
        assert isinstance(found, kind)
    return found


def refused_by_kernels(query: Tensor, view: CacheView, call: AttentionCall) -> str | None:
    """What every kernel so far refuses.

    Args:
        query: ``[B, Hq, Tq, D]``.
        view: What may be read.
        call: The rest of the call.

    Returns:
        The reason, None if there is none.
    """
    mask, logits = call.mask, call.sink_logits
    if torch.is_grad_enabled() and (query.requires_grad or (logits is not None and logits.requires_grad)):
        return "gradients are wanted"
    if mask is not None and not _is_plain(mask, query, view.length):
        return "the mask is not boolean, differs between heads or does not cover the cache"
    if call.hides_the_future(query.shape[2]) and view.key.tail.shape[2] < query.shape[2]:
        return "tokens of the queries themselves are encoded, and blocks are read as the past of every query"
    if view.origins is not None or view.shifted:
        return "positions do not count up from the end of the padding"
    if view.left_padding is not None and shows_padding(mask, view.left_padding, view.length):
        return "a query attends to padding"
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


@dataclass
class BackendReport:
    """Which backend serves a layer, and why not a faster one.

    Attributes:
        name: The backend.
        passed_over: Faster backends that cannot serve the layer, with the reason.
        attends: Why attention runs in plain torch although blocks are encoded by the backend; None if it does not.
        refused: Calls that plain torch served in the backend's place, by reason.
    """

    name: str
    passed_over: dict[str, str] = field(default_factory=dict)
    attends: str | None = None
    refused: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        parts = [self.name, *(f"not {name}: {reason}" for name, reason in self.passed_over.items())]
        parts += [f"attention in plain torch: {self.attends}"] if self.attends else []
        parts += [f"{count} calls in plain torch: {reason}" for reason, count in self.refused.items()]
        return "; ".join(parts)
