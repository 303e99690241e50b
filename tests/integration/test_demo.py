"""The demo, doing less than it does for people."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import pytest

from quantcache import data
from quantcache.artifact.calibration import Calibration
from quantcache.cli import main
from quantcache.cli.demo import _chat, _chat_table
from quantcache.common.errors import QuantCacheError
from quantcache.evaluation import chat_demo, demo
from tests.helpers import Run

SMALL = demo.DemoSettings(calibration_tokens=1536, context=768, recall_context=1300, windows=1, new_tokens=6)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_demo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "run_demo", functools.partial(demo.run_demo, SMALL))
    with pytest.raises(SystemExit) as exit_:
        main(["demo", "--json"])
    captured = capsys.readouterr()
    assert not exit_.value.code, captured.err
    result = json.loads(captured.out)
    assert result["needle_found"]
    assert result["needle"] in result["answer_spectral"]
    assert result["bits_per_element"] == pytest.approx(3.125)
    assert 3.125 < result["bits_per_element_total"] < 4.2
    # The same tokens in both caches; the dense one in bfloat16.
    assert result["dense_bytes"] == result["cached_tokens"] * 6 * 2 * 64 * 2 * 2
    assert result["cached_tokens"] == SMALL.recall_context - 1
    assert result["cache_bytes"] * 3.8 < result["dense_bytes"]
    assert 0 < result["kl_mean"] < 0.01
    assert result["top1_agreement"] > 0.94
    assert result["perplexity_spectral"] == pytest.approx(result["perplexity_dense"], rel=0.02)
    assert result["text_dense"]
    assert result["text_spectral"]
    assert (result["context"], result["evaluated_tokens"]) == (768, 768)
    assert result["seconds"] > 0


TALK = chat_demo.ChatSettings(
    article="Shovelware", questions=(("What is shovelware?", ()), ("Since when?", ("no such words",))), new_tokens=3
)


@pytest.fixture
def chatting(tmp_path: Path) -> Path:
    """The bundled model with a chat template, and without its unused room for more tokens."""
    folder = tmp_path / "chatting"
    shutil.copytree(data.demo_model_path(), folder)
    template = "{% for m in messages %}Q: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    (folder / "chat_template.jinja").write_text(template, "utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_chat_demo(monkeypatch: pytest.MonkeyPatch, chatting: Path, run: Run) -> None:
    monkeypatch.setattr(chat_demo, "run_chat_demo", functools.partial(chat_demo.run_chat_demo, settings=TALK))
    status, out, err = run("demo", "--model", chatting, "-c", "wiki11m", "--json")
    assert status == 0, err
    found = json.loads(out)
    dense, packed = found["dense"], found["spectral"]
    assert found["cached_tokens"] > 600
    assert dense["bytes"] == found["cached_tokens"] * 6 * 2 * 64 * 2 * 2  # bfloat16
    assert packed["bytes"] * 2.5 < dense["bytes"]
    assert found["bits_per_element"] == pytest.approx(3.125)
    for side in (dense, packed):
        assert 0 < found["cached_tokens"] / side["reading_tokens_per_second"] < found["seconds"]
        assert 0 < 1 / side["answering_tokens_per_second"] < found["seconds"]
    first, second = found["questions"]
    assert first["answer_dense"]
    assert first["answer_spectral"]
    assert first["right_dense"]
    assert first["right_spectral"]
    assert not second["right_dense"]
    assert not second["right_spectral"]
    assert "wrong, it is no such words" in _chat(found).plain
    table, caption = _chat_table(found)
    assert table.heads == ("", "dense cache", "spectral cache")
    assert f"{found['cached_tokens']:,} cached tokens" in caption


def test_chat_demo_refuses(run: Run, chatting: Path) -> None:
    (chatting / "chat_template.jinja").unlink()
    for option in ((), ("--model",)):
        status, _, err = run("demo", *option, chatting, "-c", "wiki11m")
        message = f"error: {chatting} has no chat template: the demo needs a model that chats"
        assert (status, err.splitlines()[-1]) == (1, message)
        status, _, err = run("demo", *option, chatting)
        assert status == 1
        assert f"no calibration of {chatting} is in its folder or comes with quantcache" in err
    for arguments, message in (
        (("wiki11m", "-c", "wiki11m"), "the demo calibrates wiki11m itself: leave --calibration out"),
        (("a", "--model", "b"), "give the model once, got a and --model b"),
    ):
        status, _, err = run("demo", *arguments)
        assert (status, err) == (2, f"error: {message} (see quantcache demo --help)\n")


def test_chat_demo_needs_room(chatting: Path) -> None:
    with pytest.raises(QuantCacheError, match=r"the demo's context \d+ exceeds the model's limit of \d+ positions"):
        chat_demo.run_chat_demo("x", chatting, Calibration.for_model("wiki11m"), chat_demo.ChatSettings())
