"""Where the bits go, as a picture: layers by heads, keys beside values, one square for each."""

from __future__ import annotations

from html import escape

from quantcache.analysis.report import HeadBits, Report
from quantcache.analysis.tables import LABELS, number

SQUARE = 18
"""Side of a square, in the picture's units."""

MARGIN = 34
"""Room for the names of layers on the left, and for those of sides and heads above."""


def render_heat(report: Report) -> str:
    """The section of a page.

    Args:
        report: The report.

    Returns:
        HTML; empty where nothing is compressed.
    """
    if not report.widths:
        return ""
    layers = list(dict.fromkeys(each.layer for each in report.widths))
    heads = {head: place for place, head in enumerate(sorted({each.head for each in report.widths}))}
    most = max(each.bits for each in report.widths) or 1.0
    rows = {layer: MARGIN + SQUARE * row for row, layer in enumerate(layers)}
    columns = {side: MARGIN + (SQUARE * len(heads) + MARGIN) * column for column, side in enumerate(("key", "value"))}
    width, height = columns["value"] + SQUARE * len(heads) + 2, MARGIN + SQUARE * len(layers) + 2
    names = [f'<text class="tick" x="{x}" y="{MARGIN - 20}">{LABELS[side]}</text>' for side, x in columns.items()]
    names += [
        f'<text class="tick" x="{x + SQUARE * (place + 0.5)}" y="{MARGIN - 5}" text-anchor="middle">{head}</text>'
        for x in columns.values()
        for head, place in heads.items()
    ]
    names += [
        f'<text class="tick" x="{MARGIN - 6}" y="{y + 0.7 * SQUARE}" text-anchor="end">{layer}</text>'
        for layer, y in rows.items()
    ]
    squares = [
        _square(each, columns[each.side] + SQUARE * heads[each.head], rows[each.layer], most) for each in report.widths
    ]
    return (
        "<section><h2>Where the bits go</h2>"
        "<p>Mean width of every head's coefficients at 3 bits, layers by heads: the darker, the more bits. Point at a "
        "square for its figure.</p>"
        f'<div class="scroll"><svg class="heat" viewBox="0 0 {width} {height}" style="max-width: {2 * width}px" '
        f'role="img" aria-label="Mean bits of every head, at most {number(most)}">{"".join(names)}{"".join(squares)}'
        "</svg></div></section>"
    )


def _square(each: HeadBits, x: int, y: int, most: float) -> str:
    told = f"layer {each.layer}, {LABELS[each.side]}, head {each.head}: {number(each.bits)} bits"
    return (
        f'<rect x="{x}" y="{y}" width="{SQUARE - 1}" height="{SQUARE - 1}" fill-opacity="{each.bits / most:.2f}">'
        f"<title>{escape(told)}</title></rect>"
    )
