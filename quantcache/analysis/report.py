"""The report of an analysis: its data, and JSON that is checked when it is read. Rendering it never needs the model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from quantcache.artifact.quality import QualityRate
from quantcache.coding.packing import MAX_WIDTH
from quantcache.common.errors import QuantCacheError
from quantcache.common.jsonfile import MAX_RESULT_BYTES, as_type, finite, parse_json, read_json, to_json
from quantcache.common.writing import write_file

FORMAT = "quantcache-analysis"
SCHEMA_VERSION = 1

RATES = (2.0, 3.0, 4.0)
"""Bits at which floors, grades and divergences are given."""


class ReportError(QuantCacheError):
    """A file is not a report, or a report lacks something or contradicts itself."""


@dataclass(frozen=True)
class Target:
    """One input of weights, or the keys or values of one head.

    Attributes:
        layer: Layer index.
        name: ``key``, ``rotated key``, ``value``, ``qkv``, ``o``, ``gate_up`` or ``down``.
        head: Key/value head; None for inputs of weights.
        projections: Weights that read it; empty for the cache.
        dim: D.
        samples: Vectors seen.
        variance: Mean eigenvalue of the covariance, over all D dimensions.
        points: Numbers of the components in ``spectrum``, from 1.
        spectrum: Their eigenvalues over the mean eigenvalue, here and below that of the directions which can be known:
            of fewer samples than dimensions, one less than samples.
        gamma: γ of λ_i ≈ exp(c − β i^γ); None, like all that follow, where there is no spectrum.
        beta: β.
        fit_error: Root mean square error of the fit in log λ.
        knee: Component at which log λ is farthest below its chord.
        k95: Components that hold 95 % of the variance.
        participation: Participation ratio (Σλ)²/Σλ².
        coding_gain: ½ log2 of arithmetic over geometric mean, in bits.
        floors: Shannon floor at ``RATES`` bits, over the mean eigenvalue.
        budgets: Bits at which the floor is within 10 %, 3 % and 1 % of the mean eigenvalue.
        outliers: Channels whose energy is far above the median channel's.
        mean_share: Share of the energy that is the mean's.
        reliable: Whether the samples are at least four times the dimensions.
    """

    layer: int
    name: str
    head: int | None
    projections: tuple[str, ...]
    dim: int
    samples: int
    variance: float
    points: tuple[int, ...]
    spectrum: tuple[float, ...]
    gamma: float | None
    beta: float | None
    fit_error: float | None
    knee: int | None
    k95: int | None
    participation: float | None
    coding_gain: float | None
    floors: tuple[float, ...]
    budgets: tuple[float, ...]
    outliers: tuple[int, ...]
    mean_share: float
    reliable: bool


@dataclass(frozen=True)
class DepthLaw:
    """A line through γ, averaged over heads, by layer.

    Attributes:
        name: The targets' name.
        layers: How many layers.
        slope: Change of γ per layer.
        intercept: γ at layer 0.
        r_squared: Share of γ's variance that the line explains.
    """

    name: str
    layers: int
    slope: float
    intercept: float
    r_squared: float


@dataclass(frozen=True)
class Grade:
    """What quantcache's own codes realise of what coding theory allows, on samples that were really encoded.

    Attributes:
        side: ``all``, ``key`` or ``value``.
        bits: Mean code width.
        possible: Bits that the Shannon bound is below codebooks of equal width.
        realised: Bits that the codes are below them.
        share: Realised over possible.
    """

    side: str
    bits: float
    possible: float
    realised: float
    share: float


@dataclass(frozen=True)
class Divergence:
    """KL divergence of the compressed cache from the dense one, nats per token.

    Attributes:
        bits: Mean code width.
        bits_per_element: With gains.
        predicted: By the rate-distortion model; None where the calibration has no yardstick.
        measured: Through the real cache on held-out text; None if it was not.
        stderr: Standard error of ``measured``, over stretches of 64 tokens.
    """

    bits: float
    bits_per_element: float
    predicted: float | None
    measured: float | None
    stderr: float | None


Side = Literal["key", "value"]


@dataclass(frozen=True)
class HeadBits:
    """What one head is given at 3 bits.

    Attributes:
        layer: Layer index.
        side: ``key`` or ``value``.
        head: Key/value head.
        bits: Mean width of its coefficients.
    """

    layer: int
    side: Side
    head: int
    bits: float


@dataclass(frozen=True)
class SinkToken:
    """A token that draws a large share of the attention.

    Attributes:
        position: Its place in the sequence.
        token: Its text.
        share: Largest share of a layer's attention.
        layers: Layers in which it is a sink.
        sequences: Sequences in which it is one.
    """

    position: int
    token: str
    share: float
    layers: int
    sequences: int


@dataclass(frozen=True)
class Report:
    """A model's fingerprint.

    Attributes:
        model: Name or Hub id, None if it has none.
        model_type: transformers' name of the architecture.
        layers: Number of layers.
        parameters: Number of parameters.
        text: What the text is called.
        text_sha256: SHA-256 of the text.
        tokens: Tokens looked at.
        seq_len: Tokens of a sequence.
        held_out: Tokens of the end of the text that were graded and verified on, and not calibrated on.
        dtype: The model's dtype.
        created: When, ISO 8601 with time zone.
        calibration: Where the calibration came from; None for encoders.
        versions: Versions of what it was made with.
        notes: What a reader must know, one sentence each.
        targets: Inputs of weights and cached vectors.
        depth: Laws over depth.
        grades: Realised gains.
        divergences: Predicted and measured divergences.
        sinks: Sink tokens, the strongest first; None where attention cannot be seen.
        qualities: What the words for a rate mean here; empty for reports made before there were any.
        widths: What every head is given at 3 bits; empty for reports made before that was kept.
    """

    model: str | None
    model_type: str
    layers: int
    parameters: int
    text: str
    text_sha256: str
    tokens: int
    seq_len: int
    held_out: int
    dtype: str
    created: str
    calibration: str | None
    versions: dict[str, str]
    notes: tuple[str, ...]
    targets: tuple[Target, ...]
    depth: tuple[DepthLaw, ...]
    grades: tuple[Grade, ...]
    divergences: tuple[Divergence, ...]
    sinks: tuple[SinkToken, ...] | None
    qualities: tuple[QualityRate, ...] = ()
    widths: tuple[HeadBits, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON, format and schema version first."""
        data: dict[str, Any] = finite({"format": FORMAT, "schema_version": SCHEMA_VERSION, **asdict(self)})
        return data

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON.

        Args:
            path: Also write it here, complete or not at all.

        Returns:
            The JSON.
        """
        text = to_json(self.to_dict())
        if path is not None:
            write_file(Path(path), (text + "\n").encode())
        return text

    def to_html(self, path: str | Path | None = None) -> str:
        """The report as one page that needs nothing else.

        Args:
            path: Also write it here, complete or not at all.

        Returns:
            The HTML.
        """
        from quantcache.analysis.html import render

        text = render(self)
        if path is not None:
            write_file(Path(path), text.encode())
        return text

    def to_png(self, path: str | Path) -> None:
        """Draw the report as a picture of four panels.

        Args:
            path: The file, written complete or not at all.
        """
        from quantcache.analysis.drawing import draw_png

        write_file(Path(path), draw_png(self))

    def summary(self) -> str:
        """The report in some lines of plain text."""
        from quantcache.analysis.tables import summary

        return summary(self)

    @classmethod
    def from_json(cls, source: str | Path) -> Report:
        """Read a report.

        Args:
            source: JSON text (it starts with ``{``), or the file that holds it.

        Returns:
            The report; what a later version added is left out.

        Raises:
            ReportError: The file cannot be read, or is not a sound report.
        """
        where = "report"
        text = source if isinstance(source, str) and source.lstrip().startswith("{") else None
        try:
            if text is None:
                where = str(source)
                data = read_json(Path(source), MAX_RESULT_BYTES)
            else:
                data = parse_json(text, MAX_RESULT_BYTES)
        except (OSError, ValueError) as error:
            raise ReportError(f"{where} cannot be read as JSON: {' '.join(str(error).split())}") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise ReportError(f"{where} has format {found!r}, expected {FORMAT!r}")
        if data.get("schema_version") != SCHEMA_VERSION or isinstance(data["schema_version"], bool):
            found = data.get("schema_version")
            raise ReportError(f"{where} has schema version {found!r}, this quantcache reads {SCHEMA_VERSION}")
        try:
            report: Report = as_type(cls, data)
        except ValueError as error:
            raise ReportError(f"{where}: {error}") from error
        flaw = _contradiction(report)
        if flaw:
            raise ReportError(f"{where}: {flaw}")
        return report


def _contradiction(report: Report) -> str | None:
    """The first thing that no analysis can have found."""
    for number, target in enumerate(report.targets):
        here = f"targets[{number}]"
        if target.dim < 1 or target.layer < 0:
            return f"{here} has dim {target.dim} in layer {target.layer}"
        if len(target.points) != len(target.spectrum):
            return f"{here} has {len(target.points)} points for {len(target.spectrum)} eigenvalues"
        if target.gamma is not None and (len(target.floors), len(target.budgets)) != (len(RATES), 3):
            return f"{here} must have {len(RATES)} floors and 3 budgets"
    for number, head in enumerate(report.widths):
        if min(head.layer, head.head) < 0 or not 0 <= head.bits <= MAX_WIDTH:
            return f"widths[{number}] has {head.bits} bits for head {head.head} of layer {head.layer}"
    for number, each in enumerate(report.divergences):
        for name in ("predicted", "measured"):
            value = getattr(each, name)
            if value is not None and value < 0:
                return f"divergences[{number}].{name} must not be negative, got {value}"
    return None
