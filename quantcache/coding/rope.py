"""The split RoPE frame in which keys are coded.

Keys reach the cache already rotated by their position. In that form their mean and covariance smear with position;
fully un-rotated they are compact, but every cached key then needs its rotation again at decode. The frame stands in
between. With the anchor of a token being the start of its 128-token stretch:

- slow pairs (wavelength of at least 128 tokens, and every dimension that does not rotate) are un-rotated by the
  position of the anchor. At decode the *query* is rotated, once per anchor;
- fast pairs are un-rotated by the token's own position. They are few, and are rotated back by the token's offset from
  its anchor, one table for all anchors.

Framed vectors hold the slow part first, then the fast part. The frame is orthogonal whatever the frequencies: a model
that changes its frequencies on the way loses fidelity, never correctness.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quantcache.common.ambient import float64_device, in_float64
from quantcache_kernels.interface import ANCHOR_LENGTH as ANCHOR_LENGTH

FAST_WAVELENGTH = 128.0
"""Rotary pairs that turn once in fewer tokens than this are fast."""

FAST_MULTIPLE = 16
"""The number of fast dimensions is rounded up to a multiple of this, the smallest tensor-core tile."""

RopeLayout = Literal["none", "half", "interleaved"]


@dataclass(frozen=True)
class Rope:
    """How a layer's keys are rotated.

    Attributes:
        layout: ``half`` pairs dimension i with i + r/2, ``interleaved`` pairs 2i with 2i + 1 (over the first r
            dimensions, r = 2 * len(inv_freq)); ``none`` leaves keys as they are.
        inv_freq: Radians per token of each pair.
    """

    layout: RopeLayout = "none"
    inv_freq: tuple[float, ...] = ()

    @property
    def rotary_dim(self) -> int:
        """Number of dimensions that rotate."""
        return 0 if self.layout == "none" else 2 * len(self.inv_freq)

    def pairs(self) -> tuple[list[int], list[int]]:
        """First and second dimension of every rotary pair."""
        count = self.rotary_dim // 2
        if self.layout == "interleaved":
            return [2 * i for i in range(count)], [2 * i + 1 for i in range(count)]
        return list(range(count)), list(range(count, 2 * count))


def fast_dimensions(rope: Rope, fast_wavelength: float = FAST_WAVELENGTH) -> int:
    """How many dimensions of a key rotate fast.

    Args:
        rope: Its rotation.
        fast_wavelength: Pairs with a shorter wavelength (in tokens) are fast.

    Returns:
        Their number, rounded up to whole tiles where there are as many that rotate.
    """
    count = sum(w * fast_wavelength > 2 * math.pi for w in rope.inv_freq) if rope.rotary_dim else 0
    wanted = -(-2 * count // FAST_MULTIPLE) * FAST_MULTIPLE
    return min(wanted, rope.rotary_dim // FAST_MULTIPLE * FAST_MULTIPLE)


class Frame:
    """The orthogonal change of coordinates between cached vectors and the coordinates they are coded in.

    Args:
        head_dim: D, rotating and other dimensions together.
        rope: The rotation that the vectors carry; ``Rope()`` makes the frame the identity (values, models without
            RoPE).
        fast_wavelength: Pairs with a shorter wavelength (in tokens) are fast.
        device: Where the index and frequency tensors live.
    """

    def __init__(
        self,
        head_dim: int,
        rope: Rope,
        fast_wavelength: float = FAST_WAVELENGTH,
        device: torch.device | str = "cpu",
    ):
        if rope.rotary_dim > head_dim:
            raise ValueError(f"rotary dimensions ({rope.rotary_dim}) exceed the head dimension ({head_dim})")
        self.head_dim = head_dim
        self.rope = rope
        self.fast_wavelength = fast_wavelength
        first, second = rope.pairs()
        self.num_fast = fast_dimensions(rope, fast_wavelength)
        self.num_slow = head_dim - self.num_fast

        by_speed = sorted(range(rope.rotary_dim // 2), key=lambda i: rope.inv_freq[i])
        slow, fast = by_speed[: len(by_speed) - self.num_fast // 2], by_speed[len(by_speed) - self.num_fast // 2 :]
        rotary = set(first) | set(second)
        order = [first[i] for i in slow] + [second[i] for i in slow]
        order += [d for d in range(head_dim) if d not in rotary]
        order += [first[i] for i in fast] + [second[i] for i in fast]
        self.is_identity = not rotary
        self.slow_pairs, self.fast_pairs = len(slow), len(fast)
        self.order = torch.tensor(order, dtype=torch.int64, device=device)
        self.inverse_order = torch.argsort(self.order)
        frequencies = [rope.inv_freq[i] for i in slow + fast] if rotary else []
        self.frequencies = torch.tensor(frequencies, dtype=torch.float64, device="cpu").to(float64_device(device))

    def rotation(self, slow_positions: Tensor, fast_positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the rotation by given positions.

        Args:
            slow_positions: Positions by which slow pairs turn, any shape ``[...]``.
            fast_positions: Positions by which fast pairs turn, the same shape.

        Returns:
            float32 cosines and sines, ``[..., pairs]``, slow pairs first.
        """
        slow = self._cos_sin(slow_positions, self.frequencies[: self.slow_pairs])
        cos, sin = (torch.cat(pair, dim=-1) for pair in zip(slow, self.fast_rotation(fast_positions), strict=True))
        return cos, sin

    def fast_rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The part of :meth:`rotation` that is of the fast pairs.

        Args:
            positions: Any shape ``[...]``.

        Returns:
            float32 cosines and sines, ``[..., fast pairs]``.
        """
        return self._cos_sin(positions, self.frequencies[self.slow_pairs :])

    @staticmethod
    def _cos_sin(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        """Angles are formed in float64: at position 131,072 a float32 product is wrong by a hundredth of a radian."""
        angles = in_float64(positions).unsqueeze(-1) * frequencies
        return angles.cos().float().to(positions.device), angles.sin().float().to(positions.device)

    def rotate(self, framed: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn the rotary pairs of vectors in frame order.

        Args:
            framed: ``[..., D]`` in frame order (slow first halves, slow second halves, the rest, fast first halves,
                fast second halves).
            cos: ``[..., pairs]``, broadcastable.
            sin: Like ``cos``; pass its negative to turn back.

        Returns:
            The rotated vectors, ``[..., D]``.
        """
        s, f = self.slow_pairs, self.fast_pairs
        a, b, rest, c, d = framed.split((s, s, self.num_slow - 2 * s, f, f), dim=-1)
        rest = rest.expand(*torch.broadcast_shapes(framed.shape[:-1], cos.shape[:-1]), -1)
        slow_cos, fast_cos = cos.split((s, f), dim=-1)
        slow_sin, fast_sin = sin.split((s, f), dim=-1)
        return torch.cat(
            (
                a * slow_cos - b * slow_sin,
                b * slow_cos + a * slow_sin,
                rest,
                c * fast_cos - d * fast_sin,
                d * fast_cos + c * fast_sin,
            ),
            dim=-1,
        )

    def enter(self, x: Tensor, positions: Tensor, anchors: Tensor) -> Tensor:
        """Bring cached vectors into the frame.

        Args:
            x: ``[..., D]`` as the model caches them.
            positions: Position of each vector, broadcastable to ``x.shape[:-1]``.
            anchors: Position of each vector's anchor, the shape of ``positions``.

        Returns:
            Framed vectors in float32 (float64 stays), ``[..., D]``.
        """
        x = x if x.dtype == torch.float64 else x.float()
        if self.is_identity:
            return x
        cos, sin = self.rotation(anchors, positions)
        return self.rotate(x[..., self.order], cos.to(x.dtype), -sin.to(x.dtype))

    def leave(self, framed: Tensor, positions: Tensor, anchors: Tensor) -> Tensor:
        """Invert :meth:`enter`.

        Args:
            framed: ``[..., D]``, slow part first.
            positions: Position of each vector, broadcastable to ``framed.shape[:-1]``.
            anchors: Position of each vector's anchor, the shape of ``positions``.

        Returns:
            Vectors as the model caches them, ``[..., D]``.
        """
        if self.is_identity:
            return framed
        cos, sin = self.rotation(anchors, positions)
        return self.rotate(framed, cos.to(framed.dtype), sin.to(framed.dtype))[..., self.inverse_order]

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """Move cached vectors to later positions.

        Args:
            x: ``[..., D]`` as the model caches them.
            positions: How much later, or earlier where negative; broadcastable to ``x.shape[:-1]``.

        Returns:
            What the model would cache there, in float32 (float64 stays), ``[..., D]``.
        """
        x = x if x.dtype == torch.float64 else x.float()
        return self.leave(x[..., self.order], positions, positions)


def anchor_of(slots: Tensor, first: int) -> Tensor:
    """Anchor of each token of an uninterrupted run of blocks.

    Args:
        slots: Slots of tokens, integers of any shape.
        first: Slot of the first encoded token (the number of sinks).

    Returns:
        The slot where the 128-token stretch of each token starts.
    """
    return torch.div(slots - first, ANCHOR_LENGTH, rounding_mode="floor") * ANCHOR_LENGTH + first
