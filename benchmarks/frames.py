"""What it costs to undo RoPE completely for more of the keys' dimensions: a decoding step by wavelength.

Rotary pairs that turn once in fewer tokens than the wavelength are stored free of rotation. That loses less (see the
ablation of the frame), but attention decodes their coefficients and rotates them for every token, where it scores the
others without either.
"""

from __future__ import annotations

import argparse
import math
import sys

import torch
from cpu_decode import GEOMETRIES, spectral_layer, take_turns, transformers_step
from records import write_record
from rich.console import Console
from rich.table import Table

from quantcache import Calibration
from quantcache.coding.rope import FAST_WAVELENGTH
from quantcache.coding.schema import CodecSettings
from quantcache.evaluation.summaries import quantiles

WAVELENGTHS = (32.0, FAST_WAVELENGTH, 1024.0, math.inf)


def main() -> None:
    """Measure, print a table and write a record."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    metrics = {
        name: {str(length): rung(name, length, options) for length in options.lengths} for name in options.geometries
    }
    table = Table("geometry", "cached tokens", *(f"wavelength {each:g}" for each in WAVELENGTHS), title="ms (times)")
    for name, rungs in metrics.items():
        for length, found in rungs.items():
            cells = (f"{each['median']:.3f} ({each['times']:.2f})" for each in found.values())
            table.add_row(name, f"{int(length):,}", *cells)
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    write_record("frames", {**vars(options), "default": FAST_WAVELENGTH}, metrics)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--geometries", nargs="+", default=["llama-8b", "smollm2"], choices=list(GEOMETRIES))
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16_384], help="cached tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bits", type=float, default=3.0)
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each geometry and length")
    return parser.parse_args()


@torch.inference_mode()
def rung(name: str, length: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Milliseconds of one layer's step by wavelength, in turns, and how many times the default's that is."""
    torch.manual_seed(length)
    geometry, steps = GEOMETRIES[name], {}
    for wavelength in WAVELENGTHS:
        codec = CodecSettings(fast_wavelength=wavelength, coding="trellis")
        calibration = Calibration.synthetic(geometry.config(), options.bits, codec=codec)
        layer = spectral_layer(geometry, length, torch.float32, calibration)
        steps[f"{wavelength:g}"] = transformers_step(layer, geometry, torch.float32)
    found = {key: quantiles(samples) for key, samples in take_turns(steps, options.seconds).items()}
    own = found[f"{FAST_WAVELENGTH:g}"]["median"]
    return {key: {**entry, "times": entry["median"] / own} for key, entry in found.items()}


if __name__ == "__main__":
    main()
