"""Models that read images: keys are turned by a place in time, height and width, not by their place in the text."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache, PreTrainedModel

from quantcache.artifact.calibration import Calibration
from quantcache.attention.function import register_attention
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.calibration.calibrator import calibrate
from quantcache.common.errors import QuantCacheError
from tests.families import MAX_POSITIONS, VOCABULARY, random_tokens
from tests.helpers import divergence

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("qwen2_vl", "qwen3_vl")
IMAGE, START, END, PLAIN = 10, 12, 13, 20
GRID, BEFORE, LENGTH = 32, 70, 560
IMAGE_TOKENS, IMAGE_SPAN = GRID * GRID // 4, GRID // 2
"""An image of 256 tokens takes as many positions as one of its sides has: 16."""


@functools.cache
def model_of(kind: str) -> PreTrainedModel:
    """A tiny model with key means far from zero, as trained ones have them."""
    register_attention()
    vision = {"depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision |= {"hidden_size": 256, "embed_dim": 32, "mlp_ratio": 1} if kind == "qwen2_vl" else {"hidden_size": 32}
    vision |= {"intermediate_size": 32, "out_hidden_size": 256, "deepstack_visual_indexes": [0]}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}
    text = {"vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "initializer_range": 0.12}
    text |= {"max_position_embeddings": MAX_POSITIONS, "rope_parameters": rope}
    tokens = {"image_token_id": IMAGE, "video_token_id": 11, "vision_start_token_id": START, "vision_end_token_id": END}
    config = AutoConfig.for_model(kind, text_config=text, vision_config=vision, **tokens)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="spectral", dtype=torch.float32).eval()
    for module in model.model.language_model.modules():
        if getattr(getattr(module, "k_proj", None), "bias", None) is not None:
            module.k_proj.bias.data.normal_(0.0, 4.0)
    model.generation_config.eos_token_id = None
    return model


def words(batch: int, length: int, seed: int) -> Tensor:
    """Tokens of which none stands for an image."""
    return random_tokens(batch, length, seed).clamp_min(PLAIN)


@functools.cache
def calibration_of(kind: str) -> Calibration:
    """Made on text alone."""
    return calibrate(model_of(kind), words(6, 300, seed=1), bits=4, predict=False, progress=False)


def prompt(kind: str, image: bool, first: int = BEFORE) -> dict[str, Tensor]:
    """A text with an image in it, or as many words in its place."""
    tokens = words(1, LENGTH, seed=2)
    if not image:
        return {"input_ids": tokens}
    place = slice(first, first + IMAGE_TOKENS)
    tokens[:, first - 1], tokens[:, place], tokens[:, first + IMAGE_TOKENS] = START, IMAGE, END
    kinds = (tokens == IMAGE).long()
    pixels = torch.randn(GRID * GRID, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(3))
    return {
        "input_ids": tokens,
        "mm_token_type_ids": kinds,
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, GRID, GRID]]),
    }


@torch.no_grad()
def answer(kind: str, cache: DynamicCache, image: bool, attention: str = "spectral") -> Tensor:
    """Logits of what follows a prompt."""
    model: Any = model_of(kind)
    model.set_attn_implementation(attention)
    model.model.rope_deltas = None
    model(**prompt(kind, image), past_key_values=cache)
    more = words(1, 60, seed=4)
    return torch.cat([model(input_ids=part, past_key_values=cache).logits.double() for part in more.split(12, 1)], 1)


@pytest.mark.parametrize("attention", ["spectral", "sdpa"])
@pytest.mark.parametrize("calibrated", [True, False], ids=["calibrated", "fitted"])
def test_an_image_costs_no_fidelity(calibrated: bool, attention: str) -> None:
    """Coded at their places in the text, keys behind an image make logits three times further from the dense ones."""
    kind = "qwen2_vl"  # with biases, the means of keys count
    model, found = model_of(kind), {}
    for image in (True, False):
        if calibrated:
            cache = SpectralCache(calibration_of(kind), model.config, residual_length=0)
        else:
            cache = SpectralCache.self_calibrating(model, bits=4, residual_length=0)
        expected = answer(kind, DynamicCache(config=model.config), image)
        found[image] = divergence(expected, answer(kind, cache, image, attention))
        assert all(layer.spans for layer in cache.spectral_layers)
    assert found[True] < 1.5 * found[False]


@pytest.mark.parametrize("kind", KINDS)
def test_positions_are_those_that_turn_the_keys(kind: str) -> None:
    """In ``generate``, which counts both: rows whose images lie elsewhere, one of them padded."""
    model: Any = model_of(kind)
    model.set_attn_implementation("spectral")
    cache = SpectralCache(calibration_of(kind), model.config, residual_length=9999)
    rows = [prompt(kind, image=True, first=first) for first in (BEFORE, 100)]
    inputs = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    mask = (torch.arange(LENGTH) >= torch.tensor([[0], [30]])).long()
    model.generate(**inputs, attention_mask=mask, past_key_values=cache, max_new_tokens=4, do_sample=False)
    for layer in cache.spectral_layers:
        assert layer.state.trail is not None
        shifts = layer.state.trail[:, 0]
        assert shifts.shape[1] == LENGTH + 3
        assert shifts[:, -1].tolist() == [IMAGE_TOKENS - IMAGE_SPAN, IMAGE_TOKENS - IMAGE_SPAN + 30]
        assert shifts[:, BEFORE - 2].tolist() == [0, 30]
        assert shifts[0, BEFORE : BEFORE + IMAGE_TOKENS].tolist() == list(range(IMAGE_TOKENS))


@pytest.mark.slow
def test_a_compiled_model_goes_on_behind_an_image() -> None:
    """Its graph knows places in the text only; the answer was coded at those, far from where its keys are turned to."""
    model: Any = model_of("qwen2_vl")
    model.set_attn_implementation("spectral")
    torch._dynamo.reset()
    held = []
    for run in (model, torch.compile(model, backend="eager")):
        model.model.rope_deltas = None
        cache = SpectralCache(calibration_of("qwen2_vl"), model.config, residual_length=9999)
        with torch.no_grad():
            model(**prompt("qwen2_vl", image=True), past_key_values=cache)
            for part in words(1, 24, seed=4).split(12, 1):
                run(input_ids=part, past_key_values=cache)
        held.append([layer.state.trail for layer in cache.spectral_layers])
    torch._dynamo.reset()
    for plain, compiled in zip(*held, strict=True):
        assert torch.equal(plain, compiled)
        assert plain[0, 0, -1] == IMAGE_TOKENS - IMAGE_SPAN


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_is_cached_already(kind: str) -> None:
    """Positions in an image do not tell it, as those in a text do."""
    cache, tokens = SpectralCache(calibration_of(kind), model_of(kind).config), words(1, 99, seed=3)
    with torch.no_grad():
        model_of(kind)(input_ids=tokens, past_key_values=cache)
    for length in (99, 51, 50):
        with pytest.raises(QuantCacheError, match=rf"holds 99 tokens already, .* a prompt of {length}:"):
            model_of(kind).generate(input_ids=tokens[:, :length], past_key_values=cache.fork(), max_new_tokens=2)
