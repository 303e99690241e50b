"""Continuations read through other caches: figures and points of departure that can be found another way."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Cache, DynamicCache, LlamaForCausalLM, PreTrainedModel

from quantcache.common.errors import QuantCacheError
from quantcache.evaluation import divergence
from quantcache.evaluation.cells import Cells
from quantcache.evaluation.feeding import feed, greedy
from quantcache.evaluation.methods import Method, parse_methods
from tests.builders import llama_config, scalar_calibration

pytestmark = pytest.mark.usefixtures("one_thread")

HOW: dict[str, Any] = {"context": 100, "prompts": 2, "new_tokens": 48, "bins": 4}


@pytest.fixture(scope="module")
def tiny() -> PreTrainedModel:
    """A Llama with random weights, wide enough that attention is far from uniform."""
    torch.manual_seed(0)
    config = llama_config(head_dim=32, layers=2, kv_heads=1, max_position_embeddings=512)
    config.vocab_size = 128
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            torch.nn.init.normal_(projection.weight, std=0.3)
    return model


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(3, 128, (300,), generator=torch.Generator().manual_seed(0))


def methods(model: PreTrainedModel, *names: str) -> list[Method]:
    return parse_methods(names, model.config, scalar_calibration(model.config), 4, 0)


def lines(first: torch.Tensor, second: torch.Tensor) -> int | None:
    """Tokens in common before the first that differs."""
    differs = (first != second).nonzero()
    return int(differs[0]) if len(differs) else None


@pytest.mark.slow
def test_greedy_texts_depart_where_it_says(tiny: PreTrainedModel, tokens: torch.Tensor) -> None:
    """The point is read off the dense text; here every method writes its own, token by token."""
    names = ("dense", "spectral-0", "spectral-2", "spectral-8")
    found = divergence.measure_divergence(tiny, tokens, methods(tiny, *names), **HOW).methods
    dense: list[torch.Tensor] = []
    for method in methods(tiny, *names):
        points = []
        for row in (0, 1):
            prompt = tokens[None, row * 150 : row * 150 + 100]
            cache = method.make_cache()
            feed(tiny, cache, prompt[:, :-1])
            text = greedy(tiny, cache, prompt[:, -1:], 48)[0]
            if method.family == "dense":
                dense.append(text)
            points.append(lines(text, dense[row]))
        departure = found[method.name].departure
        assert departure is not None
        assert departure.points == points, method.name
        known = sorted(point for point in points if point is not None)
        assert departure.median == (known[0] if known else None)
    low, high = (found[name].departure for name in ("spectral-0", "spectral-8"))
    assert low is not None
    assert high is not None
    assert low.median is not None
    assert high.median is None or high.median > low.median


@pytest.mark.slow
def test_curves_are_what_two_caches_say(tiny: PreTrainedModel, tokens: torch.Tensor) -> None:
    """KL divergence token by token, and the line through it by least squares."""
    cells = Cells()
    (method,) = methods(tiny, "spectral-2")
    entry = divergence.measure_divergence(tiny, tokens, [method], **HOW, step=1, cells=cells).methods["spectral-2"]
    assert entry.curves is not None
    for kind, curve in entry.curves.items():
        kls = []
        for row in (0, 1):
            written = torch.tensor(cells.get("divergence", "dense", f"{kind} {row} text")["tokens"])
            whole = torch.cat((tokens[row * 150 : row * 150 + 100], written))[None]
            caches: list[Cache] = [DynamicCache(config=tiny.config), method.make_cache()]
            rows: list[list[torch.Tensor]] = [[], []]
            for cache, said in zip(caches, rows, strict=True):
                feed(tiny, cache, whole[:, :99], chunk=256)
                for place in range(99, 147):
                    with torch.no_grad():
                        logits = tiny(input_ids=whole[:, place : place + 1], past_key_values=cache).logits[0, -1]
                    said.append(logits.double().log_softmax(-1))
            dense, own = (torch.stack(said) for said in rows)
            kls.append((dense.exp() * (dense - own)).sum(-1))
        kl = torch.stack(kls)
        design = torch.stack((torch.arange(48, dtype=torch.float64), torch.ones(48, dtype=torch.float64)), 1)
        slopes = 1000 * torch.linalg.lstsq(design, kl.T).solution[0]
        assert curve.mean["mean"] == pytest.approx(float(kl.mean()), rel=1e-3)
        assert [each["mean"] for each in curve.bins] == pytest.approx(kl.view(2, 4, 12).mean((0, 2)).tolist(), rel=1e-3)
        assert curve.slope["mean"] == pytest.approx(float(slopes.mean()), rel=1e-2, abs=1e-4)
        assert curve.slope["stderr"] == pytest.approx(float((slopes[0] - slopes[1]).abs() / 2), rel=1e-2, abs=1e-4)


def test_fewer_bits_diverge_more_and_failures_keep_their_place(tiny: PreTrainedModel, tokens: torch.Tensor) -> None:
    class Broken(DynamicCache):
        def update(self, *args: Any, **kwargs: Any):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    asked = methods(tiny, "dense", "floor", "spectral-0", "spectral-3", "spectral-8")
    asked.append(Method("broken", "rival", False, lambda: Broken(config=tiny.config)))
    result = divergence.measure_divergence(tiny, tokens, asked, **HOW)
    assert result.methods["broken"].status == "out of memory"
    assert result.methods["broken"].curves is None
    means = {}
    for name, entry in result.methods.items():
        if entry.curves is not None:
            means[name] = [entry.curves[kind].mean["mean"] for kind in divergence.KINDS]
    assert means["dense"] == [0, 0]
    assert max(map(abs, means["floor"])) < 1e-6
    for low, high in (("spectral-8", "spectral-3"), ("spectral-3", "spectral-0")):
        assert all(4 * few < many for few, many in zip(means[low], means[high], strict=True))
    json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.slow
def test_continuations_follow_their_seed_and_do_not_end(
    tiny: PreTrainedModel, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(seed: int | None) -> list[int]:
        return divergence.continuation(tiny, tokens[:40], 30, 0.8, seed).tolist()

    assert write(1) == write(1)
    assert len({tuple(write(seed)) for seed in (None, 0, 1)}) == 3
    plain = write(None)
    monkeypatch.setattr(tiny.generation_config, "eos_token_id", [plain[0], plain[-1]])
    assert not {plain[0], plain[-1]} & {*write(None), *write(0)}
    found = divergence.measure_divergence(tiny, tokens, methods(tiny, "dense", "floor"), **HOW)
    points = [found.methods[name].departure for name in ("dense", "floor")]
    assert points == [divergence.Departure([None, None], None, 48)] * 2  # nor does a text depart for such a token


@pytest.mark.parametrize(("context", "count", "step", "sinks"), [(100, 150, 8, 4), (300, 64, 1, 0), (257, 90, 16, 5)])
def test_steps_end_where_blocks_do(context: int, count: int, step: int, sinks: int) -> None:
    cuts = divergence.edges(context, count, step, sinks)
    assert cuts[0][0] == 0
    assert cuts[-1][1] == context + count - 1
    assert all(before[1] == after[0] for before, after in itertools.pairwise(cuts))
    steps = [cut for cut in cuts if cut[0] >= context - 1]
    assert steps[0][0] == context - 1
    assert all(1 <= last - first <= step for first, last in steps)
    assert {(last - sinks) % step for _, last in steps[:-1]} <= {0}


@pytest.mark.slow
def test_a_run_goes_on_where_it_was(tiny: PreTrainedModel, tokens: torch.Tensor, tmp_path: Path) -> None:
    """No continuation is written twice, and a method that comes later reads the same ones."""
    path, done = tmp_path / "cells", []

    def run(*names: str) -> Any:
        cells = Cells(path, {"run": 1}, on_done=done.append)
        return divergence.measure_divergence(tiny, tokens, methods(tiny, *names), **HOW, cells=cells)

    first = run("spectral-2")
    size = len(path.read_text("utf-8").splitlines())
    assert size == 1 + 4 + 4
    both = run("spectral-2", "spectral-3")
    assert len(path.read_text("utf-8").splitlines()) == size + 4
    assert both.methods["spectral-2"] == first.methods["spectral-2"]
    assert both == run("spectral-2", "spectral-3")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"new_tokens": 500}, "exceeds the model's limit of 512"),
        ({"new_tokens": 1}, "new_tokens must be at least 2, got 1"),
        ({"new_tokens": 3}, "3 new tokens cannot be parted into 4 bins"),
        ({"bins": 0}, "bins must be at least 1, got 0"),
        ({"step": 0}, "step must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0"),
        ({"prompts": 0}, "0 prompts of 100 tokens"),
        ({"context": 320}, "cannot be taken from a text of 300 tokens"),
        ({"opening": torch.arange(100)}, "100 of them special ones"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    tiny: PreTrainedModel, tokens: torch.Tensor, more: dict[str, Any], expected: str
) -> None:
    with pytest.raises(QuantCacheError) as raised:
        divergence.measure_divergence(tiny, tokens, [], **{**HOW, **more})
    assert expected in str(raised.value)


def test_every_prompt_has_the_opening(tiny: PreTrainedModel, tokens: torch.Tensor) -> None:
    rows = divergence._prompts(tokens, torch.tensor([1, 2]), 50, 3)
    assert rows.shape == (3, 50)
    assert rows[:, :2].tolist() == [[1, 2]] * 3
    assert [int((tokens.unfold(0, 48, 1) == row[2:]).all(1).nonzero()[0]) for row in rows] == [0, 100, 200]


def test_a_text_that_is_read_without_codes_has_no_figures(tiny: PreTrainedModel, tokens: torch.Tensor) -> None:
    asked = parse_methods(["dense", "spectral-0"], tiny.config, scalar_calibration(tiny.config), 4, 64)
    how = {"context": 100, "prompts": 1, "bins": 2}
    short = divergence.measure_divergence(tiny, tokens, asked, new_tokens=33, **how).methods
    assert short["dense"].status == "ok"
    assert short["spectral-0"].status.startswith("unsupported: in 133 tokens it reads no codes")
    longer = divergence.measure_divergence(tiny, tokens, asked, new_tokens=40, **how).methods["spectral-0"]
    assert longer.curves is not None
    assert longer.curves["greedy"].mean["mean"] > 0
