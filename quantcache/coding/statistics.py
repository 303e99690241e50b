"""Statistics of one layer's keys and values, and the transforms that follow from them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quantcache.coding.rope import Frame, Rope, anchor_of
from quantcache.coding.schema import SIDES, CodecSettings, LayerCalibration, SideCalibration
from quantcache.coding.spectral import METRIC_SHRINKAGE, Moments, shrink, split_klt
from quantcache.common.ambient import float64_device, in_float64
from quantcache.common.defaults import SINK_LENGTH
from quantcache.common.errors import UnsupportedModel

COVARIANCE_SHRINKAGE = 1e-4
"""Share of isotropic covariance mixed in, so that directions the text never took stay representable."""


class LayerStatistics:
    """Second moments of one layer's framed keys and values, and of the metric at them."""

    def __init__(self, index: int, rope: Rope, keys: Tensor, values: Tensor, settings: CodecSettings):
        self.index, self.rope = index, rope
        device = float64_device(keys.device)
        self.frames = {
            "key": Frame(keys.shape[-1], rope, settings.fast_wavelength, device),
            "value": Frame(values.shape[-1], Rope(), device=device),
        }
        shapes = {"key": keys.shape, "value": values.shape}
        self.moments = {side: Moments(shapes[side][1], shapes[side][3], device) for side in SIDES}
        self.metrics = {side: Moments(shapes[side][1], shapes[side][3], device) for side in SIDES}

    @property
    def kv_shape(self) -> tuple[int, int]:
        """Hkv and the dimension of a value."""
        heads, dim = self.moments["value"].sum.shape
        return heads, dim

    def _framed(self, side: str, x: Tensor, position: int | Tensor = 0) -> Tensor:
        """Framed vectors of sequences after their sinks: ``[B, H, T, D]`` to ``[H, B * T', D]``."""
        frame = self.frames[side]
        slots = torch.arange(SINK_LENGTH, x.shape[2], dtype=torch.int64, device=frame.order.device)
        x = x.detach()[:, :, SINK_LENGTH:].to(frame.order.device).double()
        anchors = anchor_of(slots, SINK_LENGTH)
        if isinstance(position, Tensor):
            position = position[SINK_LENGTH:].to(frame.order.device)
        return frame.enter(x, slots + position, anchors + position).transpose(0, 1).flatten(1, 2)

    def add(self, side: str, x: Tensor, position: int | Tensor = 0) -> None:
        """Add the vectors of one batch of sequences, ``[B, H, T, D]``, whose first tokens stand at a position.

        Where positions do not count tokens, ``[T]``: what each token's is ahead of such a count.
        """
        self.moments[side].add(self._framed(side, x, position))

    def add_gradient(self, side: str, gradient: Tensor) -> None:
        """Add the loss gradients at the vectors of one batch, ``[B, H, T, D]``."""
        self.metrics[side].add(self._framed(side, gradient))

    def add_queries(self, query: Tensor, generator: torch.Generator) -> None:
        """Add queries ``[B, Hq, T, D]``, each as a randomly drawn earlier key sees it."""
        frame = self.frames["key"]
        _batch, _heads, length, dim = query.shape
        if dim != frame.head_dim:
            raise UnsupportedModel(
                f"layer {self.index} caches keys of dimension {frame.head_dim} but its queries have {dim}, so they "
                "cannot weigh the keys: use metric='fisher'"
            )
        device = frame.order.device
        positions = torch.arange(SINK_LENGTH, length, dtype=torch.int64, device="cpu")
        drawn = torch.rand(len(positions), generator=generator, dtype=torch.float32, device="cpu") * (
            positions - SINK_LENGTH + 1
        )
        keys = (drawn.long() + SINK_LENGTH).to(device)
        framed = frame.enter(query.detach()[:, :, SINK_LENGTH:].to(device).double(), keys, anchor_of(keys, SINK_LENGTH))
        kv_heads = self.moments["key"].sum.shape[0]
        self.metrics["key"].add(framed.unflatten(1, (kv_heads, -1)).transpose(0, 1).reshape(kv_heads, -1, dim))

    def solve(self, output_metric: Tensor | None = None, shrinkage: float = COVARIANCE_SHRINKAGE) -> LayerCalibration:
        """The layer's transforms.

        Args:
            output_metric: The values' metric, if not their gradients' (see :func:`output_metrics`).
            shrinkage: Share of isotropic covariance mixed in; more where the samples are few.

        Returns:
            Means, transforms and spectra, without widths.
        """
        sides = {}
        for side in SIDES:
            frame, moments, metric = self.frames[side], self.moments[side], self.metrics[side]
            matrix = metric.second_moment
            if side == "value" and output_metric is not None:
                matrix = output_metric.to(matrix)
            elif not metric.count:
                matrix = torch.eye(frame.head_dim, dtype=torch.float64, device=matrix.device).expand_as(matrix)
            covariance = shrink(moments.covariance, shrinkage)
            transform = split_klt(covariance, matrix, (frame.num_slow, frame.num_fast), METRIC_SHRINKAGE)
            sides[side] = SideCalibration(
                moments.mean.float().cpu(), transform.analysis.float().cpu(), transform.spectrum.cpu()
            )
        return LayerCalibration(self.rope, sides["key"], sides["value"])


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
