"""An Apple GPU that is not there: tensors that say they are on one, computed on the CPU, and no float64 among them.

What torch does for tensors of a subclass before it dispatches is not part of it: functions that ask for the device's
own events or guards find none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

APPLE = torch.device("mps", 0)
CPU = torch.device("cpu")


class AppleTensor(Tensor):
    """A tensor there; ``held`` has its elements."""

    held: Tensor
    device = property(lambda self: APPLE)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> AppleTensor:
        """Torch itself takes it for a tensor without elements."""
        form: Any = {"dtype": held.dtype, "device": "meta", "requires_grad": held.requires_grad}
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, held.stride(), held.storage_offset(), **form)

    def __init__(self, held: Tensor):
        if held.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        self.held = held

    def tolist(self) -> Any:
        """Torch refuses this of subclasses."""
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute."""
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation on the CPU; its results are there if its operands are, or if it is asked for them there."""
    given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, AppleTensor)]
    wanted = kwargs.get("device")
    there = bool(given) if wanted is None else torch.device(wanted).type in ("mps", "meta")

    def to_cpu(x: Any) -> Any:
        return x.held if isinstance(x, AppleTensor) else CPU if isinstance(x, torch.device) else x

    def to_apple(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        same = [each for each in given if each.held is x]
        return same[0] if same else AppleTensor(x)

    own_args, own_kwargs = tree_map(to_cpu, (args, kwargs))
    out = func(*own_args, **own_kwargs)
    return tree_map(to_apple, out) if there else out


class _Factories(TorchDispatchMode):
    """Operations without a tensor of ours among their operands."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute."""
        return _compute(func, args, kwargs or {})


class _Moves(TorchFunctionMode):
    """``Tensor.to``, which would look for the device before it dispatches."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Move there, or convert what is there."""
        kwargs = kwargs or {}
        if func is not Tensor.to:
            return func(*args, **kwargs)
        x, *rest = args
        found: dict[str, Any] = {}
        for each in (*rest, kwargs.get("device"), kwargs.get("dtype")):
            if isinstance(each, torch.dtype):
                found["dtype"] = each
            elif isinstance(each, str | torch.device):
                found["device"] = torch.device(each)
        device = found.get("device", x.device)
        if isinstance(x, AppleTensor) and found.get("dtype") == torch.float64:
            raise TypeError("float64 is asked for while the tensor is there, or on its way")
        if device.type != "mps":
            return func(x, *rest, **kwargs)
        moved = x if isinstance(x, AppleTensor) else AppleTensor(x.detach())
        return moved if found.get("dtype", x.dtype) == x.dtype else func(moved, found["dtype"])


@contextmanager
def apple_gpu() -> Iterator[None]:
    """Let there be one inside the context.

    Yields:
        Nothing.
    """
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) makes a tensor on the CPU and moves it
    try:
        with _Factories(), _Moves():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def move(model: nn.Module) -> None:
    """Move a model there, for good."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(AppleTensor(parameter.data), parameter.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = AppleTensor(buffer)
