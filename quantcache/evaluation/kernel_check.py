"""Whether the kernels of every backend agree with plain torch on this machine: ``quantcache env --check``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from quantcache import backends
from quantcache.artifact.calibration import Calibration
from quantcache.backends import REFERENCE, AttentionCall, reference, trials, triton
from quantcache.backends.padding import Grid
from quantcache.backends.trials import Outcome
from quantcache.cache.layer import SpectralLayer
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.coding.codec import SpectralCodec
from quantcache.coding.packing import BLOCK
from quantcache.coding.rope import anchor_of

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


def _backends() -> list[tuple[str, torch.device, str]]:
    """Every backend with kernels, its device, and why it cannot run there."""
    gpu = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    devices = {name: torch.device("cpu") if name == "cpu" else gpu for name in backends.BACKENDS}
    kernels = [(name, each) for name, each in backends.BACKENDS.items() if each is not REFERENCE]
    return [(name, devices[name], each.unavailable(devices[name]) or "") for name, each in kernels]


def _outcomes(
    name: str, device: torch.device, dim: int, groups: int, theta: float, dtype: torch.dtype
) -> list[Outcome]:
    """The trials of one cache."""
    layer, new, query = _case(device, dim, groups, theta, dtype)
    layer.backend = name  # type: ignore[assignment]
    view, codec, backend = layer.snapshot(), layer.codecs["key"], backends.find(name)
    assert isinstance(codec, SpectralCodec)
    some, block_table = new[:, :, layer.sink_length : layer.sink_length + BLOCK], view.block_table[:1]
    call = AttentionCall(None, dim**-0.5)

    def attend() -> Tensor:
        reason = backend.refuses(query, view, call)
        if reason is not None:
            raise RuntimeError(f"the call was refused: {reason}")
        return backend.attend(query, view, call)

    plain, own = reference.attend(query.float(), view, call), reference.own_precision(query, view, call)
    decoded = codec.decode(codec.encode(some, block_table, None), block_table, None)

    def encode() -> Tensor:
        fields = backend.to_portable(codec, backend.encode(codec, some, block_table, None))
        return codec.decode(fields, block_table, None)

    fields = view.fields("key", 0, 1)
    exact, plainly = (codec.decode(fields, block_table, None, kind) for kind in (torch.float64, torch.float32))

    def decode() -> Tensor:
        return backend.decode(codec, view.key.store.slice(0, 1), block_table, None)

    with triton.without_trials():  # they are tried here
        return [
            trials.attempt("attend", name, device, lambda: (attend, plain, own)),
            trials.attempt("encode", name, device, lambda: (encode, some.float(), decoded)),
            trials.attempt("decode", name, device, lambda: (decode, exact, plainly)),
        ]


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
    layer.flush()
    return layer, new[0], query
