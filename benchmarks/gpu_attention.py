"""The CUDA attention kernel on a GPU: right first, then its time beside flash attention, cuDNN and a copy.

``PYTHONPATH=.:kernels python benchmarks/gpu_attention.py`` takes under a minute. Every figure is printed and appended
to ``$OUT/cuda_attention.jsonl`` as it comes, so a run that is cut loses nothing; a shape that fails says so and the
next one runs. At the end comes a record, with a copy in ``$OUT``.

Codes are random and codebooks are quantiles of the Gaussian: neither time nor error depends on what a model would give.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from records import write_record
from sass import tile_loops
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from quantcache_kernels.cuda import driver, reference
from quantcache_kernels.cuda.layout import ANCHOR, GAIN_BYTES, PEAK_BYTES, Layout
from quantcache_kernels.cuda.ops import Plan, launch, plan

LEVELS = [[0.0]] + [
    torch.special.ndtri((torch.arange(1 << w, dtype=torch.float64) + 0.5) / (1 << w)).tolist() for w in range(1, 9)
]
MODELS = {"llama-8b": (8, 4, 128), "qwen2.5-7b": (4, 7, 128)}  # key/value heads, query heads of a group, dimension
# Widths of tiles of 16 coefficients, 3 bits on average in different ways, as heads of one layer have them.
KEY_PROFILES = ((4, 4, 4, 3, 3, 3, 2, 1), (4, 4, 4, 4, 3, 2, 2, 1), (4, 4, 3, 3, 3, 3, 2, 2), (8, 4, 3, 3, 2, 2, 1, 1))
VALUE_PROFILES = ((4, 4, 3, 3, 3, 3, 2, 2), (4, 3, 3, 3, 3, 3, 3, 2), (4, 4, 4, 3, 3, 2, 2, 2), (3,) * 8)
SHAPES = (  # tokens and batch, the most telling first
    (131072, 8), (32768, 8), (131072, 1), (32768, 1), (32768, 32), (4096, 8), (4096, 1), (4096, 32), (131072, 32),
)  # fmt: skip
MINIMUM_BYTES = 256 << 20  # of the data that a measurement goes through: several times the L2

OUT = Path(os.environ.get("OUT", "."))
START = time.perf_counter()
FIGURES: dict[str, list[dict[str, Any]]] = {}
"""What was measured, by part: for the record."""


def record(part: str, **fields: Any) -> None:
    """Print a figure and append it to the file."""
    fields = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in fields.items()}
    if part != "sass":  # long, and of interest to who writes the kernel only
        FIGURES.setdefault(part, []).append(fields)
    print(
        f"[{time.perf_counter() - START:5.1f}s] {part}: " + ", ".join(f"{k}={v}" for k, v in fields.items()), flush=True
    )
    with (OUT / "cuda_attention.jsonl").open("a") as file:
        file.write(json.dumps({"part": part, **fields}) + "\n")


def attempt(part: str, function: Callable[[], None], **fields: Any) -> None:
    """Run one part; a failure is recorded and the next part runs."""
    try:
        function()
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        record(part, **fields, failed=text)
        if not isinstance(error, torch.cuda.OutOfMemoryError):
            traceback.print_exc(limit=4)
    torch.cuda.empty_cache()


def random_layout(heads: int, dim: int, seed: int) -> Layout:
    """Falling widths from 0 to 6, different in every head."""
    random = torch.Generator().manual_seed(seed)

    def side() -> tuple[tuple[int, ...], ...]:
        widths = torch.randint(0, 7, (heads, dim // 16), generator=random).sort(descending=True).values
        return tuple(tuple(w) for w in widths.tolist())

    return Layout(side(), side())


def random_rows(layout: Layout, anchors: int, batch: int) -> Tensor:
    """Rows of random codes with gains around one."""
    rows = torch.randint(0, 256, (anchors, batch, layout.row_bytes()), dtype=torch.uint8, device="cuda")
    for row in layout.table().tolist():
        for side in (0, 1):
            gains = (torch.randn(anchors, batch, ANCHOR, device="cuda") * 0.3).exp().half()
            place = row[2 * side]
            rows[..., place : place + GAIN_BYTES] = gains.view(torch.uint8)
            if side:
                peaks = gains.unflatten(-1, (2, 64)).amax(-1).float()
                place += GAIN_BYTES
                rows[..., place : place + PEAK_BYTES // 2] = peaks.view(torch.uint8)
    return rows


def relative(found: Tensor, truth: Tensor) -> float:
    """‖found − truth‖ / ‖truth‖."""
    return float((found.double() - truth.double()).norm() / truth.double().norm())


def check(
    heads: int, group: int, dim: int, tokens: int, batch: int, splits: int | None, precise: bool, left_padding: bool
) -> None:
    """Compare one shape with plain torch in float64."""
    seed = int.from_bytes(os.urandom(4), "little")
    torch.manual_seed(seed)
    layout = random_layout(heads, dim, seed)
    anchors = -(-tokens // ANCHOR)
    rows = random_rows(layout, anchors, batch)
    queries = torch.randn(anchors, batch, heads, group, dim, device="cuda") * 3 / dim**0.5
    offsets = torch.randn(anchors, batch, heads, group, device="cuda")
    decoder = torch.randn(heads, dim, dim, device="cuda") / dim**0.5
    mean = torch.randn(heads, dim, device="cuda")
    first = torch.randint(0, tokens, (batch,), dtype=torch.int32, device="cuda") if left_padding else None
    call = plan(
        rows, layout.pack_queries(queries, offsets, LEVELS, precise), layout, LEVELS, decoder, mean, group, tokens,
        left_padding=first, splits=splits, precise=precise,
    )  # fmt: skip
    errors = []
    for _ in range(2):
        for tensor in (call.out, call.lse, call.partial, call.stats):
            tensor.fill_(float("nan"))
        launch(call)
        torch.cuda.synchronize()
        results = []
        for dtype in (torch.float64, torch.bfloat16):
            keys, values = layout.unpack(rows, LEVELS, dtype)
            own = [t.to(dtype) for t in (queries, offsets)]
            results.append(reference.attention(*own, keys, values, decoder.to(dtype), mean.to(dtype), tokens, first))
        errors.append(relative(call.out, results[0][0]))
    slack = 2 if precise else 8  # eight-bit queries and weights are coarser than bfloat16
    bound, lse_bound = (
        slack * relative(results[1][0], results[0][0]),
        slack * float((results[1][1] - results[0][1]).abs().max()),
    )
    lse_error = float((call.lse.double() - results[0][1]).abs().max())
    passed = max(errors) <= bound and lse_error <= lse_bound
    record(
        "check", verdict="PASS" if passed else "FAIL", error=errors[-1], first_error=errors[0],
        bfloat16=relative(results[1][0], results[0][0]), lse=lse_error, heads=heads, group=group, dim=dim,
        tokens=tokens, batch=batch, splits=call.splits, precise=precise, left_padding=left_padding, seed=seed,
    )  # fmt: skip


def microseconds(calls: list[Callable[[], object]], seconds: float = 0.25) -> float:
    """Median time of one call, over graph replays that go through all of them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    times: list[float] = []
    graph.replay()
    torch.cuda.synchronize()
    until = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < until and len(times) < 50):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def copies(size: int) -> int:
    """How many sets of data make a measurement go through more than the L2 holds."""
    return max(1, min(64, -(-MINIMUM_BYTES // size)))


def profile(heads: int, dim: int) -> Layout:
    """3 bits a code, the heads in turn in different ways."""
    keys = tuple(KEY_PROFILES[h % len(KEY_PROFILES)] for h in range(heads))
    values = tuple(VALUE_PROFILES[h % len(VALUE_PROFILES)] for h in range(heads))
    assert len(keys[0]) == dim // 16
    return Layout(keys, values)


def kernel_plans(
    layout: Layout, group: int, tokens: int, batch: int, precise: bool, splits: int | None = None
) -> tuple[list[Plan], int]:
    """Calls on enough sets of random data, and the bytes that one reads."""
    heads, dim, anchors = layout.heads, layout.coefficients, -(-tokens // ANCHOR)
    size = anchors * batch * (layout.row_bytes() + heads * layout.query_bytes(group, precise))
    queries = torch.randn(1, batch, heads, group, dim, device="cuda") * 3 / dim**0.5
    offsets = torch.zeros(1, batch, heads, group, device="cuda")
    packed = layout.pack_queries(queries, offsets, LEVELS, precise)
    decoder, mean = torch.randn(heads, dim, dim, device="cuda"), torch.zeros(heads, dim, device="cuda")
    plans: list[Plan] = []
    for _ in range(copies(size)):
        rows = random_rows(layout, anchors, batch)
        own = packed.repeat(anchors, 1, 1, 1)

        def make(warps: int, rows: Tensor = rows, own: Tensor = own) -> Plan:
            return plan(
                rows, own, layout, LEVELS, decoder, mean, group, tokens, warps=warps, splits=splits, precise=precise
            )

        if not plans:
            first = make(132)
            attend = driver.load(0, precise, first.parts)["attend"]
            fit = attend.warps_per_processor(first.shared_bytes)
            warps = fit * torch.cuda.get_device_properties(0).multi_processor_count
        plans.append(make(warps))
    return plans, size


def dense_times(heads: int, group: int, dim: int, tokens: int, batch: int) -> dict[str, float]:
    """Attention of torch on bfloat16 keys and values, every way of asking for it."""
    size = 2 * batch * heads * tokens * dim * 2
    shape = (batch, heads, tokens, dim)
    sets = [[torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)] for _ in range(copies(size))]
    query = torch.randn(batch, heads * group, 1, dim, device="cuda", dtype=torch.bfloat16)
    folded = query.view(batch, heads, group, dim)
    times = {}
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        for form, q, gqa in (("gqa", query, True), ("folded", folded, False)):

            def call(kv: list[Tensor], q: Tensor = q, gqa: bool = gqa) -> Tensor:
                return scaled_dot_product_attention(q, kv[0], kv[1], enable_gqa=gqa)

            try:
                with sdpa_kernel([backend]):
                    times[f"{name}_{form}"] = microseconds([lambda kv=kv, call=call: call(kv) for kv in sets])
            except RuntimeError as error:
                print(f"  {name} {form}: {str(error).splitlines()[0][:160]}")
                torch.cuda.synchronize()
    return times


def compare(model: str, tokens: int, batch: int, precise: bool) -> None:
    """One shape: the kernel, torch and the floor."""
    heads, group, dim = MODELS[model]
    layout = profile(heads, dim)
    plans, size = kernel_plans(layout, group, tokens, batch, precise)
    attend = microseconds([lambda p=p: launch(p, merge=False) for p in plans])
    both = microseconds([lambda p=p: launch(p) for p in plans])
    if not bool(plans[0].out.isfinite().all()):
        raise ValueError("the output is not finite")
    splits, warps = plans[0].splits, plans[0].splits * batch * heads
    del plans
    torch.cuda.empty_cache()
    dense = dense_times(heads, group, dim, tokens, batch)
    torch.cuda.empty_cache()
    best = min(dense.values())
    dense_bytes = 2 * batch * heads * tokens * dim * 2
    record(
        "time", model=model, tokens=tokens, batch=batch, precise=precise, attend_us=attend, total_us=both,
        ratio=best / both, ratio_attend=best / attend, best_dense=min(dense, key=lambda k: dense[k]), **dense,
        kernel_gbs=size / attend / 1e3, dense_gbs=dense_bytes / best / 1e3, elements_per_us=dense_bytes / 2 / attend,
        bits=layout.bits(), splits=splits, warps=warps,
    )  # fmt: skip


def width_times() -> None:
    """What one width costs, all tiles of it, at 32K tokens and a batch of 8."""
    heads, group, dim = MODELS["llama-8b"]
    for width in (1, 2, 3, 4, 8):
        layout = Layout(((width,) * (dim // 16),) * heads, ((width,) * (dim // 16),) * heads)
        plans, size = kernel_plans(layout, group, 32768, 8, True)
        time_ = microseconds([lambda p=p: launch(p, merge=False) for p in plans])
        record(
            "width",
            width=width,
            attend_us=time_,
            gbs=size / time_ / 1e3,
            elements_per_us=2 * 8 * heads * 32768 * dim / time_,
        )
        del plans
        torch.cuda.empty_cache()


def split_times() -> None:
    """How many anchors a warp should have."""
    heads, group, dim = MODELS["llama-8b"]
    for tokens, batch in ((32768, 1), (131072, 1), (32768, 8), (131072, 8)):
        for anchors in (1, 2, 3, 4, 6, 8, 16):
            splits = -(-tokens // ANCHOR // anchors)
            plans, _ = kernel_plans(profile(heads, dim), group, tokens, batch, True, splits=splits)
            attend = microseconds([lambda p=p: launch(p, merge=False) for p in plans], seconds=0.1)
            both = microseconds([lambda p=p: launch(p) for p in plans], seconds=0.1)
            record(
                "splits", tokens=tokens, batch=batch, anchors=anchors, splits=plans[0].splits, attend_us=attend,
                total_us=both,
            )  # fmt: skip
            del plans
            torch.cuda.empty_cache()


def compile_all() -> None:
    """Compile every variant, and say what the compiler made of it."""
    for precise, parts in ((True, 1), (True, 2), (False, 1)):
        begin = time.perf_counter()
        kernels = driver.load(0, precise, parts)
        seconds = time.perf_counter() - begin
        for name, kernel in kernels.items():
            record(
                "compile", kernel=name, precise=precise, parts=parts, seconds=seconds, registers=kernel.attribute(4),
                local_bytes=kernel.attribute(3),
            )  # fmt: skip
        try:
            loops = tile_loops(driver.compiled(torch.cuda.get_device_capability(), precise, parts))
            record("sass", precise=precise, parts=parts, loops=json.dumps(loops))
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"  no disassembly: {error}")


def copy_bandwidth() -> None:
    """A large copy on the device, bytes read and written."""
    source = torch.randint(0, 1 << 30, (1 << 28,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    record("copy", gbs=2 * source.nbytes / microseconds([lambda: target.copy_(source)]) / 1e3)


CHECKS = (
    # heads, group, dimension, tokens, batch, splits, precise, starts
    (2, 4, 64, 300, 2, 2, True, False),
    (2, 4, 64, 300, 2, 1, True, True),
    (8, 4, 128, 1000, 2, None, True, False),
    (4, 7, 128, 1000, 2, None, True, False),
    (4, 8, 128, 640, 1, 2, True, True),
    (2, 4, 256, 500, 1, 2, True, False),
    (3, 1, 128, 129, 3, None, True, False),
    (8, 4, 128, 16384, 1, None, True, False),
    (4, 7, 128, 1000, 2, None, False, False),
    (8, 4, 128, 1000, 2, 3, False, True),
)


def measure(seconds: float) -> None:
    """Every time, the most telling first; shapes that would begin after so many seconds are skipped."""
    attempt("copy", copy_bandwidth)
    shapes = [(model, tokens, batch, True) for tokens, batch in SHAPES for model in MODELS]
    shapes += [("qwen2.5-7b", tokens, 8, False) for tokens in (32768, 131072)]
    for index, (model, tokens, batch, precise) in enumerate(shapes):
        if index == 4:
            attempt("width", width_times)
            attempt("splits", split_times)
        what = {"model": model, "tokens": tokens, "batch": batch, "precise": precise}
        if time.perf_counter() - START > seconds:
            record("skipped", **what)
            continue
        attempt("time", lambda what=what: compare(**what), **what)


def main() -> None:
    """Run everything that fits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=45.0, help="skip shapes that would begin later")
    parser.add_argument("--checks-only", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this measures a GPU, and torch sees none")
    torch.backends.cuda.matmul.allow_tf32 = False
    properties = torch.cuda.get_device_properties(0)
    version = ctypes.c_int()
    driver._cuda().cuDriverGetVersion(ctypes.byref(version))
    record(
        "machine", device=properties.name, processors=properties.multi_processor_count, torch=torch.__version__,
        cuda=torch.version.cuda, driver=version.value, l2=properties.L2_cache_size,
    )  # fmt: skip
    attempt("compile", compile_all)
    for shape in CHECKS:
        attempt("check", lambda shape=shape: check(*shape), shape=str(shape))
    if not options.checks_only:
        measure(options.seconds)
    record("end", seconds=time.perf_counter() - START)
    path = write_record("gpu-attention", vars(options), FIGURES)
    if out := os.environ.get("OUT"):
        shutil.copy(path, out)
    print(f"record: {path}", file=sys.stderr)
    if any(figure.get("verdict") != "PASS" for figure in FIGURES["check"]):
        sys.exit("error: a check failed")


if __name__ == "__main__":
    main()
