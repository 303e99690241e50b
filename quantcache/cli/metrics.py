"""Measurements on model cards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantcache.common.errors import QuantCacheError
from quantcache.common.jsonfile import MAX_RESULT_BYTES, read_json

_CARD_COLUMNS = ("bits_per_element", "bits_per_element_total", "kl_mean", "top1_agreement", "perplexity")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read what ``quantcache eval -o`` wrote, as rows of a model card's table.

    Args:
        path: JSON of ``quantcache eval``.

    Returns:
        One row for each method that could be measured.

    Raises:
        QuantCacheError: ``quantcache eval`` did not write it.
    """
    try:
        methods = read_json(path, MAX_RESULT_BYTES)["methods"]
        return [
            {"method": name} | {column: f"{result[column]:.4g}" for column in _CARD_COLUMNS}
            for name, result in methods.items()
            if result["status"] == "ok"
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"{path} is not what quantcache eval writes: {type(error).__name__} {error}"
        raise QuantCacheError(message) from error
