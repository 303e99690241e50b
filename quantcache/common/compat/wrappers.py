"""What is wrapped around a model: torch.compile's modules and PEFT's, and the adapters that PEFT puts inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

ADAPTED = "base_layer"
"""What an adapter calls the module that it adds to."""

COPIED = "original_module"
"""What PEFT calls a module that has been copied for every adapter that trains it whole."""


def unwrapped(model: Any) -> Any:
    """The model itself, whose parts have the names that they have in its checkpoint.

    Args:
        model: A model, or a wrapper of torch.compile or PEFT around one.

    Returns:
        The model, with the adapters that are in it.
    """
    model = uncompiled(model)
    if not isinstance(model, transformers.PreTrainedModel) and hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return uncompiled(model)


def uncompiled(model: Any) -> Any:
    """The module that torch.compile's wrapper is around.

    Args:
        model: A module.

    Returns:
        The module inside; ``model`` itself where it is no such wrapper.
    """
    return getattr(model, "_orig_mod", model)


def adds_tokens(model: Any) -> bool:
    """Whether tokens of its own stand before every text that a model reads (PEFT's prompt and prefix tuning).

    Args:
        model: A model, or PEFT's wrapper around one.

    Returns:
        True if so; also for a model whose wrapper is just generating with it.
    """
    preparing = getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", None)
    for each in (model, preparing):
        configs = getattr(each, "peft_config", None)
        if isinstance(configs, dict) and any(getattr(one, "is_prompt_learning", False) for one in configs.values()):
            return True
    return False


def adapters_at_work(model: Any) -> list[str]:
    """What adapters add to a model's weights just now, which the weights themselves do not tell.

    Args:
        model: A model, or PEFT's wrapper around one.

    Returns:
        The states that its adapters are in, in words; none where it has no adapters.
    """
    found = set()
    for module in model.modules():
        off = getattr(module, "disable_adapters", None)
        if isinstance(off, bool):  # transformers' models have a method of this name
            named = list(getattr(module, "active_adapters", []))
            found.add("off" if off else f"{named}, scaled by {getattr(module, 'scaling', None)}")
    return sorted(found)


def adapters_by_row(model: Any) -> bool:
    """Whether the call that is generating uses adapters in a way of its own: in some rows, or from some token on.

    PEFT's generate has ``adapter_names=`` for the one, and offsets for the other (activated LoRA).

    Args:
        model: A model, or PEFT's wrapper around one.

    Returns:
        True if so: PEFT keeps them in hooks on its adapters for as long as the call runs.
    """
    hooks = (hook for module in unwrapped(model).modules() for hook in module._forward_pre_hooks.values())
    return any(not {"adapter_names", "alora_offsets"}.isdisjoint(getattr(hook, "keywords", {})) for hook in hooks)


def weights(model: Any) -> tuple[dict[str, Tensor], Callable[[str], Tensor | None]]:
    """A model's weights under the names that they have without adapters, and with what its LoRA adapters add to them.

    So a model is the same with its adapters merged or not. Of modules that adapters have trained whole, those at work
    count. Adapters of other kinds are left as they are.

    Args:
        model: A model, or a wrapper of torch.compile or PEFT around one.

    Returns:
        The parameters by name, of adapted modules the base's; and what gives a weight whole, None if there is none.
    """
    model = unwrapped(model)
    adapters = {name: module for name, module in model.named_modules() if _is_lora(module)}
    copied = {name: module for name, module in model.named_modules() if hasattr(module, COPIED)}
    owners, own = adapters | copied, dict(model.named_parameters())
    found = {}
    for name, parameter in own.items():
        parts = name.split(".")
        owner = next((s for i in range(len(parts)) if (s := ".".join(parts[:i])) in owners), None)
        inner = f"{owner}.{COPIED if owner in copied else ADAPTED}."
        if owner is None:
            found[name] = parameter
        elif name.startswith(inner):
            last = name.removeprefix(inner)
            found[f"{owner}.{last}"] = _at_work(copied[owner], last, parameter) if owner in copied else parameter

    def read(name: str) -> Tensor | None:
        adapter, _, last = name.rpartition(".")
        weight = found.get(name, own.get(name))
        if weight is None or last != "weight" or adapter not in adapters or weight.is_meta:
            return weight
        return _with_lora(adapters[adapter], weight)

    return found, read


def is_packed(tensor: Tensor) -> bool:
    """Whether a weight is a tensor around others: quantized (quanto, torchao) or split over processes (DTensor).

    Args:
        tensor: The weight, which may have the shape and the dtype of what it stands for.

    Returns:
        True if so.
    """
    return hasattr(tensor, "__tensor_flatten__")


def _is_lora(module: Any) -> bool:
    """Whether a module adds products of two small matrices to a weight, and nothing else."""
    plain = all(hasattr(module, name) for name in (ADAPTED, "lora_A", "get_delta_weight"))
    return plain and not getattr(module, "lora_variant", None)


def _at_work(module: Any, name: str, original: Tensor) -> Tensor:
    """The parameter in use of a module that PEFT has copied for adapters to train whole (``modules_to_save``)."""
    copies: Any = getattr(module, "modules_to_save", {})
    chosen = [] if module.disable_adapters else [each for each in module.active_adapters if each in copies]
    return copies[chosen[0]].get_parameter(name) if chosen else original


@torch.no_grad()
def _with_lora(module: Any, weight: Tensor) -> Tensor:
    """A weight and what is added to it as long as its adapters are at work and not merged."""
    if not weight.is_floating_point() or getattr(module, "merged", False) or getattr(module, "disable_adapters", False):
        return weight
    whole = weight.detach()
    for name in module.active_adapters:
        if name in module.lora_A or name in getattr(module, "lora_embedding_A", ()):
            whole = whole + module.get_delta_weight(name).to(whole)
    return whole
