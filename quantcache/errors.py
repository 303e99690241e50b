"""The exceptions quantcache raises on purpose: one sentence each, naming both sides of a disagreement."""

from __future__ import annotations


class QuantCacheError(Exception):
    """Base class of every error that quantcache raises about its input."""


class CalibrationMismatch(QuantCacheError):
    """A calibration and a model (or a tensor) disagree about geometry."""


class ArtifactError(QuantCacheError):
    """A calibration artifact is missing, truncated, malformed or of an unknown schema."""


class HubError(ArtifactError):
    """Something cannot be had from the Hub, or not be put there."""


class UnsupportedModel(QuantCacheError):
    """The model, or a way of using it, is outside what quantcache can compress correctly."""
