"""The methods that can be measured: one small file for each family, which describes itself."""

from __future__ import annotations

from quantcache.evaluation.methods.base import Method, MethodUnavailable, Scheme, Setting
from quantcache.evaluation.methods.registry import (
    METHOD_NAMES,
    SCHEMES,
    all_methods,
    needs_statistics,
    parse_methods,
    reading_codes,
    register,
)
from quantcache.evaluation.methods.statistics import RivalStatistics, collect_statistics, text_statistics

__all__ = [
    "METHOD_NAMES",
    "SCHEMES",
    "Method",
    "MethodUnavailable",
    "RivalStatistics",
    "Scheme",
    "Setting",
    "all_methods",
    "collect_statistics",
    "needs_statistics",
    "parse_methods",
    "reading_codes",
    "register",
    "text_statistics",
]
