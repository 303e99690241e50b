"""Run-time KV-cache compression for Hugging Face transformers: packed low-bit keys and values, attended on directly.

Importing the package registers the attention implementation ``"spectral"`` with transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

from quantcache.accounting import CacheMemory
from quantcache.artifact import Calibration
from quantcache.attention import register_attention
from quantcache.cache import SpectralCache, SpectralLayer
from quantcache.calibration import calibrate
from quantcache.enabling import disable, enable, enabled
from quantcache.errors import ArtifactError, CalibrationMismatch, HubError, QuantCacheError, UnsupportedModel
from quantcache.export import absorb, export_checkpoint

if TYPE_CHECKING:
    from quantcache.planning import estimate_memory

register_attention()

__all__ = [
    "ArtifactError",
    "CacheMemory",
    "Calibration",
    "CalibrationMismatch",
    "HubError",
    "QuantCacheError",
    "SpectralCache",
    "SpectralLayer",
    "UnsupportedModel",
    "__version__",
    "absorb",
    "calibrate",
    "disable",
    "enable",
    "enabled",
    "estimate_memory",
    "export_checkpoint",
    "register_attention",
]


def __getattr__(name: str) -> Any:
    """Import what is not needed for running a cache when it is asked for."""
    if name == "estimate_memory":
        from quantcache.planning import estimate_memory

        return estimate_memory
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
