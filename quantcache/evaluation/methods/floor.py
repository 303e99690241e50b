"""The dense cache once more, read in other chunks: what rounding alone moves."""

from __future__ import annotations

from dataclasses import replace

from quantcache.evaluation.methods import dense

SCHEMES = (
    replace(
        dense.SCHEMES[0],
        stem="floor",
        family="floor",
        description="the dense cache, each chunk read in two halves: what rounding alone moves",
    ),
)
