"""The README's tables, and the records they come from."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from benchmarks import claim_tables, fidelity, fidelity_tables, figures, gpu_tables, records, suites, tables
from quantcache import Calibration
from quantcache.artifact.prediction import predict_kl
from quantcache.common.env import environment
from quantcache.data import calibrations_path, demo_model_path
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
                name: {
                    "context": 512 if name == "context_512" else 2048,
                    "tokens": 16_384,
                    "residual": 0 if name == "residual_0" else 64,
                }
                for name in ("residual_64", "residual_0", "context_512", "recommended", "weights_int8", "weights_int4")
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
    for suite in ("fidelity", f"fidelity-{tables.YARDSTICK}"):
        add(checkout, "b", record("2026-01-02T00:00:00+00:00", 0.002, suite=suite))
        add(checkout, "a", record("2026-01-03T00:00:00+00:00", 0.001, suite=suite))
        add(checkout, "c", record("2026-01-04T00:00:00+00:00", 0.009, dirty=True, suite=suite))
    assert tables.main([], checkout) == 0
    text = (checkout / "README.md").read_text("utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[1:] == [
        "| dense | 3.125 | 0.00000 | 0.0000 | 98.0% | 30.12 | |",
        "| spectral-3 | 3.125 | 0.00300 | 0.0600 | 98.0% | 30.12 | 1x |",
        "| turboquant-mse-3 (simulated) | 3.125 | 0.00400 | 0.0800 | 98.0% | 30.12 | 1.3x |",
        "| fp8 | 8.000 | 0.00600 | 0.1200 | 98.0% | 30.12 | 2x |",
    ]
    assert f"benchmarks/results/abacus/fidelity-{tables.YARDSTICK}__a.json" in text
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
    assert "| rival | spectral-2 | spectral-2.5 | spectral-3 | spectral-4 |" in text
    row = "| turboquant-mse | not measured | not measured | turboquant-mse-3: {} | not measured |"
    assert row.format("0.75").replace("turboquant-mse-3: 0.75", "**turboquant-mse-3: 0.75**") in text  # 3 against 4
    assert row.format("0.50") in text
    assert "| No residual | 1 | **0** | 0.75 | 0.50, met |" in text
    assert "| Residual 64 | 1 | 1 | 0.50 | |" in text
    assert "| Context 512, residual 64 | 0 | 0 |  | |" in text
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
    assert claim_tables.claim(results) == {
        "spectral-3": {"kivi": ("kivi-3", 0.25), "quarot": None, "int8-token": ("int8-token", 0.625)}
    }


def kept_in(part: str) -> int:
    """The residual of a part of the records here."""
    return int(part.removeprefix("residual_")) if part.startswith("residual_") else 64


def part_of(created: str, kl: float, parts: dict[str, int], **settings: Any) -> dict[str, Any]:
    """A record of some parts only, by context."""
    content = record(created, kl)
    content["commit"] = created[5:10].replace("-", "") * 10
    content["settings"] |= {"calibration": {"tokens": 32_768, "seconds": kl}, "model_sha256": "m", **settings}
    content["settings"]["parts"] = {
        name: {"context": context, "tokens": 8192, "residual": kept_in(name)} for name, context in parts.items()
    }
    content["metrics"] = {name: {"spectral-3": method(kl)} for name in parts}
    return content


def test_every_part_is_of_the_newest_record_that_holds_it(checkout: Path) -> None:
    (checkout / "docs").mkdir()
    page = checkout / "docs" / "fidelity.md"
    page.write_text(ALL, "utf-8")
    add(checkout, "a", part_of("2026-01-02T00:00:00+00:00", 0.001, {"residual_64": 1024, "context_512": 512}))
    add(checkout, "b", part_of("2026-01-03T00:00:00+00:00", 0.002, {"residual_0": 1024}))
    add(checkout, "c", part_of("2026-01-04T00:00:00+00:00", 0.003, {"context_4096": 4096, "residual_256": 1024}))
    assert tables.main([], checkout) == 0
    text = page.read_text("utf-8")
    claim, every, own, contexts, weights, _ = text.split("<!-- /table -->")
    for name in "abc":
        assert f"fidelity__{name}.json" in claim
        assert f"fidelity__{name}.json" in every
    assert "No residual: wiki11m in float32, 8 windows of 1,024 tokens" in claim
    assert "Residual 256, Context 4,096, residual 64: wiki11m" in claim
    assert "mean KL, no residual | mean KL, residual 256 |" in every
    assert "| spectral-3 | 3.125 | 3.500 | 0.00100 | 98.00% | 30.12 | 0.00200 | 0.00300 |" in every
    assert "commit 0103010301," in every
    assert "mean KL at 512 | mean KL at 1,024 | mean KL at 4,096 |" in contexts
    assert "| spectral-3 | 3.125 | 0.00100 | 0.00100 | 0.00300 |" in contexts
    assert "fidelity__b.json" not in contexts
    assert own.endswith(f"-->\n{tables.NO_RECORD}\n")
    assert weights.endswith(f"-->\n{tables.NO_RECORD}\n")
    digest = json.dumps(tables.digest(checkout))
    assert all(f"fidelity__{name}.json" in digest for name in "abc")
    # A newer run of some parts takes their place and leaves the others alone.
    add(checkout, "d", part_of("2026-01-05T00:00:00+00:00", 0.004, {"residual_0": 1024, "context_512": 512}))
    assert tables.main(["--check"], checkout) == 1
    assert tables.main([], checkout) == 0
    text = page.read_text("utf-8")
    assert "| spectral-3 | 3.125 | 3.500 | 0.00100 | 98.00% | 30.12 | 0.00400 | 0.00300 |" in text
    assert "| spectral-3 | 3.125 | 0.00400 | 0.00100 | 0.00300 |" in text
    assert "fidelity__b.json" not in text
    assert tables.main(["--check"], checkout) == 0
    figure = checkout / "docs" / "figures" / "kl-bits-wiki11m.svg"
    assert figures.is_current(figure, "kl-bits-wiki11m", {"spectral": [(3.125, 0.004)]})


def test_contexts_stand_side_by_side_only_with_the_same_residual(checkout: Path) -> None:
    (checkout / "docs").mkdir()
    page = checkout / "docs" / "fidelity.md"
    page.write_text(ALL, "utf-8")
    add(checkout, "a", part_of("2026-01-02T00:00:00+00:00", 0.001, {"residual_64": 1024, "context_2048": 2048}))
    other = part_of("2026-01-03T00:00:00+00:00", 0.002, {"context_4096": 4096, "weights_int8": 1024})
    for part in other["settings"]["parts"].values():
        part["residual"] = 0
    add(checkout, "b", other)
    assert tables.main([], checkout) == 0
    claim, *_, contexts, weights, _ = page.read_text("utf-8").split("<!-- /table -->")
    assert "Context 2,048, residual 64: " in claim
    assert "Context 4,096, no residual: " in claim
    assert "mean KL at 1,024 | mean KL at 2,048 |" in contexts
    assert "fidelity__b.json" not in contexts
    assert weights.endswith(f"-->\n{tables.NO_RECORD}\n")


@pytest.mark.parametrize(
    ("settings", "beside"),
    [
        ({}, True),
        ({"codec": {"coding": "trellis"}}, True),  # the older record does not say
        ({"model_sha256": "n"}, False),
        ({"evaluation": {"source": "wikitext2_test.txt"}}, False),
        ({"calibration": {"tokens": 8192}}, False),
        ({"sinks": 0}, False),
    ],
)
def test_only_what_was_measured_alike_stands_in_one_table(
    checkout: Path, settings: dict[str, Any], beside: bool
) -> None:
    (checkout / "README.md").write_text(PAGE.replace("table:fidelity", "table:fidelity-all"), "utf-8")
    add(checkout, "a", part_of("2026-01-02T00:00:00+00:00", 0.001, {"residual_64": 1024}))
    add(checkout, "b", part_of("2026-01-03T00:00:00+00:00", 0.002, {"residual_0": 1024}, **settings))
    assert tables.main([], checkout) == 0
    text = (checkout / "README.md").read_text("utf-8")
    assert ("mean KL, no residual" in text) == beside
    assert ("fidelity__b.json" in text) == beside


def test_windows_of_another_length_are_no_column(checkout: Path) -> None:
    (checkout / "README.md").write_text(PAGE.replace("table:fidelity", "table:fidelity-all"), "utf-8")
    add(checkout, "a", part_of("2026-01-02T00:00:00+00:00", 0.001, {"residual_64": 1024, "residual_0": 2048}))
    assert tables.main([], checkout) == 0
    assert "no residual" not in (checkout / "README.md").read_text("utf-8")


@pytest.mark.parametrize("said", [True, False], ids=["said", "of the yardstick"])
def test_predicted_beside_measured(checkout: Path, said: bool) -> None:
    (checkout / "README.md").write_text(PAGE.replace("table:fidelity", "table:claim"), "utf-8")
    content = part_of("2026-01-02T00:00:00+00:00", 0.002, {"residual_64": 1024})
    content["metrics"]["residual_64"]["spectral-2"] = method(0.01)
    points = [{"bits": 2.0, "cost": 0.02, "kl": 0.004}, {"bits": 4.0, "cost": 0.001, "kl": 0.0001}]
    content["settings"]["calibration"]["yardstick"] = {"tokens": 4096, "points": points}
    if said:
        content["settings"]["predicted_kl"] = {"spectral-2": 0.006, "spectral-3": 0.0038, "spectral-8": None}
    add(checkout, "a", content)
    assert tables.main([], checkout) == 0
    text = (checkout / "README.md").read_text("utf-8")
    assert "| text | method | predicted KL | measured KL | predicted / measured | within 2x |" in text
    own = "| held-out Wikipedia text | spectral-"
    assert (f"{own}2 | 0.00600 | 0.01000 | 0.60 | met |" in text) == said
    assert (f"{own}2 | 0.00400 | 0.01000 | 0.40 | **not met** |" in text) != said
    assert (f"{own}3 | 0.00380 | 0.00200 | 1.90 | met |" in text) == said
    assert "WikiText-2's test text: " not in text


def test_predictions_of_a_calibration_of_the_texts_own_kind(checkout: Path) -> None:
    (checkout / "README.md").write_text(PAGE.replace("table:fidelity", "table:predictions-gemma3-270m"), "utf-8")
    content = record("2026-01-02T00:00:00+00:00", 0, suite="predictions-gemma3-270m")
    content["settings"] |= {"residual": 64, "windows": 2, "predicted_kl": {"spectral-2": 0.003, "spectral-3": 0.004}}
    content["metrics"] = {"dense": method(0.0), "spectral-2": method(0.004), "spectral-3": method(0.001)}
    add(checkout, "a", content)
    assert tables.main([], checkout) == 0
    text = (checkout / "README.md").read_text("utf-8")
    assert "| spectral-2 | 0.00300 | 0.00400 | 0.75 | met |" in text
    assert "| spectral-3 | 0.00400 | 0.00100 | 4.00 | **not met** |" in text
    assert "measured on 2 windows of 2,048 tokens of its test text, residual 64." in text


@pytest.mark.parametrize("sinks", [4, 0], ids=["alike", "other sinks"])
def test_predicted_beside_what_another_text_measures(checkout: Path, sinks: int) -> None:
    """A calibration predicts for text of its own kind: the table says what another one costs."""
    (checkout / "README.md").write_text(PAGE.replace("table:fidelity", "table:claim"), "utf-8")
    content = part_of("2026-01-02T00:00:00+00:00", 0.002, {"residual_64": 1024})
    content["settings"]["predicted_kl"] = {"spectral-3": 0.0019}
    add(checkout, "a", content)
    add(checkout, "b", part_of("2026-01-03T00:00:00+00:00", 0.005, {"wikitext2": 1024}, sinks=sinks))
    assert tables.main([], checkout) == 0
    text = (checkout / "README.md").read_text("utf-8")
    assert "| held-out Wikipedia text | spectral-3 | 0.00190 | 0.00200 | 0.95 | met |" in text
    assert ("| WikiText-2's test text | spectral-3 | 0.00190 | 0.00500 | 0.38 | **not met** |" in text) == (sinks == 4)
    assert ("fidelity__b.json" in text) == (sinks == 4)


def test_frames_beside_the_default(checkout: Path) -> None:
    (checkout / "README.md").write_text(PAGE.replace("table:fidelity", "table:frames"), "utf-8")
    content = record("2026-01-02T00:00:00+00:00", 0, suite="frames")
    content["settings"] = {"bits": 3.0, "threads": 1, "default": 128.0}
    rung = {"128": {"median": 2.0, "times": 1.0}, "inf": {"median": 5.0, "times": 2.5}}
    content["metrics"] = {"llama-8b": {"4096": rung}}
    add(checkout, "a", content)
    assert tables.main([], checkout) == 0
    text = (checkout / "README.md").read_text("utf-8")
    assert "| geometry | cached tokens | wavelength 128 | wavelength all |" in text
    assert "| llama-8b | 4,096 | 2.000 (1.00×) | 5.000 (2.50×) |" in text
    assert "those of wavelength 128. Abacus 9" in text


@pytest.mark.parametrize("methods", ["all", "dense,spectral-3,kivi-2"])
def test_predictions_are_held_against_text_of_their_kind_whatever_is_measured(
    monkeypatch: pytest.MonkeyPatch, methods: str
) -> None:
    """``make bench-real`` names no methods: the part is of those of the choice that are ours."""
    monkeypatch.setattr(sys, "argv", ["fidelity.py", "--text", fidelity.WIKITEXT, "--methods", methods, "--weights"])
    model = SimpleNamespace(config=AutoConfig.from_pretrained(demo_model_path()))
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    parts = fidelity.make_parts(fidelity.parse_arguments(), model, tokenizer, "A text. " * 5000)  # type: ignore[arg-type]
    own = {part.name: part for part in parts}["wikipedia"]
    assert own.methods == "dense,spectral-1,spectral-1.5,spectral-2,spectral-3,spectral-4"
    assert own.text is not None
    assert (len(own.tokens), own.residual) == (len(parts[0].tokens), 64)


def test_predictions_of_a_record_are_those_of_the_calibration() -> None:
    calibration = Calibration.from_pretrained(calibrations_path() / "wiki11m")
    entries = {"dense": {"family": "dense"}, "spectral-2.5": {"family": "ours"}, "kivi-2": {"family": "rival"}}
    found = fidelity.predicted(calibration, {"residual_0": entries, "residual_64": {"spectral-3": {"family": "ours"}}})
    assert found == {
        "spectral-2.5": predict_kl(calibration.with_bits(2.5)),
        "spectral-3": predict_kl(calibration.with_bits(3.0)),
    }


def ablation(created: str, rows: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """A record of ablations."""
    content = record(created, 0.001, suite="ablations-smollm2-135m")
    content["settings"] |= {"rates": [3.0], **settings}
    content["metrics"] = rows
    return content


def test_ablations_say_what_beats_the_default_beyond_its_error(checkout: Path) -> None:
    page = checkout / "README.md"
    page.write_text(PAGE.replace("table:fidelity", "table:ablations-smollm2-135m"), "utf-8")
    over = {"to": "trellis", "ratio": 0.75, "stderr": 0.1, "n": 64}
    rows = {
        "trellis": {"3": method(0.004, kl_stretches=[0.003, 0.005])},
        "better": {"3": method(0.003, kl_stretches=[0.002, 0.004], over=over)},
        "alike": {"3": method(0.0035, kl_stderr=0.0001, over={"to": "trellis", "ratio": 0.9, "stderr": 0.06, "n": 64})},
        "failed": {"3": {"status": "out of memory"}},
    }
    known = {"codec": {"coding": "trellis"}, "stretch": 64}
    add(checkout, "a", ablation("2026-01-02T00:00:00+00:00", {"gain": rows, "sinks": rows}, **known))
    bos = {row: {"3": {**found["3"], "dense_perplexity": 21.125}} for row, found in list(rows.items())[:2]}
    add(checkout, "b", ablation("2026-01-03T00:00:00+00:00", {"bos": bos, "sinks": {"0": rows["trellis"]}}, **known))
    assert tables.main([], checkout) == 0
    text = page.read_text("utf-8")
    assert "| gain | 3 bits | ratio at 3 bits |" in text
    assert "| trellis | 0.00400 ± 0.00100 (3.125) | |" in text
    assert "| better | 0.00300 ± 0.00100 (3.125) | **0.750 ± 0.100** |" in text
    assert "| alike | 0.00350 (3.125) | 0.900 ± 0.060 |" in text
    assert "| failed | out of memory | |" in text
    assert "| better | 0.00300 ± 0.00100 (3.125) | **0.750 ± 0.100** | 21.12 |" in text
    assert "Standard errors are over stretches of 64 tokens." in text
    assert "a standard error over 64 pairs of stretches of 64 tokens" in text
    assert "Codes are trellis codes where a row does not say otherwise." in text
    # Each ablation under the newest record that holds it.
    gain, rest = text.split("ablations-smollm2-135m__b.json")[0], text.split("ablations-smollm2-135m__b.json")[1]
    assert "### Gain of a token" in gain
    assert "### Sinks" in rest
    assert "### The BOS token" in rest


def test_ablations_of_before_say_that_their_codes_are_scalar(checkout: Path) -> None:
    page = checkout / "README.md"
    page.write_text(PAGE.replace("table:fidelity", "table:ablations-smollm2-135m"), "utf-8")
    rows = {"4": {"3": method(0.004, kl_stderr=0.001)}}
    add(checkout, "a", ablation("2026-01-02T00:00:00+00:00", {"sinks": rows}))
    assert tables.main([], checkout) == 0
    assert "| sinks | 3 bits |\n" in (text := page.read_text("utf-8"))
    assert "calibration tokens. Scalar codes. Abacus 9" in text


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
    # Benchmarks without cells go by what was there when they began to import.
    monkeypatch.setattr(records, "STARTED", {"commit": started * 40, "dirty": False})
    path = records.write_record("suite", {}, {})
    assert path.parent.parent == tmp_path / folder


@pytest.mark.parametrize(
    ("bench", "more"),
    [(fidelity, ["--residuals", "0"]), (suites, ["--suites", "memory"])],
    ids=["fidelity", "suites"],
)
def test_a_quick_run_makes_no_table(
    bench: ModuleType, more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record did not say so, and a look at whether everything runs became the newest figures of the README."""
    Calibration.for_model("wiki11m").save_pretrained(tmp_path / "calibration")
    asked = ["--quick", "--methods", "dense", "--calibration", str(tmp_path / "calibration")]
    monkeypatch.setattr("sys.argv", ["bench.py", *asked, "--calibration-tokens", "600", *more])
    for module in (bench, sys.modules[bench.read.__module__]):
        monkeypatch.setattr(module, "SHARED", tmp_path)
    monkeypatch.setattr(sys.modules[bench.Run.__module__], "SCRATCH", tmp_path / "scratch")
    monkeypatch.setattr(sys.modules[bench.Run.__module__], "RESULTS", tmp_path / "benchmarks" / "results")
    clean = {**environment(), "git": {"commit": "f" * 40, "dirty": False}}
    monkeypatch.setattr(sys.modules[bench.Run.__module__], "environment", lambda: dict(clean))
    monkeypatch.setattr(sys.modules[bench.Run.__module__], "STARTED", clean["git"])
    bench.main()
    (written,) = (tmp_path / "benchmarks" / "results").rglob("*.json")
    assert json.loads(written.read_text("utf-8"))["metrics"]
    assert tables.records_of(tmp_path, written.name.partition("__")[0]) == []


def test_cells_of_another_machine_or_thread_count_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that went on with other libraries or threads mixed their times under one description."""
    monkeypatch.setattr(records, "SCRATCH", tmp_path)
    surroundings = environment()
    folders = []
    for change in ({}, {"cpu": {**surroundings["cpu"], "threads": 99}}, {"versions": {"torch": "9"}}, {"git": None}):
        found = {**surroundings, **change}
        monkeypatch.setattr(records, "environment", lambda found=found: found)
        folders.append(records.Run("suite", {"a": 1}).folder)
    assert len(set(folders[:3])) == 3
    assert folders[3] == folders[0]


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
    monkeypatch.setattr(records, "STARTED", git)
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


# ------------------------------------------------------------------------------ GPU


def gpu_record(created: str, **metrics: Any) -> dict[str, Any]:
    """A record of the GPU benchmark."""
    environment = {"cpu": {"name": "Abacus 9", "cores": 2}, "gpus": [{"name": "Beads"}]}
    return {**record(created, 0.0, suite="gpu-decode"), "settings": {}, "environment": environment, "metrics": metrics}


def rung(**milliseconds: float) -> dict[str, Any]:
    """One rung; ``_`` in a name stands for a blank or a hyphen."""
    known = {"cuda_3": "cuda-3", "cuda_3_step": "cuda-3 step", "dynamic": "DynamicCache step, flash"}
    times = {known.get(key, key): {"median": ms, "call": 2 * ms} for key, ms in milliseconds.items()}
    return {
        "model": "llama-8b",
        "batch": 8,
        "tokens": 32_768,
        "milliseconds": times,
        "status": {},
        "packed_bytes": {"cuda-3": 2_000_000, "triton-3": 1_000_000},
        "kernel_microseconds": {"cuda-3": {"attend": 90.0}, "triton-3": "no GPU"},
        "difference": {"cuda-3": {"relative": 0.0003, "tokens": 64}, "triton-3": {"relative": 0.5, "tokens": 64}},
    }


def test_gpu_tables_are_of_the_newest_record_that_has_what_they_show(checkout: Path) -> None:
    model = {"model": "llama-8b", "layers": 8, "prefill": [], "generate": []}
    step = {"batch": 1, "context": 4096, "status": "ok", "tokens_per_second": 40.0, "cache_bytes": 5_000_000}
    entries = [{**step, "kind": "dense"}, {**step, "kind": "spectral", "backends": ["cuda"]}]
    graph = {**step, "kind": "spectral", "backends": ["cuda"], "tokens_per_second": 80.0}
    models = [{**model, "decode": entries, "graph": [graph]}]
    attention = [rung(cuda_3=0.1, flash=0.25, cudnn=0.2, cuda_3_step=0.125, dynamic=0.5)]
    parity = {"summary": "108 passed in 47.04s"}
    add(checkout, "a", gpu_record("2026-01-01T00:00:00+00:00", models=models))
    add(checkout, "b", gpu_record("2026-01-02T00:00:00+00:00", attention=attention, parity=parity))
    old = {"spectral-3": {"median": 1.0}, "spectral-3 step": {"median": 1.0}}
    add(checkout, "c", gpu_record("2026-01-03T00:00:00+00:00", attention=[{**rung(), "milliseconds": old}]))
    add(checkout, "d", gpu_record("2026-01-04T00:00:00+00:00", attention={"status": "it failed"}))
    markers = "\n\n".join(f"<!-- table:{name} -->\n<!-- /table -->" for name in ("gpu-attention", "gpu-models"))
    found = tables.render(markers, checkout, Path("README.md"))
    assert "| llama-8b | 8 | 32,768 | 100 | 200 (cudnn) | 2.00× | 125 | 500 | 4.00× | 4.00× |" in found
    assert "differ from plain torch's by at most 0.03 %. Parity on this GPU: CUDA: 108 passed." in found
    assert "| llama-8b | 8 | 32,768 | cuda-3 | 100 |  | 2.0 | attend 90 |" in found
    assert "triton-3" not in found, "it has no time"
    assert "| llama-8b | 8 | 1 | 4,096 | dense |  | 40.0 |  |  | 5.0 |" in found
    assert "| llama-8b | 8 | 1 | 4,096 | spectral | cuda | 40.0 | 80.0 |  | 5.0 |" in found
    assert "gpu-decode__b.json" in found
    assert "gpu-decode__a.json" in found


def test_every_instruction_set_has_its_own_tables_of_cpus(checkout: Path) -> None:
    for day, level in ((1, "avx512"), (2, "avx2"), (3, "plain")):
        times = {"median": float(day), "p20": float(day), "p80": float(day), "n": 9}
        rung = {"milliseconds": {"spectral": times}, "times_faster": {}, "share_of_read_bandwidth": 0.5}
        one, two = ({"geometries": {name: {"256": rung}}} for name in ("alone", "together"))
        made = record(f"2026-01-0{day}T00:00:00+00:00", 0.0, suite="cpu-decode")
        made["settings"] = {"bits": 3.0, "threads": [1, 2], "level": level}
        made["metrics"] = {"attention": {"threads_1": one, "threads_2": two}, "models": {}}
        add(checkout, level, made)
    markers = "\n\n".join(f"<!-- table:cpu-attention-{level} -->\n<!-- /table -->" for level in ("avx512", "avx2"))
    first, second = tables.render(markers, checkout, Path("README.md")).split("table:cpu-attention-avx2")
    assert "| together | 256 | 1.000 (1.000 to 1.000) | 50.0% |" in first
    assert "AVX512, 2 threads" in first
    assert "| together | 256 | 2.000 (2.000 to 2.000) | 50.0% |" in second
    assert "alone" not in first + second


def test_gpu_tables_make_do_with_records_of_triton() -> None:
    ranks = [
        (gpu_tables.attention_rank(record), gpu_tables.models_rank(record))
        for _, record in tables.records_of(tables.ROOT, "gpu-decode")
    ]
    assert all(max(each) > 0 for each in zip(*ranks, strict=True))
