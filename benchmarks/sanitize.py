"""Random legal calls of the CPU kernels on a build with sanitizers, and a record of them; `make asan` runs it.

python benchmarks/sanitize.py [--seconds 180] [--seed 0]

A fault that a sanitizer finds ends the process, and there is no record.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import time
from pathlib import Path

import torch
from records import ROOT, write_record

from quantcache_kernels.cpu.library import LIBRARY_VARIABLE

sys.path.insert(0, str(ROOT))

from tests.kernels.random_calls import drive


def main() -> int:
    """Make the calls, record how many there were, and give the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=180.0, help="for how long (default: 180)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the calls (default: 0)")
    arguments = parser.parse_args()
    library = os.environ.get(LIBRARY_VARIABLE)
    if library is None or not hasattr(ctypes.CDLL(None), "__asan_init"):
        print("this wants a build with sanitizers, whose run-time library is loaded first: run make asan")
        return 2
    started = time.monotonic()
    found = drive(arguments.seed, seconds=arguments.seconds)
    settings = {
        "seconds": arguments.seconds,
        "seed": arguments.seed,
        "library": Path(library).name,
        "sanitizers": os.environ.get("QUANTCACHE_SANITIZE", "address,undefined"),
        "threads": torch.get_num_threads(),
    }
    write_record("sanitize", settings, {"seconds": round(time.monotonic() - started, 1), **found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
