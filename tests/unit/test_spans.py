"""Where blocks lie, as Python knows it and as kernels read it; and copies that are whole when they are read."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from quantcache.backends.spans import Span, block_table_of, next_spans
from quantcache.backends.store import BlockStore, moved
from tests.builders import scalar_calibration


@pytest.mark.parametrize("count", [1, 2, 3, 8, 33])
@pytest.mark.parametrize(
    "previous",
    [None, Span(4, 64, 4), Span(68, 64, 4), Span(68, 20, 4), Span(4, 20, 4), Span(24, 7, 4)],
)
def test_places_are_the_spans(previous: Span | None, count: int) -> None:
    spans = next_spans(previous, 4, count)
    assert block_table_of(spans, torch.device("cpu")).tolist() == [list(astuple(span)) for span in spans]
    ends = [previous.end if previous else 4, *(span.end for span in spans)]
    assert [span.start for span in spans] == ends[:-1]
    assert all(0 <= span.start - span.anchor <= 64 for span in spans)


def test_a_span_that_a_crop_has_cut() -> None:
    assert block_table_of([Span(68, 20, 4)], torch.device("cpu")).tolist() == [[68, 20, 4]]


class Copies(TorchFunctionMode):
    """Notes where tensors go, and whether anybody waits for them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, bool]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note ``Tensor.to``."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "to":
            self.seen.append((str(args[1]), kwargs.get("non_blocking", False)))
        return func(*args, **kwargs)


def test_only_copies_to_a_gpu_may_still_be_under_way() -> None:
    with Copies() as copies:
        moved(torch.zeros(3), "cpu")
        moved(torch.zeros(3), torch.device("cpu"))
        BlockStore(1, {"a": torch.zeros(1, 2), "b": torch.zeros(1)}).moved("cpu")
        moved(torch.zeros(3), "meta")  # stands for a GPU
    assert copies.seen == [("cpu", False)] * 4 + [("meta", True)]


def test_an_offloaded_layer_is_whole() -> None:
    from quantcache import SpectralCache
    from quantcache.backends.padding import Arrivals
    from tests.builders import llama_config

    config = llama_config()
    layer = SpectralCache(scalar_calibration(config), config).spectral_layers[0]
    told = Arrivals.of(torch.arange(200) >= torch.tensor([[7], [0]]), None, 200, 200)
    layer.update(*(torch.randn(2, 2, 200, 64) for _ in range(2)), arrivals=told)
    layer.flush()
    with Copies() as copies:
        layer.offload()
    assert len(copies.seen) == 2 + 4 + 2 + 2 + 2 + 1  # places, starts, codes and gains, tails, sinks, leads, trail
    assert not any(waiting for _, waiting in copies.seen)
