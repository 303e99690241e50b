"""The notebook's cells run in order, offline, and it is stored without outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantcache import SpectralCache
from quantcache.common.defaults import QUALITIES

NOTEBOOK = Path(__file__).parents[2] / "examples" / "05_tour.ipynb"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cells() -> list[dict[str, Any]]:
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    assert (notebook["nbformat"], len(notebook["cells"]) <= 10) == (4, True)
    return notebook["cells"]


@pytest.mark.slow
@pytest.mark.support("the notebook of examples/")
def test_all_cells_run(
    cells: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number + 1}", "exec"), names)
    names["plt"].close("all")
    shown = capsys.readouterr().out
    assert all(f"{word}: " in shown for word in QUALITIES)
    cache = names["cache"]
    assert isinstance(cache, SpectralCache)
    assert str(cache.memory()) in shown
    assert cache.memory().total < 2 * cache.memory().bfloat16_bytes  # the model is in float32
    assert all(layer.spans for layer in cache.spectral_layers), "the article fills blocks"
    assert names["longer"].shape[1] > names["output"].shape[1]
    assert (tmp_path / "calibration" / "calibration.safetensors").is_file()
    assert "generate" not in vars(names["model"])


def test_it_is_stored_without_outputs(cells: list[dict[str, Any]]) -> None:
    for cell in cells:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
