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
    whether any sum, difference or product of integers overflows, and does not look at what comes out. For the result
    of every operation it makes the type, the shape and its sizes anew. And before every operation it finds out which
    type both sides have to become and which shape, where they have them already or one is the number that it was.
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
            reuse_operands(language, monkeypatch)
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
    common = dict[tuple[int, int], tuple[object, object, list[int], Any]]()  # what has an id is kept here as well

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
        blocks = one.type.is_block(), other.type.is_block()
        if blocks == (True, True):
            key = id(one.shape), id(other.shape)
            if one.shape is other.shape:
                return one, other
            if key not in common:
                made = broadcast(self, one, other)
                if len(one.shape) == len(other.shape):
                    common[key] = one.shape, other.shape, [int(size) for size in made[0].shape], made[0].shape
                return made
            sizes, shape = common[key][2:]
            return widened(self, one, sizes, shape), widened(self, other, sizes, shape)
        if blocks == (True, False):
            return one, splat(self, other, one.shape)
        return (splat(self, one, other.shape), other) if blocks[1] else (one, other)

    def widened(self: Any, each: Any, sizes: list[int], shape: Any) -> Any:
        if each.shape is shape:
            return each
        return self.tensor(self.builder.create_broadcast(each.handle, sizes), core.block_type(each.dtype, shape))

    def splat(self: Any, each: Any, shape: Any) -> Any:
        type_ = core.block_type(each.dtype, shape)
        return self.tensor(self.builder.create_splat(type_, each.handle), type_)

    monkeypatch.setattr(core.block_type, "__init__", quick_type)
    monkeypatch.setattr(core.tensor, "__init__", quick_tensor)
    monkeypatch.setattr(semantic, "broadcast_impl_value", quick_broadcast)


def reuse_operands(language: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let both sides of an operation be as they are where nothing has to become of them, and keep what numbers become.

    Args:
        language: ``triton.language``, whose shapes :func:`reuse_types` shares.
        monkeypatch: Undoes it.
    """
    core, semantic = language.core, language.semantic.TritonSemantic
    tensor, constexpr = core.tensor, core.constexpr
    check, unwrap = semantic.binary_op_type_checking_impl, core._unwrap_if_constexpr
    integers = {id(language.int32), id(language.int64)}
    plain = {id(language.float32), *integers}  # these become no other type beside their like
    numbers = dict[tuple[object, ...], tuple[object, Any]]()

    def quick_check(self: Any, one: Any, other: Any, *more: Any, **named: Any) -> tuple[Any, Any]:
        kinds = type(one), type(other)
        if kinds == (tensor, tensor):
            as_it_is = one.dtype is other.dtype and id(one.dtype) in plain
            if not as_it_is and more == (True, True):  # a pointer and an offset may be added in either order
                as_it_is = id(other.dtype) in integers and one.dtype.is_ptr()
            return self.broadcast_impl_value(one, other) if as_it_is else check(self, one, other, *more, **named)
        at = kinds.index(tensor) if tensor in kinds else 0
        beside, number = (other, one) if at else (one, other)
        if type(beside) is not tensor or type(number) not in (int, float) or id(beside.dtype) not in plain:
            return check(self, one, other, *more, **named)
        if not number and type(number) is float:  # 0.0 and -0.0 are equal
            return check(self, one, other, *more, **named)
        key = (at, number, type(number), id(beside.dtype), id(beside.shape), more, *named.items())
        if key not in numbers:
            checked = check(self, one, other, *more, **named)
            if checked[at] is not beside:  # it has to become another type
                return checked
            numbers[key] = beside.shape, checked[1 - at]  # what has the id is kept, or another might get it
        kept = numbers[key][1]
        return (kept, beside) if at else (beside, kept)

    def quick_unwrap(each: Any) -> Any:
        kind = type(each)
        return each if kind is tensor or kind is int else each.value if kind is constexpr else unwrap(each)

    monkeypatch.setattr(semantic, "binary_op_type_checking_impl", quick_check)
    monkeypatch.setattr(core, "_unwrap_if_constexpr", quick_unwrap)


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
