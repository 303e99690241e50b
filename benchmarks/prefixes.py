"""Conversations that take turns in a fixed number of bytes: how many are found again, and how soon the answer begins.

Every conversation is a window of text of its own. It comes back several times, in random order, each time with some
more tokens. The dense store keeps transformers' caches by the same rule as ours: least recently used out.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import sys
import time
from collections import OrderedDict
from typing import Any

import torch
from inputs import SHARED, read
from records import suite_of, write_record
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import quantcache
from quantcache import PrefixStore, data
from quantcache.accounting.measuring import measure
from quantcache.cache.prefix_keys import key_of
from quantcache.cli.loading import load_calibration, load_model
from quantcache.common.sequences import text_tokens
from quantcache.evaluation.provenance import calibration_sha256, model_sha256, text_sha256
from quantcache.evaluation.summaries import quantiles


class DenseStore:
    """transformers' own caches of earlier prompts, the least recently used out: what ours is compared with.

    Args:
        model: The model.
        max_bytes: Most bytes of caches and tokens.
    """

    def __init__(self, model: PreTrainedModel, max_bytes: int):
        self.model, self.max_bytes = model, max_bytes
        self.held: OrderedDict[bytes, tuple[DynamicCache, int]] = OrderedDict()

    def first_token(self, prompt: Tensor) -> bool:
        """Generate one token, from the cache of the longest earlier prompt that this one begins with.

        Args:
            prompt: ``[1, T]``.

        Returns:
            Whether there was one.
        """
        key = key_of(prompt[0].tolist())
        found = max((known for known in self.held if key.startswith(known)), key=len, default=None)
        # Appending to a dense cache makes new tensors: sharing the old ones is all that a copy takes.
        cache = DynamicCache(config=self.model.config) if found is None else self.held.pop(found)[0]
        generate(self.model, prompt, past_key_values=cache)
        size = measure(cache).total + len(key)
        self.held[key] = copy.copy(cache), size
        while sum(size for _, size in self.held.values()) > self.max_bytes:
            self.held.popitem(last=False)
        return found is not None


class CompressedStore:
    """Ours: the same model with ``enable(prefixes=)``.

    Args:
        model: The model, which this changes.
        calibration: Its calibration.
        bits: Bits per element.
        max_bytes: Most bytes of caches and tokens.
    """

    def __init__(self, model: PreTrainedModel, calibration: quantcache.Calibration, bits: float, max_bytes: int):
        self.model, self.store = model, PrefixStore(max_bytes)
        quantcache.enable(model, calibration, bits=bits, prefixes=self.store)

    def first_token(self, prompt: Tensor) -> bool:
        """Generate one token; whether an earlier prompt's cache was of use.

        Args:
            prompt: ``[1, T]``.

        Returns:
            True if so.
        """
        before = self.store.statistics().hits
        generate(self.model, prompt)
        return self.store.statistics().hits > before


def generate(model: PreTrainedModel, prompt: Tensor, **options: Any) -> None:
    """One token."""
    model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=False, **options)


def main() -> None:
    """Measure, print a table and write a record."""
    options = parse_arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    dense, tokenizer = load_model(options.model, attention=None, device="cpu", dtype=options.dtype)
    ours = load_model(options.model, device="cpu", dtype=options.dtype)[0]
    calibration = load_calibration(options.calibration)
    text, source = read("wiki_eval.txt", data.evaluation_text)
    tokens = text_tokens(tokenizer, text)
    bytes_of = {
        "dense": conversation_bytes(dense, DynamicCache(config=dense.config), tokens[: options.tokens]),
        "spectral": conversation_bytes(
            ours, quantcache.SpectralCache(calibration, model=ours, bits=options.bits), tokens[: options.tokens]
        ),
    }
    budget = options.fit * bytes_of["dense"]
    stores = {
        "dense": DenseStore(dense, budget),
        "spectral": CompressedStore(ours, calibration, options.bits, budget),
    }
    visits = [each for each in range(options.conversations) for _ in range(options.turns)]
    random.Random(options.seed).shuffle(visits)
    samples = take_turns(stores, visits, tokens, options)
    metrics = {
        name: {
            "conversation_bytes": bytes_of[name],
            "conversations_that_fit": budget // bytes_of[name],
            **summary(found),
        }
        for name, found in samples.items()
    }
    metrics["conversations_ratio"] = bytes_of["dense"] / bytes_of["spectral"]
    Console(width=None if sys.stdout.isatty() else 120).print(table(metrics, options))
    settings = {
        **vars(options),
        "budget_bytes": budget,
        "model_sha256": model_sha256(dense),
        "calibration_sha256": calibration_sha256(calibration),
        "text": {"source": source, "sha256": text_sha256(text), "shared": SHARED.is_dir()},
        "threads": torch.get_num_threads(),
    }
    write_record(suite_of("prefixes", options.model), settings, metrics)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", default="smollm2-135m")
    parser.add_argument("--bits", type=float, default=3.0)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--conversations", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a conversation at its last turn")
    parser.add_argument("--turns", type=int, default=3, help="how often each comes")
    parser.add_argument("--new", type=int, default=64, help="new tokens of a turn")
    parser.add_argument("--fit", type=int, default=20, help="dense conversations that the bytes hold")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which they come")
    parser.add_argument("--threads", type=int, default=0, help="torch's threads; 0 leaves them")
    parser.add_argument("--quick", action="store_true", help="6 conversations of 512 tokens in the bytes of 2")
    options = parser.parse_args()
    if options.quick:
        options.conversations, options.tokens, options.turns, options.fit = 6, 512, 2, 2
    return options


@torch.no_grad()
def conversation_bytes(model: PreTrainedModel, cache: DynamicCache, tokens: Tensor) -> int:
    """What the cache of a whole conversation takes, with its tokens.

    Args:
        model: The model.
        cache: An empty cache.
        tokens: ``[T]``.

    Returns:
        Bytes.
    """
    model(tokens[None], past_key_values=cache, logits_to_keep=1)
    return measure(cache).total + 4 * len(tokens)


def take_turns(
    stores: dict[str, Any], visits: list[int], tokens: Tensor, options: argparse.Namespace
) -> dict[str, list[tuple[int, bool, float]]]:
    """Let conversations come, each time to both stores.

    Args:
        stores: Dense and compressed.
        visits: Which conversation comes when.
        tokens: The text.
        options: The command line.

    Returns:
        Of every visit: which turn it was, whether it was a hit, and milliseconds until the first token.
    """
    samples: dict[str, list[tuple[int, bool, float]]] = {name: [] for name in stores}
    turns = dict.fromkeys(visits, 0)
    stride = max(1, len(tokens) // options.conversations)
    for index in track(visits, "conversations", console=Console(stderr=True), transient=True):
        length = options.tokens - (options.turns - 1 - turns[index]) * options.new
        prompt = tokens.roll(-index * stride)[None, :length]
        for name, store in stores.items():
            started = time.perf_counter()
            hit = store.first_token(prompt)
            samples[name].append((turns[index], hit, 1e3 * (time.perf_counter() - started)))
        turns[index] += 1
    return samples


def summary(samples: list[tuple[int, bool, float]]) -> dict[str, Any]:
    """Hit rate and times of one store.

    Args:
        samples: From :func:`take_turns`.

    Returns:
        Figures, ready for JSON; a first turn cannot be a hit.
    """
    later = [(hit, milliseconds) for turn, hit, milliseconds in samples if turn]
    times: dict[str, Any] = {"later_turns": [milliseconds for _, milliseconds in later]}
    times["hits"] = [milliseconds for hit, milliseconds in later if hit]
    times["misses"] = [milliseconds for hit, milliseconds in later if not hit]
    return {
        "later_turns": len(later),
        "hits": len(times["hits"]),
        "hit_rate": len(times["hits"]) / len(later) if later else None,
        "first_token_ms": {name: quantiles(found) if found else None for name, found in times.items()},
        "first_token_ms_mean": statistics.fmean(times["later_turns"]) if later else None,
    }


def table(metrics: dict[str, Any], options: argparse.Namespace) -> Table:
    """The figures for people."""
    title = (
        f"{options.conversations} conversations of {options.tokens:,} tokens in the bytes of {options.fit} dense ones"
    )
    shown = Table("store", "MB each", "fit", "hits of later turns", "first token: mean", "hit", "miss", title=title)
    for name in ("dense", "spectral"):
        found = metrics[name]
        times = found["first_token_ms"]
        shown.add_row(
            name,
            f"{found['conversation_bytes'] / 1e6:.1f}",
            str(found["conversations_that_fit"]),
            f"{found['hits']} of {found['later_turns']}",
            "" if found["first_token_ms_mean"] is None else f"{found['first_token_ms_mean']:,.0f} ms",
            *("" if times[kind] is None else f"{times[kind]['median']:,.0f} ms" for kind in ("hits", "misses")),
        )
    shown.caption = f"{metrics['conversations_ratio']:.2f} times as many conversations in the same bytes"
    return shown


if __name__ == "__main__":
    main()
