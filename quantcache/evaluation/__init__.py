"""Measurements, each taken through the real cache."""

from __future__ import annotations

from quantcache.evaluation.fidelity import FidelityResult, measure_fidelity
from quantcache.evaluation.methods import Method, parse_methods

__all__ = ["FidelityResult", "Method", "measure_fidelity", "parse_methods"]
