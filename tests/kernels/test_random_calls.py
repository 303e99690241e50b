"""The random calls that `make asan` makes for minutes, in short."""

from __future__ import annotations

import pytest

from quantcache_kernels.cpu.library import find
from tests.kernels.random_calls import drive


@pytest.mark.skipif(find()[0] is None, reason=f"no CPU kernels: {find()[1]}")
@pytest.mark.parametrize("seed", range(3))
def test_random_calls_native(seed: int) -> None:
    found = drive(seed, rounds=2)
    assert found["rounds"] == 2
    assert min(found[kind] for kind in ("attended", "blocks encoded", "compared", "copied", "cropped", "reordered")) > 0
