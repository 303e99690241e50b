"""What unit tests share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from transformers import PreTrainedConfig

from quantcache.artifact import tracing


@pytest.fixture(scope="module")
def traced_once() -> Iterator[None]:
    """Trace a model without weights once for each config: plans ask for the layers of a few, again and again."""
    trace, known = tracing.traced_layers, dict[tuple[type, str], list[Any] | None]()

    def look_up(config: PreTrainedConfig) -> list[Any] | None:
        key = type(config), config.to_json_string(use_diff=False)
        if key not in known:
            known[key] = trace(config)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "traced_layers", look_up)
        yield
