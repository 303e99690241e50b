"""Expected fidelity of a format, and how reliable that figure is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from quantcache.artifact.calibration import Calibration
from quantcache.artifact.prediction import predict_kl_at
from quantcache.artifact.quality import quality_of
from quantcache.common.defaults import RESIDUAL_LENGTH
from quantcache.planning.formats import Format
from quantcache.planning.records import Fidelity, Measurements

Basis = Literal[
    "reference", "measured on this model", "predicted from its calibration", "measured on other models", "nothing known"
]
Risk = Literal["none", "low", "medium", "high", "unknown"]


@dataclass(frozen=True)
class Quality:
    """Expected fidelity of one format on one model.

    Attributes:
        kl: Mean KL divergence from the dense cache's predictions, nats per token; None if nothing is known.
        agreement: Share of positions with the same most likely token; None where nothing was measured.
        basis: What that rests on.
        risk: ``none``: nothing is compressed. ``low``: measured on this model at such a context or a longer one.
            ``medium``: measured on this model at a shorter context, or predicted from its calibration. ``high``: the
            worst of what was measured on other models. ``unknown``: nothing is known.
        source: What was measured where, in a line.
        predicted_kl: What the model's calibration predicts, whatever the basis; None where it predicts nothing.
        models: How many other models the worst is of; None where it rests on something else.
        word: ``near-lossless``, ``balanced`` or ``small``, the best whose limit ``kl`` keeps; None if it keeps none.
    """

    kl: float | None
    agreement: float | None
    basis: Basis
    risk: Risk
    source: str
    predicted_kl: float | None = None
    models: int | None = None
    word: str | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "word", quality_of(self.kl))


def expected_quality(
    form: Format,
    names: Iterable[str],
    context: int,
    measurements: Measurements,
    calibration: Calibration | None = None,
) -> Quality:
    """What is known of a format on a model: measured on it, else predicted, else measured on others.

    Only figures of a cache that keeps as many recent tokens as caches do by default count, and of ours none where the
    calibration gives a side bits of its own, or every coefficient some.

    Args:
        form: How the cache is stored.
        names: What the model is called; records of any of these names are of this model.
        context: Tokens that will be cached.
        measurements: Figures of records.
        calibration: The model's calibration, for predictions of ours.

    Returns:
        The expectation.
    """
    if form.layout == "dense":
        return Quality(0.0, 1.0, "reference", "none", "what the others are compared with")
    names = list(names)
    rate = None if form.layout != "spectral" or calibration is None else calibration.metadata.rate
    if rate is not None and (rate.min_bits or not rate.joint_sides):
        measurements = Measurements()  # which are of coefficients that all share their bits
    predicted = predict_kl_at(calibration, form.bits) if form.layout == "spectral" and calibration is not None else None
    own = [figure for name in names if (figure := measurements.fidelity_of(form.name, name, RESIDUAL_LENGTH))]
    if own:
        figure = max(own, key=lambda found: (found.context, found.origin.created))
        risk: Risk = "low" if figure.context >= context else "medium"
        return Quality(
            figure.kl_mean, figure.top1_agreement, "measured on this model", risk, describe(figure), predicted
        )
    others = [
        figure
        for name in measurements.models()
        if (figure := measurements.fidelity_of(form.name, name, RESIDUAL_LENGTH)) is not None
    ]
    agreement = min((figure.top1_agreement for figure in others), default=None)
    residuals = sorted({each for name in names for each in measurements.residuals_of(form.name, name)})
    # Figures at another residual are of another cache.
    note = f"; measured on this model only at residual {', '.join(map(str, residuals))}" if residuals else ""
    if predicted is not None:
        source = f"Fisher cost of its widths, tied to short runs made while calibrating{note}"
        return Quality(predicted, agreement, "predicted from its calibration", "medium", source, predicted)
    if others:
        worst = max(others, key=lambda found: found.kl_mean)
        source = f"worst of {len(others)}: {describe(worst)}{note}"
        return Quality(worst.kl_mean, agreement, "measured on other models", "high", source, models=len(others))
    return Quality(None, None, "nothing known", "unknown", note.removeprefix("; ") or "not measured")


def describe(figure: Fidelity) -> str:
    """Where a figure was measured, in a line.

    Args:
        figure: A measured figure.

    Returns:
        Model, dtype, context, residual, positions, hardware, commit and file.
    """
    residual = "its own residual" if figure.residual is None else f"residual {figure.residual}"
    return (
        f"{figure.model} in {figure.dtype}, windows of {figure.context:,}, {residual}, {figure.tokens:,} positions; "
        f"{figure.origin}"
    )
