"""Methods by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from transformers import Cache, PreTrainedConfig

from quantcache.artifact import cache_layout
from quantcache.artifact.calibration import Calibration
from quantcache.coding.growth import num_blocks
from quantcache.coding.packing import BLOCK
from quantcache.coding.schema import SIDES
from quantcache.common.defaults import RESIDUAL_LENGTH, SINK_LENGTH
from quantcache.common.errors import QuantCacheError
from quantcache.evaluation.methods import (
    calibrated,
    dense,
    floor,
    installed,
    integer,
    kvarn,
    rotated,
    spectral,
    turboquant,
)
from quantcache.evaluation.methods.base import Method, MethodUnavailable, Scheme, Setting
from quantcache.evaluation.methods.statistics import RivalStatistics

SCHEMES: dict[str, Scheme] = {}
"""Every family of methods, by the stem of its name."""


def register(scheme: Scheme) -> None:
    """Add a family of methods to those that can be measured.

    Args:
        scheme: The family.

    Raises:
        QuantCacheError: Another family has its stem, or it does not state the bits that an element takes.
    """
    if scheme.stem in SCHEMES:
        raise QuantCacheError(f"method {scheme.stem!r} is registered already")
    number = float(scheme.numbers[0] if scheme.numbers else scheme.limits[1] if scheme.parameter else 0)
    for side in SIDES:
        bits = scheme.bits(number, side, 64) if callable(scheme.bits) else None
        if not isinstance(bits, int | float) or not 0 < bits < math.inf:
            raise QuantCacheError(
                f"method {scheme.stem!r} must state the bits that an element of its {side}s takes, got {bits!r}"
            )
    SCHEMES[scheme.stem] = scheme


for _module in (dense, spectral, installed, integer, rotated, turboquant, kvarn, calibrated, floor):
    for _each in _module.SCHEMES:
        register(_each)

METHOD_NAMES: tuple[str, ...] = tuple(scheme.pattern for scheme in SCHEMES.values())
"""Every name that can be given without a method of the caller's own: B bits, K a rank, T the tokens of a tile."""

ALL = "all"


def all_methods(config: PreTrainedConfig) -> list[str]:
    """What ``all`` stands for.

    Args:
        config: ``model.config``.

    Returns:
        Names of every family at the numbers it is compared at.
    """
    names = []
    for scheme in SCHEMES.values():
        numbers = scheme.defaults(config) if scheme.parameter else ()
        names += [f"{scheme.stem}-{number:g}" for number in numbers] or [scheme.stem]
    return names


def needs_statistics(names: Sequence[str]) -> bool:
    """Whether any of these methods is fitted to :class:`RivalStatistics`.

    Args:
        names: Names as for :func:`parse_methods`.

    Returns:
        True if statistics should be collected first.
    """
    stems = {name.rpartition("-")[0] for name in names}
    return ALL in names or any(each.stem in stems for each in SCHEMES.values() if each.needs == "statistics")


def parse_methods(
    names: Sequence[str],
    config: PreTrainedConfig,
    calibration: Calibration | None,
    sink_length: int = SINK_LENGTH,
    residual_length: int = RESIDUAL_LENGTH,
    *,
    statistics: RivalStatistics | None = None,
    own_lengths: bool = False,
) -> list[Method]:
    """Turn method names into methods.

    Args:
        names: Names as in :data:`METHOD_NAMES`, or ``all``.
        config: ``model.config``.
        calibration: The model's calibration, for ``spectral-B``.
        sink_length: First tokens kept by every method that can.
        residual_length: Recent tokens kept by every method that can.
        statistics: Moments on a calibration text, for ``pca-B``, ``oscar-B`` and ``rank-K``.
        own_lengths: Give every method the sinks and the residual that its authors recommend, in place of these.

    Returns:
        The methods in the order given, each once. One that cannot be run here says why in ``unsupported``.

    Raises:
        QuantCacheError: A name is unknown, its number out of range, or it needs a calibration and none is given.
    """
    expanded = [each for name in names for each in (all_methods(config) if name == ALL else (name,))]
    methods = []
    for name in dict.fromkeys(expanded):
        scheme, number = find_scheme(name, config)
        lengths = scheme.own_lengths if own_lengths else None
        sinks, residual = lengths or (sink_length, residual_length)
        make, unsupported = _maker(scheme, number, Setting(config, calibration, statistics, sinks, residual))
        methods.append(
            Method(
                name,
                scheme.family,
                scheme.simulated,
                make,
                description=scheme.description,
                source=scheme.source,
                unsupported=unsupported,
                sink_length=sinks if scheme.keeps_lengths else None,
                residual_length=residual if scheme.keeps_lengths else None,
                tile=scheme.tile(number),
            )
        )
    return methods


def reading_codes(methods: Sequence[Method], tokens: int, cached: int | None = None) -> list[Method]:
    """Methods for a text of some tokens; those that would read it without a code cannot be measured on it.

    Such a cache is as exact as the dense one, and its figures would be taken for those of the method.

    Args:
        methods: The methods.
        tokens: Tokens of the text.
        cached: Tokens that a cache holds at most while something is still read; all by default.

    Returns:
        The methods in their order, each that reads no code with the reason in ``unsupported``.
    """
    found = []
    for method in methods:
        kept = (method.sink_length, method.residual_length, method.tile)
        if method.family in ("ours", "rival") and None not in kept and not method.unsupported:
            sinks, residual, tile = (int(each or 0) for each in kept)
            if not num_blocks(tokens if cached is None else cached, sinks, residual, tile // BLOCK):
                exact = f"the first {sinks} and the last {residual} stay as they are"
                reason = f"in {tokens} tokens it reads no codes: {exact}, others are encoded {tile} at a time"
                method = replace(method, unsupported=reason, make_cache=_refusing(reason))
        found.append(method)
    return found


def find_scheme(name: str, config: PreTrainedConfig) -> tuple[Scheme, float]:
    """The family that a name asks for, and its number.

    Args:
        name: A name as in :data:`METHOD_NAMES`.
        config: The model's config, which bounds ranks.

    Returns:
        The family, and the number; 0 where it has none.

    Raises:
        QuantCacheError: The name is unknown, or its number out of range.
    """
    found = split_name(name)
    if found is None:
        raise QuantCacheError(
            f"unknown method {name!r}: known are {', '.join(each.pattern for each in SCHEMES.values())}"
        )
    scheme, number = found
    if scheme.parameter == "K":
        _, dim = cache_layout.kv_geometry(config.get_text_config(decoder=True))
        if number not in range(1, dim + 1):
            raise QuantCacheError(f"{name}: the rank must be a whole number from 1 to {dim}, got {number:g}")
    elif scheme.parameter:
        scheme.check(number)
    return scheme, number


def split_name(name: str) -> tuple[Scheme, float] | None:
    """The family that a name asks for, and its number, whether or not the family takes it.

    Args:
        name: A name as in :data:`METHOD_NAMES`.

    Returns:
        The family, and the number, 0 where it has none; None if no family has such names.
    """
    if name in SCHEMES and not SCHEMES[name].parameter:
        return SCHEMES[name], 0.0
    stem, _, text = name.rpartition("-")
    scheme = SCHEMES.get(stem)
    if scheme is None or not scheme.parameter:
        return None
    try:
        return scheme, float(text)
    except ValueError:
        return None


def _maker(scheme: Scheme, number: float, setting: Setting) -> tuple[Callable[[], Cache], str | None]:
    """A maker of caches, and why there can be none."""
    reason = scheme.unsupported()
    if reason is None:
        try:
            return scheme.make(number, setting), None
        except MethodUnavailable as error:
            reason = str(error)
    return _refusing(reason), reason


def _refusing(reason: str) -> Callable[[], Cache]:
    """A maker of no caches."""

    def refuse() -> Cache:
        raise MethodUnavailable(reason)

    return refuse
