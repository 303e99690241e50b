"""The server's models: transformers' own manager, whose models compress the cache of every request."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from fastapi import HTTPException
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerateManager, GenerationState, split_model_id

from quantcache.artifact.calibration import Calibration
from quantcache.cache.enabling import enable, is_enabled
from quantcache.cache.prefixes import PrefixStore
from quantcache.cli.serving.asked import asked_seed, asks_for_sampling
from quantcache.cli.serving.stops import Shortened, shortened
from quantcache.common import compat
from quantcache.common.errors import QuantCacheError, UnsupportedModel
from quantcache.common.sources import model_source

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compression:
    """How requests are compressed.

    Attributes:
        calibrations: The calibration of every model that is served, by the name that clients call it.
        options: Arguments of SpectralCache, such as ``bits``.
        prefixes: Where caches of earlier requests are kept, if they are.
        allow_dense: Whether models without a calibration are served too, with transformers' own cache.
    """

    calibrations: dict[str, Calibration]
    options: dict[str, Any] = field(default_factory=dict)
    prefixes: PrefixStore | None = None
    allow_dense: bool = False


def canonical(name: str) -> str:
    """A model's name as transformers' server knows loaded models by: ``REPO@REVISION[:FILE.gguf]``.

    Args:
        name: As the command line or a client has it.

    Returns:
        The name with its revision.
    """
    repo, file = split_model_id(name)
    return _key(ModelManager.process_model_name(repo), file)


def _key(model: str, file: str | None) -> str:
    return model if file is None else f"{model}:{file}"


class CompressedModels(ModelManager):
    """transformers' model manager; models that have a calibration compress the cache of every request.

    All models with a calibration are loaded at once, so that what does not fit is known before the first request.

    Args:
        compression: How requests are compressed.
        options: Arguments of transformers' manager, such as ``device``.

    Raises:
        CalibrationMismatch: A calibration is for another geometry than its model.
        QuantCacheError: A model is named twice.
        UnsupportedModel: A model is an encoder-decoder.
    """

    def __init__(self, compression: Compression, **options: Any):
        self.compression = compression
        names: dict[str, str] = {}
        for name in compression.calibrations:
            if (other := names.setdefault(canonical(name), name)) != name:
                raise QuantCacheError(f"{name} is {other} by another name, and has two calibrations: give it one")
        self._calibrations = {key: compression.calibrations[name] for key, name in names.items()}
        if len(compression.calibrations) == 1 and not compression.allow_dense:
            options = {**options, "force_model": next(iter(compression.calibrations))}
        super().__init__(**options)
        try:
            for name in compression.calibrations:
                repo, file = split_model_id(name)
                self.load_model_and_processor(self.process_model_name(repo), gguf_file=file)
        except BaseException:
            self.shutdown()  # a model that was loaded would keep the process alive until it is idle
            raise

    def load_model_and_processor(
        self,
        model_id_and_revision: str,
        progress_callback: Callable[..., Any] | None = None,
        tqdm_class: type | None = None,
        gguf_file: str | None = None,
    ) -> Any:
        """Load a model or find it loaded; see transformers.

        Args:
            model_id_and_revision: Its name.
            progress_callback: Told of the progress.
            tqdm_class: Shows it.
            gguf_file: The file inside the repository, where there is one.

        Returns:
            Model and processor.

        Raises:
            HTTPException: The model has no calibration.
        """
        known = _key(model_id_and_revision, gguf_file) in self._calibrations
        if not known and not self.compression.allow_dense:
            served = ", ".join(self.compression.calibrations)
            raise HTTPException(404, f"{model_id_and_revision} has no calibration here; this server has {served}")
        return super().load_model_and_processor(model_id_and_revision, progress_callback, tqdm_class, gguf_file)

    def _load_processor(self, model_id_and_revision: str, gguf_file: str | None = None) -> Any:
        return super()._load_processor(self._found(model_id_and_revision, gguf_file), gguf_file)

    def _load_model(
        self,
        model_id_and_revision: str,
        tqdm_class: type | None = None,
        progress_callback: Callable[..., Any] | None = None,
        gguf_file: str | None = None,
    ) -> Any:
        found = self._found(model_id_and_revision, gguf_file)
        model = super()._load_model(found, tqdm_class, progress_callback, gguf_file).eval()
        calibration = self._calibrations.get(_key(model_id_and_revision, gguf_file))
        if calibration is not None:
            self._compress(model, calibration)
        return model

    def _found(self, model: str, file: str | None) -> str:
        """Where a model of ours is; other names stay as they are."""
        if file is not None or os.path.exists(model):
            return model
        name, _, revision = model.partition("@")
        return f"{model_source(name)}@{revision}"

    def _compress(self, model: PreTrainedModel, calibration: Calibration) -> None:
        options, prefixes = self.compression.options, self.compression.prefixes
        # What a checkpoint says of caches, often left from training, would refuse every request here.
        model.generation_config.use_cache = model.generation_config.cache_implementation = None
        if prefixes is not None:
            try:
                enable(model, calibration, prefixes=prefixes, **options)
                return
            except UnsupportedModel as reason:
                logger.warning("prefixes are not kept: %s", reason)
        enable(model, calibration, **options)

    def list_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """What ``/v1/models`` lists: the models with a calibration, and all others where those are served too.

        Args:
            cache_dir: The Hub's cache folder.

        Returns:
            Entries as OpenAI has them.
        """
        ours = [
            {"id": name, "object": "model", "created": int(time.time()), "owned_by": name.rpartition("/")[0]}
            for name in self.compression.calibrations
        ]
        if not self.compression.allow_dense:
            return ours
        others = compat.own_listing(self, cache_dir)
        return [*ours, *(each for each in others if canonical(each["id"]) not in self._calibrations)]

    get_gen_models = list_models  # type: ignore[assignment]  # what transformers calls it before 5.24

    def shutdown(self) -> None:
        """Unload all models, and write the prefixes in memory to their folder."""
        try:
            if self.compression.prefixes is not None and self.compression.prefixes.folder is not None:
                self.compression.prefixes.save()
        finally:  # a second Ctrl-C: a model that is loaded keeps the process alive until it has been idle long enough
            super().shutdown()


class CompressedGeneration(GenerationState):
    """transformers' generation state, which refuses requests for another cache."""

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        """Who generates for a model; see transformers.

        Args:
            model_id: The model's name.
            use_cb: Continuous batching.

        Returns:
            One for each model, with a thread of its own.

        Raises:
            QuantCacheError: Continuous batching is asked for.
        """
        if use_cb:
            raise QuantCacheError(CONTINUOUS_BATCHING)
        if model_id not in self._generate_managers:  # each starts a thread that never ends
            self._generate_managers[model_id] = _Manager()
        return self._generate_managers[model_id]


class _Manager(GenerateManager):
    """Generates on one thread, with a compressed cache or not at all, and for nobody who has gone."""

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kw: Any
    ) -> Any:
        """See transformers."""
        _follow(model, inputs, gen_config)
        if gen_config.num_beams not in (None, 1):
            raise HTTPException(
                400, f"num_beams={gen_config.num_beams}: the answer of a beam search cannot be streamed"
            )
        self._sow()
        queue, streamer = super().generate_streaming(model, processor, inputs, gen_config, *args, **kw)
        return Shortened(queue, gen_config), streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kw: Any
    ) -> Any:
        """See transformers; a request ends when its client has gone, and lets the next one begin."""
        _follow(model, inputs, gen_config)
        gone = _Gone()
        watching = asyncio.create_task(gone.watch(_connection.get()))
        try:
            inputs = {**inputs, "stopping_criteria": StoppingCriteriaList([gone])}
            self._sow()
            text, *more = await super().generate_non_streaming(model, processor, inputs, gen_config, *args, **kw)
            return shortened(text, gen_config), *more
        finally:
            watching.cancel()

    def _sow(self) -> None:
        """Set the request's seed on the thread that generates, right before what is submitted to it next."""
        seed = asked_seed()
        if seed is not None:
            self.submit(torch.manual_seed, seed)


_connection: ContextVar[Callable[[], Awaitable[Any]] | None] = ContextVar("connection", default=None)
"""What the client of the present request sends."""


class Connections:
    """ASGI middleware: lets whoever generates see whether the client is still there.

    Args:
        app: The application.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        """Handle a request."""
        _connection.set(receive)
        await self.app(scope, receive, send)


class _Gone(StoppingCriteria):
    """Stops a generation once its client has gone."""

    def __init__(self) -> None:
        self.gone = False

    async def watch(self, receive: Callable[[], Awaitable[Any]] | None) -> None:
        """Wait until the client goes: the request has been read, nothing else can come."""
        while receive is not None and not self.gone:
            self.gone = (await receive())["type"] == "http.disconnect"

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Which rows are done."""
        return torch.full((input_ids.shape[0],), self.gone, device=input_ids.device, dtype=torch.bool)


CONTINUOUS_BATCHING = (
    "continuous batching keeps all requests in one paged cache of its own, which cannot hold compressed blocks: "
    "serve without it, or use 'transformers serve --continuous-batching'"
)


def _follow(model: PreTrainedModel, inputs: Any, config: Any) -> None:
    """Let a generation config say what its request asks for, or refuse it."""
    sampling = asks_for_sampling()
    if sampling is not None:  # transformers' server would do what the model's settings say, whatever the temperature
        config.do_sample = sampling
    if config.num_return_sequences not in (None, 1):
        raise HTTPException(400, f"num_return_sequences={config.num_return_sequences}: a request has one answer")
    config.return_dict_in_generate = False
    _refuse_other_caches(model, config)
    _keep_to_context(model, inputs, config)


def _refuse_other_caches(model: PreTrainedModel, config: Any) -> None:
    """Refuse a request whose generation config asks for a cache that would not be compressed."""
    if not is_enabled(model):
        return
    if config.cache_implementation not in (None, "hybrid"):
        raise HTTPException(400, f"cache_implementation={config.cache_implementation!r}: caches are compressed here")
    if config.use_cache is False:
        raise HTTPException(400, "use_cache=false: caches are compressed here")


def _keep_to_context(model: PreTrainedModel, inputs: Any, config: Any) -> None:
    """Refuse a prompt that leaves a model nothing to say, and let an answer end where its context does."""
    tokens = inputs["input_ids"].shape[-1]
    if not tokens:
        raise HTTPException(400, "the prompt is empty")
    most = compat.position_limit(model.config)
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    if not most or rope.get("rope_type") == "dynamic":  # which goes on beyond
        return
    if tokens >= most:
        raise HTTPException(400, f"the prompt has {tokens} tokens, this model's context {most}")
    if config.max_new_tokens is not None:
        config.max_new_tokens = min(config.max_new_tokens, most - tokens)
