"""Whether the kernels of every backend agree with plain torch on this machine: ``quantcache env --check``."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from quantcache import backends
from quantcache.artifact.calibration import Calibration
from quantcache.backends import REFERENCE, AttentionCall, reference, trials
from quantcache.backends.padding import Grid
from quantcache.backends.trials import Outcome
from quantcache.cache.layer import SpectralLayer
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.coding.codec import SpectralCodec
from quantcache.coding.packing import BLOCK
from quantcache.coding.rope import anchor_of
from quantcache.coding.schema import Coding

GEOMETRIES = ((128, 4, 5e5), (256, 2, 1e4), (64, 7, 1e4))
"""Head dimension, queries for each key/value head and base of the rotation: Llama, Gemma 2, and many small models."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

CODINGS: tuple[Coding, ...] = ("scalar", "trellis")


def check_kernels() -> list[dict[str, Any]]:
    """Try every kernel beside plain torch, on small caches of real models' geometries.

    Returns:
        For each backend, device, geometry, coding, dtype and operation: ``difference`` and what is ``allowed``,
        relative to the result, and the ``problem``, empty if there is none. A backend that cannot run has one entry
        that says why.
    """
    found: list[dict[str, Any]] = []
    for backend, device, reason in _backends():
        if reason:
            found.append({"backend": backend, "device": str(device), "operation": None, "problem": reason})
            continue
        for geometry, coding, dtype in itertools.product(GEOMETRIES, CODINGS, DTYPES):
            dim, groups, _ = geometry
            case = f"D={dim}, G={groups}, {coding}, {str(dtype).removeprefix('torch.')}"
            outcomes = _outcomes(backend, device, geometry, coding, dtype)
            found += [{**vars(outcome), "case": case} for outcome in outcomes]
    return found


def _backends() -> list[tuple[str, torch.device, str]]:
    """Every backend with kernels, its device, and why it cannot run there."""
    gpu = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    devices = {name: torch.device("cpu") if name == "cpu" else gpu for name in backends.BACKENDS}
    kernels = [(name, each) for name, each in backends.BACKENDS.items() if each is not REFERENCE]
    return [(name, devices[name], each.unavailable(devices[name]) or "") for name, each in kernels]


def _outcomes(
    name: str, device: torch.device, geometry: tuple[int, int, float], coding: Coding, dtype: torch.dtype
) -> list[Outcome]:
    """The trials of one cache; none where the backend lacks its dtype."""
    layer, new, query = _case(device, geometry, coding, dtype)
    backend = backends.find(name)
    if any(backend.lacks(codec, dtype) for codec in layer.codecs.values()):
        return []
    layer.backend = name  # type: ignore[assignment]
    view = layer.snapshot()
    block_table, call = view.block_table[:1], AttentionCall(None, geometry[0] ** -0.5)
    codecs: dict[str, Any] = dict(layer.codecs)
    some = {side: x[:, :, layer.sink_length : layer.sink_length + BLOCK] for side, x in new.items()}

    def attend() -> Tensor:
        reason = backend.refuses(query, view, call)
        if reason is not None:
            raise RuntimeError(f"the call was refused: {reason}")
        return backend.attend_on_trial(query, view, call)

    def of_both(work: Callable[[str, Any], Tensor]) -> Tensor:
        return torch.cat([work(side, codec) for side, codec in codecs.items()])

    def encode(side: str, codec: Any) -> Tensor:
        fields = backend.to_portable(codec, backend.encode(codec, some[side], block_table, None))
        return codec.decode(fields, block_table, None)

    def encoded_by_torch(by: float, side: str, codec: Any) -> Tensor:
        fields = codec.encode(trials.shaken(codec, some[side], by, 1), block_table, None)
        return codec.decode(fields, block_table, None)

    def decode(side: str, codec: Any) -> Tensor:
        return backend.decode(codec, getattr(view, side).store.slice(0, 1), block_table, None)

    def plainly(dtype: torch.dtype) -> Tensor:
        return of_both(lambda side, codec: codec.decode(view.fields(side, 0, 1), block_table, None, dtype))

    def converted(there_and_back: bool) -> Tensor:
        blocks = {side: view.fields(side, 0, view.num_blocks) for side in codecs}
        if there_and_back:
            tiles = {side: backend.from_portable(codecs[side], fields) for side, fields in blocks.items()}
            blocks = {side: backend.to_portable(codecs[side], fields) for side, fields in tiles.items()}
        return torch.cat([fields["codes"].view(torch.uint8).flatten() for fields in blocks.values()])

    plain, own = reference.attend(query.float(), view, call), reference.own_precision(query, view, call)
    decoded, again = (of_both(functools.partial(encoded_by_torch, by)) for by in (0.0, trials.HALF_STEP))
    exact, single = plainly(torch.float64), plainly(torch.float32)
    portable = converted(False)
    with trials.without_trials():  # they are tried here
        found = [
            trials.attempt("attend", name, device, lambda: (attend, plain, own)),
            trials.attempt("encode", name, device, lambda: (lambda: of_both(encode), decoded, again)),
            trials.attempt("decode", name, device, lambda: (lambda: of_both(decode), exact, single)),
        ]
        if backend.layout != REFERENCE.layout:
            work = (lambda: converted(True)), portable, portable  # a single bit is more than is allowed
            found.append(trials.attempt("convert", name, device, lambda: work))
        return found


@torch.no_grad()
def _case(
    device: torch.device, geometry: tuple[int, int, float], coding: Coding, dtype: torch.dtype
) -> tuple[SpectralLayer, dict[str, Tensor], Tensor]:
    """A layer of a few blocks, encoded by plain torch, the keys and values that went into it, and a query."""
    dim, groups, theta = geometry
    config = LlamaConfig(
        hidden_size=2 * groups * dim,
        num_attention_heads=2 * groups,
        num_key_value_heads=2,
        head_dim=dim,
        num_hidden_layers=1,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    calibration = Calibration.synthetic(config).with_coding(coding)
    layer = SpectralCache(calibration, config, backend="torch").spectral_layers[0]
    tokens = layer.sink_length + 6 * BLOCK + layer.residual_length
    empty = torch.empty(1, 2, 0, dim, dtype=dtype, device=device)
    codecs = layer.make_codecs(device, {"key": empty, "value": empty}, Grid())
    generator, slots = torch.Generator().manual_seed(0), torch.arange(tokens, dtype=torch.int64, device=device)[None]
    new: dict[str, Tensor] = {}
    for side, codec in codecs.items():  # with the statistics that the codec expects
        assert isinstance(codec, SpectralCodec)
        coefficients = torch.randn(1, 2, tokens, dim, generator=generator, dtype=torch.float32, device="cpu").to(device)
        framed = codec.synthesize(coefficients) + codec.mean[:, None]
        anchors = anchor_of(slots, layer.sink_length)[:, None]
        new[side] = codec.frame.leave(framed, slots[:, None], anchors).to(dtype)
    query = (0.2 * torch.randn(1, 2 * groups, 1, dim, generator=generator, dtype=torch.float32, device="cpu")).to(
        device, dtype
    )
    layer.update(new["key"], new["value"])
    layer.flush()
    return layer, new, query
