"""Speculative decoding: a draft model proposes, the target with its compressed cache accepts or not. Greedy.

What is measured goes through transformers' own assisted generation, with the method's cache for the target.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantcache.common import compat
from quantcache.common.errors import QuantCacheError, UnsupportedModel
from quantcache.common.sequences import cut_windows
from quantcache.evaluation import summaries
from quantcache.evaluation.cells import Cells
from quantcache.evaluation.feeding import check_lengths
from quantcache.evaluation.methods import Method
from quantcache.evaluation.speed import wait

SUITE = "speculative"


@dataclass(frozen=True)
class SpeculativeEntry:
    """One method as the target's cache.

    Attributes:
        family: ``ours``, ``rival`` or ``dense``.
        simulated: Whether the cache holds fake-quantized values instead of codes: it is left out then.
        status: ``ok``, or what went wrong.
        acceptance: Share of the draft's tokens that the target took, with a 95 % Wilson interval.
        tokens_per_call: New tokens for each forward pass of the target.
        ratio: Time of a token in assisted over plain greedy decoding with the same cache, the target's first call and
            the tokens that it gives apart; quantiles are over prompts, below 1 is faster. None where nothing came after
            that call.
        same_text: Prompts whose text was that of plain greedy decoding with the same cache.
    """

    family: str
    simulated: bool
    status: str
    acceptance: summaries.Summary | None = None
    tokens_per_call: float | None = None
    ratio: summaries.Summary | None = None
    same_text: summaries.Summary | None = None


@dataclass(frozen=True)
class SpeculativeResult:
    """All methods.

    Attributes:
        settings: Everything that was chosen.
        methods: One entry for each method.
    """

    settings: dict[str, Any]
    methods: dict[str, SpeculativeEntry]

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)


def early_exit_draft(model: PreTrainedModel, layers: int | None = None) -> PreTrainedModel:
    """A draft model that shares a model's weights: its first layers, final norm and head.

    Source: M. Elhoushi et al., "LayerSkip" (2024); without its training the draft is a weak one.

    Args:
        model: Model whose weights the draft shares.
        layers: Layers to keep; half of them if None.

    Returns:
        The draft. It owns no weights.

    Raises:
        UnsupportedModel: The model does not keep its layers as ``base_model.layers``.
    """
    inner = model.base_model
    found = getattr(inner, "layers", None)
    if not isinstance(found, nn.ModuleList) or len(found) < 2:
        raise UnsupportedModel(f"{type(model).__name__} does not keep layers in base_model.layers: give a draft model")
    keep = layers or len(found) // 2
    if not 1 <= keep < len(found):
        raise QuantCacheError(
            f"the draft must have from 1 to {len(found) - 1} of the model's {len(found)} layers, got {keep}"
        )
    draft, trunk = _shallow(model), _shallow(inner)
    draft.config = copy.deepcopy(model.config)
    text_config = draft.config.get_text_config(decoder=True)
    text_config.num_hidden_layers = keep
    if getattr(text_config, "layer_types", None):
        text_config.layer_types = text_config.layer_types[:keep]
    trunk.config, trunk.layers = text_config, nn.ModuleList(found[:keep])
    setattr(draft, model.base_model_prefix, trunk)
    draft.generation_config = copy.deepcopy(model.generation_config)
    return draft


def _shallow(module: Any) -> Any:
    """A module with the same children and weights, but lists and hooks of its own."""
    new = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, dict):
            vars(new)[name] = type(value)() if "hooks" in name else copy.copy(value)
    return new


def measure_speculative(
    model: PreTrainedModel,
    tokens: Tensor,
    methods: Sequence[Method],
    draft: PreTrainedModel,
    *,
    context: int,
    prompts: int = 2,
    new_tokens: int = 48,
    proposals: int = 5,
    cells: Cells | None = None,
) -> SpeculativeResult:
    """Decode with and without a draft model.

    Args:
        model: Target model, whose tokens count.
        tokens: Text, ``[N]``; prompts are stretches of it.
        methods: Caches of the target.
        draft: The draft model, of the same vocabulary; its own cache is transformers'.
        context: Tokens of a prompt.
        prompts: Prompts at most.
        new_tokens: Tokens to generate for each.
        proposals: Tokens that the draft proposes at a time.
        cells: Where finished cells are kept.

    Returns:
        Acceptance and times of every method. A method that fails keeps its place, with the error as its status.

    Raises:
        QuantCacheError: The text is shorter than a prompt, prompt and continuation exceed a model's limit, or the
            vocabularies differ.
    """
    cells = cells or Cells()
    for one in (model, draft):
        check_lengths(one, [context + new_tokens], "prompt and continuation together,")
    if draft is model:
        raise QuantCacheError("the draft model is the target itself")
    sizes = [one.config.get_text_config(decoder=True).vocab_size for one in (model, draft)]
    if sizes[0] != sizes[1]:
        raise QuantCacheError(f"the draft model has {sizes[1]} tokens in its vocabulary, the target {sizes[0]}")
    rows = cut_windows(model.config, tokens, context)[:prompts]
    if not len(rows):
        raise QuantCacheError(f"the text has {len(tokens)} tokens, a prompt needs {context}")
    cells.plan(SUITE, len(rows) * sum(not method.simulated for method in methods))
    entries = {}
    for method in methods:
        if method.simulated:
            skipped = "skipped: simulated, so its times mean nothing"
            entries[method.name] = SpeculativeEntry(method.family, True, skipped)
            continue
        results = []
        for number, row in enumerate(rows):
            given = (model, draft, method, row[None], new_tokens, proposals)
            results.append(cells.measure(SUITE, method.name, f"prompt {number}", _decode, *given))
        entries[method.name] = _entry(method, results)
    settings = {"context": context, "prompts": len(rows), "new_tokens": new_tokens, "proposals": proposals, "batch": 1}
    return SpeculativeResult(settings, entries)


class _Calls:
    """Watches the target's forward passes: tokens of each, and when the first, which reads the prompt, was over.

    Args:
        model: Target model.

    Attributes:
        first: What the first call read: the prompt, and what the draft had proposed behind it.
    """

    def __init__(self, model: nn.Module):
        self.widths: list[int] = []
        self.first: Tensor | None = None
        self.first_end = 0.0
        self.hook = model.register_forward_hook(self._seen, with_kwargs=True)

    def _seen(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.widths.append(kwargs["input_ids"].shape[1])
        if len(self.widths) == 1:
            self.first = kwargs["input_ids"][0]
            wait(kwargs["input_ids"].device)
            self.first_end = time.perf_counter()

    def later(self, output: Tensor, prompt: int) -> int:
        """How many tokens came after the first call, which gives one more than it accepts.

        Args:
            output: New tokens, ``[T]``.
            prompt: Tokens of the prompt.
        """
        proposed = output[:0] if self.first is None else self.first[prompt:][: len(output)]
        taken = int((proposed == output[: len(proposed)]).cumprod(0).sum())
        return max(0, len(output) - taken - 1)


@torch.inference_mode()
def _decode(model: Any, draft: Any, method: Method, prompt: Tensor, new_tokens: int, proposals: int) -> dict[str, Any]:
    """Figures of one prompt ``[1, T]``."""
    prompt = prompt.to(compat.input_device(model))

    def run(**more: Any) -> tuple[Tensor, list[int], float | None]:
        """New tokens, tokens of every call, and seconds for each new token behind the first call's, if there is one."""
        # Assisted generation hands the whole prompt to the target, so the cache must be empty.
        calls = _Calls(model)
        try:
            output = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                **compat.generate_argument(method.make_cache()),
                use_cache=True,
                max_new_tokens=new_tokens,
                do_sample=False,
                **more,
            )[0, prompt.shape[1] :]
        finally:
            calls.hook.remove()
        wait(prompt.device)
        seconds, later = time.perf_counter() - calls.first_end, calls.later(output, prompt.shape[1])
        return output, calls.widths, seconds / later if later else None

    config = draft.generation_config
    draft.generation_config = copy.deepcopy(config)
    draft.generation_config.num_assistant_tokens = proposals
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    try:
        for _ in range(2):  # the first of each warms up
            plain, _, plain_time = run()
            assisted, widths, assisted_time = run(assistant_model=draft)
    finally:
        draft.generation_config = config
    # Each call of the target reads one token of its own, the first the whole prompt, and the draft's; it gives one
    # token more than it accepts.
    proposed = sum(widths) - (prompt.shape[1] - 1) - len(widths)
    return {
        "proposed": proposed,
        "accepted": min(max(0, len(assisted) - len(widths)), proposed),
        "calls": len(widths),
        "tokens": len(assisted),
        "ratio": None if plain_time is None or assisted_time is None else assisted_time / plain_time,
        "same_text": bool(torch.equal(assisted, plain)),
    }


def _entry(method: Method, results: list[dict[str, Any]]) -> SpeculativeEntry:
    bad = [result["status"] for result in results if result["status"] != "ok"]
    if bad:
        return SpeculativeEntry(method.family, method.simulated, bad[0])
    proposed = sum(result["proposed"] for result in results)
    ratios = [result["ratio"] for result in results if result["ratio"] is not None]
    return SpeculativeEntry(
        method.family,
        method.simulated,
        "ok",
        summaries.share(sum(result["accepted"] for result in results), proposed) if proposed else None,
        sum(result["tokens"] for result in results) / sum(result["calls"] for result in results),
        summaries.quantiles(ratios) if ratios else None,
        summaries.share(sum(result["same_text"] for result in results), len(results)),
    )
