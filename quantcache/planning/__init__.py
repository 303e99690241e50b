"""What fits, and which format to take: sizes from a config, figures from measurement records."""

from __future__ import annotations

from quantcache.planning.geometry import load_config
from quantcache.planning.memory import estimate_memory

__all__ = ["estimate_memory", "load_config"]
