"""One prefix for many continuations: forks that share it, and files that outlive the process."""

from __future__ import annotations

import copy
import functools
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from quantcache.artifact.calibration import Calibration
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.coding.schema import SIDES
from quantcache.common.errors import ArtifactError, CalibrationMismatch, QuantCacheError
from tests.builders import hide_present_objects, layer_storages, live_storages, scalar_calibration, storages
from tests.families import FAMILIES, Family, random_tokens, shared_model
from tests.helpers import feed

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = [family for family in FAMILIES if family.name in ("llama", "gpt2", "gemma3")]
LLAMA = MODELS[0]
by_model = pytest.mark.parametrize("family", MODELS, ids=str)
forking = pytest.mark.support("fork()")
saving = pytest.mark.support("save() and load()")


@functools.cache
def calibration_of(family: Family, seed: int = 0) -> Calibration:
    """A stand-in of the family's geometry."""
    return scalar_calibration(shared_model(family).config, 3.0, seed)


def filled(family: Family, tokens: int = 150, rows: int = 1, **options: Any) -> SpectralCache:
    """A cache of random tokens that keeps no recent ones."""
    options = {"residual_length": 0, **options}
    cache = SpectralCache(calibration_of(family), shared_model(family).config, **options)
    feed(shared_model(family), cache, random_tokens(rows, tokens, seed=1), (tokens,))
    return cache


def go_on(family: Family, cache: DynamicCache, seed: int, count: int = 80, rows: int = 1) -> Tensor:
    """Logits of further tokens, enough for a block."""
    return feed(shared_model(family), cache, random_tokens(rows, count, seed=seed), (1, count - 2, 1))


# ---------------------------------------------------------------------- forks


@forking
@by_model
def test_forks_go_on_as_deep_copies_do(family: Family) -> None:
    cache = filled(family, rows=2)
    copies, forks = [copy.deepcopy(cache) for _ in range(3)], [cache.fork() for _ in range(3)]
    for seed, (copied, fork) in enumerate(zip(copies, forks, strict=True)):
        assert torch.equal(go_on(family, fork, seed, rows=2), go_on(family, copied, seed, rows=2))
    assert cache.get_seq_length() == 150
    expected = go_on(family, copy.deepcopy(cache), 7, rows=2)
    assert torch.equal(go_on(family, cache, 7, rows=2), expected), "forks do not touch what they came from"
    assert torch.equal(go_on(family, forks[0].fork(), 8, rows=2), go_on(family, copies[0], 8, rows=2))


@forking
@pytest.mark.parametrize("first", ["original", "fork"])
@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.crop(-40),
        lambda cache: cache.crop(-100),
        lambda cache: cache.crop(-150),
        lambda cache: cache.reset(),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.batch_select_indices(torch.tensor([1])),
        lambda cache: cache.batch_repeat_interleave(2),
    ],
    ids=["crop", "crop-blocks", "crop-all", "reset", "reorder", "select", "repeat"],
)
def test_a_change_to_one_does_not_show_in_the_other(first: str, change: Callable[[SpectralCache], None]) -> None:
    original = filled(LLAMA, rows=2)
    fork = original.fork()
    changed, kept = (original, fork) if first == "original" else (fork, original)
    expected = go_on(LLAMA, copy.deepcopy(kept), 3, rows=2)
    change(changed)
    if changed.get_seq_length():
        go_on(LLAMA, changed, 4, rows=changed.spectral_layers[0].tails["key"].shape[0])
    assert torch.equal(go_on(LLAMA, kept, 3, rows=2), expected)


@forking
def test_forks_hold_nothing_until_they_encode() -> None:
    hide_present_objects()
    cache = filled(LLAMA, 400)
    before = live_storages()
    forks = [cache.fork() for _ in range(10)]
    assert live_storages() == before
    feed(shared_model(LLAMA), forks[0], random_tokens(1, 10, seed=2), (9, 1))
    new = layer_storages(forks[0].spectral_layers[0]) - layer_storages(cache.spectral_layers[0])
    assert len(new) == len(SIDES)  # the tails
    assert go_on(LLAMA, forks[0], 3).isfinite().all()
    for name in ("codes", "gains"):
        buffers = {fork.spectral_layers[0].stores["key"].buffers[name].data_ptr() for fork in forks}
        assert len(buffers) == 2


# ---------------------------------------------------------------------- files


@saving
@by_model
@pytest.mark.parametrize("tokens", [3, 40, 150, 400])
def test_saved_caches_go_on(family: Family, tokens: int, tmp_path: Path) -> None:
    model, path = shared_model(family), tmp_path / "new" / "prefix.safetensors"
    cache = filled(family, tokens, rows=2, bits=2.5, sink_length=5)
    cache.save(path, model)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    found = SpectralCache.load(path, calibration_of(family), model)
    assert found.get_seq_length() == tokens
    assert found.memory().total <= cache.memory().total
    for ours, theirs in zip(found.spectral_layers, cache.spectral_layers, strict=True):
        assert ours.spans == theirs.spans
        assert ours.codecs.keys() == theirs.codecs.keys()
    assert torch.equal(go_on(family, found, 5, rows=2), go_on(family, cache, 5, rows=2))


@saving
@pytest.mark.parametrize(
    "rates", [{}, {"key_bits": "dense"}, {"key_bits": "dense", "value_bits": "dense"}, {"bits": 0}]
)
def test_every_rate_is_saved(rates: dict[str, Any], tmp_path: Path) -> None:
    cache = filled(LLAMA, **rates)
    cache.save(tmp_path / "a")
    found = SpectralCache.load(tmp_path / "a", calibration_of(LLAMA).with_bits(4.0), config=shared_model(LLAMA).config)
    assert found.calibration.metadata.rate == cache.calibration.metadata.rate
    assert torch.equal(go_on(LLAMA, found, 5), go_on(LLAMA, cache, 5))


@saving
def test_cropped_padded_and_empty_caches_are_saved(tmp_path: Path) -> None:
    model = shared_model(LLAMA)
    cache = SpectralCache(calibration_of(LLAMA), model.config, residual_length=0)
    cache.save(tmp_path / "empty")
    assert SpectralCache.load(tmp_path / "empty", calibration_of(LLAMA), model).get_seq_length() == 0
    feed(model, cache, random_tokens(2, 200, seed=1), (180, 20), (70, 0))
    cache.crop(-30)  # inside the second block
    cache.save(tmp_path / "cut", model)
    found = SpectralCache.load(tmp_path / "cut", calibration_of(LLAMA), model)
    assert found.spectral_layers[0].state.blocks.cut
    assert found.spectral_layers[0].state.blocks.left_padding.tolist() == [70, 0]
    tokens = random_tokens(2, 100, seed=2)
    mask = (torch.arange(270) >= torch.tensor([70, 0])[:, None]).long()
    with torch.no_grad():
        ours, theirs = (model(tokens, attention_mask=mask, past_key_values=c).logits for c in (found, cache))
    assert torch.equal(ours, theirs)


@saving
def test_files_know_their_model_and_calibration(tmp_path: Path) -> None:
    path, model = tmp_path / "prefix", shared_model(LLAMA)
    filled(LLAMA).save(path, model)
    with pytest.raises(CalibrationMismatch, match=r"was filled by model .*, this one is"):
        SpectralCache.load(path, calibration_of(LLAMA), LLAMA.make(seed=1))
    with pytest.raises(CalibrationMismatch, match=r"was written with calibration .*, this one is"):
        SpectralCache.load(path, calibration_of(LLAMA, seed=1), model)
    with pytest.raises(CalibrationMismatch, match="head"):
        SpectralCache.load(path, calibration_of(LLAMA), shared_model(MODELS[1]))
    assert SpectralCache.load(path, calibration_of(LLAMA)).get_seq_length() == 150
    with pytest.raises(QuantCacheError, match="self-calibrating"):
        SpectralCache.self_calibrating(model).save(tmp_path / "other")
    assert [file.name for file in tmp_path.iterdir()] == ["prefix"]


@saving
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "rope_parameters",
            {"rope_type": "default", "rope_theta": 5e5},
            "rope_parameters.rope_theta 10000.0, .*500000.0",
        ),
        (
            "rope_parameters",
            {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
            "rope_type 'default', .*'linear'",
        ),
        ("rms_norm_eps", 0.5, "rms_norm_eps 1e-06, this one has 0.5"),
        ("max_position_embeddings", 4096, None),  # which says nothing of what is cached
    ],
)
def test_files_know_what_their_model_did_with_its_weights(
    name: str, value: Any, message: str | None, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path, model = tmp_path / "prefix", shared_model(LLAMA)
    filled(LLAMA).save(path, model)
    other = copy.deepcopy(model)
    setattr(other.config, name, value)
    if message is None:
        assert SpectralCache.load(path, calibration_of(LLAMA), other).get_seq_length() == 150
    else:
        with pytest.raises(CalibrationMismatch, match=message):
            SpectralCache.load(path, calibration_of(LLAMA), other)


@pytest.mark.slow
@saving
def test_files_know_the_adapters_that_were_at_work(tmp_path: Path) -> None:
    """A file was read with the adapters switched off, or others chosen, and refused to torch.compile's wrapper."""
    path, model = tmp_path / "prefix", LLAMA.make()
    adapted = model.model.layers[0].self_attn.k_proj
    adapted.disable_adapters, adapted.active_adapters, adapted.scaling = False, ["first"], {"first": 2.0}
    filled(LLAMA).save(path, model)
    for given in (model, torch.compile(model)):
        assert SpectralCache.load(path, calibration_of(LLAMA), given).get_seq_length() == 150
    for name, value in (("disable_adapters", True), ("active_adapters", ["other"]), ("scaling", {"first": 1.0})):
        other = copy.deepcopy(model)
        setattr(other.model.layers[0].self_attn.k_proj, name, value)
        with pytest.raises(CalibrationMismatch, match=r"was filled by a model with adapters .*first.*, this one has"):
            SpectralCache.load(path, calibration_of(LLAMA), other)


@saving
def test_a_calibration_is_no_path(tmp_path: Path) -> None:
    filled(LLAMA).save(tmp_path / "prefix")
    with pytest.raises(TypeError, match=r"needs a Calibration, got str: use Calibration\.from_pretrained"):
        SpectralCache.load(tmp_path / "prefix", "calibration/")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a model is needed to be identified by its weights, got LlamaConfig"):
        filled(LLAMA).save(tmp_path / "prefix", LLAMA.make().config)  # type: ignore[arg-type]


def test_a_cache_whose_layers_differ_is_not_saved(tmp_path: Path) -> None:
    cache = filled(MODELS[0])
    keys, values = (torch.zeros(1, 2, 1, 64) for _ in SIDES)
    cache.update(keys, values, 0)  # as an interrupted forward pass leaves it
    with pytest.raises(QuantCacheError, match=r"some layers hold 150 tokens and others 151.*call rollback\(\)"):
        cache.save(tmp_path / "cache")
    cache.rollback()
    cache.save(tmp_path / "cache")


@saving
def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "prefix"
    filled(LLAMA).save(path)
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("quantcache.cache.files.save_file", full)
    with pytest.raises(OSError, match="disk full"):
        filled(LLAMA, 300).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["prefix"]


def edited(data: bytes, edit: Callable[[dict[str, Any], dict[str, Any]], None]) -> bytes:
    """A saved cache with its header and its description changed."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    description = json.loads(header["__metadata__"]["quantcache"])
    edit(header, description)
    header["__metadata__"]["quantcache"] = json.dumps(description)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


FLAWS: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], Any], str]] = {
    "another-format": (lambda h, d: d.update(format="x"), "is not a saved cache"),
    "newer": (lambda h, d: d.update(schema_version="3.0"), "schema version 3.0"),
    "bits": (lambda h, d: d["rate"].update(bits="many"), "rate is malformed"),
    "rate": (lambda h, d: d.update(rate=[1]), "rate is malformed"),
    "sinks": (lambda h, d: d.update(sink_length=-1), "sink_length must be a number of tokens, got -1"),
    "more-sinks": (lambda h, d: d.update(sink_length=5), "shape"),
    "fewer-layers": (lambda h, d: d["layers"].pop(), "describes 1 layers, the model has 2"),
    "kind": (lambda h, d: d["layers"][0].update(kind="Other"), "layer 0 is a Other"),
    "rows": (lambda h, d: d["layers"][0].update(rows=1 << 30), "shape"),
    "blocks": (lambda h, d: d["layers"][0].update(blocks=1 << 30), "shape"),
    "no-blocks": (lambda h, d: d["layers"][0].update(blocks=0), "unknown tensors|tokens"),
    "tokens": (lambda h, d: d["layers"][0].update(tokens=7), "layer 0 holds 150 tokens, the header says 7"),
    "forgotten": (lambda h, d: d["layers"][0].update(tokens=0), "unknown tensors"),
    "dtype": (lambda h, d: d["layers"][0].update(dtypes=["torch.float16"] * 2), "is torch.float32, expected"),
    "not-a-dtype": (lambda h, d: d["layers"][0].update(dtypes=["os.system"] * 2), "dtypes must be"),
    "padded": (lambda h, d: d["layers"][0].update(padded=True), "lacks the tensor layers.0.starts"),
    "checksum": (lambda h, d: d.update(sha256="0"), "is damaged"),
    "missing": (lambda h, d: h.update({"other": h.pop("layers.0.key.codes")}), "lacks the tensor layers.0.key.codes"),
}


@saving
@pytest.mark.parametrize(("edit", "message"), FLAWS.values(), ids=FLAWS.keys())
def test_flaws_of_a_file(edit: Callable[..., Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "prefix"
    filled(LLAMA).save(path)
    path.write_bytes(edited(path.read_bytes(), edit))
    with pytest.raises((ArtifactError, CalibrationMismatch), match=message):
        SpectralCache.load(path, calibration_of(LLAMA))


@saving
@pytest.mark.parametrize(
    "block_table", [[[4, 64, 4], [68, 64, 300]], [[4, 64, 4], [67, 64, 4]], [[4, 65, 4], [69, 63, 4]]]
)
def test_blocks_that_cannot_follow_each_other(block_table: list[list[int]], tmp_path: Path) -> None:
    cache, path = filled(LLAMA), tmp_path / "prefix"
    cache.spectral_layers[0].state.blocks.table.buffers["block_table"].copy_(torch.tensor(block_table))
    cache.save(path)
    with pytest.raises(ArtifactError, match=r"a block at .* cannot follow one at"):
        SpectralCache.load(path, calibration_of(LLAMA))


@saving
def test_files_that_are_something_else(tmp_path: Path) -> None:
    path = tmp_path / "prefix"
    for data in (b"", b"\x80\x04N.", b"{}", bytes(100), struct.pack("<Q", 1 << 60) + b"{}"):
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match=re.escape(f"{path} cannot be read")):
            SpectralCache.load(path, calibration_of(LLAMA))
    with pytest.raises(ArtifactError, match="cannot be read"):
        SpectralCache.load(tmp_path / "nowhere", calibration_of(LLAMA))
    calibration_of(LLAMA).save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="is not a saved cache"):
        SpectralCache.load(tmp_path / "calibration.safetensors", calibration_of(LLAMA))


@saving
def test_no_two_tensors_of_a_file_share_memory(tmp_path: Path) -> None:
    cache = filled(LLAMA, 400)
    fork = cache.fork()
    fork.save(tmp_path / "prefix")
    found = SpectralCache.load(tmp_path / "prefix", calibration_of(LLAMA))
    held = [tensor for layer in found.spectral_layers for tensor in (*layer.tails.values(), *layer.sinks.values())]
    assert len(storages(held)) == len(held)
