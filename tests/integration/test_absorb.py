"""Absorbed models of every architecture: what they compute, and what a spectral cache on them costs."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantcache.artifact.calibration import Calibration
from quantcache.calibration.calibrator import calibrate
from quantcache.export import BASES, absorb, export_checkpoint
from quantcache.export.projections import ARCHITECTURES
from tests.absorbing import ABSORBABLE, run_without_quantcache, trained_looking
from tests.families import Family, marks_of_rest, random_tokens
from tests.helpers import error

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = [pytest.param(f, b, id=f"{f}-{b}") for f in ABSORBABLE for b in BASES]

Outputs = dict[str, Tensor]


@functools.cache
def calibration_of(family: Family) -> Calibration:
    """A calibration of the family's trained-looking model."""
    return calibrate(trained_looking(family), random_tokens(2, 160), predict=False, progress=False)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outputs]:
    """Outputs of every original (by family) and of every export (by family and basis)."""
    root = tmp_path_factory.mktemp("exports")
    folders: list[tuple[str, Path]] = []
    for family in ABSORBABLE:
        model = trained_looking(family)
        model.save_pretrained(root / family.name)
        attention = family.implementations[family.implementations[0] == "spectral"]
        folders.append((attention, root / family.name))
        for basis in BASES:
            output = root / f"{family}-{basis}"
            export_checkpoint(root / family.name, calibration_of(family), output, basis=basis, verify=False)
            folders.append((attention, output))
    return dict(zip((folder.name for _, folder in folders), run_without_quantcache(folders), strict=True))


def test_every_architecture_is_tested() -> None:
    assert {family.model_type for family in ABSORBABLE} == set(ARCHITECTURES)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "basis"), CASES)
def test_exports_compute_what_the_original_computes(family: Family, basis: str, exports: dict[str, Outputs]) -> None:
    original, export = exports[family.name], exports[f"{family}-{basis}"]
    scale = float(original["logits"].abs().max())
    assert float((export["logits"] - original["logits"]).abs().max()) < 1e-4 * scale
    assert torch.equal(export["generated"], original["generated"])


@pytest.mark.parametrize("family", [pytest.param(f, id=f.name, marks=marks_of_rest(f)) for f in ABSORBABLE])
def test_bfloat16_rounds_no_worse_than_the_original(family: Family) -> None:
    tokens = random_tokens(2, 40)
    model = trained_looking(family)
    with torch.no_grad():
        exact = model.double()(input_ids=tokens).logits
        rounded = model.bfloat16().double()(input_ids=tokens).logits
    for basis in BASES:
        absorbed = trained_looking(family).bfloat16()
        absorb(absorbed, calibration_of(family), basis)
        with torch.no_grad():
            found = absorbed.double()(input_ids=tokens).logits
        assert 0 < error(found, rounded) <= 2 * error(rounded, exact)
