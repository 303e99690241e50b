"""What the kernels' tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreter import quick_interpreter


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what the kernels' wrappers allocate, so that nothing unwritten goes unnoticed."""
    empty = torch.empty

    def filled(*args: object, **kwargs: object) -> Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 255 if tensor.dtype == torch.uint8 else 77)

    monkeypatch.setattr(torch, "empty", filled)


@pytest.fixture(scope="session", autouse=True)
def interpreter() -> Iterator[None]:
    """Let Triton's interpreter leave out what changes nothing; QUANTCACHE_PLAIN_INTERPRETER=1 leaves it as it is."""
    with quick_interpreter():
        yield
