"""What the command line finds by itself, and what it refuses to write over: models, calibrations, folders."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quantcache import data
from quantcache.artifact.calibration import Calibration
from quantcache.artifact.files import CONFIG_NAME
from quantcache.cli import loading, reaching
from quantcache.evaluation.methods import METHOD_NAMES
from tests.builders import llama_config
from tests.helpers import Run

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parent.parent.parent
PROMPT = ("--prompt", "The city of Leiden", "--max-new-tokens", 2, "--json")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text to calibrate on."""
    path = tmp_path / "text.txt"
    path.write_text(data.calibration_text()[:3000], "utf-8")
    return path


# ------------------------------------------------------------------- folders


@pytest.mark.slow
def test_a_calibration_of_the_model_is_replaced(run: Run, tmp_path: Path, text: Path) -> None:
    calibrate = ("calibrate", "wiki11m", "--text", text, "--tokens", 256, "--seq-len", 128, "--metric", "identity")
    calibrate = (*calibrate, "-o", tmp_path / "out")
    first = run(*calibrate, "--json")
    assert (first[0], json.loads(first[1])["replaced"]) == (0, False)
    second = run(*calibrate, "--bits", 4, "--json")
    assert (second[0], json.loads(second[1])["replaced"]) == (0, True)
    assert Calibration.from_pretrained(tmp_path / "out").bits == pytest.approx(4)
    status, out, _ = run(*calibrate)
    assert status == 0
    assert out.endswith(", in place of an older one\n")


@pytest.mark.slow
def test_another_models_calibration_is_not(
    run: Run, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor one that cannot be read. The error comes before the work, and --overwrite takes the folder."""
    calibrate = ("calibrate", "wiki11m", "--text", text, "--tokens", 256, "--seq-len", 128, "--metric", "identity")
    other = Calibration.synthetic(llama_config(64, layers=1))
    other.metadata.base_model["id"] = "some/other"
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / CONFIG_NAME).write_text("{")
    finetuned = Calibration.for_model("wiki11m")
    for entry in finetuned.metadata.base_model["fingerprint"].values():
        entry["values"] = [value + 1 for value in entry["values"]]
    finetuned.save_pretrained(tmp_path / "finetuned")
    with monkeypatch.context() as patch:
        patch.setattr("quantcache.calibration.calibrator.calibrate", lambda *args, **kwargs: pytest.fail("it ran"))
        for name, message in (
            ("other", "other is of some/other and does not belong to wiki11m (calibration has "),
            (
                "finetuned",
                "finetuned is of wiki11m and does not belong to wiki11m (the calibration was made for",
            ),
            ("broken", "broken cannot be read ("),
        ):
            before = sorted((path.name, path.read_bytes()) for path in (tmp_path / name).iterdir())
            status, out, err = run(*calibrate, "-o", tmp_path / name)
            assert (status, out, err.count("\n")) == (1, "", 1)
            assert message in err
            assert err.endswith("): give another folder, or --overwrite\n")
            assert before == sorted((path.name, path.read_bytes()) for path in (tmp_path / name).iterdir())
    status, out, _ = run(*calibrate, "-o", tmp_path / "other", "--overwrite", "--json")
    assert (status, json.loads(out)["replaced"]) == (0, True)
    assert Calibration.from_pretrained(tmp_path / "other").metadata.base_model["id"] == "wiki11m"


# -------------------------------------------------------------- calibrations


def test_a_models_own_calibration_is_the_default(run: Run, tmp_path: Path) -> None:
    """Bundled, in the model's folder, or where an export has it."""
    status, out, err = run("generate", "wiki11m", *PROMPT)
    assert status == 0, err
    assert json.loads(out)["text"] == json.loads(run("generate", "wiki11m", "-c", "wiki11m", *PROMPT)[1])["text"]
    for path in data.demo_model_path().iterdir():
        (tmp_path / path.name).symlink_to(path)
    status, _, err = run("generate", tmp_path, *PROMPT)
    assert status == 1
    assert f"no calibration of {tmp_path} is in its folder or comes with quantcache (it has wiki11m, " in err
    assert f"'quantcache calibrate {tmp_path} --text FILE -o calibration/' makes one" in err
    (tmp_path / "quantcache").mkdir()
    for path in (data.calibrations_path() / "wiki11m").iterdir():
        (tmp_path / "quantcache" / path.name).symlink_to(path)
    status, out, err = run("generate", tmp_path, *PROMPT)
    assert status == 0, err
    assert json.loads(out)["bits"] == pytest.approx(3)


def test_eval_takes_it_where_a_method_needs_one(run: Run, tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.txt"
    held_out.write_text(data.evaluation_text()[:3000], "utf-8")
    evaluate = ("eval", "wiki11m", "--text", held_out, "--context", 128, "--tokens", 128, "--json")
    for methods, expected in (("dense", None), ("dense,spectral-3", "wiki11m")):
        status, out, err = run(*evaluate, "--methods", methods)
        assert status == 0, err
        assert json.loads(out)["calibration"] == expected


# -------------------------------------------------------------------- models


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["generate", "calibrate", "formats", "inspect"])
def test_without_a_network_nobody_waits(tmp_path: Path, text: Path, verb: str) -> None:
    """The Hub's client tries each file six times, for half a minute; what it would have said named nothing of ours."""
    arguments = {
        "generate": ["wiki12m", "-c", "wiki11m", "--prompt", "x"],
        "calibrate": ["wiki12m", "--text", str(text), "-o", str(tmp_path / "out")],
        "formats": ["wiki12m"],
        "inspect": ["owner/calibration"],
    }[verb]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    result = subprocess.run(
        [sys.executable, "-m", "quantcache", verb, *arguments], env=environment, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert "Retry" not in result.stderr, "what its client says before each"
    if verb != "inspect":
        for part in (
            "error: cannot load wiki12m: there is no such folder or file; 'wiki11m' is the bundled one,",
            "the Hub's cache does not have it, and http://127.0.0.1:9 cannot be reached (",
            "did you mean wiki11m?",
        ):
            assert part in result.stderr
    assert not (tmp_path / "out").exists()


def test_offline_and_no_hub_id(run: Run) -> None:
    for name, reason in (
        ("owner/model", "the Hub's cache does not have it, and HF_HUB_OFFLINE is set"),
        ("a model", "it is no Hub id"),
    ):
        status, _, err = run("generate", name, *PROMPT)
        assert (status, err.count("\n")) == (1, 1)
        assert err.endswith(f"; {reason}\n")


def test_what_is_in_the_hubs_cache_is_noted_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A verb looks for its model before torch is loaded, and again where its files are found."""
    monkeypatch.setattr(reaching, "hub_problem", lambda: "nobody answers")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: "config.json")
    reaching.expect_model("owner/cached")
    assert loading.find_model("owner/cached") == "owner/cached"
    assert capsys.readouterr().err == "note: nobody answers: owner/cached is taken from the Hub's cache\n"


@pytest.mark.parametrize("reason", ["Is a directory", "Permission denied"])
def test_weights_that_cannot_be_opened(run: Run, tmp_path: Path, reason: str) -> None:
    """safetensors calls them missing."""
    folder, weights = tmp_path / "model", tmp_path / "model" / "model.safetensors"
    shutil.copytree(data.demo_model_path(), folder)
    if reason == "Is a directory":
        weights.unlink()
        weights.mkdir()
    else:
        weights.chmod(0)
        if os.access(weights, os.R_OK):
            pytest.skip("this user may read everything")
    assert run("generate", folder, "-c", "wiki11m", *PROMPT) == (1, "", f"error: {weights}: {reason}\n")


# --------------------------------------------------------------------- lists


def test_methods_are_listed(run: Run) -> None:
    status, out, err = run("eval", "--list-methods", "--json")
    assert (status, err) == (0, "")
    found = {each["method"]: each for each in json.loads(out)["methods"]}
    assert tuple(found) == METHOD_NAMES
    assert found["spectral-B"]["needs"] == "calibration"
    assert (found["kivi-B"]["numbers"], found["kivi-B"]["any_number_between"]) == (list(range(1, 9)), False)
    assert (found["spectral-B"]["numbers"], found["spectral-B"]["any_number_between"]) == ([0, 8], True)
    status, out, _ = run("eval", "--list-methods")
    lines = {line.split()[0].rstrip("*"): line for line in out.splitlines() if line[:1].strip()}
    for name in METHOD_NAMES:
        assert name in lines
    assert "  1-8  " in lines["kivi-B"]
    assert "  64, 128  " in lines["kvarn-k4v4-T"]
    assert "  0 to 8  " in lines["spectral-B"]


def test_recipes_are_listed(run: Run) -> None:
    status, out, err = run("calibrate", "--list-recipes", "--json")
    assert (status, err) == (0, "")
    found = {each["recipe"]: each for each in json.loads(out)["recipes"]}
    assert found["qwen3-0.6b"]["model"] == "Qwen/Qwen3-0.6B"
    status, out, _ = run("calibrate", "--list-recipes")
    assert [line.split()[0] for line in out.splitlines()] == ["recipe", *found]
