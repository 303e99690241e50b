"""What the kernels' tests share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what the kernels' wrappers allocate, so that nothing unwritten goes unnoticed."""
    empty = torch.empty

    def filled(*args: object, **kwargs: object) -> Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 255 if tensor.dtype == torch.uint8 else 77)

    monkeypatch.setattr(torch, "empty", filled)


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """Spare Triton's interpreter what takes it a third of its time and changes nothing.

    It puts its own functions into ``triton.language`` before a kernel runs, and again before every function that a
    kernel calls, where they are already; and it makes a table of all dtypes whenever it looks one up.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:  # no Triton here
        interpreter = None
    names = ("_patch_lang", "_get_np_dtype")
    if not all(hasattr(interpreter, name) for name in names):
        yield
        return
    patch, look_up = (getattr(interpreter, name) for name in names)
    language = interpreter.tl
    own, done = language.load, set[int]()

    @functools.cache
    def modules_of(fn: Callable[..., Any]) -> frozenset[int]:
        return frozenset(id(each) for each in fn.__globals__.values() if each is language or each is language.core)

    def patch_once(fn: Callable[..., Any]) -> Any:
        if language.load is own:  # a launch begins, or one of Triton's own functions where tl is not patched yet
            done.clear()
        elif modules_of(fn) <= done:
            return None
        done.update(modules_of(fn))
        return patch(fn)

    known = functools.cache(look_up)

    def look_up_once(dtype: Any) -> Any:
        scalar = dtype.element_ty if isinstance(dtype, language.block_type) else dtype
        return look_up(dtype) if isinstance(scalar, language.pointer_type) else known(scalar)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
        monkeypatch.setattr(interpreter, "_get_np_dtype", look_up_once)
        yield
