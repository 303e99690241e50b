"""The codec and its mathematics: frames, transforms, codebooks, allocation, packing; encoding and decoding a block."""

from quantcache.coding.blocks import SideCodec as SideCodec
