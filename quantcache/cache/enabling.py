"""Compressed caches for every ``generate()`` of a model, without the caller passing one."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any

from transformers import Cache, PreTrainedModel

from quantcache.artifact import cache_layout
from quantcache.artifact.calibration import Calibration
from quantcache.attention.function import ATTENTION_NAME
from quantcache.attention.probe import attends
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.common import compat
from quantcache.common.errors import NothingToCompress

_lock = threading.Lock()

_HOOK = "_quantcache_generate"
"""Attribute of a model under which its stand-in is found again, whoever has wrapped ``generate`` since."""


@dataclass(eq=False)
class _Setting:
    """One ``enabled`` context, or ``enable``.

    Attributes:
        make: Gives an empty cache; None where the model's own is left to it.
        thread: The thread that entered the context; None for ``enable``, which is everybody's.
    """

    make: Callable[[], Cache] | None
    thread: int | None = field(default_factory=threading.get_ident)


class _Generate:
    """Stands in for a model's ``generate`` and passes a fresh cache where the caller passes none.

    Args:
        model: Model whose ``generate`` this replaces.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.replaced = vars(model).get("generate")  # somebody else's wrapper, if there is one
        self.original: Callable[..., Any] = model.generate  # type: ignore[assignment]
        self.attention = compat.attention_implementations(model)
        self.settings: list[_Setting] = []
        functools.update_wrapper(self, self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate."""
        setting = self.current()
        if setting is not None and setting.make is not None and self.wants_cache(args, kwargs):
            cache = setting.make()
            if self.drafts(args, kwargs):
                cache.activate_past_recording()  # as transformers does: rejected tokens must go, from windows too
            kwargs = {**kwargs, "past_key_values": cache}
        return self.original(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copied model generates as if nothing had been enabled on it."""
        copied = memo[id(self.model)]
        return MethodType(type(copied).generate, copied)

    def current(self) -> _Setting | None:
        """The setting in force: the innermost context of this thread, else the newest of all."""
        me = threading.get_ident()
        settings = self.settings
        own = [setting for setting in settings if setting.thread == me]
        return next(reversed(own or settings), None)

    def asked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[dict[str, Any]]:
        """What a call says, first what counts most: its arguments, its generation config, the model's."""
        bound = inspect.signature(self.original).bind_partial(*args, **kwargs).arguments
        given = {**bound, **bound.get("kwargs", {})}
        config = given.get("generation_config")
        return [given, {} if config is None else vars(config), vars(self.model.generation_config)]

    def drafts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call proposes tokens to another model, which may reject them."""
        return any(options.get("is_assistant") for options in self.asked(args, kwargs))

    def wants_cache(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call leaves it to us which cache is used."""
        asked = self.asked(args, kwargs)
        given = asked[0]
        if given.get("past_key_values") is not None:
            return False
        # transformers itself takes "hybrid", an old default of some models, for no choice at all.
        if any(options.get("cache_implementation") not in (None, "hybrid") for options in asked):
            return False
        return next((o["use_cache"] for o in asked if o.get("use_cache") is not None), True) is not False


def enable(
    model: PreTrainedModel,
    calibration: Calibration | str | Path | None = None,
    *,
    attention: bool = True,
    **options: Any,
) -> None:
    """Let every ``generate()`` of a model use a fresh SpectralCache, until :func:`disable`.

    A cache that the caller passes wins, and so do ``use_cache=False`` and ``cache_implementation=``. It works for
    whatever calls ``model.generate``, pipelines included, and in several threads at once: each call has its own cache.
    Enabling again replaces what was enabled before. A model with nothing to compress keeps its own cache, and a warning
    says why.

    Args:
        model: Model to change, in place.
        calibration: Its calibration, or a folder or Hub repository; None for caches that fit themselves to a prompt.
        attention: Also let a model that uses ``sdpa`` attend on codes, as ``attn_implementation="spectral"`` does.
        options: Arguments of :class:`SpectralCache`, such as ``bits``, ``residual_length`` or ``strict``.

    Raises:
        CalibrationMismatch: The calibration is for another geometry.
        UnsupportedModel: The model is an encoder-decoder.
    """
    setting = _Setting(_cache_maker(model, calibration, options, 3), thread=None)
    with _lock:
        hook = _hook(model, attention and setting.make is not None)
        hook.settings = [setting, *(each for each in hook.settings if each.thread is not None)]


def disable(model: PreTrainedModel) -> None:
    """Undo :func:`enable`; contexts of :func:`enabled` that are open stay as they are.

    Args:
        model: The model; nothing happens if nothing was enabled.
    """
    with _lock:
        hook = _find(model)
        if hook is not None:
            _remove(hook, [each for each in hook.settings if each.thread is None])


@contextlib.contextmanager
def enabled(
    model: PreTrainedModel,
    calibration: Calibration | str | Path | None = None,
    *,
    attention: bool = True,
    **options: Any,
) -> Iterator[PreTrainedModel]:
    """Let every ``generate()`` of a model use a fresh SpectralCache, inside the context.

    See :func:`enable` for what wins over it. Contexts nest. A thread that has entered a context of its own generates
    with that one; other threads, such as one that a streamer needs, with the newest.

    Args:
        model: Model to change, in place, until the context ends.
        calibration: Its calibration, or a folder or Hub repository; None for caches that fit themselves to a prompt.
        attention: Also let a model that uses ``sdpa`` attend on codes, as ``attn_implementation="spectral"`` does.
        options: Arguments of :class:`SpectralCache`, such as ``bits``, ``residual_length`` or ``strict``.

    Yields:
        The model.

    Raises:
        CalibrationMismatch: The calibration is for another geometry.
        UnsupportedModel: The model is an encoder-decoder.
    """
    setting = _Setting(_cache_maker(model, calibration, options, 4))  # contextlib is between
    with _lock:
        hook = _hook(model, attention and setting.make is not None)
        hook.settings = [*hook.settings, setting]
    try:
        yield model
    finally:
        with _lock:
            _remove(hook, [setting])


def _cache_maker(
    model: PreTrainedModel, calibration: Calibration | str | Path | None, options: dict[str, Any], frames: int
) -> Callable[[], Cache] | None:
    """Makes empty caches that share one allocation; bad options are refused here, not in the first request.

    A warning points at the caller, so many frames up.
    """
    try:
        cache_layout.compressible_layers(model.config)
    except NothingToCompress as reason:
        warnings.warn(f"nothing is enabled: {reason}", stacklevel=frames)
        return None
    if calibration is None:
        return SpectralCache.self_calibrating(model, **options).fork
    if isinstance(calibration, Calibration):
        return SpectralCache(calibration, model=model, **options).fork
    return SpectralCache.from_pretrained(calibration, model=model, **options).fork


def _find(model: PreTrainedModel) -> _Generate | None:
    """The model's stand-in, if it has one."""
    hook = vars(model).get(_HOOK)
    return hook if isinstance(hook, _Generate) else None


def _hook(model: PreTrainedModel, attention: bool) -> _Generate:
    """The model's stand-in, put in place if there is none yet."""
    hook = _find(model)
    if hook is None:
        hook = _Generate(model)
        vars(model).update({_HOOK: hook, "generate": hook})
    if attention and set(compat.attention_implementations(model).values()) == {"sdpa"}:
        compat.use_attention(model, ATTENTION_NAME)
        if not attends(model):
            compat.use_attention(model, hook.attention)
    return hook


def _remove(hook: _Generate, settings: list[_Setting]) -> None:
    """Take settings away; with the last one, put the model back as it was."""
    hook.settings = [each for each in hook.settings if each not in settings]
    if hook.settings:
        return
    attributes = vars(hook.model)
    attributes.pop(_HOOK)
    if attributes.get("generate") is hook:
        del attributes["generate"]
        if hook.replaced is not None:
            attributes["generate"] = hook.replaced
    compat.use_attention(hook.model, hook.attention)
