"""What errors in values cost in the output of attention, by the weights of its output projection."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quantcache.common.ambient import in_float64

_OUTPUT_NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo")

_LATENT_NAMES = ("kv_b_proj", "kv_a_proj_with_mqa", "kv_a_proj", "kv_up_proj")
"""Projections of attention that caches a latent: its values are made from what is cached, so W_O does not see that."""


def output_metrics(model: PreTrainedModel, shapes: dict[int, tuple[int, int]]) -> dict[int, Tensor]:
    """What an error in a value costs in the attention's output: Σ_h W_O,hᵀ W_O,h over the query heads of each head.

    Args:
        model: The model; its weights may be quantized, adapted or offloaded.
        shapes: Hkv and Dv of the layers wanted, as they reach the cache.

    Returns:
        ``[H, Dv, Dv]`` float64 for every layer whose output projection is found; a warning names the others.
    """
    found: dict[int, Tensor] = {}
    for module in model.modules():
        index: Any = getattr(module, "layer_idx", None)
        projection = next((p for n in _OUTPUT_NAMES if (p := getattr(module, n, None)) is not None), None)
        latent = any(hasattr(module, name) for name in _LATENT_NAMES)
        if index not in shapes or index in found or latent or not isinstance(projection, nn.Module):
            continue
        heads, dim = shapes[index]
        weight = _weight_of(projection)
        if weight is None or weight.shape[1] % (heads * dim):
            continue
        per_head = in_float64(weight).unflatten(1, (heads, -1, dim))  # [hidden, H, G, Dv]
        found[index] = torch.einsum("ohgd,ohge->hde", per_head, per_head)
    missing = [index for index in shapes if index not in found]
    if missing:
        warnings.warn(f"no output projection found in layers {missing}: their values are weighted alike", stacklevel=3)
    return found


@torch.no_grad()
def _weight_of(projection: nn.Module) -> Tensor | None:
    """What a linear projection multiplies by, ``[out, in]``, however it stores that; None if it is not accessible."""
    weight: Any = getattr(projection, "weight", None)
    plain = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and weight.element_size() > 1
    if plain and not weight.is_meta and type(projection) in (nn.Linear, Conv1D):
        stored: Tensor = weight.detach()
        return stored.T if type(projection) is Conv1D else stored
    # Quantized, adapted and offloaded weights each have their own form: what the layer does with unit vectors shows it.
    features = getattr(projection, "in_features", None) or (weight.shape[-1] if plain and weight.ndim == 2 else None)
    if not isinstance(features, int):
        return None
    was_training = projection.training
    try:
        device, dtype = _input_kind(projection)
        units = torch.eye(features, device=device, dtype=dtype)[None]
        projection.eval()
        rows = projection(units)[0] - projection(torch.zeros_like(units[:, :1]))[0]
    except torch.OutOfMemoryError:
        raise  # not the layer's fault
    except Exception:  # any library's layers may come here, and the metric is only a refinement
        return None
    finally:
        projection.train(was_training)
    usable = rows.ndim == 2 and rows.shape[0] == features and bool(torch.isfinite(rows).all())
    return rows.T if usable else None


def _input_kind(projection: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of what a projection is given."""
    hook: Any = getattr(projection, "_hf_hook", None)
    tensors = [*projection.parameters(), *projection.buffers()]
    floating = [t.dtype for t in tensors if t.is_floating_point() and t.element_size() > 1]
    compute = getattr(projection, "compute_dtype", None)
    device = getattr(hook, "execution_device", None)
    if device is None:
        device = tensors[0].device
    return torch.device(device), compute or (floating[0] if floating else torch.get_default_dtype())
