"""What a compiled model sees of a cache: operators that take tokens and attend, and a length that is a tensor's size.

Traced as it is, a cache would be compiled anew for every block; called as it is, it would break the graph twice in each
layer. So while dynamo traces a model, a cache puts the operator ``update`` into the graph and returns a
:class:`TracedKV` for each side, and our attention function, given those, puts in ``attend``. When the graph runs, they
find the cache by its *handle* and do what is done without compiling. The graph holds no cache and no length: the next
token, the next block and the next cache run through the same one.

Any other reader of a :class:`TracedKV` gets the dense tensor, at the price of graph breaks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch._dynamo
from torch import Tensor

from quantcache.attention.lazy import LazyKV
from quantcache.common.errors import QuantCacheError

operators = torch.library.Library("quantcache", "DEF")
"""``quantcache::update`` and ``quantcache::attend``, implemented by those who do the work without compiling."""

# Both say that they change the handle, so that no compiler drops, merges or reorders them. They run outside of CUDA
# graphs, which would repeat a step with the addresses and lengths of the recorded one.
for _schema in (
    "update(Tensor(a!) handle, Tensor key, Tensor value, int layer) -> ()",
    "attend(Tensor(a!) handle, Tensor query, Tensor? mask, Tensor? shown, Tensor? positions, Tensor? s_aux, int layer, "
    "bool known, int value_dim, int groups, float? scaling, bool causal, float? softcap) -> Tensor",
):
    operators.define(_schema, tags=(torch.Tag.cudagraph_unsafe,))


@torch.library.register_fake("quantcache::update", lib=operators)
def _(handle: Tensor, key: Tensor, value: Tensor, layer: int) -> None:
    pass


@torch.library.register_fake("quantcache::attend", lib=operators)
def _(
    handle: Tensor,
    query: Tensor,
    mask: Tensor | None,
    shown: Tensor | None,
    positions: Tensor | None,
    s_aux: Tensor | None,
    layer: int,
    known: bool,
    value_dim: int,
    *settings: Any,
) -> Tensor:
    batch, heads, count, _ = query.shape
    return query.new_empty((batch, count, heads, value_dim))


def takes(*tensors: Tensor | None) -> bool:
    """Whether the operators, which know neither gradients nor autocast nor other kinds of tensors, may be given some.

    Args:
        tensors: Tensors of the model that is traced.

    Returns:
        True if so.
    """
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) is not Tensor
            or (tensor.requires_grad and torch.is_grad_enabled())
            or torch.is_autocast_enabled(tensor.device.type)
        ):
            return False
    return True


# ---------------------------------------------------------------------- handles

_caches: WeakValueDictionary[int, Any] = WeakValueDictionary()
_PAGE = torch.arange(1 << 16, dtype=torch.int64, device="cpu")  # every handle is one of its elements: none takes memory
_numbers = itertools.cycle(range(len(_PAGE)))


def handle_of(cache: Any) -> Tensor:
    """Make a cache known to the operators.

    Args:
        cache: The cache; it is not kept alive.

    Returns:
        Its handle, ``[1]`` int64 on the CPU.

    Raises:
        QuantCacheError: The process holds as many caches as there are handles.
    """
    number = next((each for each in itertools.islice(_numbers, len(_PAGE)) if each not in _caches), None)
    if number is None:
        raise QuantCacheError(f"a process may hold {len(_PAGE)} caches at once, and it does")
    _caches[number] = cache
    with torch.inference_mode(False):  # what is made in inference mode can only be changed there
        return _PAGE[number : number + 1]


def cache_of(handle: Tensor) -> Any:
    """Find the cache that a graph runs on.

    Args:
        handle: As :func:`handle_of` has made it.

    Returns:
        The cache.

    Raises:
        QuantCacheError: The cache has been freed.
    """
    cache = _caches.get(int(handle))
    if cache is None:
        raise QuantCacheError(f"a compiled graph asks for cache {int(handle)} of this process, which is gone")
    return cache


# ---------------------------------------------------------------------- symbolic lengths

_NO_ELEMENTS = torch.empty(1, 0, dtype=torch.int8, device="cpu")
_OFFSET = 2  # carriers are longer by this: sizes 0 and 1 are compiled for themselves


def symbolic_length(length: int) -> Tensor:
    """A length as a graph can read it without being compiled for it: as the size of a tensor, its carrier.

    Args:
        length: The length.

    Returns:
        A tensor without elements, ``[length + 2, 0]``.
    """
    carrier = _NO_ELEMENTS.expand(length + _OFFSET, 0)
    torch._dynamo.maybe_mark_dynamic(carrier, 0)
    return carrier


def length_of(carrier: Tensor) -> int:
    """The length that a carrier stands for.

    Args:
        carrier: As :func:`symbolic_length` has made it.

    Returns:
        The length, a symbol while a model is traced.
    """
    return carrier.shape[0] - _OFFSET


def extended_length(carrier: Tensor, count: int) -> Tensor:
    """A carrier for more tokens, made while a model is traced.

    Args:
        carrier: As :func:`symbolic_length` has made it.
        count: How many more.

    Returns:
        The longer one.
    """
    return _NO_ELEMENTS.expand(carrier.shape[0] + count, 0)


# ---------------------------------------------------------------------- keys and values


class TracedKV:
    """Keys or values of a layer while a model is traced. No tensor, but what reads it as one gets the dense tensor.

    Args:
        cache: The cache.
        layer: Index of the layer.
        side: ``"key"`` or ``"value"``.
        dim: Their last dimension.
        packed: Whether the layer is a spectral one.
        dense: The dense tensors of both sides once somebody has read one; keys and values share it.
    """

    def __init__(self, cache: Any, layer: int, side: str, dim: int, packed: bool, dense: dict[str, Tensor]) -> None:
        self.cache_, self.layer_, self.side_ = cache, layer, side
        self.dim_, self.packed_, self.dense_ = dim, packed, dense

    def materialize(self) -> Tensor:
        """The dense tensor, as of the first time that it is asked for.

        Returns:
            ``[B, H, T, D]`` in the model's dtype.
        """
        if not self.dense_:
            self.dense_["key"], self.dense_["value"] = _dense(self.cache_, self.layer_)
        return self.dense_[self.side_]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.materialize(), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch with the dense tensor."""
        return func(*map(_plain, args), **{name: _plain(value) for name, value in (kwargs or {}).items()})


def _forwarded(name: str) -> Callable[..., Any]:
    def operator(self: TracedKV, *args: Any) -> Any:
        return getattr(self.materialize(), name)(*map(_plain, args))

    return operator


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
for _name in (
    *("getitem", "len", "iter", "neg", "abs", "invert", "eq", "ne", "lt", "le", "gt", "ge"),
    *(prefix + name for name in _BINARY for prefix in ("", "r")),
):  # Python looks operators up in the class
    setattr(TracedKV, f"__{_name}__", _forwarded(f"__{_name}__"))


def _plain(value: Any) -> Any:
    return value.materialize() if isinstance(value, TracedKV) else value


@torch.compiler.disable
def _dense(cache: Any, layer: int) -> tuple[Tensor, ...]:
    return tuple(each.materialize() if isinstance(each, LazyKV) else each for each in cache.last_output(layer))


def untraced(key: Any, value: Any) -> tuple[Any, Any]:
    """What ``update`` would have returned in place of some keys and values.

    Args:
        key: Keys of any kind.
        value: Values of any kind.

    Returns:
        Tensors, lazy ones from a spectral layer.
    """
    if isinstance(key, TracedKV) and isinstance(value, TracedKV) and key.dense_ is value.dense_ and not key.dense_:
        keys, values = key.cache_.last_output(key.layer_)
        return keys, values
    return _plain(key), _plain(value)
