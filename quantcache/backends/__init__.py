"""Implementations of encoding and of attention on codes, and which of them serves a layer.

To add one, write a :class:`Backend` in a module of its own and give it a place in :data:`FASTEST_FIRST`; nothing
else in quantcache names a backend.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from quantcache.backends import trials
from quantcache.backends.base import CODE_QUERIES, Backend, BackendReport, Fields, Stage
from quantcache.backends.cpu import CpuBackend
from quantcache.backends.cuda import CudaBackend
from quantcache.backends.reference import REFERENCE
from quantcache.backends.triton import TritonBackend
from quantcache.backends.view import CacheView
from quantcache.coding.blocks import SideCodec
from quantcache.coding.codec import SpectralCodec
from quantcache.common.ambient import without_autocast
from quantcache.common.choices import BackendName
from quantcache.common.errors import QuantCacheError
from quantcache.common.logs import log_once
from quantcache_kernels.interface import AttentionCall

__all__ = [
    "BACKENDS",
    "CODE_QUERIES",
    "FASTEST_FIRST",
    "REFERENCE",
    "AttentionCall",
    "Backend",
    "BackendName",
    "BackendReport",
    "CacheView",
    "Choice",
    "Fields",
    "Stage",
    "attend",
    "choose",
    "find",
    "known_name",
    "require_usable",
]

logger = logging.getLogger(__name__)

_TRITON = TritonBackend()

FASTEST_FIRST: dict[str, tuple[Backend, ...]] = {
    "cpu": (CpuBackend(),),
    "cuda": (CudaBackend(_TRITON), _TRITON),
    "xpu": (_TRITON,),
}
"""By type of device, what ``"auto"`` tries before plain torch."""

NEXT_BEST: dict[str, tuple[Backend, ...]] = {"cuda": (_TRITON,)}
"""Who serves the layers that a backend lacks which was asked for by name; plain torch where nobody is named."""

BACKENDS: dict[str, Backend] = {
    each.name: each for each in (*(each for tried in FASTEST_FIRST.values() for each in tried), REFERENCE)
}
"""Every backend by name."""

_ALIASES = {"native": "cpu"}


def known_name(name: str) -> str:
    """Check the name of a backend.

    Args:
        name: ``"auto"``, ``"cpu"``, ``"triton"``, ``"cuda"`` or ``"torch"``.

    Returns:
        The name; of two names for one backend always the same.

    Raises:
        ValueError: No backend has this name.
    """
    known = _ALIASES.get(name, name) if isinstance(name, str) else name
    if known != "auto" and known not in BACKENDS:
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {name!r}")
    return known


def find(name: str) -> Backend:
    """A backend by name.

    Args:
        name: Any but ``"auto"``.

    Returns:
        The backend.
    """
    return BACKENDS[known_name(name)]


def require_usable(name: str, device: torch.device) -> None:
    """Refuse a backend that was asked for by name and cannot run.

    Args:
        name: What the user asked for.
        device: Where keys and values are.

    Raises:
        QuantCacheError: It cannot run on that device.
    """
    reason = None if name == "auto" else find(name).unavailable(device)
    if reason is not None:
        raise QuantCacheError(f'backend="{known_name(name)}" cannot be used here: {reason}')


def choose(
    name: str, device: torch.device, dtypes: Mapping[str, torch.dtype], codecs: Mapping[str, SideCodec]
) -> tuple[Backend, BackendReport]:
    """The backend of one layer on one device.

    Args:
        name: What the user asked for.
        device: Where the layer's keys and values are.
        dtypes: Dtypes of keys and values, by side.
        codecs: The layer's codecs by side.

    Returns:
        The backend, and why it is this one.

    Raises:
        QuantCacheError: A backend was asked for by name and cannot run here.
    """
    name = known_name(name)
    require_usable(name, device)
    report = BackendReport(REFERENCE.name)
    asked_for = (BACKENDS[name], *NEXT_BEST.get(name, ())) if name != "auto" else FASTEST_FIRST.get(device.type, ())
    partly: list[tuple[Backend, dict[str, str]]] = []
    for backend in asked_for:
        reason = backend.unavailable(device)
        if reason is not None:
            report.passed_over[backend.name] = reason
            continue
        asked = {side: backend.lacks(codec, dtypes[side]) for side, codec in codecs.items()}
        lacks = {side: reason for side, reason in asked.items() if reason is not None}
        if not lacks:
            if name not in ("auto", backend.name):
                log_once(logger, logging.WARNING, f"not using the {name} kernels: {report.passed_over[name]}")
            return backend, _serving(report, backend, device)
        report.passed_over[backend.name] = next(iter(lacks.values()))
        if len(lacks) < len(codecs):
            partly.append((backend, lacks))
            if backend.name == name:
                break
    missing = "; ".join(f"no {other} kernels ({reason})" for other, reason in report.passed_over.items())
    if missing and all(isinstance(codec, SpectralCodec) for codec in codecs.values()):
        work = "attending" if partly else "encoding and attending"
        log_once(logger, logging.WARNING, f"{work} in plain torch, which is slower: {missing}")
    if not partly:
        return REFERENCE, report
    # Plain torch attends, and takes portable blocks as they are.
    backend, lacks = min(partly, key=lambda each: each[0].layout != REFERENCE.layout)
    del report.passed_over[backend.name]
    report.attends = "; ".join(f"{side}s: {reason}" for side, reason in lacks.items())
    return backend, _serving(report, backend, device)


def _serving(report: BackendReport, backend: Backend, device: torch.device) -> BackendReport:
    """A report of who serves."""
    report.name = backend.name
    others = "".join(f"; not {other}: {reason}" for other, reason in report.passed_over.items())
    log_once(
        logger, logging.INFO, f"keys and values on {device.type} are encoded by the {backend.name} backend{others}"
    )
    return report


class Choice:
    """The backend that was chosen for a layer last; chosen anew only when what it depends on has changed."""

    def __init__(self) -> None:
        # One attribute, as forks in several threads share a choice: who reads it has a result with its own key. Codecs
        # are kept so that no other codec gets the address of one of them.
        self._last: tuple[tuple[object, ...], Mapping[str, SideCodec], tuple[Backend, BackendReport]] | None = None

    def of(
        self, name: str, device: torch.device, dtypes: Mapping[str, torch.dtype], codecs: Mapping[str, SideCodec]
    ) -> tuple[Backend, BackendReport]:
        """See :func:`choose`."""
        rejections = trials.rejections() if name == "auto" else None  # a kernel that fails leaves its layers to others
        key = (name, device, rejections, *map(id, codecs.values()), *dtypes.values())
        last = self._last
        if last is None or last[0] != key:
            self._last = last = key, codecs, choose(name, device, dtypes, codecs)
        return last[2]


@without_autocast
def attend(query: Tensor, view: CacheView, call: AttentionCall) -> Tensor:
    """Attend on a view that holds encoded blocks, by its backend where that serves the call.

    Args:
        query: ``[B, Hq, Tq, D]``; the last Tq tokens of the view are the queries' own.
        view: What may be read.
        call: The rest of the call.

    Returns:
        ``[B, Tq, Hq, Dv]`` in the query's dtype.
    """
    if view.stage is not None:
        return view.stage.attend(query, call)
    backend, report = view.backend, view.report
    few = query.shape[2] <= CODE_QUERIES and view.on_codes
    if backend is None or report is None or backend is REFERENCE or report.attends is not None or not few:
        return REFERENCE.attend(query, view, call)
    reason = backend.refuses(query, view, call)
    if reason is None:
        return backend.attend(query, view, call)
    report.refused[reason] += 1
    log_once(logger, logging.INFO, f"attention in plain torch instead of the {backend.name} backend: {reason}")
    return REFERENCE.attend(query, view, call)
