"""Exports of checkpoints: what is copied, what changes, how much memory it takes, and what is refused."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel

import quantcache
from quantcache import Calibration, SpectralCache, calibrate, cli
from quantcache.common.errors import (
    ArtifactError,
    CalibrationMismatch,
    CalibrationWarning,
    QuantCacheError,
    UnsupportedModel,
)
from quantcache.common.writing import partial_folder
from quantcache.data import demo_model_path
from quantcache.export import absorb, export_checkpoint
from quantcache.export.checkpoint import Checkpoint
from tests import warm
from tests.builders import PeftWrapper, packed_projections
from tests.families import FAMILIES, OTHERS, Family, random_tokens
from tests.helpers import divergence, feed, few

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parent.parent.parent
LLAMA, GEMMA2 = FAMILIES[0], next(f for f in FAMILIES if f.name == "gemma2")


def tree(folder: Path) -> dict[str, bytes]:
    """Content of all files below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def calibration_of(model: PreTrainedModel) -> Calibration:
    """A calibration of the right geometry."""
    return Calibration.synthetic(model.config, bits=3)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A small Llama: leave it as you found it."""
    return LLAMA.make(attention="sdpa")


@pytest.fixture(scope="module")
def calibration(model: PreTrainedModel) -> Calibration:
    """Its calibration."""
    return calibration_of(model)


@pytest.fixture
def folder(model: PreTrainedModel, tmp_path: Path) -> Path:
    """Its folder, with two shards and a good many other files."""
    path = tmp_path / "model"
    model.save_pretrained(path, max_shard_size="500KB")
    assert len(list(path.glob("*.safetensors"))) >= 2
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    (path / "modeling_custom.py").write_text("# code\n")
    (path / "LICENSE").write_text("Do what you like.\n")
    (path / "templates").mkdir()
    (path / "templates" / "chat.jinja").write_text("{{ messages }}")
    (path / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n\nThe base model.\n")
    return path


def test_everything_else_is_copied(folder: Path, calibration: Calibration, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "consolidated.safetensors", "tf_model.h5", "templates/model.gguf"):
        (folder / name).write_bytes(b"weights of another format")
    (folder / ".gitattributes").write_text("*.bin filter=lfs\n")
    report = export_checkpoint(folder, calibration, tmp_path / "out", verify=False)
    assert set(report.left_out) == {
        *("pytorch_model.bin", "consolidated.safetensors", "tf_model.h5", "templates/model.gguf")
    }
    before, after = tree(folder), tree(tmp_path / "out")
    kept = before.keys() - set(report.left_out) - {".gitattributes"}
    assert after.keys() - kept == {
        f"quantcache/{name}" for name in ("calibration.safetensors", "calibration_config.json", "export.json")
    }
    for name in kept - {"README.md"}:
        if not name.endswith(".safetensors"):
            assert after[name] == before[name], name
    header = yaml.safe_load(after["README.md"].decode().split("---\n")[1])
    assert (header["license"], header["language"], header["library_name"]) == ("mit", "en", "quantcache")
    assert b"not compared with the base model's" in after["README.md"]
    record = json.loads(after["quantcache/export.json"])
    assert (record["basis"], record["value_mean"], record["layers"]) == ("spectral", "cache", [0, 1])
    assert (tmp_path / "out").stat().st_mode == folder.stat().st_mode


def test_a_calibration_beside_the_weights_stays_behind(folder: Path, calibration: Calibration, tmp_path: Path) -> None:
    """Half of it was copied, and hid the one that belongs to the export."""
    calibration.save_pretrained(folder)
    report = export_checkpoint(folder, calibration, tmp_path / "out", verify=False)
    assert "calibration.safetensors" not in report.left_out
    found = Calibration.from_pretrained(tmp_path / "out")
    assert found.metadata.recipe["absorbed"] == report.calibration.metadata.recipe["absorbed"]


def test_only_the_projections_change(folder: Path, calibration: Calibration, tmp_path: Path) -> None:
    shard = next(folder.glob("*.safetensors"))
    tensors = load_file(shard)
    tensors["something.unknown"] = torch.arange(5, dtype=torch.int16)
    with safe_open(shard, framework="pt") as file:
        save_file(tensors, shard, metadata={**file.metadata(), "note": "kept"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["something.unknown"] = shard.name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    export_checkpoint(folder, calibration, tmp_path / "out", basis="flat", verify=False)
    changed = set()
    for path in folder.glob("*.safetensors"):
        before, after = load_file(path), load_file(tmp_path / "out" / path.name)
        assert list(before) == list(after)
        changed |= {name for name in before if not torch.equal(before[name], after[name])}
        assert all(before[name].dtype == after[name].dtype for name in before)
        with safe_open(path, framework="pt") as one, safe_open(tmp_path / "out" / path.name, framework="pt") as other:
            assert one.metadata() == other.metadata()
    assert changed == {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in (0, 1) for p in "qkvo"}


def test_export_and_absorb_agree(
    folder: Path, calibration: Calibration, model: PreTrainedModel, tmp_path: Path
) -> None:
    export_checkpoint(folder, calibration, tmp_path / "out", basis="flat", verify=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    absorbed = LLAMA.make(attention="sdpa")
    own = absorb(absorbed, calibration, "flat")
    expected = absorbed.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    found = Calibration.from_pretrained(tmp_path / "out")
    assert found.metadata.recipe == own.metadata.recipe
    for index, layer in own.layers.items():
        for side in ("key", "value"):
            assert torch.equal(found.layers[index].side(side).analysis, layer.side(side).analysis)


@pytest.mark.parametrize("basis", few(["spectral", "flat"], ["spectral"]))
def test_spectral_cache_on_an_export_is_as_good(demo_model: PreTrainedModel, basis: str, tmp_path: Path) -> None:
    calibration = Calibration.for_model(demo_model)
    export_checkpoint(demo_model_path(), calibration, tmp_path / "out", basis=basis, verify=False)
    tokens, steps = random_tokens(1, 300), (200, 50, 50)
    results = []
    absorbed = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32)
    absorb(absorbed, calibration, basis)
    for model, cache in (
        (demo_model, SpectralCache(calibration, demo_model.config, residual_length=0)),
        (absorbed, SpectralCache.from_pretrained(tmp_path / "out", absorbed.config, residual_length=0)),
    ):
        dense = feed(model, DynamicCache(config=model.config), tokens, steps)
        compressed = feed(model, cache, tokens, steps)
        results.append((divergence(dense, compressed), compressed))
    assert results[0][0] > 0
    # The same codes but for rounding at decision boundaries: far closer to each other than to the dense cache.
    assert divergence(results[0][1], results[1][1]) < 0.1 * results[0][0]


def test_tied_weights_stay_tied(calibration: Calibration, tmp_path: Path) -> None:
    tied = Family("tied", "llama", {**LLAMA.config, "tie_word_embeddings": True}, {}, (64, 2)).make(attention="sdpa")
    tied.save_pretrained(tmp_path / "model")
    export_checkpoint(tmp_path / "model", calibration, tmp_path / "out", verify=False)
    assert "lm_head.weight" not in Checkpoint(tmp_path / "out").tensors
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_names_without_the_models_prefix(tmp_path: Path) -> None:
    gpt2 = next(f for f in FAMILIES if f.name == "gpt2").make(attention="sdpa")
    gpt2.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    save_file({name.removeprefix("transformer."): t for name, t in tensors.items()}, path, metadata={"format": "pt"})
    report = export_checkpoint(tmp_path / "model", calibration_of(gpt2), tmp_path / "out")
    assert report.mean_in_weights
    assert report.difference is not None
    assert report.difference.relative < 1e-4
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(path).keys()


# ------------------------------------------------------------------ memory

_MEASURE = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from quantcache import Calibration
from quantcache.export import export_checkpoint

def kilobytes(name):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(name))
    return int(line.split()[1])

source, output, warm_up = map(Path, sys.argv[1:])
calibration = Calibration.from_pretrained(source.parent / "calibration")
export_checkpoint(source, calibration, warm_up, verify=False)  # what imports and first calls take is not the export's
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = kilobytes("VmRSS")
export_checkpoint(source, calibration, output, verify=False)
print((kilobytes("VmHWM") - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_of_a_sharded_export(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=32_768,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    source = tmp_path / "model"
    source.mkdir()
    config.save_pretrained(source)
    embedding = torch.full((config.vocab_size, config.hidden_size), 0.01)
    square = torch.full((config.hidden_size, config.hidden_size), 0.01)
    tall = torch.full((config.intermediate_size, config.hidden_size), 0.01)
    shards: list[dict[str, torch.Tensor]] = [{"model.embed_tokens.weight": embedding}, {"lm_head.weight": embedding}]
    for index in range(4):
        attention = {f"self_attn.{p}_proj.weight": square.clone() for p in "qkvo"}
        mlp = {f"mlp.{p}_proj.weight": tall.clone() for p in ("gate", "up")} | {
            "mlp.down_proj.weight": tall.T.contiguous()
        }
        layer = {f"model.layers.{index}.{name}": tensor for name, tensor in (attention | mlp).items()}
        shards[index // 2] |= layer
    layer_bytes = sum(tensor.nbytes for tensor in layer.values())
    weight_map = {}
    for number, tensors in enumerate(shards):
        name = f"model-{number + 1:05}-of-00002.safetensors"
        save_file(tensors, source / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    Calibration.synthetic(config, bits=3).save_pretrained(tmp_path / "calibration")
    output = run_python(_MEASURE, str(source), str(tmp_path / "out"), str(tmp_path / "warm-up"))
    peak, shard_bytes = int(output), max(file.stat().st_size for file in source.glob("*.safetensors"))
    print(f"peak {peak:,}, largest shard {shard_bytes:,}, layer {layer_bytes:,}")
    assert peak < 1.5 * shard_bytes + layer_bytes
    assert peak < layer_bytes * 3  # float64 copies of one layer's projections, and never a shard


def run_python(code: str, *arguments: str) -> str:
    """Run code in a process of its own; gives what it prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    result = subprocess.run(
        [*warm.python(), "-c", code, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


# ------------------------------------------------------------------ faults


def refused(folder: Path, calibration: Calibration, kind: type[Exception], match: str, output: str = "out") -> None:
    """An export fails with one clear error and leaves nothing."""
    root = folder.parent
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    with pytest.raises(kind, match=match) as caught:
        export_checkpoint(folder, calibration, root / output, verify=False)
    assert "\n" not in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")}.keys() == before.keys()


def edit_config(folder: Path, **more: object) -> None:
    """Change a model's config."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **more}))


def truncate(path: Path) -> None:
    """Cut a file short."""
    path.write_bytes(path.read_bytes()[:-1000])


def say_twice(path: Path) -> None:
    """Name a tensor twice in the header, which the library passes over."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].strip()
    name, entry = next((n, e) for n, e in json.loads(header).items() if n != "__metadata__")
    header = header[:-1] + f",{json.dumps(name)}:{json.dumps(entry)}}}".encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def quantize(folder: Path) -> None:
    """Store a projection as integers."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if name.endswith("layers.1.self_attn.o_proj.weight"):
                tensors[name] = tensors[name].to(torch.int8)
        save_file(tensors, path, metadata={"format": "pt"})


FAULTS: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "unknown architecture": (
        lambda f: edit_config(f, model_type="glm", architectures=["GlmForCausalLM"]),
        CalibrationMismatch,
        "model_type 'llama', the model has 'glm'",
    ),
    "other geometry": (
        lambda f: edit_config(f, num_key_value_heads=4),
        CalibrationMismatch,
        "num_key_value_heads 2, the model has 4",
    ),
    "quantization config": (
        lambda f: edit_config(f, quantization_config={"quant_method": "fp8"}),
        UnsupportedModel,
        "weights are quantized",
    ),
    "quantized weights": (
        quantize,
        UnsupportedModel,
        r"layers\.1\.self_attn\.o_proj\.weight is quantized \(torch\.int8",
    ),
    "impossible config": (
        lambda f: edit_config(f, num_hidden_layers="two"),
        QuantCacheError,
        "transformers cannot read the config in .*: ",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), QuantCacheError, "transformers cannot read the config in "),
    "truncated shard": (
        lambda f: truncate(sorted(f.glob("*.safetensors"))[1]),
        QuantCacheError,
        "00002.* cannot be read",
    ),
    "a tensor twice": (
        lambda f: say_twice(sorted(f.glob("*.safetensors"))[1]),
        QuantCacheError,
        "00002.* cannot be read: .*it says 'model.*' twice",
    ),
    "missing shard": (
        lambda f: sorted(f.glob("*.safetensors"))[0].unlink(),
        QuantCacheError,
        r"is missing model-00001.* \(its index names them",
    ),
    "no index": (
        lambda f: (f / "model.safetensors.index.json").unlink(),
        QuantCacheError,
        "is missing model.safetensors ",
    ),
    "malformed index": (
        lambda f: (f / "model.safetensors.index.json").write_text("[]"),
        QuantCacheError,
        "not the index of a sharded checkpoint",
    ),
    "shard elsewhere": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../x.safetensors"}}'),
        QuantCacheError,
        "outside its folder: ../x.safetensors",
    ),
    "index and shards differ": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            (f / "model.safetensors.index.json").read_text().replace("layers.0.mlp.up_proj", "layers.0.mlp.upper")
        ),
        QuantCacheError,
        "upper.* but it is in no shard",
    ),
    "adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), QuantCacheError, "merge it into the model"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_model(folder: Path, calibration: Calibration, fault: str) -> None:
    spoil, kind, match = FAULTS[fault]
    spoil(folder)
    refused(folder, calibration, kind, match)


def test_architectures_that_are_not_known(tmp_path: Path) -> None:
    deepseek = next(f for f in OTHERS if f.name == "deepseek-v3").make()
    deepseek.save_pretrained(tmp_path / "model")
    refused(tmp_path / "model", calibration_of(deepseek), UnsupportedModel, "a deepseek_v3 model cannot be absorbed")
    with pytest.raises(UnsupportedModel, match="a deepseek_v3 model cannot be absorbed"):
        absorb(deepseek, calibration_of(deepseek))


def test_falcon_of_the_new_architecture_is_refused() -> None:
    config = {"hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 1}
    config |= {"new_decoder_architecture": True, "num_kv_heads": 2}
    falcon = Family("falcon-gqa", "falcon", config, {}, (32, 4), ("sdpa",)).make()
    with pytest.raises(UnsupportedModel, match="copy of its values for every query head"):
        absorb(falcon, calibration_of(falcon))


def test_calibration_of_other_layers() -> None:
    gemma = GEMMA2.make()
    calibration = calibration_of(gemma)
    del calibration.layers[3]
    with pytest.raises(CalibrationMismatch, match=r"layers \[1\], the model's full-attention layers are \[1, 3\]"):
        absorb(gemma, calibration)


def test_clipped_values_are_refused() -> None:
    mpt = next(f for f in OTHERS if f.name == "mpt").make()
    mpt.config.attn_config.clip_qkv = 8.0
    with pytest.raises(UnsupportedModel, match=r"clip_qkv is 8\.0"):
        absorb(mpt, calibration_of(mpt))


def test_adapters_are_to_be_merged_first(calibration: Calibration) -> None:
    """As PEFT puts them in: the projection's weight is a module further in."""
    adapted = LLAMA.make()
    for layer in adapted.model.layers:
        projection = torch.nn.Module()
        projection.base_layer = layer.self_attn.o_proj
        layer.self_attn.o_proj = projection
    with pytest.raises(UnsupportedModel, match=r"o_proj\.weight: merge its adapters first"):
        absorb(adapted, calibration)


def test_packed_weights_are_refused(calibration: Calibration) -> None:
    """quanto's are float by name, and stay what they were when one copies into them: all values were coded wrongly."""
    model = packed_projections(LLAMA.make())
    with pytest.raises(UnsupportedModel, match=r"q_proj\.weight is quantized or split \(a PackedWeight\)"):
        absorb(model, calibration)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", ["v_proj", "o_proj"])
def test_projections_that_are_steered_are_refused(calibration: Calibration, place: str, dtype: torch.dtype) -> None:
    """A vector that a hook adds is of the basis of before."""
    model = LLAMA.make().to(dtype)
    projection, names = getattr(model.model.layers[1].self_attn, place), ("v_proj", "o_proj")
    before = [getattr(model.model.layers[0].self_attn, name).weight.clone() for name in names]
    if place == "v_proj":
        handle = projection.register_forward_hook(lambda module, args, output: output + 0.5)
    else:
        handle = projection.register_forward_pre_hook(lambda module, args: (args[0] + 0.5,))
    with pytest.raises(UnsupportedModel, match=rf"layers\.1\.self_attn\.{place} computes something else than"):
        absorb(model, calibration)
    assert all(map(torch.equal, before, [getattr(model.model.layers[0].self_attn, name).weight for name in names]))
    handle.remove()
    absorb(model, calibration)


def test_values_that_were_learned_are_refused(calibration: Calibration) -> None:
    """PEFT's prefix tuning hands the model keys and values that no projection made."""
    model = LLAMA.make()
    wrapped = PeftWrapper(model)
    wrapped.peft_config = {"default": SimpleNamespace(is_prompt_learning=True)}
    before = model.model.layers[0].self_attn.v_proj.weight.clone()
    with pytest.raises(UnsupportedModel, match="would stay in the basis of before"):
        absorb(wrapped, calibration)
    assert torch.equal(model.model.layers[0].self_attn.v_proj.weight, before)


def test_absorbing_twice_is_refused(folder: Path, calibration: Calibration, tmp_path: Path) -> None:
    export_checkpoint(folder, calibration, tmp_path / "once", verify=False)
    refused(tmp_path / "once", calibration, QuantCacheError, "is an export already")
    refused(folder, Calibration.from_pretrained(tmp_path / "once"), QuantCacheError, "absorbed its basis already")


def test_absorbing_under_an_enabled_calibration_is_refused() -> None:
    """Every later request was coded in a basis that its values no longer had."""
    model = LLAMA.make()
    made = calibration_of(model)
    before = model.model.layers[0].self_attn.v_proj.weight.clone()
    with quantcache.enabled(model, made), pytest.raises(QuantCacheError, match=r"call quantcache\.disable\(model\)"):
        absorb(model, made)
    assert torch.equal(model.model.layers[0].self_attn.v_proj.weight, before)
    quantcache.enable(model, absorb(model, made))
    quantcache.disable(model)


def test_a_calibration_of_other_weights_is_told() -> None:
    """Also where the weights are other ones because they have absorbed a basis before."""
    model = LLAMA.make()
    made = calibrate(model, random_tokens(1, 64), metric="identity", predict=False, progress=False)
    absorb(model, made)
    with pytest.warns(CalibrationWarning, match=r"the weights of .*v_proj\.weight differ"):
        absorb(model, made)


def test_a_layer_is_absorbed_as_a_whole_or_not_at_all() -> None:
    model = LLAMA.make()
    made = calibration_of(model)
    attention = model.model.layers[0].self_attn
    attention.o_proj.weight.data[5, 5] = float("inf")
    before = attention.v_proj.weight.clone()
    with pytest.raises(QuantCacheError, match=r"layers\.0.*o_proj.* had NaN or infinite values"):
        absorb(model, made)
    assert torch.equal(attention.v_proj.weight, before)


def test_output_that_is_taken(folder: Path, calibration: Calibration, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    refused(folder, calibration, QuantCacheError, "out exists already")
    refused(folder, calibration, QuantCacheError, "there is no folder .*nowhere", "nowhere/out")
    (tmp_path / "out" / "precious").unlink()
    export_checkpoint(folder, calibration, tmp_path / "out", verify=False)
    assert (tmp_path / "out" / "config.json").exists()


def test_unknown_basis_and_model(folder: Path, calibration: Calibration, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="basis must be one of spectral, flat, got 'round'"):
        export_checkpoint(folder, calibration, tmp_path / "out", basis="round")  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match="there is no folder"):
        export_checkpoint(tmp_path / "nothing", calibration, tmp_path / "out")


def test_values_that_do_not_fit_the_dtype(folder: Path, calibration: Calibration) -> None:
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if name.endswith("layers.1.self_attn.v_proj.weight"):
                tensors[name][3, 3] = float("inf")
        save_file(tensors, path, metadata={"format": "pt"})
    refused(folder, calibration, QuantCacheError, r"layers\.1.*v_proj.* had NaN or infinite values")


def test_a_full_disk_leaves_nothing(folder: Path, calibration: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoint, "write", full)
    refused(folder, calibration, OSError, "No space left on device")


@pytest.mark.slow
def test_a_terminated_export_leaves_nothing(folder: Path, calibration: Calibration, tmp_path: Path) -> None:
    calibration.save_pretrained(tmp_path / "calibration")
    stop = "import time, quantcache.export.checkpoint as c; c.Checkpoint.write = lambda *a: time.sleep(60)"
    arguments = ["export", str(folder), "-c", str(tmp_path / "calibration"), "-o", str(tmp_path / "out"), "--no-verify"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    code = f"{stop}; from quantcache.cli import main; main({arguments!r})"
    process = subprocess.Popen([*warm.python(), "-c", code], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out-partial-*/*.safetensors")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert {path.name for path in tmp_path.iterdir()} == {"model", "calibration"}


def test_what_a_killed_export_left_is_cleared_away(folder: Path, calibration: Calibration, tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".out-partial-{platform.node()}-{dead.pid}-x").mkdir()
    export_checkpoint(folder, calibration, tmp_path / "out", verify=False)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


def test_partial_folders_of_running_exports_are_left_alone(
    folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    with partial_folder(tmp_path, ".out-partial-") as running:
        export_checkpoint(folder, calibration, tmp_path / "out", verify=False)
        assert running.is_dir()


# ------------------------------------------------------------------ command line


def test_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], calibration: Calibration, folder: Path
) -> None:
    calibration.save_pretrained(tmp_path / "calibration")
    metrics = {"model": "gpt2", "methods": {"spectral-3": {"status": "ok"}, "broken": {"status": "RuntimeError"}}}
    names = ("bits_per_element", "bits_per_element_total", "kl_mean", "top1_agreement", "perplexity")
    metrics["methods"]["spectral-3"] |= dict.fromkeys(names, 0.98765)  # type: ignore[arg-type]
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    arguments = ["export", str(folder), "-c", str(tmp_path / "calibration"), "-o", str(tmp_path / "out"), "--json"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--basis", "flat", "--metrics", str(tmp_path / "metrics.json")])
    assert ended.value.code == 0
    captured = capsys.readouterr()
    assert f"metrics.json was measured on gpt2, and stands on the card of {folder}\n" in captured.err
    result = json.loads(captured.out)
    assert (result["basis"], result["layers"], result["shards"] >= 2) == ("flat", 2, True)
    assert result["logits"]["relative"] < 1e-4
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| spectral-3 | 0.9877 |" in card
    assert "broken" not in card
    for spoiled, status, message in (
        (["--basis", "round"], 2, "'--basis': 'round' is not one of 'spectral', 'flat'"),
        (["--records", str(folder / "config.json")], 1, "is not what quantcache eval writes"),
        (["--push-to-hub", "a/b/c"], 1, "cannot push to a/b/c: repositories on the Hub are called OWNER/NAME"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main([*arguments[:5], str(tmp_path / "other"), *spoiled])
        assert ended.value.code == status
        captured = capsys.readouterr()
        assert captured.out == ""
        assert message in captured.err
        assert not (tmp_path / "other").exists()
