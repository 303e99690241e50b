"""What an export did, and how far its logits are from the original's."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantcache.artifact.calibration import Calibration
from quantcache.common.choices import Basis


@dataclass(frozen=True)
class LogitDifference:
    """How far the logits of an export are from the original's, measured on text.

    Attributes:
        max_abs: Largest difference of a logit.
        scale: Largest logit of the original, in absolute value.
        kl_mean: Mean KL(original || export) per token in nats.
        top1_agreement: Share of tokens with the same most likely successor.
        tokens: Tokens measured on.
        dtype: The dtype both ran in.
    """

    max_abs: float
    scale: float
    kl_mean: float
    top1_agreement: float
    tokens: int
    dtype: str

    @property
    def relative(self) -> float:
        """Largest difference over largest logit."""
        return self.max_abs / self.scale if self.scale else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        return {**asdict(self), "relative": self.relative}

    def __str__(self) -> str:
        return (
            f"differ from the base model's by at most {self.max_abs:.2e} (largest logit {self.scale:.2f}), mean KL "
            f"{self.kl_mean:.1e} nats, top-1 agreement {self.top1_agreement:.2%}, over {self.tokens} tokens in "
            f"{self.dtype}"
        )


@dataclass(frozen=True)
class ExportReport:
    """What an export did.

    Attributes:
        output: Folder written.
        base_model: ``{"id", "revision", "model_type"}`` of the model exported.
        basis: ``spectral`` or ``flat``.
        layers: Number of layers changed.
        tensors: Number of tensors changed.
        shards: Files of weights.
        mean_in_weights: Whether the biases took the mean of the values.
        keys_scaled: Layers whose keys were scaled.
        left_out: Files of the model that were not copied: weights in other formats.
        difference: The measured difference of the logits; None where it was not measured.
        calibration: Calibration that belongs to the export.
    """

    output: Path
    base_model: dict[str, Any]
    basis: Basis
    layers: int
    tensors: int
    shards: int
    mean_in_weights: bool
    keys_scaled: int
    left_out: list[str]
    difference: LogitDifference | None
    calibration: Calibration
