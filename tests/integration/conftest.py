"""What integration tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Keep torch to one thread.

    Tiny models gain nothing from more, and where other processes share the cores, threads that wait for each other
    make small eigendecompositions fifty times slower.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
