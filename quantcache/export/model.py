"""Absorption as a whole: what happens to each tensor, and a loaded model changed in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from quantcache.artifact import cache_layout
from quantcache.artifact.calibration import Calibration
from quantcache.artifact.identity import ReadWeight, with_projections
from quantcache.cache.enabling import is_enabled
from quantcache.coding.rope import Frame
from quantcache.common import compat
from quantcache.common.choices import BASES, Basis
from quantcache.common.errors import CalibrationMismatch, QuantCacheError, UnsupportedModel
from quantcache.export.absorption import (
    ValueMap,
    absorbed_keys,
    absorbed_values,
    key_scale,
    map_output_projection,
    map_rows,
    scale_rows,
    value_map,
)
from quantcache.export.projections import Projection, Projections, TensorInfo, find_projections

ABSORBED = "absorbed"
"""Key of a calibration's recipe that says which basis its model's weights have taken in."""

ROUNDINGS = 4
"""Steps of rounding, of all outputs' norm, by which a projection may differ from the product with its weight."""


def check(model: PreTrainedModel | PreTrainedConfig, calibration: Calibration, basis: str) -> None:
    """Refuse what cannot be absorbed, before any weight is read.

    Args:
        model: The model, or where it is not loaded its config.
        calibration: Calibration of that model. Of other weights a warning says so.
        basis: ``spectral`` or ``flat``.

    Raises:
        ValueError: The basis is unknown.
        CalibrationMismatch: The calibration is for another geometry.
        QuantCacheError: The calibration belongs to a model that has absorbed a basis already.
    """
    if basis not in BASES:
        raise ValueError(f"basis must be one of {', '.join(BASES)}, got {basis!r}")
    config = model if isinstance(model, PreTrainedConfig) else model.config
    compat.require_decoder(config)
    calibration.check_compatible(model)
    wanted = cache_layout.full_attention_layers(config)
    if list(calibration.layers) != wanted:
        raise CalibrationMismatch(
            f"calibration covers layers {list(calibration.layers)}, the model's full-attention layers are {wanted}"
        )
    if ABSORBED in calibration.metadata.recipe:
        raise QuantCacheError(
            "the calibration belongs to a model that has absorbed its basis already: "
            f"{calibration.metadata.recipe[ABSORBED]}"
        )


@dataclass(frozen=True)
class LayerMaps:
    """What one layer's weights take in.

    Attributes:
        values: Change of basis of the values.
        keys: Scales of cached keys, ``[H, D]`` float64; None where keys stay as they are.
    """

    values: ValueMap
    keys: Tensor | None


def layer_maps(
    calibration: Calibration, projections: dict[int, Projections], basis: Basis, tensors: Mapping[str, TensorInfo]
) -> dict[int, LayerMaps]:
    """Every layer's maps.

    Keys are scaled for ``flat`` only: SpectralCache's codes of scaled keys are the codes of the keys.

    Args:
        calibration: Calibration of the model.
        projections: Every layer's projections.
        basis: ``spectral`` or ``flat``.
        tensors: All tensors of the checkpoint or model.

    Returns:
        The maps.
    """
    maps = {}
    for index, found in projections.items():
        layer = calibration.layers[index]
        scale = None
        if basis == "flat" and found.scales_keys:
            frame = Frame(layer.key.dim, layer.rope, calibration.metadata.codec.fast_wavelength)
            shared = found.norms is not None and tensors[found.norms[1]].shape == (layer.key.dim,)
            scale = key_scale(layer.key, layer.rope, frame, shared)
        maps[index] = LayerMaps(value_map(layer.value, basis, found.takes_mean), scale)
    return maps


def changed_tensors(
    projections: Projections, maps: LayerMaps, read: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The new tensors of one layer, one after the other.

    Args:
        projections: Where they are.
        maps: What they take in.
        read: Gives a tensor by name.

    Yields:
        Name and new tensor, with shape and dtype of the old one.
    """

    def read_both(projection: Projection) -> tuple[Tensor, Tensor | None]:
        weight = read(projection.weight)
        weight = (weight.T if projections.transposed else weight).clone()
        return weight, None if projection.bias is None else read(projection.bias).clone()

    def write_both(projection: Projection, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[str, Tensor]]:
        yield projection.weight, (weight.T if projections.transposed else weight).contiguous()
        if projection.bias is not None and bias is not None:
            yield projection.bias, bias

    scales: dict[str, Tensor] = {}
    if maps.keys is not None:
        groups = projections.query.rows.numel() // projections.key.rows.numel()
        scales = {"query": 1.0 / maps.keys.repeat_interleave(groups, dim=0), "key": maps.keys}
        if projections.norms is not None:
            for name, scale in zip(projections.norms, scales.values(), strict=True):
                weight = read(name)
                # One weight for all heads, whose scales are equal then, or one for each.
                factor = scale[0] if weight.shape == scale.shape[1:] else scale.reshape(weight.shape)
                offset = projections.norm_offset
                yield name, ((weight.double() + offset) * factor - offset).to(weight.dtype)
            scales = {}
    inputs = {"query": projections.query, "key": projections.key, "value": projections.value}
    changed = {role: p for role, p in inputs.items() if role == "value" or role in scales}
    for fused in {p.weight: p for p in changed.values()}.values():
        weight, bias = read_both(fused)
        for role, projection in changed.items():
            if projection.weight == fused.weight:
                if role == "value":
                    map_rows(weight, bias, projection.rows, maps.values)
                else:
                    scale_rows(weight, bias, projection.rows, scales[role].flatten())
        yield from write_both(fused, weight, bias)
    weight, bias = read_both(projections.output)
    yield from write_both(projections.output, *map_output_projection(weight, bias, maps.values))


def _require_plain(
    model: PreTrainedModel, projection: Projection, parameters: Mapping[str, Tensor], transposed: bool
) -> None:
    """Refuse a projection that computes something else than its weights say: another basis would change its outputs."""
    name = projection.weight.rpartition(".")[0]
    weight, bias = parameters[projection.weight], parameters.get(projection.bias or "")
    generator = torch.Generator("cpu").manual_seed(0)
    shape = 1, 2, weight.shape[0 if transposed else 1]
    x = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(weight)
    expected = torch.nn.functional.linear(x, weight.T if transposed else weight, bias).double()
    difference = model.get_submodule(name)(x).double() - expected
    rounding = ROUNDINGS * torch.finfo(weight.dtype).eps * expected.norm()
    if bool(rounding.isfinite()) and not bool(difference.norm() <= rounding):
        raise UnsupportedModel(
            f"{name} computes something else than its weights say: hooks change it, or it quantizes as it runs"
        )


def require_finite(name: str, tensor: Tensor) -> None:
    """Refuse a new weight that does not fit its dtype.

    Args:
        name: What the error calls it.
        tensor: The weight.

    Raises:
        QuantCacheError: It has NaN or infinite values.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise QuantCacheError(f"{name} does not fit {tensor.dtype} after absorption, or had NaN or infinite values")


def absorbed_calibration(
    calibration: Calibration,
    maps: dict[int, LayerMaps],
    projections: dict[int, Projections],
    basis: Basis,
    read: ReadWeight,
) -> Calibration:
    """The calibration of the model after absorption.

    Args:
        calibration: Calibration before absorption.
        maps: Every layer's maps.
        projections: Every layer's projections.
        basis: The basis the maps were made for.
        read: Gives a weight of the changed model by its name, so that its calibration can be told from the original's.

    Returns:
        A calibration that codes the same coefficients at the same bits.
    """
    layers = {}
    for index, layer in calibration.layers.items():
        keys, scale = layer.key, maps[index].keys
        if scale is not None:
            keys = absorbed_keys(keys, scale, Frame(keys.dim, layer.rope, calibration.metadata.codec.fast_wavelength))
        layers[index] = replace(layer, key=keys, value=absorbed_values(layer.value, maps[index].values, basis))
    mean = "weights" if all(p.takes_mean for p in projections.values()) else "cache"
    recipe = {**calibration.metadata.recipe, ABSORBED: {"basis": basis, "value_mean": mean}}
    base_model = with_projections(calibration.metadata.base_model, read)
    return Calibration(layers, replace(calibration.metadata, base_model=base_model, recipe=recipe))


@torch.no_grad()
def absorb(model: PreTrainedModel, calibration: Calibration, basis: Basis = "spectral") -> Calibration:
    """Fold the value basis of a calibration into a model's weights, in place.

    The model's outputs stay what they were up to rounding; what it caches as values changes. Absorb once: the
    calibration returned replaces the one given.

    Args:
        model: A decoder-only model with float weights.
        calibration: Calibration of the model as it is.
        basis: ``spectral``, the codec's own coefficients; or ``flat``, in which every coordinate carries the same
            energy and rotary pairs of keys are scaled too.

    Returns:
        The calibration of the changed model.

    Raises:
        CalibrationMismatch: The calibration is for another geometry. Of other weights a warning says so.
        QuantCacheError: A calibration is enabled on the model, which would no longer fit, the one given is of a model
            that has absorbed its basis already, or new weights do not fit their dtype.
        UnsupportedModel: The architecture is unknown, its weights are quantized, split, offloaded or adapted, or its
            projections compute something else than they say.
        ValueError: The basis is unknown.
    """
    if compat.adds_tokens(model):
        raise UnsupportedModel(
            f"{type(model).__name__} puts learned tokens before every text: values that were learned (PEFT's prefix "
            "tuning) would stay in the basis of before. Where embeddings were (prompt tuning), absorb into "
            "model.get_base_model()"
        )
    model = compat.unwrapped(model)
    if is_enabled(model):
        raise QuantCacheError(
            "a calibration is enabled on the model, and would not be that of its values any more: call "
            "quantcache.disable(model) first, and enable the calibration that absorb() returns"
        )
    check(model, calibration, basis)
    parameters = dict(model.named_parameters())
    tensors = {name: TensorInfo(tuple(p.shape), p.dtype) for name, p in parameters.items()}
    try:
        projections = find_projections(model.config, calibration, tensors)
    except UnsupportedModel as error:
        if any(f".{compat.ADAPTED}." in name for name in parameters):
            raise UnsupportedModel(f"{error}: merge its adapters first (PEFT's merge_and_unload())") from None
        raise
    names = [name for found in projections.values() for name in found.names()]
    offloaded = next((name for name in names if parameters[name].is_meta), None)
    if offloaded is not None:
        raise UnsupportedModel(f"{offloaded} is offloaded: load the whole model into memory before absorbing")
    packed = next((name for name in names if compat.is_packed(parameters[name])), None)
    if packed is not None:  # it may take what is copied into it, and stay what it was
        kind = type(parameters[packed]).__name__
        raise UnsupportedModel(f"{packed} is quantized or split (a {kind}): absorption needs whole float weights")
    maps = layer_maps(calibration, projections, basis, tensors)
    for index, found in projections.items():
        others = () if maps[index].keys is None else (found.query, found.key)
        for projection in (found.value, found.output, *others):
            _require_plain(model, projection, parameters, found.transposed)
    for index, found in projections.items():
        changed = list(changed_tensors(found, maps[index], lambda name: parameters[name].detach().cpu()))
        for name, tensor in changed:  # all first: with half of its projections a layer would compute something else
            require_finite(name, tensor)
        for name, tensor in changed:
            parameters[name].copy_(tensor)
    return absorbed_calibration(calibration, maps, projections, basis, parameters.get)
