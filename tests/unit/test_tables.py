"""The README's tables, and the records they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import fidelity_tables, figures, records, tables
from quantcache.evaluation.record import RecordError
from quantcache.evaluation.summaries import quantiles

PAGE = "Before.\n\n<!-- table:fidelity -->\nOld.\n<!-- /table -->\n\nAfter.\n"


def method(kl: float, **more: Any) -> dict[str, Any]:
    """A method's figures."""
    return {
        "status": "ok",
        "family": "rival" if more.get("simulated") else "ours",
        "simulated": False,
        "bits_per_element": 3.125,
        "bits_per_element_total": 3.5,
        "kl_mean": kl,
        "kl_p99": 20 * kl,
        "top1_agreement": 0.98,
        "perplexity": 30.125,
        **more,
    }


def record(created: str, kl: float, dirty: bool = False, suite: str = "fidelity") -> dict[str, Any]:
    """A fidelity record."""
    return {
        "schema_version": 1,
        "suite": suite,
        "command": "python benchmarks/fidelity.py",
        "status": "ok",
        "created": created,
        "commit": "0123456789abcdef" + 24 * "0",
        "dirty": dirty,
        "environment": {"cpu": {"name": "Abacus 9", "cores": 2}, "gpus": []},
        "settings": {
            "model": "wiki11m",
            "dtype": "float32",
            "context": 2048,
            "windows": 8,
            "chunk": 64,
            "sinks": 4,
            "calibration": {"tokens": 32_768},
            "evaluation": {"source": "bundled"},
            "parts": {
                name: {"context": context, "tokens": 16_384}
                for name, context in (("residual_64", 2048), ("residual_0", 2048), ("context_512", 512))
            },
        },
        "metrics": {
            "residual_64": {
                "spectral-3": method(kl),
                "turboquant-mse-3": method(2 * kl, simulated=True),
                "hqq-4": {"status": "RuntimeError: no compiler", "simulated": False},
                "turboquant-mse-8": {"status": "RuntimeError: out of memory", "simulated": True},
            },
            "residual_0": {
                "dense": method(0.0, family="dense"),
                "spectral-3": method(3 * kl),
                "turboquant-mse-3": method(4 * kl, simulated=True),
                "turboquant-mse-4": method(3.5 * kl, simulated=True, bits_per_element=4.0),
                "fp8": method(6 * kl, family="rival", bits_per_element=8.0),
                "hqq-4": {"status": "RuntimeError: no compiler", "simulated": False},
            },
        },
    }


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with a README and no records."""
    (tmp_path / "README.md").write_text(PAGE, "utf-8")
    (tmp_path / "benchmarks" / "results" / "abacus").mkdir(parents=True)
    return tmp_path


def add(checkout: Path, name: str, content: dict[str, Any]) -> None:
    """Add a record to a checkout."""
    path = checkout / "benchmarks" / "results" / "abacus" / f"{content['suite']}__{name}.json"
    path.write_text(json.dumps(content), "utf-8")


def test_readme_says_what_the_records_say() -> None:
    assert tables.main(["--check"]) == 0


def test_without_records(checkout: Path) -> None:
    assert tables.main(["--check"], checkout) == 1
    assert (checkout / "README.md").read_text("utf-8") == PAGE
    assert tables.main([], checkout) == 0
    assert (checkout / "README.md").read_text("utf-8") == PAGE.replace("Old.", tables.NO_RECORD)
    assert tables.main(["--check"], checkout) == 0


def test_newest_record_wins_and_dirty_ones_do_not_count(checkout: Path) -> None:
    for suite in ("fidelity", "fidelity-smollm2-135m"):
        add(checkout, "b", record("2026-01-02T00:00:00+00:00", 0.002, suite=suite))
        add(checkout, "a", record("2026-01-03T00:00:00+00:00", 0.001, suite=suite))
        add(checkout, "c", record("2026-01-04T00:00:00+00:00", 0.009, dirty=True, suite=suite))
    assert tables.main([], checkout) == 0
    text = (checkout / "README.md").read_text("utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[1:] == [
        "| dense | 3.125 | 0.00000 | 0.0000 | 98.0% | 30.12 | |",
        "| spectral-3 | 3.125 | 0.00300 | 0.0600 | 98.0% | 30.12 | 1.0x |",
        "| turboquant-mse-3 (simulated) | 3.125 | 0.00400 | 0.0800 | 98.0% | 30.12 | 1.3x |",
        "| fp8 | 8.000 | 0.00600 | 0.1200 | 98.0% | 30.12 | 2.0x |",
    ]
    assert "benchmarks/results/abacus/fidelity-smollm2-135m__a.json" in text
    assert "0.009" not in text
    (checkout / "README.md").write_text(PAGE.replace("table:fidelity", "table:fidelity-all"), "utf-8")
    assert tables.main([], checkout) == 0
    text = (checkout / "README.md").read_text("utf-8")
    assert "| spectral-3 | 3.125 | 3.500 | 0.00100 | 98.00% | 30.12 | 0.00300 |" in text
    assert "| turboquant-mse-3 (simulated) | 3.125 | 3.500 | 0.00200 |" in text
    assert "| turboquant-mse-8 | RuntimeError: out of memory |" in text
    assert "0.009" not in text
    assert "benchmarks/results/abacus/fidelity__a.json" in text
    assert "commit 0123456789," in text
    assert text.startswith("Before.\n")
    assert text.endswith("After.\n")
    assert tables.main(["--check"], checkout) == 0


def test_unknown_table(checkout: Path) -> None:
    (checkout / "README.md").write_text(PAGE.replace("fidelity", "luck"), "utf-8")
    with pytest.raises(ValueError, match="unknown table 'luck'"):
        tables.main([], checkout)


ALL = """<!-- table:claim -->
<!-- /table -->
<!-- table:fidelity-all -->
<!-- /table -->
<!-- table:fidelity-own -->
<!-- /table -->
<!-- table:fidelity-contexts -->
<!-- /table -->
<!-- table:fidelity-weights -->
<!-- /table -->
![](figures/kl-bits-wiki11m.svg)
"""


def test_pages_of_the_documentation_and_their_figures(checkout: Path) -> None:
    (checkout / "docs").mkdir()
    (checkout / "docs" / "fidelity.md").write_text(ALL, "utf-8")
    content = record("2026-01-02T00:00:00+00:00", 0.002)
    content["metrics"]["recommended"] = {
        "spectral-3": method(0.002, sink_length=4, residual_length=64, kl_p99=0.1, kl_max=0.5),
        "quanto-4": {"status": "unsupported: needs optimum-quanto", "simulated": False},
    }
    content["metrics"]["context_512"] = {"spectral-3": method(0.004)}
    content["metrics"]["weights_int8"] = {"spectral-3": method(0.007)}
    content["metrics"]["weights_int4"] = {"spectral-3": {"status": "unsupported: needs optimum-quanto"}}
    add(checkout, "a", content)
    assert tables.main([], checkout) == 0
    text = (checkout / "docs" / "fidelity.md").read_text("utf-8")
    assert "| turboquant-mse | turboquant-mse-3: 0.75, **not met** |" in text  # no residual: 3 against 4
    assert "| turboquant-mse | turboquant-mse-3: 0.50, met |" in text
    assert "No residual: met in 0 of 1 comparisons." in text
    assert "| spectral-3 | 4, 64 | 3.125 | 3.500 | 0.00200 | 0.1000 | 0.500 | 98.00% |" in text
    assert "| quanto-4 |  | unsupported: needs optimum-quanto |" in text
    assert "mean KL at 512 | mean KL at 2,048 |" in text
    assert "| spectral-3 | 3.125 | 0.00400 | 0.00200 |" in text
    assert "| spectral-3 | 0.00200, 30.12 | 0.00700, 30.12 | unsupported: needs optimum-quanto |" in text
    assert "[record](../benchmarks/results/abacus/fidelity__a.json)" in text
    assert tables.main(["--check"], checkout) == 0
    figure = checkout / "docs" / "figures" / "kl-bits-wiki11m.svg"
    drawn = figure.read_bytes()
    # The same data give the same bytes; other data, or no file, are found out.
    figure.unlink()
    assert tables.main(["--check"], checkout) == 1
    assert tables.main([], checkout) == 0
    assert figure.read_bytes() == drawn
    content["metrics"]["residual_0"]["spectral-3"]["kl_mean"] = 0.005
    add(checkout, "a", content)
    assert not figures.is_current(figure, "kl-bits-wiki11m", figures.kl_bits(content))
    assert tables.main(["--check"], checkout) == 1
    assert tables.main([], checkout) == 0
    assert figures.is_current(figure, "kl-bits-wiki11m", figures.kl_bits(content))


def test_claim_takes_the_lowest_setting_with_enough_bits_within_one() -> None:
    def rival(bits: float, kl: float) -> dict[str, Any]:
        return method(kl, simulated=True, bits_per_element=bits)

    results = {
        "dense": method(0.0, bits_per_element=32.0, family="dense"),
        "spectral-3": method(0.001),
        "spectral-1": method(0.1, bits_per_element=1.125),  # below the rates of the claim
        "kivi-2": rival(3.0, 0.5),  # fewer bits than ours
        "kivi-3": rival(4.0, 0.004),
        "kivi-4": rival(4.1, 0.0001),  # not the lowest
        "quarot-4": rival(4.2, 0.0001),  # more than a bit above
        "pca-3": {"status": "out of memory", "simulated": True},
        "int8-token": rival(3.125, 0.0016),
    }
    assert fidelity_tables.claim(results) == {
        "spectral-3": {"kivi": ("kivi-3", 0.25), "quarot": None, "int8-token": ("int8-token", 0.625)}
    }


def test_short_table_keeps_one_setting_of_every_rival() -> None:
    results = {
        "spectral-3": method(0.001),
        "kivi-2": method(0.5, simulated=True, bits_per_element=3.0),
        "kivi-3": method(0.5, simulated=True, bits_per_element=4.0),
        "kivi-4": method(0.5, simulated=True, bits_per_element=5.0),
        "rank-8": method(0.5, simulated=True, bits_per_element=2.0),  # nothing nearer
        "quanto-4": {"status": "unsupported: needs optimum-quanto", "simulated": False, "family": "rival"},
        "floor": method(1e-9, bits_per_element=32.0, family="floor"),
    }
    assert set(figures.kl_bits({"metrics": {"residual_0": results}})) == {"spectral", "kivi", "rank"}
    assert list(fidelity_tables.short(results)) == ["spectral-3", "kivi-3", "rank-8", "quanto-4"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": None}, "metrics must be an object"),
        ({"dirty": "no"}, "dirty must be true or false"),
        ({"schema_version": 2}, "schema version 2, this quantcache reads 1"),
    ],
)
def test_bad_records(checkout: Path, change: dict[str, Any], message: str) -> None:
    add(checkout, "a", {**record("2026-01-02T00:00:00+00:00", 0.002), **change})
    with pytest.raises(RecordError, match=f"fidelity__a.json: .*{message}"):
        tables.main([], checkout)


@pytest.mark.parametrize(("started", "folder"), [("f", "results"), ("e", "scratch")], ids=["same", "other"])
def test_a_commit_in_the_middle_of_a_run_makes_no_result(
    started: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = {"commit": "f" * 40, "dirty": False}
    surroundings = {"gpus": [], "cpu": {"name": "Abacus 9", "cores": 2}, "git": git}
    monkeypatch.setattr(records, "environment", lambda: dict(surroundings))
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(records, "SCRATCH", tmp_path / "scratch")
    path = records.write_record("suite", {}, {}, {"commit": started * 40, "dirty": False})
    assert path.parent.parent == tmp_path / folder


def test_cells_outlive_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "SCRATCH", tmp_path)
    measured = []

    def measure() -> dict[str, float]:
        measured.append(1)
        return {"kl": 0.5}

    assert records.Run("suite", {"a": 1}).cell("one", measure) == {"kl": 0.5}
    assert records.Run("suite", {"a": 1}).cell("one", measure) == {"kl": 0.5}
    assert len(measured) == 1
    other = records.Run("suite", {"a": 2})  # other settings: nothing is known yet
    assert other.cell("one", measure) == {"kl": 0.5}
    assert len(measured) == 2

    def fail() -> None:
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):  # what failed is no finished cell
        other.cell("two", fail)
    assert other.cell("two", lambda: [1, 2]) == [1, 2]
    other.discard()
    assert not other.folder.exists()


def test_page_without_markers(checkout: Path) -> None:
    (checkout / "README.md").write_text("Nothing.\n", "utf-8")
    with pytest.raises(ValueError, match="no table markers"):
        tables.main([], checkout)


@pytest.mark.parametrize(
    ("git", "folder"),
    [
        ({"commit": "f" * 40, "dirty": False}, "results"),
        ({"commit": "f" * 40, "dirty": True}, "scratch"),
        ({"commit": None, "dirty": True}, "scratch"),
        (None, "scratch"),
    ],
    ids=["clean", "dirty", "no commit", "no checkout"],
)
def test_only_a_clean_commit_makes_a_result(
    git: dict[str, Any] | None, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    surroundings = {"gpus": [], "cpu": {"name": "Abacus (TM) 9", "cores": 2}, "git": git}
    monkeypatch.setattr(records, "environment", lambda: dict(surroundings))
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(records, "SCRATCH", tmp_path / "scratch")
    monkeypatch.setattr("sys.argv", ["/somewhere/else/bench.py", "--steps", "3"])
    path = records.write_record("suite", {"steps": 3}, {"time": quantiles([1.0])})
    assert path.parent == tmp_path / folder / "abacus-tm-9-2-cores"
    written = json.loads(path.read_text("utf-8"))
    assert written["command"] == "python bench.py --steps 3"
    assert written["settings"] == {"steps": 3, "source_sha256": records.source_digest()}
    assert written["metrics"]["time"]["n"] == 1
    assert written["schema_version"] == 1
    assert "git" not in written["environment"]
