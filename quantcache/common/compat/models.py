"""Models and their configs: versions, names, and which class loads what."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from quantcache.common.errors import UnsupportedModel
from quantcache.data import demo_model_path


def versions() -> dict[str, str]:
    """Versions that bear on results: quantcache, Python, torch, transformers, huggingface_hub."""
    from quantcache import __version__

    return {
        "quantcache": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "huggingface_hub": huggingface_hub.__version__,
    }


def require_decoder(config: PreTrainedConfig) -> None:
    """Refuse encoder-decoder models.

    Args:
        config: The model's config.

    Raises:
        UnsupportedModel: The model has an encoder-decoder cache.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{config.model_type} is an encoder-decoder model; SpectralCache serves decoder-only models"
        )


def is_encoder(config: PreTrainedConfig) -> bool:
    """Whether a model reads text in both directions and has no cache.

    Args:
        config: The model's config.

    Returns:
        True for what transformers trains as masked language models, unless the config makes a decoder of it.
    """
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return masked and not getattr(config, "is_encoder_decoder", False) and not getattr(config, "is_decoder", False)


def auto_class(config: PreTrainedConfig) -> Any:
    """The class that loads a model that generates text.

    Args:
        config: The model's config.

    Returns:
        ``AutoModelForCausalLM``, or ``AutoModelForImageTextToText`` for what only that knows.
    """
    own = getattr(config, "auto_map", None) or {}
    if "AutoModelForCausalLM" in own or type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM
    images = "AutoModelForImageTextToText" in own or type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if images else AutoModelForCausalLM


def position_limit(config: PreTrainedConfig) -> int | None:
    """How many positions a model was made for.

    Args:
        config: The model's config.

    Returns:
        Its limit, None if it declares none.
    """
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model, possibly spread over devices, takes its tokens.

    Args:
        model: The model.

    Returns:
        The device of its input embeddings.
    """
    weight: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    return weight.device


def model_id(model: PreTrainedModel) -> str:
    """What a loaded model is called.

    Args:
        model: The model.

    Returns:
        Its Hub id, or the name of its folder; ``wiki11m`` for the bundled model, wherever it is installed.
    """
    name = str(getattr(model.config, "_name_or_path", "") or "")
    if os.path.isdir(name):
        bundled = demo_model_path()
        return bundled.name if Path(name).resolve() == bundled.resolve() else Path(name).resolve().as_posix()
    return name


def model_revision(model: PreTrainedModel) -> str | None:
    """The commit that a model was loaded from.

    Args:
        model: The model.

    Returns:
        The commit; None for a model from a folder.
    """
    return getattr(model.config, "_commit_hash", None)
