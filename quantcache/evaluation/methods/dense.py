"""transformers' own cache: nothing is compressed."""

from __future__ import annotations

from transformers import DynamicCache

from quantcache.accounting.memory import DENSE_BITS
from quantcache.evaluation.methods.base import Scheme

SCHEMES = (
    Scheme(
        stem="dense",
        family="dense",
        simulated=False,
        description="keys and values in the model's dtype",
        source="transformers DynamicCache",
        make=lambda number, setting: lambda: DynamicCache(config=setting.config),
        bits=lambda number, side, dim: DENSE_BITS,
        keeps_lengths=False,
        layout="dense",
        tile=lambda number: 1,
    ),
)
