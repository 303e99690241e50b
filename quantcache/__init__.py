"""Run-time KV-cache compression for Hugging Face transformers: packed low-bit keys and values, attended on directly.

Importing the package registers the attention implementation ``"spectral"`` with transformers.
"""

from __future__ import annotations

__version__ = "0.1.0"

from quantcache.accounting import CacheMemory
from quantcache.artifact import Calibration
from quantcache.attention import register_attention
from quantcache.cache import SpectralCache, SpectralLayer
from quantcache.calibration import calibrate
from quantcache.enabling import disable, enable, enabled
from quantcache.errors import ArtifactError, CalibrationMismatch, HubError, QuantCacheError, UnsupportedModel
from quantcache.export import absorb, export_checkpoint

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
    "export_checkpoint",
    "register_attention",
]
