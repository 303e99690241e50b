"""What a report shows, as text: every output takes its figures from here, so that they agree to the printed digit."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quantcache.analysis.report import Report, Target

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
"""Columns of a terminal that tables in plain text keep to, if their figures allow it."""

GAP = 2
"""Spaces between two of their columns."""


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


def _divergences(report: Report) -> Table:
    columns = (
        ("bits", "Mean code width"),
        ("bits per element", "With the gains"),
        ("predicted KL", "Nats per token, by the Fisher rate-distortion model and two short runs"),
        ("measured KL", "Nats per token, through the real cache on held-out text"),
        ("± error", "Standard error of the measured one, over stretches of 64 tokens"),
        ("predicted / measured", "1 is right"),
    )
    rows = []
    for each in report.divergences:
        ratio = each.predicted / each.measured if each.predicted is not None and each.measured else None
        rows.append(
            (
                Cell(number(each.bits, 0), each.bits),
                Cell(number(each.bits_per_element, 3), each.bits_per_element),
                Cell(nats(each.predicted), each.predicted),
                Cell(nats(each.measured), each.measured),
                Cell(nats(each.stderr), each.stderr),
                Cell(number(ratio), ratio),
            )
        )
    caption = "How far the compressed cache moves the model's predictions from those with the dense one."
    return Table("divergence", "Divergence", caption, columns, tuple(rows))


def _qualities(report: Report) -> Table:
    columns = (
        ("quality", "Word that stands for a rate"),
        ("KL allowed", "Largest mean divergence, nats per token"),
        ("bits", "Fewest bits at which no more is predicted, in quarters"),
        ("bits per element", "With the gains"),
        ("predicted KL", "At these bits, nats per token"),
    )
    rows = [
        (
            Cell(each.quality, each.quality),
            Cell(nats(each.max_kl), each.max_kl),
            Cell(number(each.bits), each.bits),
            Cell(number(each.bits_per_element, 3), each.bits_per_element),
            Cell(nats(each.predicted_kl), each.predicted_kl),
        )
        for each in report.qualities
    ]
    caption = "What quality= of a cache and --quality mean for this calibration."
    return Table("quality", "Quality", caption, columns, tuple(rows))


def _grades(report: Report) -> Table:
    columns = (
        ("side", "Keys, values, or both under their common budget"),
        ("bits", "Mean code width"),
        ("possible gain", "Bits by which the Shannon bound is below codebooks of one width"),
        ("realised gain", "Bits by which quantcache's codes are"),
        ("grade", "Realised over possible"),
    )
    names = {"all": "both", "key": "keys", "value": "values"}
    rows = [
        (
            Cell(names.get(g.side, g.side), g.side),
            Cell(number(g.bits, 0), g.bits),
            Cell(number(g.possible), g.possible),
            Cell(number(g.realised), g.realised),
            Cell(percent(g.share), g.share),
        )
        for g in report.grades
    ]
    caption = (
        "What the transforms, widths and codebooks make of the theoretical gain, measured by encoding held-out keys "
        "and values. On any source trellis codes lose about a third of a bit, scalar codes half a bit."
    )
    return Table("grade", "Grade", caption, columns, tuple(rows))


_FIGURES: tuple[tuple[str, str, Callable[[Target], float | None], Callable[[float | None], str]], ...] = (
    ("γ", "Decay of the spectrum, λ ≈ exp(c − β i^γ); smaller is a heavier tail", lambda t: t.gamma, number),
    ("β", "Rate of that decay", lambda t: t.beta, number),
    ("fit error", "Root mean square error of the fit in log λ", lambda t: t.fit_error, number),
    ("knee", "Component at which log λ is farthest below its chord", lambda t: t.knee, count),
    ("k95", "Components that hold 95 % of the variance", lambda t: t.k95, count),
    ("effective rank", "Participation ratio (Σλ)²/Σλ²", lambda t: t.participation, lambda v: number(v, 1)),
    ("coding gain", "½ log2 of arithmetic over geometric mean of λ, in bits", lambda t: t.coding_gain, number),
    *(
        (f"floor {bits} b", f"Shannon floor at {bits} bits over the variance", lambda t, i=i: _at(t.floors, i), nats)
        for i, bits in enumerate((2, 3, 4))
    ),
    *(
        (
            f"bits {share} %",
            f"Bits for a Shannon floor of {share} % of the variance",
            lambda t, i=i: _at(t.budgets, i),
            number,
        )
        for i, share in enumerate((10, 3, 1))
    ),
    ("mean's share", "Share of the energy that is the mean's", lambda t: t.mean_share, percent),
    ("outliers", "Channels of more than 36 times the median channel's energy", lambda t: len(t.outliers), count),
)


def _at(values: tuple[float, ...], place: int) -> float | None:
    return values[place] if place < len(values) else None


_FIGURE_COLUMNS = tuple((name, meaning) for name, meaning, _, _ in _FIGURES)


_FINE = ("fit error", "floor 2 b", "floor 3 b", "floor 4 b")
"""Figures that the overview leaves out."""


def _figures(targets: Sequence[Target], leave: Sequence[str] = ()) -> tuple[Cell, ...]:
    """Cells of one target, or of the mean of several."""
    values = [(mean([get(t) for t in targets]), show) for name, _, get, show in _FIGURES if name not in leave]
    return tuple(Cell(show(value), value) for value, show in values)


def _name(targets: Sequence[Target]) -> Cell:
    label = LABELS.get(targets[0].name, targets[0].name)
    return Cell(label if all(t.reliable or t.gamma is None for t in targets) else f"{label} ~", label)


def _overview(report: Report) -> Table:
    columns = (
        ("target", "What was looked at"),
        ("rows", "Heads or inputs averaged"),
        ("size", "Dimensions"),
        *(column for column in _FIGURE_COLUMNS if column[0] not in _FINE),
    )
    rows = []
    for name in dict.fromkeys(target.name for target in report.targets):
        own = [target for target in report.targets if target.name == name]
        dim = mean([target.dim for target in own])
        rows.append((_name(own), Cell(count(len(own)), len(own)), Cell(count(dim), dim), *_figures(own, _FINE)))
    caption = "Means over layers and heads. Keys are before rotation; keys as cached carry it."
    return Table("overview", "Targets", caption, columns, tuple(rows))


def _by_layer(report: Report) -> Table:
    columns = (("layer", "Layer index"), ("target", "What was looked at"), *_FIGURE_COLUMNS)
    groups: dict[tuple[int, str], list[Target]] = {}
    for target in sorted(report.targets, key=lambda t: t.layer):
        groups.setdefault((target.layer, target.name), []).append(target)
    rows = tuple((Cell(str(layer), layer), _name(own), *_figures(own)) for (layer, _), own in groups.items())
    return Table("layers", "By layer", "Means over heads.", columns, rows)


def _every_head(report: Report) -> Table:
    columns = (
        ("layer", "Layer index"),
        ("target", "What was looked at"),
        ("head", "Key/value head"),
        ("size", "Dimensions"),
        ("samples", "Vectors seen"),
        *_FIGURE_COLUMNS,
        ("read by", "Weights that read this input"),
    )
    rows = tuple(
        (
            Cell(str(t.layer), t.layer),
            _name([t]),
            Cell(MISSING if t.head is None else str(t.head), t.head),
            Cell(count(t.dim), t.dim),
            Cell(count(t.samples), t.samples),
            *_figures([t]),
            Cell(", ".join(t.projections) or "cache", ", ".join(t.projections)),
        )
        for t in report.targets
    )
    return Table("heads", "Every head and input", "All figures, nothing averaged.", columns, rows)


def _depth(report: Report) -> Table:
    columns = (
        ("target", "What was looked at"),
        ("layers", "Layers fitted"),
        ("γ at layer 0", "Of the fitted line"),
        ("slope", "Change of γ per layer"),
        ("R²", "Share of γ's variance that the line explains"),
    )
    rows = tuple(
        (
            Cell(LABELS.get(law.name, law.name), LABELS.get(law.name, law.name)),
            Cell(count(law.layers), law.layers),
            Cell(number(law.intercept), law.intercept),
            Cell(f"{law.slope:+.3f}", law.slope),
            Cell(number(law.r_squared), law.r_squared),
        )
        for law in report.depth
    )
    return Table("depth", "Depth law", "A line through γ, averaged over heads, by layer.", columns, rows)


def _sinks(report: Report) -> Table:
    columns = (
        ("position", "Place in the sequence"),
        ("token", "Its text"),
        ("attention", "Largest share of a layer's attention"),
        ("layers", "Layers in which it is a sink"),
        ("sequences", "Sequences in which it is one"),
    )
    rows = tuple(
        (
            Cell(count(sink.position), sink.position),
            Cell(repr(sink.token), sink.token),
            Cell(percent(sink.share), sink.share),
            Cell(count(sink.layers), sink.layers),
            Cell(count(sink.sequences), sink.sequences),
        )
        for sink in report.sinks or ()
    )
    caption = (
        "Tokens that draw at least a tenth of a layer's attention, from far behind. The cache keeps the first 4 exact."
    )
    return Table("sinks", "Sink tokens", caption, columns, rows)


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
        lines += ["", table.title, *_aligned(table, places)]
    if report.notes:
        lines += ["", *(f"Note: {note}" for note in report.notes)]
    return "\n".join(lines)


def _aligned(table: Table, places: list[int]) -> list[str]:
    """A table's columns, the first one flush left; where they are wider than a terminal, heads fold at spaces."""
    rows = [[row[place].text for place in places] for row in table.rows]
    names = [table.columns[place][0] for place in places]
    cells = [max((len(row[column]) for row in rows), default=0) for column in range(len(places))]
    for lines in (1, 2, 3):
        widths = [max(wide, _head_width(name, lines)) for name, wide in zip(names, cells, strict=True)]
        if sum(widths) + GAP * (len(widths) - 1) <= WIDTH:
            break
    heads = [textwrap.wrap(name, width, break_on_hyphens=False) for name, width in zip(names, widths, strict=True)]
    tall = max(map(len, heads))
    above = [[""] * (tall - len(head)) + head for head in heads]
    rows = [*map(list, zip(*above, strict=True)), *rows]
    return [
        (" " * GAP)
        .join(
            f"{text:<{width}}" if not column else f"{text:>{width}}"
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        .rstrip()
        for row in rows
    ]


def _head_width(name: str, lines: int) -> int:
    """What a head takes in so many lines."""
    least = max(map(len, name.split()))
    fitting = (w for w in range(least, len(name)) if len(textwrap.wrap(name, w, break_on_hyphens=False)) <= lines)
    return next(fitting, len(name))
