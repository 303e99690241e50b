"""A layer's keys and values: read like any tensor, and refused by name where they would be changed."""

from __future__ import annotations

import copy
import io
import pickle  # noqa: TID251
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.integrations import flex_attention as flex
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantcache.attention.lazy import LazyKV
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.common import compat
from quantcache.common.errors import QuantCacheError
from tests.builders import llama_config, scalar_calibration
from tests.families import FAMILIES, VOCABULARY, random_tokens, shared_model
from tests.helpers import error, feed

CONFIG = llama_config(layers=1)
LLAMA = FAMILIES[0]

lengths = pytest.mark.parametrize("length", [40, 200], ids=["all recent", "packed"])


def filled(length: int, dtype: torch.dtype = torch.float32) -> SpectralCache:
    """A cache of some random tokens."""
    generator = torch.Generator().manual_seed(0)
    states = (torch.randn(1, 2, length, 64, generator=generator).to(dtype) for _ in range(2))
    cache = SpectralCache(scalar_calibration(CONFIG, 4.0), CONFIG)
    cache.update(*states, 0)
    cache.layers[0].flush()
    return cache


def times(x: Tensor) -> None:
    x *= 2


def divided(x: Tensor) -> None:
    x /= 2


def assigned(x: Tensor) -> None:
    x[:, :, 20:30] = 0


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "setitem": assigned,
    "imul": times,
    "idiv": divided,
    "mul_": lambda x: x.mul_(2),
    "copy_": lambda x: x.copy_(torch.zeros(x.shape)),
    "zero_": lambda x: x.zero_(),
    "index_fill_": lambda x: x.index_fill_(2, torch.tensor([1]), 0.0),
    "masked_fill_": lambda x: x.masked_fill_(torch.ones(x.shape, dtype=torch.bool), 0.0),
    "squeeze_": lambda x: x.squeeze_(),
    "set_": lambda x: x.set_(torch.zeros(3)),
    "resize_": lambda x: x.resize_(3),
    "share_memory_": lambda x: x.share_memory_(),
    "requires_grad_": lambda x: x.requires_grad_(),
    "requires_grad": lambda x: setattr(x, "requires_grad", True),
    "data": lambda x: setattr(x, "data", torch.zeros(3)),
    "grad": lambda x: setattr(x, "grad", torch.zeros(x.shape)),
    "data.mul_": lambda x: x.data.mul_(2),
    "detach().mul_": lambda x: x.detach().mul_(2),
    "out": lambda x: torch.add(torch.ones(x.shape), 1, out=x),
    "out of two": lambda x: torch.max(x.clone(), 2, out=(x[:, :, 0], torch.zeros(1, 2, 64, dtype=torch.int64))),
    "foreach": lambda x: torch._foreach_mul_([x], 2),
    "inplace": lambda x: F.relu(x, inplace=True),
    "inplace, by place": lambda x: F.relu(x, True),
    "init": lambda x: torch.nn.init.zeros_(x),
    "apply_": lambda x: x.apply_(lambda _: 0.0),
    "view.zero_": lambda x: x[:, :, 20:30].zero_(),
    "view of a view": lambda x: x[0].flatten()[3:].zero_(),
    "view setitem": lambda x: assigned(x[:, :1]),
    "view inplace, by place": lambda x: F.relu(x[:, :, 20:30], True),
    "transposed": lambda x: x.mT.mul_(2),
    "row": lambda x: next(iter(x)).mul_(2),
    "unbind": lambda x: x.unbind(1)[1].mul_(2),
    "view.share_memory_": lambda x: x[0].share_memory_(),
}


def is_refused(change: Callable[[Tensor], Any], x: Tensor) -> bool:
    """Whether a change ends in the error that names it and the way out."""
    try:
        change(x)
    except QuantCacheError as error:
        return re.search(r"cannot be changed in place \([\w.]+\): .*from_dynamic_cache", str(error)) is not None
    return False


@pytest.mark.support("keys and values changed in place", refused=True)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@lengths
def test_changes_are_refused(length: int, mode: Callable[[], Any]) -> None:
    with mode():
        cache = filled(length)
        layer = cache.layers[0]
        before = {side: getattr(layer, side).clone() for side in ("keys", "values")}
        for side in before:
            for name, change in CHANGES.items():
                assert is_refused(change, getattr(layer, side)), name
                assert torch.equal(getattr(layer, side), before[side]), name


@pytest.mark.support("keys and values changed in place", refused=True)
def test_what_update_returns_is_not_changed_either() -> None:
    cache = filled(200)
    with torch.no_grad():
        lazy = cache.update(torch.randn(1, 2, 1, 64), torch.randn(1, 2, 1, 64), 0)[0]
        for name in ("setitem", "imul", "mul_", "set_", "data", "out", "foreach", "inplace, by place", "share_memory_"):
            with pytest.raises(QuantCacheError, match="cannot be changed in place"):
                CHANGES[name](lazy)
        assert lazy.to(lazy.dtype) is lazy  # a model's cast leaves attention on codes possible
        assert lazy.dense_ is None


@pytest.mark.support("keys and values changed in place", refused=True)
def test_the_way_out() -> None:
    """An edited DynamicCache, packed again, does to the logits what editing a dense cache does."""
    model, tokens = shared_model(LLAMA), random_tokens(1, 210, seed=2)
    calibration = scalar_calibration(model.config, 8.0)

    @torch.no_grad()
    def logits(cache: DynamicCache, edited: bool) -> Tensor:
        model(tokens[:, :200], past_key_values=cache)
        if edited and isinstance(cache, SpectralCache):
            dense = DynamicCache(cache)
            dense.layers[0].values[:, :, 20:60] = 0
            cache = SpectralCache.from_dynamic_cache(dense, calibration, model.config)
        elif edited:
            cache.layers[0].values[:, :, 20:60] = 0
        return model(tokens[:, 200:], past_key_values=cache).logits

    untouched, right = (logits(DynamicCache(config=model.config), edited) for edited in (False, True))
    found, same = (logits(SpectralCache(calibration, model.config), edited) for edited in (True, False))
    lost = float((same - untouched).norm())
    assert float((found - right).norm()) < 2 * lost < float((right - untouched).norm())


def through_torch_save(x: Tensor) -> Tensor:
    """What comes back from a file without pickled classes."""
    file = io.BytesIO()
    torch.save({"x": x}, file)
    file.seek(0)
    loaded: Tensor = torch.load(file, weights_only=True)["x"]  # noqa: TID251
    return loaded


READERS: dict[str, Callable[[Tensor], Any]] = {
    "cpu": lambda x: x.cpu(),
    "float": lambda x: x.float(),
    "to dtype": lambda x: x.to(x.dtype),
    "to device": lambda x: x.to("cpu"),
    "contiguous": lambda x: x.contiguous(),
    "clone": lambda x: x.clone(),
    "double": lambda x: x.double(),
    "requires_grad_(False)": lambda x: x.requires_grad_(False),
    "numpy": lambda x: torch.from_numpy(x.numpy()),
    "asarray": lambda x: torch.from_numpy(np.asarray(x)),
    "asarray of a dtype": lambda x: torch.from_numpy(np.asarray(x, dtype=np.float64)),
    "float().cpu().numpy()": lambda x: torch.from_numpy(x.float().cpu().numpy()),
    "view numpy": lambda x: torch.from_numpy(x[:].numpy()),
    "tolist": lambda x: torch.tensor(x.tolist()),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "deepcopy of a view": lambda x: copy.deepcopy(x[:]),
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "torch.save": through_torch_save,
    "torch.save of a view": lambda x: through_torch_save(x[:]),
    "safetensors": lambda x: load(save({"x": x}))["x"],
    "safetensors, contiguous": lambda x: load(save({"x": x.contiguous()}))["x"],
    "from_dlpack": torch.from_dlpack,
    "numpy.from_dlpack": lambda x: torch.from_numpy(np.from_dlpack(x)),
    "cat": lambda x: torch.cat((x, x[:, :, :0]), dim=2),
    "stack": lambda x: torch.stack((x, x))[0],
    "copy_ from it": lambda x: torch.zeros(x.shape).copy_(x),
    "assignment from it": lambda x: torch.zeros(x.shape).index_copy_(2, torch.arange(x.shape[2]), x),
    "out of it": lambda x: torch.add(x, 0, out=torch.zeros(x.shape)),
    "vmap": lambda x: torch.vmap(lambda y: y + 0)(x),
    "gradient": lambda x: torch.func.grad(lambda y: (y * x).sum())(torch.ones(x.shape)),
    "torch.tensor": lambda x: torch.tensor(x),
}


@pytest.mark.support("keys and values to numpy, pickle, torch.save and safetensors")
@pytest.mark.filterwarnings("ignore:To copy construct")
@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@lengths
def test_readers_give_plain_tensors(length: int, mode: Callable[[], Any]) -> None:
    with mode():
        layer = filled(length).layers[0]
        expected = layer.values.clone()
        assert type(expected) is Tensor
        for name, reader in READERS.items():
            found = reader(layer.values)
            assert type(found) is Tensor, name
            # In inference mode torch 2.11 gives plain tensors no gradient either.
            right = reader(expected) if name == "gradient" else expected
            assert torch.equal(found.float(), right), name
            if not found.is_inference() or torch.is_inference_mode_enabled():
                found.zero_()  # the caller's own
            assert torch.equal(layer.values, expected), name


@pytest.mark.support("keys and values to numpy, pickle, torch.save and safetensors")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    with torch.no_grad():
        layer = filled(200, dtype).layers[0]
        expected = layer.keys.clone()
        assert expected.dtype == dtype
        for reader in (through_torch_save, copy.deepcopy, lambda x: load(save({"x": x}))["x"]):
            assert torch.equal(reader(layer.keys), expected)
        assert torch.equal(torch.from_numpy(layer.keys.float().numpy()), expected.float())


@pytest.mark.support("keys and values to numpy, pickle, torch.save and safetensors")
def test_metadata_decodes_nothing() -> None:
    keys = filled(200).layers[0].keys
    assert isinstance(keys, LazyKV)
    assert (keys.shape, keys.dtype, keys.device.type, keys.ndim) == ((1, 2, 200, 64), torch.float32, "cpu", 4)
    assert (keys.numel(), keys.nbytes, keys.is_contiguous(), len(keys)) == (25600, 102400, True, 1)
    assert keys.stride() == (25600, 12800, 64, 1)
    assert (keys.requires_grad, keys.is_leaf, keys.layout, keys.element_size()) == (False, True, torch.strided, 4)
    assert "shape=[1, 2, 200, 64]" in f"{keys} {keys!r}"
    assert keys.dense_ is None
    assert torch.equal(keys, keys.clone())
    assert keys.untyped_storage().nbytes() == 102400
    assert keys.data_ptr() == keys.data_ptr() != 0


@pytest.mark.support("keys and values to numpy, pickle, torch.save and safetensors", refused=True)
def test_to_dlpack_is_refused() -> None:
    """It asks for an address without dispatching; what it gave had address 0, and reading that ended the process."""
    keys = filled(200).layers[0].keys
    with pytest.raises(RuntimeError, match="data pointer"):
        torch.utils.dlpack.to_dlpack(keys)
    assert torch.equal(torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(keys.clone())), keys.clone())


@pytest.mark.support("iteration over dense keys and values")
@lengths
def test_iteration_gives_copies(length: int) -> None:
    cache = filled(length)
    expected = cache.layers[0].keys.clone()
    for keys, values, _ in cache:
        assert type(keys) is type(values) is Tensor
        keys.zero_()
    assert torch.equal(cache.layers[0].keys, expected)


@pytest.mark.support("flex attention")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("heads", [4, 6], ids=["grouped by torch", "repeated by transformers"])
@lengths
def test_flex_attention_reads_dense_tensors(length: int, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a compiled function of its own, and no graph takes a tensor without storage."""
    plain = torch.nn.attention.flex_attention.flex_attention

    def uncompiled(*args: Tensor, training: bool = False, **kwargs: Any) -> Any:
        return plain(*args, **kwargs)

    monkeypatch.setattr(flex, "compile_friendly_flex_attention", uncompiled)
    cache, query = filled(length), torch.randn(1, heads, 1, 64)
    attend = ALL_ATTENTION_FUNCTIONS["flex_attention"]
    states = [torch.randn(1, 2, 1, 64) for _ in range(2)]
    expected = cache.fork().update(*states, 0)
    found = attend(torch.nn.Linear(1, 1), query, *cache.update(*states, 0), None, scaling=0.1)[0]
    dense = [each.clone() for each in expected]
    reference = F.scaled_dot_product_attention(query, *dense, scale=0.1, enable_gqa=True)
    torch.testing.assert_close(found.transpose(1, 2), reference)
    assert attend(torch.nn.Linear(1, 1), query, *dense, None, scaling=0.1)[0].equal(found)


# ---------------------------------------------------------------------- models that read them as they like

ON_THEIR_OWN: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 64, "n_head": 4, "n_layer": 2},
    "codegen": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 256, "n_ctx": 256, "rotary_dim": 8},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    "xglm": {"d_model": 64, "attention_heads": 4, "num_layers": 2, "ffn_dim": 64},
}


def on_its_own(kind: str, attention: str) -> PreTrainedModel:
    """A model that computes attention by itself, with weights that do not depend on what it is told of attention."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, initializer_range=0.12, **ON_THEIR_OWN[kind])
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.mark.support("models that compute attention by themselves")
@pytest.mark.parametrize("kind", ON_THEIR_OWN)
def test_models_that_compute_attention_by_themselves(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    tokens, steps = random_tokens(2, 170, seed=4), (150, 1, 19)
    theirs, ours = on_its_own(kind, "eager"), on_its_own(kind, "spectral")
    for make in (DynamicCache, lambda config: SpectralCache(scalar_calibration(config), config, residual_length=0)):
        for padding in ((), (0, 20)):
            expected = feed(theirs, make(config=theirs.config), tokens, steps, padding)
            assert torch.equal(feed(ours, make(config=ours.config), tokens, steps, padding), expected)
    assert "compute attention by themselves" in caplog.text


def test_models_whose_code_cannot_be_read_are_given_our_mask() -> None:
    """As in a notebook: transformers takes none of them for one whose attention can be replaced."""
    config = type("NotebookConfig", (LlamaConfig,), {})
    own = {"config_class": config, "__module__": "a notebook", "_can_set_attn_implementation_cached_value": None}
    model = type("NotebookForCausalLM", (LlamaForCausalLM,), own)
    assert not model._can_set_attn_implementation()
    assert not compat.attends_by_itself(config)
    assert compat.attends_by_itself(on_its_own("bloom", "eager").config_class)


@pytest.mark.slow
@pytest.mark.support("models that compute attention by themselves")
def test_models_that_compute_attention_by_themselves_compiled() -> None:
    tokens, model = random_tokens(2, 40, seed=4), on_its_own("bloom", "spectral")
    expected = feed(on_its_own("bloom", "eager"), DynamicCache(config=model.config), tokens, (40,))
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")(tokens, past_key_values=DynamicCache(config=model.config))
    assert error(compiled.logits.double(), expected) < 1e-5
