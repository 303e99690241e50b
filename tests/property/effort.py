"""How many examples the property tests try: few by default, many with HYPOTHESIS_PROFILE=soak."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

SOAK = os.environ.get("HYPOTHESIS_PROFILE") == "soak"


def examples(count: int) -> int:
    """Examples to try.

    Args:
        count: How many by default.

    Returns:
        ``count``, or twenty times as many when soaking.
    """
    return 20 * count if SOAK else count


def report(name: str, figures: Mapping[str, object]) -> None:
    """Hand figures to a soak: one JSON line for each test in the file that QUANTCACHE_SOAK_REPORT names.

    Args:
        name: What was measured.
        figures: The figures.
    """
    path = os.environ.get("QUANTCACHE_SOAK_REPORT")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, **figures}) + "\n")
