"""A kernel's first use on a device: it must agree with plain torch, or it is not used in this process.

A compiler, a driver or a card that nobody has tested may make a kernel fail, or make it wrong. Before a kernel works on
a device for the first time, and again for every new geometry, it does a little of that very work beside plain torch.
What it may differ by is not chosen here: it is twice what plain torch differs by from itself, done another way.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcache.backends import reference
from quantcache.backends.base import Backend
from quantcache.backends.view import CacheView
from quantcache.coding.codec import SpectralCodec
from quantcache.coding.packing import BLOCK
from quantcache_kernels.interface import AttentionCall

logger = logging.getLogger(__name__)

FLOOR = 1e-6
"""Relative difference allowed on top, as in the parity suite."""

HALF_STEP = 2.0**-9
"""What rounding to bfloat16 does at most, relative to the number."""

APART = 2.0**-4
"""How far tokens to be encoded on trial are moved, in the same way."""

TRIAL_BLOCKS = 2
"""Blocks of the work at hand that a kernel is tried on."""

UNTRIED = {"cpu"}
"""Devices where a kernel is not tried: on a CPU it is the interpreter's, which nobody uses but tests."""

FAILED = "the kernel has failed its trial (see the log, or quantcache env --check)"
"""Why a backend refuses once :func:`passes` has said no."""

Trial = tuple[Callable[[], Tensor], Tensor, Tensor]
"""A call of the kernel, plain torch's result, and the same of plain torch done another way (see :func:`passes`)."""


@dataclass(frozen=True)
class Outcome:
    """What a trial found.

    Attributes:
        operation: ``"attend"``, ``"encode"``, ``"decode"`` or ``"convert"``.
        backend: Whose kernel.
        device: Where, in words.
        difference: From plain torch, relative to the result; None if the kernel failed.
        allowed: Twice plain torch's own.
        problem: Why the kernel is not used; empty if it is.
    """

    operation: str
    backend: str
    device: str
    difference: float | None
    allowed: float
    problem: str


_outcomes: dict[Hashable, Outcome] = {}
_rejected: dict[tuple[str, str, str], Outcome] = {}
_latest: list[object] = [object()]


def rejections() -> object:
    """What is another object whenever a kernel has failed a trial."""
    return _latest[0]


def rejected(operation: str, backend: str, device: torch.device) -> bool:
    """Whether a kernel has failed a trial on a device."""
    return (operation, backend, str(device)) in _rejected


def passes(
    operation: str,
    backend: str,
    device: torch.device,
    geometry: Hashable,
    work: Callable[[], Trial],
) -> bool:
    """Whether a kernel may be used: it is tried once in every geometry.

    Args:
        operation: ``"attend"``, ``"encode"``, ``"decode"`` or ``"convert"``.
        backend: Whose kernel.
        device: Where.
        geometry: What makes a trial another one.
        work: Gives a call of the kernel on some of the work at hand, plain torch's result, and the same of plain torch
            done another way, such as in the model's precision.

    Returns:
        Whether the kernel may be used. If not, a warning has said so, once for an operation and a device.
    """
    if device.type in UNTRIED:
        return True
    place = (operation, backend, str(device))
    if place in _rejected:
        return False
    key = (*place, geometry)
    if key not in _outcomes:
        _outcomes[key] = found = attempt(operation, backend, device, work)
        if found.problem:
            _rejected[place], _latest[0] = found, object()
            logger.warning(
                "not using the %s kernel of backend %r in this process, and what takes its place is slower: "
                "on %s (%s) %s",
                operation, backend, found.device, versions(), found.problem,
            )  # fmt: skip
    return not _outcomes[key].problem


def attends_rightly(
    backend: Backend,
    query: Tensor,
    view: CacheView,
    call: AttentionCall,
    shape: tuple[Hashable, ...],
    blocks: int = TRIAL_BLOCKS,
) -> bool:
    """Whether a backend's attention may be used for a call: it is tried once in each geometry.

    Args:
        backend: The backend.
        query: As of ``Backend.attend``.
        view: As of ``Backend.attend``.
        call: As of ``Backend.attend``.
        shape: What of the queries' shape chooses the kernel.
        blocks: It is tried on so many, or what there is.

    Returns:
        True if so.
    """
    keys, values = view.spectral_codecs
    codecs = (keys.dim, keys.frame.num_fast, values.dim, keys.coding, values.coding)
    given = (view.left_padding is None, call.mask is None, call.sink_logits is None, call.softcap is None, view.cut)
    work = functools.partial(attention_trial, backend, query, view, call, blocks)
    return passes("attend", backend.name, query.device, (*codecs, *shape, query.dtype, *given), work)


@torch.no_grad()
def attention_trial(backend: Backend, query: Tensor, view: CacheView, call: AttentionCall, blocks: int) -> Trial:
    """Attention on some blocks, for :func:`passes`; arguments as for ``Backend.attend``."""
    small = view.first_blocks(blocks)
    if call.mask is not None:
        call = call._replace(mask=call.mask.new_ones(*call.mask.shape[:3], small.length))
    plain = reference.attend(query.float(), small, call)
    own = reference.own_precision(query, small, call)
    return functools.partial(backend.attend_on_trial, query, small, call), plain, own


@torch.no_grad()
def encoding_trial(
    encode: Callable[..., dict[str, Tensor]],
    codec: SpectralCodec,
    x: Tensor,
    block_table: Tensor,
    left_padding: Tensor | None,
) -> Trial:
    """A kernel's codes of some tokens beside plain torch's, decoded, for :func:`passes`.

    Plain torch done another way has vectors that are rounded once more. Beside the vectors themselves a kernel could be
    off by twice what codes are, which may be more than the vectors: it would pass without gains. Tokens that are all
    alike, as in a warm-up, would have many best paths through a trellis: they are moved apart.

    Args:
        encode: The kernel, called like :meth:`SpectralCodec.encode` with the codec in front.
        codec: The codec.
        x: As of :meth:`SpectralCodec.encode`.
        block_table: As of :meth:`SpectralCodec.encode`.
        left_padding: As of :meth:`SpectralCodec.encode`.

    Returns:
        The trial.
    """
    where, some = block_table[:TRIAL_BLOCKS], x[:, :, : TRIAL_BLOCKS * BLOCK].nan_to_num(0.0, 0.0, 0.0)
    some = shaken(codec, some, APART, 0).to(x.dtype).nan_to_num(0.0, 0.0, 0.0)

    def decoded(fields: dict[str, Tensor]) -> Tensor:
        return codec.decode(fields, where, left_padding)

    plain, other = (
        decoded(codec.encode(each, where, left_padding)) for each in (some, shaken(codec, some, HALF_STEP, 1))
    )
    return lambda: decoded(encode(codec, some, where, left_padding)), plain, other


def shaken(codec: SpectralCodec, x: Tensor, by: float, seed: int) -> Tensor:
    """Vectors moved at random.

    Args:
        codec: Their codec.
        x: ``[B, H, T, D]``.
        by: How far at most, relative to what they may be once they are centred.
        seed: Which way.

    Returns:
        The same shape in float32.
    """
    noise = torch.rand(x.shape[2:], generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")
    largest = codec.mean.abs().amax(-1)[:, None, None]
    return x.float() + by * (2 * noise.to(x.device) - 1) * (x.float().abs() + largest)


def attempt(
    operation: str,
    backend: str,
    device: torch.device,
    work: Callable[[], Trial],
) -> Outcome:
    """Try a kernel; see :func:`passes`.

    Args:
        operation: ``"attend"``, ``"encode"``, ``"decode"`` or ``"convert"``.
        backend: Whose kernel.
        device: Where.
        work: As for :func:`passes`.

    Returns:
        The outcome.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    kernel, plain, other = work()
    exact = plain.cpu().double()
    norm = float(exact.norm()) or 1.0
    allowed = 2 * float((other.cpu().double() - exact).norm()) / norm + FLOOR
    try:
        found = kernel()
        difference = float((found.cpu().double() - exact).norm()) / norm
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler may fail with anything
        text = " ".join(str(error).split())[:500]
        return Outcome(operation, backend, name, None, allowed, f"it failed: {type(error).__name__}: {text}")
    problem = ""
    if not difference <= allowed:  # NaN too
        problem = f"it differs from plain torch by {difference:.2e} of the result, more than {allowed:.2e}"
    return Outcome(operation, backend, name, difference, allowed, problem)


@contextmanager
def without_trials() -> Iterator[None]:
    """Use the kernels whatever their trials say, inside the context: for whoever judges them by another measure.

    Yields:
        Nothing.
    """
    before = set(UNTRIED)
    UNTRIED.update(("cuda", "xpu"))
    try:
        yield
    finally:
        UNTRIED.clear()
        UNTRIED.update(before)


def versions() -> str:
    """Versions of what compiles and runs kernels, in words."""
    found = f"torch {torch.__version__}"
    try:
        import triton
    except ImportError:
        return found
    return f"{found}, triton {triton.__version__}"


def forget() -> None:
    """Forget all trials, for tests."""
    _outcomes.clear()
    _rejected.clear()
    _latest[0] = object()
