"""Answers that end before the text that stops them."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from quantcache.cli.serving.stops import Cut, Shortened, shortened, shortened_again

PIECES = st.lists(st.text("abc", max_size=3), max_size=12)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


def before(pieces: list[str], stops: list[str]) -> str:
    """The text up to what stops it: nothing is said behind the first piece with which a stop is complete."""
    text = ""
    for piece in pieces:
        text += piece
        if ends := [text.index(stop) for stop in stops if stop in text]:
            return text[: min(ends)]
    return text


@given(PIECES, STOPS)
def test_pieces_join_to_what_comes_before_the_first_stop(pieces: list[str], stops: list[str]) -> None:
    cut, shown = Cut(stops), ""
    for n, piece in enumerate(pieces, 1):
        shown += cut.feed(piece)
        expected = before(pieces[:n], stops)
        assert expected.startswith(shown)
        late = len(expected) - len(shown)
        assert late < max(map(len, stops), default=1), "only what may begin a stop is held back"
    assert shown + cut.rest() == before(pieces, stops)
    assert cut.found == any(stop in "".join(pieces) for stop in stops)


class Thought(str):
    """A part of an answer that is sent as another."""


@given(PIECES, PIECES, STOPS, st.booleans())
@example([], ["ba", "a"], ["a", "baa"], True)
def test_queues_end_where_their_text_does(thought: list[str], said: list[str], stops: list[str], waiting: bool) -> None:
    config, call = SimpleNamespace(stop_strings=stops, max_new_tokens=3), object()

    async def read() -> list[Any]:
        queue: asyncio.Queue[Any] = asyncio.Queue()
        for item in [*map(Thought, thought), call, *said, None]:
            queue.put_nowait(item)
        short = Shortened(queue, config)
        found: list[Any] = [await short.get()]
        while found[-1] is not None:
            found.append(await short.get() if waiting else short.get_nowait())
        with pytest.raises(asyncio.QueueEmpty):
            short.get_nowait()
        return found

    found = asyncio.run(read())
    at = found.index(call)
    stopped = any(stop in "".join(thought) for stop in stops)
    assert all(type(each) is Thought for each in found[:at])
    assert "".join(found[:at]) == before(thought, stops)
    assert "".join(found[at + 1 : -1]) == ("" if stopped else before(said, stops))
    assert (config.max_new_tokens is None) == (stopped or any(stop in "".join(said) for stop in stops))


@pytest.mark.parametrize("stop", ["b", ["b"], ("c", "b"), ["bb", "bc"]])
def test_whole_answers(stop: Any) -> None:
    config = SimpleNamespace(stop_strings=stop, max_new_tokens=3)
    assert (shortened("abca", config), config.max_new_tokens) == ("a", None)
    assert (shortened_again("aaabc"), shortened_again(None)) == ("aaa", None)


@pytest.mark.parametrize("stop", [None, [], "", 3, [3, ""]])
def test_what_stops_nothing(stop: Any) -> None:
    config = SimpleNamespace(stop_strings=stop, max_new_tokens=3)
    assert (shortened("abca", config), config.max_new_tokens) == ("abca", 3)
    assert shortened_again("abca") == "abca"
