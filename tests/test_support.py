"""The table of what is supported is that of the tests."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from tests import support

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "support.md"


def test_the_table_is_that_of_the_tests(request: pytest.FixtureRequest) -> None:
    """Of the test files that this run has collected as a whole; `make support` writes the table anew."""
    if any("::" in argument for argument in request.config.args):
        pytest.skip("single tests were asked for")
    expected: dict[str, set[str]] = defaultdict(set)
    for node, marks in request.config.stash[support.COLLECTED].items():
        for row, _ in marks:
            expected[row].add(node.partition("[")[0])
    files = {node.partition("::")[0] for node in request.config.stash[support.COLLECTED]}
    for row, tests in support.listed(TABLE.read_text("utf-8")).items():
        assert {test for test in tests if test.partition("::")[0] in files} == expected[row], row


def test_every_row_holds() -> None:
    text = TABLE.read_text("utf-8")
    assert list(support.listed(text)) == [row for rows in support.ROWS.values() for row in rows]
    for line in text.splitlines():
        if line.startswith("| ") and "`" in line:
            status = line.split(" | ")[1]
            assert status.removesuffix(", refused in part") in ("yes", "refused", "not run: see cases"), line


def test_every_scenario_of_transformers_has_a_row() -> None:
    assert set(support.UPSTREAM.values()) <= {row for rows in support.ROWS.values() for row in rows}


def test_rendering() -> None:
    evidence = {
        "greedy": support.Evidence(works=True, shown=True, tests={"b.py::x", "a.py::y"}),
        "prompt lookup": support.Evidence(works=True, refused=True, tests={"a.py::w"}),
        "sampling": support.Evidence(refused=True, tests={"a.py::y"}),
        "batches": support.Evidence(works=True, shown=True, tests={"a.py::z"}),
    }
    evidence["greedy"].outcomes.update(passed=3, skipped=1)
    evidence["batches"].outcomes.update(passed=3, failed=1)
    text = support.render(evidence)
    assert "| greedy | yes | `a.py::y`<br>`b.py::x` | 3 passed, 1 skipped |" in text
    assert "| sampling | refused | `a.py::y` |" in text
    assert "| prompt lookup | not run: see cases, refused in part | `a.py::w` |" in text
    assert "| batches | **fails** |" in text
    assert "| beam search | **no test** |" in text
    assert support.listed(text)["greedy"] == {"a.py::y", "b.py::x"}
    assert support.listed(text)["beam search"] == set()


def test_table_is_where_the_readme_says() -> None:
    assert "docs/support.md" in (ROOT / "README.md").read_text("utf-8")
