"""Tasks with right answers: exercises drawn by seed, answers read from the cache, rates that say something or not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from quantcache import data
from quantcache.artifact.calibration import Calibration
from quantcache.cli.eval_tables import tables
from quantcache.common.errors import QuantCacheError
from quantcache.evaluation import exercises, runner, tasks
from quantcache.evaluation.cells import Cells
from quantcache.evaluation.feeding import encode, feed, frame_of
from quantcache.evaluation.methods import Method, parse_methods
from quantcache.evaluation.needle import NeedleFormat
from quantcache.evaluation.paired import is_evidence
from quantcache.evaluation.plan import QUICK, Material, Plan

pytestmark = pytest.mark.usefixtures("one_thread")

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}"
    "{% if add_generation_prompt %}[reply]{% endif %}"
)


@pytest.fixture
def chatting(demo_tokenizer: PreTrainedTokenizerBase) -> Any:
    """The bundled tokenizer with a chat template, for one test."""
    demo_tokenizer.chat_template = TEMPLATE
    yield demo_tokenizer
    demo_tokenizer.chat_template = None


def prompts(tokenizer: PreTrainedTokenizerBase, exercise: tasks.Exercise) -> list[str]:
    """What is read before each answer."""
    return [str(tokenizer.decode(torch.cat((exercise.text, question)))) for question in exercise.questions]


# ---------------------------------------------------------------- exercises


def test_records_stand_in_a_text_of_the_length_asked_for(demo_tokenizer: PreTrainedTokenizerBase) -> None:
    task = exercises.records(demo_tokenizer, data.evaluation_text(), [400, 200], count=3, seeds=2)
    assert [exercise.group for exercise in task.exercises] == ["200", "200", "400", "400"]
    for exercise in task.exercises:
        lengths = [len(exercise.text) + len(question) for question in exercise.questions]
        assert max(lengths) == int(exercise.group)
        assert len(set(exercise.answers)) == len(exercise.questions) == 3
        for prompt, code in zip(prompts(demo_tokenizer, exercise), exercise.answers, strict=True):
            name = prompt.rpartition("secret code of ")[2].partition("?")[0]
            assert f"The secret code of {name} is {code}." in prompt
            assert prompt.count(code) == 1
        places = [prompt.index(f"is {code}.") / len(prompt) for code in exercise.answers]
        assert places == sorted(places)
        assert places[-1] - places[0] > 0.4  # spread over the text


def test_tables_hold_every_value_that_is_asked_for(chatting: PreTrainedTokenizerBase) -> None:
    for chat in (False, True):
        task = exercises.lookups(chatting, pairs=(32, 16), shots=2, questions=5, seeds=2, chat=chat)
        assert [exercise.group for exercise in task.exercises] == ["16", "16", "32", "32"]
        for exercise in task.exercises:
            for prompt, value in zip(prompts(chatting, exercise), exercise.answers, strict=True):
                table, _, dialogue = prompt.partition("\n\n")
                rows = table.rpartition("[user]")[2].split("\n")
                key = prompt.rpartition("\n" if not chat else "[reply]")[2].removesuffix(":")
                assert len(rows) == int(exercise.group)
                assert f"{key}: {value}" in rows
                assert dialogue.count("What is the value of") == 3
                assert f"What is the value of {key}?" in dialogue
                assert prompt.count("[user]") == 3 * chat
                assert f"{key}: {value}" not in dialogue  # what is shown is not what is asked


def test_calls_are_those_of_the_tools_that_are_listed(chatting: PreTrainedTokenizerBase) -> None:
    for chat in (False, True):
        task = exercises.tool_calls(chatting, shots=(3,), questions=4, seeds=2, chat=chat)
        for exercise in task.exercises:
            for prompt, call in zip(prompts(chatting, exercise), exercise.answers, strict=True):
                request = prompt.rpartition("[user]" if chat else "}\n")[2]
                (value,) = json.loads(call)["arguments"].values()
                assert value in request
                assert f'{{"name": "{json.loads(call)["name"]}", "description"' in prompt
                assert prompt.count('"arguments"') == 3


def test_exercises_follow_their_seed(demo_tokenizer: PreTrainedTokenizerBase) -> None:
    def draw() -> list[tasks.Task]:
        text = data.evaluation_text()
        return [
            exercises.records(demo_tokenizer, text, [300], seeds=2),
            exercises.lookups(demo_tokenizer, pairs=(16,), seeds=2),
            exercises.tool_calls(demo_tokenizer, shots=(4,), seeds=2),
        ]

    for task, again in zip(draw(), draw(), strict=True):
        assert task.exercises[0].answers != task.exercises[1].answers
        for one, other in zip(task.exercises, again.exercises, strict=True):
            assert (one.group, one.answers) == (other.group, other.answers)
            assert torch.equal(one.text, other.text)


def test_turns_stand_in_the_template_in_their_order(chatting: PreTrainedTokenizerBase) -> None:
    turns = [("one", "two"), ("three", "four")]
    before, behind = (str(chatting.decode(part)) for part in frame_of(chatting, True, turns))
    assert before == "[user]one[/][assistant]two[/][user]three[/][assistant]four[/][user]"
    assert behind == "[/][reply]"
    plain = [str(chatting.decode(part)) for part in frame_of(chatting, False, turns)]
    assert plain == ["one\ntwo\nthree\nfour\n", "\n"]


@pytest.mark.parametrize(
    ("right", "good", "bad"),
    [
        (exercises._holds, ("The code is 12345.", "12,345"), ("1234", "")),
        (exercises._begins, ("12345", "12345."), ("123456", "is 12345", "")),
    ],
)
def test_numbers_are_judged_as_they_are_asked_for(right: Any, good: tuple[str], bad: tuple[str]) -> None:
    assert all(right(said, "12345") for said in good)
    assert not any(right(said, "12345") for said in bad)


def test_calls_are_judged_by_what_they_say() -> None:
    wanted = '{"name": "call_person", "arguments": {"name": "Ada"}}'
    right = ['{"arguments": {"name": "Ada"},"name":"call_person"}', f"{wanted} [/]"]
    wrong = [wanted.replace("Ada", "Nora"), wanted.replace("call", "ask"), wanted[:-1], "[]", "", f"Sure: {wanted}"]
    assert all(exercises._same_call(said, wanted) for said in right)
    assert not any(exercises._same_call(said, wanted) for said in wrong)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda t: exercises.records(t, "short", [200]), "the text has"),
        (lambda t: exercises.records(t, data.evaluation_text(), [30]), "30 tokens is too short for 3 facts"),
        (lambda t: exercises.records(t, data.evaluation_text(), [200], count=1), "got 1 facts"),
        (lambda t: exercises.records(t, data.evaluation_text(), [], count=2), "lengths []"),
        (lambda t: exercises.records(t, "", [200], form=NeedleFormat(fact="x")), "lacks {name}"),
        (lambda t: exercises.lookups(t, pairs=(8,)), "from 12 rows, for 4 shown and 8 asked, to 67, got 8"),
        (lambda t: exercises.lookups(t, pairs=(500,)), "got 500"),
        (lambda t: exercises.lookups(t, seeds=0), "at least 1"),
        (lambda t: exercises.tool_calls(t, shots=()), "at least 1"),
        (lambda t: exercises.tool_calls(t, questions=0), "at least 1"),
        (lambda t: exercises.tool_calls(t, chat=True), "has no chat template"),
    ],
)
def test_exercises_that_cannot_be_drawn_are_refused(
    demo_tokenizer: PreTrainedTokenizerBase, make: Any, expected: str
) -> None:
    with pytest.raises(QuantCacheError) as raised:
        make(demo_tokenizer)
    assert expected in str(raised.value)


# ---------------------------------------------------------------- answers


def test_an_answer_is_what_generate_says(demo_model: PreTrainedModel, demo_tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = encode(demo_tokenizer, data.evaluation_text()[:900])[None]
    for count in (6, 24):
        cache = DynamicCache(config=demo_model.config)
        feed(demo_model, cache, prompt[:, :-5])
        said = tasks.answer(demo_model, demo_tokenizer, cache, prompt[0, -5:], count)
        output = demo_model.generate(input_ids=prompt, max_new_tokens=count, do_sample=False)[0, prompt.shape[1] :]
        text = demo_tokenizer.decode(output, skip_special_tokens=True).strip()
        assert said == text.split("\n")[0].strip()
        assert said


@pytest.mark.slow
def test_answers_come_from_the_cache(demo_model: PreTrainedModel, demo_tokenizer: PreTrainedTokenizerBase) -> None:
    """What every method finds, and that few bits find less: codes of 0 bits are not dense keys in disguise."""
    task = exercises.records(demo_tokenizer, data.evaluation_text(), [220], count=2, seeds=2)
    calibration = Calibration.for_model("wiki11m")
    names = ("spectral-0", "spectral-8", "q8_0")
    methods = parse_methods(names, demo_model.config, calibration, residual_length=0)
    methods.append(Method("broken", "rival", False, lambda: 1 / 0))  # type: ignore[arg-type,return-value]
    result = tasks.measure_task(demo_model, demo_tokenizer, task, methods, cells=(cells := Cells())).to_dict()
    reference = cells.get("records", "dense", "220 0")  # measured though it was not asked for
    assert set(result["methods"]) == {*names, "broken"}
    found = {name: result["methods"][name]["found"] for name in names}
    assert found["spectral-0"]["successes"] == 0
    assert found["spectral-8"]["successes"] == found["q8_0"]["successes"] >= 2
    assert found["q8_0"]["n"] == 4
    assert result["evidence"] == {"all": True, "220": True}
    right = [
        sum(
            cells.get("records", "dense", f"220 {n}")["answers"][q].count(code)
            for q, code in enumerate(task.exercises[n].answers)
        )
        for n in (0, 1)
    ]
    pair = result["methods"]["spectral-0"]["paired"]["dense"]
    p = 2 * 0.5 ** sum(map(bool, right))  # two questions about one text share their coin
    assert pair == {"only_first": 0, "only_second": sum(right), "p": p, "n": 4, "texts": 2}
    assert result["methods"]["broken"]["status"] == "failed: ZeroDivisionError: division by zero"
    assert reference["wanted"] == list(task.exercises[0].answers)
    json.dumps(result, allow_nan=False)


@pytest.mark.slow
def test_questions_do_not_see_each_other(demo_model: PreTrainedModel, demo_tokenizer: PreTrainedTokenizerBase) -> None:
    task = exercises.lookups(demo_tokenizer, pairs=(16,), shots=1, questions=2, seeds=1)
    (exercise,) = task.exercises
    swapped = tasks.Exercise(exercise.group, exercise.text, exercise.questions[::-1], exercise.answers[::-1])
    for name in ("dense", "spectral-2"):
        (method,) = parse_methods([name], demo_model.config, Calibration.for_model("wiki11m"), residual_length=0)
        said = [tasks._answers(demo_model, demo_tokenizer, method, one, 6, 64) for one in (exercise, swapped)]
        assert said[0] == said[1][::-1]


def test_caches_that_cannot_be_copied_read_the_text_for_every_question(
    demo_model: PreTrainedModel, demo_tokenizer: PreTrainedTokenizerBase
) -> None:
    """As transformers' own over optimum-quanto."""

    class Uncopied(DynamicCache):
        def __deepcopy__(self, memo: object) -> DynamicCache:
            raise RuntimeError("cannot be copied")

    (exercise,) = exercises.lookups(demo_tokenizer, pairs=(16,), shots=1, questions=2, seeds=1).exercises
    (dense,) = parse_methods(["dense"], demo_model.config, None)
    uncopied = Method("uncopied", "rival", False, lambda: Uncopied(config=demo_model.config))
    ours, theirs = (tasks._answers(demo_model, demo_tokenizer, each, exercise, 6, 64) for each in (uncopied, dense))
    assert ours == theirs


@pytest.mark.slow
def test_finished_exercises_are_not_asked_again(
    demo_model: PreTrainedModel,
    demo_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = exercises.tool_calls(demo_tokenizer, shots=(1,), questions=1, seeds=2)
    methods = parse_methods(["dense", "q8_0"], demo_model.config, None)

    def run() -> tasks.TaskResult:
        return tasks.measure_task(demo_model, demo_tokenizer, task, methods, cells=Cells(tmp_path / "cells", {}))

    first = run()
    monkeypatch.setattr(tasks, "_answers", None)
    assert run() == first


# ---------------------------------------------------------------- rates


@pytest.mark.slow
def test_rates_near_zero_are_no_evidence(demo_model: PreTrainedModel, demo_tokenizer: PreTrainedTokenizerBase) -> None:
    """A model that cannot do a task says so in the table, in place of rates that look like those of a bad cache."""
    task = exercises.tool_calls(demo_tokenizer, shots=(1,), questions=2, seeds=1)
    methods = parse_methods(["dense", "q8_0"], demo_model.config, None)
    result = tasks.measure_task(demo_model, demo_tokenizer, task, methods).to_dict()
    assert result["methods"]["dense"]["found"]["successes"] == 0
    assert result["evidence"] == {"all": False, "1": False}
    (shown,) = tables({"metrics": {"tools": result}})
    assert not isinstance(shown, str)
    assert str(shown.title).endswith("– where the dense cache scores below 20%: no evidence")
    rows = shown.rows
    assert rows[0] == ("dense", "0/2 (0% to 66%)", "0/2", "")
    assert rows[1] == ("q8_0 (simulated)", "–", "–", "–")
    # The same with a model that can: figures are shown.
    result["evidence"] = {"all": True, "1": True}
    (shown,) = tables({"metrics": {"tools": result}})
    assert not isinstance(shown, str)
    assert "evidence" not in str(shown.title)
    assert [cell[:3] for cell in shown.rows[1][1:]] == ["0/2", "0/2", "0 /"]


@pytest.mark.parametrize(
    ("dense", "counts"),
    [(None, False), ({"share": 0.19}, False), ({"share": 0.2}, True), ({"mean": 0.1}, False), ({"mean": 0.9}, True)],
)
def test_where_evidence_begins(dense: Any, counts: bool) -> None:
    assert is_evidence(dense) is counts


def test_what_exceeds_the_limit_of_a_small_model_is_left_out(
    demo_model: PreTrainedModel, demo_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of many suites goes on: texts of the usual lengths leave room for answers, others are skipped."""
    monkeypatch.setattr(demo_model.config, "max_position_embeddings", 300)
    material = Material(demo_model, demo_tokenizer, data.evaluation_text()[:6000])
    sizes = replace(QUICK, lookup_pairs=(16, 32), task_questions=1, records=2)
    results = runner.run(material, Plan(("records", "lookup", "tools"), ("dense",), (300,), 300, sizes=sizes))
    assert results["records"]["settings"]["lengths"] == [300 - runner.ANSWER_ROOM]
    assert list(results["lookup"]["evidence"]) == ["all", "16"]
    skipped = "tools: skipped: no exercise fits into the model's limit of 300 positions"
    assert runner.skipped(results) == [skipped]
    assert runner.failures(results) == []


def test_an_exercise_beyond_the_models_limit_is_refused(
    demo_model: PreTrainedModel, demo_tokenizer: PreTrainedTokenizerBase
) -> None:
    task = exercises.records(demo_tokenizer, data.evaluation_text(), [2048], count=2, seeds=1)
    with pytest.raises(QuantCacheError, match=r"longest exercise of records: \d+ exceeds the model's limit of 2048"):
        tasks.measure_task(demo_model, demo_tokenizer, task, [])
    empty = tasks.Task("records", "", "", (), exercises._holds, 4, {})
    with pytest.raises(QuantCacheError, match="no exercises"):
        tasks.measure_task(demo_model, demo_tokenizer, empty, [])
