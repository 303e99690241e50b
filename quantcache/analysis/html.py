"""A report as one page: style, script and figures inside it, no request to anywhere."""

from __future__ import annotations

from html import escape

from quantcache.analysis.charts import Chart, charts
from quantcache.analysis.drawing import draw_svg
from quantcache.analysis.heat import render_heat
from quantcache.analysis.page import SCRIPT, STYLE, css_class
from quantcache.analysis.report import Report
from quantcache.analysis.tables import Card, Cell, Table, cards, provenance, tables, title

FOLDED = ("layers", "heads", "depth")
"""Long tables that are folded away at first."""


def render(report: Report) -> str:
    """Render a report.

    Args:
        report: The report.

    Returns:
        A complete HTML document.
    """
    heading = escape(title(report))
    drawn = "".join(
        f'<figure><figcaption>{escape(chart.title)} <span class="unit">{escape(chart.y_label)}</span></figcaption>'
        f"{draw_svg(chart)}{_legend(chart)}</figure>"
        for chart in charts(report)
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    body = [
        f"<header><h1>{heading}</h1><p>{escape(provenance(report))}</p></header>",
        f'<ul class="notes" aria-label="Notes">{notes}</ul>' if notes else "",
        f'<section class="cards" aria-label="Summary">{"".join(map(_card, cards(report)))}</section>',
        f'<section class="charts" aria-label="Charts">{drawn}</section>' if drawn else "",
        render_heat(report),
        *map(_table, tables(report)),
        _footer(report),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{heading}: quantcache report</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + f"\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _legend(chart: Chart) -> str:
    items = (
        f'<li><span class="swatch {css_class(series.name)}" aria-hidden="true"></span>{escape(series.label)}</li>'
        for series in chart.series
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _card(card: Card) -> str:
    return (
        f'<div class="card"><h2>{escape(card.label)}</h2><p class="value">{escape(card.value)}</p>'
        f"<p>{escape(card.detail)}</p></div>"
    )


def _table(table: Table) -> str:
    head = "".join(
        f'<th scope="col" aria-sort="none" title="{escape(meaning)}"><button type="button">{escape(name)}</button></th>'
        for name, meaning in table.columns
    )
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    content = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.title)}">'
        f'<table id="{table.name}"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )
    caption = f"<p>{escape(table.caption)}</p>"
    if table.name in FOLDED:
        size = f"{len(table.rows)} rows"
        summary = f'<summary><h2>{escape(table.title)}</h2> <span class="unit">{size}</span></summary>'
        return f"<details>{summary}{caption}{content}</details>"
    return f"<section><h2>{escape(table.title)}</h2>{caption}{content}</section>"


def _cell(cell: Cell) -> str:
    text = escape(cell.text)
    if cell.key is None:
        return f'<td class="n">{text}</td>'
    if isinstance(cell.key, str):
        return f'<td data-key="{escape(cell.key)}">{text}</td>'
    return f'<td class="n" data-key="{cell.key!r}">{text}</td>'


def _footer(report: Report) -> str:
    versions = ", ".join(f"{escape(name)} {escape(version)}" for name, version in report.versions.items())
    calibration = f" Calibration: {escape(report.calibration)}." if report.calibration else ""
    return (
        f"<footer><p>Made {escape(report.created)} with {versions}.{calibration} "
        f"SHA-256 of the text: <code>{escape(report.text_sha256)}</code>.</p>"
        "<p>Point at a column's head for what it means; click it to sort. Rates are bits per dimension, "
        "divergences nats per token.</p></footer>"
    )
