"""The artifact: round trips, rates, safe writing, and one clear error for every flaw."""

from __future__ import annotations

import ast
import itertools
import json
import math
import os
import stat
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantcache
import quantcache_kernels
from quantcache.artifact import cache_layout
from quantcache.artifact import calibration as artifact
from quantcache.artifact.calibration import Calibration
from quantcache.artifact.files import CONFIG_NAME, SCHEMA_VERSION, TENSORS_NAME
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.cli.loading import load_calibration
from quantcache.coding.rope import Rope
from quantcache.coding.schema import SIDES, CodecSettings, Rate
from quantcache.common.errors import ArtifactError, CalibrationMismatch
from quantcache.data import calibrations_path
from tests.builders import llama_config

HEADS, DIM, LAYERS = 2, 32, 2
FILES = (TENSORS_NAME, CONFIG_NAME, "README.md")


def make(bits: float = 3.0, seed: int = 0) -> Calibration:
    """A small calibration with provenance."""
    calibration = Calibration.synthetic(llama_config(DIM, LAYERS, HEADS), bits, seed)
    metadata = replace(
        calibration.metadata,
        base_model={"id": "some-org/some-model", "revision": "0123abcd", "model_type": "llama"},
        recipe={"metric": "fisher", "tokens": 4096, "text_sha256": "feed"},
    )
    return Calibration(calibration.layers, metadata)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a saved calibration."""
    folder = tmp_path / "calibration"
    make().save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones included, by name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same(found: Calibration, expected: Calibration) -> None:
    """Equal in every tensor and every word."""
    assert found.metadata == expected.metadata
    assert found.layers.keys() == expected.layers.keys()
    for index, layer in expected.layers.items():
        assert found.layers[index].rope == layer.rope
        for side in SIDES:
            ours, theirs = vars(found.layers[index].side(side)), vars(layer.side(side))
            for name, tensor in theirs.items():
                if tensor is None:
                    assert ours[name] is None
                else:
                    assert ours[name].dtype == tensor.dtype
                    assert torch.equal(ours[name], tensor)


# ------------------------------------------------------------------ round trip


@pytest.mark.parametrize(
    "rate",
    [
        {},
        {"bits": 2.75, "min_bits": 1},
        {"bits": 3.0, "key_bits": "dense"},
        {"bits": 3.0, "key_bits": 2, "value_bits": 4.5},
    ],
    ids=str,
)
def test_round_trip(tmp_path: Path, rate: dict[str, Any]) -> None:
    calibration = make().with_bits(**rate) if rate else make()
    calibration.save_pretrained(tmp_path / "a")
    loaded = Calibration.from_pretrained(tmp_path / "a")
    assert_same(loaded, calibration)
    assert (loaded.bits, loaded.bits_per_element) == (calibration.bits, calibration.bits_per_element)
    loaded.save_pretrained(str(tmp_path / "b"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert set(contents(tmp_path / "a")) == set(FILES)


def test_layers_of_different_rotation_and_order(tmp_path: Path) -> None:
    calibration = make()
    first, second = calibration.layers[0], calibration.layers[1]
    layers = {7: replace(second, rope=Rope("interleaved", second.rope.inv_freq)), 2: replace(first, rope=Rope())}
    codec = CodecSettings(group_size=4, profile="layer", fast_wavelength=64.5, gain_search=(1.0, 1.25), passes=3)
    odd = Calibration(layers, replace(calibration.metadata, codec=codec, joint=False)).with_bits(3.0)
    odd.save_pretrained(tmp_path)
    assert_same(Calibration.from_pretrained(tmp_path), odd)
    assert list(Calibration.from_pretrained(tmp_path).layers) == [2, 7]


def test_frequencies_survive_to_the_last_bit(tmp_path: Path) -> None:
    calibration = make()
    rope = Rope("half", tuple(float(f) * (1 + 2.0**-52) for f in calibration.layers[0].rope.inv_freq))
    alone = Calibration({0: replace(calibration.layers[0], rope=rope)}, calibration.metadata)
    alone.with_bits(3.0).save_pretrained(tmp_path)
    assert Calibration.from_pretrained(tmp_path).layers[0].rope == rope


def test_files_of_before_the_choice_have_scalar_codes(saved: Path) -> None:
    assert Calibration.from_pretrained(saved).metadata.codec == CodecSettings()
    edit_config(saved, lambda config: config["codec"].pop("coding"))
    assert Calibration.from_pretrained(saved).metadata.codec == CodecSettings(coding="scalar")


def test_a_calibration_all_of_whose_pairs_are_fast_can_be_read_again(tmp_path: Path) -> None:
    """JSON has no infinity: what was written could not be read."""
    settings = CodecSettings(fast_wavelength=math.inf)
    Calibration.synthetic(llama_config(DIM, LAYERS, HEADS), codec=settings).save_pretrained(tmp_path)
    assert Calibration.from_pretrained(tmp_path).metadata.codec == settings


def test_what_the_artifact_records(saved: Path) -> None:
    config = json.loads((saved / CONFIG_NAME).read_text("utf-8"))
    assert config["format"] == "quantcache-calibration"
    assert config["schema_version"] == SCHEMA_VERSION
    assert config["base_model"] == {"id": "some-org/some-model", "revision": "0123abcd", "model_type": "llama"}
    assert config["recipe"]["text_sha256"] == "feed"
    assert config["cache_config"]["num_hidden_layers"] == LAYERS
    assert config["cache_config"]["num_key_value_heads"] == HEADS
    assert config["cache_config"]["head_dim"] == DIM
    assert config["rope"] == [{"layout": "half", "num_pairs": DIM // 2}]
    assert config["codec"]["block"] == 64
    assert config["rate"]["bits"] == 3.0
    assert set(config["environment"]) >= {"quantcache", "torch", "transformers"}
    with safe_open(saved / TENSORS_NAME, framework="pt") as file:
        assert set(file.keys()) == {"rope.0.inv_freq"} | {
            f"layers.{i}.{side}.{name}"
            for i in range(LAYERS)
            for side in SIDES
            for name in ("mean", "analysis", "spectrum", "widths")
        }


def test_a_cache_can_be_built_from_the_artifact_alone(saved: Path) -> None:
    cache = SpectralCache.from_pretrained(saved)
    assert len(cache.spectral_layers) == LAYERS
    assert SpectralCache.from_pretrained(saved, bits=2.0).calibration.bits == pytest.approx(2.0, abs=0.1)


def test_subfolders(saved: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    saved.rename(model / "quantcache")
    assert_same(Calibration.from_pretrained(model), make())
    (model / "quantcache").rename(model / "other")
    assert_same(Calibration.from_pretrained(model, subfolder="other"), make())
    with pytest.raises(ArtifactError, match="is not a calibration folder: missing"):
        Calibration.from_pretrained(model)


def test_representation() -> None:
    assert repr(make()) == f"Calibration(some-org/some-model, 2 layers, {make().bits:g} bits)"


# ------------------------------------------------------------------ writing


MODEL_FILES = {
    "config.json": b'{"model_type": "llama"}',
    "README.md": b"the model's own card\n",
    "model.safetensors": b"weights",
    "generation_config.json": b"{}",
    "sub/tokenizer.json": b"{}",
}


@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
def test_files_of_a_model_are_left_alone(tmp_path: Path, again: bool) -> None:
    (tmp_path / "sub").mkdir()
    for name, data in MODEL_FILES.items():
        (tmp_path / name).write_bytes(data)
    make().save_pretrained(tmp_path)
    if again:
        make(2.0).save_pretrained(tmp_path, config={"a": 1}, model_card_kwargs={"metrics": [{"kl": 1}]})
    after = contents(tmp_path)
    assert {name: after.pop(name) for name in MODEL_FILES} == MODEL_FILES
    assert set(after) == {TENSORS_NAME, CONFIG_NAME}
    assert_same(Calibration.from_pretrained(tmp_path), make(2.0) if again else make())


def test_a_card_goes_with_its_calibration(tmp_path: Path) -> None:
    """The card of the first calibration that was saved in a folder described all later ones."""
    card = tmp_path / "README.md"
    for bits, metrics in ((3.0, [{"kl": 1}]), (2.0, None), (1.0, [{"kl": 2}, {"kl": 3}]), (4.0, None)):
        made = make(bits)
        made.save_pretrained(tmp_path, model_card_kwargs={"metrics": metrics})
        assert card.read_text() == str(made.generate_model_card(metrics=metrics))
    changed = card.read_text() + "Not for production.\n"
    card.write_text(changed)
    make(2.0).save_pretrained(tmp_path)
    assert card.read_text() == changed


@pytest.mark.parametrize("failing", [1, 2, 3])
@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_failing_rename_leaves_whole_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int, existing: bool
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    make(3.0).save_pretrained(old)
    make(2.0).save_pretrained(new)
    target = tmp_path / "target"
    if existing:
        make(3.0).save_pretrained(target)
        (target / "README.md").unlink()
    calls = 0
    replace_file = os.replace

    def fail(source: Any, destination: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(28, "No space left on device")
        replace_file(source, destination)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        make(2.0).save_pretrained(target)
    before, after = contents(old), contents(new)
    left = contents(target)
    assert set(left) <= set(FILES), "a temporary file was left behind"
    for name, data in left.items():
        assert data in ((before[name], after[name]) if existing else (after[name],))
    if failing == 1:
        assert left == ({name: before[name] for name in (TENSORS_NAME, CONFIG_NAME)} if existing else {})


@pytest.mark.parametrize("stage", ["tensors", "config", "card"])
def test_failing_write_leaves_the_old_files(saved: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    before = contents(saved)

    def fail(*args: Any, **kwargs: Any) -> None:
        if stage == "tensors":
            Path(args[1]).write_bytes(b"half a fi")
        raise OSError(5, "Input/output error")

    if stage == "tensors":
        monkeypatch.setattr(artifact, "save_file", fail)
    elif stage == "config":
        monkeypatch.setattr(artifact, "to_files", fail)
    else:
        monkeypatch.setattr(artifact, "render_card", fail)
    with pytest.raises(OSError, match="Input/output"):
        make(2.0).save_pretrained(saved)
    assert contents(saved) == before
    assert sorted(os.listdir(saved)) == sorted(FILES)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_tensors_are_as_readable_as_the_config(saved: Path) -> None:
    modes = {stat.S_IMODE((saved / name).stat().st_mode) for name in FILES}
    assert len(modes) == 1
    assert modes.pop() & stat.S_IRUSR


def test_saving_does_not_depend_on_memory_layout(tmp_path: Path) -> None:
    calibration = make()
    layer = calibration.layers[0]
    side = replace(layer.value, analysis=layer.value.analysis.mT.contiguous().mT)
    assert not side.analysis.is_contiguous()
    twin = Calibration({**calibration.layers, 0: replace(layer, value=side)}, calibration.metadata)
    twin.save_pretrained(tmp_path / "a")
    calibration.save_pretrained(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


# ------------------------------------------------------------------ rates


RATES = (2, 2.5, 3.0, 3.3, 4.25, 5, 6.75, 7.99, 8)


@pytest.mark.parametrize("bits", RATES)
def test_with_bits(bits: float) -> None:
    calibration = make()
    other = calibration.with_bits(bits)
    elements = LAYERS * 2 * HEADS * DIM
    assert bits - 8 / elements < other.bits <= bits  # one group of 8 may not have fitted
    assert other.bits_per_element == pytest.approx(other.bits + 8 / DIM, rel=1e-12)
    assert other.metadata.rate.bits == bits
    assert calibration.bits <= 3.0
    for index, layer in calibration.layers.items():
        for side in SIDES:
            assert other.layers[index].side(side).analysis is layer.side(side).analysis
    assert_same(other.with_bits(3.0), calibration)


def test_more_bits_take_none_away() -> None:
    calibration = make()
    for low, high in itertools.pairwise(RATES):
        less, more = calibration.with_bits(low), calibration.with_bits(high)
        for index in calibration.layers:
            for side in SIDES:
                assert (less.layers[index].side(side).widths <= more.layers[index].side(side).widths).all()


def widths_of(calibration: Calibration, side: str) -> Tensor:
    """All widths of one side."""
    return torch.cat([layer.side(side).widths.flatten() for layer in calibration.layers.values()]).double()


def test_rates_of_the_sides() -> None:
    calibration = make()
    apart = calibration.with_bits(key_bits=2.5, value_bits=4)
    assert float(widths_of(apart, "key").mean()) == pytest.approx(2.5, abs=8 / (LAYERS * HEADS * DIM))
    assert float(widths_of(apart, "value").mean()) == 4
    values_only = calibration.with_bits(3.0, key_bits="dense")
    assert all(layer.key.widths is None for layer in values_only.layers.values())
    assert float(widths_of(values_only, "value").mean()) == pytest.approx(3.0, abs=8 / (LAYERS * HEADS * DIM))
    assert values_only.bits == float(widths_of(values_only, "value").mean())
    dense = calibration.with_bits(key_bits="dense", value_bits="dense")
    assert dense.bits == dense.bits_per_element == 0.0
    assert_same(dense.with_bits(3.0, key_bits="joint", value_bits="joint"), calibration)


def test_bits_that_no_side_shares_are_refused() -> None:
    """They were taken, and changed nothing."""
    apart = make().with_bits(key_bits="dense", value_bits=2)
    message = "bits=4 changes nothing: this calibration has key_bits='dense' and value_bits=2; give those, or 'joint'"
    for use in (apart.with_bits, lambda bits: SpectralCache(apart, bits=bits)):
        with pytest.raises(ValueError, match=message):
            use(4)
    assert apart.with_bits(4, value_bits="joint").bits == 4
    assert apart.with_bits(min_bits=1).bits == 2


def test_what_is_not_given_stays(tmp_path: Path) -> None:
    shared = make().with_bits(3.0, value_bits="dense", min_bits=1)
    shared.save_pretrained(tmp_path)
    assert shared.with_bits(2.0).metadata.rate == Rate(2.0, "joint", "dense", 1)
    assert load_calibration(str(tmp_path), 2.0).metadata.rate == Rate(2.0, "joint", "dense", 1)
    calibration = shared.with_bits(key_bits=4)
    for given, rate in (
        ({"key_bits": 2}, Rate(3.0, 2, "dense", 1)),
        ({"value_bits": "joint"}, Rate(3.0, 4, "joint", 1)),
        ({"min_bits": 2}, Rate(3.0, 4, "dense", 2)),
        ({"min_bits": 0, "key_bits": "joint"}, Rate(3.0, "joint", "dense", 0)),
    ):
        assert calibration.with_bits(**given).metadata.rate == rate
        assert SpectralCache(calibration, **given).calibration.metadata.rate == rate
    assert calibration.with_bits() is calibration is SpectralCache(calibration).calibration
    assert_same(calibration.with_rate(Rate(3)), make())


def test_dense_is_null_on_disk(tmp_path: Path) -> None:
    calibration = make().with_bits(3.0, value_bits="dense")
    calibration.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / CONFIG_NAME).read_text("utf-8"))["rate"]
    assert (stored["key_bits"], stored["value_bits"]) == ("joint", None)
    assert Calibration.from_pretrained(tmp_path).metadata.rate.value_bits == "dense"


def test_min_bits() -> None:
    calibration = make().with_bits(3.0, min_bits=2)
    assert min(float(widths_of(calibration, side).min()) for side in SIDES) == 2
    assert calibration.bits <= 3.0
    assert min(float(widths_of(make(), side).min()) for side in SIDES) < 2


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        ({"bits": 8.5}, "got 8.5"),
        ({"bits": -1}, "got -1"),
        ({"bits": float("nan")}, "got nan"),
        ({"bits": 1.0, "min_bits": 2}, r"min_bits \(2\) and 8, got 1.0"),
        ({"key_bits": 9}, "key_bits must lie between .* got 9"),
        ({"bits": "3"}, "bits must be a number from 0 to 8, got '3'"),
        ({"bits": True}, "bits must be a number from 0 to 8, got True"),
        ({"value_bits": True}, "value_bits must be a number from 0 to 8, got True"),
        ({"min_bits": True}, "min_bits must be a whole number from 0 up, got True"),
        ({"value_bits": -0.5}, "got -0.5"),
        ({"key_bits": "thin"}, "key_bits must be a number, 'dense' or 'joint', got 'thin'"),
        ({"bits": 3.0, "min_bits": -1}, "-1"),
        # No side is left to share the common budget, but it is recorded, and would be refused when loaded.
        ({"bits": 9.0, "key_bits": 2.0, "value_bits": 2.0}, "got 9"),
        ({"bits": float("nan"), "key_bits": "dense", "value_bits": "dense"}, "got nan"),
    ],
    ids=str,
)
def test_rates_out_of_range(rate: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().with_bits(**rate)


def test_none_is_no_rate() -> None:
    with pytest.raises(ValueError, match="key_bits must be a number, 'dense' or 'joint', got None"):
        make().with_rate(Rate(3.0, None))  # type: ignore[arg-type]


def test_synthetic_is_deterministic() -> None:
    assert_same(make(seed=3), make(seed=3))
    assert not torch.equal(make(seed=3).layers[0].key.analysis, make(seed=4).layers[0].key.analysis)


# ------------------------------------------------------------------ flaws of files


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the JSON of a saved calibration."""
    config = json.loads((folder / CONFIG_NAME).read_text("utf-8"))
    change(config)
    (folder / CONFIG_NAME).write_text(json.dumps(config), "utf-8")


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a saved calibration."""
    with safe_open(folder / TENSORS_NAME, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / TENSORS_NAME)
    change(tensors)
    save_file(tensors, folder / TENSORS_NAME, metadata=metadata)


def load_error(folder: Path, kind: type[Exception] = ArtifactError) -> str:
    """The message of the error that loading gives: one line of exactly this class, without warnings before it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(kind) as caught:
            Calibration.from_pretrained(folder)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


def put(*path: Any) -> Callable[[Any], None]:
    """A change that sets a nested value: keys, then the value."""
    *keys, last, value = path

    def change(node: Any) -> None:
        for key in keys:
            node = node[key]
        node[last] = value

    return change


def drop(*path: Any) -> Callable[[Any], None]:
    """A change that deletes a nested value."""
    *keys, last = path

    def change(node: Any) -> None:
        for key in keys:
            node = node[key]
        del node[last]

    return change


CONFIG_FLAWS = {
    "format": (put("format", "peft"), "format 'peft', expected 'quantcache-calibration'"),
    "no-format": (drop("format"), "format None, expected 'quantcache-calibration'"),
    "major-schema": (put("schema_version", "2.0"), f"schema version 2.0, this quantcache reads {SCHEMA_VERSION}"),
    "no-schema": (drop("schema_version"), f"schema version None, this quantcache reads {SCHEMA_VERSION}"),
    "block": (put("codec", "block", 128), "block is 128, this quantcache reads 64"),
    "anchor": (put("codec", "anchor_length", 64), "anchor_length is 64, this quantcache reads 128"),
    "profile": (put("codec", "profile", "model"), "profile must be one of head, layer, got 'model'"),
    "coding": (put("codec", "coding", "turbo"), "coding must be one of scalar, trellis, got 'turbo'"),
    "group-size": (put("codec", "group_size", 0), "group_size must be an integer from 1 to"),
    "group-size-real": (put("codec", "group_size", 8.5), "group_size must be an integer from 1 to"),
    "wavelength": (put("codec", "fast_wavelength", "long"), "fast_wavelength must be a number"),
    "gain-search": (put("codec", "gain_search", []), "gain_search must be a list of numbers between 0 and 16, got []"),
    "passes-none": (put("codec", "passes", 0), "passes must be an integer from 1 to 8, got 0"),
    "passes-many": (put("codec", "passes", 9), "passes must be an integer from 1 to 8, got 9"),
    "passes-true": (put("codec", "passes", True), "passes must be an integer from 1 to 8, got True"),
    "gain-zero": (put("codec", "gain_search", [0.0]), "between 0 and 16, got [0.0]"),
    "no-codec-key": (drop("codec", "profile"), "codec lacks profile"),
    "codec-kind": (put("codec", [1]), "codec must be an object, got list"),
    "no-section": (drop("layers"), "file lacks layers"),
    "bits-high": (put("rate", "bits", 9), "bits must be a number from 0 to 8, got 9"),
    "bits-nan": (put("rate", "bits", float("nan")), "the number NaN, which is not JSON"),
    "bits-infinite": (put("rate", "bits", float("inf")), "the number Infinity, which is not JSON"),
    "bits-huge": (put("rate", "bits", 10**400), "bits must be a number from 0 to 8, got 1000"),
    "bits-true": (put("rate", "bits", True), "bits must be a number from 0 to 8, got True"),
    "key-bits": (put("rate", "key_bits", "few"), "key_bits must be a number from 0 to 8, got 'few'"),
    "min-bits": (put("rate", "min_bits", 1.5), "min_bits must be an integer from 0 to 8, got 1.5"),
    "joint": (put("rate", "joint", 1), "joint must be true or false, got 1"),
    "base-model-kind": (put("base_model", "llama"), "base_model must be an object, got str"),
    "recipe-kind": (put("recipe", None), "recipe must be an object, got NoneType"),
    "layers-kind": (put("layers", {"0": {}}), "layers must be a list of objects"),
    "layer-kind": (put("layers", 0, 5), "layers must be a list of objects"),
    "twice": (put("layers", 1, "index", 0), "layer 0 is listed twice"),
    "index": (put("layers", 0, "index", -1), "index must be an integer from 0 to"),
    "no-index": (drop("layers", 0, "index"), "index must be an integer from 0 to"),
    "heads": (put("layers", 0, "num_key_value_heads", 3), "shape [2, 32], expected [3, 32]"),
    "key-dim": (put("layers", 0, "key_dim", 64), "shape [2, 32], expected [2, 64]"),
    "key-dim-under-rotation": (put("layers", 0, "key_dim", 16), "key_dim must be an integer from 32 to"),
    "value-dim": (put("layers", 1, "value_dim", 0), "value_dim must be an integer from 1 to"),
    "rope-index": (put("layers", 0, "rope", 1), "rope must be an integer from 0 to 0, got 1"),
    "layout": (put("rope", 0, "layout", "spiral"), "layout is 'spiral', expected 'none', 'half' or 'interleaved'"),
    "pairs": (put("rope", 0, "num_pairs", 8), "rope.0.inv_freq has shape [16], expected [8]"),
    "no-ropes": (put("rope", []), "rope must be an integer"),
}


@pytest.mark.parametrize(("change", "message"), CONFIG_FLAWS.values(), ids=CONFIG_FLAWS.keys())
def test_flaws_of_the_config(saved: Path, change: Callable[[Any], None], message: str) -> None:
    edit_config(saved, change)
    assert message in load_error(saved)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "cannot be read"),
        (b"", "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"[]", "format 'list', expected 'quantcache-calibration'"),
        (b"3", "format 'int', expected 'quantcache-calibration'"),
    ],
    ids=["truncated", "empty", "binary", "deep", "list", "number"],
)
def test_config_that_is_no_json_object(saved: Path, data: bytes, message: str) -> None:
    (saved / CONFIG_NAME).write_bytes(data)
    error = load_error(saved)
    assert message in error
    assert CONFIG_NAME in error


KEY = "layers.0.key."


def change_tensor(name: str, function: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    """A change of one tensor."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = function(tensors[name]).contiguous()

    return change


def spoil(value: float) -> Callable[[Tensor], Tensor]:
    """Overwrite the last entry."""

    def function(tensor: Tensor) -> Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return function


TENSOR_FLAWS = {
    "missing": (drop("layers.1.value.analysis"), "lacks the tensor layers.1.value.analysis"),
    "missing-widths": (drop(KEY + "widths"), f"lacks the tensor {KEY}widths"),
    "missing-rope": (drop("rope.0.inv_freq"), "lacks the tensor rope.0.inv_freq"),
    "shape": (change_tensor(KEY + "mean", lambda t: t[:, :31]), f"{KEY}mean has shape [2, 31], expected [2, 32]"),
    "rank": (change_tensor(KEY + "mean", lambda t: t[0]), f"{KEY}mean has shape [32], expected [2, 32]"),
    "dtype": (
        change_tensor(KEY + "analysis", lambda t: t.bfloat16()),
        f"{KEY}analysis is torch.bfloat16, expected torch.float32",
    ),
    "spectrum-dtype": (
        change_tensor(KEY + "spectrum", lambda t: t.float()),
        f"{KEY}spectrum is torch.float32, expected torch.float64",
    ),
    "widths-dtype": (
        change_tensor(KEY + "widths", lambda t: t.int()),
        f"{KEY}widths is torch.int32, expected torch.uint8",
    ),
    "nan": (change_tensor(KEY + "mean", spoil(float("nan"))), f"{KEY}mean has NaN or infinite values"),
    "infinite": (change_tensor(KEY + "analysis", spoil(float("inf"))), f"{KEY}analysis has NaN or infinite values"),
    "nan-rope": (change_tensor("rope.0.inv_freq", spoil(float("nan"))), "inv_freq has NaN or infinite values"),
    "negative-rope": (change_tensor("rope.0.inv_freq", spoil(-1.0)), "inv_freq has negative values"),
    "negative-spectrum": (change_tensor(KEY + "spectrum", spoil(-1.0)), f"{KEY}spectrum has negative values"),
    "wide": (change_tensor(KEY + "widths", spoil(9)), f"{KEY}widths has 9 bits, at most 8"),
    "singular": (change_tensor(KEY + "analysis", torch.zeros_like), f"{KEY}analysis is not invertible"),
    "nearly-singular": (
        change_tensor(KEY + "analysis", lambda t: torch.cat((t[:, :1] * 1e-9, t[:, 1:]), dim=1)),
        f"{KEY}analysis is not invertible (condition number",
    ),
}


@pytest.mark.parametrize(("change", "message"), TENSOR_FLAWS.values(), ids=TENSOR_FLAWS.keys())
def test_flaws_of_the_tensors(saved: Path, change: Callable[[Any], None], message: str) -> None:
    edit_tensors(saved, change)
    error = load_error(saved)
    assert message in error


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_truncated_tensors(saved: Path, keep: int) -> None:
    data = (saved / TENSORS_NAME).read_bytes()
    (saved / TENSORS_NAME).write_bytes(data[:keep])
    assert f"{TENSORS_NAME} cannot be read" in load_error(saved)


@pytest.mark.parametrize("name", [CONFIG_NAME, TENSORS_NAME])
def test_missing_file(saved: Path, name: str) -> None:
    (saved / name).unlink()
    assert load_error(saved) == f"{saved} is not a calibration folder: missing {name}"


@pytest.mark.parametrize("name", [CONFIG_NAME, TENSORS_NAME, "notes.txt", "empty"])
def test_a_file_in_place_of_the_folder(saved: Path, name: str) -> None:
    file = saved / name
    if not file.exists():
        file.write_text("" if name == "empty" else "a word or two")
    expected = f"{file} is a file: a calibration is a folder with {CONFIG_NAME} and {TENSORS_NAME}"
    assert load_error(file) == expected
    with pytest.raises(ArtifactError) as caught:
        Calibration.from_pretrained(str(file))
    assert str(caught.value) == expected


def test_folder_of_something_else(tmp_path: Path) -> None:
    assert load_error(tmp_path) == f"{tmp_path} is not a calibration folder: missing {CONFIG_NAME} and {TENSORS_NAME}"


@pytest.mark.parametrize(
    "spelling", ["{}/missing", "{}/missing/", "./missing-folder", "../missing-folder", "~/missing"]
)
def test_folder_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str) -> None:
    monkeypatch.chdir(tmp_path)
    name = spelling.format(tmp_path)
    with pytest.raises(ArtifactError, match="there is no folder"):
        Calibration.from_pretrained(name)
    with pytest.raises(ArtifactError, match="there is no folder"):
        Calibration.from_pretrained(Path(name))


def test_a_folder_that_is_not_here_is_not_asked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantcache.artifact.hub.download", lambda *args, **kwargs: pytest.fail("the Hub was asked"))
    with pytest.raises(ArtifactError, match="there is no folder calibration, and repositories on the Hub are called"):
        Calibration.from_pretrained("calibration")
    with pytest.raises(ArtifactError, match=r"Calibration\.for_model\('wiki11m'\)"):
        Calibration.from_pretrained("wiki11m")


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (put("colour", "red"), "colour"),
        (put("codec", "dither", True), "dither"),
        (put("rate", "lagrangian", 1), "lagrangian"),
    ],
)
def test_unknown_keys_warn(saved: Path, change: Callable[[Any], None], names: str) -> None:
    edit_config(saved, change)
    with pytest.warns(UserWarning, match=f"ignoring unknown .*{names}"):
        loaded = Calibration.from_pretrained(saved)
    assert_same(loaded, make())


def test_unknown_tensors_warn(saved: Path) -> None:
    edit_tensors(saved, put("layers.0.key.skew", torch.zeros(2)))
    with pytest.warns(UserWarning, match=r"ignoring unknown tensors layers\.0\.key\.skew"):
        loaded = Calibration.from_pretrained(saved)
    assert_same(loaded, make())


def test_newer_minor_schema_is_read(saved: Path) -> None:
    edit_config(saved, put("schema_version", SCHEMA_VERSION.split(".")[0] + ".99"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(Calibration.from_pretrained(saved), make())


# ------------------------------------------------------------------ other models


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (llama_config(DIM, LAYERS + 1, HEADS), "num_hidden_layers 2, the model has 3"),
        (llama_config(DIM, LAYERS, HEADS + 1), "num_key_value_heads 2, the model has 3"),
        (llama_config(2 * DIM, LAYERS, HEADS), "head_dim 32, the model has 64"),
    ],
    ids=["layers", "heads", "dimension"],
)
def test_model_of_another_geometry(config: Any, message: str) -> None:
    calibration = make()
    calibration.check_compatible(llama_config(DIM, LAYERS, HEADS))
    with pytest.raises(CalibrationMismatch, match=message):
        calibration.check_compatible(config)
    with pytest.raises(CalibrationMismatch, match=message):
        SpectralCache(calibration, config)


def test_model_of_other_layer_types() -> None:
    calibration = make()
    types = ["sliding_attention", "full_attention"]
    metadata = replace(
        calibration.metadata, cache_config={**calibration.metadata.cache_config, "layer_types": ["full_attention"] * 2}
    )
    config = llama_config(DIM, LAYERS, HEADS, layer_types=types, sliding_window=16)
    assert cache_layout.cache_config(config)["layer_types"] == types
    with pytest.raises(CalibrationMismatch, match=r"layer_types \['full.*the model has \['sliding"):
        Calibration(calibration.layers, metadata).check_compatible(config)


def test_calibration_without_one_of_the_layers() -> None:
    calibration = make()
    del calibration.layers[1]
    with pytest.raises(CalibrationMismatch, match=r"full-attention layer 1, the calibration covers layers \[0\]"):
        SpectralCache(calibration)


def test_keys_of_another_shape() -> None:
    cache = SpectralCache(make())
    good, bad = torch.randn(1, HEADS, 5, DIM), torch.randn(1, HEADS, 5, DIM + 2)
    for keys, values, name in ((bad, good, "key"), (good, bad, "value")):
        with pytest.raises(CalibrationMismatch, match=rf"layer 0: .*{name}s .*\(2, 34\), the calibration's \(2, 32\)"):
            cache.update(keys, values, 0)


# ------------------------------------------------------------------ no pickle


PACKAGES = [Path(package.__file__).parent for package in (quantcache, quantcache_kernels)]
SOURCES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))
UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"torch.load", "torch.save", "np.load", "numpy.load", "eval", "exec"}


def unsafe_uses(source: str) -> list[str]:
    """Modules that unpickle and calls that can run code from a file, as a piece of source names them."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in UNSAFE_MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [n for n in names if n.split(".")[0] in UNSAFE_MODULES or n in UNSAFE_CALLS]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in UNSAFE_CALLS:
            found.append(ast.unparse(node.func))
    return found


def test_unsafe_uses_are_recognised() -> None:
    source = "import pickle\nfrom torch import load\nimport torch\ndef f(p):\n    return torch.load(p)\n"
    assert unsafe_uses(source) == ["pickle", "torch.load", "torch.load"]
    assert unsafe_uses("model.eval()\ntorch.loads\n") == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_pickle_anywhere(path: Path) -> None:
    assert unsafe_uses(path.read_text("utf-8")) == []


def test_pickled_files_are_refused_and_never_run(saved: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    pickled = f"cos\nmkdir\n(S'{trap}'\ntR.".encode()  # what unpickling runs: os.mkdir(trap)
    for name in (TENSORS_NAME, CONFIG_NAME):
        original = (saved / name).read_bytes()
        (saved / name).write_bytes(pickled)
        assert "cannot be read" in load_error(saved)
        (saved / name).write_bytes(original)
    assert not trap.exists()


# ------------------------------------------------------------------ the Hub


class FakeHub:
    """Stands in for the Hub: files by repository, and what was asked of it."""

    def __init__(self, root: Path):
        self.root = root
        self.downloads: list[dict[str, Any]] = []
        self.uploads: list[dict[str, Any]] = []
        self.created: list[dict[str, Any]] = []
        self.tokens: list[Any] = []

    def download(self, repo_id: str, filename: str, subfolder: str | None = None, **kwargs: Any) -> str:
        """In place of ``hf_hub_download``."""
        self.downloads.append({"repo_id": repo_id, "filename": filename, "subfolder": subfolder, **kwargs})
        return str(self.root / repo_id / (subfolder or "") / filename)

    def __call__(self, token: Any = None, **kwargs: Any) -> FakeHub:
        """In place of ``HfApi(...)``."""
        self.tokens.append(token)
        return self

    def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
        """In place of ``HfApi.create_repo``."""
        self.created.append({"repo_id": repo_id, **kwargs})
        return type("RepoUrl", (), {"repo_id": repo_id})

    def upload_folder(self, folder_path: Path, **kwargs: Any) -> str:
        """In place of ``HfApi.upload_folder``."""
        self.uploads.append({"files": contents(Path(folder_path)), **kwargs})
        return "https://hub.example/commit/1"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """A Hub that answers from a folder."""
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr("quantcache.artifact.hub.hf_hub_download", fake.download)
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", fake)
    return fake


def test_loading_from_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    make().save_pretrained(hub.root / "some-org/some-calibration")
    options = {
        "revision": "v2",
        "token": "secret",
        "cache_dir": tmp_path,
        "force_download": True,
        "local_files_only": False,
    }
    assert_same(Calibration.from_pretrained("some-org/some-calibration", **options), make())
    assert [d["filename"] for d in hub.downloads] == [CONFIG_NAME, TENSORS_NAME]
    for download in hub.downloads:
        assert download["repo_id"] == "some-org/some-calibration"
        assert {name: download[name] for name in options} == options
        assert download["subfolder"] is None


def test_loading_from_a_subfolder_of_a_repository(hub: FakeHub) -> None:
    make().save_pretrained(hub.root / "some-org/some-model/quantcache")
    assert_same(Calibration.from_pretrained("some-org/some-model", subfolder="quantcache"), make())
    for subfolder in ("quantcache", None, ""):  # transformers says "" where it means none
        assert_same(Calibration.from_pretrained(hub.root / "some-org/some-model", subfolder=subfolder), make())


def test_what_is_asked_for_in_vain(saved: Path) -> None:
    """``bits`` was passed over without a word."""
    with pytest.raises(TypeError, match=r"takes no bits, strict: with_bits\(\) changes its bits"):
        Calibration.from_pretrained(saved, bits=2.0, strict=True)


def test_a_cache_from_the_hub(hub: FakeHub) -> None:
    make().save_pretrained(hub.root / "some-org/some-calibration")
    cache = SpectralCache.from_pretrained("some-org/some-calibration", revision="v2", residual_length=0)
    assert_same(cache.calibration, make())
    assert {d["revision"] for d in hub.downloads} == {"v2"}


def test_pushing(hub: FakeHub, saved: Path) -> None:
    url = make().push_to_hub("some-org/some-calibration", token="secret", private=True, branch="dev")
    assert url == "https://hub.example/commit/1"
    assert hub.created == [{"repo_id": "some-org/some-calibration", "private": True, "exist_ok": True}]
    assert hub.tokens == ["secret"]
    (upload,) = hub.uploads
    card = upload["files"].pop("README.md")
    assert b'from_pretrained("some-org/some-calibration"' in card
    assert upload["files"] == {name: data for name, data in contents(saved).items() if name != "README.md"}
    assert (upload["repo_id"], upload["revision"]) == ("some-org/some-calibration", "dev")


def test_saving_and_pushing(hub: FakeHub, tmp_path: Path) -> None:
    rows = [{"method": "spectral-3", "kl_mean": 0.0102}]
    url = make().save_pretrained(
        tmp_path / "named", repo_id="some-org/other", push_to_hub=True, model_card_kwargs={"metrics": rows}
    )
    assert url == "https://hub.example/commit/1"
    assert hub.uploads[0]["repo_id"] == "some-org/other"
    assert b"0.0102" in hub.uploads[0]["files"]["README.md"]
    assert (tmp_path / "named" / TENSORS_NAME).exists()
    make().save_pretrained(tmp_path / "named", push_to_hub=True)
    assert hub.uploads[1]["repo_id"] == "named"


def test_saving_does_not_push(hub: FakeHub, tmp_path: Path) -> None:
    assert make().save_pretrained(tmp_path / "here") is None
    assert hub.created == hub.uploads == []


# ------------------------------------------------------------------ the card


def test_card(saved: Path) -> None:
    text = (saved / "README.md").read_text("utf-8")
    header = yaml.safe_load(text.split("---")[1])
    assert header["library_name"] == "quantcache"
    assert header["license"] == "apache-2.0"
    assert header["base_model"] == "some-org/some-model"
    assert {"kv-cache", "quantization", "quantcache"} <= set(header["tags"])
    calibration = make()
    assert f"{calibration.bits_per_element:.3f} bits per element" in text
    assert f"{calibration.bits:.2f} bits of codes" in text
    assert "| tokens | 4096 |" in text
    assert "| text_sha256 | feed |" in text
    assert 'SpectralCache.from_pretrained("' in text
    assert "Measured" not in text
    assert isinstance(ModelCard(text), ModelCard)


def test_code_of_the_card_is_python() -> None:
    code = str(make().generate_model_card()).split("```python\n")[1].split("```")[0]
    names = {node.attr for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute)}
    assert {"from_pretrained", "generate"} <= names


def test_code_of_the_card_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the bundled calibration, word for word: its model is known by a name that transformers does not know."""
    folder = calibrations_path() / "wiki11m"
    card = (folder / "README.md").read_text("utf-8")
    assert str(Calibration.from_pretrained(folder).generate_model_card()) == card
    monkeypatch.chdir(folder)
    exec(card.split("```python\n")[1].split("```")[0], {})
    assert "The city of Leiden" in capsys.readouterr().out


def test_card_with_measurements() -> None:
    rows = [{"method": "dense", "kl_mean": 0.0}, {"method": "spectral-3", "kl_mean": 0.0102, "more": 1}]
    text = str(make().generate_model_card(metrics=rows))
    assert "| method | kl_mean |" in text
    assert "| dense | 0.0 |" in text
    assert "| spectral-3 | 0.0102 |" in text


@pytest.mark.parametrize("name", [None, "wiki11m", "/home/somebody/model"])
def test_card_without_a_base_model(name: str | None) -> None:
    calibration = make()
    metadata = replace(calibration.metadata, base_model={"id": name}, recipe={"note": "braces {x} and {0}"})
    text = str(Calibration(calibration.layers, metadata).generate_model_card())
    assert "base_model" not in yaml.safe_load(text.split("---")[1])
    assert "braces {x} and {0}" in text
