"""Charts drawn by matplotlib: as SVG in the page's own colours and letters, and as a picture of four panels."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterable, Iterator
from html import escape
from typing import Any
from xml.etree import ElementTree

from quantcache.analysis.charts import Chart, Series, charts
from quantcache.analysis.page import LIGHT, SERIES, css_class
from quantcache.analysis.report import Report
from quantcache.analysis.tables import cards, provenance, title

TEXT, SOFT, LINE = LIGHT["text"], LIGHT["soft"], LIGHT["line"]

PANELS = ("spectra", "gamma", "k95")
"""Charts beside the summary of the picture."""

WIDTH, HEIGHT = 460, 300
"""Units of a chart on the page, points to matplotlib."""

LEAST = 1e-100
"""The smallest value on a logarithmic axis, and one over the largest."""

_AXES = (54 / WIDTH, 44 / HEIGHT, 384 / WIDTH, 246 / HEIGHT)
"""Left, bottom, width and height of its axes."""


def draw_svg(chart: Chart) -> str:
    """Draw a chart for the page.

    Args:
        chart: The chart.

    Returns:
        An ``<svg>`` element without colours and letters of its own: what it consists of has the classes ``line``,
        ``dot``, ``grid``, ``axis`` and ``tick``, lines and dots that of their series too.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure  # a figure of its own: pyplot would keep it, and choose a backend

    figure, buffer = Figure(figsize=(WIDTH / 72, HEIGHT / 72)), io.StringIO()
    FigureCanvasSVG(figure)
    with rc_context({"svg.fonttype": "none", "path.simplify": False}):
        axis = figure.add_axes(_AXES)
        for number, line in enumerate(_chart(axis, chart)):
            line.set_gid(f"series {number}")
        axis.set_xlabel(chart.x_label, labelpad=9)
        axis.tick_params(which="both", pad=8, labelsize=12)
        figure.savefig(buffer, format="svg")
    drawn = "".join(_elements(ElementTree.fromstring(buffer.getvalue()), chart, None))
    name = escape(f"{chart.title}: {chart.y_label} over {chart.x_label}")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{drawn}</svg>'


def _elements(element: ElementTree.Element, chart: Chart, series: Series | None) -> Iterator[str]:
    """What matplotlib has drawn, with classes in place of its styles: the page says how they look."""
    kind, style = element.tag.rpartition("}")[2], element.get("style", "")
    if kind in ("defs", "metadata"):
        return
    if element.get("id", "").startswith("series "):
        series = chart.series[int(element.get("id", "").split()[1])]
    if kind == "text":
        anchor = re.search(r"text-anchor: (\w+)", style)
        place = f'x="{float(element.get("x", 0)):.1f}" y="{float(element.get("y", 0)):.1f}"'
        words = escape(element.text or "")
        yield f'<text class="tick" {place} text-anchor="{anchor[1] if anchor else "start"}">{words}</text>'
    elif kind == "path":
        stroke = re.search(r"stroke: (#\w+)", style)
        own = {LINE: "grid", SOFT: "axis"}.get(stroke[1] if stroke else "")
        shape = re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.1f}", " ".join(element.get("d", "").split()))
        if series is not None or own is not None:
            yield f'<path class="{own if series is None else f"line {css_class(series.name)}"}" d="{shape}"/>'
    uses = [each for each in element if each.tag.endswith("}use")]
    if series is not None and uses:
        for use, x, y in zip(uses, series.x, series.y, strict=False):
            place = f'cx="{float(use.get("x", 0)):.1f}" cy="{float(use.get("y", 0)):.1f}"'
            told = f"{escape(series.label)}, {chart.x_label} {x:g}: {y:.3g}"
            yield f'<circle class="dot {css_class(series.name)}" {place} r="3"><title>{told}</title></circle>'
    for child in element:
        yield from _elements(child, chart, series)


def tick(value: float, log: bool, percent: bool) -> str:
    """How an axis names a value."""
    if percent:
        return f"{100 * value:g} %"
    if log and not 0.01 <= value <= 100:
        power = round(math.log10(value))
        return "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{value:g}"


def draw_png(report: Report) -> bytes:
    """Draw a report: spectra, γ over depth, k95 per layer, summary.

    Args:
        report: The report.

    Returns:
        A PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # a figure of its own: pyplot would keep it, and choose a backend

    figure = Figure(figsize=(12, 8.4), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2).flatten()
    figure.subplots_adjust(left=0.065, right=0.98, top=0.815, bottom=0.075, hspace=0.32, wspace=0.17)
    figure.text(0.065, 0.945, title(report), fontsize=20, fontweight="bold", color=TEXT)
    figure.text(0.065, 0.912, provenance(report), fontsize=10, color=SOFT)
    by_name = {chart.name: chart for chart in charts(report)}
    handles: dict[str, Any] = {}
    for axis, name in zip(axes, PANELS, strict=False):
        if name in by_name:
            chart = by_name[name]
            handles.update(zip((series.label for series in chart.series), _chart(axis, chart), strict=True))
            axis.set_title(chart.title, loc="left", fontsize=12, fontweight="bold", color=TEXT, pad=8)
            axis.set_xlabel(chart.x_label)
            axis.set_ylabel(chart.y_label)
        else:
            axis.axis("off")
    _summary(axes[3], report)
    if handles:
        style: dict[str, Any] = {
            "frameon": False,
            "fontsize": 10,
            "labelcolor": SOFT,
            "handlelength": 1.2,
            "columnspacing": 1.6,
        }
        place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0.055, 0.902), "ncols": len(handles)}
        figure.legend(list(handles.values()), list(handles), **place, **style)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _chart(axis: Any, chart: Chart) -> list[Any]:
    """Draw one chart, without its title and the names of its axes; gives its lines."""
    from matplotlib import rc_context
    from matplotlib.ticker import LogLocator, MaxNLocator

    marker = {"marker": "o" if chart.dots else "", "markersize": 4}
    style: dict[str, Any] = {"linewidth": 1.8, "clip_on": False, **marker}
    colors = [LIGHT.get(SERIES.get(series.name, ""), TEXT) for series in chart.series]
    lines = [
        axis.plot(series.x, _drawable(series.y, chart.log_y), color=color, **style)[0]
        for series, color in zip(chart.series, colors, strict=True)
    ]
    low, high = _ends(x for series in chart.series for x in series.x)
    axis.set_xlim((0, 1) if chart.percent_x else (low, high))
    quarters = {"nbins": 4, "steps": [2.5, 10]}
    axis.xaxis.set_major_locator(MaxNLocator(**(quarters if chart.percent_x else {"nbins": 8, "integer": True})))
    if chart.log_y:
        axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(numticks=7) if chart.log_y else MaxNLocator(5, steps=[1, 2, 5, 10]))
    with rc_context({"axes.autolimit_mode": "round_numbers"}):
        ends = _ends(y for series in chart.series for y in _drawable(series.y, chart.log_y))
        axis.set_ylim(axis.yaxis.get_major_locator().view_limits(*ends))
    axis.minorticks_off()
    axis.xaxis.set_major_formatter(lambda value, place: tick(value, False, chart.percent_x))
    axis.yaxis.set_major_formatter(lambda value, place: tick(value, chart.log_y, chart.percent))
    axis.grid(axis="y", color=LINE, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.xaxis.label.set_color(SOFT)
    axis.yaxis.label.set_color(SOFT)
    axis.tick_params(which="both", colors=SOFT, length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(SOFT)
    return lines


def _drawable(values: Iterable[float], log: bool) -> list[float]:
    """Values with room for an axis around them: no analysis finds others, but files may hold them."""
    return [min(max(value, LEAST), 1 / LEAST) if log else value for value in values]


def _ends(values: Iterable[float]) -> tuple[float, float]:
    """The smallest and the largest of some values, never the same."""
    found = sorted(values)
    return found[0], found[-1] if found[-1] > found[0] else found[0] + (abs(found[0]) or 1.0)


def _summary(axis: Any, report: Report) -> None:
    """Write the headline figures."""
    axis.axis("off")
    axis.set_title("Summary", loc="left", fontsize=12, fontweight="bold", color=TEXT, pad=8)
    found = cards(report)[:6]
    for place, card in enumerate(found):
        x, y = (place % 2) * 0.52, 0.96 - (place // 2) * 0.34
        axis.text(x, y, card.label, fontsize=10, color=SOFT, va="top", transform=axis.transAxes)
        axis.text(
            x, y - 0.07, card.value, fontsize=21, fontweight="bold", color=TEXT, va="top", transform=axis.transAxes
        )
        detail = textwrap.fill(card.detail, 32)
        axis.text(x, y - 0.19, detail, fontsize=9.5, color=SOFT, va="top", transform=axis.transAxes)
