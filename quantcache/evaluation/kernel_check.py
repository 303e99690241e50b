"""Whether the kernels of every backend agree with plain torch on this machine: ``quantcache env --check``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from quantcache.artifact.calibration import Calibration
from quantcache.attention import function as attention
from quantcache.backends import kernels as backends
from quantcache.backends import trials
from quantcache.backends.kernels import Backend
from quantcache.backends.padding import Grid
from quantcache.backends.trials import Outcome
from quantcache.cache.layer import SpectralLayer
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.coding.codec import SpectralCodec
from quantcache.coding.packing import BLOCK
from quantcache.coding.rope import anchor_of
from quantcache_kernels import cpu
from quantcache_kernels.triton import runtime

GEOMETRIES = ((128, 4, 5e5), (256, 2, 1e4), (64, 7, 1e4))
"""Head dimension, queries for each key/value head and base of the rotation: Llama, Gemma 2, and many small models."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_kernels() -> list[dict[str, Any]]:
    """Try every kernel beside plain torch, on small caches of real models' geometries.

    Returns:
        For each backend, device, geometry, dtype and operation: ``difference`` and what is ``allowed``, relative to the
        result, and the ``problem``, empty if there is none. A backend that cannot run has one entry that says why.
    """
    found: list[dict[str, Any]] = []
    for backend, device, reason in _backends():
        if reason:
            found.append({"backend": backend, "device": str(device), "operation": None, "problem": reason})
            continue
        for dim, groups, theta in GEOMETRIES:
            for dtype in DTYPES:
                case = f"D={dim}, G={groups}, {str(dtype).removeprefix('torch.')}"
                found += [
                    {**vars(outcome), "case": case} for outcome in _outcomes(backend, device, dim, groups, theta, dtype)
                ]
    return found


def _backends() -> list[tuple[Backend, torch.device, str]]:
    """Every backend with its device, and why it cannot run there."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return [
        ("native", torch.device("cpu"), "" if cpu.available() else cpu.reason()),
        ("triton", device, runtime.unavailable(device) or ""),
    ]


def _outcomes(
    backend: Backend, device: torch.device, dim: int, groups: int, theta: float, dtype: torch.dtype
) -> list[Outcome]:
    """The trials of one cache."""
    layer, new, query = _case(device, dim, groups, theta, dtype)
    view, codec = layer.snapshot(), layer.codecs["key"]
    assert isinstance(codec, SpectralCodec)
    some, places = new[:, :, layer.sink_length : layer.sink_length + BLOCK], view.places[:1]
    layer.backend = backend

    def attend() -> Tensor:
        output = backends.attend_view(query, view, None, None, True, None, None)
        if output is None:
            raise RuntimeError("the kernel declined the case")
        return output

    plain = attention.plain_attention(query.float(), view, on_codes=True)
    own = attention.own_precision(query, view)
    decoded = codec.decode(codec.encode(some, places, None), places, None)

    def encode() -> Tensor:
        return codec.decode(backends.encode(codec, some, places, None, backend), places, None)

    outcomes = [
        trials.attempt("attend", backend, device, lambda: (attend, plain, own)),
        trials.attempt("encode", backend, device, lambda: (encode, some.float(), decoded)),
    ]
    if backend == "triton":
        fields = view.key.store.slice(0, 1)
        exact, plainly = (codec.decode(fields, places, None, kind) for kind in (torch.float64, torch.float32))

        def decode() -> Tensor:
            return backends.decode(codec, fields, places, None, backend)

        outcomes.append(trials.attempt("decode", backend, device, lambda: (decode, exact, plainly)))
    return outcomes


@torch.no_grad()
def _case(
    device: torch.device, dim: int, groups: int, theta: float, dtype: torch.dtype
) -> tuple[SpectralLayer, Tensor, Tensor]:
    """A layer of four blocks, encoded by plain torch, the keys that went into it, and a query."""
    config = LlamaConfig(
        hidden_size=2 * groups * dim,
        num_attention_heads=2 * groups,
        num_key_value_heads=2,
        head_dim=dim,
        num_hidden_layers=1,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    layer = SpectralCache(Calibration.synthetic(config), config, backend="torch").spectral_layers[0]
    tokens = layer.sink_length + 4 * BLOCK + layer.residual_length
    empty = torch.empty(1, 2, 0, dim, dtype=dtype, device=device)
    codecs = layer.make_codecs(device, {"key": empty, "value": empty}, Grid())
    generator, slots = torch.Generator().manual_seed(0), torch.arange(tokens, dtype=torch.int64, device=device)[None]
    new: list[Tensor] = []
    for codec in codecs.values():  # with the statistics that the codec expects
        assert isinstance(codec, SpectralCodec)
        coefficients = torch.randn(1, 2, tokens, dim, generator=generator, dtype=torch.float32, device="cpu").to(device)
        framed = codec.synthesize(coefficients) + codec.mean[:, None]
        new.append(codec.frame.leave(framed, slots[:, None], anchor_of(slots, layer.sink_length)[:, None]).to(dtype))
    query = (0.2 * torch.randn(1, 2 * groups, 1, dim, generator=generator, dtype=torch.float32, device="cpu")).to(
        device, dtype
    )
    layer.update(*new)
    layer.finish()
    return layer, new[0], query
