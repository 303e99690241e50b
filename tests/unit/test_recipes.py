"""Recipes and the index of calibrations: what comes with quantcache, and one clear error for every flaw."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

from quantcache import data
from quantcache.artifact.calibration import Calibration
from quantcache.artifact.files import ARTIFACT_FILES, CONFIG_NAME
from quantcache.artifact.index import find_entry, read_index
from quantcache.artifact.recipes import load_recipe, recipe_names
from quantcache.cli import main
from quantcache.common.errors import ArtifactError, CalibrationMismatch, QuantCacheError
from tests.builders import llama_config

ROOT = Path(__file__).resolve().parent.parent.parent

# ------------------------------------------------------------------ recipes


def test_recipes_lie_at_the_top_of_the_checkout() -> None:
    assert (ROOT / "calibrations").resolve() == data.calibrations_path().resolve()
    assert {path.stem for path in (ROOT / "calibrations" / "recipes").iterdir()} == set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_that_come_with_quantcache(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.texts() == [data.calibration_text()]
    assert recipe.model.rpartition("/")[2].lower() == name
    assert recipe.side_bits("key") == recipe.side_bits("value") == "joint"


def test_every_family_has_a_recipe() -> None:
    models = {load_recipe(name).model for name in recipe_names()}
    for family in ("Llama-3.", "Qwen2.5", "Qwen3", "Mistral", "phi-4", "gemma-2", "gemma-3"):
        assert any(family in model for model in models), family


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    """A recipe with a text of its own beside it."""
    (tmp_path / "text.txt").write_text("Once upon a time.")
    digest = hashlib.sha256(b"Once upon a time.").hexdigest()
    settings = yaml.safe_load((data.calibrations_path() / "recipes" / "wiki11m.yaml").read_text())
    return settings | {"text": {"files": {"text.txt": digest}}, "key_bits": "dense", "value_bits": 2.5}


def write(folder: Path, content: Any) -> Path:
    """Write a recipe."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_recipe_of_ones_own(content: dict[str, Any], tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, content))
    assert recipe.texts() == ["Once upon a time."]
    assert (recipe.side_bits("key"), recipe.side_bits("value")) == ("dense", 2.5)
    (tmp_path / "text.txt").write_text("Once upon a crime.")
    with pytest.raises(QuantCacheError, match=r"text.txt has SHA-256 [0-9a-f]{64}, the recipe says [0-9a-f]{64}"):
        recipe.texts()
    (tmp_path / "text.txt").unlink()
    with pytest.raises(QuantCacheError, match=r"text.txt: No such file"):
        recipe.texts()


FLAWS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no mapping": (lambda c: [c], "must be a mapping, got list"),
    "missing key": (lambda c: {k: v for k, v in c.items() if k not in ("seed", "bits")}, "lacks bits, seed"),
    "unknown key": (lambda c: c | {"bitz": 3}, "has unknown keys bitz"),
    "no model": (lambda c: c | {"model": None}, "model must be a folder or Hub id, got None"),
    "revision": (lambda c: c | {"revision": 7}, "revision must be a string or null, got 7"),
    "tokens": (lambda c: c | {"tokens": 0}, "tokens must be a positive integer, got 0"),
    "boolean tokens": (lambda c: c | {"tokens": True}, "tokens must be a positive integer, got True"),
    "length": (lambda c: c | {"seq_len": 2.5}, "seq_len must be a positive integer, got 2.5"),
    "residual": (lambda c: c | {"residual_length": -1}, "residual_length must be an integer of at least 0, got -1"),
    "seed": (lambda c: c | {"seed": -1}, "seed must be an integer of at least 0, got -1"),
    "metric": (lambda c: c | {"metric": "fish"}, "metric must be one of fisher, query, identity, got 'fish'"),
    "dtype": (lambda c: c | {"dtype": "int8"}, "dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
    "bits": (lambda c: c | {"bits": 9}, "bits must be a number from min_bits to 8, got 9"),
    "words for bits": (lambda c: c | {"bits": "joint"}, "bits must be a number from min_bits to 8, got 'joint'"),
    "least bits": (lambda c: c | {"min_bits": 4}, "bits must be a number from min_bits to 8, got 3"),
    "key bits": (lambda c: c | {"key_bits": "thin"}, "key_bits must be .* or joint or dense, got 'thin'"),
    "value bits": (lambda c: c | {"value_bits": 12}, "value_bits must be .* or joint or dense, got 12"),
    "text": (lambda c: c | {"text": "once"}, "text must be .*, got 'once'"),
    "no files": (lambda c: c | {"text": {"files": {}}}, "text must be"),
    "no digest": (lambda c: c | {"text": {"bundled": "wiki_calibration.txt"}}, "text must be"),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_flawed_recipes(content: dict[str, Any], tmp_path: Path, flaw: str) -> None:
    spoil, message = FLAWS[flaw]
    with pytest.raises(QuantCacheError, match=message) as caught:
        load_recipe(write(tmp_path, spoil(content)))
    assert "\n" not in str(caught.value)
    assert "recipe.yaml" in str(caught.value)


def test_recipes_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(QuantCacheError, match=r"unknown recipe llama-9: give a .yaml file, or one of .*qwen3-8b"):
        load_recipe("llama-9")
    with pytest.raises(QuantCacheError, match=r"no.yaml cannot be read: .*No such file"):
        load_recipe(tmp_path / "no.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(QuantCacheError, match=r"bad.yaml cannot be read: while parsing") as caught:
        load_recipe(tmp_path / "bad.yaml")
    assert "\n" not in str(caught.value)


def test_a_recipe_may_leave_the_residual_out(content: dict[str, Any], tmp_path: Path) -> None:
    """Those of before there was one do."""
    assert load_recipe(write(tmp_path, content | {"residual_length": 7})).residual_length == 7
    del content["residual_length"]
    assert load_recipe(write(tmp_path, content)).residual_length == 64


@pytest.mark.parametrize("metric", ["identity", "fisher"])
def test_calibrating_by_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str], metric: str) -> None:
    text = data.calibration_text()[:6000]
    (tmp_path / "text.txt").write_text(text, "utf-8")
    digest = hashlib.sha256(text.encode()).hexdigest()
    settings = yaml.safe_load((data.calibrations_path() / "recipes" / "wiki11m.yaml").read_text())
    settings |= {"text": {"files": {"text.txt": digest}}, "tokens": 256, "seq_len": 128, "bits": 2, "key_bits": 2.5}
    settings |= {"metric": metric, "seed": 4, "residual_length": 7}
    arguments = ["calibrate", "--recipe", str(write(tmp_path, settings)), "-o", str(tmp_path / "out"), "--json"]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    capsys.readouterr()
    made = Calibration.from_pretrained(tmp_path / "out").metadata
    assert {name: made.recipe[name] for name in ("tokens", "seq_len", "seed", "metric")} == {
        name: settings[name] for name in ("tokens", "seq_len", "seed", "metric")
    }
    assert made.recipe.get("residual_length") == (7 if metric == "fisher" else None)
    assert (made.rate.bits, made.rate.key_bits, made.rate.value_bits) == (2, 2.5, "joint")
    assert made.recipe["text_sha256"] == [digest]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--bits", "4", "--seed", "1", "--text", str(tmp_path / "text.txt")])
    assert ended.value.code == 2
    assert "--recipe sets --bits, --seed, --text already" in capsys.readouterr().err


# ------------------------------------------------------------------ the index


def test_the_bundled_calibration(demo_model: PreTrainedModel) -> None:
    for calibration in (Calibration.for_model(demo_model), Calibration.for_model("wiki11m")):
        calibration.check_compatible(demo_model.config)
        recipe = load_recipe("wiki11m")
        made = calibration.metadata.recipe
        assert (made["tokens"], made["seed"], made["metric"]) == (recipe.tokens, recipe.seed, recipe.metric)
        assert made["seq_len"] == recipe.seq_len
        assert recipe.text["sha256"] in made["text_sha256"]


SMOLLM2 = LlamaConfig(
    hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, rope_theta=100_000.0
)
QWEN = Qwen2Config(
    hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, rope_theta=1e6
)


@pytest.mark.parametrize(
    ("name", "config"), [("smollm2-135m", SMOLLM2), ("qwen2.5-coder-1.5b", QWEN)], ids=["smollm2", "qwen"]
)
def test_the_calibrations_of_packaged_models(name: str, config: PreTrainedConfig) -> None:
    """They were made by their recipes, and are of the models that the recipes name."""
    calibration, recipe = Calibration.for_model(name), load_recipe(name)
    made = calibration.metadata.recipe
    assert [made[name] for name in ("tokens", "seed", "metric", "seq_len", "dtype")] == [
        recipe.tokens, recipe.seed, recipe.metric, recipe.seq_len, recipe.dtype
    ]  # fmt: skip
    assert recipe.text["sha256"] in made["text_sha256"]
    assert calibration.bits == pytest.approx(recipe.bits)
    assert calibration.metadata.base_model["id"] == recipe.model
    assert "fingerprint" in calibration.metadata.base_model
    calibration.check_compatible(config)


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """An index of one artifact beside it."""
    Calibration.synthetic(llama_config()).save_pretrained(tmp_path / "artifact")
    sha256 = {name: hashlib.sha256((tmp_path / "artifact" / name).read_bytes()).hexdigest() for name in ARTIFACT_FILES}
    entry = {"model": "org/model", "revision": "a" * 40, "artifact": {"path": "artifact", "sha256": sha256}}
    path = tmp_path / "index.json"
    content = {"format": "quantcache-calibration-index", "schema_version": "1.0", "calibrations": [entry]}
    path.write_text(json.dumps(content))
    return path


def test_finding_an_entry(index: Path) -> None:
    assert Calibration.for_model("org/model", index=index).bits == 3
    assert Calibration.for_model("org/model", revision="a" * 40, index=index).bits == 3
    with pytest.raises(ArtifactError, match=f"no calibration of org/model at revision bbbb; it has {'a' * 40}"):
        Calibration.for_model("org/model", revision="bbbb", index=index)
    with pytest.raises(ArtifactError, match="no calibration of org/other; it has org/model"):
        Calibration.for_model("org/other", index=index)
    with pytest.raises(ArtifactError, match="no calibration of org/other; it has nothing"):
        find_entry([], "org/other", None)


def test_a_loaded_model_is_found_by_id_and_commit(index: Path, demo_model: PreTrainedModel) -> None:
    model = deepcopy(demo_model)
    model.config._name_or_path, model.config._commit_hash = "org/model", "c" * 40
    with pytest.raises(ArtifactError, match="no calibration of org/model at revision cccc"):
        Calibration.for_model(model, index=index)
    model.config._commit_hash = "a" * 40
    with pytest.raises(CalibrationMismatch, match="calibration has"):
        Calibration.for_model(model, index=index)


def test_a_file_that_is_not_the_published_one(index: Path) -> None:
    path = index.parent / "artifact" / CONFIG_NAME
    path.write_text(path.read_text() + " ")
    with pytest.raises(ArtifactError, match=r"calibration_config.json of .* has SHA-256 \w{64}, the index says \w{64}"):
        Calibration.for_model("org/model", index=index)


def test_an_artifact_that_is_not_there(index: Path) -> None:
    (index.parent / "artifact" / CONFIG_NAME).unlink()
    with pytest.raises(ArtifactError, match=r"in .*artifact, which has no calibration_config.json"):
        Calibration.for_model("org/model", index=index)


INDEX_FLAWS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "format": (lambda c: c | {"format": "x"}, "is not a calibration index"),
    "list": (lambda c: [c], "is not a calibration index"),
    "version": (lambda c: c | {"schema_version": "2.0"}, "has schema version 2.0, this quantcache reads 1.0"),
    "entries": (lambda c: c | {"calibrations": {}}, "calibrations must be a list, got dict"),
    "model": (lambda c: c | {"calibrations": [{"artifact": {}}]}, "entry 0 must have a model and an artifact"),
    "nowhere": (
        lambda c: c | {"calibrations": [{"model": "m", "artifact": {"sha256": {}}}]},
        "either the repo or the path",
    ),
    "place": (
        lambda c: c | {"calibrations": [{"model": "m", "artifact": {"path": None, "sha256": {}}}]},
        "must name artifact and revision by strings, got None and None",
    ),
    "number": (
        lambda c: c | {"calibrations": [{"model": "m", "revision": 5, "artifact": {"path": "x", "sha256": {}}}]},
        "must name artifact and revision by strings, got 'x' and 5",
    ),
    "digests": (
        lambda c: c | {"calibrations": [{"model": "m", "artifact": {"path": "x", "sha256": {}}}]},
        "a sha256 of each of calibration_config.json, calibration.safetensors",
    ),
    "digest": (
        lambda c: (
            c
            | {
                "calibrations": [
                    {"model": "m", "artifact": {"path": "x", "sha256": dict.fromkeys(ARTIFACT_FILES, "z")}}
                ]
            }
        ),
        "must be 64 hexadecimal digits, got 'z'",
    ),
    "branch": (
        lambda c: (
            c
            | {
                "calibrations": [
                    {
                        "model": "m",
                        "revision": "main",
                        "artifact": {
                            "repo": "o/r",
                            "revision": "f" * 40,
                            "sha256": dict.fromkeys(ARTIFACT_FILES, "0" * 64),
                        },
                    }
                ]
            }
        ),
        "commits of 40 hexadecimal digits, got 'main'",
    ),
}


@pytest.mark.parametrize("flaw", INDEX_FLAWS)
def test_flawed_indices(index: Path, flaw: str) -> None:
    spoil, message = INDEX_FLAWS[flaw]
    index.write_text(json.dumps(spoil(json.loads(index.read_text()))))
    with pytest.raises(ArtifactError, match=message):
        read_index(index)


def test_an_index_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_index(tmp_path / "no.json")


LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join(f'*a{i - 1}' for _ in range(9))}]\n" for i in range(1, 40))

HARD_TO_PARSE = {
    "a billion laughs": (LAUGHS, "aliases such as *a0 are not supported"),
    "text that is itself": ("text: &t\n  files: *t\n", "aliases such as *t are not supported"),
    "a merge": ("base: &b {bits: 3}\nmore:\n  <<: *b\n", "aliases such as *b are not supported"),
    "deep lists": ("text: " + "[" * 20_000 + "]" * 20_000, "nested too deep"),
    "deep blocks": ("".join(" " * i + "- \n" for i in range(1, 300)) + "x: [", "cannot be read"),
    "a key twice": ("bits: 3\nbits: 8\n", "says bits twice"),
    "a key twice inside": ("text: {files: {a: x, a: y}}\n", "says a twice"),
    "large": ("# " + "x" * 70_000, "more than 65,536 bytes"),
    "Python": ("model: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
    "a list as key": ("? [a]\n: b\n", "unhashable"),
    "controls": ("model: a\x1bb\n", "special characters are not allowed"),
    "Latin-1": (b"model: caf\xe9\n", "can't decode byte 0xe9"),
    "two documents": ("a: 1\n---\nb: 2\n", "expected a single document"),
    "digits": ("tokens: " + "9" * 6000, "4300 digits"),
}


@pytest.mark.support("recipes and indexes that are hard to parse")
@pytest.mark.parametrize(("content", "message"), HARD_TO_PARSE.values(), ids=HARD_TO_PARSE)
def test_recipes_that_are_hard_to_parse(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    started = time.process_time()
    with pytest.raises(QuantCacheError) as caught:
        load_recipe(path)
    assert time.process_time() - started < 5
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.support("recipes and indexes that are hard to parse")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("text", value) for value in ({"files": {"x": 1}}, {"files": []}, [[[]]], "x" * 5000, None)),
        *(("seed", value) for value in (1 << 64, -1, True, 0.5)),
        *(("tokens", value) for value in (1 << 70, 0, True, "8")),
        *(("bits", value) for value in (float("nan"), float("inf"), "three", [3])),
        *(("model", value) for value in ("", ["a"], {"a": 1}, 5)),
        *(("dtype", value) for value in (["auto"], {}, "float8")),
    ],
)
def test_values_of_any_kind(tmp_path: Path, name: str, value: object) -> None:
    content = yaml.safe_load((data.calibrations_path() / "recipes" / "wiki11m.yaml").read_text("utf-8"))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content | {name: value}), "utf-8")
    with pytest.raises(QuantCacheError, match=f"{name} must be") as caught:
        load_recipe(path)
    assert len(str(caught.value)) < 700


@pytest.mark.support("recipes and indexes that are hard to parse")
def test_a_text_that_is_not_utf8(tmp_path: Path) -> None:
    content = yaml.safe_load((data.calibrations_path() / "recipes" / "wiki11m.yaml").read_text("utf-8"))
    (tmp_path / "text").write_bytes(b"caf\xe9")
    digest = hashlib.sha256(b"caf\xe9").hexdigest()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content | {"text": {"files": {"text": digest}}}), "utf-8")
    with pytest.raises(QuantCacheError, match=r"text is not UTF-8 text: .* 0xe9 at byte 3"):
        load_recipe(tmp_path / "recipe.yaml").texts()


@pytest.mark.support("recipes and indexes that are hard to parse")
@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"a":' * 50_000 + "1" + "}" * 50_000,
        '{"format": "quantcache-calibration-index", "format": "x"}',
        '{"format": "quantcache-calibration-index", "schema_version": "1.0", "calibrations": [NaN]}',
        '{"format": "quantcache-calibration-index", "schema_version": "1.0", "calibrations": '
        + "[" * 40
        + "]" * 40
        + "}",
        '{"format": ' + "9" * 5000 + "}",
        '{"format": "\\ud800"}',
        "[" + "{}," * 2_000_000 + "{}]",
    ],
    ids=["deep lists", "deep objects", "twice", "NaN", "a bit deep", "digits", "half a character", "large"],
)
def test_indexes_that_are_hard_to_parse(tmp_path: Path, content: str) -> None:
    (tmp_path / "index.json").write_text(content, "utf-8")
    with pytest.raises(ArtifactError, match="cannot be read"):
        Calibration.for_model("wiki11m", index=tmp_path / "index.json")
