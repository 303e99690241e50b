"""Answers end before the text that stops them, as OpenAI's do; transformers' server leaves it in."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any


class Cut:
    """Lets an answer through, piece by piece, up to the first text that stops it.

    What may be the beginning of such a text is held back until it is known.

    Args:
        stops: The texts.
    """

    def __init__(self, stops: Sequence[str]):
        self.stops, self.held, self.found = stops, "", False

    def feed(self, piece: str) -> str:
        """Take the next piece.

        Args:
            piece: The piece.

        Returns:
            What is certain to belong to the answer.
        """
        if self.found:
            return ""
        text = self.held + piece
        ends = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if ends:
            self.found, self.held = True, ""
            return text[: min(ends)]
        most = min(len(text), max(map(len, self.stops), default=1) - 1)
        begun = next(
            (n for n in range(most, 0, -1) if text.endswith(tuple(s[:n] for s in self.stops if n < len(s)))), 0
        )
        self.held = text[len(text) - begun :]
        return text[: len(text) - begun]

    def rest(self) -> str:
        """What was held back and turns out to stop nothing, once no piece follows."""
        held, self.held = self.held, ""
        return held


class Shortened:
    """What a streamer has put into a queue, up to what stops the answer.

    Args:
        queue: Pieces of text, of one type for each part of the answer, and other things; None at its end.
        config: The request's generation config.
    """

    def __init__(self, queue: Any, config: Any):
        self.queue, self.config = queue, config
        self.cut = Cut(stops_of(config))
        self.kind: type[str] = str
        self.ready: deque[Any] = deque()

    async def get(self) -> Any:
        """Wait for the next thing."""
        while not self.ready:
            self._take(await self.queue.get())
        return self.ready.popleft()

    def get_nowait(self) -> Any:
        """The next thing.

        Raises:
            asyncio.QueueEmpty: There is none yet.
        """
        while not self.ready:
            self._take(self.queue.get_nowait())
        return self.ready.popleft()

    def _take(self, item: Any) -> None:
        if isinstance(item, str) and type(item) is self.kind:
            self._show(self.cut.feed(item))
            return
        self._show(self.cut.rest())
        if isinstance(item, str):
            self.kind = type(item)
            self._show(self.cut.feed(item))
            return
        if item is None and self.cut.found:
            not_by_length(self.config)
        self.ready.append(item)

    def _show(self, text: str) -> None:
        if text:
            self.ready.append(self.kind(text))


_stops: ContextVar[Sequence[str]] = ContextVar("stops", default=())
"""What stops the answer to the present request, if that is not streamed."""


def shortened(text: str, config: Any) -> str:
    """A whole answer up to what stops it; :func:`shortened_again` knows of the same request from here on.

    Args:
        text: The answer.
        config: The request's generation config.

    Returns:
        Its beginning.
    """
    _stops.set(stops_of(config))
    cut = Cut(_stops.get())
    shown = cut.feed(text) + cut.rest()
    if cut.found:
        not_by_length(config)
    return shown


def shortened_again(text: str | None) -> str | None:
    """What transformers' server has read out of the same answer's tokens, up to what stops it.

    Args:
        text: The answer, or a part of it; None where there is none.

    Returns:
        Its beginning.
    """
    if text is None:
        return None
    cut = Cut(_stops.get())
    return cut.feed(text) + cut.rest()


def stops_of(config: Any) -> Sequence[str]:
    """The texts that stop an answer.

    Args:
        config: A generation config; whether its texts are texts is for ``generate`` to say.

    Returns:
        The texts.
    """
    found = config.stop_strings
    texts = [found] if isinstance(found, str) else found if isinstance(found, list | tuple) else []
    return [text for text in texts if isinstance(text, str) and text]


def not_by_length(config: Any) -> None:
    """Let transformers' server say that an answer has stopped, also where it took as many tokens as it might.

    Args:
        config: The generation config of a request that has been answered.
    """
    config.max_new_tokens = None
