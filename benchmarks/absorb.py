"""What absorbing a basis into wiki11m's weights does: to SpectralCache, and to quantizers that know nothing of it.

Four models are compared, each against its own dense cache: the original, its ``spectral`` and ``flat`` exports, and
``flat`` without the scales of the keys. All run in float32; what rounding to the checkpoint's bfloat16 costs is
measured by itself. quanto is measured where optimum-quanto is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from inputs import read
from records import write_record
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, PreTrainedModel, QuantizedCache

from quantcache import Calibration, SpectralCache, data, register_attention
from quantcache.attention.probe import RecordingCache
from quantcache.coding.codec import SpectralCodec
from quantcache.coding.packing import BLOCK
from quantcache.coding.rope import Rope
from quantcache.common.sequences import text_tokens
from quantcache.evaluation.fidelity import measure_fidelity
from quantcache.evaluation.methods import Method, parse_methods
from quantcache.evaluation.methods.base import Setting, simulated_cache, uniform
from quantcache.evaluation.methods.integer import QuarotCodec
from quantcache.evaluation.provenance import text_sha256
from quantcache.export import absorb
from quantcache.export.model import absorbed_calibration, changed_tensors, layer_maps
from quantcache.export.projections import TensorInfo, find_projections

SINKS, RESIDUAL, CHUNK = 4, 64, 64


def every_token(model: PreTrainedModel, bits: int) -> Callable[[], Cache]:
    """Makes caches that quantize every token as it arrives."""
    return lambda: RecordingCache(model.config, lambda index, *pair: (uniform(pair[0], bits), uniform(pair[1], bits)))


def older_tokens(model: PreTrainedModel, bits: int) -> Callable[[], Cache]:
    """Makes caches that keep sinks and recent tokens, as SpectralCache does."""
    setting = Setting(model.config, None, None, SINKS, RESIDUAL)
    return simulated_cache(setting, lambda index, side, x, device: QuarotCodec(torch.eye(x.shape[-1]), bits, clip=1.0))


def methods_of(model: PreTrainedModel, calibration: Calibration) -> list[Method]:
    """What is measured on every model."""
    spectral = ["dense", "spectral-2", "spectral-3", "spectral-4"]
    methods = parse_methods(spectral, model.config, calibration, SINKS, RESIDUAL)
    methods += [Method(f"int{bits} per token", "rival", True, every_token(model, bits)) for bits in (4, 3)]
    name = f"int4 per token, {SINKS} first and {RESIDUAL} recent exact"
    methods.append(Method(name, "rival", True, older_tokens(model, 4)))
    if importlib.util.find_spec("optimum") is not None:
        methods.append(Method("quanto-4", "rival", False, lambda: QuantizedCache("quanto", model.config, nbits=4)))
    return methods


def absorb_values_only(model: PreTrainedModel, calibration: Calibration) -> Calibration:
    """``absorb(model, calibration, "flat")`` without the scales of the keys."""
    parameters = dict(model.named_parameters())
    tensors = {name: TensorInfo(tuple(p.shape), p.dtype) for name, p in parameters.items()}
    projections = find_projections(model.config, calibration, tensors)
    maps = layer_maps(calibration, projections, "flat", tensors)
    maps = {index: replace(own, keys=None) for index, own in maps.items()}
    with torch.no_grad():
        for index, found in projections.items():
            for name, tensor in changed_tensors(found, maps[index], lambda name: parameters[name].detach()):
                parameters[name].copy_(tensor)
    return absorbed_calibration(calibration, maps, projections, "flat", parameters.get)


ABSORB: dict[str, Callable[[PreTrainedModel, Calibration], Calibration]] = {
    "original": lambda model, calibration: calibration,
    "spectral": absorb,
    "flat": lambda model, calibration: absorb(model, calibration, "flat"),
    "flat, keys as they are": absorb_values_only,
}


def load(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The bundled model."""
    path = data.demo_model_path()
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="spectral").eval()


def rounding(calibration: Calibration, ids: Tensor) -> dict[str, dict[str, float]]:
    """What absorbing into bfloat16 weights costs, computed in float32 so that nothing else is rounded."""
    with torch.no_grad():
        reference = load()(input_ids=ids).logits.double()
        results = {}
        for basis in ("spectral", "flat"):
            for dtype in (torch.float32, torch.bfloat16):
                model = load(dtype)
                absorb(model, calibration, basis)
                logits = model.float()(input_ids=ids).logits.double()
                a, b = reference.log_softmax(-1), logits.log_softmax(-1)
                results[f"{basis}, {str(dtype).removeprefix('torch.')}"] = {
                    "max_abs": float((logits - reference).abs().max()),
                    "scale": float(reference.abs().max()),
                    "kl_mean": float((a.exp() * (a - b)).sum(-1).mean()),
                }
        return results


def work(model: PreTrainedModel, calibration: Calibration, ids: Tensor) -> dict[str, float]:
    """Floating-point operations of matrix products, in plain torch, per layer.

    Encoding is counted for the values of one token; decoding for the attention of one new token on a cache of ``ids``.
    """
    layer = calibration.layers[0]
    codec = SpectralCodec(layer.value, Rope(), calibration.metadata.codec)
    place = torch.tensor([[SINKS, BLOCK, SINKS]], dtype=torch.int32)
    counter = FlopCounterMode(display=False)
    with counter:
        codec.encode(torch.randn(1, layer.value.num_heads, BLOCK, layer.value.dim), place, None)
    encode = counter.get_total_flops() / BLOCK
    cache = SpectralCache(calibration, model.config, backend="torch")
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        counter = FlopCounterMode(display=False)
        with counter:
            model(input_ids=ids[:, :1], past_key_values=cache)
    return {"encode_values": encode, "decode": counter.get_total_flops() / len(calibration.layers)}


def main() -> None:
    """Measure, print a table and write a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--context", type=int, default=1024, help="tokens in a window")
    parser.add_argument("--windows", type=int, default=8, help="windows of the evaluation text")
    options = parser.parse_args()

    register_attention()
    calibration = Calibration.for_model("wiki11m")
    text, source = read("wiki_eval.txt", data.evaluation_text)
    tokenizer = AutoTokenizer.from_pretrained(data.demo_model_path())
    needed = options.windows * options.context
    tokens = text_tokens(tokenizer, text, needed)
    models: dict[str, Any] = {}
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=len(ABSORB) * needed)
        for name, change in ABSORB.items():
            model = load()
            own = change(model, calibration)
            windows = [
                measure_fidelity(
                    model,
                    window,
                    methods_of(model, own),
                    context=options.context,
                    chunk=CHUNK,
                    sink_length=SINKS,
                    on_progress=lambda count: bar.advance(task, count),
                )
                for window in tokens.split(options.context)
            ]
            models[name] = {
                "methods": {
                    method: {
                        "status": result.status,
                        "simulated": result.simulated,
                        "kl_by_window": [found[method].kl_mean for found in windows],
                        "perplexity_by_window": [found[method].perplexity for found in windows],
                        "bits_per_element": result.bits_per_element,
                    }
                    for method, result in windows[0].items()
                },
                "flops_per_layer": work(model, own, tokens[None, : options.context]),
            }
            means = {m: sum(r["kl_by_window"]) / len(windows) for m, r in models[name]["methods"].items()}
            bar.console.print(name, {method: round(mean, 5) for method, mean in means.items()})
    settings = {
        "model": "wiki11m",
        "dtype": "float32",
        "context": options.context,
        "windows": options.windows,
        "chunk": CHUNK,
        "sinks": SINKS,
        "residual": RESIDUAL,
        "calibration": calibration.metadata.recipe,
        "evaluation": {"source": source, "text_sha256": text_sha256(text)},
    }
    metrics = {"models": models, "rounding": rounding(calibration, tokens[None, : options.context])}
    write_record("absorb", settings, metrics)


if __name__ == "__main__":
    main()
