"""Predicted divergence: the model's shape, its scale from the yardstick, and calibrations that have none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantcache import data
from quantcache.artifact.calibration import Calibration
from quantcache.artifact.prediction import measured_on_seen_text, predict_kl, predict_kl_at
from quantcache.attention import probe
from quantcache.calibration import calibrator, yardstick
from quantcache.calibration.calibrator import calibrate
from quantcache.cli.loading import load_model
from quantcache.coding.codec import SpectralCodec
from quantcache.coding.distortion import coefficient_distortion, expected_cost, side_cost
from quantcache.coding.rope import Rope
from quantcache.coding.schema import SIDES, CodecSettings, LayerCalibration, SideCalibration
from tests.builders import gaussian_vectors, llama_config, random_side
from tests.families import FAMILIES, random_tokens, shared_model

POINTS = [{"bits": 2.0, "cost": 0.02, "kl": 0.008}, {"bits": 4.0, "cost": 0.002, "kl": 0.0004}]

MEASURED = [{2: 0.01, 4: 0.001}, {1: 0.2, 2: 0.01, 4: 0.001}, {1: 0.2, 2: 0.1, 3: 0.01, 4: 0.001}]
"""Divergences by bits."""


def with_yardstick(calibration: Calibration, yardstick: object) -> Calibration:
    recipe = {**calibration.metadata.recipe, "yardstick": yardstick}
    return Calibration(calibration.layers, replace(calibration.metadata, recipe=recipe))


def encoding_error(side: SideCalibration, settings: CodecSettings) -> float:
    """Half the squared error of encoded vectors with the statistics that the constants describe, in coefficients."""
    codec = SpectralCodec(side, Rope(), settings)
    vectors = gaussian_vectors(side, 1, 640)
    block_table = torch.tensor([[first, 64, first] for first in range(0, 640, 64)], dtype=torch.int32)
    decoded = codec.decode(codec.encode(vectors.float(), block_table, None), block_table, None).double()
    error = (decoded - vectors) @ side.analysis.double().transpose(-1, -2)
    return 0.5 * float(error.pow(2).mean((0, 2)).sum())


@pytest.mark.parametrize("width", [2, 4])
def test_cost_is_what_encoding_costs(width: int) -> None:
    """At most that, since scaling every token by itself saves a little; more than a tenth of a bit more would cost."""
    side = random_side(2, 64, width, decay=1.0)
    plain = encoding_error(side, CodecSettings(gain_search=(1.0,), coding="scalar"))
    assert side_cost(side) * 4**-0.1 < plain <= side_cost(side)
    searched = encoding_error(side, CodecSettings(coding="scalar"))
    assert searched <= plain  # searching gains, which the cost leaves out, only helps


def test_distortion_falls_with_the_width() -> None:
    found = coefficient_distortion(torch.arange(9))
    assert found[0] == 1.0
    assert (found.diff() < 0).all()


def test_dense_sides_cost_nothing() -> None:
    calibration = Calibration.synthetic(llama_config())
    dense = calibration.with_bits(3, key_bits="dense", value_bits="dense")
    assert expected_cost(dense.layers) == 0.0
    keys = expected_cost({0: LayerCalibration(Rope(), random_side(1, 64, 3), random_side(1, 64, None))})
    assert keys == side_cost(random_side(1, 64, 3))
    assert predict_kl(with_yardstick(dense, {"points": POINTS})) == 0.0


@pytest.mark.parametrize("measured", MEASURED)
def test_prediction_goes_through_the_measured_points(measured: dict[int, float]) -> None:
    calibration = Calibration.synthetic(llama_config())
    points = [
        {"bits": float(bits), "cost": expected_cost(calibration.with_bits(bits).layers, "trellis"), "kl": kl}
        for bits, kl in measured.items()
    ]
    calibration = with_yardstick(calibration, {"points": points})
    for bits, kl in measured.items():
        assert predict_kl_at(calibration, bits) == pytest.approx(kl)
    found = [predict_kl_at(calibration, bits) for bits in (0.5, 1, 1.5, 2, 3, 4, 5, 6, 8)]
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == len(found)
    assert predict_kl(calibration.with_bits(2)) == predict_kl_at(calibration, 2)
    # Beyond the last points it goes on as between them and their neighbours.
    first, last = (with_yardstick(calibration, {"points": pair}) for pair in (points[:2], points[-2:]))
    assert predict_kl_at(calibration, 0.5) == pytest.approx(predict_kl_at(first, 0.5))
    assert predict_kl_at(calibration, 8) == pytest.approx(predict_kl_at(last, 8))


@pytest.mark.parametrize(
    "yardstick",
    [
        None,
        3,
        {},
        {"points": None},
        {"points": []},
        {"points": POINTS[:1]},
        {"points": [POINTS[0], POINTS[0]]},
        {"points": [POINTS[0], 7]},
        {"points": [POINTS[0], {**POINTS[1], "kl": "0.1"}]},
        {"points": [POINTS[0], {**POINTS[1], "kl": 0.0}]},
        {"points": [POINTS[0], {**POINTS[1], "cost": float("inf")}]},
        {"points": [POINTS[0], {**POINTS[1], "kl": 0.009}]},  # fewer bits would lose less
        {"points": [POINTS[0], {**POINTS[1], "kl": POINTS[0]["kl"]}]},
        {"points": [POINTS[0], {"cost": 0.006, "kl": 0.009}, POINTS[1]]},
    ],
)
def test_no_sound_yardstick_no_prediction(yardstick: object) -> None:
    assert predict_kl(with_yardstick(Calibration.synthetic(llama_config()), yardstick)) is None


def test_a_prediction_on_text_that_was_seen_says_so() -> None:
    calibration = Calibration.synthetic(llama_config())
    told = [
        measured_on_seen_text(with_yardstick(calibration, yardstick))
        for yardstick in (
            {"points": POINTS},
            *({"points": POINTS, "held_out": each} for each in (False, True)),
            None,
            {},
        )
    ]
    assert told == [True, True, False, False, False]


def test_calibrations_without_one_have_no_prediction() -> None:
    assert predict_kl(Calibration.synthetic(llama_config())) is None


def test_calibrate_measures_a_yardstick(tmp_path) -> None:
    """It travels with the artifact, says what the real cache does, and leaves the model as it was."""
    model = shared_model(FAMILIES[0])
    calibration = calibrate(model, random_tokens(2, 260), progress=False)
    yardstick = calibration.metadata.recipe["yardstick"]
    assert [point["bits"] for point in yardstick["points"]] == [1.0, 2.0, 4.0]
    assert yardstick["tokens"] == 2 * 260
    assert yardstick["held_out"] is False
    calibration.save_pretrained(tmp_path)
    loaded = Calibration.from_pretrained(tmp_path)
    for point in yardstick["points"]:
        assert predict_kl_at(loaded, point["bits"]) == pytest.approx(point["kl"])
    assert not any(module.training for module in model.modules())
    assert "yardstick" not in (tmp_path / "README.md").read_text()


def test_short_sequences_have_no_yardstick() -> None:
    calibration = calibrate(shared_model(FAMILIES[0]), random_tokens(2, 100), progress=False)
    assert "yardstick" not in calibration.metadata.recipe


def test_a_calibration_that_need_not_predict_is_the_same_but_for_the_yardstick(monkeypatch) -> None:
    monkeypatch.setattr(calibrator, "measure_yardstick", None)
    found = calibrate(shared_model(FAMILIES[0]), random_tokens(2, 200), predict=False, progress=False)
    monkeypatch.undo()
    expected = calibrate(shared_model(FAMILIES[0]), random_tokens(2, 200), progress=False)
    assert expected.metadata.recipe.pop("yardstick")
    assert found.metadata.recipe == expected.metadata.recipe
    assert predict_kl(found) is None
    for index, layer in expected.layers.items():
        assert torch.equal(found.layers[index].key.analysis, layer.key.analysis)


@pytest.mark.parametrize(("given", "read"), [([4], [3]), ([1, 1, 1, 1], [1, 1, 1]), ([3, 1], [3])], ids=str)
def test_the_yardstick_is_text_that_the_calibration_has_not_seen(given: list[int], read: list[int]) -> None:
    """Where there is more than ``max_tokens``; the calibration is that of the first tokens alone."""
    model, tokens = shared_model(FAMILIES[0]), random_tokens(4, 260)
    more = calibrate(model, tokens.split(given), max_tokens=3 * 260, progress=False)
    alone = calibrate(model, tokens[:3].split(read), progress=False)
    assert more.metadata.recipe["yardstick"]["held_out"] is True
    assert more.metadata.recipe["yardstick"]["tokens"] == 260
    assert alone.metadata.recipe["yardstick"]["held_out"] is False
    for ours, theirs in zip(more.layers.values(), alone.layers.values(), strict=True):
        for side in SIDES:
            assert torch.equal(ours.side(side).analysis, theirs.side(side).analysis)


def test_the_yardstick_of_a_text_begins_behind_what_the_calibration_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, list[Tensor]] = {}

    def measured(
        model: object, sequences: list[Tensor], held_out: list[Tensor], calibration: object, on_progress: object
    ) -> None:
        given.update(sequences=sequences, held_out=held_out)

    monkeypatch.setattr(calibrator, "measure_yardstick", measured)
    model, tokenizer = load_model(data.BUNDLED_MODEL, device="cpu", dtype="float32")
    text = data.calibration_text()
    calibrate(model, text, tokenizer, metric="identity", max_tokens=300, seq_len=100, progress=False)
    read, left = (torch.cat(given[name], dim=1)[0] for name in ("sequences", "held_out"))
    tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    assert (len(read), len(left)) == (300, 4096)
    assert torch.equal(torch.cat((read, left)), tokens[: 300 + 4096])


@pytest.mark.parametrize("can", [True, False])
def test_a_yardstick_attends_on_codes_where_the_model_can(can: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = FAMILIES[0].make().eval(), set()
    model.set_attn_implementation("sdpa")

    def run(given: PreTrainedModel, *others: object) -> Any:
        seen.add(given.config._attn_implementation)
        return probe.run(given, *others)

    monkeypatch.setattr(probe, "attends", lambda model: can)
    monkeypatch.setattr(yardstick, "run", run)
    sequences = [random_tokens(1, 200)]
    assert yardstick.measure_yardstick(model, sequences, [], Calibration.synthetic(model.config)) is not None
    assert seen == {"spectral" if can else "sdpa"}
    assert model.config._attn_implementation == "sdpa"
