"""The split RoPE frame against textbook rotations in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quantcache.coding.rope import FAST_MULTIPLE, Frame, Rope, anchor_of

UNIT = 2.0**-24
"""Rounding of one float32 operation, relative."""


def frequencies(rotary_dim: int, theta: float = 10_000.0) -> tuple[float, ...]:
    """Default RoPE frequencies."""
    return tuple(theta ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2))


CASES = {
    "half-64": (64, Rope("half", frequencies(64))),
    "half-128-theta-5e5": (128, Rope("half", frequencies(128, 5e5))),
    "half-80-rotary-20": (80, Rope("half", frequencies(20))),
    "half-96-rotary-48": (96, Rope("half", frequencies(48))),
    "interleaved-64": (64, Rope("interleaved", frequencies(64))),
    "interleaved-64-rotary-32": (64, Rope("interleaved", frequencies(32))),
    "unsorted": (64, Rope("half", frequencies(64)[::-1])),
    "none-64": (64, Rope()),
}
every = pytest.mark.parametrize(("dim", "rope"), CASES.values(), ids=CASES.keys())
rotating = pytest.mark.parametrize(
    ("dim", "rope"), [c for c in CASES.values() if c[1].rotary_dim], ids=[n for n in CASES if n != "none-64"]
)


def textbook(x: Tensor, positions: Tensor, rope: Rope) -> Tensor:
    """RoPE as models write it, in float64: x cos + rotate_half(x) sin, or a product of complex numbers."""
    rotary = rope.rotary_dim
    turned, rest = x[..., :rotary].double(), x[..., rotary:].double()
    angles = positions.double()[..., None] * torch.tensor(rope.inv_freq, dtype=torch.float64)
    if rope.layout == "interleaved":
        numbers = torch.view_as_complex(turned.unflatten(-1, (-1, 2)).contiguous())
        turned = torch.view_as_real(numbers * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    elif rotary:
        both = torch.cat((angles, angles), dim=-1)
        first, second = turned.chunk(2, dim=-1)
        turned = turned * both.cos() + torch.cat((-second, first), dim=-1) * both.sin()
    return torch.cat((turned, rest), dim=-1)


def assert_rotated(found: Tensor, expected: Tensor) -> None:
    """Equal up to float32: cosine, sine, two products and a sum round once each, in entries at most the vector's norm.

    Per entry |a| and |b| of a pair are at most the norm; two roundings of each product and one of the sum make five
    units, and an input that was itself rounded one more.
    """
    norm = expected.norm(dim=-1, keepdim=True)
    assert ((found.double() - expected).abs() <= 6 * UNIT * norm).all()


@every
def test_order_is_a_permutation(dim: int, rope: Rope) -> None:
    frame = Frame(dim, rope)
    assert sorted(frame.order.tolist()) == list(range(dim))
    assert torch.equal(frame.order[frame.inverse_order], torch.arange(dim))
    assert frame.num_slow + frame.num_fast == dim
    assert frame.is_identity == (rope.rotary_dim == 0)


@every
def test_leave_inverts_enter(dim: int, rope: Rope) -> None:
    frame = Frame(dim, rope)
    x = torch.randn(2, 3, 300, dim)
    positions = torch.arange(300) + 70_000
    anchors = anchor_of(positions, 4)
    assert_rotated(frame.leave(frame.enter(x, positions, anchors), positions, anchors), x.double())


@every
def test_frame_is_orthogonal(dim: int, rope: Rope) -> None:
    frame = Frame(dim, rope)
    basis = torch.eye(dim, dtype=torch.float64)
    framed = frame.enter(basis, torch.tensor(1003), torch.tensor(900))
    # Cosines and sines are rounded to float32: c² + s² is 1 to two units each.
    assert torch.allclose(framed @ framed.T, basis, rtol=0, atol=4 * UNIT)


@rotating
@pytest.mark.parametrize("first", [0, 1_000_003], ids=["near", "far"])
def test_enter_undoes_textbook_rope(dim: int, rope: Rope, first: int) -> None:
    """At a million, an angle formed in float32 would be off by a tenth of a radian."""
    frame = Frame(dim, rope)
    x = torch.randn(2, 200, dim)
    positions = first + torch.arange(200)
    rotated = textbook(x, positions, rope)
    found = frame.enter(rotated, positions, positions)
    assert_rotated(found, x[..., frame.order].double())


@rotating
def test_slow_pairs_turn_by_the_anchor_and_fast_pairs_by_the_position(dim: int, rope: Rope) -> None:
    frame = Frame(dim, rope)
    x = torch.randn(200, dim)
    positions = torch.arange(200) + 500
    anchors = anchor_of(positions, 4)
    found = frame.enter(x, positions, anchors)
    by_anchor, by_position = (textbook(x, -p, rope)[..., frame.order] for p in (anchors, positions))
    slow = frame.num_slow
    assert_rotated(found[:, :slow], by_anchor[:, :slow])
    assert_rotated(found[:, slow:], by_position[:, slow:])


@rotating
def test_scores_are_kept(dim: int, rope: Rope) -> None:
    """A query brought into the frame of a key scores with it as before."""
    frame = Frame(dim, rope)
    query, key = (textbook(torch.randn(100, dim), torch.arange(100), rope) for _ in range(2))
    anchors = anchor_of(torch.arange(100), 4)
    framed = [frame.enter(x, torch.arange(100), anchors) for x in (query, key)]
    bound = 16 * UNIT * query.norm(dim=-1) * key.norm(dim=-1)
    assert (((framed[0] * framed[1]).sum(-1) - (query * key).sum(-1)).abs() <= bound).all()


@every
def test_fast_dimensions(dim: int, rope: Rope) -> None:
    frame = Frame(dim, rope)
    assert frame.num_fast % FAST_MULTIPLE == 0
    assert frame.num_fast <= rope.rotary_dim
    fast_wanted = 2 * sum(2 * math.pi / w < 128 for w in rope.inv_freq)
    assert fast_wanted <= frame.num_fast < fast_wanted + FAST_MULTIPLE or frame.num_fast > rope.rotary_dim - 16
    first, second = rope.pairs()
    speed = {d: w for pair in (first, second) for d, w in zip(pair, rope.inv_freq, strict=True)}
    by_order = [speed.get(d, 0.0) for d in frame.order.tolist()]
    slow, fast = by_order[: frame.num_slow], by_order[frame.num_slow :]
    if fast:
        assert max(slow) <= min(fast)
    assert all(2 * math.pi / w >= 128 for w in slow if w) or frame.num_fast > rope.rotary_dim - 16


@pytest.mark.parametrize(
    ("dim", "theta", "expected"),
    [(64, 1e4, 32), (128, 1e4, 48), (128, 5e5, 32), (128, 1e6, 32), (256, 1e6, 64)],
)
def test_number_of_fast_dimensions(dim: int, theta: float, expected: int) -> None:
    # A pair is fast if θ^(2i/D) < 128/2π = 20.37, that is for 2i < D ln 20.37 / ln θ: 20.9, 41.9, 29.4, 27.9, 55.8.
    assert Frame(dim, Rope("half", frequencies(dim, theta))).num_fast == expected


@pytest.mark.parametrize(("wavelength", "expected"), [(0.0, 0), (1e9, 64)])
def test_fast_wavelength_moves_the_split(wavelength: float, expected: int) -> None:
    assert Frame(64, Rope("half", frequencies(64)), wavelength).num_fast == expected


def test_pairs_that_never_turn() -> None:
    """Some models give part of their pairs the frequency zero: an infinite wavelength."""
    rope = Rope("half", (*frequencies(32), *([0.0] * 16)))
    frame = Frame(64, rope)
    x, positions = torch.randn(50, 64), torch.arange(50) + 1000
    assert_rotated(frame.enter(textbook(x, positions, rope), positions, positions), x[..., frame.order].double())


@every
def test_dtypes(dim: int, rope: Rope) -> None:
    frame = Frame(dim, rope)
    place = torch.tensor(5)
    for given, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        assert frame.enter(torch.randn(3, dim).to(given), place, place).dtype == expected


def test_rotations_broadcast_over_rows_with_their_own_positions() -> None:
    dim, rope = CASES["half-64"]
    frame = Frame(dim, rope)
    x = torch.randn(2, 3, 10, dim)
    positions = torch.stack([torch.arange(10), torch.arange(10) + 77])
    found = frame.enter(x, positions[:, None], positions[:, None])
    for row in range(2):
        assert torch.equal(found[row], frame.enter(x[row], positions[row], positions[row]))


def test_pair_layouts() -> None:
    assert Rope("half", (1.0, 0.5)).pairs() == ([0, 1], [2, 3])
    assert Rope("interleaved", (1.0, 0.5)).pairs() == ([0, 2], [1, 3])
    assert Rope("none", (1.0,)).rotary_dim == 0


def test_rotation_wider_than_the_head() -> None:
    with pytest.raises(ValueError, match=r"\(64\) exceed the head dimension \(32\)"):
        Frame(32, Rope("half", frequencies(64)))


def test_anchors_are_starts_of_128_token_stretches() -> None:
    slots = torch.arange(4, 400)
    anchors = anchor_of(slots, 4)
    assert anchors[:128].unique().tolist() == [4]
    assert anchors[128:256].unique().tolist() == [132]
    assert ((slots - anchors) < 128).all()
    assert (slots >= anchors).all()


@rotating
def test_vectors_are_moved_to_other_positions(dim: int, rope: Rope) -> None:
    x, start = torch.randn(2, 3, 70, dim), torch.arange(70)
    later = torch.arange(70)[None, None] * 7 - 100
    found = Frame(dim, rope).turn(textbook(x, start, rope).float(), later)
    assert found.dtype == torch.float32
    assert_rotated(found, textbook(x, start + later, rope))
