"""Caches of earlier prompts: what is found, what is kept, and that whatever goes wrong costs time and nothing else."""

from __future__ import annotations

import copy
import errno
import functools
import os
import random
import resource
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import quantcache
from quantcache.artifact.calibration import Calibration
from quantcache.cache import files as cache_files
from quantcache.cache import prefix_folder
from quantcache.cache.fingerprints import model_digest
from quantcache.cache.prefix_folder import SUFFIX, PrefixFolder
from quantcache.cache.prefix_keys import KnownPrefixes, kept_tokens, key_of, shared_tokens
from quantcache.cache.prefixes import PrefixStore
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.coding.growth import num_blocks
from quantcache.coding.schema import SIDES
from quantcache.common.errors import QuantCacheError, UnsupportedModel
from quantcache.common.writing import PREFIX
from tests.builders import packed_projections, scalar_calibration
from tests.families import FAMILIES, Family, random_tokens, shared_model
from tests.helpers import error, feed

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA, GPT2, GEMMA3 = (next(f for f in FAMILIES if f.name == name) for name in ("llama", "gpt2", "gemma3"))
DENSE = {"key_bits": "dense", "value_bits": "dense"}
GIBI = 1 << 30
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256}

storing = pytest.mark.support("prefixes of earlier prompts (PrefixStore)")
on_disk = pytest.mark.support("prefixes in a folder, after restarts and damage")


def calibration_of(model: PreTrainedModel, seed: int = 0) -> Calibration:
    """A stand-in of the model's geometry."""
    return scalar_calibration(model.config, 3.0, seed)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A model that attends on codes."""
    return LLAMA.make()


@pytest.fixture(scope="module")
def calibration(model: PreTrainedModel) -> Calibration:
    """Its calibration."""
    return calibration_of(model)


@contextmanager
def read_tokens(model: PreTrainedModel) -> Iterator[list[int]]:
    """How many tokens every forward pass was given."""
    counts: list[int] = []
    embeddings = model.get_input_embeddings()

    def forward(tokens: Tensor) -> Tensor:
        counts.append(tokens.shape[-1])
        embedded: Tensor = type(embeddings).forward(embeddings, tokens)
        return embedded

    embeddings.forward = forward  # no hook: those tell models apart
    try:
        yield counts
    finally:
        del embeddings.forward


def generate(model: PreTrainedModel, prompt: Tensor | None, **options: Any) -> tuple[Tensor, Any]:
    """Tokens, and the cache that they came from."""
    options = {"max_new_tokens": 6, "do_sample": False, **options}
    if "attention_mask" not in options:
        options["attention_mask"] = torch.ones_like(prompt)
    output = model.generate(prompt, return_dict_in_generate=True, **options)
    return output.sequences, output.past_key_values


def state(cache: SpectralCache) -> list[Tensor]:
    """Everything that a cache's layers hold."""
    found = []
    for layer in cache.spectral_layers:
        for side in SIDES:
            found += [layer.tails[side], *layer.sinks.values(), *layer.fields(side).values()]
        found.append(torch.tensor([(span.start, span.length, span.anchor) for span in layer.spans]))
    return found


def same(first: SpectralCache, second: SpectralCache) -> bool:
    """Whether two caches hold the same, bit for bit."""
    return equal(state(first), state(second))


def equal(first: Iterable[Tensor], second: Iterable[Tensor]) -> bool:
    """Whether tensors are the same, one by one."""
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def filled(model: PreTrainedModel, calibration: Calibration, tokens: Tensor, *steps: int, **more: Any) -> SpectralCache:
    """A cache of tokens, read in steps."""
    cache = SpectralCache(calibration, model.config, **more)
    feed(model, cache, tokens, steps or (tokens.shape[1],))
    return cache


def prefix_files(folder: Path) -> list[Path]:
    """The prefixes in a folder."""
    return sorted(folder.glob(f"*{SUFFIX}"))


# ---------------------------------------------------------------------- turns of a conversation


@storing
@pytest.mark.parametrize("family", [LLAMA, GPT2, GEMMA3], ids=str)
def test_a_turn_reads_its_new_tokens_only(family: Family) -> None:
    model, store = family.make(), PrefixStore(GIBI)
    calibration = calibration_of(model)
    alone = SpectralCache(calibration, model.config)  # the same conversation on one cache that the caller keeps
    text = expected = random_tokens(1, 230, seed=1)
    with quantcache.enabled(model, calibration, prefixes=store):
        for turn, new in enumerate((230, 17, 90, 1)):
            if turn:
                more = random_tokens(1, new, seed=10 + turn)
                text, expected = torch.cat((text, more), 1), torch.cat((expected, more), 1)
            with read_tokens(model) as counts:
                text, cache = generate(model, text)
            expected, alone = generate(model, expected, past_key_values=alone)
            assert torch.equal(text, expected)
            assert counts[0] == (new + 1 if turn else new)  # the last token of an answer is not in its cache
            assert cache.get_seq_length() == text.shape[1] - 1
            assert same(cache, alone)
    figures = store.statistics()
    assert (figures.requests, figures.hits, figures.failures) == (4, 3, 0)
    assert figures.caches == (1 if family is not GEMMA3 else 4), "a turn replaces the one before, where it can be cut"


@storing
def test_a_prefix_is_shared_not_copied(model: PreTrainedModel, calibration: Calibration) -> None:
    store, tokens = PrefixStore(GIBI), random_tokens(1, 300, seed=3)
    empty = SpectralCache(calibration, model.config)
    assert store.add(tokens[0].tolist(), filled(model, calibration, tokens), model)
    forks = [store.fork([*tokens[0].tolist(), 5], empty, model) for _ in range(3)]
    held = {fork.spectral_layers[0].stores["key"].buffers["codes"].data_ptr() for fork in forks}
    assert len(held) == 1
    assert len({id(fork) for fork in forks}) == 3


# ---------------------------------------------------------------------- cut to what is shared


@storing
@pytest.mark.parametrize("residual", [64, 0])
@pytest.mark.parametrize("shared", [67, 132, 133, 259, 330, 399])
def test_what_is_shared_has_the_blocks_of_a_prompt_read_from_its_start(shared: int, residual: int) -> None:
    model = shared_model(LLAMA)
    calibration, lengths = calibration_of(model), {"residual_length": residual}
    store, tokens = PrefixStore(GIBI), random_tokens(1, 400, seed=4)
    store.add(tokens[0].tolist(), filled(model, calibration, tokens, **lengths), model)
    other = torch.cat((tokens[:, :shared], (tokens[:, shared : shared + 1] - 2) % 250 + 3, random_tokens(1, 60, 5)), 1)
    assert shared_tokens(key_of(tokens[0].tolist()), key_of(other[0].tolist())) == shared
    empty = SpectralCache(calibration, model.config, **lengths)
    cache = store.fork(other[0].tolist(), empty, model)
    if not num_blocks(shared, 4, residual):
        assert cache is None
        return
    assert cache is not None
    keep = cache.get_seq_length()
    assert shared - keep <= residual + 63
    steps = [step for step in (keep, shared - keep) if step]
    fresh = filled(model, calibration, other[:, :shared], *steps, **lengths)
    if keep < shared:
        feed(model, cache, other[:, keep:shared], (shared - keep,))
    cache = cache.fork()  # whose layers have encoded what is due
    fresh = fresh.fork()
    for ours, theirs in zip(cache.spectral_layers, fresh.spectral_layers, strict=True):
        assert ours.spans == theirs.spans
        assert ours.tails["key"].shape == theirs.tails["key"].shape
    # What the first layer caches does not depend on what attention has read: its codes are the same, bit for bit.
    ours, theirs = cache.spectral_layers[0], fresh.spectral_layers[0]
    for side in SIDES:
        assert equal(ours.fields(side).values(), theirs.fields(side).values())
        assert torch.equal(ours.tails[side], theirs.tails[side])


@storing
@pytest.mark.parametrize("shared", [70, 200, 299])
def test_nothing_is_lost_where_nothing_is_compressed(shared: int) -> None:
    model = shared_model(LLAMA)
    calibration = calibration_of(model).with_bits(3.0, key_bits="dense", value_bits="dense")
    store, tokens = PrefixStore(GIBI), random_tokens(1, 300, seed=6)
    options = {"residual_length": 0}
    store.add(tokens[0].tolist(), filled(model, calibration, tokens, **options), model)
    other = torch.cat((tokens[:, :shared], random_tokens(1, 150, seed=7)), 1)
    cache = store.fork(other[0].tolist(), SpectralCache(calibration, model.config, **options), model)
    keep = cache.get_seq_length()
    found = feed(model, cache, other[:, keep:], (other.shape[1] - keep,))
    reference = feed(model.double(), DynamicCache(config=model.config), other, (other.shape[1],))[:, keep:]
    rounding = error(
        feed(model.float(), DynamicCache(config=model.config), other, (other.shape[1],))[:, keep:], reference
    )
    assert error(found, reference) <= 2 * rounding


@storing
def test_a_prompt_again_leaves_a_token_to_read(model: PreTrainedModel, calibration: Calibration) -> None:
    store, prompt = PrefixStore(GIBI), random_tokens(1, 200, seed=8)
    with quantcache.enabled(model, calibration, prefixes=store):
        first = generate(model, prompt)[0]
        with read_tokens(model) as counts:
            again = generate(model, prompt)[0]
    assert 1 <= counts[0] <= 64 + 63 + 1
    assert torch.equal(first[:, :200], again[:, :200])
    assert store.statistics().hits == 1


@storing
def test_the_best_prefix_is_found(calibration: Calibration, model: PreTrainedModel) -> None:
    chance, empty = random.Random(0), SpectralCache(calibration, model.config, residual_length=8)
    known = KnownPrefixes()
    base = [chance.randrange(3, 6) for _ in range(500)]
    texts = []
    for _ in range(60):
        begin = texts[-1] if texts and chance.random() < 0.5 else base
        cut = chance.choice((0, 50, 90, 200, len(begin)))
        texts.append([*begin[:cut], *(chance.randrange(3, 6) for _ in range(chance.randrange(1, 300)))])
    for text in texts:
        known.add("one", key_of(text))
    for text in [*texts, base, base[:150], [*base, 3]]:
        key = key_of(text)
        found, keep = known.best("one", key, empty)
        usable = {
            (kept_tokens(empty, len(other), shared), len(other))
            for other in texts
            if (shared := min(shared_tokens(key_of(other), key), len(text) - 1))
        }
        best = max((kept for kept, whole in usable if kept >= 64 or kept == whole), default=0)
        assert keep == best
        assert (found is None) == (best == 0)


# ---------------------------------------------------------------------- what is never served


def _train(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.01)


def _train_one_token(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight[77, 3] += 1.0  # which no sample of the weights has


def _adapt(model: PreTrainedModel) -> None:
    model.model.layers[0].disable_adapters = True  # as PEFT's layers say that they are switched off


def _steer(model: PreTrainedModel) -> None:
    model.model.layers[0].register_forward_hook(lambda module, args, output: output + 1.0)


def _stretch(model: PreTrainedModel) -> None:
    model.config.rope_parameters = YARN  # as for texts longer than the model was trained on


@storing
@pytest.mark.filterwarnings("ignore::quantcache.CalibrationWarning")
@pytest.mark.parametrize(
    "other",
    [
        {"bits": 2.0},
        {"sink_length": 5},
        {"residual_length": 32},
        {"value_bits": "dense"},
        {"calibration": 1},
        {"change": _train},
        {"change": _train_one_token},
        {"change": _adapt},
        {"change": _steer},
        {"change": _stretch},
        {"change": lambda model: setattr(model.config, "rms_norm_eps", 1e-3)},
        {"change": lambda model: model.train()},
        {"change": lambda model: model.to(torch.bfloat16)},
        {"autocast": True},
    ],
    ids=lambda other: "-".join(getattr(value, "__name__", str(value)) for value in other.values()),
)
def test_what_was_made_otherwise_is_not_served(other: dict[str, Any]) -> None:
    model, store, prompt = LLAMA.make(), PrefixStore(GIBI), random_tokens(1, 200, seed=9)
    calibrations = [calibration_of(model, seed) for seed in (0, 1)]
    with quantcache.enabled(model, calibrations[0], prefixes=store):
        text = generate(model, prompt)[0]
    other = dict(other)
    other.pop("change", lambda model: None)(model)
    autocast, calibration = other.pop("autocast", False), calibrations[other.pop("calibration", 0)]
    casting = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with casting, quantcache.enabled(model, calibration, prefixes=store, **other), read_tokens(model) as counts:
        generate(model, text)
    assert counts[0] == text.shape[1]
    assert store.statistics().hits == 0


@storing
def test_hooks_tell_models_apart(calibration: Calibration, tmp_path: Path) -> None:
    """What was read under a steering vector is served under it, and nowhere else."""
    model, prompt = LLAMA.make(), random_tokens(1, 200, seed=9)
    steer = torch.randn(96, generator=torch.Generator().manual_seed(0))
    store = PrefixStore(GIBI, folder=tmp_path)
    found = []
    for steered in (False, True, False):
        if steered:
            handle = model.model.layers[0].register_forward_hook(lambda module, args, output: output + steer)
        for _ in range(2):
            with quantcache.enabled(model, calibration, prefixes=store), read_tokens(model) as counts:
                generate(model, prompt)
            found.append(counts[0])
        if steered:
            handle.remove()
    assert found == [200, 1, 200, 1, 1, 1]


@storing
def test_weights_packed_into_buffers_tell_models_apart() -> None:
    """As GPTQ and AWQ keep them; of two with the same embeddings and norms one was taken for the other."""
    model = LLAMA.make()
    plain, projection = model_digest(model), model.model.layers[0].self_attn.k_proj
    projection.register_buffer("positions", torch.arange(8)[None], persistent=False)
    assert model_digest(model) == plain
    found = {plain}
    for value in (1, 2):
        projection.register_buffer("qweight", torch.full((4, 8), value, dtype=torch.int32))
        found.add(model_digest(model))
    assert len(found) == 3


class _Dynamic(torch.nn.Module):
    """A projection as torch's dynamic quantization leaves it: no parameters, and a method that gives the weight."""

    def __init__(self, projection: torch.nn.Linear):
        super().__init__()
        scales, zeros = torch.full((projection.out_features,), 0.01), torch.zeros(projection.out_features)
        self.packed = torch.quantize_per_channel(projection.weight.detach(), scales, zeros, 0, torch.qint8)

    def weight(self) -> torch.Tensor:
        """The weight."""
        return self.packed


@storing
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_weights_that_torch_has_packed_tell_models_apart() -> None:
    """Of two models with the same embeddings and norms one was taken for the other."""
    found = set()
    for seed in (1, 2):
        model = LLAMA.make()
        plain, projection = model_digest(model), model.model.layers[0].self_attn.k_proj
        torch.nn.init.normal_(projection.weight, generator=torch.Generator().manual_seed(seed))
        model.model.layers[0].self_attn.k_proj = _Dynamic(projection)
        found |= {plain, model_digest(model)}
    assert len(found) == 3


@storing
def test_weights_that_are_made_of_others_tell_models_apart() -> None:
    """As torchao packs them, without views: no digest could be made."""
    found = set()
    for seed in (1, 2):
        model = LLAMA.make()
        torch.nn.init.normal_(
            model.model.layers[0].self_attn.k_proj.weight, generator=torch.Generator().manual_seed(seed)
        )
        found.add(model_digest(packed_projections(model)))
    assert len(found | {model_digest(LLAMA.make())}) == 3


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256}
LONGROPE |= {"short_factor": [1.0] * 32, "long_factor": [8.0] * 32}


@storing
@pytest.mark.parametrize(
    ("rope", "longest", "reused"),
    [(DYNAMIC, 256, 0), (LONGROPE, 1024, 0), (YARN, 1024, 200)],
    ids=["dynamic", "longrope", "yarn"],
)
def test_rotations_that_depend_on_the_length_of_the_text(rope: dict[str, Any], longest: int, reused: int) -> None:
    """A short text's keys are no beginning of a text long enough that the model rotates all of it otherwise."""
    more = {"rope_parameters": rope, "max_position_embeddings": longest}
    stretched = replace(LLAMA, name="stretched", config=LLAMA.config | more).make()
    calibration, text = calibration_of(stretched), random_tokens(1, 300, seed=5)
    empty = SpectralCache(calibration, stretched.config, **DENSE)
    expected = feed(stretched, empty.fork(), text, (300,))[:, -1:]
    store, cache = PrefixStore(GIBI), empty.fork()
    feed(stretched, cache, text[:, :200], (200,))
    assert store.add(text[0].tolist(), cache, stretched)
    # between texts that are both short enough nothing is lost
    assert store.fork(text[0, :220].tolist(), empty, stretched) is not None
    found = store.fork(text[0].tolist(), empty, stretched)
    assert (0 if found is None else found.get_seq_length()) == reused
    go_on = empty.fork() if found is None else found
    held = go_on.get_seq_length()
    assert error(feed(stretched, go_on, text[:, held:], (300 - held,))[:, -1:], expected) < 1e-4
    # nor is a long text's beginning one of a short text
    assert store.add(text[0].tolist(), go_on, stretched) == bool(reused)


BATCH = random_tokens(2, 150, seed=11)
LEFT = torch.ones_like(BATCH)
LEFT[1, :20] = 0


@storing
@pytest.mark.parametrize(
    "call",
    [
        {"prompt": BATCH},
        {"prompt": BATCH, "attention_mask": LEFT},
        {"prompt": BATCH[1:], "attention_mask": LEFT[1:]},
        {"prompt": torch.cat((torch.full((1, 9), 2), BATCH[:1]), 1), "attention_mask": None},  # 2 pads
        {"prompt": BATCH[:1], "num_beams": 2},
        {"prompt": BATCH[:1], "num_return_sequences": 2, "do_sample": True},
        {"prompt": BATCH[:1], "prompt_lookup_num_tokens": 2},
        {"prompt": BATCH[:1], "output_hidden_states": True},
        {"prompt": BATCH[:1], "position_ids": torch.arange(150)[None] + 7},
        {"prompt": None, "inputs_embeds": torch.ones(1, 150, 96), "attention_mask": None},
    ],
    ids=lambda call: "-".join(call),
)
def test_calls_that_tokens_alone_do_not_decide(model: PreTrainedModel, calibration: Calibration, call: Any) -> None:
    store = PrefixStore(GIBI)
    with quantcache.enabled(model, calibration, prefixes=store):
        generate(model, BATCH[:1])
        generate(model, BATCH[1:])
        before = store.statistics()
        torch.manual_seed(0)
        found = generate(model, **call)[0]
        assert store.statistics() == before
    with quantcache.enabled(model, calibration):
        torch.manual_seed(0)
        assert torch.equal(found, generate(model, **call)[0])


@storing
def test_prompts_that_are_read_in_chunks(model: PreTrainedModel, calibration: Calibration) -> None:
    """transformers 5.17 reads all of a prompt in chunks, behind a cache that holds its beginning: twice the text."""
    texts = BATCH[:1, :130], BATCH[:1, :150]
    with quantcache.enabled(model, calibration, **DENSE):
        expected = [generate(model, text, prefill_chunk_size=40)[0] for text in texts]
    with quantcache.enabled(model, calibration, prefixes=PrefixStore(GIBI), **DENSE):
        assert all(map(torch.equal, (generate(model, text, prefill_chunk_size=40)[0] for text in texts), expected))


@storing
def test_a_generate_that_leaves_the_prompt_out(calibration: Calibration) -> None:
    """What it gave was taken for what is cached: a text that began so was read as if it had begun like the prompt."""
    model, store, prompt = LLAMA.make(), PrefixStore(GIBI), BATCH[:1, :30]
    plain = model.generate

    def answer(inputs: Tensor, **kwargs: Any) -> Tensor:
        return plain(inputs, attention_mask=torch.ones_like(inputs), do_sample=False, **kwargs)[:, inputs.shape[1] :]

    model.generate = answer
    with quantcache.enabled(model, calibration, prefixes=store, **DENSE):
        found = model.generate(prompt, max_new_tokens=100)
        again = model.generate(found, max_new_tokens=5)
        longer = torch.cat((prompt, found[:, :1]), 1)
        with read_tokens(model) as counts:
            model.generate(longer, max_new_tokens=1)
    assert torch.equal(again, answer(found, max_new_tokens=5))
    assert counts[0] == 1, "of the prompt alone it is known what is cached"


@storing
def test_an_own_cache_wins(model: PreTrainedModel, calibration: Calibration) -> None:
    store = PrefixStore(GIBI)
    with quantcache.enabled(model, calibration, prefixes=store):
        generate(model, BATCH[:1], past_key_values=SpectralCache(calibration, model.config))
        generate(model, BATCH[:1], use_cache=False)
    assert store.statistics() == PrefixStore(GIBI).statistics()


@storing
def test_caches_that_tokens_do_not_tell_are_not_kept(model: PreTrainedModel, calibration: Calibration) -> None:
    store = PrefixStore(GIBI)
    rows, padded, cut = (SpectralCache(calibration, model.config, residual_length=0) for _ in range(3))
    feed(model, rows, BATCH, (150,))
    feed(model, padded, BATCH[:1], (150,), [20])
    feed(model, cut, BATCH[:1], (150,))
    cut.crop(-40)  # inside a block
    for cache in (rows, padded, cut, SpectralCache(calibration, model.config)):
        assert not store.add(BATCH[0].tolist(), cache, model)
    with pytest.raises(QuantCacheError, match="the cache holds 110 tokens, only 100 are named"):
        store.add(BATCH[0, :100].tolist(), cut, model)
    assert store.statistics().caches == 0


def test_tokens_as_a_tokenizer_gives_them(model: PreTrainedModel, calibration: Calibration) -> None:
    store, cache, empty = PrefixStore(GIBI), *(SpectralCache(calibration, model.config) for _ in range(2))
    model(BATCH[:1, :100], past_key_values=cache)
    assert store.add(BATCH[:1, :100], cache, model)
    for prompt in (BATCH[:1], BATCH[0], BATCH[0].tolist()):
        found = store.fork(prompt, empty, model)
        assert found is not None
        assert found.get_seq_length() == 100
    for use in (lambda: store.add(BATCH[:2], cache, model), lambda: store.fork(BATCH[:2], empty, model)):
        with pytest.raises(ValueError, match=r"one row of token ids, \[T\] or \[1, T\], got shape \[2, "):
            use()
    for halves in ([0.5, 1.5], BATCH[0].float()):  # were cut to whole numbers, and found what others had read
        with pytest.raises(ValueError, match="token ids must be whole numbers, got float"):
            store.fork(halves, empty, model)  # type: ignore[arg-type]


@pytest.mark.support("prefixes without a calibration, or of a model that remembers requests", refused=True)
def test_what_cannot_have_prefixes(model: PreTrainedModel, calibration: Calibration) -> None:
    with pytest.raises(QuantCacheError, match="prefixes need a calibration"):
        quantcache.enable(model, prefixes=PrefixStore(GIBI))
    remembering = LLAMA.make()
    remembering.model.rope_deltas = None
    with pytest.raises(UnsupportedModel, match="model keeps rope_deltas of the last request"):
        quantcache.enable(remembering, calibration, prefixes=PrefixStore(GIBI))
    prompted = LLAMA.make()
    prompted.peft_config = {"default": SimpleNamespace(is_prompt_learning=True)}
    with pytest.raises(UnsupportedModel, match="puts tokens of its own before every prompt"):
        quantcache.enable(prompted, calibration, prefixes=PrefixStore(GIBI))
    offloaded = LLAMA.make()
    offloaded.lm_head.weight = torch.nn.Parameter(offloaded.lm_head.weight.to("meta"))
    with pytest.raises(QuantCacheError, match=r"lm_head.weight is offloaded, .*: leave out model=, or prefixes="):
        quantcache.enable(offloaded, calibration, prefixes=PrefixStore(GIBI))
    with pytest.raises(TypeError, match="prefixes must be a PrefixStore, got str"):
        quantcache.enable(model, calibration, prefixes="prefixes/")
    with pytest.raises(QuantCacheError, match="this PrefixStore has no folder"):
        PrefixStore(GIBI).save()
    for name in ("max_bytes", "folder_bytes"):
        with pytest.raises(ValueError, match=f"{name} must not be negative, got -1"):
            PrefixStore(**{"max_bytes": 0, name: -1})
    with pytest.raises(ValueError, match="folder_bytes must be given where max_bytes is 0: prefixes could"):
        PrefixStore(0, "prefixes")
    with pytest.raises(ValueError, match="max_bytes must not be negative, got nan"):
        PrefixStore(float("nan"))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="max_bytes must be a number of bytes, such as 2 << 30, got '2GB'"):
        PrefixStore("2GB")  # type: ignore[arg-type]
    assert "generate" not in vars(model)


class _Prompted:
    """PEFT's wrapper around a model while it generates with learned tokens before every prompt."""

    peft_config: ClassVar = {"default": SimpleNamespace(is_prompt_learning=True)}

    def __init__(self, model: PreTrainedModel):
        self.plain = model.prepare_inputs_for_generation

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Where PEFT puts the learned tokens before the others."""
        prepared: dict[str, Any] = self.plain(*args, **kwargs)
        return prepared


@storing
def test_learned_tokens_before_every_prompt(calibration: Calibration) -> None:
    """The cache of the model that PEFT's prompt tuning wraps does not begin with the prompt."""
    model, store, prompt = LLAMA.make(), PrefixStore(GIBI), random_tokens(1, 150, seed=9)
    with quantcache.enabled(model, calibration, prefixes=store), read_tokens(model) as counts:
        model.prepare_inputs_for_generation = _Prompted(model).prepare_inputs_for_generation
        for _ in range(2):
            generate(model, prompt)
    assert counts.count(150) == 2
    assert store.statistics().caches == 0


@storing
@pytest.mark.parametrize("given", ["adapter_names", "alora_offsets"])
def test_adapters_that_a_call_names(calibration: Calibration, given: str) -> None:
    """PEFT's ``generate(adapter_names=...)`` and activated LoRA: weights do not tell what has read a prompt."""
    model, store, prompt = LLAMA.make(), PrefixStore(GIBI), random_tokens(1, 150, seed=9)
    with quantcache.enabled(model, calibration, prefixes=store), read_tokens(model) as counts:
        generate(model, prompt)
        naming = functools.partial(lambda module, args, kwargs, **_: None, **{given: ["__base__"]})
        handle = model.model.layers[0].register_forward_pre_hook(naming, with_kwargs=True)
        generate(model, prompt)
        handle.remove()
        generate(model, prompt)
    assert counts.count(150) == 2
    assert (store.statistics().requests, store.statistics().hits) == (2, 1)


# ---------------------------------------------------------------------- bounds, use and threads


@storing
def test_the_least_recently_used_go_first(model: PreTrainedModel, calibration: Calibration) -> None:
    texts = [random_tokens(1, 200, seed=20 + i) for i in range(4)]
    caches = [filled(model, calibration, text) for text in texts]
    each = caches[0].memory().total + 4 * 200
    store, empty = PrefixStore(3 * each), SpectralCache(calibration, model.config)

    def asks(index: int) -> bool:
        return store.fork([*texts[index][0].tolist(), 5], empty, model) is not None

    for text, cache in zip(texts[:3], caches, strict=False):
        assert store.add(text[0].tolist(), cache, model)
    assert store.statistics().bytes == 3 * each
    assert asks(0)
    store.add(texts[3][0].tolist(), caches[3], model)
    assert [asks(index) for index in range(4)] == [True, False, True, True]
    assert store.statistics().evicted == 1
    assert not PrefixStore(each - 1).add(texts[0][0].tolist(), caches[0], model)


@storing
def test_eviction_does_not_touch_what_is_in_use(model: PreTrainedModel, calibration: Calibration) -> None:
    tokens, more = random_tokens(1, 260, seed=30), random_tokens(1, 200, seed=31)
    cache = filled(model, calibration, tokens)
    store = PrefixStore(cache.memory().total + 4 * 260)
    store.add(tokens[0].tolist(), cache, model)
    fork = store.fork([*tokens[0].tolist(), 5], SpectralCache(calibration, model.config), model)
    expected = copy.deepcopy(fork)
    feed(model, fork, more[:, :50], (50,))
    other = random_tokens(1, 260, seed=32)
    store.add(other[0].tolist(), filled(model, calibration, other), model)
    store.clear()
    feed(model, fork, more[:, 50:], (150,))
    feed(model, expected, more, (50, 150))
    assert same(fork, expected)
    feed(model, cache, more, (50, 150))
    assert same(cache, expected), "what was added may be used on"


@pytest.mark.slow
@storing
def test_threads(model: PreTrainedModel, calibration: Calibration, tmp_path: Path) -> None:
    calibration = calibration.with_bits(3.0, key_bits="dense", value_bits="dense")  # reuse changes nothing but the time
    shared = random_tokens(1, 150, seed=40)
    prompts = [torch.cat((shared, random_tokens(1, 20 + 7 * i, seed=41 + i)), 1) for i in range(6)] * 2
    with quantcache.enabled(model, calibration):
        expected = [generate(model, prompt)[0] for prompt in prompts]
    each = filled(model, calibration, prompts[0]).memory().total
    store = PrefixStore(3 * each, tmp_path, 4 * each)  # so that prefixes come and go
    with quantcache.enabled(model, calibration, prefixes=store), ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompt: generate(model, prompt)[0], prompts))
    assert equal(found, expected)
    figures = store.statistics()
    assert figures.requests == len(prompts)
    assert figures.hits >= len(prompts) // 2
    assert figures.bytes <= 3 * each
    assert figures.file_bytes <= 4 * each
    assert figures.failures == 0


@storing
def test_one_prefix_in_many_threads(model: PreTrainedModel, calibration: Calibration) -> None:
    tokens, store = random_tokens(1, 300, seed=50), PrefixStore(GIBI)
    store.add(tokens[0].tolist(), filled(model, calibration, tokens), model)
    prompt, more, empty = (
        [*tokens[0].tolist(), 5],
        random_tokens(1, 150, seed=51),
        SpectralCache(calibration, model.config),
    )
    meet = threading.Barrier(4)

    def go_on(_: int) -> SpectralCache:
        meet.wait()
        fork = store.fork(prompt, empty, model)
        feed(model, fork, more, (70, 80))
        return fork

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(go_on, range(4)))
    assert all(same(found[0], fork) for fork in found)
    assert same(found[0], filled(model, calibration, torch.cat((tokens, more), 1), 300, 70, 80))


class _Cancelled(Exception):
    pass


class _Streamer:
    """Ends a generation from within, as a client that goes away does."""

    def __init__(self, after: int):
        self.left = after

    def put(self, value: Tensor) -> None:
        self.left -= 1
        if self.left < 0:
            raise _Cancelled

    def end(self) -> None:
        pass


@storing
@pytest.mark.parametrize("after", [0, 1, 2, 70])
def test_a_cancelled_call(model: PreTrainedModel, calibration: Calibration, after: int) -> None:
    store, prompt = PrefixStore(GIBI), random_tokens(1, 250, seed=60)
    with quantcache.enabled(model, calibration, prefixes=store):
        with pytest.raises(_Cancelled):
            generate(model, prompt, streamer=_Streamer(after), max_new_tokens=90)
        other = torch.cat((prompt, random_tokens(1, 10, seed=61)), 1)
        with read_tokens(model) as counts:
            generate(model, other)
    assert counts[0] == (260 if after == 0 else 10 if after < 3 else 10 + 250 - (4 + 64 * 2)), counts[0]


# ---------------------------------------------------------------------- folder


@on_disk
@pytest.mark.parametrize("family", [LLAMA, GEMMA3], ids=str)
def test_prefixes_survive_a_restart(family: Family, tmp_path: Path) -> None:
    model = family.make()
    calibration, tokens = calibration_of(model), random_tokens(1, 300, seed=70)
    prompt, empty = [*tokens[0].tolist(), 5], SpectralCache(calibration, model.config)
    store = PrefixStore(GIBI, tmp_path)
    store.add(tokens[0].tolist(), filled(model, calibration, tokens), model)
    expected = store.fork(prompt, empty, model)
    assert not prefix_files(tmp_path)
    assert store.save() == 1
    assert store.save() == 1
    again = PrefixStore(GIBI, tmp_path)
    assert again.statistics().files == 1
    found = again.fork(prompt, empty, model)
    assert same(found, expected)
    more = random_tokens(1, 100, seed=71)
    assert torch.equal(feed(model, found, more, (100,)), feed(model, expected, more, (100,)))
    assert again.statistics().caches == 1, "it is in memory again"
    assert again.fork(prompt[:-1], SpectralCache(calibration, model.config, bits=2.0), model) is None
    assert SpectralCache.load(prefix_files(tmp_path)[0], calibration).get_seq_length() == 300, "it is a saved cache"
    again.clear()
    assert not prefix_files(tmp_path)


@on_disk
def test_what_leaves_memory_comes_back(model: PreTrainedModel, calibration: Calibration, tmp_path: Path) -> None:
    texts = [random_tokens(1, 200, seed=80 + i) for i in range(3)]
    caches, empty = [filled(model, calibration, text) for text in texts], SpectralCache(calibration, model.config)
    store = PrefixStore(caches[0].memory().total + 4 * 200, tmp_path)
    for text, cache in zip(texts, caches, strict=True):
        store.add(text[0].tolist(), cache, model)
    assert (store.statistics().caches, store.statistics().files) == (1, 2)
    for text, cache in zip(texts, caches, strict=True):
        assert same(store.fork([*text[0].tolist(), 5], empty, model), cache)
    assert store.statistics().hits == 3
    assert store.statistics().caches == 1
    tiny = PrefixStore(0, tmp_path / "all", GIBI)  # nothing in memory
    assert tiny.add(texts[0][0].tolist(), caches[0], model)
    assert same(tiny.fork([*texts[0][0].tolist(), 5], empty, model), caches[0])


def _flip(data: bytes) -> bytes:
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


@on_disk
@pytest.mark.parametrize("restart", [True, False], ids=["restart", "running"])
@pytest.mark.parametrize(
    "damage",
    [
        _flip,
        lambda data: data[: len(data) // 2],
        lambda data: data[:300],
        lambda data: b"",
        lambda data: b"\0" * len(data),
    ],
    ids=["flipped", "half", "header", "empty", "zeros"],
)
def test_damaged_files_are_read_again(damage: Any, restart: bool, tmp_path: Path) -> None:
    model, tokens = shared_model(LLAMA), random_tokens(1, 200, seed=90)
    calibration = calibration_of(model)
    prompt, empty = [*tokens[0].tolist(), 5], SpectralCache(calibration, model.config)
    store = PrefixStore(0, tmp_path, GIBI)
    store.add(tokens[0].tolist(), filled(model, calibration, tokens), model)
    (path,) = prefix_files(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    if restart:
        store = PrefixStore(0, tmp_path, GIBI)
    assert store.fork(prompt, empty, model) is None
    assert store.add(tokens[0].tolist(), filled(model, calibration, tokens), model)
    assert same(store.fork(prompt, empty, model) or empty, filled(model, calibration, tokens))


def test_a_file_that_cannot_be_opened_just_now_stays(tmp_path: Path) -> None:
    """As where all handles of the process are taken: nobody has seen what is in it."""
    model, tokens = shared_model(LLAMA), random_tokens(1, 200, seed=90)
    calibration = calibration_of(model)
    prompt, empty = [*tokens[0].tolist(), 5], SpectralCache(calibration, model.config)
    store = PrefixStore(0, tmp_path, GIBI)
    store.add(tokens[0].tolist(), filled(model, calibration, tokens), model)
    with no_handles_left():
        assert store.fork(prompt, empty, model) is None
    assert store.statistics().failures == store.statistics().files == 1
    again = PrefixStore(0, tmp_path, GIBI)
    assert same(again.fork(prompt, empty, model), filled(model, calibration, tokens))


@contextmanager
def no_handles_left() -> Iterator[None]:
    """Let this process open no further file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@on_disk
def test_a_file_under_anothers_name(model: PreTrainedModel, calibration: Calibration, tmp_path: Path) -> None:
    texts, empty = [random_tokens(1, 200, seed=95 + i) for i in range(2)], SpectralCache(calibration, model.config)
    store = PrefixStore(0, tmp_path, GIBI)
    for text in texts:
        store.add(text[0].tolist(), filled(model, calibration, text), model)
    first, second = prefix_files(tmp_path)
    first.write_bytes(second.read_bytes())
    found = [store.fork([*text[0].tolist(), 5], empty, model) for text in texts]
    assert [cache is None for cache in found].count(True) == 1
    assert store.statistics().failures == 1


@on_disk
@pytest.mark.parametrize("where", ["full", "read-only", "gone"])
def test_a_folder_that_cannot_be_written(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = shared_model(LLAMA), tmp_path / "prefixes"
    calibration, text = calibration_of(model), random_tokens(1, 200, seed=99)
    store = PrefixStore(0, folder, GIBI)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC if where == "full" else errno.EROFS, os.strerror(errno.ENOSPC))

    if where == "gone":
        folder.rmdir()
    else:
        monkeypatch.setattr(cache_files, "save_file" if where == "full" else "partial_folder", fail)
    with quantcache.enabled(model, calibration, prefixes=store):
        found = generate(model, text)[0]
    with quantcache.enabled(model, calibration):
        assert torch.equal(found, generate(model, text)[0])
    figures = store.statistics()
    assert (figures.failures, figures.files) == ((0, 1) if where == "gone" else (1, 0))
    assert figures.caches == 0
    assert not list(folder.glob(f"{PREFIX}*")), "nothing half-written is left"


@on_disk
def test_a_folder_stays_within_its_bytes(model: PreTrainedModel, calibration: Calibration, tmp_path: Path) -> None:
    texts, empty = [random_tokens(1, 200, seed=110 + i) for i in range(5)], SpectralCache(calibration, model.config)
    caches = [filled(model, calibration, text) for text in texts]
    probe = PrefixStore(0, tmp_path / "probe", GIBI)
    probe.add(texts[0][0].tolist(), caches[0], model)
    each = probe.statistics().file_bytes
    store = PrefixStore(0, tmp_path, 3 * each + each // 2)
    for index, (text, cache) in enumerate(zip(texts, caches, strict=True)):
        store.add(text[0].tolist(), cache, model)
        os.utime(store.folder.file_of(*_only(store, text)), ns=(index, index))  # clocks are too coarse for this test
        if index == 2:
            assert store.fork([*texts[0][0].tolist(), 5], empty, model) is not None
    assert store.statistics().files == 3
    assert store.statistics().file_bytes <= 3 * each + each // 2
    assert _known(store) == 3, "of what has left the folder nothing stays in memory"
    at_once = PrefixStore(5 * cache.memory().total, tmp_path / "at once", each + each // 2)
    for text, cache in zip(texts, caches, strict=True):
        at_once.add(text[0].tolist(), cache, model)
    at_once.max_bytes = 2 * cache.memory().total
    at_once.add(random_tokens(1, 200, seed=120)[0].tolist(), caches[0], model)  # several leave, one has room
    assert _known(at_once) == at_once.statistics().caches + at_once.statistics().files == 2
    restarted = PrefixStore(0, tmp_path, 3 * each + each // 2)
    kept = [restarted.fork([*text[0].tolist(), 5], empty, model) is not None for text in texts]
    assert kept == [True, False, False, True, True]
    assert PrefixStore(0, tmp_path, each + each // 2).statistics().files == 1
    assert PrefixStore(0, tmp_path / "none", each // 2).add(texts[0][0].tolist(), caches[0], model) is False


def _known(store: PrefixStore) -> int:
    return sum(map(len, store._known.values()))


@on_disk
def test_what_another_process_has_removed_is_forgotten(
    model: PreTrainedModel, calibration: Calibration, tmp_path: Path
) -> None:
    texts = [random_tokens(1, 200, seed=110 + i) for i in range(3)]
    caches = [filled(model, calibration, text) for text in texts]
    PrefixStore(0, tmp_path, GIBI).add(texts[0][0].tolist(), caches[0], model)
    store = PrefixStore(0, tmp_path, GIBI)
    store.add(texts[1][0].tolist(), caches[1], model)
    assert _known(store) == 2
    for file in prefix_files(tmp_path):
        file.unlink()
    store.add(texts[2][0].tolist(), caches[2], model)
    assert _known(store) == 1
    store.clear()
    assert not store._known
    assert not store.folder.gone()


def _only(store: PrefixStore, text: Tensor) -> tuple[str, bytes]:
    (name,) = store._known
    return name, key_of(text[0].tolist())


@on_disk
@pytest.mark.parametrize("what", ["add", "save", "fork"])
def test_what_is_on_its_way_does_not_outlive_a_clear(
    what: str, model: PreTrainedModel, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write or read of the folder that began before ``clear()`` and ends after it."""
    tokens, empty = random_tokens(1, 200, seed=130), SpectralCache(calibration, model.config)
    cache, prompt = filled(model, calibration, tokens), [*tokens[0].tolist(), 5]
    if what == "fork":
        PrefixStore(0, tmp_path, GIBI).add(prompt[:-1], cache, model)
    store = PrefixStore(0 if what == "add" else GIBI, tmp_path, GIBI)
    last = "read_prefix" if what == "fork" else "write_cache"  # of a file
    works = getattr(prefix_folder, last)

    def clear_behind(*args: Any, **kwargs: Any) -> Any:
        result = works(*args, **kwargs)
        store.clear()
        return result

    if what == "save":
        assert store.add(prompt[:-1], cache, model)
    monkeypatch.setattr(prefix_folder, last, clear_behind)
    if what == "fork":
        assert store.fork(prompt, empty, model) is not None, "the request came before"
    else:
        assert not (store.save() if what == "save" else store.add(prompt[:-1], cache, model))
    monkeypatch.undo()
    assert store.fork(prompt, empty, model) is None
    assert (store.statistics().caches, prefix_files(tmp_path)) == (0, [])
    assert store.add(prompt[:-1], cache, model)
    assert store.fork(prompt, empty, model) is not None, "what comes later is kept"


@on_disk
def test_a_save_says_what_has_no_room(
    model: PreTrainedModel, calibration: Calibration, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, probe = PrefixStore(GIBI, tmp_path / "none", 0), PrefixStore(0, tmp_path / "probe", GIBI)
    for index in range(3):
        text = random_tokens(1, 200, seed=140 + index)
        cache = filled(model, calibration, text)
        store.add(text[0].tolist(), cache, model)
        probe.add(text[0].tolist(), cache, model)
    assert store.save() == 0
    assert len(caplog.records) == 1
    assert "3 of 3 prefixes" in caplog.text
    store.folder = PrefixFolder(tmp_path / "two", probe.statistics().file_bytes * 5 // 6)
    assert store.save() == 2
    assert "1 of 3 prefixes" in caplog.text
    assert len(prefix_files(tmp_path / "two")) == store.statistics().files == 2


@on_disk
def test_killed_writers_leave_nothing(model: PreTrainedModel, calibration: Calibration, tmp_path: Path) -> None:
    import platform

    dead = tmp_path / f"{PREFIX}{platform.node()}-999999999-x"
    dead.mkdir()
    (dead / f"half{SUFFIX}").write_bytes(b"half")
    store, text = PrefixStore(0, tmp_path, GIBI), random_tokens(1, 200, seed=120)
    assert store.statistics().files == 0
    store.add(text[0].tolist(), filled(model, calibration, text), model)
    assert not dead.exists()
    assert store.statistics().files == 1
