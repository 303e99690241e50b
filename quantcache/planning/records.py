"""Measured figures, read from records: what ``quantcache eval -o`` and the benchmarks write.

The records themselves are read and checked by :mod:`quantcache.evaluation.record`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from quantcache.common.defaults import CHUNK, SINK_LENGTH
from quantcache.common.env import machine
from quantcache.common.jsonfile import as_type
from quantcache.common.sources import PACKAGED
from quantcache.evaluation.record import Record, RecordError, check, read_strict_json

SUITES = ("eval", "fidelity", *(f"fidelity-{model}" for model in PACKAGED), "cpu-decode")
"""Suites whose records have figures of fidelity or speed on whole models."""


@dataclass(frozen=True)
class Origin:
    """Where a figure is from.

    Attributes:
        file: The record's file name.
        created: When it was measured.
        commit: Commit of quantcache that was measured; None if not known.
        dirty: Whether files differed from that commit.
        hardware: What it was measured on.
    """

    file: str
    created: str
    commit: str | None
    dirty: bool
    hardware: str

    def __str__(self) -> str:
        commit = "no commit" if self.commit is None else f"commit {self.commit[:10]}{' with changes' * self.dirty}"
        return f"{self.hardware}, {commit}, {self.file}"


@dataclass(frozen=True)
class Fidelity:
    """How far one method moved one model's predictions.

    Attributes:
        method: Name, such as ``spectral-3``.
        model: The model, as the record names it.
        dtype: Dtype of the model's weights.
        context: Tokens in a window.
        residual: Recent tokens kept as they are; None where the method decides for itself.
        tokens: Positions measured.
        kl_mean: Mean KL divergence from the dense cache's predictions, nats per token.
        kl_stderr: Its standard error; None if not recorded. Records of earlier versions took tokens for independent.
        top1_agreement: Share of positions with the same most likely token.
        perplexity: Perplexity of the text with this cache.
        bits_per_element: Codes and scales over encoded elements.
        origin: Where it is from.
    """

    method: str
    model: str
    dtype: str
    context: int
    residual: int | None
    tokens: int
    kl_mean: float
    kl_stderr: float | None
    top1_agreement: float
    perplexity: float
    bits_per_element: float
    origin: Origin


@dataclass(frozen=True)
class Speed:
    """How fast one model decoded with one method.

    Attributes:
        method: Name, such as ``spectral-3``.
        model: The model, as the record names it.
        context: Cached tokens.
        batch: B, rows decoded together.
        decode_ms: Median time of a decoding step.
        speedup: Time of the dense cache, measured beside it, over that time.
        origin: Where it is from.
    """

    method: str
    model: str
    context: int
    batch: int
    decode_ms: float
    speedup: float
    origin: Origin


@dataclass(frozen=True)
class Measurements:
    """Figures of fidelity and speed."""

    fidelity: list[Fidelity] = field(default_factory=list)
    speed: list[Speed] = field(default_factory=list)

    def __add__(self, other: Measurements) -> Measurements:
        return Measurements(self.fidelity + other.fidelity, self.speed + other.speed)

    def models(self) -> list[str]:
        """Models with figures of fidelity."""
        return list(dict.fromkeys(figure.model for figure in self.fidelity))

    def shared_context(self, model: str, residual: int) -> int | None:
        """The context at which most methods were measured on a model, the longest of several.

        Args:
            model: Name, as records have it.
            residual: Recent tokens that the cache will keep.

        Returns:
            Tokens in a window; None if nothing was measured with so many recent tokens.
        """
        methods: dict[int, set[str]] = defaultdict(set)
        for figure in self.fidelity:
            if same_model(figure.model, model) and figure.residual in (residual, None):
                methods[figure.context].add(figure.method)
        return max(methods, key=lambda context: (len(methods[context]), context), default=None)

    def fidelity_of(
        self, method: str, model: str, residual: int | None = None, context: int | None = None
    ) -> Fidelity | None:
        """The figure to go by: at the wanted or longest context, the newest.

        Args:
            method: Name, such as ``spectral-3``.
            model: Name, as records have it.
            residual: Recent tokens that the cache will keep: figures with another number of them are not taken. Any if
                None.
            context: Tokens in a window, to compare with others; the longest if None or not measured.

        Returns:
            The figure; None if there is none.
        """
        found = [
            figure
            for figure in self._fidelity_at_any_residual(method, model)
            if residual is None or figure.residual in (residual, None)
        ]
        return max(found, key=lambda f: (f.context == context, f.context, f.origin.created), default=None)

    def residuals_of(self, method: str, model: str) -> list[int]:
        """With how many recent tokens a method was measured.

        Args:
            method: Name, such as ``spectral-3``.
            model: Name, as records have it.

        Returns:
            Every residual of a figure, in ascending order; without those where the method decides for itself.
        """
        found = self._fidelity_at_any_residual(method, model)
        return sorted({figure.residual for figure in found if figure.residual is not None})

    def _fidelity_at_any_residual(self, method: str, model: str) -> list[Fidelity]:
        return [f for f in self.fidelity if f.method == method and same_model(f.model, model)]

    def speed_of(self, method: str, model: str) -> Speed | None:
        """The figure to go by: at batch 1, at the longest context, the newest.

        Args:
            method: Name, such as ``spectral-3``.
            model: Name, as records have it.

        Returns:
            The figure; None if there is none.
        """
        found = [s for s in self.speed if s.method == method and same_model(s.model, model)]
        return max(found, key=lambda s: (-s.batch, s.context, s.origin.created), default=None)


def same_model(recorded: str, wanted: str) -> bool:
    """Whether two names mean one model: the same name, or one folder.

    Args:
        recorded: The name in a record.
        wanted: The name asked for.

    Returns:
        True if they do.
    """
    if recorded == wanted:
        return True
    paths = [Path(name) for name in (recorded, wanted)]
    return all(path.exists() for path in paths) and paths[0].resolve() == paths[1].resolve()


def read_measurements(paths: Iterable[Path]) -> Measurements:
    """Read records.

    Args:
        paths: Files, or folders whose records are all read. JSON files in a folder that are not records are left out.

    Returns:
        Their figures.

    Raises:
        RecordError: A file is missing, damaged, or no record, a folder has none, or a file that was named has only
            figures that cannot be compared with others.
    """
    found = Measurements()
    for path in paths:
        if not path.exists():
            raise RecordError(f"no records found at {path}")
        if path.is_file():
            content = read_strict_json(path)
            own = measurements_of(content, path)
            reasons = [] if own != Measurements() or content["suite"] != "eval" else _reasons_left_out(content)
            if reasons:
                raise RecordError(f"{path}: its figures cannot be compared with others: they are of {reasons[0]}")
            found += own
            continue
        contents = [(file, read_strict_json(file)) for file in sorted(path.rglob("*.json"))]
        records = [(each, file) for file, each in contents if isinstance(each, dict) and each.get("suite") in SUITES]
        if not records:
            raise RecordError(f"no records found in {path}")
        for each, file in records:
            found += measurements_of(each, file)
    return found


def measurements_of(content: Any, path: Path) -> Measurements:
    """The figures of one record.

    Args:
        content: Parsed JSON of the record.
        path: Its file, for messages and for saying where figures are from.

    Returns:
        Its figures; those of methods that could not be measured, of quantized weights, of overlapping windows, of an
        equal exact tail, and of other sinks or chunks than the default ones are left out, and those of ours where the
        calibration shares its bits in a way of its own.

    Raises:
        RecordError: The data are not a record, or its figures are not as its suite writes them.
    """
    check(content, str(path))
    if content["suite"] not in SUITES:
        known = ", ".join(SUITES)
        raise RecordError(f"{path}: records of suite {content['suite']!r} are not used here, only those of {known}")
    record = Record.from_dict(content, str(path))
    try:
        origin = Origin(path.name, record.created, record.commit, record.dirty, machine(record.environment))
        match record.suite:
            case "cpu-decode":
                return Measurements(speed=_cpu_speed(record, origin))
            case str(suite) if suite.startswith("fidelity"):
                model, dtype = record.settings["model"], record.settings["dtype"]
                parts = list(_benchmark_parts(record))
            case _:
                model, dtype = content["model"], content["dtype"]
                parts = [
                    (part["context"], part["methods"])
                    for part in record.metrics.get("fidelity", [])
                    if _special(part, content) is None
                ]
        fidelity = [
            _fidelity(name, entry, model, dtype, context, origin)
            for context, entries in parts
            for name, entry in entries.items()
            if entry["status"] == "ok" and not (entry.get("family") == "ours" and _own_sides(content))
        ]
        plain_speed = record.suite == "eval" and content.get("weights") is None
        speed = _eval_speed(record, model, origin) if plain_speed else []
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise RecordError(f"{path} is not what the suite {record.suite!r} writes: {reason}") from error
    return Measurements(fidelity, speed)


def _special(part: dict[str, Any], run: dict[str, Any]) -> str | None:
    """What makes figures of a part incomparable with those of others, it or its run; None if nothing does."""
    if run.get("weights") is not None:
        return f"weights in {run['weights']}"
    if run.get("sinks", SINK_LENGTH) != SINK_LENGTH:
        return f"caches with {run['sinks']} sinks"
    if run.get("chunk", CHUNK) != CHUNK:  # whose own tokens are exact: longer ones read fewer codes
        return f"text in chunks of {run['chunk']} tokens"
    if part.get("stride") is not None:
        return f"windows that overlap (stride {part['stride']})"
    return None if part.get("tail") is None else f"an equal exact tail ({part['tail']} tokens)"


def _own_sides(run: dict[str, Any]) -> str | None:
    """What makes figures of ours incomparable: a name says the bits, not how they were shared; None if nothing does."""
    rate = run.get("rate") or {}
    for name, usual in (("key_bits", "joint"), ("value_bits", "joint"), ("min_bits", 0)):
        if rate.get(name, usual) != usual:
            return f"a calibration with {name} {rate[name]}"
    return None


def _reasons_left_out(content: dict[str, Any]) -> list[str]:
    """What makes figures of an ``eval`` record incomparable, part by part."""
    parts = content["metrics"].get("fidelity", [{}])
    found = (*(_special(part, content) for part in parts), _own_sides(content))
    return [reason for reason in found if reason is not None]


def _benchmark_parts(record: Record) -> Iterable[tuple[int, dict[str, Any]]]:
    """(context, methods) of the parts of a benchmark record that differ in nothing but context and residual."""
    described = record.settings.get("parts", {})
    for name, entries in record.metrics.items():
        part = described.get(name, {"context": record.settings["context"], "residual": 0})
        run = {**record.settings, "weights": part.get("weights")}
        plain = _special(part, run) is None and part["residual"] is not None
        if plain and name.startswith(("residual_", "context_")):
            yield part["context"], entries


def _fidelity(name: str, entry: dict[str, Any], model: str, dtype: str, context: int, origin: Origin) -> Fidelity:
    return _checked(
        Fidelity(
            method=name,
            model=model,
            dtype=dtype,
            context=context,
            residual=entry.get("residual_length"),
            tokens=entry.get("tokens", 0),
            kl_mean=entry["kl_mean"],
            kl_stderr=entry.get("kl_stderr"),
            top1_agreement=entry["top1_agreement"],
            perplexity=entry["perplexity"],
            bits_per_element=entry["bits_per_element"],
            origin=origin,
        )
    )


def _eval_speed(record: Record, model: str, origin: Origin) -> list[Speed]:
    suite = record.metrics.get("speed", {})
    context = suite.get("settings", {}).get("context", 0)
    return [
        _checked(
            Speed(
                name, model, context, int(batch), rung["decode_ms"]["median"], 1 / float(rung["decode_ratio"]), origin
            )
        )
        for name, entry in suite.get("methods", {}).items()
        for batch, rung in entry["batches"].items()
        if rung["status"] == "ok"
    ]


def _cpu_speed(record: Record, origin: Origin) -> list[Speed]:
    ours = f"spectral-{record.settings['bits']:g}"
    found = []
    for key, pair in record.metrics["models"].items():
        model, _, context = key.rpartition("_")
        if all(pair[kind]["status"] == "ok" for kind in ("dense", "spectral")):
            times = {kind: pair[kind]["milliseconds"]["median"] for kind in ("dense", "spectral")}
            for method, kind in (("dense", "dense"), (ours, "spectral")):
                ratio = times["dense"] / times[kind]
                found.append(_checked(Speed(method, model, int(context), 1, times[kind], ratio, origin)))
    return found


Figure = TypeVar("Figure", Fidelity, Speed)


def _checked(figure: Figure) -> Figure:
    """Refuse figures of the wrong kind: they come from files."""
    try:
        found: Figure = as_type(type(figure), asdict(figure))
    except ValueError as error:
        raise ValueError(f"method {figure.method!r}: {error}") from error
    return found
