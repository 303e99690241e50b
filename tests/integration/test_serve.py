"""transformers' server with compressed caches, and the real client on this machine's own network."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from quantcache.artifact.calibration import Calibration
from quantcache.cache.prefixes import PrefixStore
from quantcache.cache.spectral_cache import BlockCache, SpectralCache
from quantcache.common import compat
from quantcache.common.errors import CalibrationMismatch, QuantCacheError
from quantcache.data import demo_model_path
from tests import warm
from tests.builders import llama_config, scalar_calibration
from tests.helpers import Run

MISSING = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(bool(MISSING), reason=f"needs quantcache[serve]: no {', '.join(MISSING)}"),
]
if not MISSING:
    import openai
    import uvicorn

    from quantcache.cli.serve import listener
    from quantcache.cli.serving import models
    from quantcache.cli.serving.models import CompressedGeneration, Compression
    from quantcache.cli.serving.server import ServerOptions, application

serving = pytest.mark.support("serve: completions, chat and responses, streamed, concurrent and cancelled")
stopping = pytest.mark.support("serve: texts that stop an answer")
turning = pytest.mark.support("serve: turns of a chat, over restarts")
refusing = pytest.mark.support("serve: continuous batching, static caches, models without a calibration", refused=True)

TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}assistant:"
STORY = "The river rises in the mountains north of the old town and flows through three valleys. " * 8
COARSE = {"bits": 2.0, "residual_length": 0}
CPU = {"device": "cpu", "dtype": "float32", "model_timeout": -1}


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bundled model with a chat template, under the name of its folder."""
    folder = tmp_path_factory.mktemp("models") / "chatty"
    shutil.copytree(demo_model_path(), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    settings = json.loads((folder / "generation_config.json").read_text())
    trained = {**settings, "use_cache": False}  # as training leaves it; every request was refused
    (folder / "generation_config.json").write_text(json.dumps(trained))
    return str(folder)


@functools.cache
def calibration(own: bool = False) -> Calibration:
    """The bundled model's own calibration; or a stand-in, whose coarse codes show what is compressed."""
    if own:
        return Calibration.for_model("wiki11m")
    return scalar_calibration(AutoConfig.from_pretrained(demo_model_path()), 2.0)


@contextlib.contextmanager
def running(compression: Compression) -> Iterator[Any]:
    """A client of a server in a thread of its own."""
    with listener("localhost", 0) as endpoint, application(compression, ServerOptions(CPU)) as app:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [endpoint]})
        thread.start()
        try:
            address = f"http://127.0.0.1:{endpoint.getsockname()[1]}/v1"
            yield openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=60)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def client(chatty: str) -> Iterator[Any]:
    """A client of a server of two models, without prefixes: what was asked before has no influence."""
    with running(Compression({chatty: calibration(), "wiki11m": calibration(own=True)}, COARSE)) as found:
        yield found


@functools.cache
def bundled() -> tuple[Any, Any]:
    """The bundled model, as nobody serves it."""
    path = demo_model_path()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="spectral", dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(path)


@functools.cache
def answer(prompt: str, own: bool = False, tokens: int = 8, dense: bool = False) -> str:
    """What the bundled model says with a compressed cache, without any server."""
    model, tokenizer = bundled()
    inputs = tokenizer(prompt, return_tensors="pt")
    cache = None if dense else SpectralCache(calibration(own), model.config, **COARSE)
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def told(*messages: str) -> list[dict[str, str]]:
    """A chat."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]


def rendered(*messages: str) -> str:
    """What the template makes of it."""
    return "".join(f"{m['role']}: {m['content']}\n" for m in told(*messages)) + "assistant:"


def complete(client: Any, model: str, prompt: str, tokens: int = 8) -> str:
    """A completion."""
    found = client.completions.create(model=model, prompt=prompt, max_tokens=tokens, temperature=0)
    return str(found.choices[0].text)


def chat(client: Any, model: str, *messages: str, tokens: int = 8) -> str:
    """The answer to a chat."""
    found = client.chat.completions.create(model=model, messages=told(*messages), max_tokens=tokens, temperature=0)
    return str(found.choices[0].message.content)


# ---------------------------------------------------------------------- endpoints


def test_a_model_keeps_to_one_thread() -> None:
    """Every request asks for who generates."""
    state = CompressedGeneration()
    first, before = state.get_manager("a@main"), threading.active_count()
    assert all(state.get_manager("a@main") is first for _ in range(3))
    assert threading.active_count() == before


@pytest.mark.slow
@serving
def test_every_request_is_compressed(client: Any, chatty: str) -> None:
    expected = answer(STORY)
    assert complete(client, chatty, STORY) == expected
    assert expected != answer(STORY, dense=True)
    assert complete(client, "wiki11m", STORY) == answer(STORY, own=True)
    assert answer(STORY, own=True) != expected, "each model has its own calibration"
    assert chat(client, chatty, STORY) == answer(rendered(STORY))
    response = client.responses.create(model=chatty, input=STORY, max_output_tokens=8, temperature=0, stream=False)
    assert response.output_text == answer(rendered(STORY))


@serving
def test_streams(client: Any, chatty: str) -> None:
    options = {"model": chatty, "temperature": 0, "stream": True}
    parts = list(client.completions.create(prompt=STORY, max_tokens=8, **options))
    assert "".join(part.choices[0].text for part in parts) == answer(STORY)
    assert len(parts) > 3
    assert parts[-1].usage.completion_tokens == 8
    chunks = list(client.chat.completions.create(messages=told(STORY), max_tokens=8, **options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer(rendered(STORY))
    events = list(client.responses.create(input=STORY, max_output_tokens=8, **options))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == answer(rendered(STORY))


@serving
@pytest.mark.parametrize(
    ("path", "asked", "ends"),
    [
        ("completions", {"prompt": "The", "max_tokens": 2}, True),
        ("chat/completions", {"messages": told("The"), "max_tokens": 2}, True),
        ("responses", {"input": "The", "max_output_tokens": 2}, False),
    ],
)
def test_how_a_stream_ends(client: Any, chatty: str, path: str, asked: dict[str, Any], ends: bool) -> None:
    """OpenAI's chats and completions end with ``[DONE]``, and some clients take anything else for a stream cut off."""
    body = json.dumps({"model": chatty, "stream": True, "temperature": 0, **asked}).encode()
    request = urllib.request.Request(f"{client.base_url}{path}", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answered:
        said = answered.read().decode()
    assert said.count("[DONE]") == ends
    assert said.endswith("\n\ndata: [DONE]\n\n") == ends


@pytest.fixture(scope="module")
def templated(chatty: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same model with a template for what it says, which transformers' server then reads out of its tokens."""
    folder = tmp_path_factory.mktemp("templated") / "model"
    shutil.copytree(chatty, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    fields = {"content": {"close": "<|never|>", "content": "text"}}
    template = {"defaults": {"role": "assistant"}, "start_anchor": "assistant:", "fields": fields}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "response_template": template}))
    return str(folder)


@stopping
def test_the_text_that_stops_an_answer_is_not_in_it(client: Any, chatty: str) -> None:
    """Wherever tokens end; an answer that has as many tokens as it may has been stopped all the same."""
    said = answer(STORY)
    pieces = [part.choices[0].text for part in completed(client, chatty, stream=True)]
    across = next(a[-2:] + b[:2] for a, b in pairwise(pieces) if len(a) > 2 and len(b) > 2)  # the end of one, and on
    end = said.index(across)
    tokens = 1 + next(n for n in range(8) if len("".join(pieces[: n + 1])) >= end + len(across))
    for stop, most in ((across, 8), (["never said", across + "!", across], tokens)):
        found = completed(client, chatty, stop=stop, max_tokens=most).choices[0]
        assert (found.text, found.finish_reason) == (said[:end], "stop")
        parts = [part.choices[0] for part in completed(client, chatty, stop=stop, max_tokens=most, stream=True)]
        assert ("".join(part.text for part in parts), parts[-1].finish_reason) == (said[:end], "stop")
    parts = [part.choices[0] for part in completed(client, chatty, stop=[said[-3:] + "~", "~"], stream=True)]
    assert "".join(part.text for part in parts) == said, "what seems to begin has to be shown in the end"
    assert parts[-1].finish_reason == "length"


def completed(client: Any, model: str, **options: Any) -> Any:
    """A completion of the story."""
    return client.completions.create(**{"model": model, "prompt": STORY, "temperature": 0, "max_tokens": 8, **options})


@pytest.mark.slow
@stopping
def test_a_chat_ends_before_what_stops_it(templated: str, chatty: str) -> None:
    said = answer(rendered(STORY), own=True)
    stop = said[len(said) // 2 :][:3]
    options = {"messages": told(STORY), "max_tokens": 8, "temperature": 0, "stop": stop}
    with running(Compression({templated: calibration(own=True), chatty: calibration(own=True)}, COARSE)) as client:
        for model in (templated, chatty):
            found = client.chat.completions.create(model=model, **options).choices[0]
            parts = list(client.chat.completions.create(model=model, stream=True, **options))
            shown = "".join(part.choices[0].delta.content or "" for part in parts)
            assert [found.message.content.strip(), shown.strip()] == 2 * [said[: said.index(stop)].strip()]
            assert found.finish_reason == parts[-1].choices[0].finish_reason == "stop"


@serving
def test_a_chat_repeats_an_answer_as_a_client_has_it(client: Any, chatty: str) -> None:
    messages = told(STORY, "It does.", "Does it?")
    messages[1].update(tool_calls=None, refusal=None, audio=None)  # type: ignore[call-overload]
    found = client.chat.completions.create(model=chatty, messages=messages, max_tokens=8, temperature=0)
    assert found.choices[0].message.content == answer(rendered(STORY, "It does.", "Does it?"))


@refusing
@pytest.mark.parametrize("body", ["{bad", "[1]", "", "[" * 100_000, '{"prompt": "a\\ud800"}', '{"a": NaN}'])
def test_bodies_that_cannot_be_read(client: Any, body: str) -> None:
    request = urllib.request.Request(f"{client.base_url}completions", body.encode(), method="POST")
    request.add_header("content-type", "application/json")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    found = json.loads(caught.value.read())
    assert caught.value.code in (400, 422)
    assert found["error"]["message"] == found["detail"]


@refusing
def test_errors_have_one_form(client: Any, chatty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths that there are not, failures of the server, and failures in the middle of a stream."""
    with pytest.raises(openai.NotFoundError, match="Not Found"):
        client.post("/nowhere", body={}, cast_to=object)
    message = 'a "quoted"\nfailure'

    def fail(*args: Any, **kw: Any) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(models, "_keep_to_context", fail)
    with pytest.raises(openai.InternalServerError) as failed:
        completed(client, chatty)
    assert failed.value.response.json()["error"]["message"] == f"RuntimeError: {message}"
    monkeypatch.undo()
    monkeypatch.setattr(BlockCache, "update", fail)
    with pytest.raises(openai.APIError) as streamed:
        list(completed(client, chatty, stream=True))
    assert streamed.value.message == message


@serving
def test_requests_at_once(client: Any, chatty: str) -> None:
    models = {chatty: False, "wiki11m": True}
    wanted = [(name, f"{STORY} Number {i}") for i in range(2) for name in models]
    expected = [answer(prompt, models[name]) for name, prompt in wanted]
    with ThreadPoolExecutor(len(wanted)) as pool:
        found = list(pool.map(lambda each: complete(client, *each), wanted))
    assert found == expected


@serving
def test_a_cancelled_request(client: Any, chatty: str) -> None:
    stream = client.completions.create(model=chatty, prompt=STORY, max_tokens=600, temperature=0, stream=True)
    next(iter(stream))
    stream.close()
    started = time.monotonic()
    assert complete(client, chatty, STORY) == answer(STORY)
    assert time.monotonic() - started < 20, "nobody waits for what nobody reads"


@serving
def test_a_request_whose_client_has_gone(client: Any, chatty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a stream too, and however much it has asked for."""
    steps: list[bool] = []
    stop = models._Gone.__call__
    monkeypatch.setattr(
        models._Gone, "__call__", lambda self, *args, **kw: steps.append(self.gone) or stop(self, *args)
    )
    with pytest.raises(openai.APITimeoutError):
        client.completions.create(model=chatty, prompt=STORY, max_tokens=1 << 40, temperature=0, timeout=0.5)
    assert complete(client, chatty, STORY) == answer(STORY)
    assert steps.count(True) == 1
    assert steps[-8:] == 8 * [False]
    assert len(steps) < 1000


@pytest.mark.slow
@serving
def test_an_answer_ends_with_the_context(client: Any, chatty: str) -> None:
    text = " the city" * 1022  # 2,044 tokens of 2,048
    found = client.completions.create(model=chatty, prompt=text, max_tokens=1 << 40, temperature=0)
    assert found.usage.total_tokens == 2048
    assert found.choices[0].finish_reason == "length"


@serving
def test_what_the_server_says_of_itself(client: Any, chatty: str) -> None:
    assert [model.id for model in client.models.list()] == [chatty, "wiki11m"]
    found = client.get("/../quantcache", cast_to=object)
    assert found == {"models": {chatty: {"bits": 2.0}, "wiki11m": {"bits": 2.0}}, "prefixes": None}


# ---------------------------------------------------------------------- prefixes


@pytest.mark.slow
@turning
def test_turns_of_a_chat_go_on_after_a_restart(chatty: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    said = [STORY]

    def turn(store: PrefixStore, client: Any) -> int:
        """The next turn; how many tokens of its prompt were read."""
        before = store.statistics()
        said.append(chat(client, chatty, *said))
        said.append("And where does it end?")
        after = store.statistics()
        return after.prompt_tokens - before.prompt_tokens - (after.reused_tokens - before.reused_tokens)

    whole = len(tokenizer(rendered(STORY))["input_ids"])
    store = PrefixStore(1 << 30, tmp_path)
    with running(Compression({chatty: calibration()}, {"bits": 3.0}, store)) as client:
        assert turn(store, client) == whole
        # What an answer's last words are split into may change with what follows them: a block and the rest are read.
        assert turn(store, client) < 64 + 63 + 30
        assert not list(tmp_path.iterdir())
    assert list(tmp_path.iterdir()), "stopping writes what is in memory"
    again = PrefixStore(1 << 30, tmp_path)
    with running(Compression({chatty: calibration()}, {"bits": 3.0}, again)) as client:
        assert turn(again, client) < 64 + 63 + 30
        client.post("/../reset", cast_to=object)  # unloads the model
        assert turn(again, client) < 64 + 63 + 30
        assert client.get("/../quantcache", cast_to=object)["prefixes"] == again.statistics().to_dict()
    assert again.statistics().hits == 2


@turning
def test_a_cancelled_turn_is_kept(chatty: str) -> None:
    store = PrefixStore(1 << 30)
    with running(Compression({chatty: calibration()}, {"bits": 3.0}, store)) as client:
        stream = client.chat.completions.create(model=chatty, messages=told(STORY), max_tokens=600, stream=True)
        parts = [chunk.choices[0].delta.content or "" for chunk, _ in zip(stream, range(6), strict=False)]
        stream.close()
        chat(client, chatty, STORY, "".join(parts), "And then?")
    figures = store.statistics()
    assert (figures.requests, figures.hits, figures.failures) == (2, 1, 0)
    assert figures.prompt_tokens - 2 * figures.reused_tokens < 64 + 63 + 60


# ---------------------------------------------------------------------- what is refused


def detail(error: Any) -> str:
    """What the server says of an error."""
    return str(error.value.response.json()["detail"])


WHOLE = "must be a whole number of at least 1"
STOP = "stop must be a text or a list of texts, none of them empty"
MESSAGES = "messages must be a list of at least one message"


@refusing
@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("completions", {"prompt": ""}, "the prompt is empty"),
        ("completions", {"prompt": "", "stream": True}, "the prompt is empty"),
        ("completions", {}, "the prompt is empty"),
        ("completions", {"prompt": " the city" * 1024}, "the prompt has 2048 tokens, this model's context 2048"),
        ("completions", {"prompt": STORY, "max_tokens": 0}, f"max_tokens {WHOLE}, got 0"),
        ("completions", {"prompt": STORY, "max_tokens": -3}, f"max_tokens {WHOLE}, got -3"),
        (
            "completions",
            {"prompt": STORY, "max_tokens": "x"},
            f"max_tokens {WHOLE}, got 'x'",
        ),
        (
            "chat/completions",
            {"messages": told(STORY), "max_tokens": 0},
            f"max_tokens {WHOLE}, got 0",
        ),
    ],
)
def test_requests_that_make_no_sense(path: str, body: dict[str, Any], message: str, client: Any, chatty: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.post(f"/{path}", body={"model": chatty, **body}, cast_to=object)
    assert message in detail(error)


CHAT = {"messages": [{"role": "user", "content": "a"}]}
IN_VAIN = {
    "n": ("completions", {"n": 2}, "n=2 is not supported here, only 1"),
    "n of a chat": ("chat/completions", {"n": 3}, "n=3 is not supported here, only 1"),
    "best of": ("completions", {"best_of": 2}, "best_of=2 is not supported here, only 1"),
    "logprobs": ("completions", {"logprobs": 0}, "logprobs=0 is not supported here, only False"),
    "logprobs of a chat": ("chat/completions", {"logprobs": True}, "logprobs=True is not supported here, only False"),
    "echo": ("completions", {"echo": True}, "echo=True is not supported here, only False"),
    "biases": ("completions", {"logit_bias": {"5": 1}}, "logit_bias={'5': 1} is not supported here, only {}"),
    "presence": ("chat/completions", {"presence_penalty": 0.5}, "presence_penalty=0.5 is not supported here, only 0"),
    "JSON": (
        "chat/completions",
        {"response_format": {"type": "json_object"}},
        "response_format={'type': 'json_object'} is not supported here, only {'type': 'text'}",
    ),
    "a tool": (
        "chat/completions",
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"},
        "tool_choice='required' is not supported here, only 'auto'",
    ),
    "an earlier response": ("responses", {"previous_response_id": "r1"}, "previous_response_id='r1' is not supported"),
    "cold": ("completions", {"temperature": -1}, "temperature must be a number of at least 0, got -1"),
    "warm": ("chat/completions", {"temperature": "warm"}, "temperature must be a number of at least 0, got 'warm'"),
    "top_p": ("chat/completions", {"top_p": 1.5}, "top_p must be a number from 0 to 1, got 1.5"),
    "less than none": ("responses", {"top_p": -0.1}, "top_p must be a number from 0 to 1, got -0.1"),
    "penalty": ("completions", {"frequency_penalty": -1}, "frequency_penalty must be a number from -0.99 to 2, got -1"),
    "no answer": ("chat/completions", {"max_completion_tokens": 0}, f"max_completion_tokens {WHOLE}, got 0"),
    "no response": (
        "responses",
        {"max_output_tokens": 1.5},
        "max_output_tokens must be a whole number of at least 1, got",
    ),
    "stop": (
        "completions",
        {"stop": ["a", ""]},
        "stop must be a text or a list of texts, none of them empty, got ['a', '",
    ),
    "stop at 3": ("chat/completions", {"stop": 3}, f"{STOP}, got 3"),
    "seed": ("completions", {"seed": "x"}, "seed must be a whole number, got 'x'"),
    "stream": ("completions", {"stream": "yes"}, "stream must be true or false, got 'yes'"),
    "a long seed": ("completions", {"seed": 1 << 64}, "seed must be a whole number of at most 64 bits, got 1844674"),
    "an object": (
        "completions",
        {"generation_config": {"top_k": 3}},
        "generation_config must be the text of a JSON obj",
    ),
    "a list": ("completions", {"generation_config": "[1]"}, "generation_config must be the text of a JSON object, got"),
    "a suffix": ("completions", {"suffix": 3}, "suffix must be a text, got 3"),
    "a name": ("chat/completions", {"model": 3}, "model must be a text, got 3"),
    "tools": ("chat/completions", {"tools": [3]}, "tools must be a list of objects, got [3]"),
    "a template": ("chat/completions", {"chat_template_kwargs": 3}, "chat_template_kwargs must be an object, got 3"),
    "no text": (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "a part of type 'text' must have a text, got {'type': 'text'}",
    ),
    "a call of nothing": (
        "chat/completions",
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]},
        "tool_calls must be a list of functions with a name and arguments, got [{",
    ),
    "calls": (
        "chat/completions",
        {"messages": [{"role": "assistant", "tool_calls": 3}]},
        "tool_calls must be a list of functions with a name and arguments, got 3",
    ),
    "no input": ("responses", {"input": None}, "input must be a list of at least one message, got None"),
    "an item": ("responses", {"input": [{"type": "function_call"}]}, "item of type 'function_call' must have call_id"),
    "role": (
        "chat/completions",
        {"messages": [{"role": "narrator", "content": "a"}]},
        "a message's role must be one of system, developer, user, assistant, tool, got 'narrator'",
    ),
    "no messages": ("chat/completions", {"messages": []}, f"{MESSAGES}, got []"),
    "none at all": (
        "chat/completions",
        {"messages": None},
        "messages must be a list of at least one message, got None",
    ),
    "a picture": (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]},
        "content of type 'image_url': this model takes text only",
    ),
    "a number": (
        "chat/completions",
        {"messages": [{"role": "user", "content": 3}]},
        "or a list of parts with a type, got 3",
    ),
    "more answers": (
        "completions",
        {"generation_config": json.dumps({"num_return_sequences": 2, "do_sample": True})},
        "num_return_sequences=2: a request has one answer",
    ),
}


@refusing
@pytest.mark.parametrize(("path", "body", "message"), IN_VAIN.values(), ids=IN_VAIN)
def test_what_is_asked_in_vain_is_named(
    path: str, body: dict[str, Any], message: str, client: Any, chatty: str
) -> None:
    base = {"completions": {"prompt": "a"}, "chat/completions": CHAT, "responses": {"input": "a"}}[path]
    for more in ({}, {"stream": True}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.post(f"/{path}", body={"model": chatty, **base, **more, **body}, cast_to=object)
        found = caught.value.response.json()
        assert message in found["error"]["message"]
        assert found["error"]["type"] == "invalid_request_error"
        assert found["detail"] == found["error"]["message"]


@serving
def test_what_asks_for_nothing_else_is_let_through(client: Any, chatty: str) -> None:
    found = client.chat.completions.create(
        model=chatty, messages=told(STORY), max_tokens=8, temperature=0, n=1, logprobs=False, presence_penalty=0,
        response_format={"type": "text"}, user="me", tool_choice="auto", top_p=1, stop=["never said"],
        logit_bias={"5": -1},
    )  # fmt: skip
    assert found.choices[0].message.content == answer(rendered(STORY))
    empty: dict[str, Any] = {"stop": [], "logit_bias": {}}  # as some clients say that they want none
    found = client.chat.completions.create(model=chatty, messages=told(STORY), max_tokens=8, temperature=0, **empty)
    assert found.choices[0].message.content == answer(rendered(STORY))
    parts = [{"role": "user", "content": [{"type": "text", "text": STORY}]}]
    found = client.chat.completions.create(model=chatty, messages=parts, max_completion_tokens=8, temperature=0)
    assert found.choices[0].message.content == answer(rendered(STORY))


@pytest.mark.slow
@serving
def test_a_temperature_asks_for_sampling(client: Any, chatty: str) -> None:
    def said(**more: Any) -> str:
        found = client.completions.create(model=chatty, prompt=STORY, max_tokens=12, **more)
        return str(found.choices[0].text)

    likeliest = answer(STORY, tokens=12)
    assert said() == said(temperature=0) == said(temperature=1e-300) == likeliest
    warm = [said(temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert warm[0] == warm[1]
    assert len({*warm, likeliest}) == 3


@pytest.mark.slow
@serving
def test_a_temperature_beside_a_generation_config(client: Any, chatty: str) -> None:
    """It was ignored where the config does not say whether to sample, and divided by where it is all but 0."""

    def said(config: dict[str, Any], **more: Any) -> str:
        asked = {"extra_body": {"generation_config": json.dumps({"max_new_tokens": 6, **config})}} if config else {}
        found = client.completions.create(model=chatty, prompt=STORY, max_tokens=6, seed=1, **more, **asked)
        return str(found.choices[0].text)

    likeliest, warm = said({}, temperature=0), said({}, temperature=2.0)
    assert said({"do_sample": True}, temperature=1e-40) == likeliest
    assert said({"do_sample": False}, temperature=2.0) == likeliest
    assert said({"repetition_penalty": 1.0}, temperature=2.0) == warm != likeliest


@serving
def test_a_seed_gives_the_same_answer_among_other_requests(client: Any, chatty: str) -> None:
    """It was set while another answer was being generated: both came out otherwise than alone."""

    def said(seed: int) -> str:
        found = client.completions.create(model=chatty, prompt=STORY, max_tokens=24, temperature=2.0, seed=seed)
        return str(found.choices[0].text)

    alone = [said(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(said, range(4))) == alone


@refusing
def test_requests_that_are_refused(client: Any, chatty: str) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        complete(client, "gpt2", STORY)
    assert detail(error) == f"gpt2@main has no calibration here; this server has {chatty}, wiki11m"
    for config, message in (
        ({"cache_implementation": "static"}, "cache_implementation='static': caches are compressed here"),
        ({"use_cache": False}, "use_cache=false: caches are compressed here"),
    ):
        for stream in (True, False):
            more = {"generation_config": json.dumps({"max_new_tokens": 2, **config})}
            with pytest.raises(openai.BadRequestError) as error:
                client.completions.create(model=chatty, prompt=STORY, stream=stream, extra_body=more)
            assert detail(error) == message
    more = {"generation_config": json.dumps({"max_new_tokens": 2, "num_beams": 2})}
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=chatty, prompt=STORY, stream=True, extra_body=more)
    assert detail(error) == "num_beams=2: the answer of a beam search cannot be streamed"
    more = {"generation_config": json.dumps({"max_new_tokens": 8, "return_dict_in_generate": True})}
    found = client.completions.create(model=chatty, prompt=STORY, extra_body=more)
    assert found.choices[0].text == complete(client, chatty, STORY) == answer(STORY)


@pytest.mark.slow
@serving
def test_models_without_a_calibration_where_they_are_allowed(chatty: str) -> None:
    with running(Compression({chatty: calibration()}, COARSE, allow_dense=True)) as client:
        assert complete(client, chatty, STORY) == answer(STORY)
        assert complete(client, str(demo_model_path()), STORY) == answer(STORY, dense=True)


@serving
def test_a_server_of_one_model_knows_it_by_the_name_in_its_answers(chatty: str) -> None:
    with running(Compression({chatty: calibration()}, COARSE)) as client:
        found = client.completions.create(model=chatty, prompt=STORY, max_tokens=8, temperature=0)
        assert found.model == f"{chatty}@main"
        assert complete(client, found.model, STORY) == found.choices[0].text
        with pytest.raises(openai.BadRequestError) as error:
            complete(client, f"{chatty}@v2", STORY)
        assert f"requested '{chatty}@v2'" in detail(error)


def test_models_are_unloaded_though_writing_prefixes_is_interrupted(
    chatty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: PrefixStore) -> int:
        raise KeyboardInterrupt

    idle = {**CPU, "model_timeout": 300}
    compression = Compression({chatty: calibration()}, COARSE, PrefixStore(1 << 20, tmp_path), allow_dense=True)
    monkeypatch.setattr(PrefixStore, "save", interrupt)
    with pytest.raises(KeyboardInterrupt), application(compression, ServerOptions(idle)):
        timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert timers
    for timer in timers:
        timer.join(10)
    assert not any(map(threading.Timer.is_alive, timers)), "they would keep the process alive"


@refusing
def test_a_calibration_of_another_model(chatty: str) -> None:
    before = threading.active_count()
    wrong = {"wiki11m": calibration(), chatty: Calibration.synthetic(llama_config(32), 2.0)}
    idle = {**CPU, "model_timeout": 300}
    with pytest.raises(CalibrationMismatch), application(Compression(wrong), ServerOptions(idle)):
        pass
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before, "a timer would keep the process alive"
    with pytest.raises(QuantCacheError, match="continuous batching keeps all requests in one paged cache"):
        CompressedGeneration().get_manager("wiki11m@main", use_cb=True)


@refusing
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--continuous-batching"], "continuous batching keeps all requests in one paged cache of its own"),
        (["--compile"], "--compile needs a static cache"),
        (["--also", "gpt2"], "--also must be MODEL=ARTIFACT, got 'gpt2'"),
        (["--also", "wiki11m=other"], "wiki11m has two calibrations: wiki11m and other"),
        (["--also", "wiki12m=/nowhere"], "there is no folder /nowhere"),
        (["--prefix-bytes", "many"], "--prefix-bytes must be a number and a unit"),
        (["--prefix-bytes", "0", "--prefix-folder", "f"], "--prefix-bytes 0 leaves --prefix-folder no bytes"),
        (["--prefix-folder-bytes", "1GB"], "--prefix-folder-bytes needs --prefix-folder"),
        (["--chat-template-kwargs", "[1]"], "--chat-template-kwargs must be a JSON object, got [1]"),
        (["--also", "wiki11m@main=wiki11m"], "wiki11m@main is wiki11m by another name, and has two calibrations"),
        (["--reasoning", "on", "--chat-template-kwargs", '{"enable_thinking": false}'], "--reasoning on contradicts"),
        (["--reasoning", "maybe"], "'--reasoning': 'maybe' is not one of 'on', 'off', 'auto'"),
        (["--log-level", "loud"], "'--log-level': 'loud' is not one of 'debug', 'info', 'warning', 'error'"),
        (["--dtype", "int3"], "'--dtype': 'int3' is not one of 'auto', 'float32', 'bfloat16', 'float16'"),
        (["--default-seed", "9223372036854775808"], "'--default-seed': 9223372036854775808 is not from 0 to 2^63 - 1"),
        (["--host", "192.0.2.1"], "cannot listen at 192.0.2.1, port 8000"),
    ],
    ids=lambda each: "-".join(each) if isinstance(each, list) else "",
)
def test_bad_arguments_end_in_one_line(run: Run, arguments: list[str], message: str) -> None:
    status, out, err = run("serve", "wiki11m", "-c", "wiki11m", *arguments)
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert status == (2 if err.endswith("(see quantcache serve --help)\n") else 1)


def test_a_port_that_is_taken(run: Run) -> None:
    with listener("localhost", 0) as endpoint:
        port = endpoint.getsockname()[1]
        status, _, err = run("serve", "wiki11m", "-c", "wiki11m", "--port", port)
    assert status == 1
    assert f"cannot listen at localhost, port {port}: Address already in use" in err


def test_what_is_missing_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat.serving, "is_serve_available", lambda: False)
    status, _, err = run("serve", "wiki11m", "-c", "wiki11m")
    assert status == 1
    assert "pip install 'quantcache[serve]'" in err


@turning
@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_the_command_from_start_to_stop(stop: signal.Signals, chatty: str, tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(root), str(root / "kernels")))}
    command = [*warm.python(), "-m", "quantcache", "serve", chatty, "-c", "wiki11m", "--port", "0", "--json"]
    folder, log = tmp_path / "prefixes", tmp_path / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*command, "--prefix-folder", str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        address = None
        while address is None:
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
            address = re.search(r"http://\S+/v1", log.read_text())
        said = chat(openai.OpenAI(base_url=address[0], api_key="none", timeout=60), chatty, STORY)
        process.send_signal(stop)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, log.read_text()
    assert json.loads(out)["models"] == [chatty]
    assert json.loads(out)["prefixes"]["files"] == 1
    store = PrefixStore(1 << 30, folder)
    with running(Compression({chatty: Calibration.for_model("wiki11m")}, {}, store)) as client:
        chat(client, chatty, STORY, said, "And where does it end?")
    assert store.statistics().hits == 1
