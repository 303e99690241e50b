"""Words for a rate: the fewest bits at which a calibration predicts no more divergence than the word allows.

Predictions are tied to divergences measured while calibrating, at 1, 2 and 4 bits (calibrations made before 30 November
2026: at 2 and 4). Below the lowest of these rates they promise too much, so no word goes there: it then stands for more
fidelity than it asks for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from quantcache.artifact.calibration import Calibration
from quantcache.artifact.prediction import largest_measured, predict_kl
from quantcache.coding.packing import MAX_WIDTH
from quantcache.coding.schema import Rate, SideBits
from quantcache.common.defaults import QUALITIES
from quantcache.common.errors import QuantCacheError

STEPS = 4
"""Rates are multiples of 1/STEPS bit."""


ROUNDING = 1e-6
"""Relative difference by which a prediction may miss the measured divergence that it goes through."""


@dataclass(frozen=True)
class QualityRate:
    """What a word means for one calibration.

    Attributes:
        quality: The word.
        max_kl: Largest mean KL divergence that it allows, nats per token.
        bits: Fewest bits at which the calibration predicts no more, nor more than was measured while calibrating; a
            multiple of 1/4. None where no rate does, the calibration predicts nothing, or both sides have bits of
            their own.
        bits_per_element: The same, gains included.
        predicted_kl: What it predicts there.
    """

    quality: str
    max_kl: float
    bits: float | None = None
    bits_per_element: float | None = None
    predicted_kl: float | None = None


def check_quality(quality: str | None, bits: float | None = None) -> None:
    """Refuse words that mean nothing, and a word beside a number of bits.

    Args:
        quality: The word; None where nobody gives one.
        bits: The number of bits; None where nobody gives one.

    Raises:
        ValueError: The word is unknown, or both are given.
    """
    if quality is not None and quality not in QUALITIES:
        *others, last = QUALITIES
        raise ValueError(f"quality must be {', '.join(others)} or {last}, got {quality!r}")
    if quality is not None and bits is not None:
        raise ValueError(f"give either quality or bits, got quality={quality!r} and bits={bits!r}")


def at_quality(
    calibration: Calibration,
    quality: str,
    *,
    bits: float | None = None,
    key_bits: SideBits | None = None,
    value_bits: SideBits | None = None,
    min_bits: int | None = None,
) -> Calibration:
    """A calibration at the fewest bits at which it predicts no more divergence than a word allows.

    Args:
        calibration: A calibration, at any rate.
        quality: ``"near-lossless"``, ``"balanced"`` or ``"small"``.
        bits: None; a number is refused.
        key_bits: As for :meth:`Calibration.with_bits`; beside a number the word decides the bits of the other side.
        value_bits: The same for the values.
        min_bits: Smallest width given to any dimension.

    Returns:
        A calibration that shares this one's transforms.

    Raises:
        ValueError: The word is unknown, bits are given beside it, or both sides have bits of their own.
        QuantCacheError: The calibration predicts nothing, or more than that at every rate.
    """
    check_quality(quality, bits)
    rate = calibration.metadata.rate.given(key_bits=key_bits, value_bits=value_bits, min_bits=min_bits)
    if not rate.shared:
        raise ValueError(
            f"quality={quality!r} leaves nothing to choose beside key_bits={rate.key_bits!r} and "
            f"value_bits={rate.value_bits!r}"
        )
    search = _Search(calibration, rate)
    if search.measured is None:
        raise QuantCacheError(
            f"quality={quality!r} needs a prediction, and this calibration was made without a sound yardstick: "
            "calibrate again, or give bits"
        )
    found = search.fewest(QUALITIES[quality])
    if found is None:
        raise QuantCacheError(
            f"quality={quality!r} allows a mean KL of {QUALITIES[quality]:g} nats per token, and this calibration "
            f"predicts {search.predicted(MAX_WIDTH * STEPS):.2g} at {MAX_WIDTH} bits: give bits"
        )
    return search.at(found)


def quality_rates(calibration: Calibration) -> list[QualityRate]:
    """What every word means for a calibration.

    Args:
        calibration: A calibration, at any rate; a side with bits of its own keeps them.

    Returns:
        One entry for each word, the best first.
    """
    search = _Search(calibration, calibration.metadata.rate)
    chooses = search.measured is not None and calibration.metadata.rate.shared
    rates = []
    for quality, limit in QUALITIES.items():
        found = search.fewest(limit) if chooses else None
        if found is None:
            rates.append(QualityRate(quality, limit))
            continue
        chosen = search.at(found)
        rates.append(QualityRate(quality, limit, found / STEPS, chosen.bits_per_element, search.predicted(found)))
    return rates


def quality_of(kl: float | None) -> str | None:
    """The best word whose limit a divergence keeps.

    Args:
        kl: Mean KL divergence in nats per token; None where it is not known.

    Returns:
        The word; None where it is above all limits or not known.
    """
    return None if kl is None else next((name for name, limit in QUALITIES.items() if kl <= limit), None)


class _Search:
    """Rates of one calibration with what it predicts at them, each worked out once.

    Args:
        calibration: The calibration.
        rate: All of the rate but its bits.
    """

    def __init__(self, calibration: Calibration, rate: Rate):
        self.measured = largest_measured(calibration)
        self._calibration, self._rate, self._lowest = calibration, rate, rate.min_bits * STEPS
        self._known: dict[int, tuple[Calibration, float]] = {}

    def at(self, step: int) -> Calibration:
        """The calibration at so many quarters of a bit."""
        if step not in self._known:
            found = self._calibration.with_rate(replace(self._rate, bits=step / STEPS))
            kl = predict_kl(found)
            self._known[step] = found, math.inf if kl is None else kl  # more than a number can hold
        return self._known[step][0]

    def predicted(self, step: int) -> float:
        """What it predicts there."""
        self.at(step)
        return self._known[step][1]

    def fewest(self, limit: float) -> int | None:
        """The least step within a limit and what was measured, by bisection: more bits never cost more."""
        assert self.measured is not None
        limit = min(limit, self.measured * (1 + ROUNDING))
        low, end = self._lowest, MAX_WIDTH * STEPS + 1
        for step, (_, kl) in self._known.items():
            low, end = (low, min(end, step)) if kl <= limit else (max(low, step + 1), end)
        while low < end:
            middle = (low + end) // 2
            low, end = (low, middle) if self.predicted(middle) <= limit else (middle + 1, end)
        return None if end > MAX_WIDTH * STEPS else end
