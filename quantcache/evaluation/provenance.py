"""Hashes of a measurement's model, calibration and code, and the check that texts do not overlap."""

from __future__ import annotations

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quantcache.artifact.calibration import Calibration
from quantcache.artifact.files import to_files
from quantcache.calibration.passages import shared
from quantcache.common import compat
from quantcache.common.errors import QuantCacheError
from quantcache.evaluation.plan import Material

MAX_SHARED = 0.02
"""Largest share of the calibration's sampled passages that an evaluation text may hold. Two halves of one body of
source code share 1.2 % (licence headers); plain texts on different subjects share none."""


def text_sha256(text: str) -> str:
    """Hash of a text, as calibrations record it.

    Args:
        text: Plain text, hashed as UTF-8.

    Returns:
        SHA-256 in hexadecimal.
    """
    return hashlib.sha256(text.encode()).hexdigest()


def model_sha256(model: PreTrainedModel) -> str:
    """Hash of a model's config and weights.

    Args:
        model: Model with its weights loaded.

    Returns:
        SHA-256 in hexadecimal; the same wherever the model lies and on whatever device, for one dtype.
    """
    config = model.config.to_diff_dict()
    for name in ("_name_or_path", "transformers_version", "_attn_implementation", "dtype"):
        config.pop(name, None)
    found = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        _add_tensor(found, name, tensor)
    return found.hexdigest()


def _add_tensor(found: Any, name: str, tensor: Tensor) -> None:
    if compat.is_packed(tensor):  # the tensors they consist of
        for inner in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
            _add_tensor(found, f"{name}.{inner}", getattr(tensor, inner))
        return
    found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    data = tensor.detach().cpu().contiguous()
    found.update(data.reshape(-1).view(torch.uint8).numpy().data if data.numel() else b"")


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of a tokenizer's vocabulary and chat template.

    Args:
        tokenizer: Any transformers tokenizer.

    Returns:
        SHA-256 in hexadecimal.
    """
    parts = [sorted(tokenizer.get_vocab().items()), getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def calibration_sha256(calibration: Calibration) -> str:
    """Hash of everything that a calibration's artifact holds.

    Args:
        calibration: At any bits.

    Returns:
        SHA-256 in hexadecimal.
    """
    tensors, config = to_files(calibration.layers, calibration.metadata)
    found = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        _add_tensor(found, name, tensor)
    return found.hexdigest()


def code_sha256() -> str:
    """Hash of the package's own source and compiled kernels, so that figures of two versions are never mixed.

    Returns:
        SHA-256 in hexadecimal.
    """
    kernels = find_spec("quantcache_kernels")
    places = list((kernels and kernels.submodule_search_locations) or [])
    found = hashlib.sha256()
    for root in (Path(__file__).resolve().parent.parent, *map(Path, places)):
        for path in sorted(root.rglob("*")):
            if path.suffix in (".py", ".so", ".pyd"):
                found.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def check_overlap(calibration: Calibration, text: str, name: str, used: str | None = None) -> dict[str, Any]:
    """Refuse to evaluate on what was calibrated on.

    Args:
        calibration: Its recipe names the texts that it was made on.
        text: Text to evaluate on.
        name: What the error calls it.
        used: The part of it that is evaluated on; all of it if None.

    Returns:
        What was found: ``text`` (``"differs"``) and ``passages`` (share of the sampled passages of the calibration text
        that the text holds; None where the calibration has no such sample).

    Raises:
        QuantCacheError: The text is the calibration text, or shares more than ``MAX_SHARED`` of its passages.
    """
    recipe = calibration.metadata.recipe
    digests = recipe.get("text_sha256") or ()
    if text_sha256(text) in ([digests] if isinstance(digests, str) else digests):
        raise QuantCacheError(f"{name} is the text that was calibrated on: evaluate on another one")
    passages = recipe.get("passages")
    if not passages:
        return {"text": "differs" if digests else "not recorded", "passages": None}
    hits, size = shared(passages, text if used is None else used)
    if hits > MAX_SHARED * size:
        raise QuantCacheError(
            f"{name} holds {hits} of {size} sampled passages that were calibrated on, "
            f"at most {MAX_SHARED:.0%} is allowed: evaluate on another text"
        )
    return {"text": "differs" if digests else "not recorded", "passages": hits / size}


def check_material(calibration: Calibration, material: Material, name: str, used: str) -> dict[str, Any]:
    """Refuse to evaluate on texts or questions that were calibrated on.

    Args:
        calibration: Its recipe names the texts that it was made on.
        material: What is evaluated on.
        name: What the error calls its text.
        used: The part of the text that is evaluated on.

    Returns:
        What :func:`check_overlap` found, for ``text`` and, where there are questions, ``qa``.

    Raises:
        QuantCacheError: Something was calibrated on.
    """
    found = {"text": check_overlap(calibration, material.text, name, used)}
    if material.questions is not None:
        paragraphs = "\n".join(dict.fromkeys(question.context for question in material.questions))
        found["qa"] = check_overlap(calibration, paragraphs, "the text of the questions")
    return found


def inputs(material: Material) -> dict[str, str | None]:
    """SHA-256 of everything that is measured with.

    Args:
        material: Model, texts and whatever else there is.

    Returns:
        Hashes by name; None for what there is not.
    """
    questions = None if material.questions is None else repr(list(material.questions))
    fitted = material.statistics
    found = {
        "model": model_sha256(material.model),
        "tokenizer": tokenizer_sha256(material.tokenizer),
        "calibration": None if material.calibration is None else calibration_sha256(material.calibration),
        "text": text_sha256(material.text),
        "questions": None if questions is None else text_sha256(questions),
        "draft": None if material.draft is None else model_sha256(material.draft),
        "statistics": None if fitted is None else text_sha256(repr((fitted.tokens, *fitted.text_sha256))),
        "length text": None if material.length_text is None else text_sha256(material.length_text),
        "code": code_sha256(),
    }
    return {**found, **{f"domain {name}": text_sha256(text) for name, text in material.domains.items()}}
