"""Bounds of an artifact's values: all are checked before anything is built from them.

Bounds are far outside of what calibration writes. Within them the constants that kernels derive, and what they compute
from keys and values of any real model, stay finite in float32.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from quantcache.artifact import cache_layout
from quantcache.artifact.identity import FINGERPRINT, is_fingerprint
from quantcache.coding import linalg
from quantcache.coding.allocation import budgets, width_groups
from quantcache.coding.packing import MAX_WIDTH
from quantcache.coding.rope import Frame, Rope
from quantcache.coding.schema import LayerCalibration, Metadata, SideCalibration
from quantcache.common.errors import ArtifactError

MAX_LAYERS = 4096
MAX_HEADS = 4096
MAX_DIM = 8192

MAX_ELEMENTS = 1 << 27
"""Elements of one tensor."""

MAX_ARTIFACT_HEADER = 8 << 20
"""Bytes of the header of a calibration's or a cache's tensors."""

MAX_MEAN = 1e5
"""Beyond it float32 rounds scores by more than their differences, and results depend on the order of sums."""

MAX_VARIANCE = 1e18
MIN_VARIANCE = 1e-30
"""Of the largest coefficient, where it is not 0: smaller ones vanish in float32."""

MAX_CONDITION = 1e7

MAX_SCALE = 1e13
"""Entries of a transform over the deviation of its coefficient, and of its inverse times it."""

MAX_CHARACTERS = 512
"""Of a name."""

_PER_LAYER = ("num_key_value_heads", "head_dim", "sliding_window", "attention_chunk_size", "number_of_conv_states")
"""Counts of which a model whose layers differ has one for each."""

_COUNTS = {
    "number_of_conv_states": (0, 64),
    "num_hidden_layers": (1, MAX_LAYERS),
    "num_kv_shared_layers": (0, MAX_LAYERS),
    "sliding_window": (-1, 1 << 40),
    "attention_chunk_size": (-1, 1 << 40),
    "num_key_value_heads": (1, MAX_HEADS),
    "head_dim": (1, MAX_DIM),
}


def is_integer(value: Any, least: int, most: int) -> bool:
    """Whether a JSON value is a whole number within bounds."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


# ------------------------------------------------------------------- description


def check_description(path: Path, config: dict[str, Any]) -> None:
    """Check what an artifact's JSON says of the model and of how it was made.

    Args:
        path: The file, for messages.
        config: Its content; the sections are known to be objects and lists.

    Raises:
        ArtifactError: A value cannot be.
    """
    for name in ("id", "revision", "model_type"):
        value = config["base_model"].get(name)
        if value is not None and not (isinstance(value, str) and len(value) <= MAX_CHARACTERS):
            raise ArtifactError(
                f"{path}: {name} of base_model must be null or at most {MAX_CHARACTERS} characters, got {value!r:.100}"
            )
    if not is_fingerprint(config["base_model"].get(FINGERPRINT, {})):
        raise ArtifactError(f"{path}: fingerprint of base_model must map names of weights to samples of them")
    _check_cache_config(path, config["cache_config"])
    _check_recipe(path, config["recipe"])
    if len(config["layers"]) > MAX_LAYERS:
        raise ArtifactError(f"{path} has {len(config['layers']):,} layers, at most {MAX_LAYERS:,} are read")


def _check_cache_config(path: Path, attributes: dict[str, Any]) -> None:
    for name, (least, most) in _COUNTS.items():
        given = attributes.get(name)
        values = given if name in _PER_LAYER and isinstance(given, list) else [given]
        if not all(value is None or is_integer(value, least, most) for value in values):
            raise ArtifactError(
                f"{path}: {name} of cache_config must be an integer from {least} to {most}, got {given!r:.100}"
            )
    kinds, layers = attributes.get("layer_types"), attributes.get("num_hidden_layers")
    if kinds is not None and not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        raise ArtifactError(f"{path}: layer_types of cache_config must be a list of names, got {kinds!r:.100}")
    if kinds is not None and layers is not None and len(kinds) != layers:
        raise ArtifactError(f"{path}: cache_config has {len(kinds)} layer_types for {layers} layers")
    modes = attributes.get("kv_sharing_modes", [])
    if not (isinstance(modes, list) and all(mode is None or isinstance(mode, str) for mode in modes)):
        raise ArtifactError(f"{path}: kv_sharing_modes of cache_config must be a list of names, got {modes!r:.100}")
    crossing = attributes.get("cross_attention_layers", [])
    if not (isinstance(crossing, list) and all(is_integer(layer, 0, MAX_LAYERS) for layer in crossing)):
        raise ArtifactError(
            f"{path}: cross_attention_layers of cache_config must be layer indices, got {crossing!r:.100}"
        )
    kind = attributes.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise ArtifactError(f"{path}: model_type of cache_config must be a name, got {kind!r:.100}")


def _check_recipe(path: Path, recipe: dict[str, Any]) -> None:
    """Check the entries that are read again; the others are notes."""
    digests = recipe.get("text_sha256")
    listed = [digests] if isinstance(digests, str) else digests
    wrong = {
        "tokens": "tokens" in recipe and not is_integer(recipe["tokens"], 0, 1 << 60),
        "text_sha256": listed is not None
        and not (isinstance(listed, list) and all(isinstance(digest, str) for digest in listed)),
        "passages": not isinstance(recipe.get("passages", ""), str),
        "yardstick": not isinstance(recipe.get("yardstick", {}), dict),
        "absorbed": not isinstance(recipe.get("absorbed", {}), dict),
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise ArtifactError(f"{path}: {name} of the recipe cannot be {recipe[name]!r:.100}")


def stand_in_config(attributes: dict[str, Any]) -> PreTrainedConfig:
    """A config that gives the cache layers that an artifact describes.

    Args:
        attributes: Its ``cache_config``.

    Returns:
        A bare config.

    Raises:
        ArtifactError: transformers makes no cache of it.
    """
    try:
        config = cache_layout.config_from_cache_config(attributes)
        DynamicCache(config=config)
    except Exception as error:  # whatever transformers says of values that no model has
        message = f"no cache can be made from the calibration's cache_config ({type(error).__name__}: {error})"
        raise ArtifactError(f"{message}: pass the model's config") from error
    return config


# ----------------------------------------------------------------------- tensors


def check_sizes(where: str, heads: int, dim: int) -> None:
    """Refuse sizes that no model has, before memory is asked for.

    Args:
        where: What to call the side in messages.
        heads: Hkv, as the file declares it.
        dim: D, as the file declares it.

    Raises:
        ArtifactError: One is out of bounds, or the transforms would be too large.
    """
    if heads > MAX_HEADS or dim > MAX_DIM or heads * dim * dim > MAX_ELEMENTS:
        raise ArtifactError(f"{where} has {heads} heads of dimension {dim}: more than any model has")


def check_rope(where: str, layout: str, inv_freq: Tensor) -> None:
    """Check a rotation.

    Args:
        where: What to call it in messages.
        layout: ``none``, ``half`` or ``interleaved``.
        inv_freq: Radians per token of each pair, ``[pairs]``.

    Raises:
        ArtifactError: A pair turns backwards or more than once in a token, or pairs without a layout.
    """
    if bool((inv_freq < 0).any()):
        raise ArtifactError(f"{where}: inv_freq has negative values")
    if inv_freq.numel() and float(inv_freq.max()) > 2 * math.pi:
        raise ArtifactError(f"{where}: inv_freq has {float(inv_freq.max()):.3g} radians per token, at most 2 pi")
    if layout == "none" and inv_freq.numel():
        raise ArtifactError(f"{where}: layout is 'none', but it has {inv_freq.numel()} pairs")


def check_side(where: str, side: SideCalibration, rope: Rope, fast_wavelength: float) -> None:
    """Check the constants of one side, which are finite and of the right shape.

    Args:
        where: What to call it in messages.
        side: Constants of the keys or values of one layer.
        rope: The rotation of its vectors; ``Rope()`` for values.
        fast_wavelength: The codec's setting.

    Raises:
        ArtifactError: A value is out of bounds, the transform is singular or mixes the parts of the frame.
    """
    mean = float(side.mean.abs().max())
    if mean > MAX_MEAN:
        raise ArtifactError(f"{where}.mean has {mean:.1e}, at most {MAX_MEAN:.0e}")
    spectrum, analysis = side.spectrum.double(), side.analysis.double()
    if bool((spectrum < 0).any()):
        raise ArtifactError(f"{where}.spectrum has negative values")
    peak = float(spectrum.max())
    if peak > MAX_VARIANCE or 0 < peak < MIN_VARIANCE:
        raise ArtifactError(
            f"{where}.spectrum has {peak:.1e} at most: it must lie between {MIN_VARIANCE:.0e} and {MAX_VARIANCE:.0e}"
        )
    slow = Frame(side.dim, rope, fast_wavelength).num_slow
    if bool(analysis[:, :slow, slow:].any()) or bool(analysis[:, slow:, :slow].any()):
        raise ArtifactError(
            f"{where}.analysis mixes slow and fast dimensions: it must be block-diagonal over {slow} and "
            f"{side.dim - slow}"
        )
    singular = linalg.singular_values(analysis, f"{where}.analysis")
    largest, smallest = singular[:, 0], singular[:, -1]
    condition = largest / smallest  # infinite or NaN where it is singular
    if not bool((condition < MAX_CONDITION).all()):
        worst = float(condition.nan_to_num(math.inf).max())
        raise ArtifactError(f"{where}.analysis is not invertible (condition number {worst:.1e})")
    sigma = spectrum.clamp_min(1e-12 * peak if peak else 1.0).sqrt()
    encoder = float((analysis.abs() / sigma[..., None]).max()) * max(mean, 1.0)
    decoder = float((sigma.amax(-1) / smallest).max())
    if max(encoder, decoder) > MAX_SCALE:
        raise ArtifactError(
            f"{where}.analysis and spectrum do not match: constants up to {max(encoder, decoder):.1e}, at "
            f"most {MAX_SCALE:.0e}"
        )


def check_widths(path: Path, layers: dict[int, LayerCalibration], metadata: Metadata) -> None:
    """Compare the widths with the bits they are said to be allocated at.

    Args:
        path: The file, for messages.
        layers: Every layer's constants, by layer index.
        metadata: Rate and codec settings.

    Raises:
        ArtifactError: A budget is exceeded or not used, a width is below the least one, or a group has several.
    """
    rate, codec = metadata.rate, metadata.codec
    for bits, members in budgets(layers, rate, metadata.joint):
        total = elements = largest = 0
        highest = True
        for index, name in members:
            where = f"{path}: layers.{index}.{name}.widths"
            side = layers[index].side(name)
            assert side.widths is not None
            widths = side.widths.to(torch.int64)
            if int(widths.min()) < rate.min_bits:
                raise ArtifactError(f"{where} has {int(widths.min())} bits, min_bits is {rate.min_bits}")
            groups = width_groups(layers[index], name, codec)
            starts = [dims.start for dims in groups for _ in range(dims.start, dims.stop)]
            others = widths != (widths if codec.profile == "head" else widths[:1])[:, starts]
            if bool(others.any()):
                first = starts[int(others.any(0).nonzero()[0])]
                dims = next(dims for dims in groups if dims.start == first)
                raise ArtifactError(f"{where} has several widths in dimensions {dims.start} to {dims.stop - 1}")
            rows = 1 if codec.profile == "head" else side.num_heads
            largest = max(largest, *(rows * (dims.stop - dims.start) for dims in groups))
            total += int(widths.sum())
            elements += widths.numel()
            highest &= int(widths.min()) == MAX_WIDTH
        budget = bits * elements
        if not budget - largest - 1e-6 < total <= budget + 1e-6 and not (highest and total < budget):
            raise ArtifactError(
                f"{path}: the widths of {len(members)} sides have {total / elements:.4f} bits on average, the rate "
                f"says {bits:g}"
            )
