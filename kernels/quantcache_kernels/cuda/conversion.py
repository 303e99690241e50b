"""Blocks brought from the portable layout into tiles, and back, in one launch either way.

``BlockLayout.pack`` and ``unpack`` are the same in plain torch. Shapes: n blocks, B batch, H key/value heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcache_kernels.cuda.blocks import PATH_BIT, TILE, BlockLayout
from quantcache_kernels.cuda.driver import load
from quantcache_kernels.cuda.launching import Launched, on_device, stream_of
from quantcache_kernels.cuda.structures import ConversionArguments, pointer
from quantcache_kernels.interface import SideConstants

CODE_PITCH = 66
"""As in tiles.h: bytes of shared memory from a coefficient's codes to the next one's."""


def _on_cuda(device: torch.device) -> Mapping[str, Launched]:
    return load(device.index or 0, "conversion.h")


LOADERS: dict[str, Callable[[torch.device], Mapping[str, Launched]]] = {"cuda": _on_cuda}
"""By type of device, who finds the kernels; tests add an emulation."""


@dataclass(frozen=True)
class Conversion:
    """Where both layouts have a side's codes.

    Attributes:
        slots: Of every slot, the first word of its coefficient in a portable block, and its width with 512 times the
            number of its map, ``[H, S, 2]`` int32.
        places: Of every tile, its first word and its kind, ``[H, tiles, 2]`` int32.
        maps: What codes are stored as, and the way back, ``[maps, 2, 256]`` uint8.
        portable_words: Words of a portable block and batch row.
        tile_words: The same of tiles.
        is_trellis: Whether codes are paths through a trellis.
        holds_values: Whether they are of values.
    """

    slots: Tensor
    places: Tensor
    maps: Tensor
    portable_words: int
    tile_words: int
    is_trellis: bool
    holds_values: bool

    def from_portable(self, words: Tensor) -> Tensor:
        """Bring blocks into tiles.

        Args:
            words: ``[n, B, portable_words]`` int32.

        Returns:
            ``[n, B, tile_words]`` int32.
        """
        return self._converted(words, self.tile_words, "tiles_from_portable")

    def to_portable(self, words: Tensor) -> Tensor:
        """Invert :meth:`from_portable`."""
        return self._converted(words, self.portable_words, "portable_from_tiles")

    def _converted(self, words: Tensor, size: int, name: str) -> Tensor:
        words, device = words.contiguous(), words.device
        out = torch.empty(*words.shape[:2], size, dtype=torch.int32, device=device)
        if not out.numel():
            return out
        portable, tiles = (words, out) if name == "tiles_from_portable" else (out, words)
        count, blocks = self.places.shape[0] * self.places.shape[1], out.shape[0] * out.shape[1]
        arguments = ConversionArguments(
            portable=pointer(portable),
            tiles=pointer(tiles),
            slots=pointer(self.slots),
            places=pointer(self.places),
            maps=pointer(self.maps),
            portable_words=self.portable_words,
            tile_words=self.tile_words,
            count=count,
            trellis=self.is_trellis,
            values=self.holds_values,
        )
        with on_device(device):
            kernel = LOADERS[device.type](device)[name]
            kernel.launch((blocks, count), 32, TILE * CODE_PITCH, arguments, stream_of(device))
        return out


def lay_out_conversion(
    constants: SideConstants, layout: BlockLayout, device: torch.device, holds_values: bool
) -> Conversion:
    """Say where both layouts have a side's codes.

    Args:
        constants: The side, on the CPU.
        layout: Where its tiles lie.
        device: Where blocks are.
        holds_values: Whether it is the values' side.

    Returns:
        The tables.
    """
    number = torch.zeros(layout.heads * layout.dim + 1, dtype=torch.int64, device="cpu")
    maps = [torch.arange(256, dtype=torch.int64, device="cpu").repeat(2, 1)]
    for coefficients, both_ways in layout.recoded():
        number[coefficients] = len(maps)
        maps.append(both_ways)
    made = torch.stack(maps)
    if layout.is_trellis:  # a path bit is not part of the code
        made[:, 1] &= (1 << PATH_BIT) - 1
    first = torch.where(layout.dims < 0, 0, constants.offsets.to(torch.int64).gather(1, layout.dims.clamp_min(0)))
    kinds = layout.own_widths + made[0].numel() * number[layout.coefficients()]
    tiles = layout.tile_words.flatten()
    places = torch.stack((tiles.cumsum(0) - tiles, layout.kinds.flatten()), dim=-1)
    return Conversion(
        slots=torch.stack((first, kinds), dim=-1).int().to(device),
        places=places.int().view(layout.heads, layout.tiles, 2).to(device),
        maps=made.to(torch.uint8).to(device),
        portable_words=constants.words,
        tile_words=layout.words,
        is_trellis=layout.is_trellis,
        holds_values=holds_values,
    )
