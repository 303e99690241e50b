"""transformers' own server: which parts it has, and how they are put together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.utils.import_utils import is_serve_available

from quantcache.common.errors import QuantCacheError

if TYPE_CHECKING:
    from fastapi import FastAPI


def require_server() -> None:
    """Refuse to serve where something is missing that transformers' server needs.

    Raises:
        QuantCacheError: It is.
    """
    if not is_serve_available():
        raise QuantCacheError("serving needs fastapi, uvicorn and openai: pip install 'quantcache[serve]'")


def serving_application(
    manager: Any, state: Any, template: dict[str, Any], decisions: str | None, cors: bool
) -> FastAPI:
    """transformers' application with every endpoint that the installed version has.

    Args:
        manager: Its model manager.
        state: Its generation state.
        template: Keywords of every chat template.
        decisions: The decision endpoint's file, where there is that endpoint.
        cors: Whether browsers may call it from any origin.

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
        ChatCompletionHandler(manager, state, chat_template_kwargs=template),
        completion_handler=CompletionHandler(manager, state),
        response_handler=ResponseHandler(manager, state, chat_template_kwargs=template),
        transcription_handler=TranscriptionHandler(manager, state),
        generation_state=state,
        enable_cors=cors,
        **more,
    )
