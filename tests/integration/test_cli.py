"""The command line: one JSON object on stdout, one line on stderr for bad input."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, ViTConfig

from quantcache import __version__, data
from quantcache.artifact.calibration import Calibration
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.cli import main
from quantcache.cli.loading import read_text
from quantcache.cli.session import describe
from quantcache.cli.stats import LiveStats
from quantcache.common.errors import QuantCacheError
from quantcache.common.jsonfile import to_json, write_json
from quantcache.planning.memory import estimate_memory
from tests import warm
from tests.families import FAMILIES
from tests.helpers import Run

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, a model of another geometry, and configs of models that are no decoders."""
    folder = tmp_path_factory.mktemp("cli")
    text = data.calibration_text()
    (folder / "one.txt").write_text(text[:2400], "utf-8")
    (folder / "two.txt").write_text(text[-2400:], "utf-8")
    (folder / "held_out.txt").write_text(data.evaluation_text()[:6000], "utf-8")
    (folder / "empty.txt").write_text(" \n", "utf-8")
    (folder / "short.txt").write_text("Too short.", "utf-8")
    (folder / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    (folder / "text.txt.gz").write_bytes(gzip.compress(text.encode()))
    (folder / "windows.txt").write_text(text[:2400], "utf-16")
    (folder / "wide.txt").write_text("Plain words of English. " * 100, "utf-16-le")
    (folder / "table.parquet").write_bytes(b"PAR1\x15\x04\x15\xf6" + bytes(90) + b"PAR1")
    (folder / "chats.jsonl").write_text('{"text": "One."}\n{"messages": []}\n')
    config = LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        for model in ("other", "vit"):
            (folder / model).mkdir(exist_ok=True)
            shutil.copy(data.demo_model_path() / name, folder / model)
    T5Config().save_pretrained(folder / "t5")
    ViTConfig().save_pretrained(folder / "vit")
    return folder


@pytest.mark.support("generate --stats")
def test_generate_stats_without_a_terminal(run: Run) -> None:
    """Nothing while it goes, then one line; the same tokens as without."""
    arguments = ("generate", "wiki11m", "-c", "wiki11m", "--prompt", data.evaluation_text()[:900], "--residual", 0)
    arguments += ("--max-new-tokens", 6, "--json")
    _, plain, _ = run(*arguments)
    status, out, err = run(*arguments, "--stats")
    assert status == 0
    found = json.loads(out)
    assert found["text"] == json.loads(plain)["text"]
    assert "stats" not in json.loads(plain)
    stats, memory = found["stats"], found["memory"]
    assert 0 < stats["prompt_seconds"] < found["seconds"]
    assert stats["tokens_per_second"] == pytest.approx(5 / (found["seconds"] - stats["prompt_seconds"]), rel=0.5)
    (kernel,) = stats["kernels"]
    assert stats["kernels"][kernel] == 6
    (line,) = err.splitlines()
    assert line.startswith("note: 6 tokens, ")
    assert f"cache {memory['total']:,} bytes, bfloat16 takes {memory['bfloat16_bytes']:,}; kernel {kernel}" in line


@pytest.mark.support("generate --stats")
def test_generate_stats_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that is drawn again as tokens come, and gone at the end; also after an exception."""
    monkeypatch.setattr("quantcache.cli.stats.INTERVAL", 0.0)
    cache = SpectralCache(Calibration.for_model("wiki11m"))
    screen = io.StringIO()
    with LiveStats(cache, Console(file=screen, force_terminal=True, width=200)) as stats:
        for _ in range(4):
            stats.put(None)
        stats.end()
    text = screen.getvalue()
    for count in (1, 2, 3):
        assert f"{count} tokens, " in text
    assert "kernel none, nothing is packed yet" in text
    assert text.rindex("\x1b[2K") > text.rindex("3 tokens"), "the line is erased"
    assert "- tokens/s" in text.partition("2 tokens")[0]
    with pytest.raises(ZeroDivisionError), LiveStats(cache, Console(file=screen, force_terminal=True)):
        raise ZeroDivisionError
    assert screen.getvalue().rindex("\x1b[?25h") > screen.getvalue().rindex("\x1b[?25l"), "the cursor is back"


@pytest.fixture(scope="module")
def calibrated(folder: Path) -> dict:
    """The JSON of ``calibrate``, run as a process of its own, so that nothing can hide what reaches stdout."""
    result = subprocess.run(
        [
            *(*warm.python(), "-m", "quantcache", "calibrate", "wiki11m", "--text", "one.txt", "two.txt"),
            *("--tokens", "1024", "--seq-len", "512", "-o", "calibration", "--json"),
        ],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_calibrate(calibrated: dict, folder: Path) -> None:
    assert calibrated["layers"] == 6
    assert calibrated["bits_per_element"] == pytest.approx(3.125)
    assert calibrated["recipe"]["tokens"] == 1024
    stored = Calibration.from_pretrained(folder / "calibration")
    assert stored.metadata.base_model["id"] == "wiki11m"
    assert stored.metadata.recipe == calibrated["recipe"]


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt-oss", "llama"])
def test_inspect_counts_sliding_windows(run: Run, name: str, tmp_path: Path) -> None:
    """It said that a cache takes a fifth of bfloat16, of layers that it does not compress too."""
    config = next(f for f in FAMILIES if f.name == name).make().config
    calibration = Calibration.synthetic(config)
    calibration.save_pretrained(tmp_path)
    status, out, err = run("inspect", tmp_path, "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    expected = estimate_memory(config, "spectral-3", 8192, calibration=calibration)
    assert found["memory"] == expected.to_dict()
    assert found["bytes_per_token_bfloat16"] * 8192 == estimate_memory(config, "dense", 8192).total
    windows = (getattr(config, "layer_types", None) or []).count("sliding_attention")
    assert found["sliding_window_layers"] == windows
    status, out, _ = run("inspect", tmp_path)
    assert ("and sliding windows" in " ".join(out.split())) == bool(windows)


def test_inspect(run: Run, calibrated: dict, folder: Path) -> None:
    status, out, err = run("inspect", folder / "calibration", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["bits"] == pytest.approx(3)
    assert len(found["layers"]) == 6
    assert sum(layer["key_bits"] + layer["value_bits"] for layer in found["layers"]) / 12 == pytest.approx(3)
    assert found["bytes_per_token_bfloat16"] == 6 * 2 * 64 * 2 * 2
    assert found["times_smaller"] > 4.3
    status, out, _ = run("inspect", folder / "calibration", "--bits", 2, "--json")
    assert (status, json.loads(out)["bits"]) == (0, pytest.approx(2))
    status, out, _ = run("inspect", folder / "calibration")
    assert status == 0
    assert "wiki11m" in out
    assert "3.125" in out


def test_words_for_a_rate(run: Run) -> None:
    """inspect says what each means, and --quality takes it; beside --bits it is refused before a model is loaded."""
    status, out, _ = run("inspect", "wiki11m", "--quality", "near-lossless", "--json")
    assert status == 0
    found = json.loads(out)
    near, balanced, small = found["qualities"]
    assert (near["quality"], balanced["quality"], small["quality"]) == ("near-lossless", "balanced", "small")
    assert found["rate"]["bits"] == near["bits"] >= balanced["bits"] >= small["bits"]
    assert near["predicted_kl"] <= near["max_kl"] == 0.001
    status, out, _ = run("inspect", "wiki11m")
    assert f"{near['bits']:g} bits, KL of at most 0.001" in out
    arguments = ("generate", "wiki11m", "-c", "wiki11m", "--prompt", "The city of Leiden", "--max-new-tokens", 2)
    status, out, err = run(*arguments, "--quality", "balanced", "--json")
    assert "nothing is packed yet: the first 4 and the last 64 to 127 tokens stay as they are, in float32" in err
    assert (status, json.loads(out)["bits"]) == (0, pytest.approx(balanced["bits"], abs=0.01))
    for verb in (arguments, ("serve", "nothing", "-c", "wiki11m"), ("inspect", "wiki11m")):
        status, _, err = run(*verb, "--quality", "balanced", "--bits", 3)
        message = "give either --quality or --bits, got --quality balanced and --bits 3"
        assert (status, err) == (2, f"error: {message} (see quantcache {verb[0]} --help)\n")
    status, _, err = run(*arguments, "--quality", "tiny")
    assert status == 2
    assert "'--quality': 'tiny' is not one of 'near-lossless', 'balanced', 'small'" in err


def test_generate(run: Run, calibrated: dict, folder: Path) -> None:
    prompt = (folder / "held_out.txt").read_text("utf-8")[:900]
    arguments = ("generate", "wiki11m", "-c", folder / "calibration", "--prompt", prompt, "--max-new-tokens", 5)
    status, out, err = run(*arguments, "--bits", 4, "--residual", 32, "--json")
    assert status == 0
    found = json.loads(out)
    assert found["new_tokens"] == 5
    assert found["memory"]["bits_per_element"] == pytest.approx(4.125)
    assert found["memory"]["tokens"] == found["prompt_tokens"] + 4
    assert "4.125 bits per encoded element" in err
    assert "including sinks and recent tokens in float32" in err, "twice what bfloat16 would take of them"
    assert found["dtype"] == "float32"
    trained = folder / "trained"  # with a cache or without, as training leaves it: every token was a wrong one
    shutil.copytree(data.demo_model_path(), trained)
    settings = json.loads((trained / "generation_config.json").read_text())
    (trained / "generation_config.json").write_text(json.dumps({**settings, "use_cache": False}))
    coldest = ("--temperature", "1e-40")  # logits divided by it are infinite
    status, out, _ = run("generate", trained, *arguments[2:], "--bits", 4, "--residual", 32, *coldest)
    assert (status, out) == (0, found["text"] + "\n")


def test_eval(run: Run, calibrated: dict, folder: Path) -> None:
    status, out, _ = run(
        *("eval", "wiki11m", "--calibration", folder / "calibration", "--text", folder / "held_out.txt", "--quick"),
        *("--context", 256, "--tokens", 512, "--residual", 0, "--methods", "dense,spectral-3,turboquant-mse-3"),
        *("-o", folder / "result.json", "--json"),
    )
    assert status == 0
    found = json.loads(out)
    assert json.loads((folder / "result.json").read_text("utf-8")) == found
    assert (found["model"], found["context"], found["residual"], found["tokens"]) == ("wiki11m", 256, 0, 512)
    assert list(found["methods"]) == ["dense", "spectral-3", "turboquant-mse-3"]
    figures = ("bits_per_element", "bits_per_element_total", "kl_mean", "kl_p99", "perplexity", "top1_agreement")
    for name, family in (("dense", "dense"), ("spectral-3", "ours"), ("turboquant-mse-3", "rival")):
        method = found["methods"][name]
        assert (method["family"], method["status"], method["simulated"]) == (family, "ok", family == "rival")
        assert all(isinstance(method[figure], float) for figure in figures)
        assert method["cache_bytes"] > 0
    assert found["methods"]["dense"]["kl_mean"] == 0
    assert found["methods"]["spectral-3"]["bits_per_element"] == pytest.approx(3.125)
    assert 0 < found["methods"]["spectral-3"]["kl_mean"] < found["methods"]["turboquant-mse-3"]["kl_mean"]


def test_env(run: Run) -> None:
    status, out, err = run("env", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["versions"]["quantcache"] == __version__
    status, out, _ = run("env")
    assert status == 0
    assert "transformers" in out


def test_help(run: Run) -> None:
    status, out, _ = run()
    assert status == 0
    for verb in ("calibrate", "inspect", "generate", "eval", "formats", "recommend", "env", "demo"):
        assert verb in out
        status, text, _ = run(verb, "--help")
        assert status == 0
        assert "--json" in text
        assert "--debug" in text


def test_the_version_is_told(run: Run) -> None:
    assert run("--version") == (0, f"quantcache {__version__}\n", "")


CALIBRATE = ("calibrate", "wiki11m", "-o", "unused", "--text", "one.txt")
EVAL = ("eval", "wiki11m", "-c", "calibration", "--text", "held_out.txt")
GENERATE = ("generate", "wiki11m", "-c", "calibration", "--prompt", "The city")

BAD_INPUT = {
    "empty text": (("calibrate", "wiki11m", "-o", "unused", "--text", "empty.txt"), "empty.txt is empty"),
    "short text": (("calibrate", "wiki11m", "-o", "unused", "--text", "short.txt"), "more than 16 tokens"),
    "text not UTF-8": (("calibrate", "wiki11m", "-o", "unused", "--text", "latin.txt"), "latin.txt is not UTF-8"),
    "text compressed": ((*EVAL[:-1], "text.txt.gz"), "text.txt.gz is not UTF-8 text: it is compressed by gzip: unpack"),
    "text as Windows has it": ((*EVAL[:-1], "windows.txt"), "windows.txt is not UTF-8 text: it is UTF-16: save it as"),
    "text as Windows has it, unmarked": ((*EVAL[:-1], "wide.txt"), "wide.txt is not UTF-8 text: it holds null"),
    "text in a table": ((*EVAL[:-1], "table.parquet"), "it is Parquet: save its texts as plain text, or as JSON lines"),
    "lines without a text": ((*EVAL[:-1], "chats.jsonl"), 'chats.jsonl, line 2 is not a JSON object with a "text"'),
    "missing text": (("calibrate", "wiki11m", "-o", "unused", "--text", "no.txt"), "no.txt: No such file"),
    "second text missing": ((*CALIBRATE, "no.txt"), "no.txt: No such file"),
    "text is a folder": (("calibrate", "wiki11m", "-o", "unused", "--text", "."), "Is a directory"),
    "no text": (("calibrate", "wiki11m", "-o", "unused"), "--text"),
    "no output": (("calibrate", "wiki11m", "--text", "one.txt"), "-o DIR"),
    "private without a repository": (
        (*CALIBRATE, "--private"),
        "--private is of a repository: give --push-to-hub REPO",
    ),
    "export private, without a repository": (
        ("export", "wiki11m", "-o", "unused", "--private"),
        "--private is of a repository: give --push-to-hub REPO",
    ),
    "output is a file": (("calibrate", "wiki11m", "-o", "one.txt", "--text", "one.txt"), "one.txt"),
    "calibrate at 11 bits": ((*CALIBRATE, "--bits", "11"), "'--bits': '11' "),
    "bits not a number": ((*CALIBRATE, "--bits", "many"), "'--bits': 'many' "),
    "key bits": (
        (*CALIBRATE, "--key-bits", "9"),
        "'--key-bits': '9' is not a number from 0 to 8, 'dense' or",
    ),
    "minimum above budget": ((*CALIBRATE, "--min-bits", "4"), "--min-bits 4 exceeds --bits 3"),
    "minimum above a side's": ((*CALIBRATE, "--min-bits", "3", "--key-bits", "2"), "--min-bits 3 exceeds --key-bits 2"),
    "minimum above no side's": (
        (*CALIBRATE, "--min-bits", "4", "--key-bits", "5", "--value-bits", "3.5"),
        "--min-bits 4 exceeds --value-bits 3.5",
    ),
    "bits of no side": (
        (*CALIBRATE, "--bits", "7", "--key-bits", "2", "--value-bits", "dense"),
        "--bits 7 has no effect beside --key-bits 2 and --value-bits dense",
    ),
    "residual of another metric": (
        (*CALIBRATE, "--metric", "query", "--residual", "0"),
        "--residual has no effect beside --metric query",
    ),
    "metric": ((*CALIBRATE, "--metric", "luck"), "'--metric': 'luck' is not one of 'fisher', 'query', 'identity'"),
    "dtype": (
        (*CALIBRATE, "--dtype", "int3"),
        "'--dtype': 'int3' is not one of 'auto', 'float32'",
    ),
    "device": ((*CALIBRATE, "--device", "abacus"), "device 'abacus' cannot be used: give cpu, cuda, cuda:N or auto"),
    "missing model": (("calibrate", "./no-model", "-o", "unused", "--text", "one.txt"), "no folder ./no-model"),
    "a calibration for a model": (
        ("calibrate", "calibration", "-o", "unused", "--text", "one.txt"),
        "calibration is a calibration, not a model",
    ),
    "a file for a model": (
        ("calibrate", "other/config.json", "-o", "unused", "--text", "one.txt"),
        "other/config.json is a file: a model is a folder, a .gguf file or a Hub id",
    ),
    "a folder without a model": (("formats", "."), ". is not a model's folder: missing config.json"),
    "revision of a folder": (
        ("generate", "other", "-c", "calibration", "-p", "a", "--revision", "v2"),
        "other is on this machine, which has no revision v2 of it: leave that out",
    ),
    "revision of ours": (("formats", "wiki11m", "--revision", "v2"), "wiki11m is on this machine"),
    "unknown model": (("calibrate", "no/model", "-o", "unused", "--text", "one.txt"), "cannot load no/model"),
    "misspelt model": (("calibrate", "wiki12m", "-o", "unused", "--text", "one.txt"), "'wiki11m' is the bundled one"),
    "encoder-decoder": (("calibrate", "./t5", "-o", "unused", "--text", "one.txt"), "encoder-decoder"),
    "no language model": (("calibrate", "./vit", "-o", "unused", "--text", "one.txt"), "no causal language model"),
    "unknown calibration": (("inspect", "no-calibration"), "cannot load calibration no-calibration"),
    "a name that no calibration has": (
        ("generate", "wiki11m", "-c", "wiki12m", "--prompt", "a"),
        "no such folder, quantcache comes with calibrations of wiki11m",
    ),
    "a file that is not there": (("inspect", "calibration.json"), "and one on the Hub is called OWNER/NAME"),
    "a calibration that the Hub may have": (("inspect", "no/calibration"), "no such folder, and from the Hub"),
    "missing calibration": (("inspect", "./no-calibration"), "no folder ./no-calibration"),
    "no calibration in folder": (
        ("inspect", "other"),
        "other is not a calibration folder: missing calibration_config.json",
    ),
    "a file for a calibration": (("inspect", "one.txt"), "one.txt is a file: a calibration is a folder with"),
    "a file of a calibration": (
        ("generate", "wiki11m", "-c", "calibration/calibration.safetensors", "--prompt", "a"),
        "calibration/calibration.safetensors is a file: a calibration is a folder with",
    ),
    "inspect at 11 bits": (("inspect", "calibration", "--bits", "11"), "'--bits': '11' "),
    "evaluation text too short": (("eval", "wiki11m", "-c", "calibration", "--text", "short.txt"), "one window"),
    "unknown method": ((*EVAL, "--methods", "dense,luck-3"), "unknown method 'luck-3'"),
    "method at 11 bits": ((*EVAL, "--methods", "spectral-11"), "between 0 and 8"),
    "no method": ((*EVAL, "--methods", ","), "'--methods': it names nothing"),
    "no calibration": (
        ("eval", "./other", "--text", "held_out.txt"),
        "no calibration of ./other is in its folder",
    ),
    "other model's calibration": (("eval", "./other", "-c", "calibration", "--text", "held_out.txt"), "the model has"),
    "context beyond the limit": ((*EVAL, "--context", "4096"), "limit of 2048"),
    "less than a window": ((*EVAL, "--tokens", "100"), "less than one window"),
    "nowhere to write": ((*EVAL, "-o", "no-folder/result.json"), "no folder"),
    "calibration text": (("eval", "wiki11m", "-c", "calibration", "--text", "both.txt"), "was calibrated on"),
    "empty prompt": (("generate", "wiki11m", "-c", "calibration", "--prompt", ""), "prompt is empty"),
    "temperature of infinity": ((*GENERATE, "--temperature", "inf"), "'--temperature': inf is not a number"),
    "backend": ((*GENERATE, "--backend", "abacus"), "'--backend': 'abacus' is not one of 'auto', 'cpu'"),
    "backend without a GPU": (
        ("generate", "./no-model", "-p", "a", "--backend", "cuda", "--device", "cpu"),
        'backend="cuda" cannot be used here: the CUDA kernels do not run on cpu devices: leave --backend out',
    ),
    "server's backend": (
        ("serve", "./no-model", "--backend", "cuda", "--device", "cpu"),
        'backend="cuda" cannot be used here: the CUDA kernels do not run on cpu devices',
    ),
    "generate at 11 bits": ((*GENERATE, "--bits", "11"), "'--bits': '11' "),
    "no new tokens": ((*GENERATE, "--max-new-tokens", "0"), "'--max-new-tokens': '0' "),
    "other model to generate": (
        ("generate", "./other", "-c", "calibration", "--prompt", "a"),
        "the model has 1: it was made for wiki11m",
    ),
    "unknown verb": (("frobnicate",), "frobnicate"),
    "unknown option": ((*EVAL, "--frobnicate"), "--frobnicate"),
}


def test_texts_may_be_lines_of_json(tmp_path: Path) -> None:
    path, texts = tmp_path / "texts.jsonl", ["One.\nTwo \u2028 of it.", "Drei\u00df."]
    lines = [json.dumps({"id": number, "text": text}) for number, text in enumerate(texts)]
    path.write_text("\ufeff" + "\n\n".join(lines) + "\n", "utf-8")
    assert read_text(path) == "\n\n".join(texts)


@pytest.mark.parametrize(("arguments", "expected"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_line(
    run: Run,
    calibrated: dict,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    expected: str,
) -> None:
    monkeypatch.chdir(folder)
    both = "\n\n".join(Path(name).read_text("utf-8") for name in ("one.txt", "two.txt"))
    Path("both.txt").write_text(both, "utf-8")
    status, out, err = run(*arguments, "--json")
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert expected in lines[0]
    wrong_usage = lines[0].endswith(f"(see quantcache {arguments[0]} --help)") or arguments[0] == "frobnicate"
    assert status == (2 if wrong_usage else 1)


@pytest.mark.parametrize("case", ["metric", "backend"])
def test_wrong_choices_are_refused_before_a_model_is_loaded(
    run: Run, calibrated: dict, folder: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(folder)
    for verb in ("calibrate", "generate"):
        module = importlib.import_module(f"quantcache.cli.{verb}")
        monkeypatch.setattr(module, "load_model", lambda *args, **kwargs: pytest.fail("it was loaded"))
    arguments, expected = BAD_INPUT[case]
    status, _, err = run(*arguments)
    assert status != 0
    assert expected in err


def test_lm_eval_is_named_where_it_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for arguments in (("lm-eval",), ("lm-eval", "--help"), ("lm-eval", "--model", "quantcache", "--json")):
        assert run(*arguments) == (1, "", "error: lm-eval is not installed: pip install 'quantcache[lm-eval]'\n")


def test_debug_shows_the_traceback(folder: Path) -> None:
    with pytest.raises(QuantCacheError, match="is empty"):
        main(["calibrate", "wiki11m", "--text", str(folder / "empty.txt"), "-o", "unused", "--debug"])


def test_unexpected_errors_name_their_type() -> None:
    assert describe(QuantCacheError("two\nlines")) == "two lines"
    assert describe(KeyError("x")).startswith("KeyError: 'x'")
    assert describe(OSError()).startswith("OSError")
    assert describe(OSError(28, "no space left", "w", None, "out/w")) == "w to out/w: no space left"


def test_json_has_no_infinities() -> None:
    assert json.loads(to_json({"a": [float("inf"), 1.5], "b": float("nan")})) == {"a": [None, 1.5], "b": None}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text("utf-8")) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
