"""A call of ``generate()`` that may go on from an earlier cache: whether its tokens alone decide what is cached."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from quantcache.cache.prefix_keys import kept_tokens, prefix_digest
from quantcache.cache.prefixes import FAILURES, PrefixStore
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.common import compat
from quantcache.common.errors import UnsupportedModel

logger = logging.getLogger(__name__)

_OTHERWISE = (
    *("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "is_assistant"),
    *("custom_generate", "dola_layers", "penalty_alpha", "constraints", "force_words_ids", "token_healing"),
    *("output_hidden_states", "output_attentions"),
)
"""Options under which a cache is used otherwise than token by token, or the prompt's own states are asked for."""

_PLAIN = {"input_ids", "attention_mask", "cache", "past_key_values", "tokenizer", "assistant_tokenizer"}
"""Arguments that are neither generate's own, nor of its config, nor decide what is cached."""


class Listener:
    """Stands between ``generate`` and a streamer, to know the tokens of a call that is interrupted.

    Args:
        streamer: The caller's streamer.
        tokens: The prompt, to which what follows is added.
    """

    def __init__(self, streamer: Any, tokens: list[int]):
        self._streamer, self._tokens, self._begun = streamer, tokens, False

    def put(self, value: Tensor) -> None:
        """Note new tokens, all but the prompt, which comes first, and pass them on."""
        if self._begun:
            self._tokens += value.flatten().tolist()
        self._begun = True
        self._streamer.put(value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._streamer, name)


@dataclass(frozen=True)
class Reuse:
    """A store of prefixes for one model's requests.

    Attributes:
        store: The store.
        empty: A cache as requests get it.
        model: The model.

    Raises:
        QuantCacheError: The caches have no calibration, or the model's weights are not in memory.
        UnsupportedModel: The model remembers something of earlier requests, or puts tokens of its own before each.
    """

    store: PrefixStore
    empty: SpectralCache
    model: PreTrainedModel

    def __post_init__(self) -> None:
        if not isinstance(self.store, PrefixStore):
            raise TypeError(f"prefixes must be a PrefixStore, got {type(self.store).__name__}")
        prefix_digest(self.empty, self.model)
        for name, module in self.model.named_modules():
            if hasattr(module, "rope_deltas"):
                raise UnsupportedModel(
                    f"{name or type(module).__name__} keeps rope_deltas of the last request, which a stored prefix "
                    "does not have: leave prefixes out"
                )

    def prompt(self, asked: list[dict[str, Any]]) -> list[int] | None:
        """The tokens of a call, if nothing else decides what its cache holds.

        Args:
            asked: What the call says, first what counts most: its arguments, its generation config, the model's.

        Returns:
            Token ids; None for a call that must be read from its start.
        """
        if compat.adds_tokens(self.model) or compat.adapters_by_row(self.model):  # the wrapper may have come later
            return None
        given = asked[0]

        def option(name: str) -> Any:
            return next((options[name] for options in asked if options.get(name) is not None), None)

        if any(option(name) for name in _OTHERWISE) or (option("prefill_chunk_size") and not compat.chunks_go_on()):
            return None
        if any((option(name) or 1) > 1 for name in ("num_beams", "num_return_sequences")):
            return None
        own = inspect.signature(GenerationMixin.generate).parameters.keys()
        known = _PLAIN | vars(GenerationConfig()).keys() | own
        if any(value is not None and name not in known for name, value in given.items()):
            return None  # images, positions, embeddings
        tokens, other = given.get("input_ids"), given.get("inputs")
        tokens = other if tokens is None else tokens
        if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.shape[0] != 1 or tokens.is_floating_point():
            return None
        numbers: list[int] = tokens[0].tolist()
        mask = given.get("attention_mask")
        if mask is None:
            # generate() hides padding tokens of its own accord
            return None if option("pad_token_id") in numbers else numbers
        shown = isinstance(mask, Tensor) and mask.shape == tokens.shape and bool((mask == 1).all())
        return numbers if shown else None

    def begin(self, prompt: list[int]) -> SpectralCache | None:
        """A cache that holds the beginning of a prompt.

        Args:
            prompt: Its token ids.

        Returns:
            The cache; None if there is no such prefix.
        """
        return self._safely(lambda: self.store.fork(prompt, self.empty, self.model))

    def keep(self, tokens: list[int], cache: SpectralCache) -> None:
        """Keep what a call has left, as far as its tokens are known.

        Args:
            tokens: The prompt's token ids, and those that are known to follow.
            cache: Its cache.
        """

        def add() -> None:
            left, held = cache, cache.get_seq_length()
            if held > len(tokens):  # the call was interrupted, and nobody can tell what it had generated
                left = cache.fork()
                left.crop(kept_tokens(cache, held, len(tokens)) - held)
            self.store.add(tokens, left, self.model)

        self._safely(add)

    @staticmethod
    def _safely(action: Callable[[], Any]) -> Any:
        """Do what a request can do without."""
        try:
            with torch.no_grad():
                return action()
        except (*FAILURES, ValueError) as error:
            logger.warning("prefixes are left out of a request: %s", error)
            return None
