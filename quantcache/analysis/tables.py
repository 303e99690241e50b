"""What a report shows, as text: every output takes its figures from here, so that they agree to the printed digit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from quantcache.analysis.report import Divergence, Report, Target
from quantcache.common.grid import Grid

LABELS = {
    "key": "keys",
    "rotated key": "keys as cached",
    "value": "values",
    "qkv": "q, k, v input",
    "o": "o input",
    "gate_up": "gate, up input",
    "down": "down input",
}
"""How targets are called. ``key`` is before rotation."""

MISSING = "–"

WIDTH = 80
"""Columns of a terminal that tables in plain text keep to."""


def number(value: float | None, places: int = 2) -> str:
    """A figure with fixed decimal places."""
    return MISSING if value is None else f"{value:.{places}f}"


def count(value: float | None) -> str:
    """A whole number, thousands set off; averages are rounded."""
    return MISSING if value is None else f"{value:,.0f}"


def percent(value: float | None) -> str:
    """A share."""
    return MISSING if value is None else f"{100 * value:.0f} %"


def nats(value: float | None) -> str:
    """A divergence, two significant digits."""
    if value is None:
        return MISSING
    if not value > 0:
        return "0"
    return f"{value:.{max(0, 1 - math.floor(math.log10(value)))}f}"


@dataclass(frozen=True)
class Cell:
    """What a cell shows, and what its column is sorted by (None goes last)."""

    text: str
    key: float | str | None


@dataclass(frozen=True)
class Table:
    """A table: name, title, what it tells, columns with what they mean, rows."""

    name: str
    title: str
    caption: str
    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Card:
    """One headline figure."""

    label: str
    value: str
    detail: str


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of what is there."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def title(report: Report) -> str:
    """What a report is headed by."""
    return report.model or f"{report.model_type} model"


def provenance(report: Report) -> str:
    """One line about what was looked at."""
    held = f", the last {report.held_out:,} of them held out" if report.held_out else ""
    return (
        f"{report.model_type}, {report.layers} layers, {report.parameters / 1e6:,.1f} M parameters, {report.dtype}. "
        f"{report.tokens:,} tokens of {report.text} in sequences of {report.seq_len:,}{held}."
    )


def cards(report: Report) -> list[Card]:
    """The headline figures."""
    found = []
    at3 = next((d for d in report.divergences if d.bits == 3), None)
    if at3 is not None and at3.predicted is not None:
        measured = "" if at3.measured is None else f"; {nats(at3.measured)} measured"
        found.append(Card("Predicted KL", nats(at3.predicted), f"at 3 bits, nats per token{measured}"))
    grade = next((g for g in report.grades if g.bits == 3 and g.side == "all"), None)
    if grade is not None:
        detail = f"at 3 bits: {number(grade.realised)} of {number(grade.possible)} bits of gain"
        found.append(Card("Grade", percent(grade.share), detail))
    for name in ("key", "value"):
        own = [t for t in report.targets if t.name == name]
        if own:
            gain, tier = mean([t.coding_gain for t in own]), mean([t.budgets[1] for t in own if t.budgets])
            rank = mean([t.participation for t in own])
            detail = f"bits; effective rank {number(rank, 1)} of {own[0].dim}"
            found.append(Card(f"Coding gain, {LABELS[name]}", number(gain), detail))
            found.append(Card(f"Bits for {LABELS[name]}", number(tier), "for a Shannon floor of 3 % of the variance"))
    if not found:
        for name in ("qkv", "down"):
            own = [t for t in report.targets if t.name == name]
            if own:
                found.append(Card(f"Coding gain, {LABELS[name]}", number(mean([t.coding_gain for t in own])), "bits"))
    return found


def tables(report: Report) -> list[Table]:
    """Every table with rows, in order."""
    found = [
        _divergences(report),
        _qualities(report),
        _grades(report),
        _overview(report),
        _sinks(report),
        _depth(report),
        _by_layer(report),
        _every_head(report),
    ]
    return [table for table in found if table.rows]


Column = tuple[str, str, Callable[[Any], Cell]]
"""Head of a column, what it means, and its cell for what a row is about."""


def _table(name: str, title: str, caption: str, columns: Sequence[Column], items: Iterable[Any]) -> Table:
    rows = tuple(tuple(cell(item) for _, _, cell in columns) for item in items)
    return Table(name, title, caption, tuple((head, meaning) for head, meaning, _ in columns), rows)


def _cell(get: Callable[[Any], Any], show: Callable[[Any], str] = number) -> Callable[[Any], Cell]:
    """Cells of a figure, sorted by it."""

    def make(item: Any) -> Cell:
        value = get(item)
        return Cell(show(value), value)

    return make


_whole, _fine = partial(number, places=0), partial(number, places=3)


def _divergences(report: Report) -> Table:
    def ratio(each: Divergence) -> float | None:
        return each.predicted / each.measured if each.predicted is not None and each.measured else None

    predicted = "Nats per token, by the Fisher rate-distortion model and two short runs"
    stderr = "Standard error of the measured one, over stretches of 64 tokens"
    columns: list[Column] = [
        ("bits", "Mean code width", _cell(lambda d: d.bits, _whole)),
        ("bits per element", "With the gains", _cell(lambda d: d.bits_per_element, _fine)),
        ("predicted KL", predicted, _cell(lambda d: d.predicted, nats)),
        ("measured KL", "Nats per token, through the real cache on held-out text", _cell(lambda d: d.measured, nats)),
        ("± error", stderr, _cell(lambda d: d.stderr, nats)),
        ("predicted / measured", "1 is right", _cell(ratio)),
    ]
    caption = "How far the compressed cache moves the model's predictions from those with the dense one."
    return _table("divergence", "Divergence", caption, columns, report.divergences)


def _qualities(report: Report) -> Table:
    columns: list[Column] = [
        ("quality", "Word that stands for a rate", _cell(lambda q: q.quality, str)),
        ("KL allowed", "Largest mean divergence, nats per token", _cell(lambda q: q.max_kl, nats)),
        ("bits", "Fewest bits at which no more is predicted, in quarters", _cell(lambda q: q.bits)),
        ("bits per element", "With the gains", _cell(lambda q: q.bits_per_element, _fine)),
        ("predicted KL", "At these bits, nats per token", _cell(lambda q: q.predicted_kl, nats)),
    ]
    caption = "What quality= of a cache and --quality mean for this calibration."
    return _table("quality", "Quality", caption, columns, report.qualities)


def _grades(report: Report) -> Table:
    names = {"all": "both", "key": "keys", "value": "values"}
    possible = "Bits by which the Shannon bound is below codebooks of one width"
    columns: list[Column] = [
        (
            "side",
            "Keys, values, or both under their common budget",
            _cell(lambda g: g.side, lambda side: names.get(side, side)),
        ),
        ("bits", "Mean code width", _cell(lambda g: g.bits, _whole)),
        ("possible gain", possible, _cell(lambda g: g.possible)),
        ("realised gain", "Bits by which quantcache's codes are", _cell(lambda g: g.realised)),
        ("grade", "Realised over possible", _cell(lambda g: g.share, percent)),
    ]
    caption = (
        "What the transforms, widths and codebooks make of the theoretical gain, measured by encoding held-out keys "
        "and values. On any source trellis codes lose about a third of a bit, scalar codes half a bit."
    )
    return _table("grade", "Grade", caption, columns, report.grades)


def _mean(get: Callable[[Target], float | None], show: Callable[[float | None], str]) -> Callable[[Any], Cell]:
    """Cells of a figure's mean over some targets."""
    return _cell(lambda targets: mean([get(target) for target in targets]), show)


def _at(figure: str, place: int, target: Target) -> float | None:
    values: tuple[float, ...] = getattr(target, figure)
    return values[place] if place < len(values) else None


_FIGURES: tuple[Column, ...] = (
    ("γ", "Decay of the spectrum, λ ≈ exp(c − β i^γ); smaller is a heavier tail", _mean(lambda t: t.gamma, number)),
    ("β", "Rate of that decay", _mean(lambda t: t.beta, number)),
    ("fit error", "Root mean square error of the fit in log λ", _mean(lambda t: t.fit_error, number)),
    ("knee", "Component at which log λ is farthest below its chord", _mean(lambda t: t.knee, count)),
    ("k95", "Components that hold 95 % of the variance", _mean(lambda t: t.k95, count)),
    ("effective rank", "Participation ratio (Σλ)²/Σλ²", _mean(lambda t: t.participation, partial(number, places=1))),
    ("coding gain", "½ log2 of arithmetic over geometric mean of λ, in bits", _mean(lambda t: t.coding_gain, number)),
    *(
        (f"floor {bits} b", f"Shannon floor at {bits} bits over the variance", _mean(partial(_at, "floors", i), nats))
        for i, bits in enumerate((2, 3, 4))
    ),
    *(
        (f"bits {s} %", f"Bits for a Shannon floor of {s} % of the variance", _mean(partial(_at, "budgets", i), number))
        for i, s in enumerate((10, 3, 1))
    ),
    ("mean's share", "Share of the energy that is the mean's", _mean(lambda t: t.mean_share, percent)),
    ("outliers", "Channels of more than 36 times the median channel's energy", _mean(lambda t: len(t.outliers), count)),
)
"""Columns of rows that are about one target, or several of which the mean is shown."""

_FINE = ("fit error", "floor 2 b", "floor 3 b", "floor 4 b")
"""Figures that the overview leaves out."""


def _name(targets: Sequence[Target]) -> Cell:
    label = LABELS.get(targets[0].name, targets[0].name)
    return Cell(label if all(t.reliable or t.gamma is None for t in targets) else f"{label} ~", label)


_LAYER: Column = ("layer", "Layer index", _cell(lambda own: own[0].layer, str))
_TARGET: Column = ("target", "What was looked at", _name)


def _grouped(targets: Iterable[Target], key: Callable[[Target], object]) -> Iterable[list[Target]]:
    groups: dict[object, list[Target]] = {}
    for target in targets:
        groups.setdefault(key(target), []).append(target)
    return groups.values()


def _overview(report: Report) -> Table:
    columns: list[Column] = [
        _TARGET,
        ("rows", "Heads or inputs averaged", _cell(len, count)),
        ("size", "Dimensions", _mean(lambda t: t.dim, count)),
        *(column for column in _FIGURES if column[0] not in _FINE),
    ]
    caption = "Means over layers and heads. Keys are before rotation; keys as cached carry it."
    return _table("overview", "Targets", caption, columns, _grouped(report.targets, lambda t: t.name))


def _by_layer(report: Report) -> Table:
    groups = _grouped(sorted(report.targets, key=lambda t: t.layer), lambda t: (t.layer, t.name))
    return _table("layers", "By layer", "Means over heads.", (_LAYER, _TARGET, *_FIGURES), groups)


def _every_head(report: Report) -> Table:
    columns: list[Column] = [
        _LAYER,
        _TARGET,
        ("head", "Key/value head", _cell(lambda own: own[0].head, lambda head: MISSING if head is None else str(head))),
        ("size", "Dimensions", _cell(lambda own: own[0].dim, count)),
        ("samples", "Vectors seen", _cell(lambda own: own[0].samples, count)),
        *_FIGURES,
        (
            "read by",
            "Weights that read this input",
            _cell(lambda own: ", ".join(own[0].projections), lambda names: names or "cache"),
        ),
    ]
    each = [[target] for target in report.targets]
    return _table("heads", "Every head and input", "All figures, nothing averaged.", columns, each)


def _depth(report: Report) -> Table:
    columns: list[Column] = [
        ("target", "What was looked at", _cell(lambda law: LABELS.get(law.name, law.name), str)),
        ("layers", "Layers fitted", _cell(lambda law: law.layers, count)),
        ("γ at layer 0", "Of the fitted line", _cell(lambda law: law.intercept)),
        ("slope", "Change of γ per layer", _cell(lambda law: law.slope, "{:+.3f}".format)),
        ("R²", "Share of γ's variance that the line explains", _cell(lambda law: law.r_squared)),
    ]
    return _table("depth", "Depth law", "A line through γ, averaged over heads, by layer.", columns, report.depth)


def _sinks(report: Report) -> Table:
    columns: list[Column] = [
        ("position", "Place in the sequence", _cell(lambda sink: sink.position, count)),
        ("token", "Its text", _cell(lambda sink: sink.token, repr)),
        ("attention", "Largest share of a layer's attention", _cell(lambda sink: sink.share, percent)),
        ("layers", "Layers in which it is a sink", _cell(lambda sink: sink.layers, count)),
        ("sequences", "Sequences in which it is one", _cell(lambda sink: sink.sequences, count)),
    ]
    caption = (
        "Tokens that draw at least a tenth of a layer's attention, from far behind. The cache keeps the first 4 exact."
    )
    return _table("sinks", "Sink tokens", caption, columns, report.sinks or ())


SHORT = ("divergence", "quality", "grade", "sinks")
"""Tables that a terminal shows whole."""

_OVERVIEW = ("target", "γ", "k95", "effective rank", "coding gain", "bits 10 %", "bits 3 %", "bits 1 %", "mean's share")


def summary(report: Report) -> str:
    """A report in plain text.

    Args:
        report: The report.

    Returns:
        Some lines, tables at most 80 columns wide.
    """
    lines = [title(report), provenance(report), ""]
    found = cards(report)
    width = max((len(card.label) for card in found), default=0)
    value = max((len(card.value) for card in found), default=0)
    lines += [f"{card.label:<{width}}  {card.value:>{value}}  {card.detail}" for card in found]
    for table in tables(report):
        if table.name == "overview":
            places = [place for place, (name, _) in enumerate(table.columns) if name in _OVERVIEW]
        elif table.name in SHORT:
            places = list(range(len(table.columns)))
        else:
            continue
        grid = Grid(*(table.columns[place][0] for place in places), title=table.title)
        for row in table.rows:
            grid.add_row(*(row[place].text for place in places))
        lines += ["", *grid.lines(WIDTH)]
    if report.notes:
        lines += ["", *(f"Note: {note}" for note in report.notes)]
    return "\n".join(lines)
