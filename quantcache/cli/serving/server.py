"""The server: transformers' application over compressed models, and what it says of its caches."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from quantcache.cli.serving.asked import check_request, require_text
from quantcache.cli.serving.models import CompressedGeneration, CompressedModels, Compression, Connections, canonical
from quantcache.cli.serving.stops import shortened_again
from quantcache.common import compat
from quantcache.common.errors import QuantCacheError

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerOptions:
    """What transformers' server is told.

    Attributes:
        models: Arguments of its model manager.
        template: Keywords of every chat template.
        decisions: The file of its decision endpoint.
        cors: Whether browsers may call it from any origin.
    """

    models: dict[str, Any] = field(default_factory=dict)
    template: dict[str, Any] = field(default_factory=dict)
    decisions: str | None = None
    cors: bool = False


@contextlib.contextmanager
def application(compression: Compression, options: ServerOptions) -> Iterator[FastAPI]:
    """Load all models and put the server together; in the end models are unloaded and prefixes written.

    Args:
        compression: Models with their calibrations, and how requests are compressed.
        options: What transformers' server is told.

    Yields:
        Its application, with one endpoint more: ``GET /quantcache``.

    Raises:
        QuantCacheError: A calibration and its model do not belong together.
    """
    manager = CompressedModels(compression, **options.models)
    try:
        yield _assembled(manager, compression, options)
    finally:
        manager.shutdown()


def _assembled(manager: CompressedModels, compression: Compression, options: ServerOptions) -> FastAPI:
    """transformers' application over the models, with an endpoint that tells of caches."""
    state = CompressedGeneration()

    def check(body: dict[str, Any], unused: Collection[str]) -> None:
        check_request(body, unused)
        only = manager.force_model  # known by this name alone, while answers call it NAME@main
        if only is not None and body.get("model") and canonical(body["model"]) == canonical(only):
            body["model"] = only

    oversight = compat.Oversight(check, require_text, shortened_again, _as_openai)
    app = compat.serving_application(manager, state, options.template, options.decisions, options.cors, oversight)
    app.add_middleware(Connections)
    for kind in (ValueError, TypeError, QuantCacheError):
        app.add_exception_handler(kind, _explain)
    app.add_exception_handler(HTTPException, _say)
    app.add_exception_handler(RequestValidationError, _no_object)
    app.add_exception_handler(Exception, _fail)

    @app.get("/quantcache")
    def report() -> dict[str, Any]:
        """What is compressed how, and what prefixes have spared."""
        prefixes = compression.prefixes
        bits = compression.options.get("bits")
        return {
            "models": {
                name: {"bits": round(each.bits if bits is None else bits, 3)}
                for name, each in compression.calibrations.items()
            },
            "prefixes": None if prefixes is None else prefixes.statistics().to_dict(),
        }

    return app


async def _explain(request: Request, error: Exception) -> JSONResponse:
    """Say what is wrong with a request; transformers' server leaves that to its log."""
    logger.warning("%s is refused: %s", request.url.path, error, exc_info=logger.isEnabledFor(logging.INFO))
    return _answer(400, str(error))


async def _say(request: Request, error: Exception) -> JSONResponse:
    """Say what is wrong as OpenAI's clients expect it."""
    assert isinstance(error, HTTPException)
    return _answer(error.status_code, str(error.detail), error.headers)


async def _no_object(request: Request, error: Exception) -> JSONResponse:
    """Say why a body cannot be read."""
    assert isinstance(error, RequestValidationError)
    told = "; ".join(" ".join((each["msg"], *each.get("ctx", {}).values())) for each in error.errors())
    return _answer(400, f"the request must be a JSON object: {told}")


async def _fail(request: Request, error: Exception) -> JSONResponse:
    """Say that something failed; the traceback is in the server's log."""
    # The server ends the connection behind it: a client that kept it for its next request would meet a dead one.
    return _answer(500, f"{type(error).__name__}: {error}", {"connection": "close"})


def _answer(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error in OpenAI's form, and in that of transformers' server, ``detail``."""
    return JSONResponse({"error": _error(status, message), "detail": message}, status, headers)


def _error(status: int, message: str) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"message": message, "type": kind, "param": None, "code": None}


async def _as_openai(events: AsyncIterator[Any], done: bool) -> AsyncIterator[Any]:
    """A stream as OpenAI's clients expect it.

    transformers' server puts the bare text of an error between two quotes, and ends chats and completions without the
    ``[DONE]`` that some clients wait for.
    """
    begin, end = 'data: {"error": "', '"}\n\n'
    async with contextlib.aclosing(events) as source:  # type: ignore[type-var]
        async for event in source:
            before, found, rest = event.partition(begin) if isinstance(event, str) else (event, "", "")
            if found:
                error = json.dumps({"error": _error(500, rest.removesuffix(end))})
                event = f"{before}data: {error}\n\n"
                done = False  # OpenAI's streams break off where they fail
            yield event
    if done:
        yield "data: [DONE]\n\n"
