"""The ablations: their statistics, codecs and budgets against the library's own, and the findings against theory."""

from __future__ import annotations

from pathlib import Path

import ablation_variants
import ablations
import findings
import pytest
import torch
from ablation_codecs import AnchorCodec, GainCodec, _lloyd, fitted_books, side_codecs, trellis_levels, with_books
from ablation_statistics import ANCHORS, DEFAULT_FRAME, AblationStatistics, Choice, Needs, gather
from builders import llama_config
from families import FAMILIES
from records import Run
from rich.progress import Progress
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

import quantcache
from quantcache import Calibration, calibrate
from quantcache.coding.codebook import lloyd_max
from quantcache.coding.codec import SpectralCodec
from quantcache.coding.gains import dequantize_gain, quantize_gain
from quantcache.coding.rope import ANCHOR_LENGTH
from quantcache.coding.schema import CodecSettings, Coding, Metadata
from quantcache.coding.spectral import METRIC_SHRINKAGE
from quantcache.coding.statistics import READ_SHARE

CONFIG = llama_config(head_dim=32, layers=3, kv_heads=2)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A small Llama with random weights."""
    quantcache.register_attention()
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    model.set_attn_implementation("spectral")
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    """Random tokens, ``[600]``."""
    return torch.randint(0, 32, (600,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def calibration(model: PreTrainedModel, tokens: Tensor) -> Calibration:
    """A calibration on the first 300 tokens, with scalar codes."""
    return calibrate(model, [tokens[:300]], max_tokens=300, codec=CodecSettings(coding="scalar"), progress=False)


def test_default_transforms_are_those_of_calibrate(
    model: PreTrainedModel, tokens: Tensor, calibration: Calibration
) -> None:
    statistics = AblationStatistics(model)
    statistics.add(tokens[:300])
    for index, layer in statistics.solve(Choice()).items():
        for side in ("key", "value"):
            found, expected = layer.side(side), calibration.layers[index].side(side)
            torch.testing.assert_close(found.mean, expected.mean)
            torch.testing.assert_close(found.spectrum, expected.spectrum, rtol=1e-6, atol=0)
            torch.testing.assert_close(found.analysis, expected.analysis, rtol=1e-4, atol=1e-4)


def test_labels_do_not_depend_on_what_else_is_gathered(model: PreTrainedModel, tokens: Tensor) -> None:
    few, all_of_it = AblationStatistics(model, Needs((DEFAULT_FRAME,), False, False)), AblationStatistics(model)
    for statistics in (few, all_of_it):
        for sequence in tokens[:200].split(100):
            statistics.add(sequence)
    assert len(few.sums) < len(all_of_it.sums)
    for name, sums in few.sums.items():
        assert sums.count == all_of_it.sums[name].count
        assert torch.equal(sums.outer, all_of_it.sums[name].outer), name


def test_needs_are_those_of_the_choices() -> None:
    assert Needs.of([Choice(), Choice(key_metric="identity")]) == Needs((DEFAULT_FRAME,), False, False)
    found = Needs.of([Choice(frame="full"), Choice(key_metric="query"), Choice(value_metric="output")])
    assert found == Needs((DEFAULT_FRAME, "full"), True, False)
    assert Needs.of([Choice(value_metric="gram")]).outputs


def test_layers_that_are_not_compressed_are_left_alone(tokens: Tensor) -> None:
    sliding = next(family for family in FAMILIES if family.name == "gemma3").make()
    sequence = tokens[:120] % sliding.config.vocab_size
    statistics = AblationStatistics(sliding, Needs((DEFAULT_FRAME,), True, True))
    statistics.add(sequence)
    solved = statistics.solve(Choice())
    expected = calibrate(sliding, [sequence], max_tokens=120, progress=False)
    assert list(solved) == list(expected.layers) == [1]
    for side in ("key", "value"):
        torch.testing.assert_close(
            solved[1].side(side).spectrum, expected.layers[1].side(side).spectrum, rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("metric", ["query", "identity"])
def test_other_metrics_are_those_of_calibrate(model: PreTrainedModel, tokens: Tensor, metric: str) -> None:
    statistics = AblationStatistics(model)
    statistics.add(tokens[:300])
    choice = Choice(key_metric=metric, value_metric="output" if metric == "query" else metric)
    found = statistics.solve(choice)
    expected = calibrate(model, [tokens[:300]], metric=metric, max_tokens=300, progress=False)
    for index, layer in found.items():
        value = expected.layers[index].value
        torch.testing.assert_close(layer.value.spectrum, value.spectrum, rtol=1e-6, atol=0)
        # Queries are put at random keys, drawn apart here: spectra agree as two samples of one thing do.
        ratio = layer.key.spectrum.sum() / expected.layers[index].key.spectrum.sum()
        assert float(ratio) == pytest.approx(1, abs=1e-6 if metric == "identity" else 0.1)


def test_shrinkage_keeps_the_unit(model: PreTrainedModel, tokens: Tensor) -> None:
    statistics = AblationStatistics(model)
    statistics.add(tokens[:300])
    for shrinkage in (0.0, 1.0):
        for index, layer in statistics.solve(Choice(value_shrinkage=shrinkage)).items():
            # AᵀA is the metric: its trace stays that of the default whatever is mixed in.
            coded, read = (statistics.sums[f"{index}.value.{kind}"].second_moment for kind in ("coded", "read"))
            metric = coded + READ_SHARE * read
            wanted = metric.diagonal(dim1=-2, dim2=-1).sum(-1) * (1 + METRIC_SHRINKAGE)
            found = layer.value.analysis.double().square().sum((-1, -2))
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


def test_gram_basis_is_orthogonal_and_keeps_the_variance(model: PreTrainedModel, tokens: Tensor) -> None:
    statistics = AblationStatistics(model)
    statistics.add(tokens[:300])
    for index, layer in statistics.solve(Choice(value_metric="gram")).items():
        analysis = layer.value.analysis.double()
        eye = torch.eye(32, dtype=torch.float64).expand_as(analysis)
        torch.testing.assert_close(analysis @ analysis.transpose(-1, -2), eye, rtol=0, atol=1e-5)
        total = statistics.sums[f"{index}.value.vectors"].covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
        torch.testing.assert_close(layer.value.spectrum.sum(-1), total, rtol=1e-3, atol=0)


def test_interrupted_statistics_go_on(
    model: PreTrainedModel, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("records.SCRATCH", tmp_path)

    def run(name: str, checkpoints: list[int]) -> tuple[dict[int, Path], list[int]]:
        steps: list[int] = []
        folder = Run("suite", {"name": name}).folder
        return gather(model, tokens, checkpoints, folder, steps.append, length=200), steps

    whole, steps = run("whole", [100, 200, 600])
    assert steps == [200, 200, 200]
    run("parts", [200])
    parts, steps = run("parts", [200, 600])
    assert steps == [200, 200, 200]  # the first is what was loaded
    first, second = AblationStatistics(model), AblationStatistics(model)
    first.load(whole[600])
    second.load(parts[600])
    assert first.tokens == second.tokens == 600
    for name, sums in first.sums.items():
        assert sums.count == second.sums[name].count
        assert torch.equal(sums.outer, second.sums[name].outer)
    first.load(whole[100])
    assert first.tokens == 100


def test_every_sequence_begins_as_the_text_does(model: PreTrainedModel, tokens: Tensor, tmp_path: Path) -> None:
    bos = model.config.bos_token_id
    steps: list[int] = []
    text = ablations.begun(model, tokens, True)
    assert text.tolist() == [bos, *tokens.tolist()]
    assert torch.equal(ablations.begun(model, text, False), tokens)
    for given in (None, True):
        assert ablations.begun(model, text, given) is text
    needs = Needs((DEFAULT_FRAME,), False, False)
    paths = gather(model, text, [200], tmp_path, steps.append, length=100, needs=needs)
    assert steps == [100, 100]
    found, expected = AblationStatistics(model, needs), AblationStatistics(model, needs)
    found.load(paths[200])
    for first in (0, 99):
        expected.add(torch.cat((text[:1], tokens[first : first + 99])))
    for name, sums in expected.sums.items():
        assert torch.equal(sums.outer, found.sums[name].outer), name
    other = gather(model, tokens, [200], tmp_path, steps.append, length=100, needs=needs)
    assert other[200] != paths[200]
    with pytest.raises(ValueError, match="200 calibration tokens are asked for, the text has 199"):
        gather(model, tokens[1:200], [200], tmp_path, steps.append, length=100, needs=needs)


# ---------------------------------------------------------------------- codecs and budgets


def block(seed: int = 2) -> tuple[Tensor, Tensor]:
    """One block of vectors ``[1, 2, 64, 32]`` and its place."""
    x = torch.randn(1, 2, 64, 32, generator=torch.Generator().manual_seed(seed))
    return x, torch.tensor([[4, 64, 4]], dtype=torch.int32)


def weighted_error(calibration: Calibration, gain: str, bits: int) -> float:
    """Squared error of one block of keys in units of the metric."""
    codec = side_codecs(calibration)[0, "key"]
    x, place = block()
    decoded = GainCodec(codec, gain, bits).encode(x, place, None)["simulated"][0]  # type: ignore[arg-type]
    difference = codec.coefficients(x, place, None) - codec.coefficients(decoded, place, None)
    return float((difference.square() * codec.weights[..., None]).sum())


@pytest.mark.parametrize(("coding", "passes"), [("scalar", 1), ("trellis", 1), ("trellis", 2)])
def test_searched_gain_of_eight_bits_is_ours(calibration: Calibration, coding: Coding, passes: int) -> None:
    given = {"passes": passes} if passes > 1 else {}
    for (_, side), codec in side_codecs(calibration.with_coding(coding, **given)).items():
        x, place = block()
        gain = GainCodec(codec, "searched", 8)
        assert gain.bits == codec.bits
        found = gain.decode(gain.encode(x, place, None), place, None)
        expected = codec.decode(codec.encode(x, place, None), place, None)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=side)


@pytest.mark.parametrize("rate", [1.0, 3.0])
def test_levels_of_a_trellis_are_those_of_the_codec(calibration: Calibration, rate: float) -> None:
    codec = side_codecs(calibration.with_coding("trellis").with_bits(rate))[0, "key"]
    generator = torch.Generator().manual_seed(5)
    u = torch.randn(2, 2, 32, 64, generator=generator)
    weights = torch.rand(2, 2, 1, 64, generator=generator)
    _, expected = codec._pack_trellis(u, weights)
    assert torch.equal(trellis_levels(codec, u, weights), expected)


def test_fitted_codebooks_are_of_scalar_codes(calibration: Calibration) -> None:
    codec = side_codecs(calibration.with_coding("trellis"))[0, "key"]
    with pytest.raises(ValueError, match=r"scalar codes, the codec's are trellis"):
        with_books(codec, {})


@pytest.mark.parametrize("coding", ["scalar", "trellis"])
def test_better_gains_err_less(calibration: Calibration, coding: Coding) -> None:
    calibration = calibration.with_coding(coding)
    # Scalar codes are fitted to the searched gain; a path through a trellis is sought with it, and may err either way.
    gains = ("none", "plain", "corrected", *(["searched"] if coding == "scalar" else []))
    errors = [weighted_error(calibration, gain, 16) for gain in gains]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]
    by_bits = [weighted_error(calibration, "searched", bits) for bits in (4, 6, 8, 16)]
    assert by_bits == sorted(by_bits, reverse=True)


@pytest.mark.parametrize(("gain", "bits", "extra"), [("none", 8, -0.25), ("plain", 4, -0.125), ("plain", 16, 0.25)])
def test_gain_sizes(calibration: Calibration, gain: str, bits: int, extra: float) -> None:
    codec = side_codecs(calibration)[1, "value"]
    assert GainCodec(codec, gain, bits).bits == pytest.approx(codec.bits + extra)  # type: ignore[arg-type]


def test_gain_steps(calibration: Calibration) -> None:
    codec = side_codecs(calibration)[0, "key"]
    gains = torch.linspace(0.8, 1.25, 200)
    errors = []
    for steps in (4, 8, 32):
        gain = GainCodec(codec, "searched", 8, steps)
        assert gain.bits == codec.bits
        ratio = gain._stored(gains) / gains
        errors.append(float(torch.log2(ratio).abs().max()))
        assert errors[-1] <= 0.5 / steps + 1e-6  # half a step
    assert errors == sorted(errors, reverse=True)
    stored = GainCodec(codec, "searched", 8)._stored(gains)
    assert torch.equal(stored, dequantize_gain(quantize_gain(gains)))


def test_anchors_of_the_default_length_change_nothing(calibration: Calibration) -> None:
    x, place = block()
    for (_, side), codec in side_codecs(calibration).items():
        expected = codec.decode(codec.encode(x, place, None), place, None)
        anchored = AnchorCodec(codec, ANCHOR_LENGTH)
        found = anchored.decode(anchored.encode(x, place, None), place, None)
        assert torch.equal(found, expected), side
        assert anchored.bits == codec.bits
        assert not isinstance(anchored, SpectralCodec)  # attention on codes would take anchors from the blocks


def test_every_stretch_has_its_anchor(calibration: Calibration) -> None:
    x, place = block()
    ours, short = side_codecs(calibration)[0, "key"], AnchorCodec(side_codecs(calibration)[0, "key"], 32)
    for first in (0, 32):
        own = place + torch.tensor([[0, 0, first]], dtype=torch.int32)  # the anchor where the stretch starts
        expected = ours.decode(ours.encode(x, own, None), own, None)[:, :, first : first + 32]
        found = short.encode(x, place, None)["simulated"][0][:, :, first : first + 32]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_frames_by_anchor_are_those_of_the_rotary_angle(model: PreTrainedModel) -> None:
    """A slow pair turns by its anchor: keys that only a slow pair's rotation tells apart stay apart within one."""
    statistics = AblationStatistics(model)
    slots = torch.arange(4, 260)
    for length, name in ANCHORS.items():
        frame = statistics.frames[name, 0]
        framed = frame.enter(torch.ones(1, 256, 32), slots)[0]
        stretches = framed[:, : frame.slow_pairs].split(length)
        slow = [float((s - s[:1]).abs().max()) for s in stretches]
        assert max(slow) == 0
        assert len({float(s[0, 0]) for s in stretches}) == len(stretches)


@pytest.mark.parametrize(("rate", "coding"), [(2.0, "scalar"), (3.0, "scalar"), (2.0, "trellis")])
def test_smallest_width_of_the_keys_alone(calibration: Calibration, rate: float, coding: Coding) -> None:
    calibration = calibration.with_coding(coding)
    free = ablation_variants.allocate(ablation_variants.Variant(), calibration, rate)
    least = ablation_variants.allocate(ablation_variants.Variant(key_min_bits=1), calibration, rate)
    both = ablation_variants.allocate(ablation_variants.Variant(min_bits=1), calibration, rate)
    assert min(int(layer.key.widths.min()) for layer in free.layers.values()) == 0
    assert min(int(layer.key.widths.min()) for layer in least.layers.values()) == 1
    assert min(int(layer.value.widths.min()) for layer in least.layers.values()) == 0
    group = 8 / 32 / 4
    assert rate - 2 * group <= least.bits <= rate
    # More freedom costs less; the search comes as near as its steps of 1/32 bit let it.
    costs = [ablation_variants.distortion(found.layers, coding) for found in (free, least, both)]
    assert costs == sorted(costs)
    found = ablation_variants.with_key_minimum(calibration, rate, 0)
    assert ablation_variants.distortion(found.layers, coding) <= 1.02 * costs[0]


def test_fitted_codebooks() -> None:
    samples = torch.randn(200_000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    book = lloyd_max(2)
    found = _lloyd(samples, 2)
    # 200,000 samples fix a cell's mean to a few thousandths.
    torch.testing.assert_close(found.double(), torch.tensor(book.levels, dtype=torch.float64), rtol=0, atol=0.01)
    sparse = torch.sign(samples) * samples.abs() ** 2  # heavy tails

    def error(levels: Tensor) -> float:
        rounded = levels[torch.bucketize(sparse, (levels[1:] + levels[:-1]) / 2)]
        return float((sparse - rounded).square().mean())

    assert error(_lloyd(sparse, 2).double()) < error(torch.tensor(book.levels, dtype=torch.float64))


def test_fitted_codebooks_reach_the_codec(model: PreTrainedModel, tokens: Tensor, calibration: Calibration) -> None:
    books = fitted_books(model, calibration, tokens[:300])
    codec = with_books(side_codecs(calibration)[0, "key"], books)
    for c in codec.classes:
        assert torch.equal(c.levels, books[c.width])
        torch.testing.assert_close(c.levels, -c.levels.flip(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rate", [2.0, 3.0])
def test_layer_floor(calibration: Calibration, rate: float) -> None:
    spread = [3.0, 1.0, 0.01]  # layers that matter differently
    layers = {
        index: ablation_variants.replace(
            layer,
            key=ablation_variants.replace(layer.key, spectrum=layer.key.spectrum * spread[index]),
            value=ablation_variants.replace(layer.value, spectrum=layer.value.spectrum * spread[index]),
        )
        for index, layer in calibration.layers.items()
    }
    bare = Calibration(layers, Metadata(codec=CodecSettings(coding="scalar")))
    free = ablation_variants.allocate(ablation_variants.Variant(), bare, rate)
    floored = ablation_variants.allocate(ablation_variants.Variant(floor=0.25), bare, rate)
    group = 8 / 32 / 4  # one group of one head, on the mean over a layer
    assert min(map(ablation_variants.mean_width, free.layers.values())) < rate - 0.25 - group
    assert min(map(ablation_variants.mean_width, floored.layers.values())) >= rate - 0.25 - group
    assert rate - 2 * group <= floored.bits <= rate


def test_every_variant_names_a_default_row() -> None:
    default = {
        "metric",
        "key-shrinkage",
        "value-shrinkage",
        "frame",
        "anchor-length",
        "group-size",
        "profile",
        "gain",
        "min-width",
    }
    default |= {"layer-floor", "split", "sinks", "coding", "passes", "calibration-tokens", "bos"}
    default |= {"readers", "calibration-residual", "seq-len"}
    rows = ablations.ablations()
    assert {name for name, variants in rows.items() if ablation_variants.Variant() in variants.values()} == default
    assert all(len(set(map(repr, variants.values()))) == len(variants) for variants in rows.values())
    assert ablation_variants.Variant().codec == CodecSettings()
    for row, variant in ((row, v) for variants in rows.values() for row, v in variants.items()):
        assert (variant.codec.coding == "scalar") == ("scalar" in row)
        assert variant.codec.coding == "scalar" or not variant.books
    begins = ablations.ablations(8192, begins=True)
    assert begins["calibration-tokens"]["8,192"] == begins["bos"]["with"] == ablation_variants.Variant()
    assert begins["bos"]["without"].reading_bos is False


# ---------------------------------------------------------------------- measuring


@pytest.fixture
def bench(model: PreTrainedModel, tokens: Tensor) -> ablations.Bench:
    """A bench on two windows of 160 tokens."""
    calibration = {"tokens": 200, "seq_len": 200, "residual": 64}
    settings = {"rates": [2.0], "context": 160, "windows": 2, "residual": 0, "calibration": calibration}
    return ablations.Bench(model, settings, tokens[:200], tokens[200:521])


def test_variants_are_compared_in_pairs_of_stretches(bench: ablations.Bench, tmp_path: Path) -> None:
    rows = {
        "default": ablation_variants.Variant(),
        "scalar": ablation_variants.Variant(codec=CodecSettings(coding="scalar")),
        "none": ablation_variants.Variant(gain=("none", 0)),
        "sinks": ablation_variants.Variant(sinks=8),
        "bos": ablation_variants.Variant(reading_bos=True),
        "short": ablation_variants.Variant(gathering=ablation_variants.Gathering(seq_len=100)),
        "residual": ablation_variants.Variant(gathering=ablation_variants.Gathering(residual_length=0)),
    }
    bench.gather(list(rows.values()), tmp_path, Progress(disable=True))
    groups = ablations.groups(list(rows.values()), 8)
    assert [len(group) for group in groups] == [5, 1, 1]
    assert [len(group) for group in ablations.groups(list(rows.values()), 2)] == [2, 2, 1, 1, 1]
    measured = {v: r for group in groups for v, r in zip(group, bench.measure(group), strict=True)}
    for found in measured.values():
        entry = found["2"]
        assert entry["status"] == "ok"
        assert entry["tokens"] == 320
        assert len(entry["kl_stretches"]) == 4  # two of 80 tokens in each window
        assert sum(entry["kl_stretches"]) / 4 == pytest.approx(entry["kl_mean"], rel=1e-4)
        assert entry["dense_perplexity"] > 1
    assert len({measured[rows[name]]["2"]["kl_mean"] for name in ("default", "short", "residual")}) == 3
    alone = bench.measure([ablation_variants.Variant()])[0]["2"]
    assert alone["kl_windows"] == measured[ablation_variants.Variant()]["2"]["kl_windows"]
    found = ablations.compared(rows, measured)
    assert "over" not in found["default"]["2"]
    over = found["scalar"]["2"]["over"]
    ratio = found["scalar"]["2"]["kl_mean"] / found["default"]["2"]["kl_mean"]
    assert over["to"] == "default"
    assert over["ratio"] == pytest.approx(ratio, rel=1e-3)
    assert over["ratio"] > 1  # a trellis loses less at the same bits
    assert over["n"] == 4
    assert over["stderr"] > 0
    # Without the default among the rows, the first is what the others are held against.
    found = ablations.compared({"none": rows["none"], "scalar": rows["scalar"]}, measured)
    assert found["scalar"]["2"]["over"]["to"] == "none"


def test_chosen_ablations(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    given = "--only sinks calibration-tokens --max-tokens 2048 --rates 3"
    monkeypatch.setattr("sys.argv", ["ablations.py", *given.split()])
    options = ablations.parse_arguments()
    chosen = ablations.choose(options, model, begins=False)
    assert list(chosen) == ["sinks", "calibration-tokens"]
    assert options.rates == [3.0]
    assert list(chosen["calibration-tokens"]) == ["1,024", "2,048", "4,096", "8,192", "16,384", "32,768"]
    options.calibration_tokens = 1024
    assert list(ablations.choose(options, model, begins=False)["calibration-tokens"]) == ["1,024", "2,048"]
    options.only = ["sinks", "luck"]
    with pytest.raises(SystemExit, match="unknown ablation luck: known are metric"):
        ablations.choose(options, model, begins=False)
    options.only = ["bos"]
    monkeypatch.setattr(model.config, "bos_token_id", None)
    with pytest.raises(SystemExit, match="has no BOS token"):
        ablations.choose(options, model, begins=False)


# ---------------------------------------------------------------------- findings


def test_damage_ratio_is_the_published_one_where_its_assumptions_hold(
    model: PreTrainedModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Gaussian keys of equal variance and queries so small that attention is even: Var(c) = σ², Var(e) = Δ²/12.
    generator = torch.Generator().manual_seed(4)
    keys = torch.randn(1, 1024, 16, generator=generator, dtype=torch.float64)
    queries = 1e-3 * torch.randn(1, 2, 1024, 16, generator=generator, dtype=torch.float64)
    monkeypatch.setattr(findings, "attention", lambda *_: iter([(0, queries, keys)]))
    found = findings.damage_ratios(model, tokens)
    for bits in ("2", "3", "4"):
        assert found[bits]["2 sigma"]["median"] == pytest.approx(1, abs=0.05)
        assert found[bits]["range"]["median"] < 0.5  # a range of some 6 σ instead of 2


def test_attention_of_findings_is_the_models(model: PreTrainedModel, tokens: Tensor) -> None:
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            weights = model(tokens[None, :80], output_attentions=True).attentions
    finally:
        model.set_attn_implementation("spectral")
    for index, queries, keys in findings.attention(model, tokens[:80]):
        for head in range(2):
            found = findings._scores(queries[head], keys[head]).softmax(-1)
            torch.testing.assert_close(found, weights[index][0, 2 * head : 2 * head + 2].double(), rtol=1e-4, atol=1e-6)
