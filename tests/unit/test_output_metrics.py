"""The values' metric from output projections of every form: plain, quantized, adapted, offloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantcache import SpectralCache
from quantcache.attention.output_metrics import output_metrics
from quantcache.calibration.calibrator import calibrate
from tests.families import FAMILIES, OTHERS, random_tokens

HEADS, DIM, HIDDEN = 2, 8, 24


class _Attention(nn.Module):
    """An attention module with nothing but its output projection."""

    def __init__(self, projection: nn.Module, index: int = 0):
        super().__init__()
        self.layer_idx, self.o_proj = index, projection


class _Coded(Tensor):
    """A weight of a quantization library: it says it is float32, and computes nothing but products."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse conversions."""
        if getattr(func, "__name__", "") in ("double", "to", "type"):
            raise ValueError("this weight cannot be converted")
        if getattr(func, "__name__", "") in ("detach", "requires_grad_"):
            return super().__torch_function__(func, types, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class _Int8(nn.Module):
    """A projection that stores codes and scales under other names."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.scale = nn.Buffer(weight.abs().amax(1, keepdim=True) / 127)
        self.qweight = nn.Buffer((weight / self.scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ."""
        return x @ (self.qweight * self.scale).T


class _Scaled(nn.Linear):
    """A projection whose weight alone is not what it multiplies by, as with float8 and its scales."""

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ times a scale."""
        return 3 * super().forward(x)


class _Adapted(nn.Module):
    """A projection with an adapter, as PEFT's LoRA wraps it; its weight is the base's."""

    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor):
        super().__init__()
        self.base, self.a, self.b = base, nn.Parameter(a), nn.Parameter(b)
        self.in_features, self.dropout = base.in_features, nn.Dropout(0.5)

    @property
    def weight(self) -> Tensor:
        """The base's weight."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """x (W + BA)ᵀ."""
        return self.base(x) + self.dropout(x) @ self.a.T @ self.b.T


def _linear(weight: Tensor, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    layer.weight.data = weight
    return layer


def _conv(weight: Tensor) -> nn.Module:
    layer = Conv1D(weight.shape[0], weight.shape[1])
    layer.weight.data = weight.T.contiguous()
    return layer


def _coded(weight: Tensor) -> nn.Module:
    layer = _linear(weight)
    layer.weight = nn.Parameter(weight.as_subclass(_Coded), requires_grad=False)
    return layer


def _meta(weight: Tensor) -> nn.Module:
    """Weights that are elsewhere until the layer runs, as accelerate offloads them."""
    layer = _linear(weight, bias=False)
    layer.weight = nn.Parameter(weight.to("meta"), requires_grad=False)
    layer.anchor = nn.Buffer(torch.zeros(1))

    def fetch(module: Any, args: Any) -> None:
        module.weight = nn.Parameter(weight, requires_grad=False)

    layer._hf_hook = type("Hook", (), {"execution_device": "cpu"})()  # type: ignore[assignment]
    layer.register_forward_pre_hook(fetch)
    return layer


def _scaled(weight: Tensor) -> nn.Module:
    layer = _Scaled(weight.shape[1], weight.shape[0])
    layer.weight.data = weight / 3
    return layer


def _adapted(weight: Tensor) -> nn.Module:
    a, b = torch.randn(3, weight.shape[1]), torch.randn(weight.shape[0], 3)
    return _Adapted(_linear(weight - b @ a), a, b)


def _expected(weight: Tensor) -> Tensor:
    """Σ W_O,hᵀ W_O,h, spelt out."""
    parts = weight.double().split(DIM, dim=1)
    group = len(parts) // HEADS
    return torch.stack([sum(p.T @ p for p in parts[h * group : (h + 1) * group]) for h in range(HEADS)])  # type: ignore[misc]


@pytest.mark.support("quantized, adapted and offloaded weights")
@pytest.mark.parametrize("make", [_linear, _conv, _coded, _meta, _scaled, _adapted, _Int8], ids=lambda f: f.__name__)
@pytest.mark.parametrize("group", [1, 3])
def test_every_form_of_a_projection_gives_its_metric(make: Callable[[Tensor], nn.Module], group: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(HIDDEN, group * HEADS * DIM)
    projection = make(weight)
    if make is _Int8:
        weight = projection.qweight * projection.scale  # type: ignore[operator, assignment]
    model: Any = _Attention(projection)
    expected = _expected(weight)
    found = output_metrics(model, {0: (HEADS, DIM)})[0]
    assert found.dtype == torch.float64
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert projection.training  # as it was


@pytest.mark.support("quantized, adapted and offloaded weights")
def test_a_projection_that_cannot_be_seen_is_warned_of() -> None:
    class Broken(nn.Module):
        in_features = HEADS * DIM

        def forward(self, x: Tensor) -> Tensor:
            """Refuse."""
            raise RuntimeError("no kernel for this device")

    for projection in (Broken(), nn.Identity(), _linear(torch.randn(HIDDEN, HEADS * DIM + 1))):
        model: Any = _Attention(projection)
        with pytest.warns(UserWarning, match=r"no output projection found in layers \[0\]"):
            assert not output_metrics(model, {0: (HEADS, DIM)})


def test_memory_that_has_run_out_is_no_missing_projection() -> None:
    class Large(_Int8):
        def forward(self, x: Tensor) -> Tensor:
            """Ask for too much."""
            raise torch.OutOfMemoryError("simulated")

    model: Any = _Attention(Large(torch.randn(HIDDEN, HEADS * DIM)))
    with pytest.raises(torch.OutOfMemoryError):
        output_metrics(model, {0: (HEADS, DIM)})


def test_latent_attention_has_no_metric_even_where_sizes_would_fit() -> None:
    module: Any = _Attention(_linear(torch.randn(HIDDEN, HEADS * DIM)))
    module.kv_b_proj = nn.Linear(4, 4)
    with pytest.warns(UserWarning, match="no output projection found"):
        assert not output_metrics(module, {0: (1, DIM)})


@pytest.mark.support("quantized, adapted and offloaded weights")
@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon-mqa"])
def test_quantized_models_calibrate_themselves(name: str) -> None:
    model = next(family for family in (*FAMILIES, *OTHERS) if str(family) == name).make(attention="sdpa")
    for module in model.modules():
        for child, layer in list(module.named_children()):
            if type(layer) is nn.Linear and "head" not in child:
                setattr(module, child, _WithBias(layer))
    cache = SpectralCache.self_calibrating(model, residual_length=0)
    with torch.no_grad():
        model(random_tokens(1, 100), past_key_values=cache)
        model(random_tokens(1, 1), past_key_values=cache)
    assert all(layer.spans for layer in cache.spectral_layers)
    if name == "llama":
        calibrate(model, random_tokens(1, 100), metric="query", progress=False)


class _WithBias(_Int8):
    """A quantized layer in place of a model's own."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.weight.detach())
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ + b."""
        return super().forward(x) + (0 if self.bias is None else self.bias)


@pytest.mark.support("quantized, adapted and offloaded weights")
@pytest.mark.parametrize("bits", ["qint4", "qint8"])
def test_optimum_quanto(bits: str) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    model = FAMILIES[0].make(attention="sdpa")
    quanto.quantize(model, weights=getattr(quanto, bits))
    quanto.freeze(model)
    assert len(output_metrics(model, {0: (2, 64), 1: (2, 64)})) == 2
    assert len(calibrate(model, random_tokens(1, 100), metric="query", progress=False).layers) == 2
