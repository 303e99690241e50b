"""Small configs, calibrations and data with known statistics, and an independent count of bytes."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

from quantcache.artifact.calibration import Calibration
from quantcache.backends.store import BlockStore
from quantcache.coding import linalg
from quantcache.coding.schema import CodecSettings, SideCalibration


def llama_config(head_dim: int = 64, layers: int = 2, kv_heads: int = 2, **more: Any) -> LlamaConfig:
    """The config of a small Llama.

    Args:
        head_dim: D.
        layers: Number of layers.
        kv_heads: Hkv.
        more: Further attributes.

    Returns:
        The config; no model is built from it.
    """
    return LlamaConfig(
        hidden_size=2 * kv_heads * head_dim,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2 * kv_heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=32,
        **more,
    )


def scalar_calibration(config: PreTrainedConfig, bits: float = 3.0, seed: int = 0) -> Calibration:
    """A synthetic calibration with scalar codes, for tests that encode much and mean no coding: they are sooner made.

    Args:
        config: The model's config.
        bits: Mean code width.
        seed: Seed of the transforms.

    Returns:
        The calibration.
    """
    return Calibration.synthetic(config, bits, seed, CodecSettings(coding="scalar"))


def random_side(
    heads: int,
    dim: int,
    widths: Tensor | int | None,
    parts: tuple[int, ...] | None = None,
    seed: int = 0,
    decay: float = 0.9,
) -> SideCalibration:
    """Constants of one side with a transform that is invertible but not orthogonal, and a mean far from zero.

    Args:
        heads: H.
        dim: D.
        widths: ``[H, D]``, one width for all, or None for a dense side.
        parts: Sizes of the diagonal blocks of the transform; one block by default.
        seed: Seed of the transform and the mean.
        decay: Ratio of neighbouring variances.

    Returns:
        The constants.
    """
    generator = torch.Generator().manual_seed(seed)
    analysis = torch.zeros(heads, dim, dim, dtype=torch.float64)
    spectra, offset = [], 0
    for size in parts or (dim,):
        part = slice(offset, offset + size)
        left, right = (
            linalg.qr(torch.randn(heads, size, size, generator=generator, dtype=torch.float64))[0] for _ in range(2)
        )
        scales = torch.rand(heads, size, 1, generator=generator, dtype=torch.float64).mul(2).sub(1).exp()
        analysis[:, part, part] = left @ (scales * right)
        spectra.append(4.0 * decay ** torch.arange(size, dtype=torch.float64))
        offset += size
    if isinstance(widths, int):
        widths = torch.full((heads, dim), widths)
    return SideCalibration(
        3.0 * torch.randn(heads, dim, generator=generator),
        analysis.float(),
        torch.cat(spectra).expand(heads, dim).contiguous(),
        None if widths is None else widths.to(torch.uint8),
    )


def gaussian_vectors(side: SideCalibration, batch: int, tokens: int, seed: int = 0) -> Tensor:
    """Vectors with exactly the statistics that a side's constants describe.

    Args:
        side: The constants.
        batch: B.
        tokens: T.
        seed: Seed of the samples.

    Returns:
        ``[B, H, T, D]`` float64, in the frame.
    """
    generator = torch.Generator().manual_seed(seed)
    unit = torch.randn(batch, side.num_heads, tokens, side.dim, generator=generator, dtype=torch.float64)
    coefficients = unit * side.spectrum.sqrt()[:, None]
    synthesis = linalg.inverse(side.analysis.double())
    return side.mean.double()[:, None] + coefficients @ synthesis.transpose(-1, -2)


def tensors_in(value: object) -> Iterator[Tensor]:
    """Every tensor held by a value: a tensor, a store, or containers of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, BlockStore):
        yield from tensors_in(vars(value))
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def storages(tensors: Iterable[Tensor]) -> set[tuple[int, int]]:
    """(address, bytes) of every storage behind tensors."""
    found = {(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors}
    return {(address, size) for address, size in found if size}


def layer_storages(layer: Any) -> set[tuple[int, int]]:
    """(address, bytes) of every storage that a spectral layer holds, codecs apart."""
    return storages(tensors_in({name: value for name, value in vars(layer).items() if name != "codecs"}))


def held_bytes(layer: Any) -> int:
    """Bytes of everything that a spectral layer holds, codecs apart, counted without quantcache's accounting."""
    return sum(size for _, size in layer_storages(layer))


def hide_present_objects() -> None:
    """Hide all present objects from :func:`live_storages`; to unfreeze them would give the collector all imports."""
    gc.collect()
    gc.freeze()


def live_storages() -> set[tuple[int, int]]:
    """(address, bytes) of the storages of all tensors that Python holds."""
    gc.collect()
    return storages(t for t in gc.get_objects() if type(t) in (Tensor, torch.nn.Parameter))


def eval_record(**more: Any) -> dict[str, Any]:
    """What ``quantcache eval --suite fidelity,speed -o`` writes, as far as planning reads it.

    Args:
        more: Entries to replace.

    Returns:
        The record's JSON.
    """
    figures = {
        "kl_mean": 0.002,
        "kl_stderr": 1e-5,
        "top1_agreement": 0.97,
        "perplexity": 9.5,
        "bits_per_element": 3.125,
    }
    entry = {"status": "ok", "simulated": False, "family": "ours", "tokens": 512, "residual_length": 64, **figures}
    timed = {"status": "ok", "decode_ms": {"p20": 1.0, "median": 2.0, "p80": 3.0, "n": 5}, "decode_ratio": 0.5}
    return {
        "schema_version": 1,
        "suite": "eval",
        "status": "ok",
        "created": "2026-11-20T10:00:00+00:00",
        "commit": "0123456789abcdef" + 24 * "0",
        "dirty": False,
        "command": "quantcache eval my/model",
        "environment": {"cpu": {"name": "Abacus 9", "cores": 2}, "gpus": []},
        "settings": {},
        "model": "my/model",
        "dtype": "bfloat16",
        "metrics": {
            "fidelity": [
                {"context": 512, "residual": 64, "methods": {"spectral-3": entry, "fp8": {"status": "out of memory"}}}
            ],
            "speed": {"settings": {"context": 1024}, "methods": {"spectral-3": {"batches": {"4": timed}}}},
        },
        **more,
    }


class PeftWrapper(torch.nn.Module):
    """What ``get_peft_model()`` returns: the model is two modules further in, and generates itself."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.base_model = torch.nn.Module()
        self.base_model.model = model

    def get_base_model(self) -> torch.nn.Module:
        """The model."""
        return self.base_model.model

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model").model, name)

    def generate(self, *args: object, **kwargs: object) -> object:
        """The model's."""
        return self.base_model.model.generate(*args, **kwargs)

    def forward(self, *args: object, **kwargs: object) -> object:
        """The model's."""
        return self.base_model.model(*args, **kwargs)


class PackedWeight(torch.Tensor):
    """A float weight that is kept as int8 and unpacked wherever it is used, as quanto's and torchao's are."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> PackedWeight:
        """Of the weight's shape and dtype, and without memory of its own."""
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)

    def __init__(self, codes: Tensor, scale: Tensor):
        self.codes, self.scale = codes, scale

    @classmethod
    def of(cls, weight: Tensor) -> PackedWeight:
        """The weight, rounded."""
        scale = weight.detach().abs().max() / 127
        return cls((weight.detach() / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """What it is made of."""
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What a function makes of the unpacked weight; there are no views of it, as with torchao."""
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        if function is torch.ops.aten.view.default:
            raise NotImplementedError("a packed weight has no views")
        args = [each.codes * each.scale if isinstance(each, cls) else each for each in args]
        return function(*args, **(kwargs or {}))


def packed_projections(model: PreTrainedModel) -> PreTrainedModel:
    """A model whose attention's projections are packed in place, each by itself.

    Args:
        model: The model.

    Returns:
        The same.
    """
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            projection = getattr(layer.self_attn, name)
            projection.weight = torch.nn.Parameter(PackedWeight.of(projection.weight), requires_grad=False)
    return model
