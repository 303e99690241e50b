"""Caches for every generate() of a model, without the caller passing one."""

from __future__ import annotations

import asyncio
import copy
import io
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextIteratorStreamer,
    pipeline,
)

import quantcache
from quantcache import data
from quantcache.artifact.calibration import Calibration
from quantcache.cache import enabling as contexts
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.common import compat
from quantcache.common.errors import ArtifactError, CalibrationMismatch, QuantCacheError, UnsupportedModel
from tests.builders import PeftWrapper, llama_config, scalar_calibration
from tests.families import FAMILIES, random_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA, GEMMA3, GPT2 = (next(f for f in FAMILIES if f.name == name) for name in ("llama", "gemma3", "gpt2"))
PROMPT = random_tokens(2, 122, seed=12)
SHORT = {"residual_length": 0, "bits": 2.0}

enabling = pytest.mark.support("enabled(), enable() and disable()")
finding = pytest.mark.support("enable(): a calibration found by the model's id")


@pytest.fixture
def model() -> PreTrainedModel:
    """A model as a user loads it, with stock attention."""
    return LLAMA.make(attention="sdpa")


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    """Of the right geometry; its codes are coarse, so that no compressed generation equals a dense one."""
    return Calibration.synthetic(LLAMA.make().config, 2.0)


def generate(model: PreTrainedModel, prompt: Tensor = PROMPT, **options: object) -> tuple[Tensor, object]:
    """Tokens, and the cache that they came from."""
    options = {"max_new_tokens": 12, "do_sample": False, **options}
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), return_dict_in_generate=True, **options)
    return output.sequences, output.past_key_values


def explicit(model: PreTrainedModel, calibration: Calibration, **options: object) -> Tensor:
    """Tokens from a cache that the caller passes."""
    cache = SpectralCache(calibration, model.config, **{**SHORT, **options})
    return generate(model, past_key_values=cache)[0]


@enabling
@pytest.mark.parametrize("family", [LLAMA, GPT2, GEMMA3], ids=str)
def test_every_generate_has_a_fresh_cache(family: object) -> None:
    model = family.make(attention="sdpa")
    calibration = scalar_calibration(model.config, 2.0)
    dense = generate(model)[0]
    with quantcache.enabled(model, calibration, **SHORT) as same:
        assert same is model
        assert model.config._attn_implementation == "spectral"
        first, cache = generate(model)
        second, other = generate(model)
    assert isinstance(cache, SpectralCache)
    assert cache is not other
    assert cache.get_seq_length() == other.get_seq_length() == PROMPT.shape[1] + 11
    assert all(layer.spans for layer in cache.spectral_layers)
    assert torch.equal(first, second)
    assert not torch.equal(first, dense)
    assert torch.equal(first, explicit(family.make(), calibration))
    assert cache.spectral_layers[0].codecs["key"] is other.spectral_layers[0].codecs["key"]
    found, cache = generate(model)
    assert type(cache) is DynamicCache
    assert torch.equal(found, dense)
    assert model.config._attn_implementation == "sdpa"
    assert not {"generate", "_quantcache_generate"} & vars(model).keys()


@enabling
def test_what_the_caller_asks_for_wins(model: PreTrainedModel, calibration: Calibration) -> None:
    dense = generate(model)[0]
    with quantcache.enabled(model, calibration, **SHORT):
        own = DynamicCache(config=model.config)
        found, cache = generate(model, past_key_values=own)
        assert cache is own
        assert torch.equal(found, dense)
        for options in (
            {"use_cache": False},
            {"generation_config": GenerationConfig(use_cache=False, max_new_tokens=12)},
        ):
            found, cache = generate(model, **options)
            assert cache is None
            assert torch.equal(found, dense)
        found, cache = generate(model, cache_implementation="static")
        assert not isinstance(cache, SpectralCache)
        assert torch.equal(found, dense)
        model.generation_config.use_cache = False
        assert generate(model)[1] is None
        assert isinstance(generate(model, use_cache=True)[1], SpectralCache)


@enabling
def test_what_the_caller_asks_for_wins_behind_a_wrapper(model: PreTrainedModel, calibration: Calibration) -> None:
    """Its options are not always called kwargs: others were passed over, and the caller's cache with them."""
    plain, own = model.generate, DynamicCache(config=model.config)

    def wrapper(inputs: torch.Tensor, **options: Any) -> Any:
        return plain(inputs, **options)

    model.generate = wrapper
    with quantcache.enabled(model, calibration, **SHORT):
        assert isinstance(generate(model)[1], SpectralCache)
        assert generate(model, past_key_values=own)[1] is own
        assert generate(model, use_cache=False)[1] is None
        assert not isinstance(generate(model, cache_implementation="static")[1], SpectralCache)


@enabling
def test_contexts_nest_and_survive_exceptions(model: PreTrainedModel, calibration: Calibration) -> None:
    coarse, fine = (explicit(LLAMA.make(), calibration, bits=bits) for bits in (1.0, 4.0))
    assert not torch.equal(coarse, fine)

    def fail_inside() -> None:
        with quantcache.enabled(model, calibration, residual_length=0, bits=1.0):
            assert torch.equal(generate(model)[0], coarse)
            raise ZeroDivisionError

    with quantcache.enabled(model, calibration, residual_length=0, bits=4.0):
        with pytest.raises(ZeroDivisionError):
            fail_inside()
        assert torch.equal(generate(model)[0], fine)
    assert type(generate(model)[1]) is DynamicCache
    assert "generate" not in vars(model)


@enabling
def test_enable_until_disable(model: PreTrainedModel, calibration: Calibration, tmp_path: Path) -> None:
    coarse, fine = (explicit(LLAMA.make(), calibration, bits=bits) for bits in (1.0, 4.0))
    quantcache.disable(model)  # nothing to undo
    quantcache.enable(model, calibration, residual_length=0, bits=1.0)
    assert torch.equal(generate(model)[0], coarse)
    calibration.save_pretrained(tmp_path)
    quantcache.enable(model, tmp_path, residual_length=0, bits=4.0)  # replaces the other
    assert torch.equal(generate(model)[0], fine)
    with quantcache.enabled(model, calibration, residual_length=0, bits=1.0):
        quantcache.enable(model, calibration, residual_length=0, bits=4.0)
        assert torch.equal(generate(model)[0], coarse), "a context of one's own is nearer"
        quantcache.disable(model)
        assert torch.equal(generate(model)[0], coarse)
    assert type(generate(model)[1]) is DynamicCache
    assert "generate" not in vars(model)


@pytest.mark.support("enabled(), enable() and disable()", refused=True)
def test_a_model_is_saved_whole_once_nothing_is_enabled(model: PreTrainedModel, calibration: Calibration) -> None:
    with (
        quantcache.enabled(model, calibration),
        pytest.raises(QuantCacheError, match=r"cannot be pickled: call quantcache.disable\(model\) first"),
    ):
        torch.save(model, io.BytesIO())
    torch.save(model, io.BytesIO())


@enabling
def test_without_a_calibration(model: PreTrainedModel) -> None:
    expected = generate(LLAMA.make(), past_key_values=SpectralCache.self_calibrating(LLAMA.make(), residual_length=0))
    with quantcache.enabled(model, residual_length=0):
        found, cache = generate(model)
        assert torch.equal(found, expected[0])
        generate(model, random_tokens(1, 130, seed=50))
        again, other = generate(model)
    assert torch.equal(again, found), "a request's fit is its own"
    assert cache.spectral_layers[0].codecs["key"] is not other.spectral_layers[0].codecs["key"]


@finding
def test_a_calibration_is_found_by_the_models_id(caplog: pytest.LogCaptureFixture) -> None:
    """The bundled one, which the log and the returned value name; its bits are the caller's."""
    model = AutoModelForCausalLM.from_pretrained(data.demo_model_path())
    with caplog.at_level(logging.INFO, "quantcache"):
        used = quantcache.enable(model, bits=4.0)
    assert repr(used) == "Calibration(wiki11m, 6 layers, 4 bits)"
    assert "calibration: the one that comes with quantcache, Calibration(wiki11m" in caplog.text
    assert isinstance(generate(model, max_new_tokens=1)[1], SpectralCache)
    assert quantcache.enable(model, quality="near-lossless").bits == pytest.approx(2.0, abs=0.01)
    given = Calibration.for_model("wiki11m")
    assert quantcache.enable(model, given) is given
    quantcache.disable(model)


@finding
def test_a_models_folder_may_carry_its_calibration(calibration: Calibration, tmp_path: Path) -> None:
    LLAMA.make().save_pretrained(tmp_path)
    calibration.save_pretrained(tmp_path / "quantcache")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert quantcache.enable(model).bits == pytest.approx(2.0)
    (tmp_path / "quantcache" / "calibration.safetensors").write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match=r"calibration\.safetensors"):
        quantcache.enable(model)


@finding
def test_without_one_caches_fit_themselves_and_say_so(model: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    model.config._name_or_path = "some-org/some-model"
    assert quantcache.enable(model) is None
    assert "quantcache calibrate some-org/some-model --text FILE -o calibration/" in caplog.text
    assert "hub=True also looks on the Hub" in caplog.text
    assert "every cache fits itself to its prompt" in caplog.text


def test_options_where_caches_fit_themselves(model: PreTrainedModel) -> None:
    """They are those of a SpectralCache, whether there is a calibration or not; a TypeError named an inner class."""
    for options in ({"strict": True}, {"bits": None}, {"key_bits": None}):
        with quantcache.enabled(model, residual_length=0, **options):
            assert generate(model, max_new_tokens=1)[1].calibration is None
    for option in ({"key_bits": 4}, {"value_bits": "dense"}, {"min_bits": 1}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} needs a calibration, .*: give bits"):
            quantcache.enable(model, **option)


@pytest.mark.support("enable(hub=True) without a calibration anywhere", refused=True)
def test_where_one_is_needed_and_none_is_found(model: PreTrainedModel) -> None:
    model.config._name_or_path = "some-org/some-model"
    make = "'quantcache calibrate some-org/some-model --text FILE -o calibration/' makes one"
    with pytest.raises(ArtifactError, match=f"the index has no calibration of some-org/some-model.*{make}"):
        quantcache.enable(model, quality="small")
    with pytest.raises(ArtifactError, match=f"no calibration of some-org/some-model comes with quantcache, .*{make}"):
        quantcache.enable(model, hub=True)  # tests are offline
    model.config._name_or_path = ""
    with pytest.raises(ArtifactError, match="a model without a name has no calibration"):
        quantcache.enable(model, hub=True)
    assert "generate" not in vars(model)


@enabling
@pytest.mark.parametrize("attention", ["eager", "spectral"])
def test_other_attention_is_left_alone(attention: str, calibration: Calibration) -> None:
    model = LLAMA.make(attention=attention)
    with quantcache.enabled(model, calibration, **SHORT):
        assert model.config._attn_implementation == attention
        assert isinstance(generate(model)[1], SpectralCache)
    assert model.config._attn_implementation == attention
    model = LLAMA.make(attention="sdpa")
    with quantcache.enabled(model, calibration, attention=False, **SHORT):
        assert model.config._attn_implementation == "sdpa"
        assert isinstance(generate(model)[1], SpectralCache)


@enabling
def test_attention_chosen_meanwhile_is_left_alone(model: PreTrainedModel, calibration: Calibration) -> None:
    for chosen in ("eager", "sdpa"):
        with quantcache.enabled(model, calibration, **SHORT):
            model.set_attn_implementation(chosen)
            with quantcache.enabled(model, calibration, **SHORT):
                assert model.config._attn_implementation == {"eager": "eager", "sdpa": "spectral"}[chosen]
        assert model.config._attn_implementation == chosen


@enabling
def test_a_wrapper_is_what_it_is_around(model: PreTrainedModel, calibration: Calibration) -> None:
    """As torch.compile's and PEFT's are; disabling one did nothing."""
    wrapper = torch.compile(model, backend="eager")
    for enabled, other in ((model, wrapper), (wrapper, model)):  # the wrapper was said to have no forward pass
        quantcache.enable(enabled, calibration, **SHORT)
        assert isinstance(generate(wrapper)[1], SpectralCache)
        assert isinstance(generate(model)[1], SpectralCache)
        quantcache.disable(other)
        assert type(generate(wrapper)[1]) is DynamicCache
        assert model.config._attn_implementation == "sdpa"


@enabling
def test_a_model_that_leaves_its_wrapper(model: PreTrainedModel, calibration: Calibration) -> None:
    """As ``merge_and_unload()`` gives it back: nothing was enabled on it, and its attention stayed switched."""
    wrapper = PeftWrapper(model)
    quantcache.enable(wrapper, calibration, **SHORT)
    assert isinstance(generate(wrapper)[1], SpectralCache)
    assert isinstance(generate(model)[1], SpectralCache)
    quantcache.disable(model)
    assert type(generate(wrapper)[1]) is DynamicCache
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("name", "value"), [("use_cache", False), ("cache_implementation", "static")])
def test_settings_of_a_checkpoint_that_win(
    name: str, value: object, model: PreTrainedModel, calibration: Calibration
) -> None:
    """Nothing was compressed, and nothing said so."""
    setattr(model.generation_config, name, value)
    said = f"model.generation_config has {name}={value!r}, which wins over what is enabled: nothing is compressed"
    with pytest.warns(UserWarning, match=said) as warned, quantcache.enabled(model, calibration, **SHORT):
        assert not isinstance(generate(model)[1], SpectralCache)
    with pytest.warns(UserWarning, match=said) as more:
        quantcache.enable(model, calibration, **SHORT)
    assert {each.filename for each in (*warned, *more)} == {__file__}


class _Parts(PreTrainedModel):
    """A model of several that generate, as Qwen2.5-Omni is: its generate() hands on what it does not know to each."""

    _supports_sdpa = True

    def __init__(self, model: PreTrainedModel):
        super().__init__(model.config)
        self.thinker, self.talker = model, copy.deepcopy(model)

    def generate(self, *args: object, **kwargs: object) -> object:
        """Both."""
        return self.thinker.generate(*args, **kwargs), self.talker.generate(*args, **kwargs)


def test_a_model_of_several_that_generate(model: PreTrainedModel, calibration: Calibration) -> None:
    whole = _Parts(model)
    refused = r"_Parts has no forward pass of its own.*give model.thinker or model.talker"
    for attention in (True, False):
        with pytest.raises(UnsupportedModel, match=refused):
            quantcache.enable(whole, calibration, attention=attention)
    with pytest.raises(UnsupportedModel, match=refused):
        quantcache.calibrate(whole, PROMPT, progress=False)
    with quantcache.enabled(whole.thinker, calibration, **SHORT):
        found = whole.generate(PROMPT, return_dict_in_generate=True, max_new_tokens=2)
    assert [type(each.past_key_values) for each in found] == [SpectralCache, DynamicCache]


def test_what_does_not_generate(model: PreTrainedModel, calibration: Calibration) -> None:
    wrapper = torch.nn.DataParallel(model)
    pipe = SimpleNamespace(model=model)
    within = (
        (wrapper, r"the model inside, \.module"),
        (pipe, r"the model inside, \.model"),
        (model.model, "one with a"),
    )
    for given, inside in within:
        with pytest.raises(UnsupportedModel, match=rf"a \w+ has no generate\(\): give {inside}"):
            quantcache.enable(given, calibration)


def test_enabling_that_fails_leaves_nothing(
    model: PreTrainedModel, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention stayed switched, and the model's generate() replaced."""

    def fail(*args: object, **kwargs: object) -> None:
        raise MemoryError

    monkeypatch.setattr(type(model), "forward", fail)
    with pytest.raises(MemoryError):
        quantcache.enable(model, calibration)
    assert model.config._attn_implementation == "sdpa"
    assert not {"generate", "_quantcache_generate"} & vars(model).keys()


@enabling
def test_bad_options_are_refused_at_once(model: PreTrainedModel, calibration: Calibration) -> None:
    with pytest.raises(TypeError, match="attention must be True or False, got 'sdpa'"):
        quantcache.enable(model, calibration, attention="sdpa")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bits"):
        quantcache.enable(model, calibration, bits=9.0)
    with pytest.raises(CalibrationMismatch):
        quantcache.enable(model, Calibration.synthetic(llama_config(32), 2.0))
    assert "generate" not in vars(model)


@pytest.mark.support("encoder-decoder", refused=True)
def test_encoder_decoder_is_refused(calibration: Calibration) -> None:
    config = AutoConfig.for_model(
        "t5", vocab_size=64, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = AutoModelForSeq2SeqLM.from_config(config)
    for given in (calibration, None):
        with pytest.raises(UnsupportedModel, match="encoder-decoder"):
            quantcache.enable(model, given)


@enabling
def test_copies_and_other_wrappers(model: PreTrainedModel, calibration: Calibration) -> None:
    calls = []
    plain = model.generate

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return plain(*args, **kwargs)

    model.generate = counted
    with quantcache.enabled(model, calibration, **SHORT):
        copied = copy.deepcopy(model)
        assert isinstance(generate(model)[1], SpectralCache)
        assert type(generate(copied)[1]) is DynamicCache
        with quantcache.enabled(copied, calibration, **SHORT):
            assert isinstance(generate(copied)[1], SpectralCache)
    assert model.generate is counted
    assert len(calls) == 1


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
@enabling
def test_copies_have_nothing_enabled(duplicate: Any, model: PreTrainedModel, calibration: Calibration) -> None:
    """A shallow copy shared the model's requests and their settings, and a deep copy kept attention on codes."""
    quantcache.enable(model, calibration, **SHORT)
    copied = duplicate(model)
    assert copied.config._attn_implementation == ("spectral" if copied.config is model.config else "sdpa")
    copied.generation_config = GenerationConfig(max_new_tokens=3, pad_token_id=0)
    found = copied.generate(PROMPT, return_dict_in_generate=True)
    assert (found.sequences.shape[1], type(found.past_key_values)) == (PROMPT.shape[1] + 3, DynamicCache)
    quantcache.disable(copied)
    assert isinstance(generate(model)[1], SpectralCache)
    quantcache.enable(copied, calibration, **SHORT)
    quantcache.disable(model)  # disabling the copy failed with a KeyError then
    assert type(generate(model)[1]) is DynamicCache
    assert isinstance(generate(copied)[1], SpectralCache)
    quantcache.disable(copied)
    torch.save(duplicate(copied), io.BytesIO())
    assert model.config._attn_implementation == copied.config._attn_implementation == "sdpa"
    assert not vars(copied).keys() - vars(LLAMA.make()).keys()


@pytest.mark.support("enabled(): concurrent requests on one model")
def test_requests_in_threads(model: PreTrainedModel, calibration: Calibration) -> None:
    prompts = [random_tokens(1, 100 + 9 * i, seed=60 + i) for i in range(6)]
    with quantcache.enabled(model, calibration, **SHORT):
        expected = [generate(model, prompt)[0] for prompt in prompts]
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda prompt: generate(model, prompt), prompts))
    assert all(torch.equal(tokens, wanted) for (tokens, _), wanted in zip(found, expected, strict=True))
    assert len({id(cache) for _, cache in found}) == len(prompts)


def test_an_interrupted_context_leaves_nothing_enabled(
    model: PreTrainedModel, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Entered:
        calls = 0

        def get(self) -> tuple[object, ...]:
            return ()

        def set(self, marks: object) -> None:
            self.calls += 1
            if self.calls == 1:
                raise KeyboardInterrupt

    before = compat.attention_implementations(model.config)
    monkeypatch.setattr(contexts, "_entered", Entered())
    with pytest.raises(KeyboardInterrupt), quantcache.enabled(model, calibration):
        pass
    assert not contexts.is_enabled(model)
    assert compat.attention_implementations(model.config) == before


@pytest.mark.support("enabled(): concurrent requests on one model")
def test_a_context_in_each_thread(model: PreTrainedModel, calibration: Calibration) -> None:
    rates = (1.0, 4.0, 2.0)
    expected = [explicit(LLAMA.make(), calibration, bits=bits) for bits in rates]
    meet = threading.Barrier(len(rates))

    def request(bits: float) -> Tensor:
        with quantcache.enabled(model, calibration, residual_length=0, bits=bits):
            meet.wait()
            found = generate(model)[0]
            meet.wait()
        return found

    with ThreadPoolExecutor(len(rates)) as pool:
        found = list(pool.map(request, rates))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert "generate" not in vars(model)


@pytest.mark.support("enabled(): concurrent requests on one model")
@pytest.mark.parametrize("where", ["in the task", "in a thread"])
def test_a_context_in_each_task(where: str, model: PreTrainedModel, calibration: Calibration) -> None:
    """Tasks take turns in one thread: the context that was entered last is not each one's own."""
    rates = (1.0, 4.0, 2.0)
    expected = [explicit(LLAMA.make(), calibration, bits=bits) for bits in rates]

    async def request(bits: float, meet: asyncio.Barrier) -> Tensor:
        with quantcache.enabled(model, calibration, residual_length=0, bits=bits):
            await meet.wait()
            found = generate(model)[0] if where == "in the task" else (await asyncio.to_thread(generate, model))[0]
            await meet.wait()
        return found

    async def serve() -> list[Tensor]:
        meet = asyncio.Barrier(len(rates))
        return await asyncio.gather(*(request(bits, meet) for bits in rates))

    found = asyncio.run(serve())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert "generate" not in vars(model)


# ---------------------------------------------------------------------- what calls generate()


@pytest.fixture
def talker(demo_model: PreTrainedModel, demo_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The bundled tokenizer with a chat template."""
    tokenizer = copy.deepcopy(demo_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}assistant:"
    )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


STORY = "The river rises in the mountains north of the old town and flows through three valleys. " * 8


@pytest.mark.slow
@pytest.mark.support("pipeline and chat template")
def test_pipeline(demo_model: PreTrainedModel, talker: PreTrainedTokenizerBase) -> None:
    calibration = Calibration.synthetic(demo_model.config, 2.0)
    speak = pipeline("text-generation", model=demo_model, tokenizer=talker)
    options = {"max_new_tokens": 4, "do_sample": False}
    chat = [{"role": "user", "content": STORY}]
    for prompt in (STORY, chat, [STORY, "Short. " * 40]):
        more = {"batch_size": 2} if isinstance(prompt, list) and isinstance(prompt[0], str) else {}
        dense = speak(prompt, **options, **more)
        passed = SpectralCache(calibration, demo_model.config, **SHORT)
        given = None if more else speak(prompt, past_key_values=passed, **options)
        with quantcache.enabled(demo_model, calibration, **SHORT):
            found = speak(prompt, **options, **more)
        assert found != dense
        assert given is None or found == given
        assert speak(prompt, **options, **more) == dense


@pytest.mark.support("TextIteratorStreamer")
def test_streamer_in_another_thread(demo_model: PreTrainedModel, talker: PreTrainedTokenizerBase) -> None:
    calibration = Calibration.synthetic(demo_model.config, 2.0)
    inputs = talker(STORY, return_tensors="pt")
    options = {"max_new_tokens": 8, "do_sample": False}
    with quantcache.enabled(demo_model, calibration, **SHORT):
        expected = demo_model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        streamer = TextIteratorStreamer(talker, skip_prompt=True)
        thread = threading.Thread(target=demo_model.generate, kwargs={**inputs, **options, "streamer": streamer})
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert text == talker.decode(expected)
