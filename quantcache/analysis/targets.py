"""Where a model's projections take their inputs: found by name and by running it once, fused ones and experts included.

A target is one distinct input. Projections that read the same tensor (queries, keys and values; gate and up) share one,
which is seen from the tensors themselves, so that any arrangement of them is right.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from quantcache.export.projections import ARCHITECTURES

INPUTS = ("qkv", "o", "gate_up", "down")
"""Kinds of weights' inputs, in the order of a layer."""

_QKV = {name for architecture in ARCHITECTURES.values() for name in architecture.inputs} | {
    *("query", "key", "value", "qkv", "in_proj", "W_pack", "q_lin", "k_lin", "v_lin"),
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
}
_OUT = {architecture.output for architecture in ARCHITECTURES.values()} | {"o_proj", "Wo", "wo", "out_lin"}
_UP = {
    *("gate_proj", "up_proj", "gate_up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h", "w1", "w3", "Wi", "lin1"),
    "intermediate.dense",
}
_DOWN = {"down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "w2", "Wo", "lin2", "output.dense"}


@dataclass(frozen=True)
class InputTarget:
    """One distinct input of weights.

    Attributes:
        layer: Layer index.
        kind: One of ``INPUTS``.
        module: Name of the module at which it is seen.
        projections: Names of the weights that read it, without the layer's part.
        dim: Its size.
        experts: Whether it is the input of the experts' down projections, seen inside the module.
    """

    layer: int
    kind: str
    module: str
    projections: tuple[str, ...]
    dim: int
    experts: bool = False


def _place(name: str) -> tuple[int, str] | None:
    """Layer index and the rest of a module's name."""
    match = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    return (int(match.group(1)), match.group(2)) if match else None


def _kind(rest: str) -> str | None:
    """What kind of input a module takes, from its name inside the layer."""
    parts = rest.split(".")
    leaf, pair = parts[-1], ".".join(parts[-2:])
    if any("att" in part.lower() for part in parts[:-1]):
        return "qkv" if leaf in _QKV else "o" if leaf in _OUT else None
    names = {leaf, pair}
    return "gate_up" if names & _UP else "down" if names & _DOWN else None


def _is_projection(module: nn.Module) -> bool:
    """Whether a module multiplies by a matrix, whatever its class: Linear, Conv1D, a quantized one."""
    return hasattr(module, "weight") and not list(module.children()) and "Norm" not in type(module).__name__


def _is_experts(module: nn.Module) -> bool:
    """Whether a module keeps the weights of all its experts as one tensor."""
    weights = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    return all(isinstance(weight, Tensor) and weight.ndim == 3 for weight in weights)


def find_inputs(model: PreTrainedModel, run: Callable[[], Any]) -> list[InputTarget]:
    """Find every distinct input of a model's projections.

    Args:
        model: The model.
        run: Runs the model on a few tokens.

    Returns:
        The inputs by layer, in the order of ``INPUTS``.
    """
    seen: list[tuple[int, str, str, str, Tensor]] = []  # layer, kind, module, rest of the name, input
    experts: list[InputTarget] = []
    handles = []
    for name, module in model.named_modules():
        place = _place(name)
        if place is None:
            continue
        layer, rest = place
        if _is_experts(module):
            kind: str | None = "gate_up"
            weight: Tensor = module.down_proj
            gate_up: Tensor = module.gate_up_proj
            dim = next(size for size in weight.shape[1:] if 2 * size in gate_up.shape[1:])
            experts.append(InputTarget(layer, "down", name, (f"{rest}.down_proj",), dim, experts=True))
            rest = f"{rest}.gate_up_proj"
        else:
            kind = _kind(rest) if _is_projection(module) else None
        if kind is None:
            continue

        def hook(_: nn.Module, args: Any, found: tuple[int, str, str, str] = (layer, kind, name, rest)) -> None:
            if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
                seen.append((*found, args[0]))  # kept alive, so that no other input gets its address

        handles.append(module.register_forward_pre_hook(hook))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[tuple[int, int, int], list[tuple[int, str, str, str, Tensor]]] = {}
    for entry in seen:
        x = entry[-1]
        groups.setdefault((entry[0], x.data_ptr(), x.numel()), []).append(entry)
    found = [
        InputTarget(
            members[0][0], members[0][1], members[0][2], tuple(dict.fromkeys(m[3] for m in members)), x.shape[-1]
        )
        for members in groups.values()
        if (x := members[0][-1]).numel()
    ]
    return sorted([*found, *experts], key=lambda t: (t.layer, INPUTS.index(t.kind)))


class _ExpertInputs(TorchFunctionMode):
    """Hands the inputs of the experts' down projections to a callback.

    Experts multiply by slices of one tensor, of which hooks see nothing; the products inside the module with a matrix
    of the down projection's shape are theirs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[tuple[torch.Size, Callable[[Tensor], None]]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        products = (nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__)
        if self.inside and function in products and len(args) > 1:
            shape, callback = self.inside[-1]
            if args[1].shape == shape:
                callback(args[0])
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def observed_inputs(
    model: PreTrainedModel, targets: list[InputTarget], on_input: Callable[[InputTarget, Tensor], None]
) -> Iterator[None]:
    """Hand the inputs of projections to a callback, inside the context.

    Args:
        model: The model.
        targets: What to look at.
        on_input: Called with the target and its input, ``[..., D]``.

    Yields:
        Nothing.
    """
    modules = dict(model.named_modules())
    mode = _ExpertInputs()
    handles = []
    for target in targets:
        module = modules[target.module]
        if not target.experts:

            def hook(_: nn.Module, args: Any, target: InputTarget = target) -> None:
                on_input(target, args[0])

            handles.append(module.register_forward_pre_hook(hook))
            continue

        def enter(module: Any, args: Any, target: InputTarget = target) -> None:
            mode.inside.append((module.down_proj.shape[1:], lambda x: on_input(target, x)))

        def leave(*_: Any) -> None:
            mode.inside.pop()

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    previous = model.get_experts_implementation() if any(t.experts for t in targets) else None
    try:
        if previous is not None:
            model.set_experts_implementation("eager")  # the others multiply by all experts' weights at once
        with mode if any(t.experts for t in targets) else contextlib.nullcontext():
            yield
    finally:
        if previous is not None:
            model.set_experts_implementation(previous)
        for handle in handles:
            handle.remove()
