"""The code of README and docs is right: it runs as it stands there, or its names and arguments are those of the API."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, pipeline

import quantcache
from quantcache import Calibration, DecodeGraph, PrefixStore, SpectralCache
from quantcache.analysis import Report
from quantcache.data import demo_model_path

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *(str(each.relative_to(ROOT)) for folder in ("docs", "kernels") for each in ROOT.glob(f"{folder}/*.md")),
)


def blocks_of(page: str) -> list[str]:
    """The Python blocks of a page, without the indentation of a list."""
    found = re.findall(r"^( *)```python\n(.*?)^ *```", (ROOT / page).read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return [re.sub(f"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]


BLOCKS = {f"{page}: {number}": text for page in sorted(PAGES) for number, text in enumerate(blocks_of(page))}

NOT_RUN = {
    "docs/analysis.md: 0": "half a minute; tests/integration/test_analyze.py runs the same",
    "docs/devices.md: 0": "needs several devices",
    "docs/evaluation.md: 0": "minutes",
    "docs/evaluation.md: 1": "the reader's own class",
    "docs/hub.md: 0": "uploads",
    "docs/own-codec.md: 0": "tests/integration/test_own_codec.py runs its source",
    "docs/serving.md: 0": "needs a server",
    "docs/using-a-cache.md: 4": "needs PEFT",
    "docs/using-a-cache.md: 5": "tests/integration/test_compiled.py compiles",
    "docs/using-a-cache.md: 6": "needs a GPU",
    "docs/using-a-cache.md: 7": "needs a GPU",
}
"""Blocks that are only held against the API, and why."""

KINDS: dict[str, type] = {
    "cache": SpectralCache,
    "calibration": Calibration,
    "empty": SpectralCache,
    "prefix": SpectralCache,
    "report": Report,
    "step": DecodeGraph,
    "store": PrefixStore,
}
"""What the pages' names stand for."""

OPTIONS = {name for each in (SpectralCache, Calibration.from_pretrained) for name in inspect.signature(each).parameters}
"""What calls that take further keywords hand them to."""


def test_the_bundled_model(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(BLOCKS["README.md: 0"], names)
    memory = names["cache"].memory()
    out = capsys.readouterr().out
    assert str(memory) in out
    shown = re.search(r"^```\n(tokens .*?)^```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert shown is not None
    assert set(shown[1].splitlines()) <= set(out.splitlines())
    assert memory.tokens > 900
    assert 0 < memory.total < memory.bfloat16_bytes / 2  # although the recent tokens stay as they are
    assert names["model"].dtype == torch.bfloat16
    assert 3 < memory.bits_per_element < 3.2


def test_a_model_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Calibration.for_model("wiki11m").save_pretrained("calibration")
    text = BLOCKS["README.md: 1"]
    assert text.count('"Qwen/Qwen3-0.6B"') == 2
    names: dict[str, Any] = {}
    exec(text.replace('"Qwen/Qwen3-0.6B"', repr(str(demo_model_path()))), names)
    assert names["cache"].get_seq_length() > 20
    assert names["cache"].calibration.metadata.rate.bits == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BLOCKS if not name.startswith("README") and name not in NOT_RUN])
def test_a_block_of_the_docs_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    calibration, path = Calibration.for_model("wiki11m"), str(demo_model_path())
    calibration.save_pretrained("calibration")
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="spectral")
    model.generation_config.max_new_tokens = 4
    tokenizer = AutoTokenizer.from_pretrained(path)
    inputs = tokenizer("The city of Leiden lies on the river. " * 20, return_tensors="pt")
    later = tokenizer("The city of Leiden lies on the river. " * 21, return_tensors="pt")
    cache = SpectralCache(calibration, model.config)
    with torch.no_grad():
        model(inputs["input_ids"], past_key_values=cache)
    exec(
        BLOCKS[name].replace('"path/or/hub-id"', repr(path)),
        {
            "Calibration": Calibration, "DynamicCache": DynamicCache, "SpectralCache": SpectralCache, "cache": cache,
            "calibration": calibration, "chat": "Leiden", "first_turn": inputs, "inputs": inputs, "model": model,
            "pipeline": pipeline, "prompt": later["input_ids"][0], "quantcache": quantcache, "second_turn": later,
            "store": PrefixStore(1 << 24), "system_prompt": inputs["input_ids"], "tokenizer": tokenizer,
            "tokens": inputs["input_ids"][0],
        },
    )  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_asks_for_what_there_is(name: str) -> None:
    wrong_calls(BLOCKS[name])


def test_every_exception_is_a_block() -> None:
    assert NOT_RUN.keys() <= BLOCKS.keys()
    assert len(BLOCKS) > 20


@pytest.mark.parametrize(
    "text",
    [
        "from quantcache import SpectralCash",
        "from quantcache.analysis import analyse",
        "import quantcache.nothing",
        "quantcache.enabel(model)",
        "cache.memories()",
        "quantcache.enable(model, 'calibration/', bit=3)",
        "from quantcache import SpectralCache as S\nS.from_pretrained('calibration/', configuration=model.config)",
        "store.fork(prompt)",
        "import quantcache as q\nq.enable()",
    ],
)
def test_a_wrong_block_is_found(text: str) -> None:
    with pytest.raises((AttributeError, ImportError, TypeError)):
        wrong_calls(text)


def wrong_calls(text: str) -> None:
    """Raise an error for a block that imports or calls something of quantcache as it cannot be called."""
    tree = ast.parse(text)
    known: dict[str, Any] = {"quantcache": quantcache, "Calibration": Calibration, "SpectralCache": SpectralCache}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "quantcache":
            for name in node.names:
                exec(f"from {node.module} import {name.name} as {name.asname or name.name}", known)
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == "quantcache":
                    found = importlib.import_module(name.name)
                    known[name.asname or "quantcache"] = found if name.asname else quantcache
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
            getattr(known[node.value.id], node.attr)
        if isinstance(node, ast.Call):
            check_call(node, known)


def check_call(call: ast.Call, known: dict[str, Any]) -> None:
    """Hold a call against the signature of what it calls, if that is quantcache's."""
    function, self_ = call.func, []
    if isinstance(function, ast.Name):
        called = known.get(function.id)
    elif isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        owner = function.value.id
        if owner in known:
            called = getattr(known[owner], function.attr)
        elif owner in KINDS:
            called = getattr(KINDS[owner], function.attr)
            self_ = [] if inspect.ismethod(called) else [None]
        else:
            return
    else:
        return
    starred = any(isinstance(each, ast.Starred) for each in call.args) or any(
        each.arg is None for each in call.keywords
    )
    if callable(called) and not starred:
        keywords = {str(each.arg): None for each in call.keywords}
        signature = inspect.signature(called)
        signature.bind(*self_, *[None] * len(call.args), **keywords)
        if any(each.kind is each.VAR_KEYWORD for each in signature.parameters.values()):
            wrong = keywords.keys() - signature.parameters.keys() - OPTIONS
            if wrong:
                raise TypeError(f"{ast.unparse(call)}: nobody takes {', '.join(wrong)}")
