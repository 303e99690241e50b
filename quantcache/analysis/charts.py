"""The charts of a report, as numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from quantcache.analysis.report import Report, Target
from quantcache.analysis.tables import LABELS, mean


@dataclass(frozen=True)
class Series:
    """One line: name of its target, label, points."""

    name: str
    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Chart:
    """One chart: name, title, axes and what kind they are, lines, and whether their points are marked."""

    name: str
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    percent_x: bool = False
    log_y: bool = False
    percent: bool = False
    dots: bool = True


def charts(report: Report) -> list[Chart]:
    """Every chart that has points.

    Args:
        report: The report.

    Returns:
        Spectra, γ over depth, k95 over depth, divergence.
    """
    found = [_spectra(report), _gamma(report), _k95(report), _divergence(report)]
    return [chart for chart in found if chart.series]


def _groups(report: Report) -> dict[str, list[Target]]:
    groups: dict[str, list[Target]] = {}
    for target in report.targets:
        if target.gamma is not None:
            groups.setdefault(target.name, []).append(target)
    return groups


def _spectra(report: Report) -> Chart:
    """Geometric mean of the spectra of every name, share by share of their components: layers may differ in size."""
    series = []
    for name, targets in _groups(report).items():
        curves = [curve for target in targets if len((curve := _curve(target))[0]) > 1]
        if not curves:
            continue
        first, last = max(shares[0] for shares, _ in curves), min(shares[-1] for shares, _ in curves)
        shares = [share for share in curves[0][0] if first <= share <= last]
        if len(shares) > 1:
            logs = np.mean([np.interp(shares, *curve) for curve in curves], axis=0)
            series.append(Series(name, LABELS.get(name, name), tuple(shares), tuple(np.exp(logs).tolist())))
    axes = ("component, share of all", "eigenvalue over mean")
    return Chart("spectra", "Spectra", *axes, tuple(series), percent_x=True, log_y=True, dots=False)


def _curve(target: Target) -> tuple[list[float], list[float]]:
    """Shares of a target's components, and the logarithms of their eigenvalues, as far as these are above zero."""
    known = [(point, value) for point, value in zip(target.points, target.spectrum, strict=True) if value > 0]
    return [point / target.dim for point, _ in known], [math.log(value) for _, value in known]


def _over_depth(report: Report, figure: str) -> tuple[Series, ...]:
    series = []
    for name, targets in _groups(report).items():
        layers = sorted({t.layer for t in targets})
        values = []
        for layer in layers:
            own = [t for t in targets if t.layer == layer]
            found = mean([t.gamma if figure == "gamma" else (t.k95 or 0) / t.dim for t in own])
            values.append(found if found is not None else 0.0)
        series.append(Series(name, LABELS.get(name, name), tuple(map(float, layers)), tuple(values)))
    return tuple(series)


def _gamma(report: Report) -> Chart:
    return Chart("gamma", "Decay over depth", "layer", "γ", _over_depth(report, "gamma"))


def _k95(report: Report) -> Chart:
    series = _over_depth(report, "k95")
    return Chart("k95", "Dimensions for 95 % of the variance", "layer", "k95, share of all", series, percent=True)


def _divergence(report: Report) -> Chart:
    series = []
    for name in ("predicted", "measured"):
        points = [(each.bits, getattr(each, name)) for each in report.divergences if getattr(each, name)]
        if points:
            series.append(Series(name, name, tuple(x for x, _ in points), tuple(y for _, y in points)))
    return Chart("divergence", "Divergence over rate", "bits", "KL, nats per token", tuple(series), log_y=True)
