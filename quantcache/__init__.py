"""Run-time KV-cache compression for Hugging Face transformers: packed low-bit keys and values, attended on directly.

Importing the package registers the attention implementation ``"spectral"`` with transformers. It costs little more than
importing transformers itself: torch and the models' code are loaded when something needs them.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from quantcache.common import errors
from quantcache.common.registration import register_when_loaded

__version__ = "0.2.0"

if TYPE_CHECKING:
    from quantcache.accounting import CacheMemory
    from quantcache.artifact import Calibration
    from quantcache.attention import register_attention
    from quantcache.cache import (
        BlockCache,
        DecodeGraph,
        PrefixStore,
        SpectralCache,
        SpectralLayer,
        decode_graphs,
        disable,
        enable,
        enabled,
    )
    from quantcache.calibration import calibrate
    from quantcache.coding import SideCodec
    from quantcache.common.errors import (
        ArtifactError,
        CalibrationMismatch,
        CalibrationWarning,
        GraphCaptureError,
        HubError,
        QuantCacheError,
        UnsupportedModel,
    )
    from quantcache.export import absorb, export_checkpoint
    from quantcache.planning.memory import estimate_memory

_HOMES = {
    "ArtifactError": "common.errors",
    "BlockCache": "cache",
    "CacheMemory": "accounting",
    "Calibration": "artifact",
    "CalibrationMismatch": "common.errors",
    "CalibrationWarning": "common.errors",
    "GraphCaptureError": "common.errors",
    "DecodeGraph": "cache",
    "HubError": "common.errors",
    "PrefixStore": "cache",
    "QuantCacheError": "common.errors",
    "SideCodec": "coding",
    "SpectralCache": "cache",
    "SpectralLayer": "cache",
    "UnsupportedModel": "common.errors",
    "absorb": "export",
    "calibrate": "calibration",
    "decode_graphs": "cache",
    "disable": "cache",
    "enable": "cache",
    "enabled": "cache",
    "estimate_memory": "planning.memory",
    "export_checkpoint": "export",
    "register_attention": "attention",
}
"""The module that each public name comes from, when it is first asked for."""

__all__ = [
    "ArtifactError",
    "BlockCache",
    "CacheMemory",
    "Calibration",
    "CalibrationMismatch",
    "CalibrationWarning",
    "DecodeGraph",
    "GraphCaptureError",
    "HubError",
    "PrefixStore",
    "QuantCacheError",
    "SideCodec",
    "SpectralCache",
    "SpectralLayer",
    "UnsupportedModel",
    "__version__",
    "absorb",
    "calibrate",
    "decode_graphs",
    "disable",
    "enable",
    "enabled",
    "estimate_memory",
    "export_checkpoint",
    "register_attention",
]

register_when_loaded()
sys.modules[f"{__name__}.errors"] = errors  # where users find the exceptions


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
