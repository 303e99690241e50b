"""Compressed caches for every ``generate()`` of a model, without the caller passing one."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsIndex

from transformers import PreTrainedModel

from quantcache.artifact import cache_layout
from quantcache.artifact.calibration import Calibration
from quantcache.artifact.finding import NothingFound, find_calibration
from quantcache.attention.probe import attend_on_codes
from quantcache.cache.prefixes import PrefixStore
from quantcache.cache.requests import Listener, Reuse
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.common import compat, processes
from quantcache.common.errors import NothingToCompress, QuantCacheError, UnsupportedModel

logger = logging.getLogger(__name__)

_lock = processes.lock()

_entered: contextvars.ContextVar[tuple[object, ...]] = contextvars.ContextVar("quantcache_enabled", default=())
"""Marks of the ``enabled`` contexts that are open around the code that runs: tasks of one thread have their own."""

_HOOK = "_quantcache_generate"
"""Attribute of a model under which its stand-in is found again, whoever has wrapped ``generate`` since."""


@dataclass(eq=False)
class _Setting:
    """One ``enabled`` context, or ``enable``.

    Attributes:
        thread: The thread that entered the context; None for ``enable``, which is everybody's.
        make: Gives an empty cache; None where the model's own is left to it.
        calibration: What it is compressed with, at its bits; None where caches fit themselves to a prompt.
        reuse: Where the caches of earlier calls are, if they are kept.
        mark: What stands for it in :data:`_entered`, which may outlive it: nothing that keeps a model alive.
    """

    thread: int | None
    make: Callable[[], SpectralCache] | None = None
    calibration: Calibration | None = None
    reuse: Reuse | None = None
    mark: object = field(default_factory=object)


class _Generate:
    """Stands in for a model's ``generate`` and passes a fresh cache where the caller passes none.

    Args:
        model: Model whose ``generate`` this replaces.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.replaced = vars(model).get("generate")  # somebody else's wrapper, if there is one
        self.original: Callable[..., Any] = model.generate  # type: ignore[assignment]
        self.switched: tuple[dict[str, str], dict[str, str]] | None = None  # attention before, and what took its place
        self.settings: list[_Setting] = []
        functools.update_wrapper(self, self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate."""
        setting = self.current()
        if setting is None or setting.make is None or not _wants_cache(asked := self.asked(args, kwargs)):
            return self.original(*args, **kwargs)
        if setting.reuse is not None:
            prompt = setting.reuse.prompt(asked)
            if prompt is not None:
                return self.go_on(prompt, setting.reuse, setting.make, args, kwargs)
        cache = setting.make()
        if any(options.get("is_assistant") for options in asked):
            cache.activate_past_recording()  # as transformers does: rejected tokens must go, from windows too
        return self.original(*args, **{**kwargs, **compat.generate_argument(cache)})

    def go_on(
        self,
        prompt: list[int],
        reuse: Reuse,
        make: Callable[[], SpectralCache],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Generate from the cache of an earlier call that began alike, and keep what this one leaves."""
        cache, tokens = reuse.begin(prompt), list(prompt)
        if cache is None:
            cache = make()
        if kwargs.get("streamer") is not None:
            kwargs = {**kwargs, "streamer": Listener(kwargs["streamer"], tokens)}
        try:
            output = self.original(*args, **{**kwargs, **compat.generate_argument(cache)})
            found = getattr(output, "sequences", output)[0].tolist()
            # A generate() of the model's own, or around it, may leave the prompt out of what it gives.
            tokens = found if found[: len(prompt)] == prompt else list(prompt)
            return output
        finally:
            reuse.keep(tokens, cache)

    def attributes(self) -> dict[str, Any]:
        """What stands in the model's own place while something is enabled on it."""
        return {_HOOK: self, "generate": self, "__getstate__": self.state}

    def state(self) -> dict[str, Any]:
        """The model's attributes as copies of it get them: those generate as their class does."""
        state = {name: value for name, value in vars(self.model).items() if name not in self.attributes()}
        return {**state, _HOOK: _Trace(self)}  # the last: they are copied in their order

    def current(self) -> _Setting | None:
        """The setting in force: the innermost context of this task, else of this thread, else the newest of all."""
        me, marks = threading.get_ident(), _entered.get()
        settings = self.settings
        own = [setting for setting in settings if setting.mark in marks]
        own = own or [setting for setting in settings if setting.thread == me]
        return next(reversed(own or settings), None)

    def asked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[dict[str, Any]]:
        """What a call says, first what counts most: its arguments, its generation config, the model's."""
        signature = inspect.signature(self.original)
        several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)  # whatever they are called
        bound = signature.bind_partial(*args, **kwargs).arguments.items()
        given = {**{name: each for name, each in bound if signature.parameters[name].kind not in several}, **kwargs}
        config = given.get("generation_config")
        return [given, {} if config is None else vars(config), vars(self.model.generation_config)]


class _Trace:
    """What a copy of a model has in place of the stand-in.

    A shallow copy shares the model's config, and with it attention on codes while something is enabled on the model; a
    deep copy gets back the attention of before.

    Args:
        hook: The stand-in.
    """

    def __init__(self, hook: _Generate):
        self.hook = hook

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        config, switched = memo.get(id(self.hook.model.config)), self.hook.switched
        if config is not None and switched is not None and compat.attention_implementations(config) == switched[1]:
            config._attn_implementation = switched[0]

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        if self.hook.settings:
            raise QuantCacheError(
                "a model whose generate() is enabled cannot be pickled: call quantcache.disable(model) first"
            )
        return type(None), ()  # a copy of a model on which nothing is enabled any more


def _wants_cache(asked: list[dict[str, Any]]) -> bool:
    """Whether a call of which :meth:`_Generate.asked` is known leaves it to us which cache is used."""
    if compat.given_cache(asked[0]) is not None or any(map(_other_cache, asked)):
        return False
    return next((o["use_cache"] for o in asked if o.get("use_cache") is not None), True) is not False


def _other_cache(options: dict[str, Any]) -> bool:
    """Whether options ask for a cache of transformers' own; it takes "hybrid", an old default, for no choice itself."""
    return options.get("cache_implementation") not in (None, "hybrid")


def enable(
    model: PreTrainedModel,
    calibration: Calibration | str | Path | None = None,
    *,
    attention: bool = True,
    prefixes: PrefixStore | None = None,
    hub: bool = False,
    **options: Any,
) -> Calibration | None:
    """Let every ``generate()`` of a model use a fresh SpectralCache, until :func:`disable`.

    A cache that the caller passes wins, and so do ``use_cache=False`` and ``cache_implementation=``. It works for
    whatever calls ``model.generate``, pipelines included, and in several threads at once: each call has its own cache.
    Enabling again replaces what was enabled before. A model with nothing to compress keeps its own cache, and a warning
    says why.

    Args:
        model: Model to change, in place.
        calibration: Its calibration, or a folder or Hub repository. None takes the one that comes with quantcache for
            a model of this id, or lies in the model's folder; where there is none, caches fit themselves to a prompt.
        attention: Also let a model that uses ``sdpa`` attend on codes, as ``attn_implementation="spectral"`` does.
        prefixes: Where caches of earlier calls are kept: a call that begins like one of them reads only the rest.
        hub: Without ``calibration``, also look on the Hub, and refuse to go on if there is none.
        options: Arguments of :class:`SpectralCache`, such as ``bits``, ``quality`` or ``strict``. Caches that fit
            themselves to a prompt take of the bits only ``bits``.

    Returns:
        The calibration in use, at its bits; None if caches fit themselves to a prompt or nothing is compressed. One
        that was found is also named in the log, at INFO.

    Raises:
        ArtifactError: None was found although ``hub`` or ``quality`` asks for one, or it is damaged.
        CalibrationMismatch: The calibration is for another geometry, or with ``strict`` for another model.
        QuantCacheError: The calibration predicts nothing that ``quality`` could go by; or prefixes are to be kept, and
            caches fit themselves to a prompt, or the model's weights are not in memory.
        TypeError: The model is only named and not loaded, or an option is unknown or of the wrong kind.
        UnsupportedModel: The model is an encoder-decoder or does not generate, only parts of it read text, or its
            prefixes cannot be kept.
        ValueError: An option is out of range.
    """
    setting = _setting(None, model, calibration, attention, hub, options, prefixes, 3)
    with _lock:
        hook = _hook(model, attention and setting.make is not None)
        hook.settings = [setting, *(each for each in hook.settings if each.thread is not None)]
    return setting.calibration


def disable(model: PreTrainedModel) -> None:
    """Undo :func:`enable`; contexts of :func:`enabled` that are open stay as they are.

    Args:
        model: The model; nothing happens if nothing was enabled.
    """
    with _lock:
        hook = _find(model)
        if hook is not None:
            _remove(hook, [each for each in hook.settings if each.thread is None])


def is_enabled(model: PreTrainedModel) -> bool:
    """Whether calls of ``generate()`` in this thread get a compressed cache.

    Args:
        model: The model.

    Returns:
        True if so.
    """
    hook = _find(model)
    setting = None if hook is None else hook.current()
    return setting is not None and setting.make is not None


@contextlib.contextmanager
def enabled(
    model: PreTrainedModel,
    calibration: Calibration | str | Path | None = None,
    *,
    attention: bool = True,
    prefixes: PrefixStore | None = None,
    hub: bool = False,
    **options: Any,
) -> Iterator[PreTrainedModel]:
    """Let every ``generate()`` of a model use a fresh SpectralCache, inside the context.

    Arguments, errors and what wins over it are those of :func:`enable`. Contexts nest. A thread or asyncio task that
    has entered a context of its own generates with that one, in ``asyncio.to_thread`` too; other threads, such as one
    that a streamer needs, with the newest.

    Yields:
        The model.
    """
    thread = threading.get_ident()
    setting = _setting(thread, model, calibration, attention, hub, options, prefixes, 4)  # contextlib is between
    hook: _Generate | None = None
    try:
        with _lock:
            hook = _hook(model, attention and setting.make is not None)
            hook.settings = [*hook.settings, setting]
        _entered.set((*_entered.get(), setting.mark))
        yield model
    finally:
        # Not by a token: the context may be left elsewhere than it was entered.
        _entered.set(tuple(mark for mark in _entered.get() if mark is not setting.mark))
        with _lock:
            hook = hook or _find(model)  # Ctrl-C may have come before there was one
            if hook is not None:
                _remove(hook, [setting])


def _setting(
    thread: int | None,
    model: PreTrainedModel,
    calibration: Calibration | str | Path | None,
    attention: bool,
    hub: bool,
    options: dict[str, Any],
    prefixes: PrefixStore | None,
    frames: int,
) -> _Setting:
    """A setting whose caches share one allocation; bad options are refused here, not in the first request.

    A warning points at the caller, so many frames up.
    """
    if isinstance(model, str | Path):  # anything with a generate() may be enabled, in whatever wrapper
        compat.require_loaded(model, "enable")
    if not isinstance(attention, bool):  # a name of one would let the model attend on codes all the same
        raise TypeError(f"attention must be True or False, got {attention!r}")
    if not hasattr(model, "generate"):
        around = next((f".{name}" for name in ("module", "model") if hasattr(getattr(model, name, 0), "generate")), "")
        inside = f"the model inside, {around}" if around else "one with a language modelling head"
        raise UnsupportedModel(f"a {type(model).__name__} has no generate(): give {inside}")
    try:
        cache_layout.compressible_layers(model.config)
    except NothingToCompress as reason:
        warnings.warn(f"nothing is enabled: {reason}", stacklevel=frames)
        return _Setting(thread)
    compat.require_forward(model)
    _warn_of_own_settings(model, frames + 1)
    empty = _empty_cache(model, _found(model, hub, options) if calibration is None else calibration, options)
    reuse = None if prefixes is None else Reuse(prefixes, empty, model)
    return _Setting(thread, empty.fork, empty.calibration, reuse)


def _warn_of_own_settings(model: PreTrainedModel, frames: int) -> None:
    """Say so where a model's own settings, often left from training, let no request be compressed."""
    own = vars(model.generation_config)
    for name, wins in (("use_cache", own.get("use_cache") is False), ("cache_implementation", _other_cache(own))):
        if wins:
            warnings.warn(
                f"model.generation_config has {name}={own[name]!r}, which wins over what is enabled: nothing is "
                f"compressed. Set model.generation_config.{name} = None",
                stacklevel=frames,
            )


def _found(model: PreTrainedModel, hub: bool, options: dict[str, Any]) -> Calibration | None:
    """The calibration of a model for which the caller names none; None if caches are to fit themselves to a prompt."""
    try:
        found = find_calibration(model, hub=hub)
    except NothingFound as reason:
        if hub or options.get("quality") is not None:
            raise
        logger.warning("%s. Until then every cache fits itself to its prompt, at lower fidelity", reason)
        return None
    logger.info("calibration: %s, %r", found.source, found.calibration)
    return found.calibration


def _empty_cache(
    model: PreTrainedModel, calibration: Calibration | str | Path | None, options: dict[str, Any]
) -> SpectralCache:
    """A cache as every call gets it."""
    if calibration is None:
        # None stands for what the calibration says, and strict is of another model's: here there is neither.
        given = {name: value for name, value in options.items() if value is not None and name != "strict"}
        return SpectralCache.self_calibrating(model, **given)
    if isinstance(calibration, Calibration):
        return SpectralCache(calibration, model=model, **options)
    return SpectralCache.from_pretrained(calibration, model=model, **options)


def _find(model: PreTrainedModel) -> _Generate | None:
    """The stand-in of a model, or of the one that torch.compile's or PEFT's wrapper is around."""
    hook = getattr(model, _HOOK, None)
    return hook if isinstance(hook, _Generate) else None


def _hook(model: PreTrainedModel, attention: bool) -> _Generate:
    """The model's stand-in, put in place if there is none yet."""
    # The model inside of PEFT's wrapper is what merge_and_unload() gives back, and what the wrapper generates with.
    hook = _find(model) or _Generate(compat.unwrapped(model))
    if attention:
        hook.switched = attend_on_codes(model) or hook.switched
    if _find(model) is None:
        vars(hook.model).update(hook.attributes())
    return hook


def _remove(hook: _Generate, settings: list[_Setting]) -> None:
    """Take settings away; with the last one, put the model back as it was."""
    hook.settings = [each for each in hook.settings if each not in settings]
    if hook.settings:
        return
    attributes = vars(hook.model)
    del attributes[_HOOK], attributes["__getstate__"]
    if attributes.get("generate") is hook:
        del attributes["generate"]
        if hook.replaced is not None:
            attributes["generate"] = hook.replaced
    if hook.switched is not None:
        before, after = hook.switched
        if compat.attention_implementations(hook.model.config) == after:  # else somebody has chosen another since
            compat.use_attention(hook.model, before)
