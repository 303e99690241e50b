"""The exceptions quantcache raises on purpose: one sentence each, naming both sides of a disagreement."""

from __future__ import annotations

MAX_CHARACTERS = 1000
"""Length of a message: what is quoted may come from a hostile file."""


class QuantCacheError(Exception):
    """Base class of every error that quantcache raises about its input."""

    def __init__(self, message: str = ""):
        if len(message) > MAX_CHARACTERS:
            half = MAX_CHARACTERS // 2
            message = f"{message[:half]} [...] {message[-half:]}"
        super().__init__(message)


class CalibrationMismatch(QuantCacheError):
    """A calibration and a model (or a tensor) disagree about geometry."""


class TokensNotFinite(QuantCacheError):
    """Tokens that are to be encoded hold NaN or infinity."""


class ArtifactError(QuantCacheError):
    """A calibration artifact is missing, truncated, malformed or of an unknown schema."""


class SettingsError(QuantCacheError, ValueError):
    """A codec setting has no meaning."""


class HubError(ArtifactError):
    """A download from the Hub or an upload to it failed."""


class UnsupportedModel(QuantCacheError):
    """The model, or a way of using it, is outside what quantcache can compress correctly."""


class NothingToCompress(UnsupportedModel):
    """No layer of the model's cache grows with the text in a way that quantcache can compress."""


class GraphCaptureError(QuantCacheError):
    """A decoding step of a model cannot be captured in a CUDA graph and repeated."""


class CalibrationWarning(UserWarning):
    """A calibration fits a model's geometry, but was made for another model."""


class RowError(QuantCacheError, IndexError):
    """A batch has no such rows."""
