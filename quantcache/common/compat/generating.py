"""How ``generate`` reads a prompt."""

from __future__ import annotations

import inspect

from transformers import GenerationMixin


def chunks_go_on() -> bool:
    """Whether a prompt that is read in chunks goes on behind what its cache holds.

    Returns:
        False for versions of transformers that read all of it, once more behind what is cached.
    """
    return "prefill_ids" in inspect.unwrap(GenerationMixin._prefill).__code__.co_varnames
