"""Registers the attention ``"spectral"`` as soon as transformers' model code is loaded, and loads none of it itself."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

ATTENTION_NAME = "spectral"

AWAITED = "transformers.modeling_utils"
"""The module that holds the table of attention functions; every model imports it."""


class _ThenRegister(importlib.abc.Loader):
    """Runs a module as its own loader does, then registers the attention."""

    def __init__(self, loader: importlib.abc.Loader):
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader  # for whoever asks the module for its source
        self.loader.exec_module(module)
        _register()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the awaited module where the other finders do, and nothing else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


def register_when_loaded() -> None:
    """Register ``"spectral"`` now if transformers' model code is loaded, else right after it has been."""
    if AWAITED in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    # Some module of quantcache may be the one that imports transformers just now, so none can be imported here.
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, _attend)
    AttentionMaskInterface.register(ATTENTION_NAME, _mask)


def _attend(*args: Any, **kwargs: Any) -> Any:
    """Call the attention function, which takes this one's place."""
    return _attention().spectral_attention_forward(*args, **kwargs)


def _mask(*args: Any, **kwargs: Any) -> Any:
    """Call the function that makes its masks, which takes this one's place."""
    return _attention().spectral_mask(*args, **kwargs)


def _attention() -> Any:
    """Import the module of both and register what it holds."""
    attention = importlib.import_module("quantcache.attention.function")  # a later tier, which may not be loaded yet
    attention.register_attention()
    return attention
