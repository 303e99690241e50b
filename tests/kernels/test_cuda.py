"""The CUDA kernels' source, compiled for an emulated warp: its values against plain torch in float64.

Without a GPU nothing else can be known of them; benchmarks/gpu_attention.py repeats the comparison on one.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantcache.coding.codebook import gaussian_codebook
from quantcache_kernels.cuda import layout as layouts
from quantcache_kernels.cuda import reference
from quantcache_kernels.cuda.driver import SOURCES
from quantcache_kernels.cuda.layout import Layout, column_tiles
from quantcache_kernels.cuda.ops import Plan, choose_splits, plan
from tests.kernels import emulation

pytestmark = pytest.mark.skipif(emulation.COMPILER is None, reason="no C++ compiler here")

LEVELS = [list(gaussian_codebook(width).levels) for width in range(9)]


@pytest.fixture(scope="module")
def emulator() -> ctypes.CDLL:
    """The kernels for every way of placing queries in columns."""
    return emulation.library()


def run(emulator: ctypes.CDLL, call: Plan) -> None:
    """Carry a plan out, after poisoning what it writes."""
    for tensor in (call.out, call.lse, call.partial, call.stats):
        tensor.fill_(float("nan"))
    variant = f"{'precise' if call.precise else 'eight'}_{call.parts}"
    attend, merge = (getattr(emulator, f"emulate_{name}_{variant}") for name in ("attend", "merge"))
    assert attend(ctypes.byref(call.attention), call.splits, call.shared_bytes) == 0
    assert merge(ctypes.byref(call.merge), call.merge.shared_bytes) == 0


@dataclass(frozen=True)
class Case:
    """One shape.

    Attributes:
        keys: Widths of the tiles of every head's keys.
        values: Likewise.
        group: Query heads of a group.
        tokens: Encoded tokens.
        batch: Rows.
        splits: Parts of the context.
        precise: Twice eight bits.
        starts: First visible token of every row.
        spread: Standard deviation of the scores, roughly.
    """

    keys: tuple[tuple[int, ...], ...] = ((6, 4, 3, 0), (4, 2, 1, 1))
    values: tuple[tuple[int, ...], ...] = ((3, 3, 2, 1), (8, 4, 4, 0))
    group: int = 4
    tokens: int = 300
    batch: int = 2
    splits: int = 2
    precise: bool = True
    starts: tuple[int, ...] | None = None
    spread: float = 3.0


@dataclass
class Inputs:
    """What a case's seed gives: packed rows and queries before packing."""

    case: Case
    layout: Layout = field(init=False)
    rows: Tensor = field(init=False)
    queries: Tensor = field(init=False)
    offsets: Tensor = field(init=False)
    decoder: Tensor = field(init=False)
    mean: Tensor = field(init=False)
    starts: Tensor | None = field(init=False)
    codes: list[Tensor] = field(init=False)
    gains: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        case = self.case
        random = torch.Generator().manual_seed(0)
        self.layout = Layout(case.keys, case.values)
        heads, dim, anchors = self.layout.heads, self.layout.coefficients, -(-case.tokens // 128)
        shape = (case.batch, heads, 128 * anchors, dim)
        self.codes = []
        for side in (case.keys, case.values):
            codes = torch.zeros(shape, dtype=torch.int64)
            for head, widths in enumerate(side):
                for tile, width in enumerate(widths):
                    own = torch.randint(0, 1 << width, (*shape[:1], shape[2], 16), generator=random)
                    if width > 4:
                        own = torch.tensor(layouts.integer_levels(LEVELS[width]))[own]
                    codes[:, head, :, 16 * tile : 16 * tile + 16] = own
            self.codes.append(codes)
        self.gains = [(torch.randn(shape[:3], generator=random) * 0.4).exp().half() for _ in range(2)]
        self.rows = self.layout.pack(self.codes[0], self.gains[0], self.codes[1], self.gains[1])
        lead = (anchors, case.batch, heads, case.group)
        self.queries = torch.randn(*lead, dim, generator=random) * case.spread / dim**0.5
        self.offsets = torch.randn(lead, generator=random)
        self.decoder = torch.randn(heads, dim, dim, generator=random) / dim**0.5
        self.mean = torch.randn(heads, dim, generator=random)
        self.starts = None if case.starts is None else torch.tensor(case.starts, dtype=torch.int32)

    def plan(self, **more: Tensor) -> Plan:
        """The kernels' call."""
        case = self.case
        packed = self.layout.pack_queries(self.queries, self.offsets, LEVELS, case.precise)
        return plan(
            self.rows, packed, self.layout, LEVELS, self.decoder, self.mean, case.group, case.tokens,
            starts=self.starts, splits=case.splits, precise=case.precise, **more,
        )  # fmt: skip

    def attention(self, dtype: torch.dtype, queries: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Plain torch's answer."""
        keys, values = self.layout.unpack(self.rows, LEVELS, dtype)
        own = [t.to(dtype) for t in (self.queries if queries is None else queries, self.offsets)]
        constants = self.decoder.to(dtype), self.mean.to(dtype)
        return reference.attention(*own, keys, values, *constants, self.case.tokens, self.starts)


def assert_near(found: Tensor, baseline: Tensor, truth: Tensor) -> None:
    """The rule of the suite: no further from float64 than twice the baseline."""
    own, theirs = (float((x.double() - truth).norm()) for x in (baseline, found))
    assert theirs <= 2 * own + 1e-6 * float(truth.norm()), (theirs, own)


CASES = {
    "profiles": Case(),
    "one query": Case(group=1, tokens=100, batch=1, splits=1),
    "three queries, peaked": Case(group=3, tokens=257, spread=40.0, splits=3, batch=1),
    "seven queries": Case(group=7, splits=1, batch=1),
    "eight queries, 128 dimensions": Case(
        keys=((4, 4, 3, 3, 2, 2, 1, 0),), values=((3, 3, 3, 3, 3, 2, 2, 2),), group=8, tokens=520, batch=1, splits=5
    ),
    "a split that sees nothing": Case(starts=(0, 150), splits=3),
} | {
    f"width {width}": Case(
        keys=((width,) * 4,), values=((width,) * 4,), group=1, batch=1, tokens=128 if width % 2 else 127, splits=1
    )
    for width in (1, 2, 3, 4, 6, 8)
}


@pytest.mark.parametrize("name", CASES)
def test_attention_is_as_near_to_float64_as_bfloat16_on_decoded_tokens(name: str, emulator: ctypes.CDLL) -> None:
    inputs = Inputs(CASES[name])
    call = inputs.plan()
    run(emulator, call)
    truth, lse = inputs.attention(torch.float64)
    assert_near(call.out, inputs.attention(torch.bfloat16)[0], truth)
    assert_near(call.lse, inputs.attention(torch.bfloat16)[1], lse)


@pytest.mark.parametrize("group", [4, 7])
def test_eight_bit_queries_cost_what_rounding_them_costs(group: int, emulator: ctypes.CDLL) -> None:
    inputs = Inputs(Case(group=group, precise=False, batch=1))
    call = inputs.plan()
    run(emulator, call)
    truth, _ = inputs.attention(torch.float64)
    widths = torch.tensor(inputs.layout.key_widths).repeat_interleave(16, dim=1)
    step = layouts.steps(LEVELS)[widths].unsqueeze(-2)  # queries are rounded in units of integer levels
    unit = (inputs.queries * step).abs().amax(-1, keepdim=True) / 127
    rounded = torch.where(step > 0, (inputs.queries * step / unit).round() * unit / step.clamp_min(1e-30), 0.0)
    assert_near(call.out, inputs.attention(torch.float64, rounded)[0], truth)


def test_dense_tokens_join_by_log_sum_exp(emulator: ctypes.CDLL) -> None:
    inputs = Inputs(Case(starts=(0, 300), group=2))  # the second row sees dense tokens only
    random = torch.Generator().manual_seed(1)
    dense = torch.randn(2, 2, 2, inputs.layout.coefficients, generator=random)
    dense_lse = torch.randn(2, 2, 2, generator=random) + 8
    call = inputs.plan(dense=dense, dense_lse=dense_lse)
    run(emulator, call)

    def joined(dtype: torch.dtype) -> Tensor:
        out, lse = inputs.attention(dtype)
        shares = torch.softmax(torch.stack((lse, dense_lse.double())) * 0.6931471805599453, dim=0)
        return shares[0].unsqueeze(-1) * out + shares[1].unsqueeze(-1) * dense

    assert_near(call.out, joined(torch.bfloat16), joined(torch.float64))
    torch.testing.assert_close(call.out[1], dense[1])


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
def test_packing_is_undone_by_unpacking(width: int, values: bool) -> None:
    codes = torch.randint(-127 if width == 8 else 0, 128 if width == 8 else 1 << width, (3, 128, 32))
    words = layouts.pack_tiles(codes, width, values)
    assert words.shape == (3, 2, 64 * width)
    assert torch.equal(layouts.unpack_tiles(words, width, values), codes)


def test_rows_unpack_to_the_levels_that_were_packed() -> None:
    inputs = Inputs(Case())
    for side, found in enumerate(inputs.layout.unpack(inputs.rows, LEVELS, torch.float64)):
        widths = (inputs.case.keys, inputs.case.values)[side]
        for head, tiles in enumerate(widths):
            for tile, width in enumerate(tiles):
                codes = inputs.codes[side][:, head, :, 16 * tile : 16 * tile + 16]
                integers = codes if width > 4 else torch.tensor(layouts.integer_levels(LEVELS[width]))[codes]
                expected = integers * layouts.steps(LEVELS)[width] * inputs.gains[side][:, head, :, None]
                torch.testing.assert_close(found[:, head, :, 16 * tile : 16 * tile + 16], expected)


@pytest.mark.parametrize("width", range(1, 9))
def test_integer_levels_are_too_coarse_for_a_cache_from_three_bits_on(width: int) -> None:
    """Why no cache attends on them: rounded, they are further from the codec's levels than twice what bfloat16 is."""
    levels = torch.tensor(LEVELS[width], dtype=torch.float64)
    rounded = torch.tensor(layouts.integer_levels(LEVELS[width])) * layouts.steps(LEVELS)[width]
    own, theirs = (float((x - levels).norm()) for x in (levels.bfloat16().double(), rounded))
    assert (theirs > 2 * own) == (width >= 3), (theirs, own)


def test_widths_must_fall() -> None:
    with pytest.raises(ValueError, match=r"key widths of head 0 must fall .* got \(2, 3, 1, 1\)"):
        Layout(((2, 3, 1, 1),), ((3, 3, 3, 3),))


def test_groups_of_more_than_eight_are_refused() -> None:
    inputs = Inputs(Case(batch=1, tokens=128))
    with pytest.raises(ValueError, match="1 to 8 query heads, got 9"):
        plan(inputs.rows, inputs.rows, inputs.layout, LEVELS, inputs.decoder, inputs.mean, 9, 128)


def test_more_splits_than_the_merge_has_threads(emulator: ctypes.CDLL) -> None:
    case = Case(keys=((1, 0, 0, 0),), values=((1, 0, 0, 0),), group=1, batch=1, tokens=128 * 300, splits=300)
    inputs = Inputs(case)
    call = inputs.plan()
    assert call.splits == 300 > 4 * call.merge.dim
    run(emulator, call)
    truth, _ = inputs.attention(torch.float64)
    assert_near(call.out, inputs.attention(torch.bfloat16)[0], truth)


@pytest.mark.parametrize(
    ("anchors", "lines", "splits"),
    [(1024, 64, 99), (256, 64, 64), (256, 8, 198), (1024, 8, 198), (32, 8, 198), (8, 4096, 1)],
)
def test_a_context_is_cut_finely_while_four_anchors_remain(anchors: int, lines: int, splits: int) -> None:
    assert choose_splits(anchors, lines, 12 * 132) == splits


def test_the_sources_are_one_text_for_the_compiler() -> None:
    from quantcache_kernels.cuda.driver import source

    text = source()
    assert "#include" not in text
    assert text.count("#if") == text.count("#endif")
    assert Path(SOURCES / "warp.h").exists()
    assert column_tiles(4) == 1
