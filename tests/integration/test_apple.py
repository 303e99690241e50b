"""Apple's GPUs have no float64: caches, and the calibrations they need, do without it there."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantcache import Calibration, SpectralCache, calibrate
from quantcache.coding.schema import Coding
from tests.apple import APPLE, apple_gpu, move
from tests.families import FAMILIES, random_tokens
from tests.helpers import ROUNDING, error

LLAMA = next(family for family in FAMILIES if family.name == "llama")


@pytest.fixture
def there() -> PreTrainedModel:
    """A model on an Apple GPU."""
    model = copy.deepcopy(LLAMA.make(attention="spectral"))
    move(model)
    return model


@pytest.mark.support("a device without float64 (Apple's GPUs), emulated")
@pytest.mark.parametrize("coding", ["scalar", pytest.param("trellis", marks=pytest.mark.slow)])
def test_a_cache_does_there_what_it_does_on_the_cpu(there: PreTrainedModel, coding: Coding) -> None:
    model = LLAMA.make(attention="spectral")
    calibration = Calibration.synthetic(model.config, 3.0).with_coding(coding)
    tokens = random_tokens(2, 100, seed=3)
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0

    def run(model: PreTrainedModel, tokens: Tensor, mask: Tensor) -> tuple[Tensor, SpectralCache]:
        cache = SpectralCache(calibration, model.config, backend="torch", residual_length=0)

        def read(first: int, end: int) -> Tensor:
            logits: Tensor = model(tokens[:, first:end], attention_mask=mask[:, :end], past_key_values=cache).logits
            return logits

        read(0, 75)
        cache.reorder_cache(torch.tensor([1, 0]).to(tokens.device))
        mask = mask.flip(0)
        read(75, 95)
        read(95, 100)
        cache.crop(-12)
        return torch.cat((read(88, 99), read(99, 100)), dim=1), cache

    with torch.no_grad():
        expected, cache = run(model, tokens, mask)
        with apple_gpu():
            found, other = run(there, tokens.to(APPLE), mask.to(APPLE))
            assert found.device == APPLE
            assert other.spectral_layers[0].fields("key")["codes"].device == APPLE
            assert other.memory().codes == cache.memory().codes > 0
            found = found.to("cpu")
    assert error(found.double(), expected.double()) <= ROUNDING * float(expected.std())


@pytest.mark.support("a device without float64 (Apple's GPUs), emulated")
def test_calibrations_are_made_there(there: PreTrainedModel) -> None:
    tokens = random_tokens(2, 160, seed=4)
    options = {"bits": 3.0, "metric": "query", "predict": False, "progress": False}
    expected = calibrate(LLAMA.make(), [tokens], **options)
    with apple_gpu():
        found = calibrate(there, [tokens.to(APPLE)], **options)
    for index, layer in expected.layers.items():
        assert found.layers[index].rope == layer.rope
        torch.testing.assert_close(found.layers[index].key.spectrum, layer.key.spectrum, rtol=1e-4, atol=0)
