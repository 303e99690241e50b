"""Which of a layer's tokens are padding and at which positions they stand, as the model's forward passes tell.

The 2D mask of a forward pass says which slots it may look at. Nothing is ever hidden because of it later: it only
decides which tokens are kept exact as a row's sinks, and at which position a token is coded.

Shapes: B rows, T slots, t slots behind the last block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True)
class Arrivals:
    """What a forward pass says of its tokens.

    Attributes:
        shown: Which slots the pass may look at, ``[B, T]`` bool; None for all.
        shifts: Slot minus position of every new token, ``[B or 1, Tnew]`` int32; None for zero throughout.
    """

    shown: Tensor | None = None
    shifts: Tensor | None = None

    @classmethod
    def of(cls, mask: Tensor | None, positions: Tensor | None, length: int, count: int) -> Arrivals:
        """Read a model's arguments.

        Args:
            mask: The 2D mask, ``[B, any]``: as in transformers, slots that it does not reach are hidden.
            positions: ``position_ids`` of the new tokens; of any other shape than ``[B or 1, Tnew]`` they are taken to
                count the shown tokens of their row, as ``generate`` counts them.
            length: T, the new tokens included.
            count: Tnew.

        Returns:
            What they say.
        """
        shown = None
        if mask is not None and not bool((mask := mask[:, :length].bool()).all() and mask.shape[1] == length):
            shown = torch.nn.functional.pad(mask, (0, length - mask.shape[1]))
        slots = torch.arange(length - count, length, dtype=torch.int64, device="cpu" if mask is None else mask.device)
        if positions is not None and positions.ndim == 2 and positions.shape[1] == count:
            shifts = slots.to(positions.device) - positions
        elif shown is not None:
            shifts = (~shown).cumsum(-1)[:, length - count :]
        else:
            return cls()
        return cls(shown, shifts.int() if bool(shifts.any()) else None)

    def to(self, device: torch.device) -> Arrivals:
        """The same on another device."""
        return Arrivals(*(None if each is None else each.to(device) for each in (self.shown, self.shifts)))


class Grid(NamedTuple):
    """Where every row lies in the slots.

    Attributes:
        left_padding: Slot of every row's first token, ``[B]``, where its sinks begin; None for slot 0 throughout.
        origins: Slot at which every row's positions count from zero, ``[B]``; None where that is its start.
        shifts: Slot minus position of every token that is to be fitted, ``[B, t]``; None where frames say it.
    """

    left_padding: Tensor | None = None
    origins: Tensor | None = None
    shifts: Tensor | None = None

    @property
    def frames(self) -> Tensor | None:
        """What is to be taken from a slot for its position, ``[B]``; None for zero."""
        return self.left_padding if self.origins is None else self.origins


def extended(
    trail: Tensor | None, arrivals: Arrivals | None, grid: Grid, first: int, length: int, new: Tensor
) -> Tensor | None:
    """What is known of the tokens behind the last block, once new ones have come.

    Args:
        trail: What was known, ``[B, 2, t]`` int32: slot minus position, and whether some pass could look there; None
            while every token stood at its slot and could be looked at.
        arrivals: What the pass says; None for nothing: its tokens then continue their row.
        grid: Where the rows lie.
        first: Slot behind the last block.
        length: T, the new tokens included.
        new: The new keys, ``[B, H, Tnew, D]``.

    Returns:
        ``[B, 2, length - first]``, or None as above.
    """
    rows, count = new.shape[0], new.shape[2]
    if trail is None:
        if arrivals is None or (arrivals.shown is None and arrivals.shifts is None):
            return None
        trail = plain(grid, rows, first, length - count, new.device)
    shifts, shown = trail.unbind(1)
    if arrivals is None:
        more = filled(trail, grid)[:, -1:] if trail.shape[2] else _frames(grid, rows, trail.device)
        return torch.stack((_joined(shifts, more, count), _joined(shown, None, count, 1)), dim=1)
    arrivals = arrivals.to(trail.device)
    if arrivals.shown is None:
        shown = torch.ones_like(_joined(shown, None, count))
    else:
        shown = _joined(shown, None, count) | arrivals.shown[:, first:].int()
    return torch.stack((_joined(shifts, arrivals.shifts, count), shown), dim=1)


def _joined(old: Tensor, new: Tensor | None, count: int, default: int = 0) -> Tensor:
    """``[B, t]`` followed by ``count`` new entries, ``[B or 1, count or 1]``."""
    rows = old.shape[0]
    new = old.new_full((rows, count), default) if new is None else new.to(old.dtype).expand(rows, count)
    return torch.cat((old, new), dim=1)


def plain(grid: Grid, rows: int, first: int, last: int, device: torch.device) -> Tensor:
    """The trail of tokens that nothing was said of: all can be looked at from the row's start on, none is displaced.

    Args:
        grid: Where the rows lie.
        rows: B.
        first: First slot.
        last: One past the last slot.
        device: Where it is wanted.

    Returns:
        ``[B, 2, last - first]`` int32.
    """
    slots = torch.arange(first, last, dtype=torch.int64, device=device)
    shown = torch.ones(rows, last - first, dtype=torch.bool, device=device)
    if grid.left_padding is not None:
        shown = slots >= grid.left_padding[:, None]
    return torch.stack((_frames(grid, rows, device).expand(rows, last - first), shown), dim=1).int()


def _frames(grid: Grid, rows: int, device: torch.device) -> Tensor:
    """What is to be taken from a slot for its position, ``[B, 1]``."""
    frames = grid.frames
    return torch.zeros(rows, 1, dtype=torch.int64, device=device) if frames is None else frames[:, None]


def filled(trail: Tensor, grid: Grid) -> Tensor:
    """Slot minus position of every token; where nobody looks, that of the next token before it or behind it.

    Args:
        trail: See :func:`extended`.
        grid: Where the rows lie.

    Returns:
        ``[B, t]`` int64.
    """
    shifts, shown = trail[:, 0].long(), trail[:, 1].bool()
    rows, count = shown.shape
    if not count:
        return shifts
    slots = torch.arange(count, dtype=torch.int64, device=trail.device).expand(rows, count)
    last = torch.where(shown, slots, -1).cummax(-1).values
    nearest = torch.where(last < 0, shown.int().argmax(-1, keepdim=True), last)
    return torch.where(shown.any(-1, keepdim=True), shifts.gather(1, nearest), _frames(grid, rows, trail.device))


def settled(trail: Tensor, grid: Grid, first: int) -> Grid:
    """Where the rows lie, now that blocks are due: rows of which nothing but padding is encoded may still move.

    Args:
        trail: See :func:`extended`.
        grid: What was decided with the last blocks.
        first: Slot behind the last block; 0 before the first.

    Returns:
        The grid from now on.
    """
    if first and grid.left_padding is None:
        return grid
    shown, rows = trail[:, 1].bool(), trail.shape[0]
    behind, nearest = first + shown.shape[1], shown.int().argmax(-1)
    found = shown.any(-1)
    left_padding = torch.where(found, first + nearest, behind)
    shifts = trail[:, 0].long().gather(1, nearest[:, None])[:, 0]
    origins = torch.where(found, shifts, left_padding)
    if grid.left_padding is not None:
        still = grid.left_padding < first
        left_padding = torch.where(still, grid.left_padding, left_padding)
        origins = torch.where(still, _frames(grid, rows, trail.device)[:, 0], origins)
    own = bool((origins != left_padding).any())
    return Grid(left_padding if bool(left_padding.any()) else None, origins if own else None)


_shown: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""What :func:`shows_padding` found for a mask: all layers of a pass share one."""

_listed: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""The entries of left_padding, which need not be fetched from a GPU again and again."""


def shows_padding(mask: Tensor | None, left_padding: Tensor | None, length: int) -> bool:
    """Whether some query may look before the first token of its row.

    Args:
        mask: ``[B or 1, 1, Tq or 1, >= T]`` bool; None lets every query look at all of the past.
        left_padding: Slot of every row's first token, ``[B]``; None for slot 0.
        length: T.

    Returns:
        True if so.
    """
    if left_padding is None:
        return False
    if mask is None:
        return bool((left_padding > 0).any())
    pads = _listed.get(left_padding)
    if pads is None:
        pads = _listed[left_padding] = tuple(left_padding.tolist())
    key = (pads, length, None if mask.is_inference() else mask._version)
    known = _shown.get(mask)
    if known is not None and known[0] == key and key[2] is not None:
        return bool(known[1])
    most = min(max(pads), length)
    before = torch.arange(most, dtype=torch.int64, device=mask.device) < left_padding[:, None, None, None]
    found = bool((mask[..., :most] & before).any())
    _shown[mask] = key, found
    return found
