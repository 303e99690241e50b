"""What the parity suite runs over: the kernels, and the situations they are put in."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quantcache.backends import BackendName
from quantcache.cache.layer import SpectralLayer
from quantcache.coding.codec import SpectralCodec
from quantcache.coding.rope import Frame, Rope, anchor_of
from quantcache.coding.schema import CodecSettings, Coding
from quantcache_kernels.cpu.library import find
from quantcache_kernels.triton import runtime
from tests.builders import gaussian_vectors, random_side
from tests.helpers import left_padding

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Kernel:
    """One implementation under test.

    Attributes:
        backend: quantcache's name of the backend.
        missing: Says why it cannot run here; empty if it can.
        level: Instruction set of the CPU kernels.
        device: Where its tensors live.
        half: Whether it multiplies in the model's own precision, not always in float32: it is then measured by what
            torch makes of the same dtype.
        multiple: What a dimension must be a multiple of.
        least_width: What widths the kernel needs at least; with none it leaves the case to torch.
        longest: Longest case that is worth its time.
    """

    backend: BackendName
    missing: Callable[[], str]
    level: str = ""
    device: torch.device = CPU
    half: bool = False
    multiple: int = 4
    least_width: int = 0
    longest: int = 5000

    def leaves(self, case: Case) -> str:
        """Why a case is not for this kernel; empty if it is."""
        if any(dim % self.multiple for dim in (case.dim, case.value_dim or case.dim)):
            return f"dimensions must be multiples of {self.multiple}"
        if case.widths != "mixed" and int(case.widths) < self.least_width:
            return "there are no codes"
        return f"takes too long beyond {self.longest} tokens" if case.tokens > self.longest else ""

    def leaves_codes(self, case: Case) -> str:
        """Why encoding a case is not for this kernel; empty if it is."""
        few = self.backend == "triton" and self.device == CPU and "trellis" in case.coding
        if few and case not in [TRELLIS[name] for name in SEARCHED]:
            return "its paths take the interpreter too long"
        return self.leaves(case)


def _native(level: str) -> Kernel:
    def missing() -> str:
        library, reason = find()
        if library is None:
            return reason
        return "" if level in library.levels else f"this processor has no {level}"

    return Kernel("cpu", missing, level)


TRITON_DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else CPU
"""Where Triton's kernels run: a GPU, or the CPU under the interpreter."""

TRITON = Kernel(
    "triton",
    lambda: runtime.unavailable(TRITON_DEVICE) or "",
    device=TRITON_DEVICE,
    half=True,
    multiple=16,
    least_width=1,
    longest=400 if TRITON_DEVICE == CPU else 5000,  # the interpreter takes ten seconds for a thousand tokens
)

TORCH = Kernel("torch", lambda: "")
"""Plain torch on the CPU."""

KERNELS = {**{f"cpu-{level}": _native(level) for level in ("plain", "avx2", "avx512")}, "triton": TRITON}
"""Every kernel that runs the suite, by test id. A further backend is a further line."""


def as_parameters(kernels: dict[str, Kernel]) -> list[Any]:
    """Parameters of a fixture: kernels by id, Triton's with the mark of the run that has minutes for them."""
    return [
        pytest.param(kernel, id=name, marks=[pytest.mark.triton] * (kernel is TRITON))
        for name, kernel in kernels.items()
    ]


@dataclass(frozen=True)
class Case:
    """A filled layer and the queries that look at it.

    Attributes:
        tokens: T.
        dim: Dimension of a key.
        value_dim: Dimension of a value; that of a key if None.
        heads: H.
        groups: Query heads of each key/value head.
        queries: Tq.
        widths: A width for all, or ``"mixed"``: 0 to 8 at random for every coefficient of every head.
        rope: Layout of the rotation, ``none``, ``half`` or ``interleaved``.
        rotary: Share of the dimensions that rotate.
        theta: Base of the rotation.
        pads: Left padding of every row.
        holes: Whether the mask has random holes.
        dtype: Of keys, values and queries.
        scale: Magnitude of keys and values.
        softcap: Soft cap of the scores.
        sinks: Whether there are attention-sink logits.
        sink_length: Sinks of every row.
        cut: Whether a crop has cut a block.
        strided: Whether queries, keys and values are slices of larger tensors.
        coding: Of keys and of values.
    """

    tokens: int = 172
    dim: int = 64
    value_dim: int | None = None
    heads: int = 1
    groups: int = 3
    queries: int = 1
    widths: int | str = "mixed"
    rope: str = "half"
    rotary: float = 1.0
    theta: float = 1e4
    pads: tuple[int, ...] = (0,)
    holes: bool = False
    dtype: torch.dtype = torch.float32
    scale: float = 1.0
    softcap: float | None = None
    sinks: bool = False
    sink_length: int = 4
    cut: bool = False
    strided: bool = False
    coding: tuple[Coding, Coding] = ("scalar", "scalar")


BASE = Case()

ATTENTION = {
    **{f"T{tokens}": replace(BASE, tokens=tokens) for tokens in (68, 69, 127, 131, 132, 196, 1000)},
    "long-T5000": replace(BASE, tokens=5000, widths=2),
    **{f"G{groups}": replace(BASE, groups=groups, heads=2) for groups in (1, 4, 7, 8, 16)},
    **{f"D{dim}": replace(BASE, dim=dim, groups=4) for dim in (40, 80, 96, 100, 128, 256)},
    **{f"D64-Dv{dim}": replace(BASE, value_dim=dim) for dim in (32, 72, 128)},
    **{f"Tq{queries}": replace(BASE, queries=queries) for queries in (2, 5, 16)},
    **{f"width{width}": replace(BASE, widths=width, queries=2) for width in range(9)},
    "no-rope": replace(BASE, rope="none"),
    "interleaved": replace(BASE, rope="interleaved"),
    "partial-rope": replace(BASE, dim=80, rotary=0.4),
    "few-fast": replace(BASE, dim=128, theta=1e7),
    "all-fast": replace(BASE, theta=10.0),
    "padded": replace(BASE, tokens=300, pads=(0, 5, 260)),
    "padded-Tq4": replace(BASE, tokens=180, heads=2, pads=(0, 70), queries=4),
    "padded-to-the-tail": replace(BASE, tokens=180, pads=(0, 150), queries=2),
    "holes": replace(BASE, pads=(0, 7), holes=True, queries=3),
    "holes-one-mask": replace(BASE, holes=True, queries=3),
    "cut": replace(BASE, cut=True),
    "cut-padded": replace(BASE, cut=True, pads=(0, 70), queries=2),
    "strided": replace(BASE, strided=True, queries=2, pads=(0, 0)),
    "softcap": replace(BASE, softcap=2.0, queries=2),
    "softcap-wide": replace(BASE, softcap=50.0),
    "sink-logits": replace(BASE, sinks=True, queries=2),
    "softcap-sink-logits": replace(BASE, dim=128, groups=4, softcap=5.0, sinks=True),
    "no-sinks": replace(BASE, sink_length=0),
    "many-sinks": replace(BASE, sink_length=70),
    "zero": replace(BASE, scale=0.0),
    "1e4": replace(BASE, scale=1e4),
    "1e-6": replace(BASE, scale=1e-6),
    **{
        f"{str(dtype).removeprefix('torch.')}-{name}": replace(case, dtype=dtype)
        for dtype in (torch.bfloat16, torch.float16)
        for name, case in {
            "D64": replace(BASE, heads=2),
            "wide": replace(BASE, widths=7),
            "narrow": replace(BASE, widths=1),
            "D128": replace(BASE, dim=128, groups=8, queries=2),
            "padded": replace(BASE, pads=(0, 33), queries=2, strided=True),
        }.items()
    },
}
"""Cases of attention, by test id."""

CODES = {
    name: ATTENTION[name]
    for name in ATTENTION
    if name.startswith(("D", "width", "padded", "cut", "zero", "1e", "bfloat16", "float16"))
    or name in ("no-rope", "interleaved", "partial-rope", "few-fast", "all-fast", "strided", "T1000")
}
"""Cases of encoding, by test id."""


PATHS = replace(BASE, tokens=132, coding=("trellis", "trellis"))
SHORT = replace(PATHS, tokens=100)

TRELLIS = {
    "trellis": replace(PATHS, tokens=134, heads=2, queries=2),
    "trellis-keys": replace(SHORT, coding=("trellis", "scalar")),
    "trellis-values": replace(SHORT, coding=("scalar", "trellis")),
    **{f"trellis-width{width}": replace(SHORT, widths=width) for width in range(9)},
    "trellis-D256": replace(SHORT, dim=256, groups=4),
    "trellis-D128-bfloat16": replace(PATHS, dim=128, groups=8, dtype=torch.bfloat16),
    "trellis-D100-Dv72": replace(SHORT, dim=100, value_dim=72, groups=4, queries=5),
    "trellis-partial-rope": replace(SHORT, dim=80, rotary=0.4),
    "trellis-few-fast": replace(SHORT, dim=128, theta=1e7),
    "trellis-all-fast": replace(SHORT, theta=10.0),
    "trellis-two-heads": replace(SHORT, heads=2, dim=96),
    "trellis-no-rope": replace(SHORT, rope="none"),
    "trellis-padded": replace(PATHS, tokens=180, pads=(0, 5, 150), queries=2, strided=True),
    "trellis-cut": replace(PATHS, tokens=172, cut=True, pads=(0, 70), queries=2),
    "trellis-D128-float16": replace(SHORT, dim=128, groups=8, dtype=torch.float16),
    **{
        f"trellis-{str(dtype).removeprefix('torch.')}-{name}": replace(case, dtype=dtype)
        for dtype in (torch.bfloat16, torch.float16)
        for name, case in {
            "D64": SHORT,
            "wide": replace(SHORT, widths=7),
            "padded": replace(SHORT, tokens=110, pads=(0, 33), strided=True),
        }.items()
    },
    "trellis-zero": replace(SHORT, scale=0.0),
    "trellis-1e4": replace(SHORT, scale=1e4),
    "trellis-1e-6": replace(SHORT, scale=1e-6),
}
"""Cases of codes that are paths through a trellis, by test id; those of plain torch take their time to encode."""

FEW = (
    *("T69", "G16", "Tq5", "strided", "D80", "D64-Dv128", "width0", "width3", "width5", "no-rope", "partial-rope"),
    *("few-fast", "padded", "padded-to-the-tail", "holes", "cut", "cut-padded", "softcap-sink-logits", "zero"),
    *("bfloat16-D64", "float16-padded", "trellis", "trellis-width2", "trellis-width6", "trellis-all-fast"),
    *("trellis-padded", "trellis-cut", "trellis-zero", "trellis-bfloat16-D64"),
)
"""Cases of every kind, for tests that leave the others to CI."""


def few_of(cases: dict[str, Case]) -> list[Any]:
    """Parameters of a test: all cases, of which CI alone runs those that are not among the few."""
    return [
        pytest.param(case, id=name, marks=[] if name in FEW else [pytest.mark.slow]) for name, case in cases.items()
    ]


SEARCHED = (
    "trellis-keys",
    "trellis-values",
    *(f"trellis-width{width}" for width in (1, 2, 8)),
    "trellis-D256",
    "trellis-few-fast",
    "trellis-two-heads",
    "trellis-zero",
    "trellis-1e-6",
    "trellis-bfloat16-padded",
)
"""Cases of them whose paths the interpreter searches too, half a second for every block of every row and head."""


@dataclass
class Filled:
    """A case's layer, its queries and its mask.

    Attributes:
        layer: The layer, encoded by plain torch.
        given: The keys and values that it was filled with first.
        query: ``[B, Hq, Tq, D]``.
        mask: ``[B or 1, 1, Tq, T]`` bool, or None.
        s_aux: ``[Hq]``, or None.
    """

    layer: SpectralLayer
    given: dict[str, Tensor]
    query: Tensor
    mask: Tensor | None
    s_aux: Tensor | None


def codecs(case: Case, device: torch.device | str = "cpu") -> dict[str, SpectralCodec]:
    """The codecs of a case, with transforms, means and widths drawn at random."""
    generator = torch.Generator().manual_seed(case.dim)
    pairs = 0 if case.rope == "none" else int(case.dim * case.rotary) // 2
    rope = Rope(case.rope, tuple(case.theta ** (-i / max(pairs, 1)) for i in range(pairs))) if pairs else Rope()
    frame = Frame(case.dim, rope)

    def widths(dim: int) -> Tensor | int:
        if case.widths == "mixed":
            return torch.randint(0, 9, (case.heads, dim), generator=generator)
        assert isinstance(case.widths, int)
        return case.widths

    value_dim = case.value_dim or case.dim
    parts = tuple(size for size in (frame.num_slow, frame.num_fast) if size)
    keys = random_side(case.heads, case.dim, widths(case.dim), parts, seed=1, decay=0.95)
    values = random_side(case.heads, value_dim, widths(value_dim), seed=2, decay=0.95)
    settings = [CodecSettings(coding=coding) for coding in case.coding]
    return {
        "key": SpectralCodec(keys, rope, settings[0], device, holds_values=False),
        "value": SpectralCodec(values, Rope(), settings[1], device, holds_values=True),
    }


def vectors(case: Case, tokens: int, first: int = 0) -> dict[str, Tensor]:
    """Keys and values with the statistics that the codecs expect, from token ``first`` on."""
    made, batch = codecs(case), len(case.pads)
    found = {}
    for seed, (side, codec) in enumerate(made.items(), start=first + 3):
        widths = torch.zeros(codec.num_heads, codec.dim)
        parts = (codec.frame.num_slow, codec.frame.num_fast) if side == "key" else (codec.dim,)
        calibration = random_side(case.heads, codec.dim, widths, tuple(p for p in parts if p), seed % 2 + 1, 0.95)
        framed = gaussian_vectors(calibration, batch, tokens, seed=seed) * case.scale
        slots = torch.arange(first, first + tokens)
        positions = slots - torch.tensor(case.pads)[:, None]
        anchors = anchor_of(slots, case.sink_length) - torch.tensor(case.pads)[:, None]
        x = codec.frame.leave(framed, positions[:, None], anchors[:, None]).to(case.dtype)
        if case.strided:  # heads innermost, as a model's projection leaves them, inside of something larger
            x = torch.cat((x, x), dim=-1).transpose(1, 2).contiguous().transpose(1, 2)[..., : codec.dim]
        found[side] = x
    return found


def causal_mask(length: int, count: int, pads: tuple[int, ...]) -> Tensor:
    """The mask of the last ``count`` of ``length`` tokens over left-padded rows, ``[B, 1, count, length]``."""
    slots = torch.arange(length)
    mask = (slots <= torch.arange(length - count, length)[:, None]) & (slots >= torch.tensor(pads)[:, None, None])
    return mask[:, None]


def fill(case: Case, backend: BackendName = "torch") -> Filled:
    """Put a case together.

    Args:
        case: The case.
        backend: What encodes.

    Returns:
        The layer, its queries and its mask.
    """
    layer = SpectralLayer(lambda device, *_: codecs(case, device), None, case.sink_length, 0, backend)
    given = vectors(case, case.tokens)
    padded = any(case.pads)
    layer.update(given["key"], given["value"], arrivals=left_padding(case.pads, case.tokens, case.tokens))
    layer.flush()
    length = case.tokens
    if case.cut:
        layer.crop(-(case.tokens % 64) - 20)
        more = vectors(case, 140, first=layer.get_seq_length())
        layer.update(more["key"], more["value"])
        layer.flush()
        assert layer.state.blocks.cut
        length = layer.get_seq_length()
    generator = torch.Generator().manual_seed(4)
    query_heads = case.heads * case.groups
    # Scores of a few units, whatever the keys' magnitude: neither uniform weights nor a single one.
    spread = 0.2 / max(case.scale, 1e-6) if case.scale else 1.0
    query = spread * torch.randn(len(case.pads), query_heads, case.queries, case.dim, generator=generator)
    query = query.to(case.dtype)
    if case.strided:
        query = query.transpose(1, 2).contiguous().transpose(1, 2)
    mask = causal_mask(length, case.queries, case.pads) if padded or case.holes else None
    if mask is not None and case.holes:
        holes = torch.rand(mask.shape, generator=generator) < 0.5
        holes[0, :, 0] = False  # a query that may look at nothing
        mask = mask & holes
    s_aux = torch.randn(query_heads, generator=generator) if case.sinks else None
    return Filled(layer, given, query, mask, s_aux)


@functools.cache
def shared(case: Case) -> Filled:
    """A case put together once for all kernels: leave it as you found it."""
    return fill(case)


def on_device(layer: SpectralLayer, kernel: Kernel) -> SpectralLayer:
    """A layer as a kernel takes it.

    Args:
        layer: The layer.
        kernel: The kernel.

    Returns:
        A copy on the kernel's device, with its backend.
    """
    moved = copy.deepcopy(layer)
    moved.backend = kernel.backend
    if kernel.device != layer.device:
        moved.device = kernel.device
        moved._move(kernel.device)
        blocks = moved.state.blocks
        made = moved.make_codecs(kernel.device, moved.tails, blocks.grid)
        moved.state = moved.state._replace(blocks=blocks._replace(codecs=made))
    return moved


def select(kernel: Kernel) -> Callable[[], None]:
    """Make quantcache use one kernel.

    Args:
        kernel: The kernel.

    Returns:
        What undoes it.
    """
    library = find()[0] if kernel.backend == "cpu" else None
    if library is None:
        return lambda: None
    before = library.level
    library.select_level(kernel.level)
    return lambda: setattr(library, "level", before)
