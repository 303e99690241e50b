"""What people are shown: tables that fit the terminal, and sentences that fold at words."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

GAP = 2
"""Spaces between two columns."""

HEAD_LINES = 3
"""Lines that a head takes at most, if its words allow it."""

FOLDED = 24
"""The least that a column of sentences is narrowed to before it goes below the others."""


class Prose(str):
    """Sentences, folded at words on a terminal; in a file or a pipe every paragraph is one line."""

    __slots__ = ()


class Grid:
    """A table without lines: text to the left, figures to the right, and no figure cut short.

    Where columns do not fit side by side, the rest follow below, with the first column again.

    Args:
        heads: Heads of the columns, which may fold at spaces; without any the table has none.
        title: Line above the table.
        text: How many columns, from the first on, hold text.
        fold: Let the last column fold at words: it holds sentences.
    """

    def __init__(self, *heads: str, title: str | None = None, text: int = 1, fold: bool = False):
        self.heads, self.title = heads, title
        self.rows: list[tuple[str, ...]] = []
        self._styles: dict[int, str] = {}
        self._notes: dict[int, int] = {}  # where the sentence of a row is
        self._text, self._folds = text, len(heads) - 1 if fold else None

    def add_row(self, *cells: str, style: str = "") -> None:
        """Add a row.

        Args:
            cells: Its cells; those that are left out stay empty.
            style: Rich's style of the row.
        """
        if style:
            self._styles[len(self.rows)] = style
        self.rows.append((*cells, *[""] * (len(self.heads) - len(cells))))

    def add_note(self, *cells: str) -> None:
        """Add a row that has a sentence in place of its figures; a terminal shows it below the table.

        Args:
            cells: Its first cells, then the sentence.
        """
        self._notes[len(self.rows)] = len(cells) - 1
        self.add_row(*cells)

    def relabel(self, change: Callable[[str], str]) -> None:
        """Change the first cell of every row.

        Args:
            change: Gives the new text for the old.
        """
        self.rows = [(change(first), *rest) for first, *rest in self.rows]

    def lines(self, width: int) -> list[str]:
        """What a terminal of so many columns shows.

        Args:
            width: Columns.

        Returns:
            The table in plain text.
        """
        console = Console(width=width, file=io.StringIO(), color_system=None, force_jupyter=False)
        with console.capture() as shown:
            console.print(self)
        return shown.get().splitlines()

    @property
    def _figures(self) -> list[tuple[int, tuple[str, ...]]]:
        """The rows that stand in the table, by their number."""
        return [(number, cells) for number, cells in enumerate(self.rows) if number not in self._notes]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render the table, in as many parts as it takes."""
        if self.title:
            yield Text(self.title, style="italic")
        for number, columns in enumerate(self._parts(options.max_width)):
            if number:
                yield Segment.line()
            table = self._part(columns, options.max_width)
            for line in console.render_lines(table, options, pad=False):
                yield from _without_trail(line)
                yield Segment.line()
        for number, place in self._notes.items():
            cells = self.rows[number]
            labels = [cells[0], *(f"{self.heads[i]} {cells[i]}" for i in range(1, place))]
            yield Text(f"{', '.join(labels)}: {cells[place]}")

    def _width(self, place: int, lines: int) -> int:
        """What a column takes whose head has so many lines."""
        head, cells = self.heads[place], max((cell_len(cells[place]) for _, cells in self._figures), default=0)
        narrow = max((cell_len(word) for word in head.split()), default=0)
        fitting = (
            width
            for width in range(narrow, cell_len(head))
            if len(textwrap.wrap(head, width, break_long_words=False, break_on_hyphens=False)) <= lines
        )
        return max(cells, next(fitting, cell_len(head)))

    def _parts(self, room: int) -> list[list[int]]:
        """Columns that stand side by side; the first one leads each part."""
        first = self._width(0, HEAD_LINES)
        parts, used = [[0]], first
        for place in range(1, len(self.heads)):
            wide = self._width(place, HEAD_LINES)
            if place == self._folds:
                wide = min(wide, FOLDED)
            if used + GAP + wide > room and len(parts[-1]) > 1:
                parts.append([0])
                used = first
            parts[-1].append(place)
            used += GAP + wide
        return parts

    def _part(self, columns: Sequence[int], room: int) -> Table:
        """Some of the columns as a table of rich's, their heads in as few lines as the room allows."""
        fixed = [place for place in columns if place != self._folds]
        # As long as the longest of them.
        sentences = 0 if self._folds is None or self._folds not in columns else self._width(self._folds, 1)
        least, free = min(sentences, FOLDED), 0
        for lines in range(1, HEAD_LINES + 1):
            widths = {place: self._width(place, lines) for place in fixed}
            free = room - sum(widths.values()) - GAP * (len(columns) - 1)
            if free >= least:
                break
        table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, show_header=any(self.heads))
        for place in columns:
            left = place < self._text or place == self._folds
            table.add_column(
                self.heads[place],
                justify="left" if left else "right",
                width=max(least, min(free, sentences)) if place == self._folds else widths[place],
                overflow="fold",
            )
        for number, cells in self._figures:
            table.add_row(*(Text(cells[place]) for place in columns), style=self._styles.get(number))
        return table


def _without_trail(line: list[Segment]) -> Iterator[Segment]:
    """A line without the spaces at its end."""
    while line and not line[-1].text.rstrip():
        line = line[:-1]
    yield from line[:-1]
    if line:
        yield Segment(line[-1].text.rstrip(), line[-1].style)
