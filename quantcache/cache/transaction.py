"""Changes to several layers at once: all of them or none, as another thread or a signal handler sees it."""

from __future__ import annotations

import copy
import operator
from collections import deque
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor

from quantcache.attention.traced import symbolic_length

_Object = TypeVar("_Object")


def shallow_copy(thing: _Object) -> _Object:
    """Another object with the attributes that this one has at one moment.

    Args:
        thing: A cache or a layer, which replaces its attributes and does not write to them.

    Returns:
        The copy.
    """
    new = object.__new__(type(thing))
    vars(new).update(vars(thing))  # one call into C, which no other thread can come between
    return new


def state_copy(thing: _Object) -> _Object:
    """Like :func:`shallow_copy`, of a layer that may write to dicts and lists among its attributes.

    Args:
        thing: A layer, which replaces its tensors and does not write to them.

    Returns:
        The copy, to be changed by itself.
    """
    new = shallow_copy(thing)
    vars(new).update({n: copy.copy(v) for n, v in vars(new).items() if isinstance(v, dict | list)})
    return new


def detached_copy(thing: _Object) -> _Object:
    """A deep copy without the graph that autograd may have of it: such tensors cannot be copied otherwise.

    Of a tensor that is a view the copy has its own elements only: a window does not keep the prompt it was cut from.

    Args:
        thing: A layer, or something that one holds.

    Returns:
        The copy.
    """
    found: deque[Any] = deque([thing, getattr(thing, "__dict__", None)])
    memo: dict[int, Any] = {}
    while found:
        each = found.popleft()
        if isinstance(each, dict):
            found.extend(each.values())
        elif isinstance(each, Tensor):
            memo[id(each)] = each.detach().clone()
    return copy.deepcopy(thing, memo)


def with_symbolic_length(layer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """A layer's new state with its T as graphs read it, if it is the layer that they ask.

    Args:
        layer: The layer, not yet changed.
        state: New attributes, to which this adds; its ``state`` is the layer's.

    Returns:
        ``state``.
    """
    if layer.symbolic_length is not None:
        state["symbolic_length"] = symbolic_length(state["state"].length)
    return state


def commit(things: Sequence[Any], states: Sequence[dict[str, Any]]) -> None:
    """Put new attributes in place: one call into C, which no signal handler and no other thread can come between.

    Args:
        things: Objects to change.
        states: New attributes of each.
    """
    targets = [vars(thing) for thing in things]
    replaced = [dict(target) for target in targets]  # kept: freeing them could run somebody's code in between
    deque(map(dict.update, targets, states), maxlen=0)
    del replaced


def is_unchanged(thing: Any, since: Any) -> bool:
    """Whether an object still has the attributes that :func:`state_copy` has found.

    Args:
        thing: Object that was copied.
        since: What :func:`state_copy` returned for it.

    Returns:
        True if every attribute is the same object, or a dict or list of the same objects.
    """
    now, then = dict(vars(thing)), vars(since)
    return now.keys() == then.keys() and all(_same(now[name], then[name]) for name in now)


def _same(now: Any, then: Any) -> bool:
    if isinstance(now, dict) and isinstance(then, dict):
        return now.keys() == then.keys() and all(value is then[name] for name, value in now.items())
    if isinstance(now, list) and isinstance(then, list):
        return len(now) == len(then) and all(map(operator.is_, now, then))
    return now is then
