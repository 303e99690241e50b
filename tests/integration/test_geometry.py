"""Caches whose layers, heads or dimensions are not what a plain config says, and models with nothing to compress."""

from __future__ import annotations

import copy
import functools
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    DynamicCache,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer

import quantcache
from quantcache import Calibration, SpectralCache
from quantcache.accounting.measuring import measure
from quantcache.artifact import cache_layout, tracing
from quantcache.cache.layer import SpectralLayer
from quantcache.calibration.calibrator import calibrate
from quantcache.common import compat
from quantcache.common.errors import CalibrationMismatch, NothingToCompress, QuantCacheError, RowError, UnsupportedModel
from quantcache.data import demo_model_path
from quantcache.planning.memory import estimate_memory
from tests.builders import scalar_calibration
from tests.families import FAMILIES, MAX_POSITIONS, OTHERS, Family, _implied, _small, random_tokens
from tests.helpers import few

_NO_ROPES: dict[int, tuple[str, int]] = {}
_LATENT = _implied(16, 4, q_lora_rank=24, kv_lora_rank=16, n_routed_experts=4, num_experts_per_tok=2) | {
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
_INDEXED = _LATENT | {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 32}
_GEMMA4 = _small(16, layers=3, sliding_window=48, global_head_dim=32) | {
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 256,
}
_SHARING = _GEMMA4 | {
    "num_hidden_layers": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "full_attention"],
    "num_kv_shared_layers": 1,
}
_MULTI_QUERY = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "initializer_range": 0.12}

INDEXED = dict.fromkeys((0, 1), ((1, 16), (1, 8)))

LAYOUTS: dict[Family, dict[int, tuple[tuple[int, int], tuple[int, int]]]] = {
    Family("gemma4", "gemma4_text", _GEMMA4, _NO_ROPES, (32, 2)): dict.fromkeys((1, 2), ((2, 32), (2, 32))),
    Family("gemma4-sharing", "gemma4_text", _SHARING, _NO_ROPES, (32, 2)): dict.fromkeys((1, 3), ((2, 32), (2, 32))),
    Family(
        "nemotron-h",
        "nemotron_h",
        _small(16, layers=4, layer_types=["linear_attention", "full_attention", "mlp", "full_attention"])
        | {
            "ssm_state_size": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 1,
            "expand": 2,
            "chunk_size": 8,
        },
        _NO_ROPES,
        (16, 2),
    ): dict.fromkeys((1, 3), ((2, 16), (2, 16))),
    Family("deepseek-v2", "deepseek_v2", _LATENT, _NO_ROPES, (16, 1)): dict.fromkeys((0, 1), ((1, 16), (1, 8))),
    Family("glm-4.7-flash", "glm4_moe_lite", _LATENT, _NO_ROPES, (16, 1)): dict.fromkeys((0, 1), ((1, 16), (1, 8))),
    Family(
        "falcon-multi-query", "falcon", _MULTI_QUERY | {"multi_query": True}, _NO_ROPES, (16, 1), ("sdpa",)
    ): dict.fromkeys((0, 1), ((1, 16), (1, 16))),
    Family(
        "starcoder", "gpt_bigcode", _MULTI_QUERY | {"multi_query": True, "n_positions": MAX_POSITIONS}, {}, (16, 1)
    ): dict.fromkeys((0, 1), ((1, 16), (1, 16))),
    Family(
        "falcon-h1",
        "falcon_h1",
        _small(16, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1)
        | {"mamba_chunk_size": 8},
        _NO_ROPES,
        (16, 2),
    ): dict.fromkeys((0, 1), ((2, 16), (2, 16))),
    Family(
        "zamba2",
        "zamba2",
        _implied(16, 4, layers=3, mamba_d_state=16, mamba_ngroups=1, n_mamba_heads=8, mamba_headdim=16)
        | {"num_mem_blocks": 1, "layers_block_type": ["mamba", "hybrid", "mamba"], "adapter_rank": 8}
        | {"attention_hidden_size": 128, "kv_channels": 16, "chunk_size": 8},
        _NO_ROPES,
        (32, 4),
    ): {1: ((4, 32), (4, 32))},
    Family("glm-5", "glm_moe_dsa", _INDEXED, _NO_ROPES, (16, 1)): INDEXED,
    Family("deepseek-v3.2", "deepseek_v32", _INDEXED, _NO_ROPES, (16, 1)): INDEXED,
}
"""What reaches the cache of every layer that is compressed: (heads, dimension) of keys and values."""

BY_NAME = {str(family): family for family in (*LAYOUTS, *FAMILIES, *OTHERS)}
PROMPT = 150


@functools.cache
def model_of(name: str) -> PreTrainedModel:
    """A model of the table, with the attention that transformers would choose; shared by all tests here."""
    return BY_NAME[name].make(attention="eager" if BY_NAME[name].model_type == "nemotron_h" else "sdpa")


@functools.cache
def _empty(name: str, residual_length: int, bits: float) -> SpectralCache:
    return SpectralCache.self_calibrating(model_of(name), bits, residual_length=residual_length)


def fitting(name: str, residual_length: int = 9999, bits: float = 3.0) -> SpectralCache:
    """An empty cache that fits itself; by default it never encodes anything."""
    return _empty(name, residual_length, bits).fork()


def run(model: PreTrainedModel, cache: Any, tokens: int = 3) -> torch.Tensor:
    """Logits of a few generated tokens ``[1, tokens, V]``."""
    options: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    given = {} if cache is None else {"past_key_values": cache}
    out: Any = model.generate(random_tokens(1, PROMPT), max_new_tokens=tokens, **options, **given)
    return torch.stack(out.logits, 1)


@functools.cache
def dense(name: str) -> torch.Tensor:
    """The same with transformers' own cache."""
    return run(model_of(name), DynamicCache(config=model_of(name).config))


@functools.cache
def calibration_of(name: str) -> Calibration:
    """A calibration of a model of the table."""
    return calibrate(model_of(name), random_tokens(1, 100), progress=False)


pytestmark = pytest.mark.filterwarnings("ignore:no output projection found")
every_layout = pytest.mark.parametrize(
    "name", few(map(str, LAYOUTS), ["gemma4-sharing", "nemotron-h", "glm-4.7-flash", "starcoder", "falcon-h1"])
)


@pytest.mark.support("layers of different geometry, shared keys and values, latents, one head")
@every_layout
def test_a_cache_that_encodes_nothing_gives_the_dense_logits(name: str) -> None:
    cache = fitting(name)
    assert [layer.index for layer in cache.spectral_layers] == list(LAYOUTS[BY_NAME[name]])
    assert torch.equal(run(model_of(name), cache), dense(name))


@pytest.mark.support("layers of different geometry, shared keys and values, latents, one head")
@every_layout
def test_codes_without_a_calibration_come_close_to_the_dense_logits(name: str) -> None:
    family = BY_NAME[name]
    errors = {}
    for bits in (2, 8):
        cache = fitting(name, 0, bits)
        torch.manual_seed(0)
        logits = run(model_of(name), cache, 1)[:, -1:]  # the prompt is read before it is encoded ...
        with torch.no_grad():  # ... and one more token reads the codes
            token = torch.tensor([[5]])
            own = DynamicCache(config=model_of(name).config)
            model_of(name)(random_tokens(1, PROMPT), past_key_values=own)
            expected = model_of(name)(token, past_key_values=own).logits
            errors[bits] = float((model_of(name)(token, past_key_values=cache).logits - expected).norm())
        assert torch.equal(logits, dense(name)[:, :1])
        assert all(layer.spans for layer in cache.spectral_layers)
    if family.config is not _INDEXED:  # an indexer's choice may jump with the smallest error
        assert errors[8] < errors[2] / 2


@pytest.mark.support("layers of different geometry, shared keys and values, latents, one head")
@every_layout
def test_a_calibration_alone_gives_the_layers_of_the_model(name: str, tmp_path: Path) -> None:
    config = model_of(name).config
    calibration_of(name).save_pretrained(tmp_path)
    loaded = Calibration.from_pretrained(tmp_path)
    loaded.check_compatible(config)
    kinds = [type(layer) for layer in SpectralCache(loaded, config).layers]
    assert [type(layer) for layer in SpectralCache(loaded).layers] == kinds
    windows = [getattr(layer, "sliding_window", None) for layer in SpectralCache(loaded, config).layers]
    assert [getattr(layer, "sliding_window", None) for layer in SpectralCache(loaded).layers] == windows


def recurrent_states(layer: Any) -> list[torch.Tensor]:
    """What a layer holds beside keys and values."""
    held = [getattr(layer, name, {}) for name in ("conv_states", "recurrent_states")]
    return [state for states in held for state in states.values() if isinstance(state, torch.Tensor)]


@every_layout
def test_shapes_and_bytes_are_those_of_the_cache(name: str) -> None:
    model, config = model_of(name), model_of(name).config
    run(model, SpectralCache(scalar_calibration(config), config, residual_length=0))
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(random_tokens(1, 70), past_key_values=cache)
    held = {index: tracing.held_shape(cache.layers[index]) for index in LAYOUTS[BY_NAME[name]]}
    if LAYOUTS[BY_NAME[name]] is not INDEXED or compat.HAS_FP8_CACHE:  # older versions cache what they expand
        assert held == LAYOUTS[BY_NAME[name]]
    assert tracing.cached_shapes(config) == held
    states = sum(held.nbytes for layer in cache.layers for held in recurrent_states(layer))
    assert estimate_memory(config, "bf16", 70, dtype=torch.float32).total + states == measure(cache).total
    estimate_memory(config, "spectral-3", 4096)


def test_a_calibration_of_other_layers_is_refused() -> None:
    other = Family("other", "gemma4_text", _GEMMA4 | {"global_head_dim": 64}, {}, (64, 2)).make(attention="sdpa")
    with pytest.raises(CalibrationMismatch, match=r"head_dim \[16, 32, 32\], the model has \[16, 64, 64\]|\(2, 64\)"):
        run(other, SpectralCache(calibration_of("gemma4"), other.config))


# ---------------------------------------------------------------------- layers that hold more than keys and values

MIXED = ["falcon-h1", "zamba2", "glm-5", "deepseek-v3.2"]


@pytest.mark.support("attention with recurrence or an indexer in one layer")
@pytest.mark.parametrize("name", MIXED)
def test_copies_of_a_mixed_cache_go_their_own_ways(name: str) -> None:
    model = model_of(name)
    cache = fitting(name, 0)
    with torch.no_grad():
        model(random_tokens(1, PROMPT), past_key_values=cache)
        token = torch.tensor([[7]])
        twins = [cache.fork(), copy.deepcopy(cache)]
        logits = [model(token, past_key_values=each).logits for each in (*twins, cache)]
        assert torch.equal(logits[0], logits[1])
        assert torch.equal(logits[1], logits[2])
        cache.reset()
        fresh = DynamicCache(config=model.config)
        ids = random_tokens(1, 20, seed=3)
        assert torch.equal(model(ids, past_key_values=cache).logits, model(ids, past_key_values=fresh).logits)


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "nemotron-h", "zamba2"])
def test_copies_of_layers_that_autograd_has_a_graph_of(name: str) -> None:
    """Tensors with a graph cannot be copied deeply: windows and recurrent states of a pass with gradients are."""
    model, cache = model_of(name), fitting(name, 0)
    model(random_tokens(1, PROMPT), past_key_values=cache)
    with torch.no_grad():
        twins = [cache.fork(), copy.deepcopy(cache)]
        logits = [model(torch.tensor([[7]]), past_key_values=each).logits for each in (*twins, cache)]
    assert torch.equal(logits[0], logits[2])
    assert torch.equal(logits[1], logits[2])


@pytest.mark.support("attention with recurrence or an indexer in one layer")
@pytest.mark.parametrize("name", ["falcon-h1", "zamba2", "nemotron-h", "glm-5", "gemma3"])
def test_layers_are_of_the_kinds_that_transformers_asks_for(name: str) -> None:
    """Layers with recurrence counted as nothing else: beside windows (Inkling), all had the windows' masks."""
    config = model_of(name).config
    ours, theirs = SpectralCache(scalar_calibration(config), config), DynamicCache(config=config)
    kinds = [kind for kind in ("is_linear", "is_sliding", "is_dummy") if hasattr(theirs, kind)]
    assert [getattr(ours, kind) for kind in kinds] == [getattr(theirs, kind) for kind in kinds]


@pytest.mark.support("attention with recurrence or an indexer in one layer")
@pytest.mark.parametrize("name", MIXED)
def test_rows_of_a_mixed_cache_are_gathered_whole(name: str) -> None:
    model = model_of(name)
    ids, order = random_tokens(3, 40), torch.tensor([2, 0])
    cache, own = fitting(name), DynamicCache(config=model.config)
    with torch.no_grad():
        for each in (cache, own):
            model(ids, past_key_values=each)
            each.reorder_cache(order)
        token = torch.tensor([[7], [8]])
        assert torch.equal(model(token, past_key_values=cache).logits, model(token, past_key_values=own).logits)
        found = []
        for each in (fitting(name), DynamicCache(config=model.config)):
            model(ids[:1], past_key_values=each)
            for layer in each.layers:
                if isinstance(layer, SpectralLayer):
                    layer.batch_repeat_interleave(2)
                else:  # transformers' own recurrent layers cannot
                    layer.reorder_cache(torch.tensor([0, 0]))
            found.append(model(torch.tensor([[7], [7]]), past_key_values=each).logits)
        assert torch.equal(*found)


@pytest.mark.parametrize("held", [0, 60])
@pytest.mark.parametrize("name", ["nemotron-h", "falcon-h1", "zamba2"])
def test_states_that_a_failed_pass_has_changed_are_not_gone_on_from(name: str, held: int) -> None:
    """Recurrent layers before the first attention had read tokens that no layer counts, and the next call went on."""
    model, cache = model_of(name), fitting(name)
    ids, token = random_tokens(1, 80), torch.tensor([[7]])

    def fail(*_: Any) -> None:
        raise MemoryError

    with torch.no_grad():
        if held:
            model(ids[:, :held], past_key_values=cache)
        mixer = next(module for place, module in model.named_modules() if place.endswith(".out_proj"))
        hook = mixer.register_forward_hook(fail)
        with pytest.raises(MemoryError):
            model(ids[:, held:], past_key_values=cache)
        hook.remove()
        assert cache.get_seq_length() == held
        for use in (lambda: model(token, past_key_values=cache), cache.fork, lambda: copy.deepcopy(cache)):
            with pytest.raises(QuantCacheError, match=f"interrupted after {held} tokens"):
                use()
        if held:
            with pytest.raises(QuantCacheError, match="cannot go back"):
                cache.rollback()
            cache.reset()
        else:
            assert cache.rollback() == 0
        fresh = DynamicCache(config=model.config)
        assert torch.equal(model(ids, past_key_values=cache).logits, model(ids, past_key_values=fresh).logits)


@pytest.mark.parametrize("name", ["falcon-h1", "glm-5"])
def test_a_mixed_layer_takes_rows_as_any_layer_does(name: str) -> None:
    """Asked by itself, without the cache that looks at rows first."""
    cache = fitting(name)
    with torch.no_grad():
        model_of(name)(random_tokens(3, 20), past_key_values=cache)
    layer: Any = cache.layers[0]

    def held(layer: Any) -> list[torch.Tensor]:
        indexer = getattr(layer, "indexer_keys", None)
        states = [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
        return [*layer.tails.values(), *states, *([] if indexer is None else [indexer])]

    before = held(layer)
    assert len(before) > 2, "more than keys and values"
    for rows in (torch.tensor([0, 3]), [0, -4], torch.tensor([True, False]), [[0], [1]]):
        for take in (layer.batch_select_indices, layer.reorder_cache):
            with pytest.raises(RowError):
                take(rows)
    with pytest.raises(RowError):
        layer.batch_repeat_interleave([1, 2])
    assert all(new is old for new, old in zip(held(layer), before, strict=True))
    for rows in (torch.tensor([False, True, True]), [1, 2], torch.tensor([-2, -1])):
        for take in ("batch_select_indices", "reorder_cache"):
            new = copy.deepcopy(layer)
            getattr(new, take)(rows)
            assert all(torch.equal(one, old[1:]) for one, old in zip(held(new), before, strict=True))


@pytest.mark.support("attention with recurrence or an indexer in one layer")
@pytest.mark.parametrize("name", ["glm-5", "deepseek-v3.2"])
def test_an_indexers_keys_are_cropped_too(name: str) -> None:
    model = model_of(name)
    ids = random_tokens(1, 60)
    cache, own = fitting(name), DynamicCache(config=model.config)
    with torch.no_grad():
        for each in (cache, own):
            model(ids, past_key_values=each)
            each.crop(-11)
        layer: Any = cache.layers[0]
        assert layer.indexer_keys.shape[1] == cache.get_seq_length() == 49
        token = torch.tensor([[7]])
        assert torch.equal(model(token, past_key_values=cache).logits, model(token, past_key_values=own).logits)
        kept = SpectralCache.from_dynamic_cache(own, calibration_of(name), model.config, residual_length=9999)
        logits = model(token, past_key_values=kept).logits
        assert torch.equal(logits, model(token, past_key_values=own).logits)


@pytest.mark.support("attention with recurrence or an indexer in one layer")
@pytest.mark.parametrize("name", ["glm-5", "deepseek-v3.2"])
def test_spectral_attention_sees_the_keys_that_an_indexer_chose(name: str) -> None:
    model = BY_NAME[name].make(attention="spectral")
    cache = SpectralCache.self_calibrating(model, residual_length=9999)
    assert (run(model, cache) - dense(name)).abs().max() < 1e-5
    padded = torch.ones(1, PROMPT, dtype=torch.long)
    padded[:, :30] = 0
    logits = []
    for each in (model, model_of(name)):
        with torch.no_grad():
            logits.append(each(random_tokens(1, PROMPT), attention_mask=padded, use_cache=False).logits[:, 30:])
    assert (logits[0] - logits[1]).abs().max() < 1e-5


@pytest.mark.support("attention with recurrence or an indexer in one layer", refused=True)
@pytest.mark.parametrize("name", MIXED)
def test_what_a_file_cannot_hold_is_not_lost_in_one(name: str, tmp_path: Path) -> None:
    cache = SpectralCache(calibration_of(name), model_of(name).config)
    with torch.no_grad():
        model_of(name)(random_tokens(1, 20), past_key_values=cache)
    with pytest.raises(QuantCacheError, match="cannot be written to a file"):
        cache.save(tmp_path / "cache.safetensors")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- layers of another input


def _mllama() -> tuple[PreTrainedModel, dict[str, Any]]:
    """Llama 3.2 Vision with a cross-attention layer, and inputs with an image."""
    text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": 256, "cross_attention_layers": [1], "pad_token_id": 2}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_global_layers": 1}
    vision |= {"attention_heads": 2, "image_size": 32, "patch_size": 4, "max_num_tiles": 1, "vision_output_dim": 64}
    vision |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}
    config = AutoConfig.for_model("mllama", image_token_index=250, text_config=text, vision_config=vision)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.generation_config.eos_token_id = None
    ids = torch.cat([torch.tensor([[0, 250]]), random_tokens(1, PROMPT).clamp_max(240)], 1)
    ones = torch.ones(1, 1, 1, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 1, 1, 3, 32, 32)}
    inputs |= {"aspect_ratio_ids": ones[0], "aspect_ratio_mask": ones}
    return model, inputs | {"cross_attention_mask": torch.ones(1, ids.shape[1], 1, 1, dtype=torch.long)}


@pytest.mark.support("cross-attention layers in the same cache (Llama 3.2 Vision)")
def test_cross_attention_layers_stay_as_they_are() -> None:
    model, inputs = _mllama()
    own = DynamicCache(config=model.config)
    expected = model.generate(**inputs, past_key_values=own, max_new_tokens=5, do_sample=False)
    for cache in (
        SpectralCache(scalar_calibration(model.config), model.config, residual_length=9999),
        SpectralCache(scalar_calibration(model.config), residual_length=9999),
        SpectralCache.self_calibrating(model, residual_length=9999),
    ):
        found = model.generate(**inputs, past_key_values=cache, max_new_tokens=5, do_sample=False)
        assert found.tolist() == expected.tolist()
        assert [layer.get_seq_length() for layer in cache.layers] == [x.get_seq_length() for x in own.layers]
        assert type(cache.layers[1]) is DynamicLayer
        assert cache.memory().tokens == own.get_seq_length()
    assert list(calibrate(model, random_tokens(1, 100), progress=False).layers) == [0, 2]


# ---------------------------------------------------------------------- nothing to compress

WINDOWS = Family("windows", "mistral", _small(16, sliding_window=48), {}, (16, 2))
RECURRENT = Family(
    "recurrent",
    "mamba2",
    {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1}
    | {"chunk_size": 8},
    {},
    (0, 0),
    ("eager",),
)
OWN_KIND = Family(
    "deepseek-v4",
    "deepseek_v4",
    _small(16, layers=2, layer_types=["heavily_compressed_attention", "compressed_sparse_attention"])
    | {"num_key_value_heads": 1, "qk_rope_head_dim": 8, "q_lora_rank": 24, "moe_intermediate_size": 32},
    {},
    (0, 0),
)


@pytest.mark.support("nothing to compress: windows only, recurrent, layers of a model's own kind", refused=True)
@pytest.mark.parametrize(
    ("family", "reason"),
    [(WINDOWS, "2 layers keep a sliding window of 48 tokens"), (RECURRENT, "2 layers hold recurrent states")],
    ids=str,
)
def test_one_refusal_everywhere_and_a_warning_from_enable(family: Family, reason: str) -> None:
    model = family.make()
    expected = run(model, None)
    for refused in (
        lambda: calibrate(model, random_tokens(1, 100), progress=False),
        lambda: SpectralCache.self_calibrating(model),
        lambda: SpectralCache(calibration_of("llama"), model.config),
        lambda: scalar_calibration(model.config),
    ):
        with pytest.raises(NothingToCompress, match=f"{reason}.*use the model's own cache"):
            refused()
    attention = compat.attention_implementations(model.config)
    with pytest.warns(UserWarning, match=f"nothing is enabled: .*{reason}") as record:
        quantcache.enable(model)
    assert Path(record[0].filename) == Path(__file__)
    assert torch.equal(run(model, None), expected)
    assert compat.attention_implementations(model.config) == attention
    quantcache.disable(model)
    assert "generate" not in vars(model)
    with pytest.warns(UserWarning, match=reason), quantcache.enabled(model):
        assert torch.equal(run(model, None), expected)


@pytest.mark.support("nothing to compress: windows only, recurrent, layers of a model's own kind", refused=True)
def test_layers_of_a_models_own_kind_are_named() -> None:
    model = OWN_KIND.make()
    with pytest.raises(NothingToCompress, match="1 layers are of type DeepseekV4HCACache, which quantcache does not"):
        SpectralCache.self_calibrating(model)


def test_a_config_without_a_cache_is_refused_with_transformers_reason() -> None:
    with pytest.raises(UnsupportedModel, match="transformers cannot build a key/value cache from the config"):
        SpectralCache(calibration_of("llama"), PreTrainedConfig())


# ---------------------------------------------------------------------- probing


@pytest.mark.parametrize(
    ("name", "rotary_dim"), [("gemma4", 32), ("falcon-h1", 16), ("falcon-multi-query", 16), ("deepseek-v2", 0)]
)
def test_rotations_are_those_of_what_is_cached(name: str, rotary_dim: int) -> None:
    assert {layer.rope.rotary_dim for layer in calibration_of(name).layers.values()} == {rotary_dim}


@pytest.mark.parametrize("special", [[1, 128, 129], 128, None])
def test_probing_takes_any_form_of_special_tokens(special: Any) -> None:
    model = BY_NAME["llama"].make(attention="sdpa")
    model.config.eos_token_id = special
    assert len(SpectralCache.self_calibrating(model).spectral_layers) == 2


def test_layers_without_rope_among_others() -> None:
    config = AutoConfig.for_model("llama", **_small(16))
    config.layer_types = ["full_attention", "sliding_attention"]
    config.rope_parameters = {"full_attention": None, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    assert [cache_layout.rope_from_config(config, index).rotary_dim for index in (0, 1)] == [0, 16]


class _OwnCache(LlamaForCausalLM):
    """A model that reads another cache than it is given, as with PEFT's prefix tuning."""

    def forward(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        """Forget the cache."""
        return super().forward(*args, past_key_values=DynamicCache(config=self.config), **kwargs)


@pytest.mark.support("PEFT prefix tuning")
def test_a_model_that_brings_its_own_cache_is_refused_with_a_way_out() -> None:
    model = _OwnCache(model_of("llama").config).eval()
    for refused in (
        lambda: SpectralCache.self_calibrating(model),
        lambda: calibrate(model, random_tokens(1, 100), progress=False),
    ):
        with pytest.raises(UnsupportedModel, match=r"does not use the cache it is given.*from_dynamic_cache"):
            refused()


def test_a_model_that_puts_tokens_before_every_text_is_calibrated_without_them() -> None:
    model = LlamaForCausalLM(model_of("llama").config)
    model.peft_config = {"default": SimpleNamespace(is_prompt_learning=True)}
    with pytest.raises(UnsupportedModel, match=r"before every text.*model.get_base_model\(\)"):
        calibrate(model, random_tokens(1, 100), progress=False)


@pytest.mark.support("PEFT prefix tuning")
@pytest.mark.parametrize("length", [8, 200])
def test_a_prefix_of_keys_and_values_is_compressed_like_a_prompt(length: int) -> None:
    model = model_of("llama")
    prefix = DynamicCache(config=model.config)
    with torch.no_grad():
        model(random_tokens(1, length, seed=4), past_key_values=prefix)
        ids = random_tokens(1, 30)
        calibration = calibration_of("llama")
        caches = [
            SpectralCache.from_dynamic_cache(prefix, calibration, model.config, residual_length=r) for r in (999, 0)
        ]
        expected = model(ids, past_key_values=prefix).logits
        assert torch.equal(model(ids, past_key_values=caches[0]).logits, expected)
        model(ids, past_key_values=caches[1])
    assert all(bool(layer.spans) == (length > 64) for layer in caches[1].spectral_layers) or length == 8


# ---------------------------------------------------------------------- drafts


@pytest.mark.support("assisted decoding with a draft model")
@pytest.mark.parametrize("name", few(["gemma2", "gemma3", "gpt-oss", "llama", "gemma4"], ["gemma3", "llama"]))
def test_enable_on_a_draft_whose_tokens_are_rejected(name: str) -> None:
    target = model_of("llama")
    draft = BY_NAME[name].make(seed=1, attention=BY_NAME[name].implementations[-1])
    draft.generation_config.num_assistant_tokens = 6
    ids = random_tokens(1, 100)
    expected = target.generate(ids, max_new_tokens=12, do_sample=False)
    try:
        target.generate(ids, max_new_tokens=12, do_sample=False, assistant_model=draft)
    except RuntimeError as error:
        pytest.skip(f"transformers itself cannot use this draft: {error}")
    with quantcache.enabled(draft):
        found = target.generate(ids, max_new_tokens=12, do_sample=False, assistant_model=draft)
    assert found.tolist() == expected.tolist()


@pytest.mark.support("assisted decoding with a draft model")
def test_a_draft_of_the_first_layers_only() -> None:
    """``assistant_early_exit``: layers beyond hold nothing that could be cropped."""
    model, ids = BY_NAME["gemma2"].make(), random_tokens(1, 150)
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, **options)
    with quantcache.enabled(model, scalar_calibration(model.config), key_bits="dense", value_bits="dense"):
        found = model.generate(ids, assistant_early_exit=1, **options)
    assert found.tolist() == expected.tolist()


def test_enable_on_a_draft_of_windows_only() -> None:
    target, draft = model_of("llama"), WINDOWS.make(seed=1)
    ids = random_tokens(1, 100)
    expected = target.generate(ids, max_new_tokens=12, do_sample=False)
    with pytest.warns(UserWarning, match="nothing is enabled"), quantcache.enabled(draft):
        found = target.generate(ids, max_new_tokens=12, do_sample=False, assistant_model=draft)
    assert found.tolist() == expected.tolist()


# ---------------------------------------------------------------------- models that also take images


@pytest.mark.support("vision-language models on the command line")
@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_the_command_line_loads_models_that_also_take_images(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from quantcache.cli.loading import load_model

    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    text = _implied(16, 4, 2) | {"vocab_size": len(tokenizer)}
    if kind == "llava":
        vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        vision |= {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8}
        config = AutoConfig.for_model(kind, text_config={"model_type": "llama", **text}, vision_config=vision)
    else:
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
        vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 8}
        config = AutoConfig.for_model(kind, text_config=text | {"rope_parameters": rope}, vision_config=vision)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, loaded = load_model(str(tmp_path))
    calibration = calibrate(model, "word " * 200, loaded, max_tokens=100, progress=False)
    assert list(calibration.layers) == [0, 1]
    assert len(SpectralCache(calibration).spectral_layers) == 2
    estimate_memory(config, "spectral-3", 4096)


@pytest.mark.support("models that compute attention by themselves")
@pytest.mark.parametrize("name", ["falcon-mqa", "gptj", "bloom"])
def test_the_command_line_loads_models_that_compute_attention_by_themselves(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from quantcache.cli.loading import load_model

    model = BY_NAME[name].make()
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(demo_model_path()).save_pretrained(tmp_path)
    loaded, _ = load_model(str(tmp_path), device="cpu")
    tokens = random_tokens(1, 30)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
