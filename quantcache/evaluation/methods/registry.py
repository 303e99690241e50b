"""Methods by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from transformers import Cache, PreTrainedConfig

from quantcache.artifact import cache_layout
from quantcache.artifact.calibration import Calibration
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
from quantcache.evaluation.methods.base import Method, MethodUnavailable, Recipe, Setting
from quantcache.evaluation.methods.statistics import RivalStatistics

RECIPES: dict[str, Recipe] = {}
"""Every family of methods, by the stem of its name."""


def register(recipe: Recipe) -> None:
    """Add a family of methods to those that can be measured.

    Args:
        recipe: The family.

    Raises:
        QuantCacheError: Another family has its stem, or it does not state the bits that an element takes.
    """
    if recipe.stem in RECIPES:
        raise QuantCacheError(f"method {recipe.stem!r} is registered already")
    number = float(recipe.numbers[0] if recipe.numbers else recipe.limits[1] if recipe.parameter else 0)
    for side in SIDES:
        bits = recipe.bits(number, side, 64) if callable(recipe.bits) else None
        if not isinstance(bits, int | float) or not 0 < bits < math.inf:
            raise QuantCacheError(
                f"method {recipe.stem!r} must state the bits that an element of its {side}s takes, got {bits!r}"
            )
    RECIPES[recipe.stem] = recipe


for _module in (dense, spectral, installed, integer, rotated, turboquant, kvarn, calibrated, floor):
    for _each in _module.RECIPES:
        register(_each)

METHOD_NAMES: tuple[str, ...] = tuple(recipe.pattern for recipe in RECIPES.values())
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
    for recipe in RECIPES.values():
        numbers = recipe.defaults(config) if recipe.parameter else ()
        names += [f"{recipe.stem}-{number:g}" for number in numbers] or [recipe.stem]
    return names


def needs_statistics(names: Sequence[str]) -> bool:
    """Whether any of these methods is fitted to :class:`RivalStatistics`.

    Args:
        names: Names as for :func:`parse_methods`.

    Returns:
        True if statistics should be collected first.
    """
    stems = {name.rpartition("-")[0] for name in names}
    return ALL in names or any(r.stem in stems for r in RECIPES.values() if r.needs == "statistics")


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
        recipe, number = find_recipe(name, config)
        lengths = recipe.own_lengths if own_lengths else None
        sinks, residual = lengths or (sink_length, residual_length)
        make, unsupported = _maker(recipe, number, Setting(config, calibration, statistics, sinks, residual))
        about = (recipe.description, recipe.source, unsupported)
        kept = (sinks, residual) if recipe.keeps_lengths else (None, None)
        lengths_kept = (*kept, recipe.tile(number))
        methods.append(Method(name, recipe.family, recipe.simulated, make, *about, *lengths_kept))
    return methods


def find_recipe(name: str, config: PreTrainedConfig) -> tuple[Recipe, float]:
    """The family that a name asks for, and its number.

    Args:
        name: A name as in :data:`METHOD_NAMES`.
        config: The model's config, which bounds ranks.

    Returns:
        The family, and the number; 0 where it has none.

    Raises:
        QuantCacheError: The name is unknown, or its number out of range.
    """
    if name in RECIPES and not RECIPES[name].parameter:
        return RECIPES[name], 0.0
    stem, _, text = name.rpartition("-")
    recipe = RECIPES.get(stem)
    try:
        number = float(text)
    except ValueError:
        recipe = None
    if recipe is None or not recipe.parameter:
        raise QuantCacheError(f"unknown method {name!r}: known are {', '.join(r.pattern for r in RECIPES.values())}")
    if recipe.parameter == "K":
        _, dim = cache_layout.kv_geometry(config.get_text_config(decoder=True))
        if number not in range(1, dim + 1):
            raise QuantCacheError(f"method {name}: the rank must be a whole number from 1 to {dim}, got {text}")
    elif recipe.numbers is None:
        low, high = recipe.limits
        if not low <= number <= high:
            raise QuantCacheError(f"method {name}: bits must lie between {low} and {high}, got {text}")
    elif number not in recipe.numbers:
        allowed = recipe.numbers
        whole = allowed == tuple(range(allowed[0], allowed[-1] + 1))
        wanted = (
            f"a whole number from {allowed[0]} to {allowed[-1]}" if whole else f"one of {', '.join(map(str, allowed))}"
        )
        what = "the tile" if recipe.parameter == "T" else "bits"
        raise QuantCacheError(f"method {name}: {what} must be {wanted}, got {text}")
    return recipe, number


def _maker(recipe: Recipe, number: float, setting: Setting) -> tuple[Callable[[], Cache], str | None]:
    """A maker of caches, and why there can be none."""
    reason = recipe.unsupported()
    if reason is None:
        try:
            return recipe.make(number, setting), None
        except MethodUnavailable as error:
            reason = str(error)
    missing = reason

    def refuse() -> Cache:
        raise MethodUnavailable(missing)

    return refuse, missing
