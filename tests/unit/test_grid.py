"""Tables of the command line: no figure is cut short, whatever the terminal's width."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from quantcache.cli.session import session
from quantcache.common.grid import Grid, Prose


def lines(grid: Grid, width: int) -> list[str]:
    """What a terminal of so many columns shows."""
    console = Console(width=width, record=True, file=io.StringIO(), highlight=False, markup=False)
    console.print(grid)
    return console.export_text().splitlines()


@pytest.fixture
def grid() -> Grid:
    """A name, a figure under a long head, and another."""
    grid = Grid("method", "with sinks and recent", "KL", title="Some figures")
    grid.add_row("dense", "32.000", "0.00000")
    grid.add_row("a-long-name-2", "5.865", "0.00209")
    return grid


def test_as_wide_as_it_is(grid: Grid) -> None:
    assert lines(grid, 80) == [
        "Some figures",
        "method         with sinks and recent       KL",
        "dense                         32.000  0.00000",
        "a-long-name-2                  5.865  0.00209",
    ]


def test_heads_fold_first(grid: Grid) -> None:
    assert lines(grid, 36) == [
        "Some figures",
        "               with sinks",
        "method         and recent       KL",
        "dense              32.000  0.00000",
        "a-long-name-2       5.865  0.00209",
    ]


def test_then_columns_go_below(grid: Grid) -> None:
    assert lines(grid, 24) == [
        "Some figures",
        "                    with",
        "               sinks and",
        "method            recent",
        "dense             32.000",
        "a-long-name-2      5.865",
        "",
        "method              KL",
        "dense          0.00000",
        "a-long-name-2  0.00209",
    ]


@pytest.mark.parametrize("width", range(24, 90))
def test_every_figure_is_whole(grid: Grid, width: int) -> None:
    shown = lines(grid, width)
    assert max(map(len, shown)) <= width
    words = " ".join(shown).split()
    for cells in grid.rows:
        assert set(cells) <= set(words)


def test_sentences_fold_at_words() -> None:
    grid = Grid("", "", fold=True)
    grid.add_row("base model", "wiki11m (llama)")
    grid.add_row("recipe", "metric fisher, tokens 32768, sequences 16, seq_len 2048, seed 0")
    assert lines(grid, 50) == [
        "base model  wiki11m (llama)",
        "recipe      metric fisher, tokens 32768, sequences",
        "            16, seq_len 2048, seed 0",
    ]
    assert lines(grid, 90)[1].endswith("seed 0")


@pytest.mark.parametrize("width", range(28, 60))
def test_a_short_sentence_takes_no_room_from_figures(width: int) -> None:
    grid = Grid("backend", "difference", "outcome", fold=True)
    grid.add_row("cpu", "1.7e-03", "ok")
    assert lines(grid, width) == ["backend  difference  outcome", "cpu         1.7e-03  ok"]


def test_a_sentence_in_place_of_figures_stands_below(grid: Grid) -> None:
    grid.add_note("kivi-2*", "skipped: simulated, so its times mean nothing")
    assert lines(grid, 80)[1] == "method         with sinks and recent       KL", "as wide as without it"
    assert lines(grid, 80)[-1] == "kivi-2*: skipped: simulated, so its times mean nothing"
    assert grid.rows[-1] == ("kivi-2*", "skipped: simulated, so its times mean nothing", "")


def test_a_sentence_behind_several_columns_of_text_names_them() -> None:
    grid = Grid("method", "calibrated on", "KL", text=2)
    grid.add_row("spectral-2", "novel", "0.01")
    grid.add_note("spectral-2", "code", "unsupported: the same text")
    assert lines(grid, 80)[-1] == "spectral-2, calibrated on code: unsupported: the same text"
    assert grid.rows[-1] == ("spectral-2", "code", "unsupported: the same text")


def test_wide_characters_count_twice() -> None:
    grid = Grid("", "n")
    grid.add_row("日本", "1")
    grid.add_row("ab", "22")
    assert lines(grid, 40) == ["       n", "日本   1", "ab    22"]


class Terminal(io.StringIO):
    """A stdout that says that somebody watches."""

    def isatty(self) -> bool:
        """Somebody does."""
        return True


@pytest.mark.parametrize("stdout", [Terminal(), io.StringIO()], ids=["terminal", "pipe"])
def test_prose_folds_where_somebody_watches(stdout: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands, code and what models write never do."""
    monkeypatch.setattr("sys.stdout", stdout)
    monkeypatch.setenv("COLUMNS", "40")
    text = "bits: per encoded element, scales and gains included."
    with session(False, False) as run:
        run.finish({}, Prose(text), f"$ {text}")
    first, *rest = stdout.getvalue().splitlines()
    if stdout.isatty():
        assert [first.rstrip(), rest[0]] == ["bits: per encoded element, scales and", "gains included."]
    else:
        assert first == text
    assert rest[-1] == f"$ {text}"
