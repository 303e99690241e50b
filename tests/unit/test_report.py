"""Reports: JSON that comes back as it was and refuses everything else, and outputs that agree."""

from __future__ import annotations

import html.parser
import json
import math
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from quantcache.analysis.charts import Chart, Series, charts
from quantcache.analysis.drawing import draw_svg
from quantcache.analysis.report import Report, ReportError, Target
from quantcache.analysis.tables import _OVERVIEW, cards, count, nats, number, percent, provenance, tables
from quantcache.common.errors import QuantCacheError
from tests.reports import make_report


@pytest.fixture(scope="module")
def report() -> Report:
    return make_report()


class Page(html.parser.HTMLParser):
    """The cells of a page's tables by id, and everything that could make a request."""

    def __init__(self, text: str):
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.addresses: list[str] = []
        self.values: list[str] = []
        self._table: list[list[str]] | None = None
        self._text: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.addresses += [str(given[name]) for name in ("src", "href", "srcset", "action") if name in given]
        if tag == "table":
            self._table = self.tables.setdefault(str(given["id"]), [])
        if tag == "tr" and self._table is not None:
            self._table.append([])
        if tag == "td" or given.get("class") == "value":
            self._text = []

    def handle_data(self, data: str) -> None:
        if self._text is not None:
            self._text.append(data)

    def handle_endtag(self, tag: str) -> None:
        if self._text is not None and tag in ("td", "p"):
            text, self._text = "".join(self._text), None
            if tag == "p":
                self.values.append(text)
            elif self._table is not None:
                self._table[-1].append(text)


def test_spectra_of_layers_of_several_sizes_are_meant_by_share(report: Report) -> None:
    """DeepSeek's first layers are wider than its experts: component 32 of 32 stood for component 32 of 128."""

    def falling(dim: int) -> Target:
        points = tuple(range(1, dim + 1))
        return replace(target, dim=dim, points=points, spectrum=tuple(math.exp(-8 * i / dim) for i in points))

    target = next(each for each in report.targets if each.name == "down")
    sizes = (128, 32, 64)
    mixed = replace(report, targets=tuple(falling(dim) for dim in sizes))
    (series,) = next(chart for chart in charts(mixed) if chart.name == "spectra").series
    assert (series.x[0], series.x[-1]) == (1 / 32, 1.0)
    assert series.y == pytest.approx([math.exp(-8 * share) for share in series.x])
    alike = replace(report, targets=(falling(64),) * 2)
    (series,) = next(chart for chart in charts(alike) if chart.name == "spectra").series
    assert series.x == tuple(point / 64 for point in range(1, 65))
    assert series.y == pytest.approx(falling(64).spectrum)


def test_json_comes_back(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    assert Report.from_json(report.to_json(path)) == report
    assert Report.from_json(path) == report
    assert Report.from_json(str(path)) == report
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_reports_of_earlier_versions_show_no_widths_and_words(report: Report) -> None:
    data = report.to_dict()
    del data["widths"], data["qualities"]
    older = Report.from_json(json.dumps(data))
    assert (older.widths, older.qualities) == ((), ())
    assert "Where the bits go" not in older.to_html()
    assert "quality" not in [table.name for table in tables(older)]


def test_every_head_has_a_square(report: Report) -> None:
    page = report.to_html()
    squares = re.findall(r"<rect [^>]*><title>(layer [^<]*)</title>", page)
    assert len(squares) == len(report.widths) > 0
    for each in report.widths:
        side = {"key": "keys", "value": "values"}[each.side]
        assert f"layer {each.layer}, {side}, head {each.head}: {number(each.bits)} bits" in squares


def test_later_fields_are_left_out(report: Report) -> None:
    data = report.to_dict() | {"later": 1}
    data["targets"][0]["later"] = [1]
    assert Report.from_json(json.dumps(data)) == report


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("format"), "format None, expected 'quantcache-analysis'"),
        (lambda d: d.update(schema_version=2), "schema version 2, this quantcache reads 1"),
        (lambda d: d.update(schema_version=True), "schema version True"),
        (lambda d: d.pop("targets"), "lacks targets"),
        (lambda d: d.update(targets={}), "targets must be a list"),
        (lambda d: d.update(tokens="8192"), "tokens must be a whole number, got '8192'"),
        (lambda d: d.update(tokens=True), "tokens must be a whole number"),
        (lambda d: d.update(notes=[3]), r"notes\[0\] must be a string"),
        (lambda d: d.update(versions=[]), "versions must be an object"),
        (lambda d: d["targets"].__setitem__(1, None), r"targets\[1\] must be an object"),
        (lambda d: d["targets"][0].update(gamma="x"), r"targets\[0\].gamma must be a number"),
        (lambda d: d["targets"][0].update(variance=10**400), r"targets\[0\].variance must be a number below 1e\+300"),
        (lambda d: d["targets"][0].update(points=[1]), r"targets\[0\] has 1 points for \d+ eigenvalues"),
        (lambda d: d["targets"][0].update(budgets=[1.0]), r"targets\[0\] must have 3 floors and 3 budgets"),
        (lambda d: d["targets"][0].update(dim=0), r"targets\[0\] has dim 0 in layer 0"),
        (
            lambda d: d["divergences"][0].update(measured=-1.0),
            r"divergences\[0\].measured must not be negative, got -1",
        ),
        (lambda d: d["grades"][0].pop("share"), r"grades\[0\] lacks share"),
        (lambda d: d["widths"][1].update(bits=9.0), r"widths\[1\] has 9.0 bits for head 1 of layer 0"),
        (lambda d: d["widths"][0].update(side="query"), r"widths\[0\].side must be"),
        (lambda d: d["qualities"][0].pop("max_kl"), r"qualities\[0\] lacks max_kl"),
    ],
)
def test_flaws_are_named(report: Report, change: Any, message: str) -> None:
    data = report.to_dict()
    change(data)
    with pytest.raises(ReportError, match=message):
        Report.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"format": NaN}', "{" * 100_000, "", "\ud800"])
def test_what_is_no_report_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ReportError, match=re.escape(str(path))):
        Report.from_json(path)
    with pytest.raises(ReportError, match="cannot be read"):
        Report.from_json(tmp_path / "nothing.json")


@pytest.mark.slow
def test_truncated_and_fuzzed_files_give_one_error() -> None:
    """Any damage gives a report that renders, or one error of our own."""
    text = make_report(layers=1, heads=1, dim=4).to_json()
    generator = random.Random(0)
    outcomes = {"read": 0, "refused": 0}
    for trial in range(500):  # some 5 % are read; which ones depends on the length of the text, and that on the machine
        if trial % 4 == 0:
            damaged = text[: generator.randrange(len(text))]
        else:
            place = generator.randrange(len(text))
            damaged = (
                text[:place]
                + generator.choice(['"', "{", "]", "-", "0", "null", "e9", ",", "1e999"])
                + text[place + generator.randrange(3) :]
            )
        try:
            found = Report.from_json(damaged if damaged.lstrip().startswith("{") else "{" + damaged)
        except QuantCacheError:
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
            found.to_html()
            found.summary()
    assert min(outcomes.values()) > 10, outcomes


def numbers(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a report's JSON the numbers are."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    found = [path] if isinstance(data, int | float) and not isinstance(data, bool) else []
    return found + [each for key, value in items for each in numbers(value, (*path, key))]


@pytest.mark.slow
def test_absurd_numbers_render_or_are_refused(tmp_path: Path) -> None:
    text = make_report(layers=2, heads=1, dim=4).to_json()
    places = numbers(json.loads(text))
    generator = random.Random(1)
    rendered = 0
    for trial in range(150):
        data = json.loads(text)
        *path, last = generator.choice(places)
        inner = data
        for key in path:
            inner = inner[key]
        inner[last] = generator.choice([0, -1, 1, 10**25, 1e299, -1e299, 1e-310, 0.5])
        try:
            report = Report.from_json(json.dumps(data))
        except ReportError:
            continue
        assert report.summary()
        if not trial % 5:  # drawing takes a hundred times as long as all the rest
            assert "<h1>" in report.to_html()
        if not trial % 50:
            report.to_png(tmp_path / "report.png")
        rendered += 1
    assert rendered > 75


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("ends", [(1.0, 1.0), (1e-310, 1e299), (1e-9, 3e-9), (1e299, 1e299), (0.5, 1e25)])
def test_any_chart_is_drawn_whole(ends: tuple[float, float], log: bool) -> None:
    points = (0.0, 1.0, 10.0**25), (*ends, ends[0])
    chart = Chart("name", "a < b", "x", "y", (Series("key", "keys & more", *points),) * 2, log_y=log)
    drawn = draw_svg(chart)
    root = ElementTree.fromstring(drawn)
    kinds = Counter(each.get("class", "").split(" ")[0] for each in root)
    assert (kinds["line"], kinds["dot"]) == (2, 6)
    assert min(kinds["axis"], kinds["tick"]) >= 1
    assert set(kinds) <= {"line", "dot", "axis", "grid", "tick"}
    assert "keys &amp; more, x 1: " in drawn
    assert not re.search(r"style=|#|url|nan|inf", drawn)


def test_outputs_agree_to_the_printed_digit(report: Report) -> None:
    """What the page and the terminal print is what the JSON holds, rounded once."""
    data = json.loads(report.to_json())
    page = Page(report.to_html())
    for row, target in zip(page.tables["heads"][1:], data["targets"], strict=True):
        expected = [
            str(target["layer"]),
            *(number(target[name]) for name in ("gamma", "beta", "fit_error")),
            *(count(target[name]) for name in ("knee", "k95")),
            number(target["participation"], 1),
            number(target["coding_gain"]),
            *map(nats, target["floors"]),
            *map(number, target["budgets"]),
            percent(target["mean_share"]),
            count(len(target["outliers"])),
        ]
        assert [row[0], *row[5:-1]] == expected
    summary = report.summary()
    for card in cards(report):
        assert card.value in page.values
        assert re.search(rf"^{re.escape(card.label)} +{re.escape(card.value)}  ", summary, re.MULTILINE)
    for table in tables(report):
        assert page.tables[table.name][1:] == [[cell.text for cell in row] for row in table.rows]
    for each, row in zip(data["divergences"], page.tables["divergence"][1:], strict=True):
        assert row[2:4] == [nats(each["predicted"]), nats(each["measured"])]
        assert re.search(rf"{re.escape(row[2])} +{re.escape(row[3])} ", summary)


def test_the_summarys_tables_fit_a_terminal(report: Report) -> None:
    """Heads fold where a table would not; the figures stay as they are."""
    prose = ("Note: ", provenance(report))
    lines = [line for line in report.summary().splitlines() if not line.startswith(prose)]
    assert max(map(len, lines)) <= 80
    place = lines.index("Targets")
    heads = " ".join(lines[place + 1 : place + 3]).split()
    assert sorted(heads) == sorted(" ".join(_OVERVIEW).split())
    (overview,) = (table for table in tables(report) if table.name == "overview")
    shown = [cell.text for cell, (name, _) in zip(overview.rows[0], overview.columns, strict=True) if name in _OVERVIEW]
    assert lines[place + 3].split() == " ".join(shown).split()


def test_page_asks_for_nothing(report: Report) -> None:
    text = report.to_html()
    assert Page(text).addresses == ["data:,"]
    assert not re.search(r"url\(|@import|https?://|fetch\(|XMLHttpRequest", text)
    assert "A note with &lt;markup&gt; &amp; more." in text
    assert "&#x27;&lt;s&gt;&#x27;" in text


def test_hostile_names_stay_text(report: Report) -> None:
    hostile = '"><script>alert(1)</script>'
    target = replace(report.targets[0], name=hostile, projections=(hostile,))
    text = replace(report, model=hostile, text=hostile, targets=(target, *report.targets[1:])).to_html()
    assert text.count("<script>") == 1
    assert f"c-{hostile}" not in text


def test_picture(report: Report, tmp_path: Path) -> None:
    from matplotlib import image

    path = tmp_path / "report.png"
    report.to_png(path)
    pixels = image.imread(path)
    assert pixels.shape[1] > 1400
    for rows in (slice(0, 550), slice(550, None)):
        for columns in (slice(0, 780), slice(780, None)):
            assert (pixels[rows, columns, :3].min(-1) < 0.7).mean() > 0.003  # every panel has something on it
    assert [file.name for file in tmp_path.iterdir()] == ["report.png"]


def test_a_report_of_little_renders(report: Report, tmp_path: Path) -> None:
    """An encoder's: no cache, no grades; and one that found nothing at all."""
    inputs = tuple(target for target in report.targets if target.head is None)
    bare = replace(report, grades=(), divergences=(), sinks=None, calibration=None, held_out=0, notes=())
    for each in (replace(bare, targets=inputs), replace(bare, targets=(), depth=(), model=None)):
        assert "<h1>" in each.to_html()
        assert each.summary()
        each.to_png(tmp_path / "report.png")
        assert Report.from_json(each.to_json()) == each


def test_numbers() -> None:
    assert [nats(v) for v in (0.0123, 0.00995, 1.234, 0.0, None, 12.3)] == ["0.012", "0.0100", "1.2", "0", "–", "12"]
    assert [number(None), percent(0.123), count(1234.5)] == ["–", "12 %", "1,234"]
