"""transformers' own server: which parts it has, and how they are put together."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers.utils.import_utils import is_serve_available

from quantcache.common.errors import QuantCacheError

if TYPE_CHECKING:
    from fastapi import FastAPI


def require_server() -> None:
    """Refuse to serve where something is missing that transformers' server needs.

    Raises:
        QuantCacheError: A package is missing.
    """
    if not is_serve_available():
        raise QuantCacheError("serving needs fastapi, uvicorn and openai: pip install 'quantcache[serve]'")


def own_listing(manager: Any, folder: str | None) -> list[dict[str, Any]]:
    """The models that transformers' own manager lists.

    Args:
        manager: The manager, possibly of a class that lists others.
        folder: The Hub's cache folder.

    Returns:
        Entries as OpenAI has them.
    """
    from transformers.cli.serving.model_manager import ModelManager

    if hasattr(ModelManager, "list_models"):  # since 5.24
        listed: list[dict[str, Any]] = ModelManager.list_models(manager, folder)
        return listed
    found: list[dict[str, Any]] = ModelManager.get_gen_models(folder)
    return found


_LENGTH = "max_completion_tokens"
"""OpenAI's present name of ``max_tokens``, which is all that transformers' first servers know."""


@dataclass(frozen=True)
class Oversight:
    """Who looks at what comes in and what goes out.

    Attributes:
        check: Is shown every request for text and the fields that transformers does not look at; may refuse it.
        check_text: Is shown the messages to a model that takes nothing but text.
        cut: Is given what a chat's answer, or its reasoning, has become, and gives what is shown of it.
        stream: Is given every answer that is streamed, event by event, and whether OpenAI's end with ``[DONE]``; gives
            what is sent.
    """

    check: Callable[[dict[str, Any], Collection[str]], None]
    check_text: Callable[[list[dict[str, Any]]], None]
    cut: Callable[[str | None], str | None]
    stream: Callable[[AsyncIterator[Any], bool], AsyncIterator[Any]]


def serving_application(
    manager: Any,
    state: Any,
    template: dict[str, Any],
    decisions: str | None,
    cors: bool,
    oversight: Oversight,
) -> FastAPI:
    """transformers' application with every endpoint that the installed version has.

    Args:
        manager: Its model manager.
        state: Its generation state.
        template: Keywords of every chat template.
        decisions: The decision endpoint's file, where there is that endpoint.
        cors: Whether browsers may call it from any origin.
        oversight: Who looks at requests and answers.

    Returns:
        The application.

    Raises:
        QuantCacheError: A file of decisions is given, and this version has no such endpoint.
    """
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.transcription import TranscriptionHandler

    def checked(kind: Any) -> Any:
        """A handler that checks requests before it handles them."""

        class Checked(kind):  # type: ignore[misc]
            async def handle_request(self, body: dict[str, Any], *args: Any) -> Any:
                unused = {*getattr(kind, "_unused_fields", ()), *({"logit_bias"} if kind is CompletionHandler else ())}
                oversight.check(body, unused - {_LENGTH})
                if _LENGTH in unused and body.get(_LENGTH) is not None:  # before 5.20 or so
                    body["max_tokens"] = body.pop(_LENGTH)
                for needs, name in ((ChatCompletionHandler, "messages"), (ResponseHandler, "input")):
                    if kind is needs and body.get(name) is None:
                        raise ValueError(f"{name} must be a list of at least one message, got None")
                answer = await super().handle_request(body, *args)
                if hasattr(answer, "body_iterator"):
                    answer.body_iterator = oversight.stream(answer.body_iterator, kind is not ResponseHandler)
                return answer

            def _build_completion(self, request_id: str, content: str, *args: Any, **more: Any) -> dict[str, Any]:
                more["reasoning_content"] = oversight.cut(more.get("reasoning_content"))
                built: dict[str, Any] = super()._build_completion(request_id, oversight.cut(content), *args, **more)
                return built

            @staticmethod
            def get_processor_inputs_from_messages(messages: list[dict[str, Any]], modality: Any) -> Any:
                if modality.name == "LLM":
                    oversight.check_text(messages)
                return kind.get_processor_inputs_from_messages(messages, modality)

        return Checked

    more: dict[str, Any] = {}
    try:  # since 5.20 or so
        from transformers.cli.serving.systemone import SystemOneHandler
    except ImportError:
        if decisions is not None:
            raise QuantCacheError("this version of transformers has no decision endpoint: leave its file out") from None
    else:
        more["systemone_handler"] = SystemOneHandler(
            model_manager=manager,
            generation_state=state,
            chat_template_kwargs=template,
            decision_config=decisions,
        )
    return build_server(
        manager,
        checked(ChatCompletionHandler)(manager, state, chat_template_kwargs=template),
        completion_handler=checked(CompletionHandler)(manager, state),
        response_handler=checked(ResponseHandler)(manager, state, chat_template_kwargs=template),
        transcription_handler=TranscriptionHandler(manager, state),
        generation_state=state,
        enable_cors=cors,
        **more,
    )
