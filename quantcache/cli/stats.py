"""The live line of ``quantcache generate --stats``: speed, size of the cache, and who attends."""

from __future__ import annotations

import time
from collections import Counter
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

if TYPE_CHECKING:
    from quantcache.cache.spectral_cache import SpectralCache

INTERVAL = 0.1
"""Seconds between two looks at the cache, at least."""


class LiveStats:
    """Counts the tokens that ``generate`` streams; where the console is a terminal, shows how it goes while it goes.

    Args:
        cache: The cache that is generated from.
        console: Where the line is shown.
    """

    def __init__(self, cache: SpectralCache, console: Console):
        self._cache = cache
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._begun = self._first = self._latest = self._shown = 0.0
        self.tokens = 0

    def __enter__(self) -> LiveStats:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def put(self, value: Any) -> None:
        """Note the prompt, which comes first, or a token.

        Args:
            value: Token ids; only that they come matters.
        """
        now = time.perf_counter()
        if not self._begun:
            self._begun = now
            return
        self.tokens += 1
        self._first, self._latest = self._first or now, now
        if self._live is not None and now - self._shown >= INTERVAL:
            self._shown = now
            self._live.update(Text(self.line()), refresh=True)

    def end(self) -> None:
        """Nothing is left to do."""

    @property
    def prompt_seconds(self) -> float:
        """Seconds from the prompt to the first token."""
        return self._first - self._begun if self.tokens else 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens after the first, over the time since the first; None before there are two."""
        passed = self._latest - self._first
        return (self.tokens - 1) / passed if self.tokens > 1 and passed > 0 else None

    def kernels(self) -> dict[str, int]:
        """Layers by the backend that serves them; none before anything is packed."""
        return dict(Counter(each.name for each in self._cache.backend_report().values()))

    def line(self) -> str:
        """How it goes, in one line."""
        memory, kernels = self._cache.memory(), self.kernels()
        rate = self.tokens_per_second
        speed = "- tokens/s" if rate is None else f"{rate:.1f} tokens/s"
        shown = next(iter(kernels)) if len(kernels) == 1 else ", ".join(f"{n} ({k} layers)" for n, k in kernels.items())
        return (
            f"{self.tokens} tokens, {speed}, prompt {self.prompt_seconds:.2f} s; "
            f"cache {memory.total:,} bytes, bfloat16 takes {memory.bfloat16_bytes:,}; "
            f"kernel {shown or 'none, nothing is packed yet'}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The same, ready for JSON; sizes are the cache's own."""
        return {
            "tokens_per_second": self.tokens_per_second,
            "prompt_seconds": self.prompt_seconds,
            "kernels": self.kernels(),
        }
