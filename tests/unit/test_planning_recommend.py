"""Which format is recommended, what the table of formats shows, and how amounts are written."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from quantcache.artifact.calibration import Calibration
from quantcache.artifact.prediction import predict_kl, predict_kl_at
from quantcache.common.defaults import RESIDUAL_LENGTH
from quantcache.common.errors import CalibrationMismatch, QuantCacheError
from quantcache.common.units import parse_bytes, parse_tokens, show_bits, show_bytes
from quantcache.planning import quality, table, usage
from quantcache.planning.demand import Demand, Recommendation
from quantcache.planning.digest import bundled_measurements
from quantcache.planning.formats import list_formats, parse_format
from quantcache.planning.geometry import Geometry, load_config, read_geometry
from quantcache.planning.memory import estimate_activations, estimate_memory, largest_cache, read_widths
from quantcache.planning.recommend import ModelSizes, longest, model_sizes, recommend
from quantcache.planning.records import Measurements, measurements_of
from tests.builders import eval_record, llama_config

pytestmark = pytest.mark.usefixtures("traced_once")

BUNDLED = bundled_measurements()
CONTEXT = 32_768


def eight_billion() -> LlamaConfig:
    """The shape of Llama-3.1-8B."""
    return LlamaConfig(
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128_256,
        max_position_embeddings=131_072,
    )


@functools.cache
def sizes(model: str = "wiki11m") -> ModelSizes:
    """The sizes of the bundled model, or of the shape of Llama-3.1-8B."""
    return model_sizes(load_config(model) if model == "wiki11m" else eight_billion())


def plan(demand: Demand, model: str = "wiki11m", **more: Any) -> Recommendation:
    """A recommendation from the bundled figures."""
    return recommend(sizes(model), demand, BUNDLED, model=model, **more)


@functools.cache
def totals() -> dict[str, int]:
    """What every format that can be used takes in all at the context of these tests."""
    found = plan(Demand(1, CONTEXT))
    return {each.format: each.total_bytes for each in found.candidates if each.usable}


def test_weights_and_cache_of_eight_billion_parameters() -> None:
    """Sizes that everybody knows: 8.03 billion parameters, and 128 KiB of cache a token in 16 bits."""
    found = plan(Demand(10**12, 131_072, 4), "llama")
    assert found.weights_bytes == 2 * 8_030_261_248
    dense = found.candidate("dense")
    assert dense.cache_bytes == dense.cache_bytes_largest == 4 * 131_072 * 128 * 1024
    ours = found.candidate("spectral-3")
    assert ours.cache_bytes == estimate_memory(eight_billion(), "spectral-3", 131_072, 4).total
    tiled = estimate_memory(eight_billion(), "spectral-3", 131_072, 4, tiles=True).total
    assert 1.05 * ours.cache_bytes < tiled < 1.1 * ours.cache_bytes
    assert ours.cache_bytes <= ours.cache_bytes_largest <= 1.07 * tiled
    assert ours.bits_per_element == 3 + 8 / 128
    assert found.best == "dense"
    assert found.reason.startswith("nothing needs compressing")
    for each in found.candidates:
        parts = (each.cache_bytes_largest, each.constants_bytes, each.activation_bytes, found.weights_bytes)
        assert each.total_bytes == sum(parts)


@pytest.mark.slow
def test_more_memory_never_gives_a_worse_divergence() -> None:
    last = float("inf")
    seen = set()
    for memory in sorted(total + step for total in totals().values() for step in (-1, 0)):
        found = plan(Demand(memory, CONTEXT))
        if found.best is None:
            assert last == float("inf")
            continue
        best = found.candidate(found.best)
        assert best.fits
        assert best.usable
        assert best.quality.kl <= last
        last = best.quality.kl
        seen.add(found.best)
    assert {"spectral-2", "spectral-2.5", "spectral-3", "spectral-4", "dense"} <= seen


@pytest.mark.parametrize("name", ["dense", "quanto-4", "kivi-3", "spectral-3"])
def test_the_longest_context_is_the_longest(name: str) -> None:
    memory = 60_000_000
    reach = plan(Demand(memory, CONTEXT)).candidate(name).max_context
    assert reach
    assert plan(Demand(memory, reach)).candidate(name).fits
    assert not plan(Demand(memory, reach + 1)).candidate(name).fits


def test_longest() -> None:
    assert longest(lambda tokens: tokens <= 12_345) == 12_345
    assert longest(lambda tokens: False) == 0
    assert longest(lambda tokens: True) is None


@pytest.mark.parametrize("name", ["dense", "quanto-4", "fp8", "spectral-3", "kivi-3"])
def test_activations_never_decrease(name: str) -> None:
    windowed = Geometry(
        (replace(sizes().geometry.layers[0], blocks=False, window=100), *sizes().geometry.layers), 0, "traced"
    )
    form, widths = parse_format(name), read_widths(sizes().config)
    for known in (sizes().geometry, windowed):
        if form.layout == "quantized" and known is windowed:
            continue
        needs = [estimate_activations(widths, form, known, tokens, 3).total for tokens in range(1, 1500, 7)]
        assert needs == sorted(needs)


def test_constraints() -> None:
    demand = Demand(totals()["spectral-3"], CONTEXT)
    assert plan(replace(demand, memory=totals()["spectral-4"])).best == "spectral-4"
    assert plan(demand).best == "spectral-3"
    figure = BUNDLED.fidelity_of("spectral-3", "wiki11m", 64)
    kl, agreement = figure.kl_mean, figure.top1_agreement
    assert plan(replace(demand, max_kl=kl, min_agreement=agreement)).best == "spectral-3"
    closest = f"the closest is spectral-3 with KL {kl:.5f}, agreement {agreement:.5f}"
    for limits, asked in (
        ({"max_kl": kl / 2}, f"KL of at most {kl / 2:g}"),
        ({"min_agreement": 0.999}, "agreement of at least 0.999"),
        ({"max_kl": 1e-5, "min_agreement": 0.999}, "KL of at most 1e-05 and agreement of at least 0.999"),
    ):
        found = plan(replace(demand, **limits))
        assert (found.best, found.commands, found.python) == (None, [], "")
        assert found.reason.endswith(f"with 32,768 tokens in 1 row is known to have a {asked}: {closest}")


def test_nothing_fits() -> None:
    memory = 64 * 1024**2
    found = plan(Demand(memory, 1 << 20, 2), unit="MiB")
    assert found.best is None
    assert found.reason.startswith(
        "nothing fits 64.00 MiB with 1,048,576 tokens in 2 rows: the smallest, spectral-2, takes"
    )
    reach = max(each.max_context for each in found.candidates if each.usable)
    assert f"the largest context that fits is {reach:,} tokens, with " in found.reason
    assert plan(Demand(memory, reach, 2)).best is not None
    assert plan(Demand(memory, reach + 1, 2)).best is None
    tiny = plan(Demand(1_000_000, 10))
    assert tiny.reason.endswith("weights in bf16; no context fits at batch 1")


@pytest.mark.slow
def test_packed_weights_leave_more_room() -> None:
    reach = {
        name: plan(Demand(24 * 10**9, 8192, 4, weights=name), "llama").candidate("spectral-3")
        for name in ("bf16", "int8", "nf4")
    }
    contexts = [each.max_context for each in reach.values()]
    assert contexts == sorted(contexts)
    with pytest.raises(QuantCacheError, match="unknown weights format 'int3': known are bf16, int8, int4-g128, gptq"):
        plan(Demand(10**9, 10, weights="int3"))
    notes = plan(Demand(10**9, 10, weights="gguf-q4_0")).notes
    assert "With transformers, and so with quantcache, such weights take what bf16 takes." in notes


@pytest.mark.parametrize(
    ("demand", "message"),
    [
        (Demand(-5, 10), "memory must be a whole number from 1 up, got -5"),
        (Demand(10, 0), "context must be a whole number from 1 up, got 0"),
        (Demand(10, 10, 0), "batch must be a whole number from 1 up, got 0"),
        (Demand(10, 10, chunk=0), "chunk must be a whole number from 1 up, got 0"),
        (Demand(10, 10, max_kl=-1), "max_kl must be a number from 0 up, got -1"),
        (Demand(10, 10, max_kl=float("nan")), "max_kl must be a number from 0 up, got nan"),
        (Demand(10, 10, min_agreement=98), "min_agreement must lie between 0 and 1, got 98"),
    ],
)
def test_demands_that_make_no_sense(demand: Demand, message: str) -> None:
    with pytest.raises(QuantCacheError) as caught:
        plan(demand)
    assert message in str(caught.value)


# ------------------------------------------------------------------ what fidelity rests on


def calibration_with_yardstick(config: LlamaConfig) -> Calibration:
    """A stand-in calibration that predicts something."""
    made = Calibration.synthetic(config)
    made.metadata.recipe["yardstick"] = {"points": [{"cost": 0.1, "kl": 0.01}, {"cost": 1.0, "kl": 0.2}]}
    return made


def test_basis_and_risk() -> None:
    form = parse_format("spectral-3")
    record = eval_record()
    record["metrics"]["fidelity"][0]["methods"]["spectral-3"] |= {"kl_mean": 0.02, "top1_agreement": 0.9}
    mine = measurements_of(record, Path("mine.json"))
    own = quality.expected_quality(form, ["my/model"], 512, BUNDLED + mine)
    assert (own.kl, own.agreement, own.basis, own.risk) == (0.02, 0.9, "measured on this model", "low")
    assert quality.expected_quality(form, ["my/model"], 513, BUNDLED + mine).risk == "medium"
    other = quality.expected_quality(form, ["another"], 512, BUNDLED + mine)
    assert (other.kl, other.agreement) == (0.02, 0.9)  # the worst of all
    assert (other.basis, other.risk) == ("measured on other models", "high")
    assert other.source.startswith("worst of 5: my/model in bfloat16, windows of 512")
    nothing = quality.expected_quality(form, ["another"], 512, Measurements())
    assert (nothing.kl, nothing.basis, nothing.risk) == (None, "nothing known", "unknown")
    record["metrics"]["fidelity"][0]["methods"]["spectral-3"]["residual_length"] = 256
    wider = quality.expected_quality(form, ["my/model"], 512, measurements_of(record, Path("mine.json")))
    assert (wider.kl, wider.basis, wider.source) == (
        None,
        "nothing known",
        "measured on this model only at residual 256",
    )
    dense = quality.expected_quality(parse_format("dense"), ["another"], 512, Measurements())
    assert (dense.kl, dense.risk) == (0.0, "none")


def test_figures_of_fewer_models_are_named() -> None:
    """One that was measured on the easiest model alone looked better than one that was on all."""
    found = recommend(sizes(), Demand(memory=1 << 40, context=512), BUNDLED, model="another")
    (note,) = (note for note in found.notes if note.startswith("KL is the worst of 4 other models; of fewer"))
    names = note.rpartition(" for ")[2].rstrip(".").split(", ")
    assert {"hqq-2", "kvarn-k4v4-128", "fp8"} <= set(names)
    assert not {"spectral-3", "kivi-4", "dense"} & set(names)
    assert not any(
        "of fewer" in note for note in recommend(sizes(), Demand(1 << 40, 512), Measurements(), model="a").notes
    )


def test_prediction_from_a_calibration() -> None:
    config = llama_config(64)
    made = calibration_with_yardstick(config)
    found = quality.expected_quality(parse_format("spectral-3"), ["another"], 512, BUNDLED, made)
    assert (found.basis, found.risk) == ("predicted from its calibration", "medium")
    assert found.kl == found.predicted_kl == predict_kl_at(made, 3) > 0
    rival = quality.expected_quality(parse_format("fp8"), ["another"], 512, BUNDLED, made)
    assert rival.basis == "measured on other models"
    plain = quality.expected_quality(
        parse_format("spectral-3"), ["another"], 512, BUNDLED, Calibration.synthetic(config)
    )
    assert plain.basis == "measured on other models"
    measured = quality.expected_quality(parse_format("spectral-3"), ["wiki11m"], 512, BUNDLED, made)
    assert (measured.basis, measured.predicted_kl) == ("measured on this model", found.kl)


def test_sides_are_as_the_calibration_has_them() -> None:
    """What is recommended is what its bits give: ``with_bits`` keeps the rest of the rate."""
    joint = Calibration.synthetic(sizes().config)
    kept = joint.with_bits(3, value_bits="dense", min_bits=3)
    shared, own = (plan(Demand(10**9, 1000), calibration=each) for each in (joint, kept))
    found, expected = (
        next(each.cache_bytes for each in plan.candidates if each.format == "spectral-3") for plan in (own, shared)
    )
    assert found > 2 * expected
    assert "spectral-2" not in {each.format for each in own.candidates}
    assert "Left out: spectral-2: the calibration gives no coefficient less than 3 bits." in own.notes


def test_figures_of_shared_bits_are_not_those_of_sides_with_their_own() -> None:
    """A calibration with 2-bit values got the KL that was measured at 4 bits on both sides."""
    made = calibration_with_yardstick(sizes().config)
    form = parse_format("spectral-4")
    apart = quality.expected_quality(form, ["wiki11m"], 512, BUNDLED, made.with_bits(value_bits=2))
    assert (apart.basis, apart.kl) == ("predicted from its calibration", apart.predicted_kl)
    assert apart.kl == predict_kl(made.with_bits(4, value_bits=2))
    least = made.with_bits(min_bits=2)  # which leaves no more for those that matter
    found = quality.expected_quality(parse_format("spectral-2"), ["wiki11m"], 512, BUNDLED, least)
    assert (found.basis, found.kl) == ("predicted from its calibration", predict_kl(least.with_bits(2)))
    own = plan(Demand(10**9, 1000), calibration=made.with_bits(key_bits="dense", value_bits=2))
    assert not [each for each in own.candidates if each.format.startswith("spectral")]
    assert "Left out: spectral-4: the calibration gives keys and values bits of their own." in own.notes


def test_calibration_of_another_model_is_refused() -> None:
    with pytest.raises(CalibrationMismatch, match="calibration has num_hidden_layers 2, the model has 6"):
        plan(Demand(10**9, 10), calibration=calibration_with_yardstick(llama_config(64)))


# ------------------------------------------------------------------ the lines that use it


@pytest.mark.parametrize("form", [form for form in list_formats() if form.runs], ids=lambda form: form.name)
@pytest.mark.parametrize("weights", ["bf16", "int8", "int4-g128", "nf4", "gptq"])
@pytest.mark.parametrize("name", ["wiki11m", 'it\'s/a "model"; import os'])
def test_lines_are_python(form: Any, weights: str, name: str) -> None:
    lines = usage.python_lines(form, name, None, batch=2, chunk=64, weights=weights)
    compile(lines, "lines", "exec")
    assert ("quantization_config" in lines) == (weights in ("int8", "int4-g128", "nf4"))
    assert ("past_key_values=cache" in lines) == (form.name != "dense")


@pytest.mark.parametrize("name", ["quanto-4", "hqq-2", "fp8"])
def test_lines_make_the_cache_that_was_measured(name: str) -> None:
    """transformers' own keep up to 128 recent tokens where nothing else is said; figures count at 64 only."""
    assert BUNDLED.fidelity_of(name, "wiki11m", RESIDUAL_LENGTH)
    form = parse_format(name)
    lines = usage.python_lines(form, "wiki11m", None, batch=1, chunk=64)
    assert (f"residual_length={RESIDUAL_LENGTH}" in lines) == (form.bits > 0)
    most, more = (largest_cache(form, sizes().geometry, RESIDUAL_LENGTH - each, 1) for each in (1, 0))
    dense = 2 * sum(side.elements for layer in sizes().geometry.layers for side in (layer.key, layer.value))
    assert more - most < dense, "the token that makes it too many is coded"


def test_commands_quote_their_arguments() -> None:
    first, second = usage.commands(parse_format("spectral-2.5"), "my model; ls", None)
    assert first == "quantcache calibrate 'my model; ls' --text YOUR_TEXT.txt -o calibration/"
    assert second.startswith("quantcache generate 'my model; ls' -c calibration/ --bits 2.5 --dtype bfloat16 --prompt")
    assert usage.commands(parse_format("quanto-4"), "model", None) == []


# ------------------------------------------------------------------ the table of formats


def rows(model: str = "wiki11m") -> list[table.Row]:
    """The table on the bundled model's cache."""
    return table.rows(sizes().geometry, model, BUNDLED)


def test_rows() -> None:
    found = {row.format: row for row in rows()}
    assert list(found) == [form.name for form in list_formats()]
    ours = found["spectral-3"]
    assert ours.bytes_per_token == ours.bits_per_element * 1536 / 8 == 600
    assert ours.fidelity == BUNDLED.fidelity_of("spectral-3", "wiki11m", 64)
    assert found["kivi-4"].obstacle == "no packed implementation"
    assert all(row.fidelity is None and row.speed is None for row in rows("another"))
    assert {row.fidelity.context for row in rows("smollm2-135m") if row.fidelity} == {1024}, "comparable"


def test_formats_that_a_model_does_not_take() -> None:
    known = read_geometry(llama_config(64))
    windowed = Geometry((replace(known.layers[0], blocks=False, window=8), known.layers[1]), 0, "traced")
    found = {row.format: row for row in table.rows(windowed, "another", BUNDLED)}
    assert found["quanto-4"].bits_per_element is None
    assert found["quanto-4"].obstacle == "transformers' quantized cache supports only full-attention models"
    assert found["spectral-3"].bytes_per_token == 3.125 * 2 * 2 * 64 / 8


def test_sort() -> None:
    for column, (read, more) in table.COLUMNS.items():
        values = [read(row) for row in table.sort(rows(), column)]
        known = [value for value in values if value is not None]
        assert known == sorted(known, reverse=more)
        assert values[len(known) :] == [None] * (len(values) - len(known))
    assert [row.format for row in table.sort(rows(), "format")] == sorted(row.format for row in rows())
    with pytest.raises(QuantCacheError, match="unknown column 'price': known are format, bits, bytes, kl"):
        table.sort(rows(), "price")


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        (["bits<=2.25"], lambda row: row.bits_per_element <= 2.25),
        (["spectral-*", "kl<0.001"], lambda row: row.format.startswith("spectral-") and row.fidelity.kl_mean < 0.001),
        (["fp8, bf16"], lambda row: row.format in ("fp8", "dense")),
        (["bits=8"], lambda row: row.bits_per_element == 8),
        (["speed > 1"], lambda row: row.speed is not None and row.speed.speedup > 1),
        (["agreement>=0.99"], lambda row: row.fidelity is not None and row.fidelity.top1_agreement >= 0.99),
    ],
)
def test_filters(filters: list[str], kept: Callable[[table.Row], bool]) -> None:
    found = table.select(rows(), filters)
    assert 0 < len(found) < len(rows())
    assert found == [row for row in rows() if kept(row)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("price<3", "unknown column 'price': known are bits, bytes, kl, agreement, speed"),
        ("bits<cheap", "filter 'bits<cheap': 'cheap' is not a number"),
        ("bits<nan", "filter 'bits<nan': 'nan' is not a number"),
        ("<3", "a filter is a comparison such as bits<=4.5, or a pattern of names, got '<3'"),
        ("zip-*", "filter 'zip-*' matches no format: known are dense"),
        ("", "filter '' matches no format"),
    ],
)
def test_bad_filters(text: str, message: str) -> None:
    with pytest.raises(QuantCacheError) as caught:
        table.select(rows(), [text])
    assert message in str(caught.value)


def test_comparison() -> None:
    found = table.select(rows(), ["dense,spectral-*"])
    compared = table.compare(found)
    by_name = {row.format: row for row in found}
    for first, row in by_name.items():
        for second, other in by_name.items():
            assert compared["size"][first][second] == row.bits_per_element / other.bits_per_element
            assert compared["kl"][first][second] == row.fidelity.kl_mean - other.fidelity.kl_mean
    assert compared["speed"]["spectral-2"]["dense"] is None
    assert compared["speed"]["spectral-3"]["dense"] == by_name["spectral-3"].speed.speedup


# ------------------------------------------------------------------ amounts


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24GB", 24 * 10**9),
        ("24 GiB", 24 * 2**30),
        ("1.5gb", 1_500_000_000),
        ("0.5TiB", 2**39),
        ("80_000 MB", 80 * 10**9),
        ("1,024B", 1024),
    ],
)
def test_bytes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text", ["24", "24G", "-1GB", "0GB", "GB", "1e9B", "24 GB RAM", "", "nanGB", "²GB", "2,5GB", "1,0000MB", "24_GB"]
)
def test_bad_bytes(text: str) -> None:
    with pytest.raises(QuantCacheError, match="--memory must be"):
        parse_bytes(text, "--memory")


@pytest.mark.parametrize(
    ("text", "count"),
    [("8192", 8192), ("8K", 8192), ("128k", 131_072), ("1M", 2**20), ("1.5K", 1536), ("32,768", 32_768)],
)
def test_tokens(text: str, count: int) -> None:
    assert parse_tokens(text) == count


@pytest.mark.parametrize(
    "text", ["0", "-1", "1.5", "8KB", "", "K", "many", "0.0001K", "2,5K", "1,28,000", "16,", "048"]
)
def test_bad_tokens(text: str) -> None:
    with pytest.raises(QuantCacheError, match="--context must be"):
        parse_tokens(text, "--context")


@pytest.mark.parametrize(
    ("count", "like", "shown"),
    [
        (999, "GB", "999 B"),
        (24 * 10**9, "GB", "24.00 GB"),
        (24 * 2**30, "gib", "24.00 GiB"),
        (1536, "KiB", "1.50 KiB"),
        (5 * 10**13, "GB", "50.00 TB"),
    ],
)
def test_show_bytes(count: int, like: str, shown: str) -> None:
    assert show_bytes(count, like) == shown


def test_show_bits() -> None:
    assert [show_bits(bits) for bits in (0.0, 0.5, 1, 1.0, 2.5, 3)] == [
        "0 bits", "0.5 bits", "1 bit", "1 bit", "2.5 bits", "3 bits",
    ]  # fmt: skip
