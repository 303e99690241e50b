"""A decoding step never makes the CPU wait for the GPU, nor does a step that encodes.

Without a GPU the wrappers run with launches left out, on CPU tensors, under modes that see every call into torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import LlamaConfig

pytest.importorskip("triton")

from quantcache import SpectralCache
from quantcache.attention.function import spectral_attention_forward
from quantcache.cache import guards
from quantcache.cache.layer import SpectralLayer
from quantcache_kernels.cuda import codes, conversion
from quantcache_kernels.triton import attention, decode, encode, ops, runtime
from tests.builders import llama_config, scalar_calibration

WAITING = {
    "item", "__bool__", "__int__", "__float__", "__index__", "tolist", "numpy", "cpu", "nonzero", "unique", "equal",
    "allclose", "masked_select", "argwhere", "is_nonzero", "repeat_interleave",
}  # fmt: skip
"""Methods and functions whose answer the CPU has to wait for."""

COPYING = {"tensor", "as_tensor", "from_numpy"}
"""Functions that make a tensor of Python's numbers, which then goes to the GPU."""

WAITING_OPERATIONS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2"}


class Waited(AssertionError):
    """Something made the CPU wait."""


class FunctionWatch(TorchFunctionMode):
    """Refuses functions that wait."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the function's name, and at where a tensor is to go."""
        name = getattr(func, "__name__", "")
        if name in WAITING | COPYING:
            raise Waited(f"{name} waits for the GPU")
        if name == "to" and any(isinstance(arg, str | torch.device) for arg in (*args, *(kwargs or {}).values())):
            raise Waited("a tensor goes to another device")
        return func(*args, **(kwargs or {}))


class OperationWatch(TorchDispatchMode):
    """Refuses operations that wait, whoever asks for them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the operation's name, and at indices that are masks."""
        name = func.__name__.partition(".")[0]
        indices = args[1] if name in ("index", "index_put_", "_index_put_impl_") else ()
        if name in WAITING_OPERATIONS or any(i is not None and i.dtype == torch.bool for i in indices):
            raise Waited(f"{func} waits for the GPU")
        return func(*args, **(kwargs or {}))


class NoLaunch:
    """A kernel that is not launched."""

    def __getitem__(self, grid: Any) -> Any:
        """Any grid will do."""
        return lambda *args, **kwargs: None


@contextmanager
def watched() -> Iterator[None]:
    """Refuse whatever waits."""
    with OperationWatch(), FunctionWatch():
        yield


@dataclass
class Looks:
    """What was asked and answered.

    Attributes:
        step: Number of the step that is under way.
        ages: For every answer that was read, how many steps ago it was asked for.
    """

    step: int = 0
    ages: list[int] = field(default_factory=list)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    """Wrappers without launches, and looks ahead as on a GPU."""
    for module in (attention, encode, decode):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, NoLaunch())
    for name in ("attend", "encode_blocks"):
        monkeypatch.setattr(ops, name, getattr(ops, name)._init_fn)  # modes do not look into an operation
    monkeypatch.setattr(ops, "unavailable", lambda device: None)
    monkeypatch.setattr(runtime, "unavailable", lambda device: None)
    found, asked_in = Looks(), {}
    init, tolist = guards.AsyncReadback.__init__, guards.AsyncReadback.tolist

    def asked(self: guards.AsyncReadback, numbers: Tensor) -> None:
        init(self, numbers)
        asked_in[self] = found.step

    def answered(self: guards.AsyncReadback) -> list[Any]:
        found.ages.append(found.step - asked_in[self])
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            return tolist(self)

    monkeypatch.setattr(guards.AsyncReadback, "is_asynchronous", staticmethod(lambda device: True))
    monkeypatch.setattr(guards.AsyncReadback, "__init__", asked)
    monkeypatch.setattr(guards.AsyncReadback, "tolist", answered)
    return found


def step(
    looks: Looks,
    layers: list[SpectralLayer],
    config: LlamaConfig,
    count: int,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
) -> None:
    """A step of every layer, as a model takes it."""
    looks.step += 1
    heads, dim = config.num_key_value_heads, config.head_dim
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, 2  # type: ignore[assignment]
    for layer in layers:
        new = [torch.randn(batch, heads, count, dim, dtype=dtype) for _ in range(2)]
        query = torch.randn(batch, 2 * heads, count, dim, dtype=dtype)
        spectral_attention_forward(module, query, *layer.update(*new), None)


@pytest.mark.parametrize(("head_dim", "residual"), [(64, 64), (128, 1)])
def test_no_step_waits(looks: Looks, head_dim: int, residual: int) -> None:
    config = llama_config(head_dim)
    cache = SpectralCache(scalar_calibration(config), config, backend="triton", residual_length=residual)
    layers = cache.spectral_layers
    step(looks, layers, config, 68 + residual)  # tables are made, and go to the device
    step(looks, layers, config, 1)
    looks.ages.clear()
    with watched():
        for _ in range(66):
            step(looks, layers, config, 1)
    assert len(layers[0].spans) == 2
    assert len(looks.ages) == 3 * len(layers), "whether a block is finite, and how the last one's gains fit, by side"
    assert min(looks.ages) > 0, "an answer was read in the step that asked for it"


class LeftOut:
    """The CUDA kernels, none of which is launched."""

    launches = 0

    def __getitem__(self, name: str) -> LeftOut:
        """Any kernel."""
        return self

    def launch(self, *args: object) -> None:
        """Count."""
        self.launches += 1


def test_no_step_of_the_cuda_backend_waits(looks: Looks, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, config = LeftOut(), llama_config()
    for loaders in (codes.LOADERS, conversion.LOADERS):
        monkeypatch.setitem(loaders, "cpu", lambda *args: kernels)
    layers = SpectralCache(scalar_calibration(config), config, backend="cuda", residual_length=1).spectral_layers
    step(looks, layers, config, 69, dtype=torch.bfloat16)  # tables are made, and go to the device
    step(looks, layers, config, 1, dtype=torch.bfloat16)
    kernels.launches = 0
    with watched():
        for _ in range(66):
            step(looks, layers, config, 1, dtype=torch.bfloat16)
    assert len(layers[0].spans) == 2
    assert {layer.state.blocks.layout.name for layer in layers} == {"cuda"}
    attending = 66 * 3 * len(layers)
    assert kernels.launches == attending + 2 * len(layers), (
        "queries and other tokens, codes, merge; a block's tiles, by side"
    )


def test_several_tokens_at_once_do_not_wait_either(looks: Looks) -> None:
    config = llama_config()
    layers = SpectralCache(scalar_calibration(config), config, backend="triton").spectral_layers
    step(looks, layers, config, 132)
    step(looks, layers, config, 1)
    looks.ages.clear()
    with watched():
        for _ in range(14):
            step(looks, layers, config, 5)
    assert len(looks.ages) == 3 * len(layers)
    assert min(looks.ages) > 0


def test_what_is_not_finite_is_found_all_the_same(looks: Looks) -> None:
    config = llama_config()
    layer = SpectralCache(scalar_calibration(config), config, backend="triton").spectral_layers[1]
    step(looks, [layer], config, 140)
    tokens = [torch.randn(2, 2, 1, 64) for _ in range(2)]
    tokens[1][1, 0, 0, 3] = torch.nan
    layer.update(*tokens)  # token 140
    layer.flush()
    before = layer.get_seq_length()
    while layer.get_seq_length() < 4 + 3 * 64 + 64 - 1:
        step(looks, [layer], config, 1)
    assert layer.get_seq_length() > before
    with pytest.raises(guards.QuantCacheError, match=r"values that are not finite, first for token 140 of row 1"):
        step(looks, [layer], config, 1)
    assert len(layer.spans) == 2


def test_the_watch_sees_what_waits() -> None:
    x = torch.arange(3)
    for wait in (x.sum().item, x.tolist, x.cpu, x.nonzero, lambda: bool(x[0]), lambda: x[x > 1], lambda: x.to("cpu")):
        with pytest.raises(Waited), watched():
            wait()
