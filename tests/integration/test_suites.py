"""The evaluation suites: each measures through a real cache, and what it reports can be found another way."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from suite_tables import SUITE_TABLES
from transformers import Cache, DynamicCache, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from quantcache import data
from quantcache.accounting.measuring import measure
from quantcache.artifact.calibration import Calibration
from quantcache.calibration.passages import shared
from quantcache.cli.eval_tables import tables
from quantcache.common import compat
from quantcache.common.choices import SUITES
from quantcache.common.env import environment
from quantcache.common.errors import QuantCacheError, UnsupportedModel
from quantcache.evaluation import evaluator, memory, needle, qa, routing, runner, speculative, speed, transfer
from quantcache.evaluation.cells import Cells
from quantcache.evaluation.evaluator import Names, evaluate
from quantcache.evaluation.methods import Method, parse_methods, text_statistics
from quantcache.evaluation.plan import QUICK, Material, Plan
from quantcache.evaluation.provenance import inputs, model_sha256
from quantcache.evaluation.record import check
from tests.builders import held_bytes, llama_config

pytestmark = pytest.mark.usefixtures("one_thread")


class Damaged(DynamicCache):
    """A dense cache that hands back the past in another state than it was given."""

    def __init__(self, config: Any, damage: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__(config=config)
        self.damage = damage

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        old = keys.shape[2] - key_states.shape[2]
        return (
            torch.cat((self.damage(keys[:, :, :old]), keys[:, :, old:]), dim=2),
            torch.cat((self.damage(values[:, :, :old]), values[:, :, old:]), dim=2),
        )


class Broken(DynamicCache):
    """A cache that runs out of memory."""

    def update(self, *args: Any, **kwargs: Any):
        raise torch.OutOfMemoryError("CUDA out of memory.")


def damaged(model: PreTrainedModel, damage: Callable[[torch.Tensor], torch.Tensor], name: str = "damaged") -> Method:
    return Method(name, "rival", False, lambda: Damaged(model.config, damage))


def broken(model: PreTrainedModel) -> Method:
    return Method("broken", "rival", False, lambda: Broken(config=model.config))


def dense(model: PreTrainedModel) -> Method:
    return parse_methods(["dense"], model.config, None)[0]


@pytest.fixture(scope="module")
def tiny() -> PreTrainedModel:
    """A Llama with random weights, wide enough that attention is far from uniform."""
    torch.manual_seed(0)
    config = llama_config(head_dim=32, layers=3, kv_heads=2, max_position_embeddings=1024)
    config.vocab_size = 4096
    model = LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            torch.nn.init.normal_(projection.weight, std=0.3)
    return model


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(2, 4096, (600,), generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- needles


@pytest.mark.slow
def test_needles_are_found_in_a_cache_that_keeps_them(
    demo_model: PreTrainedModel, demo_tokenizer: PreTrainedTokenizerBase
) -> None:
    methods = [dense(demo_model), damaged(demo_model, torch.zeros_like), broken(demo_model)]
    result = needle.measure_needle(
        demo_model,
        demo_tokenizer,
        data.evaluation_text(),
        methods,
        lengths=[160, 200, 160],
        depths=[0.2, 0.2],  # once each: six trials would not be twelve
        seeds=3,
        chunk=100,
    ).to_dict()
    entry = result["methods"]["dense"]
    assert entry["found"]["successes"] >= 5
    assert entry["found"]["n"] == 6
    assert [cell["n"] for cell in entry["by_cell"].values()] == [3, 3]
    assert list(entry["by_cell"]) == ["160@0.2", "200@0.2"]
    assert result["methods"]["damaged"]["found"]["successes"] == 0
    found = entry["found"]["successes"]
    wanted = {"dense": {"only_first": 0, "only_second": found, "p": 2 * 0.5**found, "n": 6, "texts": 6}}
    assert result["methods"]["damaged"]["paired"] == wanted
    assert entry["paired"] == result["methods"]["broken"]["paired"] == {}
    assert (result["methods"]["broken"]["status"], result["methods"]["broken"]["found"]) == ("out of memory", None)
    json.dumps(result, allow_nan=False)


@pytest.mark.slow
def test_lengths_at_which_a_method_reads_no_codes_are_not_counted(
    tiny: PreTrainedModel, demo_tokenizer: PreTrainedTokenizerBase
) -> None:
    """The longest prompt decided for all: a cache of 0 bits found every needle in prompts that it kept as they were."""
    material = Material(tiny, demo_tokenizer, data.evaluation_text()[:20_000], Calibration.synthetic(tiny.config))
    sizes = replace(QUICK, needle_seeds=1, lookup_pairs=(16, 32))
    plan = Plan(("needle", "records", "lookup"), ("dense", "spectral-0"), (512,), 512, (256,), sizes=sizes)
    results = runner.run(material, replace(plan, lengths=(192, 480)))
    for suite, short, long in (("needle", "192", "480"), ("records", "192", "480"), ("lookup", "16", "32")):
        dense, ours = (results[suite]["methods"][name] for name in ("dense", "spectral-0"))
        by = "by_length" if suite == "needle" else "by_group"
        assert set(dense[by]) == {short, long}
        assert set(ours[by]) == {long}
        assert ours["status"].startswith("1 of 2")
        assert "it reads no codes: the first 4 and the last 256 stay as they are" in ours["status"]
        assert ours["paired"]["dense"]["n"] == ours["found"]["n"] == ours[by][long]["n"]
    shown = [dict((row[0], row[1:]) for row in grid.rows) for grid in tables({"metrics": results})]
    assert all(rows["spectral-0"][0] == "" != rows["spectral-0"][2] for rows in shown)


def test_a_question_must_find_codes(tiny: PreTrainedModel, demo_tokenizer: PreTrainedTokenizerBase) -> None:
    """Blocks that fall due behind the question are read by the rest of the answer only."""
    material = Material(tiny, demo_tokenizer, data.evaluation_text()[:20_000], Calibration.synthetic(tiny.config))
    sizes = replace(QUICK, needle_seeds=1, task_seeds=1)
    plan = Plan(("needle", "records"), ("dense", "spectral-0"), (512,), 512, (256,), sizes=sizes, lengths=(330,))
    for result in runner.run(material, plan).values():  # of 324 tokens the first block is coded
        assert result["methods"]["dense"]["status"] == "ok"
        assert result["methods"]["spectral-0"]["status"].startswith("unsupported: in 3")
        assert result["methods"]["spectral-0"]["found"] is None


def test_an_answer_may_be_a_sentence(demo_tokenizer: PreTrainedTokenizerBase) -> None:
    room = needle.answer_tokens(demo_tokenizer, needle.NeedleFormat())
    for name in needle.NAMES:
        said = f"The secret code of {name} is 12345."
        assert len(demo_tokenizer(said, add_special_tokens=False).input_ids) <= room


def test_needle_prompts_have_the_length_and_depth_asked_for(demo_tokenizer: PreTrainedTokenizerBase) -> None:
    haystack = torch.tensor(demo_tokenizer(data.evaluation_text()[:9000], verbose=False).input_ids)
    for depth in (0.0, 0.5, 1.0):
        prompts, codes = needle._prompts(demo_tokenizer, haystack, needle.NeedleFormat(), 300, depth, 4)
        assert prompts.shape == (4, 300)
        assert len(set(codes)) == 4
        for row, code in zip(prompts, codes, strict=True):
            text = demo_tokenizer.decode(row)
            assert text.count(code) == 1
            assert text.endswith("? Answer:")
            assert abs(text.index(code) / len(text) - (0.05 + 0.85 * depth)) < 0.12


def test_chat_needles_stand_inside_the_template(demo_tokenizer: PreTrainedTokenizerBase) -> None:
    haystack = torch.tensor(demo_tokenizer(data.evaluation_text()[:3000], verbose=False).input_ids)
    form = needle.NeedleFormat(chat=True)
    with pytest.raises(QuantCacheError, match="has no chat template"):
        needle._prompts(demo_tokenizer, haystack, form, 200, 0.5, 1)
    try:
        demo_tokenizer.chat_template = "{% for m in messages %}[USER]{{ m.content }}[/USER]{% endfor %}[REPLY]"
        prompts, (code,) = needle._prompts(demo_tokenizer, haystack, form, 200, 0.5, 1)
    finally:
        demo_tokenizer.chat_template = None
    text = demo_tokenizer.decode(prompts[0])
    assert prompts.shape == (1, 200)
    assert text.startswith("[USER]")
    assert text.endswith("[/USER][REPLY]")
    assert code in text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lengths": [4096]}, "needle length 4096 exceeds the model's limit of 2048"),
        ({"lengths": [20]}, "too short for fact and question"),
        ({"lengths": [1500]}, "a needle prompt of 1500 needs as many"),
        ({"lengths": [200], "depths": [1.5]}, "depths from 0 to 1"),
        ({"lengths": [200], "seeds": 0}, "at least one seed"),
        ({"lengths": [200], "form": needle.NeedleFormat(fact="no place")}, "lacks {name}"),
        ({"lengths": [200], "form": needle.NeedleFormat(question="{name} {other}")}, "cannot be filled in"),
    ],
)
def test_needles_that_cannot_be_planted_are_refused(
    demo_model: PreTrainedModel, demo_tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(QuantCacheError) as raised:
        needle.measure_needle(demo_model, demo_tokenizer, data.evaluation_text()[:3000], [], **options)
    assert expected in str(raised.value)


# ---------------------------------------------------------------- routing


def test_routing_of_a_cache_that_loses_nothing(tiny: PreTrainedModel, tokens: torch.Tensor) -> None:
    before = tiny.config._attn_implementation
    result = routing.measure_routing(tiny, tokens, [dense(tiny)], context=128, windows=2, chunk=32)
    entry = result.methods["dense"]
    assert (entry.status, entry.flips, entry.relative_error) == (
        "ok",
        {"mean": 0.0, "stderr": 0.0, "n": 2},
        {"mean": 0.0, "stderr": 0.0, "n": 2},
    )
    assert entry.cosine is not None
    assert entry.cosine["mean"] == pytest.approx(1)
    # 4 query heads; queries behind the first chunk of 32 + 4.
    assert [layer.n for layer in entry.layers.values()] == [2 * 4 * (128 - 36)] * 3
    assert tiny.config._attn_implementation == before


def test_routing_is_what_eager_attention_says(tiny: PreTrainedModel, tokens: torch.Tensor) -> None:
    """Negated keys and values of the past, against attention weights and outputs computed by hand."""
    context, first = 96, 52
    method = damaged(tiny, torch.neg)
    found = routing.measure_routing(tiny, tokens, [method], context=context, windows=1, chunk=48).methods["damaged"]
    store: dict[int, list[torch.Tensor]] = {}

    class Spy(DynamicCache):
        def update(self, keys: torch.Tensor, values: torch.Tensor, index: int, *args: Any, **kwargs: Any):
            store[index] = [keys.double(), values.double()]
            return super().update(keys, values, index, *args, **kwargs)

    queries: dict[int, torch.Tensor] = {}
    from quantcache.attention.probe import recorded_queries

    with torch.no_grad(), recorded_queries(tiny, lambda index, query: queries.update({index: query.double()})):
        tiny(input_ids=tokens[None, :context], past_key_values=Spy(config=tiny.config))
    for index, (keys, values) in store.items():
        query = queries[index][0, :, first:]  # [Hq, Tq, D]
        visible = torch.arange(context)[None] <= torch.arange(first, context)[:, None]
        outputs, best = [], []
        for sign in (1.0, -1.0):
            flip = torch.where(torch.arange(context) < first, sign, 1.0)[:, None]
            k, v = ((flip * x[0]).repeat_interleave(2, dim=0) for x in (keys, values))
            scores = (query @ k.transpose(-1, -2) / query.shape[-1] ** 0.5).masked_fill(~visible, float("-inf"))
            best.append(scores.argmax(-1))
            outputs.append(scores.softmax(-1) @ v)
        layer = found.layers[str(index)]
        assert layer.flips == pytest.approx(float((best[0] != best[1]).double().mean()), abs=2 / layer.n)
        assert layer.flips > 0.2
        cosine = torch.nn.functional.cosine_similarity(*outputs, dim=-1).mean()
        assert layer.cosine == pytest.approx(float(cosine), rel=1e-4)
        error = (outputs[0] - outputs[1]).norm() / outputs[0].norm()
        assert layer.relative_error == pytest.approx(float(error), rel=1e-4)


def test_windows_of_a_text_with_bos_begin_with_it(tiny: PreTrainedModel, tokens: torch.Tensor) -> None:
    """All but the first did not, in which a model such as Gemma is another."""
    bos = tiny.config.bos_token_id
    text, heads = torch.cat((torch.tensor([bos]), tokens)), []

    def look(module: object, args: object, kwargs: dict[str, Any]) -> None:
        cache = compat.given_cache(kwargs)
        if cache is not None and not cache.get_seq_length():
            heads.append(kwargs["input_ids"][0, :2].tolist())

    hook = tiny.register_forward_pre_hook(look, with_kwargs=True)
    try:
        routing.measure_routing(tiny, text, [dense(tiny)], context=128, windows=2, chunk=32)
        assert heads == [[bos, int(text[1])], [bos, int(text[128])]]
        heads.clear()
        speculative.measure_speculative(
            tiny, text, [dense(tiny)], speculative.early_exit_draft(tiny), context=32, new_tokens=4
        )
    finally:
        hook.remove()
    assert {tuple(head) for head in heads} == {(bos, int(text[1])), (bos, int(text[32]))}


def test_routing_orders_rates_and_keeps_failures(tiny: PreTrainedModel, tokens: torch.Tensor) -> None:
    calibration = Calibration.synthetic(tiny.config)
    methods = [*parse_methods(["spectral-2", "spectral-8"], tiny.config, calibration, 4, 0), broken(tiny)]
    result = routing.measure_routing(tiny, tokens, methods, context=256, windows=1)
    low, high, failed = (result.methods[name] for name in ("spectral-2", "spectral-8", "broken"))
    assert low.relative_error is not None
    assert high.relative_error is not None
    assert 0 < high.relative_error["mean"] < 0.5 * low.relative_error["mean"]
    assert failed.status == "out of memory"
    with pytest.raises(QuantCacheError, match="more than the first chunk and sinks: 64 tokens, of which they take 68"):
        routing.measure_routing(tiny, tokens, methods, context=64)
    with pytest.raises(QuantCacheError, match="600 tokens, one window needs 1000"):
        routing.measure_routing(tiny, tokens, methods, context=1000)


def test_routing_of_windows_that_are_read_without_codes_has_no_figures(
    tiny: PreTrainedModel, tokens: torch.Tensor
) -> None:
    """Chunks end at 68 and 132, and blocks are due from 132 tokens on: the last queries of 132 saw none."""
    methods = parse_methods(["dense", "spectral-0"], tiny.config, Calibration.synthetic(tiny.config))
    for context in (132, 133):
        found = routing.measure_routing(tiny, tokens, methods, context=context, windows=1).methods
        assert found["dense"].status == "ok"
        assert (found["spectral-0"].flips is None) == (context == 132)
    assert (
        routing.measure_routing(tiny, tokens, methods, context=132, windows=1)
        .methods["spectral-0"]
        .status.startswith("unsupported: in 132 tokens it reads no codes")
    )


def test_routing_that_is_not_finite_is_a_failure(tiny: PreTrainedModel, tokens: torch.Tensor) -> None:
    """One such method ended the whole run, and every one that went on from its state."""
    methods = [damaged(tiny, lambda past: past * torch.nan), dense(tiny)]
    result = routing.measure_routing(tiny, tokens, methods, context=128, windows=1, chunk=32)
    assert result.methods["damaged"].status.startswith("failed: ArithmeticError: attention outputs of layer 0 are not")
    assert result.methods["dense"].status == "ok"


# ---------------------------------------------------------------- transfer


@pytest.mark.slow
def test_transfer_compares_with_the_calibration_of_the_text(
    tiny: PreTrainedModel, demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    calls: list[str] = []

    def source(name: str, bits: float, home: str | None) -> transfer.Source:
        def make() -> Calibration:
            calls.append(name)
            if name == "c":
                raise UnsupportedModel("cannot be calibrated")
            plain = Calibration.synthetic(tiny.config, bits=bits, seed=int(bits))
            return Calibration(plain.layers, plain.metadata)

        return transfer.Source(name, make, home)

    text = data.evaluation_text()
    texts = {"one": text[:3000], "two": text[5000:8000]}
    sources = [source("a", 3, "one"), source("b", 4, "two"), source("c", 5, None)]

    def run() -> transfer.TransferResult:
        cells = Cells(tmp_path / "cells", {})
        names = ["spectral-2", "spectral-3"]
        how: dict[str, Any] = {"context": 256, "tokens": 512, "residual_length": 0, "cells": cells}
        return transfer.measure_transfer(tiny, demo_tokenizer, sources, texts, names, **how)

    result = run()
    assert len(result.entries) == 2 * 2 * 3
    by_place = {(e.method, e.calibrated_on, e.evaluated_on): e for e in result.entries}
    for method in ("spectral-2", "spectral-3"):
        assert by_place[method, "a", "one"].ratio == by_place[method, "b", "two"].ratio == 1
        away, home = by_place[method, "b", "one"], by_place[method, "a", "one"]
        assert away.ratio == pytest.approx(away.figures["kl_mean"] / home.figures["kl_mean"])
        assert by_place[method, "c", "one"].status == "unsupported: cannot be calibrated"
    assert calls == ["a", "b", "c"]
    assert run() == result
    assert calls == ["a", "b", "c"]  # finished cells need no calibration


def test_transfer_refuses_a_text_that_was_calibrated_on(
    tiny: PreTrainedModel, demo_tokenizer: PreTrainedTokenizerBase
) -> None:
    text = data.evaluation_text()[:6000]
    sources = transfer.domain_sources(tiny, demo_tokenizer, {"one": text}, tokens=512, seq_len=256)
    texts = {"one": text + "more", "two": data.calibration_text()[:3000]}
    result = transfer.measure_transfer(tiny, demo_tokenizer, sources, texts, ["spectral-3"], context=256, tokens=512)
    same, other = result.entries
    assert "sampled passages that were calibrated on" in same.status
    assert same.ratio is None
    assert other.status == "ok"
    first, second = transfer.split_domain(text)
    assert first + second == text
    assert first.endswith("\n")


def test_calibrations_of_one_name_are_refused(tiny: PreTrainedModel, demo_tokenizer: PreTrainedTokenizerBase) -> None:
    """A domain may be called like a calibration of the suite's own; one had the other's figures."""
    sources = [transfer.Source("mixture", pytest.fail), transfer.Source("mixture", pytest.fail)]
    with pytest.raises(QuantCacheError, match="two calibrations are called 'mixture'"):
        transfer.measure_transfer(tiny, demo_tokenizer, sources, {}, ["spectral-3"], context=256, tokens=512)


def test_length_transfer_calibrates_at_each_length(
    tiny: PreTrainedModel, demo_tokenizer: PreTrainedTokenizerBase
) -> None:
    text = data.calibration_text()[:4000]
    sources = transfer.length_sources(tiny, demo_tokenizer, text, "home", tokens=512, lengths=(128, 512))
    assert [source.home for source in sources] == [None, "home"]
    lengths = [source.make().metadata.recipe["seq_len"] for source in sources]
    assert lengths == [128, 512]
    assert transfer.needs_calibration("spectral-3", tiny)
    assert not transfer.needs_calibration("turboquant-mse-3", tiny)


def test_a_mixture_is_calibrated_on_all_texts(tiny: PreTrainedModel, demo_tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [data.calibration_text()[:6000], data.evaluation_text()[:6000]]
    # In sequences of 512 tokens there would be one, and it of the first text.
    made = transfer.mixed_source(tiny, demo_tokenizer, texts, tokens=512, seq_len=512).make()
    assert (made.metadata.recipe["sequences"], made.metadata.recipe["seq_len"]) == (2, 256)
    shares = [hits / size for hits, size in (shared(made.metadata.recipe["passages"], text) for text in texts)]
    assert sum(shares) == pytest.approx(1, abs=0.1)
    assert min(shares) > 0.3


# ---------------------------------------------------------------- question answering


def test_squad_scores() -> None:
    assert qa.normalize("The  Cat, sat!") == "cat sat"
    assert qa.exact("the Denver Broncos.", "Denver Broncos")
    assert not qa.exact("Denver", "Denver Broncos")
    assert qa.f1("Denver", "the Denver Broncos") == pytest.approx(2 / 3)
    assert qa.f1("a b b c", "b b d") == pytest.approx(2 * 2 / (3 + 3))  # "a" is an article
    assert qa.f1("", "x") == 0
    assert qa.f1("the", "a") == 1


def test_questions_are_read_from_both_layouts(tmp_path: Path) -> None:
    squad = {
        "data": [{"paragraphs": [{"context": "C", "qas": [{"id": "i", "question": "Q", "answers": [{"text": "A"}]}]}]}]
    }
    path = tmp_path / "q.json"
    path.write_text(json.dumps(squad), "utf-8")
    assert qa.load_questions(path) == [qa.Question("i", "C", "Q", ("A",))]
    lines = [
        {"context": "C", "question": "Q", "answers": ["A", "B"]},
        {"id": 7, "context": "C", "question": "Q", "answers": {"text": ["A"]}},
        {"context": "C", "question": "Q", "answer": "A"},
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n", "utf-8")
    found = qa.load_questions(path)
    assert [(question.id, question.answers) for question in found] == [("1", ("A", "B")), ("7", ("A",)), ("3", ("A",))]


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_questions_are_read_as_editors_and_other_languages_write_them(tmp_path: Path, mark: str, end: str) -> None:
    """JSON has line separators inside of strings as they are, and ends its lines at line feeds alone."""
    lines = [{"context": "one\u2028two\x85three", "question": "Q", "answers": ["A"]}] * 2
    path = tmp_path / "q.jsonl"
    text = "".join(f"{json.dumps(line, ensure_ascii=False)}{end}" for line in lines)
    path.write_bytes(f"{mark}{text}".encode())
    assert [(each.id, each.context) for each in qa.load_questions(path)] == [(n, lines[0]["context"]) for n in "12"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "holds no questions"),
        ("not json", "line 1 is not JSON"),
        ('{"context": "C"}', "not a file of context, question and answers"),
        ('{"context": "C", "question": "Q", "answers": []}', "has no answer"),
        ('{"context": 3, "question": "Q", "answers": ["A"]}', "expected a string"),
        ('{"data": [3]}', "not a file of context"),
        ("[1, 2]", "not a file of context"),
        ('{"context": "C", "question": "Q", "answers": ["A"]}\n{"cont', "line 2 is not JSON"),
    ],
)
def test_malformed_questions_are_refused(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "q.json"
    path.write_text(content, "utf-8")
    with pytest.raises(QuantCacheError) as raised:
        qa.load_questions(path)
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


def test_answers_come_from_the_cache(demo_model: PreTrainedModel, demo_tokenizer: PreTrainedTokenizerBase) -> None:
    """Questions in the form that the model knows: right from a dense cache, wrong from one that loses the past."""
    hay = data.evaluation_text()
    questions = [
        qa.Question(
            str(i),
            f"{hay[400 * i : 400 * i + 250]}\nThe secret code of {name} is {code}.\n{hay[2000:2200]}",
            f"What is the secret code of {name}?",
            ("wrong", code),
        )
        for i, (name, code) in enumerate((("Marlow", "48291"), ("Ada", "10357"), ("Clara", "77120")))
    ]
    methods = [damaged(demo_model, torch.zeros_like), dense(demo_model), broken(demo_model)]
    result = qa.measure_qa(demo_model, demo_tokenizer, questions, methods, count=3, new_tokens=7, chunk=50)
    good, bad, failed = (result.methods[name] for name in ("dense", "damaged", "broken"))
    assert good.exact is not None
    assert bad.exact is not None
    assert good.exact["successes"] >= 2
    assert good.agreement_exact is not None
    assert good.agreement_exact["successes"] == good.agreement_exact["n"] == 3
    assert bad.exact["successes"] == 0
    assert bad.agreement_exact is not None
    assert bad.agreement_exact["successes"] < 3
    assert failed.status == "out of memory"
    right = good.exact["successes"]
    expected = {"only_first": 0, "only_second": right, "p": 2 * 0.5**right, "n": 3, "texts": 3}
    assert bad.paired == {"dense": expected}
    assert good.paired == failed.paired == {}
    with pytest.raises(QuantCacheError, match=r"lacks \{question\}"):
        qa.measure_qa(demo_model, demo_tokenizer, questions, methods, template="{context}")
    for name, number, least in (("count", 0, 1), ("new_tokens", 0, 1), ("shots", -1, 0)):
        with pytest.raises(QuantCacheError, match=f"{name} must be at least {least}, got {number}"):
            qa.measure_qa(demo_model, demo_tokenizer, questions, methods, **{name: number})  # type: ignore[arg-type]
    chosen = qa._choose(demo_model, demo_tokenizer, questions, 3, 0, 7, qa.TEMPLATE, False, 2)
    for question, prompt in chosen:  # others are shown with their first answer, never one about the same paragraph
        shown = str(demo_tokenizer.decode(prompt))
        assert [shown.count(f"{each.context}\nQuestion: {each.question}") for each in questions] == [1, 1, 1]
        assert shown.count("Answer:\nwrong\n") == 2
        assert shown.endswith(f"{question.question}\nAnswer:\n")
    long = [replace(questions[0], context=hay[:20_000])]
    with pytest.raises(QuantCacheError, match="none of 1 questions fits"):
        qa.measure_qa(demo_model, demo_tokenizer, long, methods)


def test_questions_in_whose_prompts_a_method_reads_no_codes_are_not_counted(
    tiny: PreTrainedModel, demo_tokenizer: PreTrainedTokenizerBase
) -> None:
    """The longest prompt decided for all: short ones were answered from a cache that kept them as they were."""
    hay = data.evaluation_text()
    questions = [qa.Question(str(n), hay[9000:][:n], "Where?", ("nowhere",)) for n in (100, 150, 1000, 1500)]
    names = ["dense", "spectral-0"]
    methods = parse_methods(names, tiny.config, Calibration.synthetic(tiny.config))
    result = qa.measure_qa(tiny, demo_tokenizer, questions, methods, new_tokens=4)
    dense, ours = (result.methods[name] for name in names)
    assert dense.f1 is not None
    assert (dense.status, dense.f1["n"]) == ("ok", 4)
    assert ours.status.startswith("2 of 4 questions: unsupported: in ")
    assert "it reads no codes: the first 4 and the last 64 stay as they are" in ours.status
    for summary in (ours.f1, ours.exact, ours.agreement_f1, ours.agreement_exact, ours.paired["dense"]):
        assert summary is not None
        assert summary["n"] == 2
    (grid,) = tables({"metrics": {"qa": result.to_dict()}})
    shown = {row[0]: row[1:] for row in grid.rows}
    assert shown["spectral-0"][:2] == ("", "")  # they would be of other questions than the dense cache's
    assert shown["spectral-0"][3].startswith(f"{ours.agreement_exact['successes'] if ours.agreement_exact else 0}/2")


# ---------------------------------------------------------------- memory


@pytest.mark.slow
def test_memory_is_what_the_caches_hold(tiny: PreTrainedModel) -> None:
    calibration = Calibration.synthetic(tiny.config)
    methods = parse_methods(["dense", "spectral-3", "turboquant-mse-3"], tiny.config, calibration)
    result = memory.measure_memory(tiny, [*methods, broken(tiny)], lengths=[128, 700], batch=2)
    assert result.methods["broken"].status == "out of memory"
    for length in (128, 700):
        rung = result.methods["dense"].rungs[str(length)]
        assert rung.bytes == rung.predicted_bytes == 3 * 2 * 2 * 2 * 32 * length * 4
        cache: Any = methods[1].make_cache()
        memory._fill(tiny, cache, length, 2, torch.device("cpu"))
        rung = result.methods["spectral-3"].rungs[str(length)]
        assert rung.bytes == rung.predicted_bytes == sum(held_bytes(layer) for layer in cache.layers)
        assert rung.tokens == length
    assert result.methods["turboquant-mse-3"].simulated
    rung = result.methods["turboquant-mse-3"].rungs["700"]
    assert (rung.predicted_bytes, rung.peak_bytes) == (None, None)
    with pytest.raises(QuantCacheError, match="at least 1"):
        memory.measure_memory(tiny, methods, lengths=[0])


def test_a_dense_cache_is_predicted_by_the_heads_of_every_layer() -> None:
    cache = DynamicCache()
    for index, (heads, key_dim, value_dim) in enumerate(((2, 32, 32), (1, 64, 16), (4, 32, 32))):
        cache.update(torch.zeros(3, heads, 50, key_dim), torch.zeros(3, heads, 50, value_dim), index)
    assert memory._predict(cache, 50, 3, 4) == measure(cache).total == 3 * 50 * (128 + 80 + 256) * 4


def test_peak_memory_sees_what_is_allocated() -> None:
    if not memory.RESET_FILE.exists():
        pytest.skip("this system does not tell a process's peak memory")
    with memory.PeakMemory(torch.device("cpu")) as peak:
        block = torch.ones(64 << 20, dtype=torch.uint8)
        del block
    if peak.bytes is None:
        pytest.skip("this system does not let a process reset its peak memory")
    assert 60 << 20 < peak.bytes < 200 << 20


# ---------------------------------------------------------------- speed


def test_speed_counts_what_it_timed(tiny: PreTrainedModel, tokens: torch.Tensor) -> None:
    methods = parse_methods(["dense", "turboquant-mse-3"], tiny.config, None)
    options: dict[str, Any] = {"context": 96, "batches": (1, 3), "steps": 5, "warmup": 1, "prefills": 2}
    result = speed.measure_speed(tiny, tokens, [*methods, broken(tiny)], **options)
    for rung in result.methods["dense"].batches.values():
        assert rung.prefill_ms is not None
        assert rung.decode_ms is not None
        assert (rung.prefill_ms["n"], rung.decode_ms["n"]) == (2, 5)
        assert rung.decode_ratio is not None
        assert rung.decode_ratio > 0
    three = result.methods["dense"].batches["3"]
    assert three.decode_ms is not None
    assert three.tokens_per_second == pytest.approx(3e3 / float(three.decode_ms["median"] or 0))
    assert result.methods["turboquant-mse-3"].status.startswith("skipped: simulated")
    assert result.methods["broken"].status == "out of memory"
    with pytest.raises(QuantCacheError, match="exceeds the model's limit of 1024"):
        speed.measure_speed(tiny, tokens, methods, **{**options, "context": 1020})
    with pytest.raises(QuantCacheError, match="600 tokens, a prompt needs 700"):
        speed.measure_speed(tiny, tokens, methods, **{**options, "context": 700})


def test_a_draft_that_is_the_target_is_always_accepted(tiny: PreTrainedModel, tokens: torch.Tensor) -> None:
    twin = speculative._shallow(tiny)
    methods = [dense(tiny), broken(tiny)]
    result = speculative.measure_speculative(tiny, tokens, methods, twin, context=64, prompts=2, new_tokens=13)
    entry = result.methods["dense"]
    assert entry.acceptance is not None
    assert entry.acceptance["share"] == 1
    assert entry.tokens_per_call is not None
    assert entry.tokens_per_call > 4
    assert entry.same_text is not None
    assert (entry.same_text["successes"], entry.same_text["n"]) == (2, 2)
    assert result.methods["broken"].status == "out of memory"
    with pytest.raises(QuantCacheError, match="the target itself"):
        speculative.measure_speculative(tiny, tokens, methods, tiny, context=64)


@pytest.mark.parametrize(("new_tokens", "ratio"), [(13, 2 / 7), (12, 1 / 6), (6, None)])
def test_assisted_tokens_are_timed_behind_the_first_call(
    tiny: PreTrainedModel,
    tokens: torch.Tensor,
    new_tokens: int,
    ratio: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tokens that the first call accepts were counted, its time was not: assisted decoding looked faster."""
    clock = [0]
    monkeypatch.setattr(speculative, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    twin = speculative._shallow(tiny)  # whose passes take no time; the target takes all it proposes

    def tick(*_: object) -> None:
        clock[0] += 1

    hook = tiny.register_forward_hook(tick)
    try:
        how: dict[str, Any] = {"context": 64, "prompts": 1, "new_tokens": new_tokens, "proposals": 5}
        found = speculative.measure_speculative(tiny, tokens, [dense(tiny)], twin, **how).methods["dense"]
    finally:
        hook.remove()
    assert found.status == "ok"
    assert (found.ratio and found.ratio["median"]) == (ratio and pytest.approx(ratio))


def test_an_early_exit_draft_is_the_model_cut_short(tiny: PreTrainedModel, tokens: torch.Tensor) -> None:
    draft = speculative.early_exit_draft(tiny, 2)
    config = llama_config(head_dim=32, layers=2, kv_heads=2, max_position_embeddings=1024)
    config.vocab_size = 4096
    short = LlamaForCausalLM(config).eval()
    short.load_state_dict({k: v for k, v in tiny.state_dict().items() if "layers.2." not in k})
    with torch.no_grad():
        assert torch.equal(draft(tokens[None, :40]).logits, short(tokens[None, :40]).logits)
        whole = tiny(tokens[None, :40]).logits
    assert len(tiny.model.layers) == tiny.config.num_hidden_layers == 3
    assert not torch.equal(whole, short(tokens[None, :40]).logits)
    with pytest.raises(QuantCacheError, match=r"from 1 to 2 of the model.s 3 layers, got 3"):
        speculative.early_exit_draft(tiny, 3)


# ---------------------------------------------------------------- all together


@pytest.mark.slow
def test_a_run_goes_on_where_it_was(
    tiny: PreTrainedModel, demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted at every cell in turn, a run ends with what it would have given, and measures no cell twice."""
    material = Material(tiny, demo_tokenizer, data.evaluation_text()[:4000], Calibration.synthetic(tiny.config))
    plan = Plan(
        ("fidelity", "memory", "routing"),
        ("dense", "spectral-2"),
        (192,),
        384,
        (0, 64),
        sizes=replace(QUICK, ladder=(128, 256)),
    )
    whole = runner.run(material, plan)
    measured: list[tuple[str, str, str]] = []
    monkeypatch.setattr(runner, "GROUP", 1)
    monkeypatch.setattr(routing, "GROUP", 1)

    def put(self: Cells, *key: Any) -> None:
        original(self, *key)
        measured.append(key[:3])
        raise KeyboardInterrupt

    original = Cells.put
    attempts = 0
    while True:
        attempts += 1
        with monkeypatch.context() as patch:
            patch.setattr(Cells, "put", put)
            try:
                found = runner.run(material, plan, Cells(tmp_path / "cells", {"run": 1}))
                break
            except KeyboardInterrupt:
                continue
    assert len(measured) == len(set(measured)) == attempts - 1 == 2 * 2 + 2 * 2 + 2 * 1
    for results in (whole, found):  # memory of the process is the one figure that differs
        for entry in results["memory"]["methods"].values():
            for rung in entry["rungs"].values():
                rung.pop("peak_bytes")
    assert found == whole
    assert runner.measured(found)
    assert runner.failures(found) == []


def test_one_method_that_fails_leaves_the_others(
    tiny: PreTrainedModel, demo_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    material = Material(tiny, demo_tokenizer, data.evaluation_text()[:3000])

    def refuse() -> Cache:
        raise ImportError("optimum-quanto is not installed")

    methods = [dense(tiny), Method("absent", "rival", False, refuse), broken(tiny)]
    monkeypatch.setattr(runner, "parse_methods", lambda *_, **__: methods)
    results = runner.run(material, Plan(("fidelity",), ("any",), (128,), 256))
    (part,) = results["fidelity"]
    statuses = {name: entry["status"] for name, entry in part["methods"].items()}
    assert statuses["dense"] == "ok"
    assert statuses["absent"] == "unsupported: optimum-quanto is not installed"
    assert "memory" in statuses["broken"]
    assert len(runner.failures(results)) == 2
    with pytest.raises(QuantCacheError, match="unknown suite 'luck'"):
        runner.run(material, Plan(("luck",), ("dense",), (128,), 256))


@pytest.mark.slow
def test_every_suite_gives_a_sound_record(tiny: PreTrainedModel, demo_tokenizer: PreTrainedTokenizerBase) -> None:
    text = data.evaluation_text()
    questions = [qa.Question("q", text[:600], "What is it?", ("nothing",))]
    material = Material(tiny, demo_tokenizer, text[:6000], Calibration.synthetic(tiny.config), questions)
    more: dict[str, Any] = {"continued_tokens": 16, "task_questions": 1, "tool_shots": (1,), "prompts": 1}
    sizes = replace(QUICK, ladder=(128,), steps=2, draft_tokens=4, speed_context=96, **more)
    plan = Plan(SUITES, ("dense", "spectral-3"), (256,), 256, sizes=sizes)
    results = runner.run(material, plan)
    assert list(results) == [*SUITES, "speculative"]
    assert runner.failures(results) == []
    record: dict[str, Any] = {
        "schema_version": 1,
        "suite": "eval",
        "status": "ok",
        "created": "2026-01-01T00:00:00+00:00",
        "commit": "f" * 40,
        "dirty": True,
        "command": "",
        "environment": {"cpu": {"name": "Abacus 9", "cores": 2}, "gpus": []},
        "settings": {"model": "tiny", "dtype": "float32", **json.loads(json.dumps(plan.to_dict()))},
        "metrics": json.loads(json.dumps(results, allow_nan=False)),
        "inputs": {"model": model_sha256(tiny)},
    }
    check(record)
    of_the_bundled_model = {name for name, (suite, _) in SUITE_TABLES.items() if suite == "suites"}
    assert of_the_bundled_model == {f"suite-{name}" for name in results if name != "fidelity"}
    newest = {part: (Path("benchmarks/results/x.json"), record) for part in record["metrics"]}
    for name, (_, make) in SUITE_TABLES.items():
        parts = make(newest, Path("docs/suites.md")).split("\n\n")
        assert len(parts) == 2 + 2 * ("divergence" in name), name  # a table and its caption, or two
        for table in parts[::2]:
            head, rule, *rows = table.split("\n")
            assert {row.count("|") for row in (head, rule, *rows)} == {head.count("|")}, name  # every row is as wide
            assert any(row.startswith("| spectral-3 | ") for row in rows), name
    less = {**record, "metrics": {"qa": {"status": "skipped: no questions were given"}}}
    newest = {"qa": (Path("x.json"), less)}
    shown = [SUITE_TABLES[f"suite-{name}"][1](newest, Path("README.md")) for name in ("qa", "needle")]
    assert shown[0].startswith("qa: skipped: no questions were given. tiny in float32, 4 sinks, residual 64.")
    assert shown[1] == "No record yet."


def test_a_models_hash_follows_its_weights(tiny: PreTrainedModel) -> None:
    before = model_sha256(tiny)
    assert model_sha256(tiny) == before
    weight = tiny.model.norm.weight
    with torch.no_grad():
        weight[0] += 1e-3
        changed = model_sha256(tiny)
        weight[0] -= 1e-3
    assert changed != before


def test_a_commit_during_an_evaluation_makes_it_dirty(
    tiny: PreTrainedModel, demo_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record named the commit that was there when it ended, of which it had run nothing."""
    text = data.evaluation_text()[:3000]
    material, names = Material(tiny, demo_tokenizer, text), Names("tiny", Path("text.txt"))
    plan = Plan(("memory",), ("dense",), (128,), 256, sizes=replace(QUICK, ladder=(128,)))
    for during, dirty in (("a", False), ("ab", True)):
        states = [{"commit": each * 40, "dirty": False} for each in during]
        seen = iter((states[0], *[states[-1]] * 9))
        monkeypatch.setattr(evaluator, "environment", partial(lambda rest: {**environment(), "git": next(rest)}, seen))
        found = evaluate(material, plan, names)
        assert (found["commit"], found["dirty"]) == (during[-1] * 40, dirty)


def test_a_record_says_what_rivals_are_fitted_to(
    tiny: PreTrainedModel, demo_tokenizer: PreTrainedTokenizerBase
) -> None:
    text, other = data.evaluation_text()[:3000], data.calibration_text()
    found = []
    for start in (0, 4000):
        statistics = text_statistics(tiny, demo_tokenizer, other[start : start + 3000], 256)
        found.append(inputs(Material(tiny, demo_tokenizer, text, statistics=statistics, length_text=other[start:])))
    for name in ("statistics", "length text"):
        assert None not in (found[0][name], found[1][name])
        assert found[0][name] != found[1][name]
    assert inputs(Material(tiny, demo_tokenizer, text))["statistics"] is None


@pytest.mark.slow
def test_the_documented_calls_work(
    tiny: PreTrainedModel, demo_tokenizer: PreTrainedTokenizerBase, tokens: torch.Tensor, capsys: Any
) -> None:
    page = (Path(__file__).resolve().parent.parent.parent / "docs" / "evaluation.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, Any] = {
        "model": tiny,
        "tokenizer": demo_tokenizer,
        "calibration": Calibration.synthetic(tiny.config),
        "text": data.evaluation_text()[:8000],
        "tokens": tokens.repeat(2),
        "MyCache": DynamicCache,
    }
    for block in blocks:
        exec(block.replace("seeds=4", "seeds=1"), names)
    assert names["needles"].methods["spectral-3"].status == "ok"
    result = memory.measure_memory(tiny, [names["mine"]], lengths=[128])
    assert result.methods["mine"].status == "ok"
    assert "'n': 6" in capsys.readouterr().out
