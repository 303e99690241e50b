"""Charts as SVG: drawn with the page's own colours and letters, so that they follow its light and dark."""

from __future__ import annotations

import math
import re
from html import escape

from quantcache.analysis.charts import Chart, Series

WIDTH, HEIGHT = 460, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 12, 10, 44


def draw(chart: Chart) -> str:
    """Draw a chart.

    Args:
        chart: The chart.

    Returns:
        An ``<svg>`` element; lines have the classes ``line`` and ``c-NAME``.
    """
    xs = [x for series in chart.series for x in series.x]
    ys = [y for series in chart.series for y in series.y]
    y_ticks, (y_low, y_high) = _ticks(min(ys), max(ys), chart.log_y)
    x_low, x_high = 0.0, 1.0
    x_ticks = [0.0, 0.25, 0.5, 0.75, 1.0]
    if not chart.percent_x:
        x_low, x_high = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
        x_ticks = [tick for tick in _ticks(x_low, x_high, False)[0] if x_low <= tick <= x_high and tick == int(tick)]

    def place(value: float, low: float, high: float, log: bool) -> float:
        return math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)

    def x_of(value: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * place(value, x_low, x_high, False)

    def y_of(value: float) -> float:
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * place(value, y_low, y_high, chart.log_y)

    def line(x: tuple[float, ...], y: tuple[float, ...]) -> str:
        return " ".join(f"{x_of(a):.1f},{y_of(b):.1f}" for a, b in zip(x, y, strict=True))

    def lines(series: Series) -> list[str]:
        own = [f'<polyline class="line c-{_class(series)}" points="{line(series.x, series.y)}"/>']
        if chart.dots:
            own += [
                f'<circle class="dot c-{_class(series)}" cx="{x_of(a):.1f}" cy="{y_of(b):.1f}" r="3">'
                f"<title>{escape(series.label)}, {chart.x_label} {a:g}: {b:.3g}</title></circle>"
                for a, b in zip(series.x, series.y, strict=True)
            ]
        return own

    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    name = escape(f"{chart.title}: {chart.y_label} over {chart.x_label}")
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">']
    for tick in y_ticks:
        y = y_of(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        text = label(tick, chart.log_y, chart.percent)
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for tick in x_ticks:
        text = label(tick, False, chart.percent_x)
        anchor = "end" if x_of(tick) > right - 8 else "middle"
        parts.append(f'<text class="tick" x="{x_of(tick):.1f}" y="{bottom + 18}" text-anchor="{anchor}">{text}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text class="label" x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{chart.x_label}</text>')
    for series in chart.series:
        parts += lines(series)
    return "".join([*parts, "</svg>"])


def _class(series: Series) -> str:
    return re.sub("[^a-z0-9]", "-", series.name)  # names come from a file


def legend(chart: Chart) -> str:
    """The chart's lines and their labels, as a list."""
    items = (
        f'<li><span class="swatch c-{_class(series)}" aria-hidden="true"></span>{escape(series.label)}</li>'
        for series in chart.series
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def label(tick: float, log: bool, percent: bool) -> str:
    """How an axis names a value."""
    if percent:
        return f"{100 * tick:g} %"
    if log and not 0.01 <= tick <= 100:
        power = round(math.log10(tick))
        return "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{tick:g}"


def _ticks(low: float, high: float, log: bool) -> tuple[list[float], tuple[float, float]]:
    """Round values that span a range, at most seven, and the ends of the axis."""
    if log:
        first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
        last = max(last, first + 1)
        powers = range(first, last + 1, -(-(last - first) // 6))
        return [10.0**power for power in powers], (10.0**first, 10.0**last)
    spread = high - low or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(spread / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if spread / (factor * step) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    return [round(number * step, 10) for number in range(first, last + 1)], (first * step, last * step)
