"""``quantcache formats`` and ``quantcache recommend``: tables of 80 columns, one JSON object, lines that run."""

from __future__ import annotations

import importlib
import io
import json
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import T5Config, ViTConfig

from quantcache import data
from quantcache.artifact.calibration import Calibration
from quantcache.artifact.prediction import predict_kl_at
from quantcache.cli.formats import _table
from quantcache.cli.recommend import _shown
from quantcache.common.grid import Grid
from quantcache.planning import table
from quantcache.planning.demand import Demand
from quantcache.planning.digest import bundled_measurements
from quantcache.planning.formats import FORMAT_NAMES
from quantcache.planning.geometry import load_config
from quantcache.planning.recommend import model_sizes, recommend
from tests.builders import eval_record
from tests.helpers import Run

pytestmark = pytest.mark.usefixtures("one_thread")

RECOMMEND = ("recommend", "wiki11m", "--memory", "88MB", "--context", "32K")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records, good and bad, and configs without weights."""
    folder = tmp_path_factory.mktemp("planning")
    (folder / "mine.json").write_text(json.dumps(eval_record(model="bare")), "utf-8")
    (folder / "cut.json").write_text(json.dumps(eval_record())[:300], "utf-8")
    load_config("wiki11m").save_pretrained(folder / "bare")
    T5Config().save_pretrained(folder / "t5")
    ViTConfig().save_pretrained(folder / "vit")
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{", "utf-8")
    return folder


@pytest.fixture
def run(run: Run, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Run:
    """Run the command line in the folder."""
    monkeypatch.chdir(folder)
    return run


def narrow(shown: tuple[Any, ...]) -> list[str]:
    """The lines of all tables on a terminal of 80 columns."""
    console = Console(width=80, record=True, file=io.StringIO(), highlight=False, markup=False)
    for item in shown:
        if isinstance(item, Grid):
            console.print(item)
    return console.export_text().splitlines()


def test_formats_as_json(run: Run) -> None:
    status, out, err = run("formats", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert [row["format"] for row in found["formats"]] == list(FORMAT_NAMES)
    ours = next(row for row in found["formats"] if row["format"] == "spectral-3")
    assert ours["fidelity"]["origin"]["commit"] is not None
    assert ours["bits_per_element"] == 3.125
    assert found["elements_per_token"] == 6 * 2 * 2 * 64


def test_formats_with_own_records(run: Run) -> None:
    """A cell without a record says so; one's own records fill it."""
    status, out, _ = run("formats", "--model", "bare", "--records", "mine.json", "--filter", "spectral-3,kivi-2")
    assert status == 0
    (ours,) = (line for line in out.splitlines() if line.startswith("spectral-3 "))
    assert ours.split() == ["spectral-3", "3.125", "600", "0.00200", "97.00%", "2.00x"]
    (rival,) = (line for line in out.splitlines() if line.startswith("kivi-2* "))
    assert rival.count("not measured") == 3
    status, out, _ = run("formats", "--model", "bare")
    assert out.count("not measured") == 3 * len(FORMAT_NAMES)
    assert (
        "No record of fidelity on bare; there are records on: wiki11m, smollm2-135m, gemma3-270m, qwen2.5-coder-1.5b."
        in out
    )


def test_formats_of_which_the_filters_leave_none(run: Run) -> None:
    """It said that there is no record of the model, and named the model among those with records."""
    status, out, _ = run("formats", "wiki11m", "--filter", "bytes<=1")
    assert status == 0
    assert out.splitlines()[-1] == "No format is what every --filter asks for."


def test_no_columns_are_an_unknown_number(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run("formats")
    monkeypatch.setenv("COLUMNS", "0")
    assert run("formats") == expected
    assert expected[1]


def test_formats_compared(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, _ = run("formats", "--compare", "--sort", "kl", "--filter", "spectral-*", "--json")
    assert status == 0
    found = json.loads(out)
    assert [row["format"] for row in found["formats"]] == ["spectral-4", "spectral-3", "spectral-2.5", "spectral-2"]
    assert found["compare"]["size"]["spectral-2"]["spectral-4"] == 2.125 / 4.125
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = run("formats", "--compare")
    assert status == 0
    assert "Speed of the row over speed of the column" in out
    tables = [line for line in out.splitlines() if line[:1].isdigit()]
    assert len(tables) > 3 * len(FORMAT_NAMES)
    assert max(map(len, tables)) <= 80


def test_tables_fit_80_columns() -> None:
    sizes = model_sizes(load_config("wiki11m"))
    for memory, context in ((36_000_000, 4096), (10**15, 1 << 30)):
        found = recommend(sizes, Demand(memory, context, 64), bundled_measurements(), model="wiki11m")
        if found.best is None:
            found = recommend(sizes, Demand(10**16, context, 64), bundled_measurements(), model="wiki11m")
        lines = narrow(_shown(found, "GiB"))
        for name in FORMAT_NAMES:
            (row,) = (line for line in lines if line.startswith((f"{name} ", f"{name}*")))
            assert row.split()[-1] in ("none", "low", "medium", "high", "unknown")
            assert "…" not in row
    rows = table.rows(sizes.geometry, "another", bundled_measurements())
    lines = narrow((_table(rows, "another"),))
    assert sum(line.count("not measured") for line in lines) == 3 * len(FORMAT_NAMES)


def test_recommend_as_json(run: Run) -> None:
    status, out, err = run(*RECOMMEND, "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["best"] == "spectral-3"
    assert found["demand"]["memory"] == 88_000_000
    assert found["demand"]["context"] == 32_768
    best = next(each for each in found["candidates"] if each["format"] == "spectral-3")
    assert best["quality"]["basis"] == "measured on this model"
    status, out, _ = run("recommend", "wiki11m", "--memory", "94MiB", "--context", "32768", "--json")
    assert json.loads(out)["demand"]["memory"] == 94 * 1024**2
    assert json.loads(out)["best"] == "spectral-4"


@pytest.mark.parametrize("model", ["bare", "bare/config.json"])
def test_recommend_from_a_config_alone(run: Run, model: str) -> None:
    """Nothing was measured on it: the worst of other models, and a high risk."""
    status, out, _ = run("recommend", model, "--memory", "88MB", "--context", "32K", "--batch", "1")
    assert status == 0
    lines = out.splitlines()
    assert any(line.startswith("take ") and "spectral-3" in line for line in lines)
    assert any(line.startswith("risk") and "high: measured on other models" in line for line in lines)
    assert "$ quantcache calibrate bare --text YOUR_TEXT.txt -o calibration/" in lines, "weights load from a folder"
    assert "name = 'bare'" in lines


def test_recommend_with_a_calibration(run: Run) -> None:
    """A calibration with a yardstick predicts, where its model is not one of those measured."""
    given = data.calibrations_path() / "wiki11m"
    status, out, _ = run("recommend", "bare", "-c", given, "--memory", "88MB", "--context", "32K", "--json")
    assert status == 0
    found = json.loads(out)
    best = next(each for each in found["candidates"] if each["format"] == found["best"])
    assert (best["quality"]["basis"], best["quality"]["risk"]) == ("predicted from its calibration", "medium")
    stored = Calibration.from_pretrained(given)
    assert best["quality"]["kl"] == predict_kl_at(stored, float(found["best"].rpartition("-")[2]))
    assert best["quality"]["word"] == "near-lossless"
    bits = [each["bits"] for each in found["qualities"]]
    assert [each["quality"] for each in found["qualities"]] == ["near-lossless", "balanced", "small"]
    assert bits == sorted(bits, reverse=True)
    status, out, _ = run(
        "recommend", "bare", "-c", given, "--memory", "88MB", "--context", "32K", "--quality", "near-lossless"
    )
    assert status == 0
    assert f"{bits[0]:g} bits, KL of at most 0.001" in out
    assert "(near-lossless)" in out


@pytest.mark.parametrize("memory", ["88MB", "250MB"])
def test_lines_and_commands_run(
    run: Run, memory: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, folder: Path
) -> None:
    """What is recommended is executed as it was printed: ours, and no compression where all fits."""
    status, out, _ = run("recommend", "wiki11m", "--memory", memory, "--context", "32K", "--json")
    assert status == 0
    found = json.loads(out)
    (tmp_path / "lines.py").write_text(found["python"], "utf-8")
    state = runpy.run_path(str(tmp_path / "lines.py"))
    printed = capsys.readouterr().out
    assert printed.startswith("The city of Leiden")
    assert ("cache" in state) == (found["best"] != "dense")
    if found["best"] != "dense":
        assert f"bits={found['best'].rpartition('-')[2]}" in found["python"]
        assert state["cache"].get_seq_length() > 8
    for command in found["commands"]:
        name, *arguments = shlex.split(command)
        assert name == "quantcache"
        status, out, _ = run(*arguments, "--max-new-tokens", "8")
        assert status == 0
        assert out.strip()


def test_amounts_are_read_before_the_model_is_looked_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for torch to be told of a missing unit."""
    module = importlib.import_module("quantcache.cli.recommend")
    monkeypatch.setattr(module, "expect_model", lambda *args: pytest.fail("it was looked for"))
    for memory, context in (("24", "32K"), ("24GB", "32Q")):
        assert run(*RECOMMEND[:2], "--memory", memory, "--context", context)[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("formats", "--sort", "price"), "'--sort': 'price' is not one of 'format', 'bits', 'bytes', 'kl'"),
        (("formats", "--filter", "price<3"), "unknown column 'price': known are bits, bytes, kl"),
        (("formats", "--records", "cut.json"), "cut.json cannot be read as JSON"),
        (("formats", "--records", "nowhere"), "no records found at nowhere"),
        (("formats", "--records", "bare"), "no records found in bare"),
        (("formats", "--records", "bare/config.json"), "not a record: missing schema_version"),
        (("formats", "--model", "./nowhere"), "there is no folder ./nowhere"),
        (("formats", "--model", "broken"), "cannot load the config of broken"),
        (("recommend", "t5", *RECOMMEND[2:]), "t5 is an encoder-decoder model"),
        (("recommend", "vit", *RECOMMEND[2:]), "a vit model cannot be built from its config"),
        ((*RECOMMEND[:2], "--memory", "-4GB", "--context", "32K"), "--memory must be more than 0 bytes, got '-4GB'"),
        (
            (*RECOMMEND[:2], "--memory", "24", "--context", "32K"),
            "--memory must be a number and a unit, GB (1000³ bytes)",
        ),
        (
            (*RECOMMEND[:2], "--memory", "24G", "--context", "32K"),
            "--memory must be a number and a unit, GB (1000³ bytes)",
        ),
        (
            (*RECOMMEND[:2], "--memory", "24GB", "--context", "0"),
            "--context must be a whole number of tokens from 1 up",
        ),
        ((*RECOMMEND, "--batch", "0"), "'--batch'"),
        ((*RECOMMEND, "--max-kl", "nan"), "'--max-kl'"),
        ((*RECOMMEND, "--quality", "tiny"), "'--quality': 'tiny' is not one of 'near-lossless', 'balanced', 'small'"),
        (
            (*RECOMMEND, "--quality", "small", "--max-kl", "0.1"),
            "give either --quality or --max-kl, got --quality small and --max-kl 0.1",
        ),
        ((*RECOMMEND, "--min-agreement", "98"), "'--min-agreement'"),
        ((*RECOMMEND, "--weights-format", "int3"), "'--weights-format': 'int3' is not one of 'bf16', 'int8'"),
        ((*RECOMMEND, "-c", "./nowhere"), "there is no folder ./nowhere"),
        ((*RECOMMEND, "--max-kl", "0.0001"), "is known to have a KL of at most 0.0001: the closest is spectral-3"),
        ((*RECOMMEND, "--batch", "50"), "the largest context that fits is"),
    ],
)
def test_bad_input_ends_in_one_line(run: Run, arguments: tuple[str, ...], message: str) -> None:
    status, out, err = run(*arguments)
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("warning:")]
    assert len(lines) == 1, err
    assert message in lines[0]
    assert status == (2 if lines[0].endswith(f"(see quantcache {arguments[0]} --help)") else 1)
