"""One row that is not finite costs no other row its cache; what does not fit the range of gains is counted and said."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quantcache import Calibration, SpectralCache
from quantcache.backends.padding import Arrivals
from quantcache.coding.schema import SIDES
from quantcache.common.errors import QuantCacheError, TokensNotFinite
from quantcache.common.logs import log_once
from quantcache.data import calibrations_path, evaluation_text
from tests.builders import scalar_calibration
from tests.families import FAMILIES, random_tokens, shared_model
from tests.helpers import Run, feed

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA = next(family for family in FAMILIES if family.name == "llama")
GOOD, TOKENS, MORE = [0, 2], 60, 90
CALIBRATION = scalar_calibration(shared_model(LLAMA).config, 4.0)


def fresh() -> SpectralCache:
    """An empty cache."""
    return SpectralCache(CALIBRATION, shared_model(LLAMA).config, residual_length=0)


def refused(bad: float = float("nan")) -> tuple[SpectralCache, Tensor]:
    """A cache of three rows, the second of which stops a forward pass, and the tokens that were taken before it."""
    model, tokens = shared_model(LLAMA), random_tokens(3, TOKENS + 1 + MORE, seed=3)
    cache = fresh()
    feed(model, cache, tokens[:, :TOKENS], (TOKENS,))
    for layer in cache.spectral_layers:
        layer.tails["value"][1, 0, 20, 5] = bad
    with pytest.raises(TokensNotFinite, match=r"for token 20 of row 1 .*select the other rows, crop\(\) or reset\(\)"):
        feed(model, cache, tokens[:, TOKENS : TOKENS + 20], (20,))
    return cache, tokens


def select(cache: SpectralCache) -> SpectralCache:
    """The good rows."""
    cache.batch_select_indices(torch.tensor(GOOD))
    return cache


def forked(cache: SpectralCache) -> SpectralCache:
    """The good rows of a fork."""
    return select(cache.fork())


def deep(cache: SpectralCache) -> SpectralCache:
    """The good rows of a copy."""
    return select(copy.deepcopy(cache))


def reordered(cache: SpectralCache) -> SpectralCache:
    """The good rows twice, as beams; then once."""
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([0, 4]))
    return cache


def offloaded(cache: SpectralCache) -> SpectralCache:
    """The good rows after a journey."""
    for layer in cache.spectral_layers:
        layer.offload()
        layer.prefetch()
    return select(cache)


@pytest.mark.support("one row that is not finite")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("operation", [select, forked, deep, reordered, offloaded])
def test_the_other_rows_go_on(operation: Callable[[SpectralCache], SpectralCache], bad: float) -> None:
    model = shared_model(LLAMA)
    cache, tokens = refused(bad)
    assert cache.rollback() == TOKENS
    cache = operation(cache)
    found = feed(model, cache, tokens[GOOD, TOKENS:], (20, *(1,) * 6, MORE - 25))
    whole = fresh()
    feed(model, whole, tokens[GOOD, :TOKENS], (TOKENS,))
    expected = feed(model, whole, tokens[GOOD, TOKENS:], (20, *(1,) * 6, MORE - 25))
    assert torch.equal(found, expected)
    assert cache.spectral_layers[0].spans


@pytest.mark.support("one row that is not finite")
def test_selecting_before_rolling_back_works_too() -> None:
    model = shared_model(LLAMA)
    cache, tokens = refused()
    cache = select(cache)
    assert cache.rollback() == TOKENS
    assert feed(model, cache, tokens[GOOD, TOKENS:], (1 + MORE,)).isfinite().all()


@pytest.mark.support("one row that is not finite")
def test_a_crop_before_the_bad_token_keeps_all_rows() -> None:
    model = shared_model(LLAMA)
    cache, tokens = refused()
    cache.rollback()
    cache.crop(-(TOKENS - 20))
    assert cache.get_seq_length() == 20
    whole = fresh()
    feed(model, whole, tokens[:, :TOKENS], (TOKENS,))
    whole.crop(-(TOKENS - 20))
    steps = (50, 1, 1)
    found, expected = (feed(model, c, tokens[:, 20:72], steps) for c in (cache, whole))
    assert torch.equal(found, expected)
    cache, _ = refused()
    cache.crop(-(TOKENS + 20))
    assert torch.equal(feed(model, cache, tokens[:, :100], (100,)), feed(model, fresh(), tokens[:, :100], (100,)))


@pytest.mark.support("one row that is not finite")
def test_it_can_be_saved_and_loaded(tmp_path: Path) -> None:
    model = shared_model(LLAMA)
    cache, tokens = refused()
    cache.rollback()
    cache.save(tmp_path / "cache.safetensors")
    loaded = SpectralCache.load(tmp_path / "cache.safetensors", CALIBRATION, config=model.config)
    assert torch.equal(
        loaded.spectral_layers[0].tails["value"].isnan(), cache.spectral_layers[0].tails["value"].isnan()
    )
    found, expected = (feed(model, select(c), tokens[GOOD, TOKENS:], (1 + MORE,)) for c in (loaded, cache))
    assert torch.equal(found, expected)


@pytest.mark.support("one row that is not finite", refused=True)
def test_the_bad_row_is_refused_again_in_every_copy() -> None:
    model = shared_model(LLAMA)
    cache, tokens = refused()
    cache.rollback()
    for each in (cache.fork(), copy.deepcopy(cache), cache):
        with pytest.raises(TokensNotFinite):
            feed(model, each, tokens[:, TOKENS : TOKENS + 20], (20,))
        assert each.rollback() == TOKENS


@pytest.mark.support("one row that is not finite", refused=True)
def test_a_cache_that_calibrates_itself_refuses_them_before_it_fits_anything() -> None:
    model = shared_model(LLAMA)
    cache = SpectralCache.self_calibrating(model, bits=4, residual_length=0)
    layer = cache.spectral_layers[0]
    tokens = {side: torch.randn(2, 2, 100, 64) for side in SIDES}
    tokens["key"][1, 1, 9, 3] = float("nan")
    layer.update(tokens["key"], tokens["value"])
    with pytest.raises(TokensNotFinite, match="keys that are not finite, first for token 9 of row 1"):
        layer.flush()
    layer.batch_select_indices(torch.tensor([0]))
    layer.update(*(tensor[:1, :, :4] for tensor in tokens.values()))
    layer.flush()
    assert layer.spans


# ---------------------------------------------------------------------- gains


def scaled(scale: float, backend: str = "auto") -> SpectralCache:
    """A cache whose tokens are so many times as large as the calibration knows."""
    plain = CALIBRATION.with_bits(3.0, min_bits=1)
    cache = SpectralCache(plain, shared_model(LLAMA).config, residual_length=0, backend=backend)
    generator = torch.Generator().manual_seed(1)
    for layer in cache.spectral_layers:
        told = Arrivals.of(torch.arange(200) >= torch.tensor([0, 70])[:, None], None, 200, 200)
        given = [scale * torch.randn(2, 2, 200, 64, generator=generator) for _ in SIDES]
        for x in given:
            x[1, :, :70] = 1e4  # padding is nobody's loss
            x[0, :, 100] *= 40 if scale == 1.0 else 1
        layer.update(*given, arrivals=told)
        layer.flush()
    return cache


@pytest.mark.support("gains that saturate")
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_gains_at_the_ends_of_their_range_are_counted(backend: str) -> None:
    layers, heads = len(CALIBRATION.layers), 2
    read = layers * len(SIDES) * heads * ((4 + 192 - 4) + (196 - 74))  # tokens in blocks, less padding and sinks
    memory = scaled(1.0, backend).memory()
    assert (memory.gains_above, memory.gains_below) == (layers * len(SIDES) * heads, 0)
    memory = scaled(100.0, backend).memory()
    assert (memory.gains_above, memory.gains_below) == (read, 0)
    memory = scaled(1e-3, backend).memory()
    assert (memory.gains_above, memory.gains_below) == (0, read)
    assert memory.to_dict()["gains_below"] == read
    assert "gains_below" in str(memory)


@pytest.mark.support("gains that saturate")
def test_they_are_counted_whatever_happens_to_the_cache(tmp_path: Path) -> None:
    cache = scaled(1.0)
    count = len(CALIBRATION.layers) * len(SIDES) * 2
    cache.save(tmp_path / "cache.safetensors")
    for each in (
        cache.fork(),
        copy.deepcopy(cache),
        SpectralCache.load(tmp_path / "cache.safetensors", cache.calibration, config=shared_model(LLAMA).config),
    ):
        assert each.memory().gains_above == count
    cache.batch_repeat_interleave(2)
    assert cache.memory().gains_above == 2 * count
    cache.crop(-99)  # token 100 stays
    assert cache.memory().gains_above == 2 * count
    cache.crop(-1)
    assert cache.memory().gains_above == 0


@pytest.mark.support("gains that saturate")
def test_saturation_is_never_silent(caplog: pytest.LogCaptureFixture) -> None:
    messages = {
        1.0: "layer 0: some keys are at least 16 times larger than in calibration and lose magnitude",
        1e-3: "layer 1: values are at least 16 times smaller than in calibration and become 0",
    }
    for scale, message in messages.items():
        log_once.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="quantcache.attention.guards"):
            for _ in range(2):
                scaled(scale)
        found = [record.message for record in caplog.records]
        assert len(found) == len(set(found)) == len(CALIBRATION.layers) * len(SIDES), "once for each side of a layer"
        assert any(each.startswith(message) for each in found), found
        assert all("SpectralCache.memory() counts" in each for each in found)


@pytest.mark.support("gains that saturate")
def test_inspect_shows_them(run: Run, tmp_path: Path) -> None:
    cache = scaled(1.0)
    assert cache.calibration is not None
    cache.calibration.save_pretrained(tmp_path / "calibration")
    cache.save(tmp_path / "cache.safetensors")
    given = ("inspect", tmp_path / "calibration", "--cache", tmp_path / "cache.safetensors")
    status, out, _ = run(*given, "--json")
    held, memory = json.loads(out)["cache"], cache.memory()
    assert status == 0
    assert (held["gains_above"], held["gains_below"], held["tokens"]) == (memory.gains_above, 0, 200)
    assert "gains_above" not in json.loads(out)["memory"], "what is predicted says nothing about gains"
    status, out, _ = run(*given)
    assert status == 0
    assert f"{memory.gains_above:,} are too large to be stored" in " ".join(out.split())
    status, _, err = run("inspect", tmp_path / "calibration", "--cache", tmp_path / "none.safetensors")
    assert status == 1
    assert "none.safetensors cannot be read" in err


def test_ordinary_text_saturates_nothing(
    demo_model: PreTrainedModel, demo_tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    log_once.cache_clear()
    cache = SpectralCache(
        Calibration.from_pretrained(calibrations_path() / "wiki11m"), demo_model.config, residual_length=0
    )
    tokens = demo_tokenizer(evaluation_text()[:3000], return_tensors="pt").input_ids
    with caplog.at_level(logging.WARNING, logger="quantcache.attention.guards"):
        feed(demo_model, cache, tokens, (tokens.shape[1],))
    memory = cache.memory()
    assert memory.gains
    assert (memory.gains_above, memory.gains_below) == (0, 0)
    assert not caplog.records


def test_an_error_that_is_not_about_finite_tokens_is_not_swallowed() -> None:
    cache, _ = refused()
    layer = cache.spectral_layers[0]
    layer.tails["value"] = layer.tails["value"].nan_to_num(0.0, 0.0, 0.0)

    def broken(*args: object) -> None:
        raise QuantCacheError("no codecs")

    layer.make_codecs = broken
    with pytest.raises(QuantCacheError, match="no codecs"):
        layer.fork()
