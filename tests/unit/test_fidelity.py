"""The fidelity protocol: spread by position, equal exact tails, the floor, windows in pairs, and older records."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import llama_config
from rich.console import Console
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaForCausalLM, PreTrainedModel

import quantcache
from quantcache import Calibration
from quantcache.cli.eval_tables import tables
from quantcache.common.errors import QuantCacheError
from quantcache.evaluation import fidelity, runner
from quantcache.evaluation.feeding import chunk_edges
from quantcache.evaluation.fidelity import FidelityResult, check_tail, exact_tail, measure_fidelity
from quantcache.evaluation.methods import Method, parse_methods
from quantcache.evaluation.paired import against, kl_ratio, relative_kl
from quantcache.evaluation.plan import QUICK, Material, Plan
from quantcache.evaluation.record import read_record
from tests.helpers import few

CONFIG = llama_config(head_dim=64, layers=2, kv_heads=2, max_position_embeddings=1024)
RESULTS = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "results"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A small Llama with random weights, wide enough that attention is far from uniform."""
    quantcache.register_attention()
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            torch.nn.init.normal_(projection.weight, std=0.3)
    model.set_attn_implementation("spectral")
    return model


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 32, (1024,), generator=torch.Generator().manual_seed(1))


def made(*names: str, residual: int = 0) -> list[Method]:
    return parse_methods(list(names), CONFIG, Calibration.synthetic(CONFIG), 4, residual)


def watched(method: Method, note: Callable[[Any, int], None]) -> Method:
    """A method whose caches are looked at whenever the first layer gets tokens."""

    def make() -> Cache:
        cache = method.make_cache()
        update = cache.update

        def told(keys: Tensor, values: Tensor, index: int, *args: Any, **kwargs: Any) -> Any:
            out = update(keys, values, index, *args, **kwargs)
            if index == 0:
                note(cache, keys.shape[2])
            return out

        cache.update = told  # type: ignore[method-assign]
        return cache

    return replace(method, make_cache=make)


def divergences(model: PreTrainedModel, tokens: Tensor, method: Method, edges: list[tuple[int, int]]) -> np.ndarray:
    """KL of one window at every position, by hand and in float64."""
    found, caches = [], (DynamicCache(config=CONFIG), method.make_cache())
    with torch.no_grad():
        for first, last in edges:
            dense, own = (model(tokens[None, first:last], past_key_values=c).logits[0].double() for c in caches)
            found.append(
                torch.nn.functional.kl_div(
                    own.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="none"
                ).sum(-1)
            )
    return torch.cat(found).numpy()


def test_the_spread_is_that_of_all_positions(model: PreTrainedModel, tokens: Tensor) -> None:
    (method,) = made("kivi-2")
    seen: dict[str, Tensor] = {}
    methods = [method, *made("dense")]
    found = measure_fidelity(model, tokens[:600], methods, context=300, on_divergence=seen.__setitem__)["kivi-2"]
    edges = chunk_edges(300, 64, 4)
    kl = np.concatenate([divergences(model, tokens[start : start + 300], method, edges) for start in (0, 300)])
    assert found.kl_mean == pytest.approx(kl.mean(), rel=1e-4)
    assert kl.mean() > 1e-4
    for figure, share in (("kl_median", 0.5), ("kl_p99", 0.99), ("kl_p999", 0.999), ("kl_max", 1.0)):
        assert getattr(found, figure) == pytest.approx(np.quantile(kl, share), rel=1e-3), figure
    assert found.window_tokens == [300, 300]
    assert found.kl_windows == pytest.approx([kl[:300].mean(), kl[300:].mean()], rel=1e-4)
    assert found.exact_tail is None
    np.testing.assert_allclose(seen["kivi-2"].numpy(), kl, rtol=1e-3, atol=1e-6)  # every position, in order
    assert seen["dense"].tolist() == [0.0] * 600


def test_errors_are_over_stretches_of_neighbouring_positions() -> None:
    """What is hard for one position is hard for the next: so many positions are not so many samples."""
    tally, alone = fidelity._Tally(), []
    draw = torch.Generator().manual_seed(0)
    for _ in range(2):
        level = torch.rand(16, generator=draw, dtype=torch.float64).repeat_interleave(64)
        tally.kl.append(level), tally.nll.append(2 * level), tally.agree.append(level > 0)
        tally.windows.append(1024), tally.predicted.append(1024)
        alone.append(level[::64])
    tally.sizes = (3.0, 3.0, 1)
    found, stretches = tally.result(made("kivi-2")[0], None), torch.cat(alone)
    assert found.kl_stderr == pytest.approx(float(stretches.std()) / math.sqrt(32))
    assert found.perplexity_stderr == pytest.approx(found.perplexity * 2 * found.kl_stderr)
    assert fidelity._stderr(stretches[:5], [3, 2]) is not None
    assert fidelity._stderr(stretches[:5], [5]) is None


def test_divergences_are_those_of_methods_that_ran(model: PreTrainedModel, tokens: Tensor) -> None:
    (method,) = made("kivi-2")
    seen: dict[str, Tensor] = {}
    methods = [replace(method, name="absent", unsupported="needs luck"), method]
    found = measure_fidelity(model, tokens[:300], methods, context=150, stride=50, on_divergence=seen.__setitem__)
    assert found["absent"].status == "unsupported: needs luck"
    assert list(seen) == ["kivi-2"]
    assert len(seen["kivi-2"]) == found["kivi-2"].tokens
    assert float(seen["kivi-2"].mean()) == pytest.approx(found["kivi-2"].kl_mean)


@pytest.mark.parametrize(("context", "exact"), [(132, True), (133, False)])
def test_a_window_in_which_nothing_is_read_from_codes_has_no_figures(
    model: PreTrainedModel, tokens: Tensor, context: int, exact: bool
) -> None:
    """Chunks end at 68 and 132: of 132 tokens all are read before any is coded, and every method was perfect."""
    methods = [*made("dense"), *made("kivi-2", residual=64)]
    found = measure_fidelity(model, tokens[:context], methods, context=context)
    assert found["dense"].kl_mean == 0
    assert found["kivi-2"].status.startswith(f"unsupported: in {context} tokens it reads no codes") == exact
    assert (found["kivi-2"].kl_mean is None) == exact


@pytest.mark.parametrize("tail", few([0, 64, 100, 256], [100]))
def test_an_equal_tail_is_equal_for_every_counted_chunk(model: PreTrainedModel, tokens: Tensor, tail: int) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}

    def note(name: str) -> Callable[[Any, int], None]:
        def look(cache: Any, count: int) -> None:
            layer = cache.layers[0]
            seen.setdefault(name, []).append((layer.tails["key"].shape[2] - count, count))

        return look

    names = ("spectral-3", "kivi-3", "kvarn-k4v2-64", "kvarn-k4v2-128")
    methods = [watched(method, note(method.name)) for method in made(*names, residual=tail)]
    found = measure_fidelity(model, tokens[:640], methods, context=640, chunk=128, tail=tail)
    first = 128 + 4 + tail
    for name in names:
        assert seen[name][0] == (0, first)
        assert len(seen[name]) > 2
        assert {before for before, _ in seen[name][1:]} == {tail}
        assert (found[name].exact_tail, found[name].tokens) == (tail, 640 - first)
        # What comes before reads nothing but exact tokens and would count as zeros.
        assert found[name].window_tokens == [640 - first]
    whole = divergences(model, tokens[:640], made("kivi-3", residual=tail)[0], chunk_edges(640, 128, 4, tail))
    assert found["kivi-3"].kl_mean == pytest.approx(whole[first:].mean(), rel=1e-3)


def test_who_cannot_keep_an_equal_tail_says_so(model: PreTrainedModel, tokens: Tensor) -> None:
    methods = made("dense", "spectral-3", "kvarn-k4v2-128", "fp8", "quanto-4", residual=64)
    kept = {method.name: exact_tail(method, 64, 64) for method in methods}
    assert kept["spectral-3"] == 64
    assert kept["kvarn-k4v2-128"] is None  # half of the chunks would find a tile that is still open
    assert kept["quanto-4"] is None
    assert exact_tail(methods[2], 64, 128) == 64
    assert exact_tail(methods[1], 0, 64) is None  # made with another residual
    found = measure_fidelity(model, tokens[:256], [methods[1], methods[2]], context=256, tail=64)
    assert (found["spectral-3"].exact_tail, found["kvarn-k4v2-128"].exact_tail) == (64, None)
    assert found["kvarn-k4v2-128"].status == "ok"


def test_a_tail_that_fills_the_window_is_refused(model: PreTrainedModel, tokens: Tensor) -> None:
    check_tail(100, 256, 128, 4)
    expected = "a window of 256 tokens reads no codes: sinks 4, tail 124 and the first chunk of 128 take 256"
    with pytest.raises(QuantCacheError, match=expected):
        measure_fidelity(model, tokens, made("kivi-3", residual=124), context=256, chunk=128, tail=124)


def test_sliding_windows_count_what_reads_codes(model: PreTrainedModel, tokens: Tensor) -> None:
    found = measure_fidelity(model, tokens[:520], made("kivi-3"), context=256, stride=88, tail=0)["kivi-3"]
    assert found.window_tokens == [255 - 68, 88, 88, 88]
    assert found.tokens == sum(found.window_tokens)


def test_the_floor_reads_every_chunk_in_halves(model: PreTrainedModel, tokens: Tensor) -> None:
    pieces: list[int] = []
    floor, kivi = made("floor", "kivi-4")
    assert (floor.family, floor.simulated) == ("floor", False)
    methods = [watched(floor, lambda cache, count: pieces.append(count)), kivi]
    found = measure_fidelity(model, tokens[:200], methods, context=200, chunk=65, sink_length=4)
    assert pieces == [35, 34, 33, 32, 33, 32, 1]
    assert found["floor"].tokens == 200
    assert abs(found["floor"].kl_max or 0) < 1e-5
    assert abs(found["floor"].kl_mean or 0) < (found["kivi-4"].kl_mean or 0) / 100


# ---------------------------------------------------------------------- in pairs


def entry(family: str, bits: float, windows: list[float], **more: Any) -> dict[str, Any]:
    result = FidelityResult(family, False, "ok", bits_per_element=bits, kl_windows=windows, window_tokens=[100, 300])
    return {**asdict(result), **more}


def test_rivals_are_held_against_ours_at_their_bits() -> None:
    results = {
        "dense": entry("dense", 32.0, [0.0, 0.0]),
        "spectral-3": entry("ours", 3.125, [0.002, 0.004]),
        "spectral-2": entry("ours", 2.125, [0.01, 0.03]),
        "spectral-4": {"family": "ours", "status": "out of memory"},
        "even": entry("rival", 3.125, [0.004, 0.008]),
        "between": entry("rival", 3.0, [0.01, 0.04]),
        "below": entry("rival", 2.0, [1.0, 1.0]),
        "other tail": entry("rival", 8.0, [0.1, 0.1], exact_tail=64),
        "old": {k: v for k, v in entry("rival", 8.0, [1.0, 1.0]).items() if not k.endswith(("windows", "_tokens"))},
        "failed": {"family": "rival", "status": "failed: no"},
    }
    found = relative_kl(results)
    assert set(found) == {"even", "between"}
    assert found["even"] == {"to": "spectral-3", "ratio": pytest.approx(2), "stderr": pytest.approx(0), "n": 2}
    # Windows of 100 and 300 tokens: (1 + 12) / (1 + 9), and 2 / (2 - 1) times the squares of 1 - 1.3 and 12 - 11.7.
    wanted = {"ratio": pytest.approx(1.3), "stderr": pytest.approx((2 * 2 * 0.3**2) ** 0.5 / 10), "n": 2}
    assert found["between"] == {"to": "spectral-2", **wanted}
    assert kl_ratio(results["even"], results["dense"]) is None


def test_questions_without_an_answer_are_left_out_of_pairs() -> None:
    methods = [
        Method(name, family, False, DynamicCache)
        for name, family in (("dense", "dense"), ("ours", "ours"), ("a", "rival"), ("b", "rival"))
    ]
    right = {"dense": {"1": True, "2": True, "3": False}, "ours": {}, "a": {"1": True, "2": False}, "b": {"2": True}}
    expected = {"only_first": 0, "only_second": 1, "p": 1.0, "n": 2, "texts": 2}
    assert against("a", methods, right) == {"dense": expected}
    assert against("a", methods, right, lambda question: "the same") == {"dense": {**expected, "texts": 1}}
    assert set(against("dense", methods, right)) == set(against("ours", methods, right)) == set()


# ---------------------------------------------------------------------- records


def test_records_made_before_are_read_and_shown() -> None:
    (path,) = RESULTS.glob("*/fidelity__8a53dfca36__*.json")
    record = read_record(path)
    old = record.metrics["residual_0"]
    assert "kl_median" not in old["spectral-3"]
    assert relative_kl(old) == {}
    part = {"context": 2048, "residual": 0, "stride": None, "methods": old}
    data = {"model": "wiki11m", "tokens": 8192, "sinks": 4, "dtype": "float32", "metrics": {"fidelity": [part]}}
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(*tables(data))
    assert "KL divergence by position" in console.export_text()


@pytest.mark.slow
def test_a_run_has_the_protocol_in_its_record(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "used_tokens", lambda material, plan: torch.arange(512) % 31)
    material: Any = Material(model, None, "", Calibration.synthetic(CONFIG))  # type: ignore[arg-type]
    names = ("dense", "floor", "spectral-3", "kivi-4", "kvarn-k4v2-128")
    sizes = replace(QUICK, ladder=(128,))
    plan = Plan(("fidelity", "memory"), names, (256,), 512, (0, 64), equal_tail=True, chunk=64, sizes=sizes)
    results = runner.run(material, plan)
    assert [(part["tail"], part["residual"]) for part in results["fidelity"]] == [(0, 0), (64, 64)]
    for part in results["fidelity"]:
        methods = part["methods"]
        assert {entry["status"] for entry in methods.values()} == {"ok"}
        assert methods["kivi-4"]["exact_tail"] == part["tail"]
        assert set(methods["kivi-4"]["kl_relative"]) == {"to", "ratio", "stderr", "n"}
        assert methods["kivi-4"]["kl_relative"]["to"] == "spectral-3"
        assert "kl_relative" not in methods["kvarn-k4v2-128"]
    assert "floor" not in results["memory"]["methods"]
    data = {"model": "m", "tokens": 512, "sinks": 4, "dtype": "float32", "metrics": {"fidelity": results["fidelity"]}}
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(*tables(data))
    shown = console.export_text()
    assert "KL divergence by position, 64 recent tokens exact beside the chunk" in shown
    assert "its own" in shown
    with pytest.raises(QuantCacheError, match="a window of 256 tokens reads no codes: sinks 4, tail 200"):
        runner.run(material, replace(plan, residuals=(0, 200)))


def test_pairs_are_a_column_where_there_are_any() -> None:
    share = {"share": 0.5, "low": 0.1, "high": 0.9, "successes": 1, "n": 2}
    method = {"status": "ok", "simulated": False, "found": share, "by_length": {"64": share}}
    test = {"only_first": 3, "only_second": 1, "p": 0.625, "n": 9}
    part = {"settings": {"lengths": [64], "depths": [0.5], "seeds": 2}, "methods": {"dense": method, "a": method}}

    def shown() -> str:
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(*tables({"metrics": {"needle": part}}))
        return console.export_text()

    assert "right where" not in shown()
    part["methods"] = {"dense": {**method, "paired": {}}, "a": {**method, "paired": {"dense": test}}}
    assert "3 / 1 (p 0.62)" in shown()


def test_an_older_record_has_no_p_where_texts_have_several_questions() -> None:
    """It tossed a coin for every question."""
    settings = {"title": "Codes", "unit": "tokens", "questions": 8, "exercises": 2}
    entry = {"status": "ok", "simulated": False, "family": "rival", "found": None, "by_group": {}}
    test: dict[str, float] = {"only_first": 3, "only_second": 1, "p": 0.625, "n": 8}
    for more, expected in (({}, "3 / 1"), ({"texts": 2}, "3 / 1 (p 0.62)")):
        paired = {"dense": test | more}
        part = {"settings": settings, "evidence": {"all": True}, "methods": {"a": {**entry, "paired": paired}}}
        (table,) = tables({"metrics": {"records": part}})
        assert [row[-1] for row in table.rows] == [expected]
