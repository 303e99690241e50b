"""A report as a picture of four panels."""

from __future__ import annotations

import io
import textwrap
from typing import Any

from quantcache.analysis.charts import Chart, charts
from quantcache.analysis.report import Report
from quantcache.analysis.tables import cards, provenance, title

COLORS = {
    "key": "#2f5fd0",
    "rotated key": "#86a5ec",
    "value": "#d0672f",
    "qkv": "#26856a",
    "o": "#8a4fc0",
    "gate_up": "#b3861b",
    "down": "#6b7280",
}
TEXT, SOFT, LINE = "#1c1d20", "#62656d", "#e3e3df"
PANELS = ("spectra", "gamma", "k95")
"""Charts beside the summary."""


def draw(report: Report) -> bytes:
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
            handles.update(_chart(axis, by_name[name]))
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


def _chart(axis: Any, chart: Chart) -> dict[str, Any]:
    """Draw one chart; gives its lines by label."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    handles = {}
    for series in chart.series:
        color = COLORS.get(series.name, TEXT)
        style = {"color": color, "linewidth": 1.8, "marker": "o" if chart.dots else "", "markersize": 4}
        (handles[series.label],) = axis.plot(series.x, series.y, **style)
    if chart.percent_x:
        axis.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    else:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if chart.log_y:
        axis.set_yscale("log")
    if chart.percent:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    axis.set_title(chart.title, loc="left", fontsize=12, fontweight="bold", color=TEXT, pad=8)
    axis.set_xlabel(chart.x_label, color=SOFT)
    axis.set_ylabel(chart.y_label, color=SOFT)
    axis.grid(color=LINE, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(which="both", colors=SOFT, length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(SOFT)
    return handles


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
