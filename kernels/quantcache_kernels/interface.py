"""What quantcache and its kernels hand each other: a side's constants, and one call of attention.

All kernels read the same objects, and each lays the constants out as it likes.
Shapes: H key/value heads, Hq query heads, D dimension, B batch, Tq queries, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

BLOCK = 64
"""Tokens of an encoded block."""

MAX_WIDTH = 8
"""Largest code width in bits."""

FIELDS: tuple[tuple[int, ...], ...] = ((), (1,), (2,), (2, 1), (4,), (4, 1), (4, 2), (4, 2, 1), (4, 4))
"""Bit fields of each width 0 to 8, most significant first."""

ANCHOR_LENGTH = 128
"""Tokens that share an anchor: offsets from it are smaller."""


@dataclass(frozen=True)
class Frame:
    """How cached vectors are brought into the coordinates they are coded in.

    Attributes:
        order: Cached dimension of every framed one, ``[D]`` int64; slow first halves, slow second halves, unrotated
            ones, fast first halves, fast second halves.
        frequencies: Radians per token of each pair, slow pairs first, float64; empty where vectors are not rotated.
        slow_pairs: How many pairs are slow.
        num_slow: Ds, the dimensions of slow pairs and those that do not rotate.
    """

    order: Tensor
    frequencies: Tensor
    slow_pairs: int
    num_slow: int

    @property
    def fast_pairs(self) -> int:
        """How many pairs are fast."""
        return self.frequencies.shape[0] - self.slow_pairs

    @property
    def is_identity(self) -> bool:
        """Whether nothing rotates: framed vectors are cached ones."""
        return not self.frequencies.shape[0]


@dataclass(frozen=True)
class SideConstants:
    """One side (keys or values) of one layer, as its codec holds it; see ``quantcache.coding.codec.SpectralCodec``.

    Attributes:
        widths: Bits of every coefficient, ``[H, D]``.
        offsets: First word of every coefficient in a block's payload, ``[H, D]``.
        encoder: E, from framed centred vectors to unit-variance coefficients, ``[H, D, D]`` float32.
        decoder: F, the inverse, ``[H, D, D]`` float32.
        mean: μ, ``[H, D]`` float32.
        weights: Weight of every coefficient's error, ``[H, D]`` float32.
        levels: Codebook of every width from 0 to 8, ascending.
        boundaries: Midpoints between neighbouring levels of every width from 0 to 8.
        polynomials: c, a, b of every width's levels ``c x (1 + a x² + b x⁴)``, x the code centred, scaled to (-½, ½).
        gains: What every gain code stands for, ``[256]`` float32.
        gain_search: Multiples of a token's gain that encoding tries.
        frame: The frame.
        words: 32-bit words of a block and batch row.
        coding: ``"scalar"`` or ``"trellis"``: what the codes name levels of.
        passes: How often the best paths are sought, with the gain that fits the last ones.
        unions: The trellis' union codebook of every width from 0 to 8, ascending.
        union_terms: Coefficients of x, x³, ..., x⁹ of every width's union codebook, x the place in it centred, scaled
            to (-½, ½).
    """

    widths: Tensor
    offsets: Tensor
    encoder: Tensor
    decoder: Tensor
    mean: Tensor
    weights: Tensor
    levels: Sequence[Sequence[float]]
    boundaries: Sequence[Sequence[float]]
    polynomials: Sequence[tuple[float, float, float]]
    gains: Tensor
    gain_search: tuple[float, ...]
    frame: Frame
    words: int
    coding: str
    passes: int
    unions: Sequence[Sequence[float]]
    union_terms: Sequence[tuple[float, ...]]

    @property
    def dim(self) -> int:
        """D."""
        return self.mean.shape[1]

    @property
    def num_slow(self) -> int:
        """Ds: all dimensions where nothing rotates."""
        return self.frame.num_slow


class AttentionCall(NamedTuple):
    """What one call of attention asks for, beside its queries and what is cached.

    Attributes:
        mask: Which slots a query may see, ``[B or 1, Hq or 1, Tq or 1, T or more]``, boolean (True: attend) or
            additive; None where ``causal`` says it.
        scaling: Factor of the scores.
        causal: What a missing mask means: whether a query sees only what precedes it. The last Tq cached tokens are
            the queries' own.
        softcap: Scores become ``softcap * tanh(score / softcap)``; None leaves them.
        sink_logits: One logit of each query head that joins the softmax and carries no value, ``[Hq]``, or None.
    """

    mask: Tensor | None
    scaling: float
    causal: bool = True
    softcap: float | None = None
    sink_logits: Tensor | None = None

    def hides_the_future(self, queries: int) -> bool:
        """Whether a kernel has to hide what follows a query.

        Args:
            queries: Tq.

        Returns:
            True if ``causal`` decides what is seen, and there is more than one query.
        """
        return self.causal and self.mask is None and queries > 1
