"""Files from strangers: every one loads well-formed or gives one clear error, in bounded memory, and runs nothing."""

from __future__ import annotations

import json
import random
import resource
import struct
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from quantcache.artifact.calibration import Calibration
from quantcache.artifact.files import CONFIG_NAME, TENSORS_NAME
from quantcache.attention.function import spectral_attention
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.coding.schema import SIDES, Coding
from quantcache.common.errors import QuantCacheError
from tests.builders import llama_config
from tests.property.effort import examples, report
from tests.property.mutations import damaged, rewritten_json, rewritten_safetensors, rewritten_values

MAX_MEMORY = 256 << 20
"""Bound of what reading hostile files of some 50 KB may add to the process, all in all."""

FORBIDDEN = {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class", "socket.connect"}

seen: list[str] = []
watching: list[Path] = []


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if not watching:
        return
    path = args[0] if args else None
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    outside = isinstance(path, str) and not path.startswith(str(watching[0]))
    if event in FORBIDDEN or (writes and outside):
        seen.append(f"{event} {path}")


sys.addaudithook(_watch)  # for good: hooks cannot be taken back


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[None]:
    """Fail if anything is run, unpickled, sent, or written outside the folder, or if memory grows beyond bounds."""
    seen.clear()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    watching.append(tmp_path)
    yield
    watching.clear()
    assert not seen
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert grown < MAX_MEMORY, f"{grown >> 20} MB"


def tokens(count: int, rows: int = 1) -> list[torch.Tensor]:
    """Keys and values of the small model's only layer."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, 2, count, 32, generator=generator) for _ in SIDES]


def use(cache: SpectralCache) -> None:
    """Append enough to encode a block, and read everything."""
    layer = cache.spectral_layers[0]
    rows = layer.tails["key"].shape[0] if layer.is_initialized else 1
    keys, values = layer.update(*tokens(70, rows))
    assert keys.materialize().shape == values.materialize().shape
    layer.flush()
    layer.snapshot().dense("key")


def agree(calibration: Calibration) -> None:
    """Every backend gives the same finite results."""
    query = torch.randn(1, 4, 1, 32, generator=torch.Generator().manual_seed(1))
    found = []
    for backend in ("cpu", "torch"):
        layer = SpectralCache(calibration, residual_length=0, backend=backend).spectral_layers[0]
        layer.update(*tokens(200))
        layer.flush()
        found.append(spectral_attention(query, layer.snapshot(), None))
    assert all(bool(each.isfinite().all()) for each in found)
    assert float((found[0] - found[1]).abs().max()) < 1e-3 * max(1.0, float(found[1].abs().max()))


def outcomes(cases: int, attempt: Callable[[random.Random], None]) -> Counter[str]:
    """How many cases loaded and how many were refused; anything else is raised, with the seed that gave it."""
    found: Counter[str] = Counter()
    for seed in range(cases):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                attempt(random.Random(seed))
        except QuantCacheError as error:
            found["refused" if 0 < len(str(error)) < 2000 else f"message of {len(str(error))} characters"] += 1
        except Exception as error:
            raise AssertionError(f"case {seed}: {type(error).__name__}: {str(error)[:500]}") from error
        else:
            found["loaded"] += 1
    watching.clear()  # the soak's report is written outside
    assert found.keys() <= {"refused", "loaded"}
    return found


@pytest.mark.support("calibration files: fuzz")
@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("coding", get_args(Coding))
def test_calibrations(tmp_path: Path, coding: Coding) -> None:
    folder = tmp_path / "calibration"
    Calibration.synthetic(llama_config(32, layers=1), 3.0).with_coding(coding).save_pretrained(folder)
    config, tensors = ((folder / name).read_bytes() for name in (CONFIG_NAME, TENSORS_NAME))

    def attempt(rng: random.Random) -> None:
        files = {CONFIG_NAME: config, TENSORS_NAME: tensors}
        kind = rng.randrange(7)
        if kind >= 5:
            files[TENSORS_NAME] = rewritten_values(tensors, rng)
        if kind in (0, 4):
            files[TENSORS_NAME] = rewritten_safetensors(tensors, rng)
        if kind in (1, 4):
            files[CONFIG_NAME] = rewritten_json(config, rng)
        if kind == 2:
            files[TENSORS_NAME] = damaged(tensors, rng)
        if kind == 3:
            files[CONFIG_NAME] = damaged(config, rng)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        calibration = Calibration.from_pretrained(folder)
        for layer in calibration.layers.values():
            for side in SIDES:
                assert layer.side(side).analysis.shape == (*layer.side(side).mean.shape, layer.side(side).dim)
        if list(calibration.layers) == [0]:
            use(SpectralCache(calibration, llama_config(32, layers=1), residual_length=0))
            if kind >= 5:
                agree(calibration)

    found = outcomes(examples(125), attempt)
    assert found["refused"] > found.total() / 4
    assert found["loaded"] > found.total() / 50
    report(f"calibration files, {coding} codes", found)


@pytest.mark.support("saved caches: fuzz")
@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("coding", get_args(Coding))
def test_saved_caches(tmp_path: Path, coding: Coding) -> None:
    calibration = Calibration.synthetic(llama_config(32, layers=1), 3.0).with_coding(coding)
    cache = SpectralCache(calibration, residual_length=0)
    cache.spectral_layers[0].update(*tokens(200, rows=2))
    path = tmp_path / "prefix"
    cache.save(path)
    data = path.read_bytes()

    def description_changed(rng: random.Random) -> bytes:
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        text = rewritten_json(header["__metadata__"]["quantcache"].encode(), rng).decode("utf-8", "replace")
        header["__metadata__"]["quantcache"] = text
        new = json.dumps(header).encode()
        return struct.pack("<Q", len(new)) + new + data[8 + size :]

    def attempt(rng: random.Random) -> None:
        change = rng.choice((description_changed, lambda r: rewritten_safetensors(data, r), lambda r: damaged(data, r)))
        path.write_bytes(change(rng))
        loaded = SpectralCache.load(path, calibration)
        if loaded.get_seq_length():
            assert loaded.get_seq_length() == 200
            for side in SIDES:
                ours, theirs = (c.spectral_layers[0].snapshot().dense(side) for c in (loaded, cache))
                assert torch.equal(ours, theirs), "what a checksum has passed is what was saved"
        use(loaded)

    found = outcomes(examples(100), attempt)
    assert found["refused"] > found.total() / 2
    report(f"saved caches, {coding} codes", found)
