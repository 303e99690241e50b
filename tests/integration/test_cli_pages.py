"""The command line's help pages: they fit the terminal, name what may be chosen, and their examples can be typed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from typer.main import get_command

from quantcache.artifact.quality import QUALITIES
from quantcache.backends import BACKENDS
from quantcache.cli import VERBS, app
from quantcache.common import choices
from quantcache.evaluation.plan import QUICK, Sizes
from quantcache.evaluation.weights import weights_library
from quantcache.planning.table import COLUMNS
from quantcache.planning.weights import WEIGHTS_FORMATS
from tests.helpers import Run

ROOT = Path(__file__).resolve().parent.parent.parent
COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
OWN = [name for name in COMMANDS if name != "lm-eval"]


def test_the_first_page(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verbs in groups, those that everybody starts with first, each with a whole line."""
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = run("--help")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 78
    listed = {line.split()[0]: line for line in lines if re.match(r"  [a-z]", line)}
    names = [name for name in listed if name in COMMANDS]
    assert names == [name for verbs in VERBS.values() for name in verbs] == list(COMMANDS)
    assert names[:4] == ["demo", "calibrate", "generate", "eval"]
    for verbs in VERBS.values():
        for name, (_, text) in verbs.items():
            assert len(text) <= 55
            assert listed[name].endswith(f"  {text}")
    assert (run("-h"), run()) == ((0, out, ""), (0, out, ""))


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("name", OWN)
def test_pages_fit(run: Run, monkeypatch: pytest.MonkeyPatch, name: str, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    status, out, err = run(name, "-h")
    assert (status, err) == (0, "")
    page, _, examples = out.partition("\nExamples:\n")
    assert max(map(len, page.splitlines())) <= min(columns, 100)
    assert examples, "a page ends in examples"
    assert max(map(len, examples.splitlines())) <= 80
    assert "docs/" not in out, "a wheel has no docs"
    for former in ("--metrics", "--out ", "--weights-format", "--model ", "--continuous-batching", "--compile"):
        assert former not in out


@pytest.mark.parametrize("name", OWN)
def test_examples_can_be_typed(run: Run, name: str) -> None:
    verb = COMMANDS[name]
    lines = "\n".join(verb.examples).replace("\\\n", " ").splitlines()
    for line in lines:
        program, called, *arguments = shlex.split(line.partition(" < ")[0])
        assert (program, called) == ("quantcache", name)
        verb.make_context(name, arguments)


def test_former_names_go_on_working() -> None:
    for name, arguments, parameter, value in (
        ("calibrate", ["m", "--metrics", "f"], "records", Path("f")),
        ("export", ["m", "-o", "d", "--metrics", "f"], "records", Path("f")),
        ("eval", ["m", "--out", "f"], "output", Path("f")),
        ("recommend", ["m", "--memory", "1GB", "--context", "1K", "--weights-format", "int8"], "weights", "int8"),
        ("formats", ["--model", "m"], "named", "m"),
        ("demo", ["--model", "m"], "named", "m"),
        ("generate", ["m", "--prompt", "x", "--backend", "native"], "backend", "native"),
    ):
        assert COMMANDS[name].make_context(name, arguments).params[parameter] == value


def test_token_counts() -> None:
    counts = {"2048": 2048, "2K": 2048, "2k": 2048, "16_384": 16384, "16,384": 16384, "1M": 1 << 20}
    for given, expected in counts.items():
        context = COMMANDS["analyze"].make_context("analyze", ["m", "-o", "d", "--tokens", given, "--seq-len", given])
        assert (context.params["tokens"], context.params["seq_len"]) == (expected, expected)
    assert COMMANDS["analyze"].make_context("analyze", ["m", "-o", "d"]).params["tokens"] == 8192


@pytest.mark.parametrize("given", ["0", "-1", "2.5", "2G", "many", ""])
def test_what_is_no_token_count(run: Run, given: str) -> None:
    status, _, err = run("analyze", "wiki11m", "-o", "unused", f"--tokens={given}")
    assert status == 2
    assert f"'--tokens': {given!r} is not a number of tokens from 1 up, such as 2048 or 2K" in err


def test_choices_are_those_that_work() -> None:
    assert get_args(choices.Quality) == tuple(QUALITIES)
    assert set(get_args(choices.BackendName)) == {"auto", "native", *BACKENDS}
    assert get_args(choices.WeightsFormatName) == tuple(WEIGHTS_FORMATS)
    assert get_args(choices.SortColumn) == ("format", *COLUMNS)
    for name in get_args(choices.QuantizedWeights):
        assert weights_library(name)


def test_defaults_that_are_told_in_words(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    _, out, _ = run("eval", "-h")
    assert f"[default: {Sizes().questions}, with --quick {QUICK.questions}; x>=1]" in " ".join(out.split())
    for former, latter in re.findall(r"\[default: (\()?[^\]]*(\))?\]", out):
        assert not (former and latter), "brackets within brackets"


@pytest.mark.slow
def test_completion() -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    for words, expected in (("quantcache ca", "calibrate"), ("quantcache calibrate --metric f", "fisher")):
        environment = {"_QUANTCACHE_COMPLETE": "complete_bash", "COMP_WORDS": words}
        environment |= {"COMP_CWORD": str(words.count(" ")), "PYTHONPATH": path}
        result = subprocess.run(
            [sys.executable, "-m", "quantcache"], env={**os.environ, **environment}, capture_output=True, text=True
        )
        assert (result.returncode, result.stdout.split()) == (0, [expected])
