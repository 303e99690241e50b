"""Amounts as users write them: 24GB and 24GiB differ, and 128K tokens are 131,072."""

from __future__ import annotations

import re

from quantcache.common.errors import QuantCacheError

_SIZES: dict[str, int] = {
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)},
    **{f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", 1)},
}
_COUNTS = {"": 1, "K": 1024, "M": 1024**2}
# A comma parts thousands, and nothing else: 2,5GB is not 25 of them. Where it parts numbers, 2,048 is not 2 and 48.
_AMOUNT = re.compile(r"\s*([+-]?(?:[1-9]\d{0,2}(?:[,_]\d{3})+|[1-9]\d*|0)(?:\.\d*)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str, what: str = "memory") -> int:
    """Read a number of bytes.

    Args:
        text: Such as ``24GB`` (24 · 1000³) or ``24GiB`` (24 · 1024³).
        what: What errors call it.

    Returns:
        Bytes.

    Raises:
        QuantCacheError: The text has no unit, an unknown or an ambiguous one, or is not positive.
    """
    match = _AMOUNT.fullmatch(text)
    unit = match[2].upper() if match else ""
    if not match or unit not in _SIZES:
        raise QuantCacheError(
            f"{what} must be a number and a unit, GB (1000³ bytes) or GiB (1024³ bytes), such as 24GB, got {text!r}"
        )
    found = int(float(_digits(match[1])) * _SIZES[unit])
    if found < 1:
        raise QuantCacheError(f"{what} must be more than 0 bytes, got {text!r}")
    return found


def parse_tokens(text: str, what: str = "context", least: int = 1) -> int:
    """Read a number of tokens.

    Args:
        text: Such as ``8192``, ``8K`` (8 · 1024) or ``1M`` (1024²).
        what: What errors call it.
        least: The smallest number that it may be.

    Returns:
        Tokens.

    Raises:
        QuantCacheError: The text is not a whole number from ``least`` up.
    """
    match = _AMOUNT.fullmatch(text)
    unit = match[2].upper() if match else "?"
    if not match or unit not in _COUNTS:
        raise QuantCacheError(
            f"{what} must be a number of tokens, with K for 1,024 or M for 1,048,576 if wanted, got {text!r}"
        )
    found = float(_digits(match[1])) * _COUNTS[unit]
    if found < least or found != int(found):
        raise QuantCacheError(f"{what} must be a whole number of tokens from {least} up, got {text!r}")
    return int(found)


def _digits(text: str) -> str:
    return text.replace(",", "").replace("_", "")


def show_bytes(count: float, like: str = "GB") -> str:
    """A number of bytes for people.

    Args:
        count: Number of bytes.
        like: A size in whose kind of units it is shown: decimal, or binary where it contains ``iB``.

    Returns:
        Such as ``3.21 GB`` or ``2.99 GiB``.
    """
    base, units = (
        (1024, ("B", "KiB", "MiB", "GiB", "TiB")) if "IB" in like.upper() else (1000, ("B", "kB", "MB", "GB", "TB"))
    )
    power = 0
    while abs(count) >= base and power < len(units) - 1:
        count /= base
        power += 1
    return f"{count:,.0f} {units[power]}" if power == 0 else f"{count:,.2f} {units[power]}"


def show_bits(bits: float) -> str:
    """A number of bits for people.

    Args:
        bits: Number of bits.

    Returns:
        Such as ``1 bit`` or ``2.5 bits``.
    """
    return f"{bits:g} bit{'' if bits == 1 else 's'}"
