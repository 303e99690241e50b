"""``quantcache inspect``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from quantcache.cli.loading import load_calibration
from quantcache.cli.options import CALIBRATION_HELP, BitsOption, DebugFlag, JsonFlag, QualityOption, check_rate
from quantcache.cli.session import session
from quantcache.common.grid import Grid
from quantcache.common.units import show_bits

_UNSHOWN = ("text_sha256", "passages", "yardstick")

TOKENS = 8192
"""Context length that sizes are given for."""


def inspect(
    artifact: Annotated[str, typer.Argument(metavar="ARTIFACT", help=f"A calibration: {CALIBRATION_HELP}.")],
    bits: BitsOption = None,
    quality: QualityOption = None,
    cache: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Show what a saved cache (of this calibration) holds.")
    ] = None,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Show what a calibration holds, and what a cache would take with it.

    Examples:
        quantcache inspect wiki11m
        quantcache inspect calibration/ --bits 4 --cache saved.safetensors
    """
    with session(json, debug) as run:
        check_rate(bits, quality)
        from quantcache.accounting.predicting import predict
        from quantcache.artifact.quality import quality_rates
        from quantcache.planning.geometry import window_layers

        calibration = load_calibration(artifact, bits, quality)
        metadata = calibration.metadata
        layers = [
            {
                "index": index,
                "key_bits": mean_width(layer.key),
                "value_bits": mean_width(layer.value),
                "num_key_value_heads": layer.key.num_heads,
                "key_dim": layer.key.dim,
                "value_dim": layer.value.dim,
                "rotary_dim": layer.rope.rotary_dim,
                "rope_layout": layer.rope.layout,
            }
            for index, layer in calibration.layers.items()
        ]
        windows = window_layers(calibration)
        memory = predict(calibration, TOKENS, beside=windows)
        data: dict[str, Any] = {
            "artifact": artifact,
            "base_model": metadata.base_model,
            "recipe": metadata.recipe,
            "rate": {
                "bits": metadata.rate.bits,
                "key_bits": metadata.rate.key_bits,
                "value_bits": metadata.rate.value_bits,
                "min_bits": metadata.rate.min_bits,
            },
            "bits": calibration.bits,
            "bits_per_element": calibration.bits_per_element,
            "qualities": [asdict(each) for each in quality_rates(calibration)],
            "cache_config": metadata.cache_config,
            "layers": layers,
            "sliding_window_layers": len(windows),
            "memory": memory.to_dict(),
            "bytes_per_token": memory.total / TOKENS,
            "bytes_per_token_bfloat16": memory.bfloat16_bytes / TOKENS,
            "times_smaller": memory.bfloat16_bytes / memory.total,
            "environment": metadata.environment,
        }
        if cache is not None:
            from quantcache.cache.spectral_cache import SpectralCache

            data["cache"] = {"file": str(cache), **SpectralCache.load(cache, calibration).memory().to_dict()}
        run.finish(data, _summary(data), "", _layer_table(layers))


def mean_width(side: Any) -> float | None:
    """Mean code width of one side.

    Args:
        side: ``SideCalibration`` of one layer.

    Returns:
        Bits, None where the side stays dense.
    """
    return None if side.widths is None else float(side.widths.double().mean())


def rate_line(rate: dict[str, Any]) -> str:
    """What a word for a rate means for a calibration.

    Args:
        rate: Fields of a ``QualityRate``.

    Returns:
        A line.
    """
    limit = f"KL of at most {rate['max_kl']:g}"
    if rate["bits"] is None:
        return f"{limit}: none predicted"
    return f"{show_bits(rate['bits'])}, {limit}: {rate['predicted_kl']:.2g} predicted"


def _summary(data: dict[str, Any]) -> Grid:
    table = Grid("", "", fold=True)
    base, rate, recipe = data["base_model"], data["rate"], data["recipe"]
    revision = f" at {base['revision'][:12]}" if base.get("revision") else ""
    table.add_row("base model", f"{base.get('id') or 'unknown'}{revision} ({base.get('model_type')})")
    table.add_row("recipe", ", ".join(f"{key} {value}" for key, value in recipe.items() if key not in _UNSHOWN))
    sides = [f"{side}s {rate[f'{side}_bits']}" for side in ("key", "value") if rate[f"{side}_bits"] != "joint"]
    common = [show_bits(rate["bits"])] if len(sides) < 2 else []  # which nothing would have
    table.add_row("bits", ", ".join([*common, *sides, f"at least {rate['min_bits']}"]))
    table.add_row("bits per element", f"{data['bits_per_element']:.3f} (codes {data['bits']:.3f}, the rest gains)")
    for each in data["qualities"]:
        table.add_row(each["quality"], rate_line(each))
    kept = "sinks, recent tokens and sliding windows" if data["sliding_window_layers"] else "sinks and recent tokens"
    table.add_row(
        f"at {TOKENS:,} tokens",
        f"{data['bytes_per_token']:,.0f} bytes per token, bfloat16 takes {data['bytes_per_token_bfloat16']:,.0f}: "
        f"{data['memory']['bits_per_element_total']:.3f} bits per element including {kept}, "
        f"{data['times_smaller']:.2f}× smaller",
    )
    if "cache" in data:
        held = data["cache"]
        table.add_row(
            held["file"],
            f"{held['tokens']:,} tokens in {held['total']:,} bytes; of {held['gains']:,} gains "
            f"{held['gains_above']:,} are too large to be stored and {held['gains_below']:,} too small",
        )
    return table


def _layer_table(layers: list[dict[str, Any]]) -> Grid:
    table = Grid("layer", "key bits", "value bits", "KV heads", "head dim", "rotary", title="Mean code widths", text=0)
    for layer in layers:
        dims = {layer["key_dim"], layer["value_dim"]}
        table.add_row(
            str(layer["index"]),
            *("dense" if layer[side] is None else f"{layer[side]:.2f}" for side in ("key_bits", "value_bits")),
            str(layer["num_key_value_heads"]),
            "/".join(str(dim) for dim in sorted(dims)),
            f"{layer['rotary_dim']} {layer['rope_layout']}" if layer["rotary_dim"] else "none",
        )
    return table
