"""A dense cache of fake-quantized tokens: what a spectral cache must be equal to, in the simplest form.

It keeps dense keys and values, leaves every operation on them to transformers' own DynamicLayer, and replaces each
block by its decoded codes once it is due. Only the codec, and whichever backend encodes for it, is shared with the
implementation under test.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from quantcache.cache.layer import SpectralLayer
from quantcache.cache.spectral_cache import BlockCache
from quantcache.coding.blocks import SideCodec
from quantcache.coding.packing import BLOCK
from quantcache.coding.rope import ANCHOR_LENGTH
from tests.helpers import implementation


class ReferenceLayer(DynamicLayer):
    """Dense keys and values, quantized block by block in place.

    Args:
        layer: The layer to imitate: its codecs, sinks and residual are taken over.
        left_padding: Left padding of every row, ``[B]``.
    """

    def __init__(self, layer: SpectralLayer, left_padding: Tensor | None = None):
        super().__init__()
        self.make_codecs = layer.make_codecs
        self.sink_length, self.residual_length = layer.sink_length, layer.residual_length
        self.backend, self.left_padding = layer.backend, left_padding
        self.blocks: list[tuple[int, int, int]] = []  # first slot, valid length, slot of the anchor

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Quantize what the last call left due, then append."""
        self.quantize()
        return super().update(key_states, value_states)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest tokens, after those that are due have been quantized."""
        self.quantize()
        super().crop(tokens_to_remove)
        keep = self.get_seq_length()
        self.blocks = [(s, min(n, keep - s), a) for s, n, a in self.blocks if s < keep and keep > self.sink_length]

    def quantize(self) -> None:
        """Replace every block that is due by what its codes decode to."""
        while True:
            start = sum(self.blocks[-1][:2]) if self.blocks else self.sink_length
            if self.get_seq_length() < start + BLOCK + self.residual_length:
                return
            anchor = self.blocks[-1][2] if self.blocks else start
            if start + BLOCK > anchor + ANCHOR_LENGTH:
                anchor = start
            self.blocks.append((start, BLOCK, anchor))
            codecs = self.make_codecs(self.keys.device, {"key": self.keys, "value": self.values}, self.left_padding)
            self.keys = self._quantized(codecs["key"], self.keys)
            self.values = self._quantized(codecs["value"], self.values)

    def _quantized(self, codec: SideCodec, x: Tensor) -> Tensor:
        """All tokens, the newest block's replaced except where they are sinks of their row."""
        start = self.blocks[-1][0]
        block_table = torch.tensor(self.blocks[-1:], dtype=torch.int32)
        block = x[:, :, start : start + BLOCK]
        fields = implementation(self.backend).encode(codec, block, block_table, self.left_padding)
        decoded = codec.decode(fields, block_table, self.left_padding).to(x.dtype)
        if self.left_padding is not None:
            offsets = torch.arange(start, start + BLOCK) - self.left_padding[:, None]  # [B, 64]
            sinks = ((offsets >= 0) & (offsets < self.sink_length))[:, None, :, None]
            decoded = torch.where(sinks, block, decoded)
        return torch.cat((x[:, :, :start], decoded, x[:, :, start + BLOCK :]), dim=2)


def reference_cache(cache: BlockCache, config: PreTrainedConfig, left_padding: Tensor | None = None) -> DynamicCache:
    """An empty reference for an empty spectral cache.

    Args:
        cache: The cache to imitate.
        config: The model's config.
        left_padding: Left padding of every row, ``[B]``.

    Returns:
        The reference.
    """
    reference = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, SpectralLayer):
            reference.layers[index] = ReferenceLayer(layer, left_padding)
    return reference
