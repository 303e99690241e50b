"""Measurements on model cards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantcache.cli.terminal import report
from quantcache.common.errors import QuantCacheError
from quantcache.common.jsonfile import MAX_RESULT_BYTES, read_json

_CARD_COLUMNS = ("bits_per_element", "bits_per_element_total", "kl_mean", "top1_agreement", "perplexity")


def read_metrics(path: Path, *names: str | None) -> list[dict[str, Any]]:
    """Read what ``quantcache eval -o`` wrote, as rows of a model card's table; figures of another model are warned of.

    Args:
        path: JSON of ``quantcache eval``.
        names: What the card's model is called, the first as the warning has it.

    Returns:
        One row for each method that could be measured.

    Raises:
        QuantCacheError: ``quantcache eval`` did not write it.
    """
    try:
        found = read_json(path, MAX_RESULT_BYTES)
        rows = [
            {"method": name} | {column: f"{result[column]:.4g}" for column in _CARD_COLUMNS}
            for name, result in found["methods"].items()
            if result["status"] == "ok"
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"{path} is not what quantcache eval writes: {type(error).__name__} {error}"
        raise QuantCacheError(message) from error
    if found.get("model", names[0]) not in names:
        report("warning", f"{path} was measured on {found['model']}, and stands on the card of {names[0]}")
    return rows
