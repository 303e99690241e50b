"""The reader of JSON: what it takes, what it refuses, and where it says the flaw is."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from quantcache.coding.schema import CodecSettings, Rate
from quantcache.common.jsonfile import MAX_BYTES, as_type, parse_json, read_json


@dataclass(frozen=True)
class Part:
    name: str
    size: float
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Whole:
    parts: list[Part]
    best: Part | None
    kind: Literal["a", "b"]
    bits: float | Literal["joint"] | None
    counts: dict[str, int] = field(default_factory=dict)
    more: Any = None


SOUND = {"parts": [{"name": "x", "size": 1, "later": 3}], "best": None, "kind": "a", "bits": "joint"}


def test_values_get_their_types() -> None:
    found = as_type(Whole, {**SOUND, "counts": {"x": 3}, "more": [None, {}]})
    assert found == Whole([Part("x", 1.0)], None, "a", "joint", {"x": 3}, [None, {}])
    assert isinstance(found.parts[0].size, float)
    assert as_type(Rate, {"bits": 3, "key_bits": "dense"}) == Rate(3.0, "dense")
    settings = json.loads('{"group_size": 4, "profile": "layer", "gain_search": [1, 0.5], "coding": "trellis"}')
    assert as_type(CodecSettings, settings).gain_search == (1.0, 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": None}, "parts must be a list, got None"),
        ({"parts": [3]}, r"parts\[0\] must be an object, got 3"),
        ({"parts": [{"name": "x"}]}, r"parts\[0\] lacks size"),
        ({"parts": [{"name": "x", "size": True}]}, r"parts\[0\].size must be a number, got True"),
        ({"parts": [{"name": "x", "size": 1, "tags": "y"}]}, r"parts\[0\].tags must be a list, got 'y'"),
        ({"parts": [{"name": "x", "size": float("nan")}]}, r"parts\[0\].size must be a number below 1e\+300, got nan"),
        ({"best": {}}, "best lacks name, size"),
        ({"kind": "c"}, "kind must be one of a, b, got 'c'"),
        ({"kind": ["a"]}, r"kind must be one of a, b, got \['a'\]"),
        ({"bits": "dense"}, "bits must be a number, got 'dense'"),
        ({"counts": {"x": 0.5}}, r"counts\['x'\] must be a whole number, got 0.5"),
    ],
)
def test_flaws_are_placed(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_type(Whole, SOUND | change)


def test_what_is_no_object() -> None:
    for value in (None, [], 3, "x"):
        with pytest.raises(ValueError, match="it must be an object"):
            as_type(Whole, value)
    with pytest.raises(ValueError, match="it lacks parts, best, kind, bits"):
        as_type(Whole, {})


def test_bounds_are_the_readers(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    path.write_bytes(b'"' + b"x" * MAX_BYTES + b'"')
    with pytest.raises(ValueError, match="more than 4,194,304 bytes"):
        read_json(path)
    assert len(read_json(path, 2 * MAX_BYTES)) == MAX_BYTES
    with pytest.raises(ValueError, match="more than 3 bytes"):
        parse_json(b"[1, 2]", 3)
    for text in (b"\xff", b'{"a": 1, "a": 2}', b"[NaN]", b"[" * 100_000, b""):
        with pytest.raises(ValueError):  # noqa: PT011 (each has words of its own)
            parse_json(text)
