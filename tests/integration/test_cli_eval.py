"""``quantcache eval`` with several suites: one record, which goes on after an interruption, and refuses bad input."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, T5Config, ViTConfig
from typer.main import get_command

from quantcache import calibrate, data
from quantcache.cli import app
from quantcache.cli.eval_choices import read_token_counts, without_effect
from quantcache.cli.eval_tables import tables
from quantcache.common import compat
from quantcache.common.choices import SUITES
from quantcache.evaluation.cells import Cells
from quantcache.evaluation.record import read_record
from quantcache.planning.records import read_measurements
from tests.helpers import Run

pytestmark = pytest.mark.usefixtures("one_thread")

EVAL = ("eval", "wiki11m", "-c", "calibration", "--text", "held_out.txt", "--context", "128", "--tokens", "256")


@pytest.fixture
def run(run: Run, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Run:
    """Run the command line in the folder."""
    monkeypatch.chdir(folder)
    return run


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, demo_model: PreTrainedModel, demo_tokenizer: PreTrainedTokenizerBase
) -> Path:
    """Texts, questions, a small calibration, and configs of models that are no decoders."""
    folder = tmp_path_factory.mktemp("eval")
    text, held_out = data.calibration_text()[:3000], data.evaluation_text()[:6000]
    (folder / "held_out.txt").write_text(held_out, "utf-8")
    (folder / "other").mkdir()
    (folder / "other" / "held_out.txt").write_text(text, "utf-8")
    (folder / "mixed.txt").write_text(text[:1500] + held_out, "utf-8")
    (folder / "later.txt").write_text(held_out + text, "utf-8")
    (folder / "calibrated.txt").write_text(text, "utf-8")
    (folder / "short.txt").write_text("Too short.", "utf-8")
    (folder / "empty.txt").write_text(" \n", "utf-8")
    question = {"context": held_out[:300], "question": "What is it?", "answers": ["nothing"]}
    (folder / "qa.jsonl").write_text(json.dumps(question), "utf-8")
    (folder / "bad.jsonl").write_text('{"context": ', "utf-8")
    leaked = {**question, "context": text[:2500]}
    (folder / "leaked.jsonl").write_text(json.dumps(leaked), "utf-8")
    calibrate(
        demo_model, text, demo_tokenizer, metric="identity", max_tokens=512, seq_len=256, progress=False
    ).save_pretrained(folder / "calibration")
    for name, config in (("t5", T5Config()), ("vit", ViTConfig())):
        config.save_pretrained(folder / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(data.demo_model_path() / file, folder / name)
    return folder


@pytest.mark.slow
def test_several_suites_make_one_record(run: Run, folder: Path) -> None:
    arguments = (*EVAL, "--quick", "--suite", "fidelity,routing,memory,qa", "--qa", "qa.jsonl")
    arguments = (*arguments, "--methods", "dense,spectral-3", "--residual", "0,64", "--context", "192,256")
    status, out, err = run(*arguments, "-o", "result.json", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert json.loads((folder / "result.json").read_text("utf-8")) == found
    record = read_record(folder / "result.json")
    assert (record.suite, record.status) == ("eval", "ok")
    assert list(record.metrics) == ["fidelity", "routing", "qa", "memory"]
    places = [(part["context"], part["residual"]) for part in record.metrics["fidelity"]]
    assert places == [(192, 0), (192, 64), (256, 0), (256, 64)]
    assert found["methods"] == record.metrics["fidelity"][0]["methods"]
    assert record.inputs["text"] == found["text"]["sha256"]
    assert None not in (record.inputs["model"], record.inputs["calibration"], record.inputs["questions"])
    assert record.gates["text"] == {"text": "differs", "passages": 0.0}
    assert record.settings["methods"] == ["dense", "spectral-3"]
    assert not (folder / "result.json.cells").exists()
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(*tables(found))
    shown = console.export_text()
    for title in ("residual 64", "Routing", "Question answering", "Bytes held"):
        assert title in shown


@pytest.mark.slow
def test_an_interrupted_run_goes_on(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: tuple[str, ...] = (
        *EVAL,
        "--suite",
        "memory",
        "--quick",
        "--methods",
        "dense,spectral-3",
        "-o",
        "again.json",
    )
    original = Cells.put
    count = 0

    def put(self: Cells, *key: Any) -> None:
        nonlocal count
        original(self, *key)
        count += 1
        if count == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Cells, "put", put)
    status, out, err = run(*arguments, "--json")
    assert (status, out) == (130, "")
    assert err.splitlines() == ["error: interrupted; the same command goes on with what is in again.json.cells"]
    state = folder / "again.json.cells"
    assert len(state.read_text("utf-8").splitlines()) == 3  # what the run is, and two cells
    assert not (folder / "again.json").exists()

    status, out, err = run(*arguments, "--residual", "0", "--json")
    assert (status, out) == (1, "")
    assert "again.json.cells is the state of another run: residuals is [0] now and was [64] then" in err
    assert len(err.splitlines()) == 1

    status, out, err = run(*arguments, "--json")
    assert status == 0
    assert "going on with 2 finished cells" in err
    assert count == 4  # two methods at the two lengths of --quick
    assert not state.exists()


@pytest.mark.slow
def test_tasks_are_sized_and_go_on(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: tuple[str, ...] = (*EVAL, "--quick", "--suite", "lookup,records", "--trials", "1")
    arguments = (*arguments, "--lengths", "150,120", "--methods", "dense,spectral-0", "-o", "tasks.json", "--json")
    original, keys = Cells.put, []

    def put(self: Cells, *key: Any) -> None:
        original(self, *key)
        keys.append(key[:3])
        if len(keys) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Cells, "put", put)
    assert run(*arguments)[0] == 130
    status, out, err = run(*arguments)
    assert status == 0
    assert "going on with 3 finished cells" in err
    assert len(keys) == len(set(keys)) == 2 * 2 + 2  # two lengths, one table
    record = read_record(folder / "tasks.json")
    assert list(record.metrics) == ["records", "lookup"]
    assert record.settings["lengths"] == [150, 120]
    records = record.metrics["records"]
    assert records["settings"]["lengths"] == [120, 150]
    assert list(records["methods"]["dense"]["by_group"]) == list(records["evidence"])[1:] == ["120", "150"]
    assert records["settings"]["format"]["chat"] is False  # the tokenizer has no template
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(*tables(json.loads(out)))
    shown = console.export_text()
    for title in ("Records retrieved", "Values looked up"):
        assert title in shown


@pytest.mark.slow
def test_a_window_that_is_too_short_for_codes_has_no_figures(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache was exact there, and its divergence of 0 stood beside those of methods that had been measured."""
    monkeypatch.setattr("sys.argv", ["quantcache", "eval", "a model"])
    assert run(*EVAL, "--methods", "dense,spectral-2,fp8", "-o", "one two.json", "--json")[0] == 0
    record = read_record(folder / "one two.json")
    assert record.command == "quantcache eval 'a model'"
    (part,) = record.metrics["fidelity"]
    assert part["methods"]["spectral-2"]["status"].startswith("unsupported: in 128 tokens it reads no codes")
    assert record.status == "partial"
    assert [part["methods"][name]["status"] for name in ("dense", "fp8")] == ["ok", "ok"]
    assert [figure.method for figure in read_measurements([folder / "one two.json"]).fidelity] == ["dense", "fp8"]
    suites = ("--suite", "fidelity,needle,records,routing,transfer,qa", "--lengths", "130", "--qa", "qa.jsonl")
    status, _, err = run(*EVAL, *suites, "--methods", "spectral-2")
    assert status == 1
    assert "in 128 tokens it reads no codes" in err


@pytest.mark.slow
def test_windows_that_slide(run: Run, folder: Path) -> None:
    arguments = (*EVAL, "--methods", "dense,spectral-3", "--residual", "0", "--json")
    found = {stride: json.loads(run(*arguments, "--stride", str(stride))[1]) for stride in (32, 100)}
    for stride, result in found.items():
        count = (256 - 128) // stride + 1
        assert result["stride"] == result["metrics"]["fidelity"][0]["stride"] == stride
        assert result["tokens"] == 128 + (count - 1) * stride
        # Every token behind the first is predicted once.
        assert result["methods"]["spectral-3"]["tokens"] == 128 + (count - 1) * stride - 1
    apart = json.loads(run(*arguments)[1])
    assert (apart["stride"], apart["tokens"]) == (None, 256)
    # A longer past predicts better than a window that starts afresh.
    assert found[32]["methods"]["dense"]["perplexity"] < apart["methods"]["dense"]["perplexity"]


@pytest.mark.parametrize(
    ("options", "contexts", "tokens"),
    [
        ((), [1024], 1024),
        (("--context", "256,1200"), [256, 1200], 1200),
        (("--tokens", "300", "--context", "200"), [200], 300),
        (("--tail", "0"), [1024], 1024),
    ],
    ids=["usual", "longer context", "fewer tokens", "equal tail"],
)
def test_a_quick_run_is_one_window_of_1024(
    run: Run, folder: Path, options: tuple[str, ...], contexts: list[int], tokens: int
) -> None:
    (folder / "long.txt").write_text(data.evaluation_text()[:12_000], "utf-8")
    arguments = ("eval", "wiki11m", "--text", "long.txt", "--quick", "--suite", "memory", "--methods", "dense")
    status, out, err = run(*arguments, *options, "--json")
    assert (status, err) == (0, "")
    settings = json.loads(out)["settings"]
    assert (settings["contexts"], settings["tokens"]) == (contexts, tokens)


@pytest.mark.parametrize("library", ["quanto", "torchao"])
def test_quantized_weights(run: Run, folder: Path, library: str) -> None:
    if missing := compat.missing_quantizer(library):
        pytest.skip(missing)
    arguments = (*EVAL, "--quick", "--methods", "dense,spectral-3", "--json")
    found = {name: json.loads(run(*arguments, "--weights", f"{library}-{name}")[1]) for name in ("int8", "int4")}
    exact = json.loads(run(*arguments)[1])
    assert [exact["weights"], *(result["weights"] for result in found.values())] == [
        None,
        f"{library}-int8",
        f"{library}-int4",
    ]
    assert len({result["inputs"]["model"] for result in (exact, *found.values())}) == 3
    for result in found.values():
        assert result["methods"]["dense"]["kl_mean"] == 0  # the reference is the quantized model's own dense cache
        assert result["methods"]["spectral-3"]["status"] == "ok"
    moved = [
        abs(r["methods"]["dense"]["perplexity"] / exact["methods"]["dense"]["perplexity"] - 1) for r in found.values()
    ]
    assert 0 < moved[0] < moved[1]


BAD_INPUT = {
    "unknown suite": ((*EVAL, "--suite", "fidelity,luck"), "'luck' is not one of fidelity, divergence, needle"),
    "no suite": ((*EVAL, "--suite", ","), "'--suite': it names nothing"),
    "unknown method": ((*EVAL, "--suite", "needle", "--methods", "luck-3"), "unknown method 'luck-3'"),
    "empty text": (("eval", "wiki11m", "--text", "empty.txt"), "empty.txt is empty"),
    "short text": (("eval", "wiki11m", "-c", "calibration", "--text", "short.txt"), "one window needs"),
    "encoder-decoder": (("eval", "./t5", "--text", "held_out.txt", "--methods", "dense"), "encoder-decoder"),
    "no language model": (
        ("eval", "./vit", "--text", "held_out.txt", "--methods", "dense"),
        "no causal language model",
    ),
    "calibration text": (("eval", "wiki11m", "-c", "calibration", "--text", "calibrated.txt"), "was calibrated on"),
    "shared passages": ((*EVAL[:5], "mixed.txt", *EVAL[6:]), "mixed.txt holds"),
    "shared passages behind the tokens": ((*EVAL[:5], "later.txt", *EVAL[6:], "--suite", "records"), "later.txt holds"),
    "qa without questions": ((*EVAL, "--suite", "qa"), "--suite qa needs --qa FILE"),
    "questions malformed": ((*EVAL, "--suite", "qa", "--qa", "bad.jsonl"), "bad.jsonl, line 1 is not JSON"),
    "questions missing": ((*EVAL, "--suite", "qa", "--qa", "no.jsonl"), "no.jsonl: No such file"),
    "questions calibrated on": ((*EVAL, "--suite", "qa", "--qa", "leaked.jsonl"), "the text of the questions holds"),
    "residual not a number": (
        (*EVAL, "--residual", "64,many"),
        "'--residual': '64,many' is not one or several whole numbers",
    ),
    "tail not a number": ((*EVAL, "--tail", "0,all"), "'--tail': '0,all' is not one or several whole numbers"),
    "tail too long": ((*EVAL, "--tail", "0,64"), "a window of 128 tokens reads no codes: sinks 4, tail 64 and"),
    "residual negative": (
        (*EVAL, "--residual=-1"),
        "'--residual': '-1' is not one or several whole numbers from 0 up",
    ),
    "context of one": ((*EVAL, "--context", "1"), "'--context': '1' is not one or several whole numbers from 2 up"),
    "needle template": ((*EVAL, "--suite", "needle", "--needle-fact", "no place"), "lacks {name}"),
    "lengths malformed": (
        (*EVAL, "--suite", "records", "--lengths", "1K,x"),
        "'--lengths': '1K,x' is not one or several whole numbers",
    ),
    "lengths before the model": (
        ("eval", "./nowhere", "--text", "held_out.txt", "--lengths", "x"),
        "'--lengths': 'x' is not one or several whole numbers",
    ),
    "lengths beyond the model": ((*EVAL, "--suite", "needle", "--lengths", "4K"), "4096 exceeds the model's limit of"),
    "chat without template": ((*EVAL, "--suite", "needle", "--chat"), "has no chat template"),
    "nothing left": ((*EVAL, "--suite", "transfer", "--methods", "dense"), "transfer: skipped: no method needs"),
    "simulated only": ((*EVAL, "--suite", "speed", "--methods", "turboquant-mse-2"), "skipped: simulated"),
    "stride of none": ((*EVAL, "--stride", "0"), "'--stride'"),
    "stride of a window": ((*EVAL, "--stride", "128"), "the stride must lie between 1 and 127"),
    "unknown weights": (
        (*EVAL, "--weights", "int3"),
        "'--weights': 'int3' is not one of 'int8', 'int4', 'quanto-int8'",
    ),
    "tail and residual": ((*EVAL, "--tail", "0", "--residual", "32"), "got --tail 0 and --residual 32"),
    "domain of the text's name": (
        (*EVAL, "--suite", "transfer", "--domain", "other/held_out.txt"),
        "must differ in name from --text, got --domain other/held_out.txt and --text held_out.txt",
    ),
    "domain missing": ((*EVAL, "--suite", "transfer", "--domain", "no.txt"), "no.txt: No such file"),
    "domain twice": ((*EVAL, "--domain", "mixed.txt", "--domain", "mixed.txt"), "must differ in name"),
}


def test_options_of_other_suites() -> None:
    command = get_command(app).commands["eval"]  # type: ignore[attr-defined]
    options = ("--qa", "q.json", "--trials", "1", "--no-chat", "--chunk", "8", "--quick", "--sinks", "0")
    given = command.make_context("eval", ["m", "--text", "t", *options])
    assert without_effect(("memory", "transfer"), given) == [
        "--qa has no effect here: it is for qa",
        "--trials has no effect here: it is for needle, records, lookup, tools, divergence",
        "--chat has no effect here: it is for needle, records, lookup, tools, qa",
    ]
    assert without_effect(SUITES, given) == []


def test_a_length_is_measured_once_however_it_is_written() -> None:
    assert read_token_counts("--lengths", "2K,1K,1024", least=2) == (2048, 1024)


@pytest.mark.parametrize(("arguments", "expected"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_line(run: Run, arguments: tuple[str, ...], expected: str) -> None:
    status, out, err = run(*arguments, "--json")
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert expected in lines[0]
    assert status == (2 if lines[0].endswith("(see quantcache eval --help)") else 1)
