"""Artifacts with values that no model has: refused at once, or the same finite results from every backend."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantcache.artifact.calibration import Calibration
from quantcache.artifact.checks import MAX_ARTIFACT_HEADER, MAX_LAYERS
from quantcache.artifact.files import CONFIG_NAME, TENSORS_NAME
from quantcache.attention.function import spectral_attention
from quantcache.cache.layer import SpectralLayer
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.coding.schema import Metadata
from quantcache.common.errors import ArtifactError, CalibrationMismatch, QuantCacheError
from quantcache.common.jsonfile import MAX_BYTES, MAX_DEPTH
from tests.builders import llama_config

DIM, HEADS = 64, 2
KEY, VALUE = "layers.0.key.", "layers.0.value."
SECONDS = 5.0
"""A refusal takes milliseconds; a slow machine may take longer."""


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration of one layer whose keys have slow and fast dimensions."""
    folder = tmp_path_factory.mktemp("pristine")
    Calibration.synthetic(llama_config(DIM, layers=1), 3.0).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    for name in (CONFIG_NAME, TENSORS_NAME):
        (tmp_path / name).write_bytes((pristine / name).read_bytes())
    return tmp_path


def spoil_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change tensors of an artifact."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / TENSORS_NAME).items()}
    change(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / TENSORS_NAME, metadata={"format": "pt"})
    spoil_config(folder, lambda config: config.pop("digest"))  # else it is the digest that is found wrong


def spoil_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the JSON of an artifact."""
    path = folder / CONFIG_NAME
    config = json.loads(path.read_text("utf-8"))
    change(config)
    path.write_text(json.dumps(config), "utf-8")


def load(folder: Path) -> Calibration:
    """Load, with whatever is unknown left unsaid, in bounded time."""
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Calibration.from_pretrained(folder)
    finally:
        assert time.perf_counter() - started < SECONDS


def outputs(calibration: Calibration) -> list[Tensor]:
    """Attention over a filled layer: on its codes by the native kernels and by plain torch, and decoded."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, HEADS, 300, DIM, generator=generator) for _ in range(2))
    query = torch.randn(1, 2 * HEADS, 1, DIM, generator=generator)
    found = []
    for backend in ("cpu", "torch"):
        layer = SpectralCache(calibration, residual_length=0, backend=backend).spectral_layers[0]
        layer.update(keys, values)
        layer.flush()
        view = layer.snapshot()
        found.append(spectral_attention(query, view, None))
    dense = [view.dense(side).repeat_interleave(2, 1) for side in ("key", "value")]
    found.append(torch.nn.functional.scaled_dot_product_attention(query, *dense).transpose(1, 2))
    return found


def put(name: str, value: Any, *, where: Any = ...) -> Callable[[dict[str, Tensor]], None]:
    """Set elements of a tensor."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name][where] = value

    return change


def scale(factor: float, *names: str) -> Callable[[dict[str, Tensor]], None]:
    """Multiply tensors."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in names:
            tensors[name] *= factor

    return change


def chain(*changes: Callable[[dict[str, Tensor]], None]) -> Callable[[dict[str, Tensor]], None]:
    """Several changes."""

    def change(tensors: dict[str, Tensor]) -> None:
        for each in changes:
            each(tensors)

    return change


def mixed(tensors: dict[str, Tensor]) -> None:
    """An orthogonal key transform that is not block-diagonal."""
    noise = torch.randn(HEADS, DIM, DIM, generator=torch.Generator().manual_seed(3))
    tensors[KEY + "analysis"] = torch.linalg.qr(noise).Q


REFUSED_TENSORS = {
    "transform of keys mixes slow and fast": (mixed, "mixes slow and fast"),
    "one element mixes them": (put(KEY + "analysis", 1e-3, where=(0, 0, DIM - 1)), "mixes slow and fast"),
    "singular": (put(VALUE + "analysis", 0.0, where=(1, 0)), "not invertible"),
    "all zero": (put(VALUE + "analysis", 0.0), "not invertible"),
    "ill-conditioned": (put(VALUE + "analysis", 1e-12, where=(0, 0)), "not invertible"),
    "transform of 1e30": (scale(1e30, VALUE + "analysis"), "do not match"),
    "transform of 1e-30": (scale(1e-30, KEY + "analysis"), "do not match"),
    "mean of 1e30": (put(KEY + "mean", 1e30, where=(0, 3)), "mean has 1.0e+30"),
    "mean of -1e38": (put(VALUE + "mean", -1e38), "mean has 1.0e+38"),
    "mean NaN": (put(VALUE + "mean", float("nan"), where=(0, 0)), "NaN or infinite"),
    "spectrum infinite": (put(VALUE + "spectrum", float("inf")), "NaN or infinite"),
    "spectrum of 1e300": (put(VALUE + "spectrum", 1e300, where=(0, 0)), "spectrum has 1.0e+300"),
    "spectrum of 1e-300": (scale(1e-300, KEY + "spectrum"), "spectrum has 1.0e-300"),
    "spectrum negative": (put(KEY + "spectrum", -1e-9, where=(0, 5)), "negative values"),
    "frequency of 1e30": (put("rope.0.inv_freq", 1e30, where=0), "1e+30 radians per token"),
    "frequency of 7": (put("rope.0.inv_freq", 7.0, where=0), "7 radians per token"),
    "frequency negative": (put("rope.0.inv_freq", -1e-3, where=1), "negative values"),
    "widths above the rate": (put(KEY + "widths", 8), "bits on average, the rate says 3"),
    "widths below the rate": (put(VALUE + "widths", 0), "bits on average, the rate says 3"),
    "two widths in a group": (
        chain(put(KEY + "widths", 2, where=(0, 0)), put(KEY + "widths", 3, where=(0, 1))),
        "several widths in dimensions 0 to 1",
    ),
}


@pytest.mark.support("calibration files: hostile values")
@pytest.mark.parametrize(("change", "message"), REFUSED_TENSORS.values(), ids=REFUSED_TENSORS)
def test_tensors_refused(folder: Path, change: Callable[[dict[str, Tensor]], None], message: str) -> None:
    spoil_tensors(folder, change)
    with pytest.raises(ArtifactError, match=message.replace("+", r"\+")):
        load(folder)


ODD_TENSORS = {
    "untouched": lambda tensors: None,
    "means of 1e4": put(KEY + "mean", 1e4, where=(0, slice(0, 3))),
    "spectrum all zero": put(VALUE + "spectrum", 0.0),
    "spectrum of the keys all zero": put(KEY + "spectrum", 0.0),
    "one coefficient that never varied": put(KEY + "spectrum", 0.0, where=(0, DIM - 1)),
    "one variance of 1e-18": put(VALUE + "spectrum", 1e-18, where=(0, 3)),
    "units of 1e-12": chain(scale(1e-6, VALUE + "analysis"), scale(1e-12, VALUE + "spectrum")),
    "units of 1e12": chain(scale(1e6, KEY + "analysis"), scale(1e12, KEY + "spectrum")),
    "spectrum ascending": lambda t: t.update({VALUE + "spectrum": t[VALUE + "spectrum"].flip(-1)}),
    "frequencies of zero": put("rope.0.inv_freq", 0.0),
    "frequencies of a radian and more": put("rope.0.inv_freq", 3.1, where=slice(0, 5)),
}


@pytest.mark.support("calibration files: hostile values")
@pytest.mark.parametrize("change", ODD_TENSORS.values(), ids=ODD_TENSORS)
def test_tensors_that_are_odd(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    spoil_tensors(folder, change)
    calibration = load(folder)
    native, plain, decoded = outputs(calibration)
    assert all(bool(output.isfinite().all()) for output in (native, plain, decoded))
    size = float(decoded.abs().max().clamp_min(1.0))
    assert float((plain - decoded).abs().max()) < 1e-3 * size
    assert float((native - decoded).abs().max()) < 1e-3 * size


def set_in(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Set an entry of the JSON: keys, then the value."""
    *keys, last, value = path

    def change(config: Any) -> None:
        for key in keys:
            config = config[key]
        config[last] = value

    return change


def nested(depth: int) -> Any:
    """Lists in lists."""
    found: Any = 1
    for _ in range(depth):
        found = [found]
    return found


REFUSED_CONFIGS = {
    "a billion layers": (set_in("cache_config", "num_hidden_layers", 10**9), "num_hidden_layers"),
    "no layers at all": (set_in("cache_config", "num_hidden_layers", 0), "num_hidden_layers"),
    "layers as text": (set_in("cache_config", "num_hidden_layers", "2"), "num_hidden_layers"),
    "layers as a list": (set_in("cache_config", "num_hidden_layers", [1]), "num_hidden_layers"),
    "layers true": (set_in("cache_config", "num_hidden_layers", True), "num_hidden_layers"),
    "half a layer": (set_in("cache_config", "num_hidden_layers", 0.5), "num_hidden_layers"),
    "layer types as text": (set_in("cache_config", "layer_types", "full_attention"), "layer_types"),
    "layer types as numbers": (set_in("cache_config", "layer_types", [1]), "layer_types"),
    "layer types of other layers": (set_in("cache_config", "layer_types", ["full_attention"] * 3), "3 layer_types"),
    "window of a list": (set_in("cache_config", "sliding_window", [[]]), "sliding_window"),
    "window below": (set_in("cache_config", "sliding_window", -(1 << 60)), "sliding_window"),
    "shared layers": (set_in("cache_config", "num_kv_shared_layers", {}), "num_kv_shared_layers"),
    "states of no number": (set_in("cache_config", "number_of_conv_states", [1 << 40]), "number_of_conv_states"),
    "sharing modes as text": (set_in("cache_config", "kv_sharing_modes", "reuse"), "kv_sharing_modes"),
    "sharing modes as numbers": (set_in("cache_config", "kv_sharing_modes", [1]), "kv_sharing_modes"),
    "crossing layers": (set_in("cache_config", "cross_attention_layers", {"0": 1}), "cross_attention_layers"),
    "heads negative": (set_in("cache_config", "num_key_value_heads", -1), "num_key_value_heads"),
    "heads of each layer negative": (set_in("cache_config", "num_key_value_heads", [2, -1]), "num_key_value_heads"),
    "dimension huge": (set_in("cache_config", "head_dim", 1 << 40), "head_dim"),
    "type a number": (set_in("cache_config", "model_type", 5), "model_type"),
    "id a number": (set_in("base_model", "id", 5), "id of base_model"),
    "id a book": (set_in("base_model", "id", "x" * 100_000), "id of base_model"),
    "revision a list": (set_in("base_model", "revision", ["main"]), "revision of base_model"),
    "fingerprint a number": (set_in("base_model", "fingerprint", 5), "fingerprint"),
    "fingerprint of text": (
        set_in("base_model", "fingerprint", {"a": {"shape": [2, 2], "values": ["x"]}}),
        "fingerprint",
    ),
    "fingerprint of nothing": (set_in("base_model", "fingerprint", {"a": {}}), "fingerprint"),
    "tokens as text": (set_in("recipe", "tokens", "many"), "tokens of the recipe"),
    "digests as numbers": (set_in("recipe", "text_sha256", [1]), "text_sha256 of the recipe"),
    "passages as a list": (set_in("recipe", "passages", []), "passages of the recipe"),
    "yardstick as a list": (set_in("recipe", "yardstick", []), "yardstick of the recipe"),
    "layer 1e6": (set_in("layers", 0, "index", 10**6), "index must be"),
    "dimension of a layer": (set_in("layers", 0, "value_dim", 1 << 20), "more than any model has"),
    "a hundred thousand gains": (set_in("codec", "gain_search", [1.0] * 100_000), "gain_search has 100000"),
    "pairs without a layout": (set_in("rope", 0, "layout", "none"), "layout is 'none'"),
    "min_bits above the rate": (set_in("rate", "min_bits", 5), "min_bits is 5"),
    "another rate": (set_in("rate", "bits", 4.0), "the rate says 4"),
    "a rate of the keys' own": (set_in("rate", "key_bits", 7.0), "the rate says 7"),
    "deep": (set_in("recipe", "note", nested(MAX_DEPTH + 1)), "nested deeper"),
    "half a character": (set_in("base_model", "id", "\ud800"), "surrogates not allowed"),
    "a number that is none": (set_in("recipe", "loss", float("nan")), "the number NaN"),
    "large": (set_in("recipe", "note", "x" * (MAX_BYTES + 1)), "bytes"),
}


@pytest.mark.support("calibration files: hostile values")
@pytest.mark.parametrize(("change", "message"), REFUSED_CONFIGS.values(), ids=REFUSED_CONFIGS)
def test_descriptions_refused(folder: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    spoil_config(folder, change)
    with pytest.raises(ArtifactError, match=message) as caught:
        load(folder)
    assert len(str(caught.value)) < 1100


@pytest.mark.support("calibration files: hostile values")
def test_millions_of_layers(folder: Path) -> None:
    spoil_config(folder, lambda config: config.update(layers=[{}] * (MAX_LAYERS + 1)))
    with pytest.raises(ArtifactError, match="4,097 layers"):
        load(folder)
    (folder / CONFIG_NAME).write_text("[" + "{}," * 5_000_000 + "{}]", "utf-8")
    with pytest.raises(ArtifactError, match="more than"):
        load(folder)


TEXTS = {
    "deep lists": "[" * 100_000 + "]" * 100_000,
    "deep objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "a bit too deep": "[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2),
    "digits": '{"format": ' + "9" * 100_000 + "}",
    "twice": '{"format": "quantcache-calibration", "format": "other"}',
    "twice inside": '{"format": "quantcache-calibration", "rate": {"bits": 3, "bits": 8}}',
    "infinity": '{"format": -Infinity}',
    "nothing": "",
    "cut": '{"format": "quantcache-cal',
}


@pytest.mark.support("calibration files: hostile values")
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_text_that_is_hard_to_parse(folder: Path, text: str) -> None:
    (folder / CONFIG_NAME).write_text(text, "utf-8")
    with pytest.raises(ArtifactError, match="cannot be read"):
        load(folder)


@pytest.mark.support("calibration files: hostile values")
def test_headers(folder: Path) -> None:
    path = folder / TENSORS_NAME
    data = path.read_bytes()
    for claimed in (MAX_ARTIFACT_HEADER + 1, 100_000_000, 1 << 62):
        path.write_bytes(struct.pack("<Q", claimed) + data[8:])
        with pytest.raises(ArtifactError, match="header claims"):
            load(folder)
    with open(path, "wb") as file:  # a hole: as large as it claims, and empty
        file.write(struct.pack("<Q", 1 << 30))
        file.truncate((1 << 30) + 8)
    with pytest.raises(ArtifactError, match="header claims"):
        load(folder)


CACHE_CONFIGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "no layers": {"head_dim": DIM, "num_key_value_heads": HEADS},
    "unknown layers": {"num_hidden_layers": 1, "layer_types": ["telepathy"]},
    "a window without one": {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]},
    "all layers shared": {"num_hidden_layers": 1, "num_kv_shared_layers": 1},
    "other entries": {"num_hidden_layers": 1, "__class__": "x", "torch_dtype": [1], "rope_parameters": 5},
    "a list for each layer": {"num_hidden_layers": 1, "sliding_window": [None], "head_dim": [DIM]},
    "modes of other layers": {"num_hidden_layers": 1, "kv_sharing_modes": ["reuse", "x", None]},
    "no layer of its own": {"num_hidden_layers": 1, "layer_types": ["full_attention"], "num_kv_shared_layers": 9},
    "most layers": {"num_hidden_layers": MAX_LAYERS},
}


@pytest.mark.support("calibration files: hostile values")
@pytest.mark.parametrize("attributes", CACHE_CONFIGS.values(), ids=CACHE_CONFIGS)
def test_caches_without_a_config(folder: Path, attributes: dict[str, Any]) -> None:
    spoil_config(folder, lambda config: config.update(cache_config=attributes))
    started = time.perf_counter()
    with contextlib.suppress(QuantCacheError):
        (layer,) = SpectralCache(load(folder)).layers
        assert isinstance(layer, SpectralLayer)
    assert time.perf_counter() - started < SECONDS


UNCOMPRESSED: dict[str, tuple[dict[str, Any], list[int]]] = {
    "shared": ({"num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 3}, [2]),
    "all shared": ({"num_kv_shared_layers": 3, "layer_types": ["full_attention"] * 3}, [0, 1, 2]),
    "windows": ({"sliding_window": 8, "layer_types": ["full_attention", *["sliding_attention"] * 2]}, [1, 2]),
    "another input": ({"cross_attention_layers": [1]}, [1]),
    "fewer layers": ({"num_hidden_layers": 2}, [2]),
}


@pytest.mark.support("calibration files: hostile values")
@pytest.mark.parametrize(("attributes", "unused"), UNCOMPRESSED.values(), ids=UNCOMPRESSED)
def test_no_calibrated_layer_stays_dense_unsaid(attributes: dict[str, Any], unused: list[int]) -> None:
    made = Calibration.synthetic(llama_config(DIM, layers=3), 3.0)
    metadata = dataclasses.replace(made.metadata, cache_config=made.metadata.cache_config | attributes)
    assert len(SpectralCache(made).spectral_layers) == 3
    with pytest.raises(CalibrationMismatch, match=re.escape(f"covers layers {unused}, which this cache does not")):
        SpectralCache(Calibration(made.layers, metadata))
    if unused == [2]:  # nor where the model's own config is given
        with pytest.raises(CalibrationMismatch, match=re.escape("covers layers [2], which")):
            SpectralCache(Calibration(made.layers, Metadata()), llama_config(DIM, layers=2))
