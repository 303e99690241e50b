"""How many examples the property tests try: few by default, many with HYPOTHESIS_PROFILE=soak."""

from __future__ import annotations

import os

SOAK = os.environ.get("HYPOTHESIS_PROFILE") == "soak"


def examples(count: int) -> int:
    """Examples to try.

    Args:
        count: How many by default.

    Returns:
        ``count``, or twenty times as many when soaking.
    """
    return 20 * count if SOAK else count
