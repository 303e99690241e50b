"""Triton's interpreter without what takes it most of its time and changes nothing.

Run as a module it prints :func:`digest`, of the plain interpreter: so a test compares the two.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import Tensor

PLAIN = "QUANTCACHE_PLAIN_INTERPRETER"
"""Set in the environment, it leaves the interpreter as it is."""


@contextlib.contextmanager
def quick_interpreter() -> Iterator[None]:
    """Spare Triton's interpreter what takes it most of its time and changes nothing.

    It puts its own functions into ``triton.language`` before a kernel runs, and again before every function that a
    kernel calls, where they are already; and it makes a table of all dtypes whenever it looks one up. It computes
    whether any sum, difference or product of integers overflows, and does not look at what comes out. And for the
    result of every operation it makes the type, the shape and its sizes anew.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:  # no Triton here
        interpreter = None
    names = ("_patch_lang", "_get_np_dtype")
    if PLAIN in os.environ or not all(hasattr(interpreter, name) for name in names):
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
        builder = getattr(interpreter, "interpreter_builder", None)
        options = getattr(builder, "options", None)
        if dataclasses.is_dataclass(options) and not getattr(options, "debug", True):  # else it does look
            monkeypatch.setattr(builder, "options", dataclasses.replace(options, sanitize_overflow=False))
        if all(hasattr(language, name) for name in ("core", "semantic")):
            reuse_types(language, monkeypatch)
        yield


def reuse_types(language: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tensors and their types share what is the same for all of an element type and a shape.

    Args:
        language: ``triton.language``.
        monkeypatch: Undoes it.
    """
    core, semantic = language.core, language.semantic.TritonSemantic
    make_type, make_tensor, broadcast = core.block_type.__init__, core.tensor.__init__, semantic.broadcast_impl_value
    types = dict[tuple[int, ...], tuple[object, dict[str, Any]]]()
    shapes = dict[tuple[int, ...], Any]()
    tensors = dict[int, tuple[object, dict[str, Any]]]()

    def quick_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([each.value if isinstance(each, core.constexpr) else each for each in shape])
        key = (id(element_ty), *sizes)
        if key not in types:
            make_type(self, element_ty, shape)
            self.shape = shapes.setdefault(sizes, self.shape)
            types[key] = element_ty, dict(vars(self))  # what has the id is kept, or another might get it
        vars(self).update(types[key][1])

    def quick_tensor(self: Any, handle: Any, type: Any) -> None:
        shape = type.shape if type.is_block() else core.block_type
        if id(shape) not in tensors:
            make_tensor(self, handle, type)
            own = {"handle", "type", "dtype"}
            tensors[id(shape)] = shape, {name: each for name, each in vars(self).items() if name not in own}
        vars(self).update(tensors[id(shape)][1], handle=handle, type=type, dtype=type.scalar)

    def quick_broadcast(self: Any, one: Any, other: Any) -> tuple[Any, Any]:
        same = one.type.is_block() and other.type.is_block() and one.type.shape is other.type.shape
        return (one, other) if same else broadcast(self, one, other)

    monkeypatch.setattr(core.block_type, "__init__", quick_type)
    monkeypatch.setattr(core.tensor, "__init__", quick_tensor)
    monkeypatch.setattr(semantic, "broadcast_impl_value", quick_broadcast)


def digest() -> str:
    """What Triton's kernels make of a small case: codes, gains, attention and decoded keys."""
    from quantcache.attention.function import spectral_attention
    from tests.kernels.cases import BASE, PATHS, TRITON, fill, on_device

    found = hashlib.sha256()

    def add(tensor: Tensor) -> None:
        found.update(tensor.contiguous().float().cpu().numpy().tobytes())

    # Paths through a trellis are sought in plain torch: the interpreter takes long for them.
    for case, backend in ((dataclasses.replace(BASE, tokens=68), "triton"), (PATHS, "torch")):
        filled = fill(case, backend)
        view = on_device(filled.layer, TRITON).snapshot()
        for tensor in view.packed():
            add(tensor)
        add(spectral_attention(filled.query.to(TRITON.device), view, filled.mask))
        add(view.dense("key", by_kernels=True))
    return found.hexdigest()


if __name__ == "__main__":
    print(digest())
