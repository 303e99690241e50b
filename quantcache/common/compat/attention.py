"""How a model attends: its attention implementations, and the mask of the pass under way."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

import torch
import transformers
from transformers import PreTrainedConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

PREPARES_MASKS = "_preprocess_mask_arguments"
"""The function of transformers that prepares every mask."""

ASKED_OF_MASKS = ("attention_mask", "position_ids")
"""Which of its arguments are read."""


def attention_implementations(config: PreTrainedConfig) -> dict[str, str]:
    """Attention implementations of a model and of its parts.

    Args:
        config: The model's config.

    Returns:
        By name of the sub-config, the model's own under ``""``: what :func:`use_attention` takes.
    """
    subs = {name: getattr(config, name, None) for name in config.sub_configs}
    own = {"": config._attn_implementation}
    return own | {name: sub._attn_implementation for name, sub in subs.items() if sub is not None}


def can_change_attention(model: PreTrainedModel) -> bool:
    """Whether a model goes through transformers' attention interface, so that its attention can be replaced.

    Args:
        model: The model.

    Returns:
        False for models with an attention of their own.
    """
    return bool(model._can_set_attn_implementation())


def attends_by_itself(kind: type[PreTrainedConfig]) -> bool:
    """Whether models of a kind compute attention by themselves, whatever implementation they are loaded with.

    transformers refuses them ``sdpa`` where they do not know it, and takes every name that others have registered.
    What makes their masks knows the config only.

    Args:
        kind: The class of their config.

    Returns:
        True if none of the loaded classes of such models looks its attention up; False if there are none.
    """
    if kind not in _BY_THEMSELVES:
        classes = [each for each in _models() if getattr(each, "config_class", None) is kind]
        if not classes:
            return False
        _BY_THEMSELVES[kind] = not any(map(_may_call_ours, classes))
    return _BY_THEMSELVES[kind]


_BY_THEMSELVES: dict[type, bool] = {}


def _may_call_ours(kind: type[PreTrainedModel]) -> bool:
    """Whether a class may look its attention up among those that are registered: who cannot be read may.

    transformers' own answer knows one way to look it up, and models with code of their own may have an older one.
    """
    if kind._can_set_attn_implementation():
        return True
    try:
        return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(sys.modules[kind.__module__])
    except (KeyError, OSError, TypeError):
        return True


def _models() -> Iterator[type[PreTrainedModel]]:
    """All classes of models that are loaded."""
    pending: list[type[PreTrainedModel]] = [transformers.PreTrainedModel]
    while pending:
        found = pending.pop()
        pending += found.__subclasses__()
        yield found


def use_attention(model: PreTrainedModel, implementation: str | dict[str, str]) -> None:
    """Change attention implementations, of a model that lets them be changed.

    Args:
        model: The model.
        implementation: One for all parts, or what :func:`attention_implementations` gave.
    """
    if can_change_attention(model) and attention_implementations(model.config) != implementation:
        model.set_attn_implementation(implementation)


def warn_of_unread_masks() -> None:
    """Log a warning if :func:`mask_arguments` has nothing to read, as when transformers renames it."""
    from transformers import masking_utils

    prepares = getattr(masking_utils, PREPARES_MASKS, None)
    if prepares is None or not {*ASKED_OF_MASKS} <= inspect.signature(prepares).parameters.keys():
        logger.warning(
            "transformers %s does not tell caches what is padding: padded rows are coded less exactly "
            "(masking_utils.%s is not what it was)",
            transformers.__version__,
            PREPARES_MASKS,
        )


def mask_arguments() -> tuple[torch.Tensor | None, torch.Tensor | None] | None:
    """The 2D mask and the positions of the forward pass that is just asking a cache for the sizes of its mask.

    transformers tells a cache how many tokens come, never which of them are padding, and most attention functions see
    neither that nor positions. But the one function that prepares masks, for every attention implementation, asks the
    cache first: its arguments are read from the call stack. A custom 4D mask never gets there.

    Returns:
        ``attention_mask`` ``[B, T]`` and ``position_ids``, either may be None; None if somebody else is asking.
    """
    frame = sys._getframe(1)
    for _ in range(12):
        if frame.f_code.co_name == PREPARES_MASKS:
            mask, positions = (frame.f_locals.get(name) for name in ASKED_OF_MASKS)
            plain = isinstance(mask, torch.Tensor) and mask.ndim == 2
            positions = rotary_positions(positions)
            return (mask if plain else None, positions) if plain or mask is None else None
        if frame.f_back is None:
            break
        frame = frame.f_back
    return None


def rotary_positions(told: torch.Tensor | None = None) -> torch.Tensor | None:
    """The positions by which the pass under way turns its keys, where they are not those that its mask is told.

    Models that read images count a token's place in time, height and width, ``[3, B, T]``, beside its place in the
    text, which is all that a mask is told. The three differ inside of an image only, and an image of many tokens moves
    what follows it by few positions. Time turns the fastest pairs. Masks of other models (gpt-oss, Falcon) are told no
    positions, and a custom 4D mask is taken as it is.

    Args:
        told: What the mask was told, if anything.

    Returns:
        ``position_ids`` ``[B or 1, T]``; what the mask was told where nothing better is found.
    """
    frame: FrameType | None = sys._getframe(1)
    for _ in range(64):
        if frame is None:
            break
        if isinstance(frame.f_locals.get("self"), transformers.PreTrainedModel):
            positions = frame.f_locals.get("position_ids")
            if isinstance(positions, torch.Tensor) and (positions.ndim == 3 or told is None):
                return positions[0] if positions.ndim == 3 else positions
            break
        frame = frame.f_back
    return told
