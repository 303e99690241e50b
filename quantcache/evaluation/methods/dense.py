"""transformers' own cache: nothing is compressed."""

from __future__ import annotations

from transformers import DynamicCache

from quantcache.evaluation.methods.base import Recipe

RECIPES = (
    Recipe(
        stem="dense",
        family="dense",
        simulated=False,
        description="keys and values in the model's dtype",
        source="transformers DynamicCache",
        make=lambda number, setting: lambda: DynamicCache(config=setting.config),
        keeps_lengths=False,
    ),
)
