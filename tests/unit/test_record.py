"""Records: what is written is checked, and whatever a file holds gives a record or one clear error."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantcache.evaluation import summaries
from quantcache.evaluation.record import Record, RecordError, check, read_record, write_record

ROOT = Path(__file__).resolve().parent.parent.parent

SOUND: dict[str, Any] = {
    "suite": "eval",
    "status": "ok",
    "created": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789" * 4,
    "dirty": False,
    "command": "quantcache eval wiki11m",
    "environment": {"versions": {"torch": "2.13"}, "gpus": []},
    "settings": {"context": 1024, "lengths": [1, 2]},
    "metrics": {
        "time": summaries.quantiles([1.0, 2.0, 5.0]),
        "average": summaries.mean([1.0, 2.0]),
        "single": summaries.mean([1.0]),
        "share": summaries.share(1, 3),
        "missing": None,
    },
    "inputs": {"text": "ab" * 32, "calibration": None},
    "seeds": [0, 1],
    "gates": {"text": {"passages": 0.0}},
}


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    record = Record(**SOUND)
    path = tmp_path / "record.json"
    written = write_record(path, record, {"model": "wiki11m"})
    assert read_record(path) == record
    assert record.clean
    assert json.loads(path.read_text("utf-8")) == written
    assert written["model"] == "wiki11m"
    assert written["schema_version"] == 1


def test_numbers_that_json_cannot_hold_become_null(tmp_path: Path) -> None:
    written = write_record(tmp_path / "r.json", Record(**{**SOUND, "metrics": {"kl": float("nan")}}))
    assert written["metrics"] == {"kl": None}


def test_an_unsound_record_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    with pytest.raises(RecordError, match="status must be one of"):
        write_record(path, Record(**{**SOUND, "status": "great"}))
    assert not list(tmp_path.iterdir())


def test_committed_records_are_sound() -> None:
    paths = sorted((ROOT / "benchmarks" / "results").rglob("*.json"))
    assert paths
    for path in paths:
        assert read_record(path).suite in path.name


FLAWS = {
    "no status": (("status",), None, "it lacks status"),
    "no schema version": (("schema_version",), None, "missing schema_version"),
    "future schema": (("schema_version",), 2, "schema version 2, this quantcache reads 1"),
    "schema version true": (("schema_version",), True, "schema version True"),
    "dirty a number": (("dirty",), 1, "dirty must be true or false, got 1"),
    "metrics a list": (("metrics",), [], "metrics must be an object, got []"),
    "time without zone": (("created",), "2026-01-02T03:04:05", "created must be a time with its zone"),
    "short commit": (("commit",), "abc", "commit must be a full hash, got 'abc'"),
    "bad hash": (("inputs", "text"), "xyz", "inputs['text'] must be a SHA-256"),
    "seed a float": (("seeds",), [0.5], "seeds[0] must be a whole number, got 0.5"),
    "infinite": (("metrics", "kl"), float("inf"), "metrics.kl is inf"),
    "quantiles out of order": (("metrics", "time", "p20"), 9.0, "p20 <= median <= p80 out of order"),
    "quantiles without n": (("metrics", "time", "n"), 0, "must say how many: n is 0"),
    "average without n": (("metrics", "average", "n"), None, "must say how many: n is None"),
    "negative error": (("metrics", "average", "stderr"), -1.0, "stderr must be a number from 0 up"),
    "share outside its interval": (("metrics", "share", "share"), 0.99, "low <= share <= high out of order"),
}


@pytest.mark.parametrize(("place", "value", "expected"), FLAWS.values(), ids=FLAWS)
def test_flaws_are_named(tmp_path: Path, place: tuple[str, ...], value: Any, expected: str) -> None:
    data = Record(**copy.deepcopy(SOUND)).to_dict()
    inner = data
    for name in place[:-1]:
        inner = inner[name]
    if value is None:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    with pytest.raises(RecordError) as raised:
        check(data, "file.json")
    assert expected in str(raised.value)
    assert str(raised.value).startswith("file.json: ")
    assert "\n" not in str(raised.value)


def test_a_commit_is_needed_to_be_clean() -> None:
    with pytest.raises(RecordError, match="without a commit dirty must be true"):
        check({"schema_version": 1, **SOUND, "commit": None})
    assert not Record(**{**SOUND, "commit": None, "dirty": True}).clean


def test_truncated_files_give_one_error(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_record(path, Record(**SOUND))
    whole = path.read_bytes().rstrip()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(RecordError) as raised:
            read_record(path)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": NaN}', "\xff", "", "null", "3", "1" * 5000, "{}"])
def test_strange_files_give_one_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RecordError):
        read_record(path)


texts = st.text("a0\n\0é\U0001f600", max_size=5)  # all of Unicode would take seconds to look up
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=25)
@given(st.sampled_from(sorted(SOUND)), json_values)
def test_any_field_may_hold_anything(name: str, value: Any) -> None:
    data = {"schema_version": 1, **copy.deepcopy(SOUND), name: value}
    flaw = ""
    try:
        Record.from_dict(data)
    except RecordError as error:
        flaw = str(error)
    assert "\n" not in flaw
