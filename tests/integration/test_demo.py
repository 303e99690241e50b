"""The demo, doing less than it does for people."""

from __future__ import annotations

import functools
import json

import pytest

from quantcache.cli import main
from quantcache.evaluation import demo

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
