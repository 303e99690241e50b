"""The demo: the bundled model in bfloat16, once with its cache as transformers keeps it and once packed."""

from __future__ import annotations

import copy
import functools
import random
import time
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache, PreTrainedModel

from quantcache import data
from quantcache.accounting import CacheMemory, measure
from quantcache.attention.function import register_attention
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.calibration.calibrator import calibrate
from quantcache.common import compat
from quantcache.common.progress import progress_bar, without_loading_bars
from quantcache.common.sequences import text_tokens
from quantcache.evaluation.feeding import encode, feed
from quantcache.evaluation.fidelity import measure_fidelity
from quantcache.evaluation.methods import parse_methods
from quantcache.evaluation.needle import NAMES, NeedleFormat

SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 20}
"""How text is continued: the most likely words of a model this small go round in circles."""

CHUNK = 128
"""Tokens fed at once when a cache is filled; each chunk reads what the earlier ones left in the cache."""


@dataclass(frozen=True)
class DemoSettings:
    """How much the demo does.

    Attributes:
        bits: Mean code width.
        calibration_tokens: Tokens calibrated on.
        context: Tokens of a window of the evaluation text.
        windows: Number of windows measured.
        recall_context: Tokens of the context in which the secret code is planted, and from which text is generated.
        new_tokens: Tokens of text generated.
        seed: Seed of the calibration and of the code.
    """

    bits: float = 3.0
    calibration_tokens: int = 4096
    context: int = 2048
    windows: int = 2
    recall_context: int = 1900
    new_tokens: int = 48
    seed: int = 0


def run_demo(settings: DemoSettings | None = None, progress: bool = True) -> dict[str, Any]:
    """Calibrate, measure, generate and retrieve with the bundled model. Uses no network and writes no file.

    Args:
        settings: How much to do.
        progress: Show progress on stderr.

    Returns:
        Every figure and both texts, ready for JSON. ``dense_bytes``, ``cache_bytes`` and the two ``bits_per_element``
        are those of two caches of the same ``cached_tokens`` tokens.
    """
    settings = settings or DemoSettings()
    started = time.perf_counter()
    register_attention()
    tokenizer, exact, model = _load()
    calibration = calibrate(
        exact,
        data.calibration_text(),
        tokenizer,
        settings.bits,
        max_tokens=settings.calibration_tokens,
        seed=settings.seed,
        predict=False,  # the cost is measured below
        progress=progress,
    )
    tokens = text_tokens(tokenizer, data.evaluation_text())
    measured = tokens[: settings.windows * settings.context]
    code = "".join(random.Random(settings.seed).choices("0123456789", k=5))
    context, question = _plant(tokenizer, tokens[len(measured) :][: settings.recall_context], code)

    with progress_bar(progress) as bar:
        task = bar.add_task("measuring", total=len(measured) + 2 * (len(context) + 2 * settings.new_tokens))
        advance = functools.partial(bar.advance, task)
        methods = parse_methods(["dense", f"spectral-{settings.bits}"], model.config, calibration)
        found = measure_fidelity(model, measured, methods, context=settings.context, on_progress=advance)
        dense, spectral = found.values()
        bar.update(task, description="generating")
        caches: dict[str, Cache] = {
            "dense": DynamicCache(config=model.config),
            "spectral": SpectralCache(calibration, model.config),
        }
        used = {
            name: _use(model, tokenizer, cache, context, question, settings, advance) for name, cache in caches.items()
        }
    packed = used["spectral"].memory
    return {
        "model": data.BUNDLED_MODEL,
        "dtype": str(model.dtype).removeprefix("torch."),
        "context": settings.context,
        "calibration_tokens": calibration.metadata.recipe["tokens"],
        "evaluated_tokens": spectral.tokens,
        "cached_tokens": packed.tokens,
        "dense_bytes": used["dense"].memory.total,
        "cache_bytes": packed.total,
        "constants_bytes": packed.constants,
        "bits_per_element": packed.bits_per_element,
        "bits_per_element_total": packed.bits_per_element_total,
        "kl_mean": spectral.kl_mean,
        "kl_p99": spectral.kl_p99,
        "top1_agreement": spectral.top1_agreement,
        "perplexity_dense": dense.perplexity,
        "perplexity_spectral": spectral.perplexity,
        "needle": code,
        "needle_found": code in used["spectral"].answer,
        "needle_found_dense": code in used["dense"].answer,
        "answer_dense": used["dense"].answer,
        "answer_spectral": used["spectral"].answer,
        "text_dense": used["dense"].text,
        "text_spectral": used["spectral"].text,
        "seconds": time.perf_counter() - started,
    }


@dataclass(frozen=True)
class _Use:
    """What came of one cache: its size when it held the context, a continuation, and an answer."""

    memory: CacheMemory
    text: str
    answer: str


def _use(
    model: Any, tokenizer: Any, cache: Cache, context: Tensor, question: Tensor, settings: DemoSettings, advance: Any
) -> _Use:
    feed(model, cache, context[None, :-1], CHUNK, advance)
    memory = measure(cache)
    torch.manual_seed(settings.seed)  # both caches draw the same random numbers
    text = _continue(model, tokenizer, context, copy.deepcopy(cache), settings.new_tokens, **SAMPLING)
    advance(settings.new_tokens)
    answer = _continue(model, tokenizer, torch.cat((context, question)), cache, 8)
    advance(settings.new_tokens)
    return _Use(memory, text, answer)


def _load() -> tuple[Any, PreTrainedModel, PreTrainedModel]:
    """Tokenizer and model, in float32 and in bfloat16: many CPUs take minutes for a backward pass in the latter."""
    path = data.demo_model_path()
    with without_loading_bars():
        tokenizer = AutoTokenizer.from_pretrained(path)
        exact = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="spectral").eval()
    multiply_in_float32(model)
    return tokenizer, exact, model


def multiply_in_float32(model: PreTrainedModel) -> None:
    """Spare CPUs their bfloat16 matrix products, which many of them do ten times slower than float32 ones.

    Inputs, weights and outputs stay rounded to bfloat16 and sums are taken in float32, as hardware with bfloat16
    products does; only the order of summation differs.

    Args:
        model: Its linear layers are changed.
    """

    def make(weight: Tensor, bias: Tensor | None) -> Any:
        return lambda x: nn.functional.linear(x.float(), weight, bias).to(x.dtype)

    for module in model.modules():
        if isinstance(module, nn.Linear):
            bias = None if module.bias is None else module.bias.detach().float()
            cast(Any, module).forward = make(module.weight.detach().float(), bias)


def _plant(tokenizer: Any, haystack: Tensor, code: str) -> tuple[Tensor, Tensor]:
    """A context as long as the haystack with the code planted at a quarter of it, and the question."""
    form = NeedleFormat()
    fact = encode(tokenizer, form.fact.format(name=NAMES[0], code=code))
    place = len(haystack) // 4
    context = torch.cat((haystack[:place], fact, haystack[place + len(fact) :]))
    return context, encode(tokenizer, form.question.format(name=NAMES[0]))


def _continue(model: Any, tokenizer: Any, tokens: Tensor, cache: Cache, count: int, **how: Any) -> str:
    """A continuation, the most likely one by default, of tokens of which the cache holds all but the last few."""
    ids = tokens[None]
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **compat.generate_argument(cache),
        use_cache=True,
        max_new_tokens=count,
        **(how or {"do_sample": False}),
    )
    return tokenizer.decode(output[0, len(tokens) :], skip_special_tokens=True)
