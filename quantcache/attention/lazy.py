"""What ``update()`` returns: keys and values of full logical shape that hold no dense copy of the past.

Our attention function takes the :class:`CacheView` out of a :class:`LazyKV` and attends on codes. Any other consumer
(stock sdpa or eager attention, latent attention that expands its cache first, a user's own code) touches it as a tensor
and is served correct dense values through ``__torch_dispatch__``. So the cache is right with every attention
implementation, and economical with ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from quantcache.backends.view import CacheView
from quantcache.common.errors import QuantCacheError

_FROM_MEMORY = frozenset(
    {"__array__", "__deepcopy__", "__dlpack__", "__dlpack_device__", "__reduce_ex__", "__cuda_array_interface__"}
    | {"_typed_storage", "data", "data_ptr", "is_shared", "numpy", "storage", "tolist", "untyped_storage"}
)
"""What torch takes from a tensor's memory, without an operation that it would dispatch."""

_IN_PLACE = re.compile(
    r"(?!__)\w*[^_]_|__(i(add|and|div|floordiv|lshift|matmul|mod|mul|or|pow|rshift|sub|xor)|setitem)__"
)
"""Names of functions that change their first argument."""


class PackedTensor(torch.Tensor):
    """A tensor of what a layer has packed: it is read like any other, and refuses to be changed."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch.

        A new tensor that it gives is plain, a view refuses to be changed as well: the change would be lost.
        """
        kwargs = kwargs or {}
        name = _refuse_changes(func, args, kwargs)
        inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, PackedTensor)]
        with torch._C.DisableTorchFunctionSubclass():
            if name in _FROM_MEMORY:
                args, kwargs = tree_map(_plain, (args, kwargs))
            versions = [each._version for each in inputs if type(each) is DenseView and not each.is_inference()]
            result = func(*args, **kwargs)
            if isinstance(result, LazyKV) and result.guarded_:  # such as a cast to its own dtype
                result = func(*tree_map(_plain, args), **tree_map(_plain, kwargs))
            if versions != [each._version for each in inputs if type(each) is DenseView and not each.is_inference()]:
                raise _refusal(name)
            if isinstance(result, Tensor | tuple | list):
                result = tree_map(lambda each: _handed_out(each, inputs), result)
        return result


class DenseView(PackedTensor):
    """A view of dense keys or values, made on the fly."""


class LazyKV(PackedTensor):
    """Keys or values of a :class:`CacheView`: a tensor of shape ``[B, H, T, D]`` without storage.

    Valid until the next update of its layer.
    """

    view_: CacheView
    side_: str
    dense_: Tensor | None = None
    guarded_: bool = False

    @staticmethod
    def __new__(cls, view: CacheView, side: str, guarded: bool = False) -> LazyKV:
        """Make one.

        Args:
            view: What may be read.
            side: ``"key"`` or ``"value"``.
            guarded: Whether views of it must refuse to be changed, and the results of casts be plain: for users, not
                for a model's attention.
        """
        tail = view.key.tail if side == "key" else view.value.tail
        batch, heads, count, dim = tail.shape
        shape = (batch, heads, view.encoded_end + count, dim)
        lazy = Tensor._make_wrapper_subclass(cls, shape, dtype=tail.dtype, device=tail.device)
        torch._C._set_throw_on_mutable_data_ptr(lazy)  # to_dlpack() does not dispatch: it would give address 0
        lazy.view_, lazy.side_ = view, side
        if guarded:
            lazy.guarded_ = guarded
        return lazy

    def materialize(self) -> Tensor:
        """The dense tensor; made once, and kept only as long as this object.

        Returns:
            ``[B, H, T, D]`` in the model's dtype.
        """
        if self.dense_ is None:
            if self.guarded_:
                with torch.inference_mode(False), torch.no_grad():  # in inference mode nothing counts changes
                    dense = self.view_.dense(self.side_, by_kernels=True)
                    own = dense is not self.view_.side(self.side_).tail
                    self.dense_ = dense if own else dense.clone(memory_format=torch.contiguous_format)
            else:  # torch takes this object for a contiguous tensor, and a tail may have space behind each head
                self.dense_ = self.view_.dense(self.side_, by_kernels=True).contiguous()
            self.view_.touched.add(self.side_)
            if len(self.view_.touched) == 2 and self.view_.flush is not None:
                self.view_.flush()  # a stock consumer now has both: nothing else will tell the layer
        return self.dense_

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Serve any operation with the dense tensor."""
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)
        for place, argument in enumerate(schema.arguments if schema is not None and schema.is_mutable else ()):
            written = argument.alias_info is not None and argument.alias_info.is_write
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            if written and any(isinstance(each, LazyKV) for each in tree_leaves(value)):
                raise _refusal(str(func))
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyKV({self.side_}, shape={list(self.shape)}, dtype={self.dtype})"


def _refusal(name: str) -> QuantCacheError:
    return QuantCacheError(
        f"a spectral layer's keys and values are packed and cannot be changed in place ({name}): change a clone(), or "
        "DynamicCache(cache), which SpectralCache.from_dynamic_cache() packs again"
    )


def _refuse_changes(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Refuse a function that would change a packed tensor; otherwise give its name."""
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__", "__delete__"):  # of a property such as data or grad
        owner = getattr(getattr(func, "__self__", None), "__name__", name)
        name, changes = owner, name != "__get__"
    elif name == "requires_grad_":
        changes = isinstance(args[0], LazyKV) and (args[1:] or (kwargs.get("requires_grad", True),))[0]
    else:
        changes = _IN_PLACE.fullmatch(name) is not None or kwargs.get("inplace") is True
    targets = (args[:1] if changes else (), kwargs.get("out"))
    if any(isinstance(each, PackedTensor) for each in tree_leaves(targets)):
        raise _refusal(name)
    return name


def _plain(value: Any) -> Any:
    """A packed tensor's dense one; anything else as it is."""
    if isinstance(value, LazyKV):
        return value.materialize()
    return value.as_subclass(Tensor) if isinstance(value, DenseView) else value


def _handed_out(value: Any, inputs: list[PackedTensor]) -> Any:
    """A result as the caller gets it."""
    if not isinstance(value, Tensor) or isinstance(value, LazyKV):
        return value
    for each in inputs:
        if isinstance(each, LazyKV):
            memory = each.dense_ if each.guarded_ else None
            if value is memory:  # as from a cast to its own dtype: the caller's from now on
                each.dense_ = None
                return value
        else:
            memory = each
        if memory is not None and _address(value) == _address(memory) != 0:
            return value.as_subclass(DenseView)
    return value


def _address(tensor: Tensor) -> int:
    """Where a tensor's memory begins; 0 if it has none of its own."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # on the meta device, or inside a transform such as torch.func.grad
        return 0
