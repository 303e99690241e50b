"""What has to fit, and what comes of it: the data of a recommendation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from quantcache.artifact.quality import QualityRate
from quantcache.common.defaults import PREFILL_CHUNK
from quantcache.common.errors import QuantCacheError
from quantcache.planning.quality import Quality
from quantcache.planning.weights import WEIGHTS_FORMATS


@dataclass(frozen=True)
class Demand:
    """What has to fit.

    Attributes:
        memory: Bytes.
        context: Tokens cached in each row.
        batch: Rows.
        max_kl: Largest mean KL divergence accepted, nats per token.
        min_agreement: Smallest share of positions with the same most likely token accepted.
        weights: Name of the weights' format, such as ``bf16``.
        chunk: Prompt tokens that go through the model at once.
    """

    memory: int
    context: int
    batch: int = 1
    max_kl: float | None = None
    min_agreement: float | None = None
    weights: str = "bf16"
    chunk: int = PREFILL_CHUNK

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises:
            QuantCacheError: A number is out of range, or the weights' format is unknown.
        """
        for name in ("memory", "context", "batch", "chunk"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise QuantCacheError(f"{name} must be a whole number from 1 up, got {value!r}")
        if self.max_kl is not None and not 0 <= self.max_kl < float("inf"):
            raise QuantCacheError(f"max_kl must be a number from 0 up, got {self.max_kl}")
        if self.min_agreement is not None and not 0 <= self.min_agreement <= 1:
            raise QuantCacheError(f"min_agreement must lie between 0 and 1, got {self.min_agreement}")
        if self.weights not in WEIGHTS_FORMATS:
            known = ", ".join(WEIGHTS_FORMATS)
            raise QuantCacheError(f"unknown weights format {self.weights!r}: known are {known}")


@dataclass(frozen=True)
class Candidate:
    """One format under a demand.

    Attributes:
        format: Its name.
        bits_per_element: Bits of an encoded element, scales and gains included.
        cache_bytes: Bytes of the cache after one prompt of the whole context, exact (see ``estimate_memory``).
        cache_bytes_largest: Bytes that it may take on the way there, in whatever steps; this is what must fit.
        constants_bytes: Bytes of what all caches of the model share.
        activation_bytes: Estimate of what a forward pass needs beside.
        total_bytes: Weights, largest cache, constants and activations.
        fits: Whether that is within the memory.
        max_context: Longest context that fits; None where the cache does not grow.
        usable: Whether there is a cache that stores it packed, here.
        obstacle: Why not.
        meets: Whether its expected fidelity meets the constraint.
        quality: Its expected fidelity.
    """

    format: str
    bits_per_element: float
    cache_bytes: int
    cache_bytes_largest: int
    constants_bytes: int
    activation_bytes: int
    total_bytes: int
    fits: bool
    max_context: int | None
    usable: bool
    obstacle: str | None
    meets: bool
    quality: Quality


@dataclass(frozen=True)
class Recommendation:
    """What to take.

    Attributes:
        model: The model, as it was named.
        demand: What was asked for.
        weights_bytes: Bytes of the weights in the demand's format.
        geometry: Where heads and dimensions are from: ``traced`` or ``declared``.
        position_limit: Positions that the model was made for; None if it declares none.
        best: The format with the least expected KL of those that fit, can be used and meet the constraint; None if
            there is none.
        reason: Why, or why none, in a sentence.
        commands: Shell commands that use it.
        python: Lines of Python that use it.
        notes: What else to know.
        candidates: All formats.
        qualities: What the words for a rate mean for the model's calibration; empty without one.
    """

    model: str
    demand: Demand
    weights_bytes: int
    geometry: str
    position_limit: int | None
    best: str | None
    reason: str
    commands: list[str]
    python: str
    notes: list[str]
    candidates: list[Candidate]
    qualities: list[QualityRate] = field(default_factory=list)

    def candidate(self, name: str) -> Candidate:
        """The entry of a format.

        Args:
            name: Its name.

        Returns:
            The entry.
        """
        return next(each for each in self.candidates if each.format == name)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)
