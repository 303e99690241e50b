"""Measurement records as planning reads them: the committed ones, the user's own, and damaged ones."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables
from quantcache import data
from quantcache.common.sources import PACKAGED
from quantcache.evaluation.record import RecordError, read_strict_json
from quantcache.planning import digest, records
from quantcache.planning.digest import bundled_measurements
from quantcache.planning.records import measurements_of, read_measurements
from tests.builders import eval_record

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Such a record in a folder with JSON of other kinds."""
    (tmp_path / "other.json").write_text('{"methods": {}}', "utf-8")
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(eval_record()), "utf-8")
    return path


def test_digest_says_what_the_committed_records_say() -> None:
    """Each figure is found again in its record by hand."""
    found = bundled_measurements()
    content = read_strict_json(data.measurements_path())
    assert digest.to_digest(found) == content == tables.digest(ROOT)
    raw = {path.name: json.loads(path.read_text("utf-8")) for path in RESULTS.rglob("*.json")}
    assert len(found.fidelity) > 60
    for figure in found.fidelity:
        record = raw[figure.origin.file]
        assert (record["commit"], record["settings"]["model"]) == (figure.origin.commit, figure.model)
        entries = [part.get(figure.method, {}) for part in record["metrics"].values()]
        assert any(
            (entry.get("kl_mean"), entry.get("top1_agreement")) == (figure.kl_mean, figure.top1_agreement)
            for entry in entries
        )
    for figure in found.speed:
        pair = raw[figure.origin.file]["metrics"]["models"][f"{figure.model}_{figure.context}"]
        assert figure.speedup == pytest.approx(pair["dense"]["milliseconds"]["median"] / figure.decode_ms)
    assert found.fidelity_of("spectral-3", "wiki11m", 64).context == 2048
    assert found.fidelity_of("spectral-3", "other") is None


def test_own_records(path: Path) -> None:
    for given in (path, path.parent):
        found = read_measurements([given])
        (fidelity,) = found.fidelity
        assert (fidelity.method, fidelity.model, fidelity.context, fidelity.kl_mean) == (
            "spectral-3",
            "my/model",
            512,
            0.002,
        )
        assert str(fidelity.origin) == "Abacus 9 (2 cores), commit 0123456789, mine.json"
        (speed,) = found.speed
        assert (speed.batch, speed.context, speed.decode_ms, speed.speedup) == (4, 1024, 2.0, 2.0)
    assert digest.from_digest(digest.to_digest(found), "here") == found


def test_folder_of_all_committed_records() -> None:
    """Suites without such figures are passed over in a folder, and refused when named."""
    found = read_measurements([RESULTS])
    assert set(found.models()) == {"wiki11m", *PACKAGED}
    (path,) = RESULTS.rglob("findings__*.json")
    with pytest.raises(RecordError, match=r"findings.*\.json: records of suite 'findings' are not used here"):
        read_measurements([path])


def test_the_figure_to_go_by(path: Path) -> None:
    base = eval_record()
    entry = base["metrics"]["fidelity"][0]["methods"]["spectral-3"]
    parts = [(512, 64, 0.1), (2048, 0, 0.2), (1024, 64, 0.3)]
    base["metrics"]["fidelity"] = [
        {"context": c, "residual": r, "methods": {"spectral-3": {**entry, "residual_length": r, "kl_mean": kl}}}
        for c, r, kl in parts
    ]
    found = measurements_of(base, path)
    assert found.fidelity_of("spectral-3", "my/model", 64).kl_mean == 0.3
    assert found.fidelity_of("spectral-3", "my/model", 0).kl_mean == 0.2
    assert found.fidelity_of("spectral-2", "my/model") is None
    newer = copy.deepcopy(base) | {"created": "2026-11-21T10:00:00+00:00"}
    newer["metrics"]["fidelity"][2]["methods"]["spectral-3"]["kl_mean"] = 0.4
    assert (measurements_of(newer, path) + found).fidelity_of("spectral-3", "my/model", 64).kl_mean == 0.4


def test_figures_at_another_residual_are_not_taken(path: Path) -> None:
    """A cache that keeps more recent tokens does better: its figure stood for the default one."""
    record = eval_record()
    record["metrics"]["fidelity"][0]["methods"]["spectral-3"]["residual_length"] = 256
    found = measurements_of(record, path)
    assert found.fidelity_of("spectral-3", "my/model", 64) is None
    assert found.fidelity_of("spectral-3", "my/model").residual == 256
    assert (found.residuals_of("spectral-3", "my/model"), found.residuals_of("fp8", "my/model")) == ([256], [])


@pytest.mark.parametrize(
    ("record", "part", "reason"),
    [
        ({"weights": "quanto-int4"}, {}, "weights in quanto-int4"),
        ({}, {"stride": 128}, r"windows that overlap \(stride 128\)"),
        ({}, {"tail": 64}, r"an equal exact tail \(64 tokens\)"),
        ({"sinks": 0}, {}, "caches with 0 sinks"),
        ({"chunk": 512}, {}, "text in chunks of 512 tokens"),
    ],
)
def test_figures_that_cannot_be_compared(path: Path, record: dict[str, Any], part: dict[str, Any], reason: str) -> None:
    """They counted as those of the plain model, of windows that do not overlap, of 4 sinks and chunks of 64 tokens."""
    content = eval_record(**record)
    content["metrics"]["fidelity"][0] |= part
    found = measurements_of(content, path)
    assert (found.fidelity, len(found.speed)) == ([], 0 if "weights" in record else 1)
    del content["metrics"]["speed"]
    path.write_text(json.dumps(content), "utf-8")
    assert read_measurements([path.parent]) == records.Measurements()
    with pytest.raises(RecordError, match=f"cannot be compared with others: they are of {reason}"):
        read_measurements([path])


@pytest.mark.parametrize("rate", [{"value_bits": "dense"}, {"min_bits": 2}], ids=str)
def test_figures_of_sides_with_their_own_bits_are_not_taken(path: Path, rate: dict[str, Any]) -> None:
    """``spectral-3`` with dense values stood for the one that its name says; rivals know nothing of calibrations."""
    content = eval_record(rate={"key_bits": "joint", "value_bits": "joint", "min_bits": 0, **rate})
    methods = content["metrics"]["fidelity"][0]["methods"]
    methods["spectral-3"]["family"], methods["kivi-3"] = "ours", {**methods["spectral-3"], "family": "rival"}
    assert [figure.method for figure in measurements_of(content, path).fidelity if figure.method != "fp8"] == ["kivi-3"]
    del content["metrics"]["speed"]
    content["metrics"]["fidelity"][0]["methods"] = {"spectral-3": methods["spectral-3"]}
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(RecordError, match="they are of a calibration with"):
        read_measurements([path])


def test_formats_are_compared_at_one_context() -> None:
    """Each stood at the longest that it was measured at, and lost to others for that alone."""
    found = bundled_measurements()
    for model in found.models():
        context = found.shared_context(model, 64)
        methods = {f.method for f in found.fidelity if f.model == model and f.residual in (64, None)}
        figures = [found.fidelity_of(method, model, 64, context) for method in methods]
        assert {figure.context for figure in figures} == {context}
    assert found.fidelity_of("spectral-3", "smollm2-135m", 64).context == 8192
    assert found.fidelity_of("spectral-3", "smollm2-135m", 64, 77).context == 8192
    assert found.shared_context("another", 64) is None


def test_one_folder_by_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert records.same_model("model", str(tmp_path / "model"))
    assert not records.same_model("model", str(tmp_path))
    assert not records.same_model("a/b", "a/c")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("model"), "is not what the suite 'eval' writes: it lacks 'model'"),
        (lambda r: r.pop("suite"), "it lacks suite"),
        (lambda r: r.update(schema_version=2), "schema version 2, this quantcache reads 1"),
        (lambda r: r["environment"].pop("cpu"), "it lacks 'cpu'"),
        (lambda r: r["metrics"].update(fidelity=[3]), "is not what the suite 'eval' writes"),
        (lambda r: r["metrics"].update(speed={"methods": {"x": 1}}), "is not what the suite 'eval' writes"),
        (
            lambda r: r["metrics"]["fidelity"][0].update(context="512"),
            "method 'spectral-3': context must be a whole number, got '512'",
        ),
        (
            lambda r: r["metrics"]["fidelity"][0]["methods"]["spectral-3"].update(kl_mean=None),
            "method 'spectral-3': kl_mean must be a number, got None",
        ),
        (lambda r: r["metrics"]["fidelity"][0]["methods"]["spectral-3"].pop("kl_mean"), "it lacks 'kl_mean'"),
        (lambda r: r["metrics"]["speed"]["methods"]["spectral-3"]["batches"]["4"].update(decode_ratio=0), "division"),
    ],
)
def test_damaged_records_are_named(change: Any, message: str, path: Path) -> None:
    content = eval_record()
    change(content)
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(RecordError) as caught:
        read_measurements([path])
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def refusal(path: Path) -> str | None:
    """Why a record is refused, None if it is read; any other error fails the test."""
    found = None
    try:
        read_measurements([path])
    except RecordError as error:
        found = str(error)
    assert found is None or str(path) in found
    return found


def test_truncated_and_fuzzed_records(path: Path) -> None:
    """Whatever is done to a file, it is read or refused by name."""
    whole = path.read_bytes()
    generator = random.Random(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole[: generator.randrange(len(whole) + 1)] if generator.random() < 0.3 else whole)
        for _ in range(generator.randrange(4)):
            if damaged:
                damaged[generator.randrange(len(damaged))] = generator.choice(b'0-"{}[],:nx')
        path.write_bytes(damaged)
        refused += refusal(path) is not None
    assert refused > 200


def test_any_value_may_be_of_another_kind(path: Path) -> None:
    """Every single value of a record replaced by something else."""

    def places(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        return [before, *(place for key, item in items for place in places(item, (*before, key)))]

    for place in places(eval_record())[1:]:
        for junk in (None, [], {}, "x", -1, 1e308, True):
            content = eval_record()
            holder = content
            for key in place[:-1]:
                holder = holder[key]
            holder[place[-1]] = junk
            path.write_text(json.dumps(content), "utf-8")
            refusal(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "is not a digest of measurements"),
        ({"format": digest.DIGEST_FORMAT, "schema_version": 2}, "has schema version 2, this quantcache reads 1"),
        ({"format": digest.DIGEST_FORMAT, "schema_version": 1}, "is a damaged digest of measurements: 'origins'"),
    ],
)
def test_damaged_digest(content: Any, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        digest.from_digest(content, "here")


def test_missing_records(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"no records found at .*nowhere"):
        read_measurements([tmp_path / "nowhere"])


def test_tables_check_notices_a_digest_of_other_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "quantcache" / "data").mkdir(parents=True)
    results = tmp_path / "benchmarks" / "results" / "here"
    results.mkdir(parents=True)
    assert tables.main([], tmp_path) == 0
    assert tables.main(["--check"], tmp_path) == 0
    entries = eval_record()["metrics"]["fidelity"][0]["methods"]
    settings = {"model": "my/model", "dtype": "bfloat16", "context": 512}
    content = eval_record(suite="fidelity", settings=settings, metrics={"residual_64": entries})
    (results / "fidelity__1.json").write_text(json.dumps(content), "utf-8")
    assert tables.main(["--check"], tmp_path) == 1
    assert "quantcache/data/measurements.json" in capsys.readouterr().err
    assert tables.main([], tmp_path) == 0
    written = read_strict_json(tmp_path / "quantcache" / "data" / "measurements.json")
    assert digest.from_digest(written, "here").models() == ["my/model"]
