"""Measurements, each taken through the real cache."""

from __future__ import annotations

from quantcache.evaluation.fidelity import FidelityResult, measure_fidelity
from quantcache.evaluation.methods import (
    METHOD_NAMES,
    Method,
    MethodUnavailable,
    all_methods,
    needs_statistics,
    parse_methods,
    text_statistics,
)

__all__ = [
    "METHOD_NAMES",
    "FidelityResult",
    "Method",
    "MethodUnavailable",
    "all_methods",
    "measure_fidelity",
    "needs_statistics",
    "parse_methods",
    "text_statistics",
]
