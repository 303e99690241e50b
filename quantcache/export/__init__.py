"""Checkpoints with the value basis folded into their weights."""

from __future__ import annotations

from quantcache.export.model import absorb

__all__ = ["absorb"]
