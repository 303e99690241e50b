"""The demo with a chat model: questions about a long article, asked of a dense cache and of a packed one."""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from quantcache import data
from quantcache.accounting import CacheMemory, measure
from quantcache.artifact.calibration import Calibration
from quantcache.attention.function import register_attention
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.common import compat
from quantcache.common.errors import QuantCacheError
from quantcache.common.progress import without_loading_bars
from quantcache.evaluation.demo import multiply_in_float32
from quantcache.evaluation.feeding import (
    PROMPT_CHUNK,
    check_lengths,
    decode_tokens,
    encode,
    end_tokens,
    feed,
    frame_of,
    has_template,
)
from quantcache.evaluation.speed import timed


@dataclass(frozen=True)
class ChatSettings:
    """What is talked about.

    Attributes:
        article: Title of an article of the evaluation text, which no calibration has seen.
        questions: Questions that the article answers, and what a right answer holds. They are ones that
            SmolLM2-135M answers from its dense cache: a model this small fails at most others, with any cache.
        bits: Mean code width.
        new_tokens: Tokens of an answer at most.
    """

    article: str = "Loom"
    questions: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("Who patented the flying shuttle, and in what year?", ("John Kay", "1733")),
        ("Who invented the Jacquard loom?", ("Joseph Marie Jacquard",)),
    )
    bits: float = 3.0
    new_tokens: int = 40


@dataclass
class _Side:
    """One cache: what it holds of the article, and what was answered from it."""

    cache: Cache
    memory: CacheMemory
    reading_ms: float
    answers: list[str] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)


def run_chat_demo(
    name: str, source: str | Path, calibration: Calibration, settings: ChatSettings | None = None
) -> dict[str, Any]:
    """Let a chat model read an article once, and answer questions about it. Uses no network and writes no file.

    Args:
        name: What the model is called.
        source: What ``from_pretrained`` takes for it.
        calibration: The model's.
        settings: What is talked about.

    Returns:
        Every figure and all answers, ready for JSON. Bytes are those of two caches of the same ``cached_tokens``.

    Raises:
        QuantCacheError: The model has no chat template, or the article exceeds its limit.
        CalibrationMismatch: The calibration does not fit the model.
    """
    settings = settings or ChatSettings()
    started = time.perf_counter()
    register_attention()
    tokenizer, model = _load(source)
    if not has_template(tokenizer):
        raise QuantCacheError(f"{name} has no chat template: the demo needs a model that chats")
    before, behind = frame_of(tokenizer, chat=True)
    prefix = torch.cat((before, encode(tokenizer, _article(settings.article))))
    asked = [torch.cat((encode(tokenizer, f"\n\n{question}"), behind)) for question, _ in settings.questions]
    check_lengths(model, [len(prefix) + max(map(len, asked)) + settings.new_tokens], "the demo's context")

    dense = _read(model, DynamicCache(config=model.config), prefix)
    packed = _read(model, SpectralCache(calibration, bits=settings.bits, model=model), prefix)
    for tokens in asked:
        for side in (dense, packed):  # in turns, so that whatever else the machine does meets both
            _answer(model, tokenizer, side, tokens, settings.new_tokens)
    return {
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "article": settings.article,
        "cached_tokens": packed.memory.tokens,
        "constants_bytes": packed.memory.constants,
        "bits_per_element": packed.memory.bits_per_element,
        "bits_per_element_total": packed.memory.bits_per_element_total,
        "dense": _figures(dense, len(prefix)),
        "spectral": _figures(packed, len(prefix)),
        "questions": [
            {
                "question": question,
                "fact": list(fact),
                **{f"answer_{kind}": side.answers[at] for kind, side in (("dense", dense), ("spectral", packed))},
                "right_dense": all(part in dense.answers[at] for part in fact),
                "right_spectral": all(part in packed.answers[at] for part in fact),
            }
            for at, (question, fact) in enumerate(settings.questions)
        ],
        "settings": asdict(settings),
        "seconds": time.perf_counter() - started,
    }


def _figures(side: _Side, tokens: int) -> dict[str, float | None]:
    return {
        "bytes": side.memory.total,
        "reading_tokens_per_second": 1000 * tokens / side.reading_ms,
        "answering_tokens_per_second": 1 / median(side.steps) if side.steps else None,
    }


def _load(source: str | Path) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with without_loading_bars():
        tokenizer = AutoTokenizer.from_pretrained(source)
        config = AutoConfig.from_pretrained(source)
        compat.require_decoder(config)
        model = compat.auto_class(config).from_pretrained(
            source, config=config, dtype=torch.bfloat16, attn_implementation="spectral", device_map=device
        )
    if device == "cpu":
        multiply_in_float32(model)
    return tokenizer, model.eval()


def _article(title: str) -> str:
    for article in data.evaluation_text().split("\n\n\n"):
        if article.strip().partition("\n")[0] == title:
            return article.strip()
    raise QuantCacheError(f"the evaluation text has no article {title!r}")


def _read(model: PreTrainedModel, cache: Cache, tokens: Tensor) -> _Side:
    """Fill a cache in chunks, so that the later ones read the packed earlier ones."""
    spent = timed(compat.input_device(model), lambda: feed(model, cache, tokens[None], PROMPT_CHUNK))
    return _Side(cache, measure(cache), spent)


def _answer(model: PreTrainedModel, tokenizer: Any, side: _Side, question: Tensor, count: int) -> None:
    """The most likely answer, from a copy of the cache; the steps behind its first token are timed."""
    steps = decode_tokens(model, copy.deepcopy(side.cache), question[None])
    stops = end_tokens(model)
    found: list[int] = []
    for _ in range(count):
        began = time.perf_counter()
        token = int(next(steps))  # waits for the device
        if found:
            side.steps.append(time.perf_counter() - began)
        if token in stops:
            break
        found.append(token)
    side.answers.append(str(tokenizer.decode(found, skip_special_tokens=True)).strip())
