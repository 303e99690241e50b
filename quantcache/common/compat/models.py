"""Models and their configs: versions, names, and which class loads what."""

from __future__ import annotations

import contextlib
import io
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import torch
import transformers
from transformers import PreTrainedConfig

from quantcache.common.compat.attention import attends_by_itself
from quantcache.common.compat.wrappers import unwrapped
from quantcache.common.errors import QuantCacheError, UnsupportedModel
from quantcache.common.sources import source_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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


def require_loaded(model: object, needs: str) -> None:
    """Refuse what is no model, such as the name of one.

    Args:
        model: What was given.
        needs: Who needs a model, for the message.

    Raises:
        TypeError: It is no module of torch.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"{needs} needs a loaded model, got {model!r:.60}: AutoModelForCausalLM.from_pretrained() loads one"
            if isinstance(model, str | Path)
            else f"{needs} needs a loaded model, got a {type(model).__name__}"
        )


def require_forward(model: PreTrainedModel) -> None:
    """Refuse models that only hold others, such as Qwen2.5-Omni: one cache would go to all that generate.

    Args:
        model: The model.

    Raises:
        UnsupportedModel: The model has no forward pass of its own.
    """
    model = unwrapped(model)  # torch.compile's wrapper has none of its own either
    if type(model).forward is torch.nn.Module.forward:
        parts = [
            f"model.{n}"
            for n, m in model.named_children()
            if isinstance(m, transformers.PreTrainedModel) and m.can_generate()
        ]
        kind, several = type(model).__name__, " or ".join(parts) or "the part that reads text"
        raise UnsupportedModel(f"{kind} has no forward pass of its own, only parts of it have: give {several}")


def is_encoder(config: PreTrainedConfig) -> bool:
    """Whether a model reads text in both directions and has no cache.

    Args:
        config: The model's config.

    Returns:
        True for what transformers trains as masked language models, unless the config makes a decoder of it.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return masked and not getattr(config, "is_encoder_decoder", False) and not getattr(config, "is_decoder", False)


def auto_class(config: PreTrainedConfig) -> Any:
    """The class that loads a model that generates text.

    Args:
        config: The model's config.

    Returns:
        ``AutoModelForCausalLM``, or ``AutoModelForImageTextToText`` for what only that knows.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    own = getattr(config, "auto_map", None) or {}
    if "AutoModelForCausalLM" in own or type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM
    images = "AutoModelForImageTextToText" in own or type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if images else AutoModelForCausalLM


def attention_to_load(config: PreTrainedConfig, wanted: str | None) -> str | None:
    """The attention implementation to load a model with.

    Args:
        config: The model's config.
        wanted: The name of one.

    Returns:
        None, transformers' choice, for models that compute attention by themselves: some know no names but their own.
    """
    mapping = auto_class(config)._model_mapping
    if type(config) in mapping:
        mapping[type(config)]  # imports its code
    return None if attends_by_itself(type(config)) else wanted


def load_gguf(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read a GGUF file.

    Args:
        file: All of it in one file.

    Returns:
        The model in float32, and its tokenizer.

    Raises:
        UnsupportedModel: The file holds an encoder-decoder model.
        QuantCacheError: Weights are missing in the file, or of other shapes: transformers would draw them at random.
    """
    source: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    more: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # newer versions may keep the weights packed
        more["quantization_config"] = transformers.GgufConfig(gguf_file=file.name, dequantize=True)
    with _quiet():
        config = transformers.AutoConfig.from_pretrained(**source)
        require_decoder(config)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        loaded, found = auto_class(config).from_pretrained(
            **source, **more, dtype=torch.float32, output_loading_info=True
        )
    for problem in ("missing", "mismatched"):
        names = sorted(map(str, found.get(f"{problem}_keys") or ()))
        if names:
            raise QuantCacheError(f"{len(names)} weights are {problem}, such as {names[0]}")
    for kind in ("bos", "eos", "pad"):  # versions that go by the tokenizer's class, not by the file, get them wrong
        wanted = getattr(config, f"{kind}_token_id", None)
        if isinstance(wanted, int) and getattr(tokenizer, f"{kind}_token_id") != wanted:
            setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(wanted))
    config.dtype = torch.float32
    with torch.device("meta"):
        plain = type(loaded)(config)  # what was loaded counts as quantized, and cannot be saved
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    return plain, tokenizer


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Spare the user what transformers says of a GGUF file: every key that it has no use for, and a bar if unwanted."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        wanted = transformers.logging.is_progress_bar_enabled()
        with contextlib.nullcontext() if wanted else contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers.logging.set_verbosity(before)


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
        The device of its input embeddings; of those that accelerate fetches for every pass, where they are fetched to.

    Raises:
        QuantCacheError: They are on torch's device "meta", and nothing fetches them.
    """
    embeddings: Any = model.get_input_embeddings()
    device: torch.device = embeddings.weight.device
    if device.type != "meta":
        return device
    fetched = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
    if fetched is None:
        raise QuantCacheError(f"{type(model).__name__} has no weights in memory: it is on torch's device 'meta'")
    return torch.device(fetched)


def model_id(model: PreTrainedModel) -> str:
    """What a loaded model is called.

    Args:
        model: The model.

    Returns:
        Its Hub id, or the name of its folder; ``wiki11m`` and the names of packaged models for those, wherever they are
        installed.
    """
    name = str(getattr(model.config, "_name_or_path", "") or "")
    if os.path.isdir(name):
        return source_name(name) or Path(name).resolve().as_posix()
    return name


def model_revision(model: PreTrainedModel) -> str | None:
    """The commit that a model was loaded from.

    Args:
        model: The model.

    Returns:
        The commit; None for a model from a folder.
    """
    return getattr(model.config, "_commit_hash", None)
