"""The README's code runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from quantcache import Calibration
from quantcache.data import demo_model_path

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.fixture
def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)


def test_the_bundled_model(blocks: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    names: dict = {}
    exec(blocks[0], names)
    memory = names["cache"].memory()
    assert str(memory) in capsys.readouterr().out
    assert memory.tokens > 200
    assert 0 < memory.total < memory.bfloat16_bytes * 2  # the model is in float32
    assert 3 < memory.bits_per_element < 3.2


def test_a_model_of_ones_own(blocks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Calibration.for_model("wiki11m").save_pretrained("calibration")
    assert blocks[1].count('"Qwen/Qwen3-0.6B"') == 2
    names: dict = {}
    exec(blocks[1].replace('"Qwen/Qwen3-0.6B"', repr(str(demo_model_path()))), names)
    assert names["cache"].get_seq_length() > 20
    assert names["cache"].calibration.metadata.rate.bits == 3
