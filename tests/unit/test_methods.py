"""The rivals: each re-implementation against an independent figure or formula, and the registry that names them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from builders import llama_config
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel

import quantcache
from quantcache import Calibration
from quantcache.accounting.measuring import measure
from quantcache.coding.schema import Rate
from quantcache.coding.spectral import Moments
from quantcache.common import compat
from quantcache.common.errors import QuantCacheError
from quantcache.evaluation import fidelity
from quantcache.evaluation.methods import (
    METHOD_NAMES,
    SCHEMES,
    Method,
    MethodUnavailable,
    RivalStatistics,
    Scheme,
    all_methods,
    collect_statistics,
    needs_statistics,
    parse_methods,
    reading_codes,
    register,
)
from quantcache.evaluation.methods.base import SimulatedCodec, hadamard, simulated_cache, uniform
from quantcache.evaluation.methods.calibrated import PcaCodec, RankCodec, oscar_codec
from quantcache.evaluation.methods.installed import Fp8Codec
from quantcache.evaluation.methods.integer import KiviCodec, QuarotCodec, TokenInt8Codec
from quantcache.evaluation.methods.registry import find_scheme
from quantcache.evaluation.methods.turboquant import TurboQuantCodec, TurboQuantQJLCodec
from quantcache.planning import formats
from quantcache.planning.geometry import read_geometry
from quantcache.planning.memory import cache_memory

DIM = 64
CONFIG = llama_config(head_dim=DIM, layers=2, kv_heads=2)
HALF = 2.0**-11
"""Largest relative error of rounding to float16."""


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A small Llama with random weights."""
    quantcache.register_attention()
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    model.set_attn_implementation("spectral")
    return model


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    """Random tokens, ``[512]``."""
    return torch.randint(0, 32, (512,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def statistics(model: PreTrainedModel, tokens: Tensor) -> RivalStatistics:
    """Moments on tokens of their own."""
    return collect_statistics(model, tokens.flip(0), sequence_length=256)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    """Unit Gaussians in float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments_of(x: Tensor) -> Moments:
    """Moments of vectors ``[H, N, D]``."""
    moments = Moments(x.shape[0], x.shape[2])
    moments.add(x)
    return moments


# ---------------------------------------------------------------------- TurboQuant


@pytest.mark.parametrize(("bits", "published"), [(1, 0.3634), (2, 0.1175), (3, 0.0345), (4, 0.0095)])
def test_turboquant_has_the_published_distortion(bits: int, published: float) -> None:
    x = gaussian(1, 1, 512, 1024)
    squared = (TurboQuantCodec(1024, bits, seed=3).reconstruct(x) - x).square().mean(-1) / x.square().mean(-1)
    stderr = float(squared.std()) / math.sqrt(squared.numel())
    # The rounding of the published figure, and coordinates on a sphere of D dimensions, whose moments are off by 1/D.
    assert abs(float(squared.mean()) - published) < 4 * stderr + 5e-5 + 2 * published / 1024


@pytest.mark.parametrize("bits", [1, 3])
def test_qjl_inner_products_are_unbiased_where_mse_codes_shrink_them(bits: int) -> None:
    x, query = gaussian(1, 1, 1, DIM, seed=4), gaussian(DIM, seed=5)
    query = query + x.flatten()  # so that the inner product is far from zero
    exact = float(x.flatten() @ query)

    def deviation(make: Callable[[int], SimulatedCodec]) -> tuple[float, float]:
        found = torch.tensor([float(make(seed).reconstruct(x).flatten() @ query) for seed in range(400)])
        return float(found.mean()) - exact, float(found.std()) / 20

    bias, stderr = deviation(lambda seed: TurboQuantQJLCodec(DIM, bits, seed))
    assert abs(bias) < 4 * stderr
    bias, stderr = deviation(lambda seed: TurboQuantCodec(DIM, bits, seed))
    assert bias < -4 * stderr
    # Lloyd-Max levels are cell means: codes keep 1 - D of the inner product.
    distortion = {1: 0.3634, 3: 0.0345}[bits]
    assert abs(bias + distortion * exact) < 4 * stderr + 2 * distortion * exact / DIM


def test_qjl_sketch_has_its_known_variance() -> None:
    # Of one bit nothing but the sketch is left: the squared error is (π/2 - 1 + O(1/D)) ‖x‖², of a fresh sketch each.
    x = gaussian(1, 1, 1, DIM, seed=6)
    errors = [
        (TurboQuantQJLCodec(DIM, 1, seed).reconstruct(x) - x).square().sum() / x.square().sum() for seed in range(200)
    ]
    found = torch.stack(errors)
    assert abs(float(found.mean()) - math.pi / 2) < 4 * float(found.std()) / math.sqrt(200) + 2 / DIM


# ---------------------------------------------------------------------- integer codes


def by_hand(group: list[float], bits: int) -> list[float]:
    """Min-max quantization of one group, number by number, with float16 scale and zero point."""
    low, high = min(group), max(group)
    scale = float(torch.tensor((high - low) / (2**bits - 1)).half())
    zero = float(torch.tensor(low).half())
    return [min(max(round((v - zero) / scale), 0), 2**bits - 1) * scale + zero for v in group]


@pytest.mark.parametrize("side", ["key", "value"])
def test_kivi_is_its_formula(side: str) -> None:
    x = gaussian(1, 2, 64, 64, seed=7) * 3 + 1
    found = KiviCodec(side, 64, bits=2).reconstruct(x)
    expected = torch.empty_like(x)
    for head in range(2):
        for one in range(64):
            for first in (0, 32):
                index = (
                    (0, head, slice(first, first + 32), one)
                    if side == "key"
                    else (0, head, one, slice(first, first + 32))
                )
                expected[index] = torch.tensor(by_hand(x[index].tolist(), 2))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_kivi_groups_fit_odd_dimensions() -> None:
    assert KiviCodec("value", 80, 2).bits == 2 + 32 / 16
    assert KiviCodec("key", 80, 2).bits == 2 + 32 / 32
    assert KiviCodec("value", 80, 2).reconstruct(gaussian(1, 1, 64, 80)).shape == (1, 1, 64, 80)


def test_int8_error_is_within_half_a_step() -> None:
    x = gaussian(2, 2, 64, DIM, seed=8) * torch.logspace(-2, 2, 64)[:, None]
    error = (TokenInt8Codec(DIM).reconstruct(x) - x).abs()
    peak = x.abs().amax(-1, keepdim=True)
    assert bool((error <= peak / 254 + 2 * HALF * peak).all())


def test_uniform_codes_of_constant_rows_are_exact() -> None:
    row = torch.full((1, 32), 0.5)
    assert torch.equal(uniform(row, 2), row)


@pytest.mark.parametrize("dim", [64, 80, 96])
def test_hadamard(dim: int) -> None:
    matrix = hadamard(dim)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim), rtol=0, atol=1e-6)
    entries = matrix[matrix != 0].abs()
    torch.testing.assert_close(entries, torch.full_like(entries, (dim & -dim) ** -0.5))


def test_hadamard_spreads_an_outlier() -> None:
    x = torch.zeros(1, 1, 64, DIM)
    x[..., 5] = 100.0
    x += gaussian(1, 1, 64, DIM, seed=9)

    def error(rotation: Tensor) -> float:
        return float((QuarotCodec(rotation, 4, clip=1.0).reconstruct(x) - x).square().mean())

    # Min-max steps follow the range, which the rotation divides by √D.
    assert error(hadamard(DIM)) < error(torch.eye(DIM)) / 4


@pytest.mark.parametrize("bits", [2, 4])
def test_per_token_codes_are_those_of_quanto(bits: int) -> None:
    quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    x = gaussian(1, 2, 64, DIM, seed=10)
    qtype = quanto.qint2 if bits == 2 else quanto.qint4
    scale, shift = quanto.MaxOptimizer()(x, qtype, 0, DIM)
    theirs = quanto.quantize_weight(x, qtype, 0, scale, shift, DIM).dequantize()
    ours = QuarotCodec(torch.eye(DIM), bits, clip=1.0).reconstruct(x)
    step = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / (2**bits - 1)
    # Ours keeps scale and zero point in float16: a code may fall on the other side of a boundary, rarely.
    close = (ours - theirs).abs() <= 2 * HALF * x.abs().amax(-1, keepdim=True)
    assert float(close.float().mean()) > 0.99
    assert bool(((ours - theirs).abs() <= 1.01 * step).all())


def test_per_token_codes_are_those_of_hqq_without_its_optimizer() -> None:
    hqq = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")
    x = gaussian(1, 2, 64, DIM, seed=11)
    codes, meta = hqq.Quantizer.quantize(
        x, nbits=4, group_size=DIM, optimize=False, axis=1, device="cpu", compute_dtype=torch.float32
    )
    theirs = hqq.Quantizer.dequantize(codes, meta)
    ours = QuarotCodec(torch.eye(DIM), 4, clip=1.0).reconstruct(x)
    step = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / 15
    close = (ours - theirs).abs() <= 2 * HALF * x.abs().amax(-1, keepdim=True)
    assert float(close.float().mean()) > 0.99
    assert bool(((ours - theirs).abs() <= 1.01 * step).all())


def test_fp8_keeps_three_bits_of_mantissa_and_saturates() -> None:
    x = torch.tensor([1.0, 1.0625, 448.0, 1000.0, -1000.0, 1.13])
    assert Fp8Codec().reconstruct(x).tolist() == [1.0, 1.0, 448.0, 448.0, -448.0, 1.125]


# ---------------------------------------------------------------------- calibrated rivals


def stretched(seed: int) -> Tensor:
    """Vectors ``[1, 2, 8192, 16]`` with correlated coordinates of decaying variance and a mean."""
    rotation = torch.linalg.qr(gaussian(2, 16, 16, seed=seed)).Q
    return (gaussian(1, 2, 8192, 16, seed=seed + 1) * 0.7 ** torch.arange(16)) @ rotation + gaussian(
        2, 1, 16, seed=seed + 2
    )


def test_pca_distortion_is_that_of_its_codebooks() -> None:
    x = stretched(12)
    moments = moments_of(x[0])
    codec = PcaCodec(moments, 3)
    assert codec.bits is not None
    assert 2.9 < codec.bits <= 3
    # Water-filling of the sample's own eigenvalues, worked out here from the distortions alone.
    table = (1.0, 0.36338, 0.11748, 0.034548, 0.009501, 0.0024992, 0.00064, 0.0001629, 0.0000411)
    expected = []
    for head in torch.linalg.eigvalsh(moments.covariance):
        widths = [0] * 16
        for _ in range(48):
            gains = [float(v) * (table[w] - table[w + 1]) if w < 8 else 0.0 for v, w in zip(head, widths, strict=True)]
            widths[gains.index(max(gains))] += 1
        expected.append(sum(float(v) * table[w] for v, w in zip(head, widths, strict=True)))
    squared = (codec.reconstruct(x) - x).double().square().sum(-1)[0]
    stderr = squared.std(-1) / math.sqrt(squared.shape[-1])
    for head in range(2):
        assert abs(float(squared[head].mean()) - expected[head]) < 4 * float(stderr[head]) + 1e-3 * expected[head]


def test_pca_without_bits_is_the_mean() -> None:
    x = stretched(13)
    codec = PcaCodec(moments_of(x[0]), 0)
    torch.testing.assert_close(codec.reconstruct(x), x.mean(2, keepdim=True).expand_as(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("rank", [4, 16])
def test_rank_drops_the_smallest_eigenvalues(rank: int) -> None:
    x = stretched(14)
    moments = moments_of(x[0])
    squared = (RankCodec(moments, rank).reconstruct(x) - x).square().sum(-1).mean(-1)[0]
    values = torch.linalg.eigvalsh(moments.covariance)
    dropped, kept = values[:, : 16 - rank].sum(-1), values[:, 16 - rank :].sum(-1)
    # bfloat16 keeps 8 bits: a coefficient is off by at most 2^-9 of itself.
    assert bool((squared <= dropped * (1 + 1e-4) + kept * 2.0**-18).all())
    assert bool((squared >= dropped * (1 - 1e-4)).all())


def test_oscar_rotation_evens_out_what_attention_looks_at(statistics: RivalStatistics) -> None:
    layer = statistics.layers[0]
    for side, seen in (("key", layer.query), ("value", layer.output)):
        rotation = oscar_codec(layer, side, 2).rotation.double()
        eye = torch.eye(DIM, dtype=torch.float64).expand(2, -1, -1)
        torch.testing.assert_close(rotation.transpose(-1, -2) @ rotation, eye, rtol=0, atol=1e-5)
        # Behind the eigenbasis a Hadamard matrix mixes all directions alike: each carries the mean eigenvalue.
        energy = (rotation.transpose(-1, -2) @ seen.second_moment @ rotation).diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(energy, energy.mean(-1, keepdim=True).expand_as(energy), rtol=1e-4, atol=0)


def test_statistics_are_those_of_keys_and_attention(model: PreTrainedModel, tokens: Tensor) -> None:
    found = collect_statistics(model, tokens[:96], sequence_length=96, text="abc")
    assert found.tokens == 96
    assert len(found.text_sha256) == 2
    cache = DynamicCache(config=CONFIG)
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            weights = model(tokens[None, :96], past_key_values=cache, output_attentions=True).attentions
    finally:
        model.set_attn_implementation("spectral")
    for index, layer in found.layers.items():
        keys, values = cache.layers[index].keys[0], cache.layers[index].values[0]
        for head in range(2):
            expected = torch.cov(keys[head, 4:].T.double(), correction=0)
            torch.testing.assert_close(layer.key.covariance[head], expected, rtol=1e-4, atol=1e-7)
            # VᵀSᵀSV per query, S the rows of both query heads of the group.
            shares = weights[index][0, 2 * head : 2 * head + 2, 4:].flatten(0, 1).double()
            outputs = shares @ values[head].double()
            torch.testing.assert_close(
                layer.output.second_moment[head], outputs.T @ outputs / len(outputs), rtol=1e-4, atol=1e-7
            )
        assert layer.query.count == 2 * 92


def test_statistics_of_too_little_text(model: PreTrainedModel, tokens: Tensor) -> None:
    with pytest.raises(QuantCacheError, match="more than 16 tokens, the text has 16"):
        collect_statistics(model, tokens[:16])


# ---------------------------------------------------------------------- the registry


def parsed(name: str, statistics: RivalStatistics | None = None, **more: object) -> Method:
    """One method on the small config."""
    calibration = Calibration.synthetic(CONFIG)
    return parse_methods([name], CONFIG, calibration, 4, 0, statistics=statistics, **more)[0]  # type: ignore[arg-type]


def test_ours_is_joint_whatever_the_calibration_says() -> None:
    calibration = Calibration.synthetic(CONFIG).with_bits(3, value_bits="dense", min_bits=1)
    [method] = parse_methods(["spectral-2"], CONFIG, calibration)
    assert method.make_cache().calibration.metadata.rate == Rate(2)


def test_all_names_parse_and_describe_themselves(statistics: RivalStatistics) -> None:
    names = all_methods(CONFIG)
    assert {name.rpartition("-")[0] if SCHEMES.get(name) is None else name for name in names} == set(SCHEMES)
    methods = parse_methods(["all", "kivi-5"], CONFIG, Calibration.synthetic(CONFIG), statistics=statistics)
    assert [m.name for m in methods] == [*names, "kivi-5"]
    assert all(m.description and m.source for m in methods)
    assert {m.name for m in methods if m.family == "ours"} == {"spectral-2", "spectral-2.5", "spectral-3", "spectral-4"}
    # Of 64 dimensions: what has any rate stands at ours, 8 bits of gain included.
    assert {"pca-2.125", "pca-2.625", "pca-3.125", "pca-4.125", "rank-9", "rank-11", "rank-13", "rank-17"} <= set(names)
    assert METHOD_NAMES[:2] == ("dense", "spectral-B")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("luck-3", "unknown method 'luck-3': known are dense, spectral-B"),
        ("kivi", "unknown method 'kivi'"),
        ("kivi-two", "unknown method 'kivi-two'"),
        ("dense-4", "unknown method 'dense-4'"),
        ("", "unknown method ''"),
        ("kivi-2.5", "kivi-2.5: bits must be a whole number from 1 to 8, got 2.5"),
        ("quanto-3", "quanto-3: bits must be one of 2, 4, got 3"),
        ("hqq-5", "bits must be one of 1, 2, 3, 4, 8, got 5"),
        ("spectral-9", "spectral-9: bits must lie between 0 and 8, got 9"),
        ("pca-nan", "pca-nan: bits must lie between 0 and 8, got nan"),
        ("rank-65", "rank-65: the rank must be a whole number from 1 to 64, got 65"),
        ("rank-0", "a whole number from 1 to 64, got 0"),
        ("kvarn-k4v2-32", "kvarn-k4v2-32: the tile must be one of 64, 128, got 32"),
        ("kvarn-k4v3-64", "unknown method 'kvarn-k4v3-64'"),
        ("q4_0-4", "unknown method 'q4_0-4'"),
    ],
)
def test_bad_names(name: str, message: str) -> None:
    with pytest.raises(QuantCacheError) as caught:
        parsed(name)
    assert message in str(caught.value)


def test_ours_needs_a_calibration() -> None:
    with pytest.raises(QuantCacheError, match=r"method spectral-2.5 needs a calibration"):
        parse_methods(["spectral-2.5"], CONFIG, None)


def test_needs_statistics() -> None:
    assert needs_statistics(["dense", "pca-2.5"])
    assert needs_statistics(["all"])
    assert not needs_statistics(["dense", "spectral-3", "int8-token", "turboquant-mse-3"])


def test_own_lengths() -> None:
    lengths = {
        name: (m.sink_length, m.residual_length)
        for name in ("dense", "spectral-3", "kivi-2", "oscar-2", "turboquant-mse-3", "kvarn-k4v2-64", "q8_0")
        for m in [parsed(name, own_lengths=True)]
    }
    assert lengths == {
        "dense": (None, None),
        "spectral-3": (4, 64),
        "kivi-2": (0, 128),
        "oscar-2": (64, 256),
        "turboquant-mse-3": (0, 0),
        "kvarn-k4v2-64": (128, 0),
        "q8_0": (0, 0),
    }
    assert (parsed("kivi-2").sink_length, parsed("kivi-2").residual_length) == (4, 0)


def test_a_method_that_cannot_run_says_why_and_keeps_its_place(
    model: PreTrainedModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat.quantizers, "is_optimum_quanto_available", lambda: False)
    methods = [parsed(name) for name in ("dense", "quanto-4", "pca-3", "kivi-4")]
    with pytest.raises(MethodUnavailable, match="needs optimum-quanto"):
        methods[1].make_cache()
    results = fidelity.measure_fidelity(model, tokens, methods, context=256)
    assert {name: r.status for name, r in results.items()} == {
        "dense": "ok",
        "quanto-4": "unsupported: needs optimum-quanto",
        "pca-3": "unsupported: needs statistics of a calibration text",
        "kivi-4": "ok",
    }


def test_failures_keep_their_place(model: PreTrainedModel, tokens: Tensor) -> None:
    def fail(error: Exception) -> Callable[[], DynamicCache]:
        def make() -> DynamicCache:
            raise error

        return make

    errors = {
        RuntimeError("broken\nmore"): "failed: RuntimeError: broken",
        MemoryError(): "out of memory",
        MethodUnavailable("no layer"): "unsupported: no layer",
        RuntimeError(""): "failed: RuntimeError",
        AssertionError("shapes"): "failed: AssertionError: shapes",
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"): "out of memory",
        NotImplementedError("no crop"): "unsupported: no crop",
    }
    methods = [Method(str(place), "rival", True, fail(error)) for place, error in enumerate(errors)]
    results = fidelity.measure_fidelity(model, tokens[:256], methods, context=256)
    assert [r.status for r in results.values()] == list(errors.values())


# ---------------------------------------------------------------------- whole caches

BITS = {
    "int8-token": 8.25,
    "kivi-2": 3.0,
    "quarot-3": 3.5,
    "turboquant-mse-2": 2.25,
    "turboquant-qjl-3": (3.5 + 3.25) / 2,
    "oscar-2": 2.5,
    "rank-8": 2.0,
}


@pytest.mark.parametrize("name", BITS)
def test_simulated_sizes(name: str, model: PreTrainedModel, tokens: Tensor, statistics: RivalStatistics) -> None:
    cache = parsed(name, statistics).make_cache()
    with torch.no_grad():
        model(tokens[None, :324], past_key_values=cache)
    memory = measure(cache)
    assert memory.encoded_elements == 2 * 2 * 2 * 320 * DIM  # layers, sides, heads
    assert memory.bits_per_element == pytest.approx(BITS[name])


@pytest.mark.parametrize(("name", "bits"), [("quanto-2", 2.5), ("quanto-4", 4.5), ("hqq-4", 4.5), ("fp8", 8.0)])
def test_installed_sizes(name: str, bits: float, model: PreTrainedModel, tokens: Tensor) -> None:
    method = parsed(name)
    if method.unsupported or method.simulated:
        pytest.skip(method.unsupported or "transformers has no fp8 cache")
    cache = method.make_cache()
    with torch.no_grad():
        model(tokens[None, :256], past_key_values=cache)
    memory = measure(cache)
    assert memory.elements == memory.encoded_elements == 2 * 2 * 2 * 256 * DIM
    assert memory.tokens == 256
    assert memory.bits_per_element == pytest.approx(bits, abs=0.01)
    scales = 2 * 2 * 2 * 256 * 2 * 2 if name != "fp8" else 2 * 2 * 2  # bytes beyond 16 bits of float32 scales
    assert memory.slack == scales


def test_sliding_windows_predict_every_token_once(model: PreTrainedModel, tokens: Tensor) -> None:
    context, stride = 128, 48
    found = fidelity.measure_fidelity(model, tokens[:300], [parsed("dense")], context=context, chunk=64, stride=stride)[
        "dense"
    ]
    expected = []
    with torch.no_grad():
        for first in range(0, 300 - context + 1, stride):
            window = tokens[first : first + context]
            nll = torch.nn.functional.cross_entropy(model(window[None, :-1]).logits[0], window[1:], reduction="none")
            expected.append(nll if not first else nll[-stride:])
    nll = torch.cat(expected).double()
    assert found.tokens == len(nll) == context - 1 + 3 * stride
    assert found.perplexity == pytest.approx(math.exp(float(nll.mean())), rel=1e-5)


def test_bad_strides(model: PreTrainedModel, tokens: Tensor) -> None:
    for stride in (0, 128):
        with pytest.raises(QuantCacheError, match=f"between 1 and 127, the window less one, got {stride}"):
            fidelity.measure_fidelity(model, tokens, [parsed("dense")], context=128, stride=stride)


# ---------------------------------------------------------------------- what an element takes


@pytest.fixture
def restored_schemes() -> Iterator[None]:
    before = dict(SCHEMES)
    yield
    SCHEMES.clear()
    SCHEMES.update(before)


def toy(**changes: object) -> Scheme:
    """A method of one's own: values rounded to multiples of 1/4."""

    class Rounding(SimulatedCodec):
        def reconstruct(self, x: Tensor) -> Tensor:
            return (4 * x).round() / 4

    given: dict[str, object] = {
        "stem": "toy",
        "family": "rival",
        "simulated": True,
        "description": "multiples of 1/4",
        "source": "here",
        "make": lambda number, setting: simulated_cache(setting, lambda *args: Rounding(5.0)),
        "bits": lambda number, side, dim: 5.0,
    }
    return Scheme(**(given | changes))  # type: ignore[arg-type]


@pytest.mark.usefixtures("restored_schemes")
def test_a_method_of_ones_own_is_measured_and_sized_at_its_own_bits() -> None:
    register(toy())
    (method,) = parse_methods(["toy"], CONFIG, None, 4, 0)
    cache = method.make_cache()
    keys = torch.randn(1, 2, 4 + 64, DIM)
    for index in range(2):
        cache.update(keys, keys, index)
        cache.layers[index].flush()
    assert measure(cache).bits_per_element == 5.0
    form = formats.parse_format("toy")
    assert formats.bits_per_element(form, read_geometry(CONFIG)) == 5.0


@pytest.mark.usefixtures("restored_schemes")
def test_a_packed_method_of_ones_own_is_sized_as_blocks() -> None:
    """It was sized as transformers' quantized cache, with that one's groups and residual."""
    register(toy())
    register(toy(stem="packed", simulated=False))
    known = read_geometry(CONFIG)
    sizes = [cache_memory(formats.parse_format(name), known, 500) for name in ("toy", "packed")]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("bits", [None, 0.0, math.nan, math.inf, "5"])
def test_a_method_without_bits_of_its_own_is_refused(bits: object) -> None:
    for stated in (lambda number, side, dim: bits, lambda number, side, dim: 5.0 if side == "key" else bits):
        with pytest.raises(QuantCacheError, match="method 'toy' must state the bits that an element of its"):
            register(toy(bits=stated))
    with pytest.raises(QuantCacheError, match="must state the bits that an element of its keys takes, got None"):
        register(toy(bits=None))
    assert "toy" not in SCHEMES


def test_a_stem_is_registered_once() -> None:
    with pytest.raises(QuantCacheError, match="method 'kivi' is registered already"):
        register(toy(stem="kivi"))


@pytest.mark.parametrize("name", [name for name in all_methods(CONFIG) if find_scheme(name, CONFIG)[0].simulated])
def test_simulated_codecs_have_the_bits_that_their_scheme_states(name: str, statistics: RivalStatistics) -> None:
    scheme, number = find_scheme(name, CONFIG)
    cache = parsed(name, statistics).make_cache()
    keys = torch.randn(1, 2, 4 + 128, DIM)
    cache.update(keys, keys, 0)
    cache.layers[0].flush()
    assert set(cache.layers[0].codecs) == {"key", "value"}
    for side, codec in cache.layers[0].codecs.items():
        stated = scheme.bits(number, side, DIM)
        # Water-filled widths are whole numbers, whose mean may stay a little below the budget.
        assert stated - (1 / DIM if scheme.stem == "pca" else 0) <= codec.bits <= stated


def test_a_method_is_measured_only_where_it_reads_codes() -> None:
    """In a text that sinks and recent tokens fill, every cache is exact, and its figures were those of the method."""
    names = ["dense", "floor", "spectral-2", "kivi-2", "kvarn-k4v4-128", "fp8"]
    methods = parse_methods(names, CONFIG, Calibration.synthetic(CONFIG), 4, 64)
    own = Method("own", "rival", False, DynamicCache)  # keeps whatever it likes
    left = {
        tokens: [method.name for method in reading_codes([*methods, own], tokens) if method.unsupported]
        for tokens in (131, 132, 195, 196)
    }
    every, longer = ["spectral-2", "kivi-2", "kvarn-k4v4-128"], ["kvarn-k4v4-128"]
    assert left == {131: every, 132: longer, 195: longer, 196: []}
    (refused,) = reading_codes(methods[2:3], 200, cached=100)
    assert refused.unsupported == (
        "in 200 tokens it reads no codes: the first 4 and the last 64 stay as they are, others are encoded 64 at a time"
    )
    with pytest.raises(MethodUnavailable, match="in 200 tokens it reads no codes"):
        refused.make_cache()
