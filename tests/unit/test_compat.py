"""What transformers calls things in one version and another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from quantcache.common import compat


def takes_cache(input_ids: Tensor, cache: Any = None, **kwargs: Any) -> None:
    """As a model of transformers from 5.24 on."""


def takes_past(input_ids: Tensor, past_key_values: Any = None, **kwargs: Any) -> None:
    """As a model of transformers before 5.24, or one with code of its own."""


@pytest.mark.parametrize(("taker", "name"), [(takes_cache, "cache"), (takes_past, "past_key_values")])
def test_a_cache_is_handed_over_under_the_name_that_is_taken(taker: Any, name: str) -> None:
    """Under the other it would be one of ``kwargs``, and the model would make a cache of its own without a word."""
    model, cache = nn.Module(), DynamicCache()
    model.forward = taker
    assert compat.cache_argument(model, cache) == {name: cache}
    assert compat.given_cache({name: cache, "use_cache": True}) is cache
    assert compat.given_cache({name: None}) is None


def test_where_no_name_is_seen_it_is_that_of_generate() -> None:
    model, cache = nn.Module(), DynamicCache()
    model.forward = lambda *args, **kwargs: None
    assert compat.cache_argument(model, cache) == compat.generate_argument(cache)


def test_an_output_has_the_cache_under_its_own_name() -> None:
    cache = DynamicCache()
    output = CausalLMOutputWithPast(logits=torch.zeros(1), **{compat.cache_name(CausalLMOutputWithPast): cache})
    assert output[1] is cache
