"""The tables that ``quantcache eval`` prints, one for each suite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from quantcache.common.grid import Grid, Prose

SIMULATED = " (simulated)"
_STAR = "* simulated: no cache stores it packed; its values are rounded as its codes would round them."
_COLUMNS = (
    "bits: per encoded element, scales and gains included; with recent: of all elements, the first and the recent "
    "tokens too. KL: divergence from the dense cache, nats per token. top-1: same most likely token. PPL: perplexity."
)

Row = Callable[[dict[str, Any]], list[str]]


def tables(data: dict[str, Any]) -> list[Grid | str]:
    """Tables of a result.

    Args:
        data: The result, as ``--json`` prints it.

    Returns:
        One or two for each suite, or a line that says why there is none.
    """
    shown: list[Grid | str] = []
    for suite, result in data["metrics"].items():
        for part in result if isinstance(result, list) else [result]:
            if "status" in part:
                shown.append(f"{suite}: {part['status']}")
            else:
                shown += [make(part, data) for make in _TABLES[suite]]
    return shown


def for_people(data: dict[str, Any]) -> list[Grid | str]:
    """The tables as a terminal shows them: a star for simulated methods, and below what columns mean.

    Args:
        data: The result, as ``--json`` prints it.

    Returns:
        Tables and lines, with blank lines between them.
    """
    found = tables(data)
    grids = [each for each in found if isinstance(each, Grid)]
    notes = [_COLUMNS] if "fidelity" in data["metrics"] else []
    if any(label.endswith(SIMULATED) for grid in grids for label, *_ in grid.rows):
        notes.append(_STAR)
    for grid in grids:
        grid.relabel(lambda label: f"{label.removesuffix(SIMULATED)}*" if label.endswith(SIMULATED) else label)
    return [part for each in (*found, *map(Prose, notes)) for part in (each, "")][:-1]


def _table(title: str, entries: dict[str, dict[str, Any]], columns: list[str], row: Row) -> Grid:
    """One row for each method; its status in place of figures where it failed."""
    table = Grid("method", *columns, title=title)
    for name, entry in entries.items():
        label = f"{name}{SIMULATED}" if entry.get("simulated") else name
        cells = row(entry)
        if any(cells):
            table.add_row(label, *cells)
        else:
            table.add_note(label, entry["status"])
    return table


def _fidelity(part: dict[str, Any], data: dict[str, Any]) -> Grid:
    title = (
        f"{data['model']}: {data['tokens']:,} tokens in windows of {part['context']:,}, "
        f"residual {part['residual']}, sinks {data['sinks']}, {data['dtype']}"
    )
    columns = ["bits", "with recent", "KL mean", "KL p99", "top-1", "PPL", "cache bytes"]

    def row(entry: dict[str, Any]) -> list[str]:
        if entry["status"] != "ok":
            return []
        return [
            f"{entry['bits_per_element']:.3f}",
            f"{entry['bits_per_element_total']:.3f}",
            f"{entry['kl_mean']:z.5f}",
            f"{entry['kl_p99']:z.4f}",
            f"{entry['top1_agreement']:.2%}",
            f"{entry['perplexity']:.3f}",
            f"{entry['cache_bytes']:,}",
        ]

    return _table(title, part["methods"], columns, row)


def _spread(part: dict[str, Any], data: dict[str, Any]) -> Grid:
    """The spread of the KL divergence, and each rival's over ours."""
    equal = part.get("tail") is not None
    title = "KL divergence by position" + (f", {part['tail']} recent tokens exact beside the chunk" if equal else "")
    columns = [*(["exact tail"] if equal else []), "median", "p99", "p99.9", "max", "mean / ours at no more bits"]

    def row(entry: dict[str, Any]) -> list[str]:
        if entry["status"] != "ok":
            return []
        kept = entry.get("exact_tail")
        whole = "all" if entry["family"] in ("dense", "floor") else "its own"
        figures = [entry.get(name) for name in ("kl_median", "kl_p99", "kl_p999", "kl_max")]
        cells = ["" if figure is None else f"{figure:.2g}" for figure in figures]
        return [*([whole if kept is None else str(kept)] if equal else []), *cells, _ratio(entry.get("kl_relative"))]

    return _table(title, part["methods"], columns, row)


def _ratio(summary: dict[str, Any] | None) -> str:
    """A ratio with its standard error, and to what it is."""
    if summary is None:
        return ""
    error = "" if summary["stderr"] is None else f" ± {summary['stderr']:.2g}"
    return f"{summary['ratio']:.3g}{error} ({summary['to']})"


def _with_pairs(part: dict[str, Any], columns: list[str], row: Row, place: str = "all") -> tuple[list[str], Row]:
    """One more column where answers were paired: McNemar's test against the dense cache's."""

    def test(entry: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = entry.get("paired", {}).get("dense", {})
        return found

    def longer(entry: dict[str, Any]) -> list[str]:
        cells, found = row(entry), test(entry)
        pair = f"{found['only_first']} / {found['only_second']}" if found else ""
        if "texts" in found or (found and "questions" not in part["settings"]):
            pair += f" (p {found['p']:.2g})"  # an older record took questions about one text for independent
        return [*cells, _evidence(part, place, entry, pair)] if cells else []

    if not any(map(test, part["methods"].values())):
        return columns, row
    return [*columns, "right where dense is wrong / the reverse"], longer


def _evidence(part: dict[str, Any], place: str, entry: dict[str, Any], shown: str) -> str:
    """A figure; a dash where the dense cache scores too low for another's to say anything."""
    counts = part.get("evidence", {}).get(place, True) or entry["family"] == "dense"
    return shown if counts or not shown else "–"


def _unless_evidence(part: dict[str, Any]) -> str:
    """What a title says where figures are left out."""
    if all(part.get("evidence", {}).values()):
        return ""
    return f"; – where the dense cache scores below {part['settings']['least_dense_rate']:.0%}: no evidence"


def _share(summary: dict[str, Any] | None) -> str:
    """A share with its counts and interval."""
    if summary is None:
        return ""
    return f"{_count(summary)} ({summary['low']:.0%} to {summary['high']:.0%})"


def _count(summary: dict[str, Any] | None) -> str:
    """A share's counts."""
    return "" if summary is None else f"{summary['successes']}/{summary['n']}"


def _mean(summary: dict[str, Any] | None, form: str = ".4f") -> str:
    """An average with its standard error."""
    if summary is None:
        return ""
    error = "" if summary["stderr"] is None else f" ± {summary['stderr']:{form}}"
    return f"{summary['mean']:{form}}{error}"


def _times(summary: dict[str, Any] | None) -> str:
    """A median with the 20th and 80th percentile."""
    return "" if summary is None else f"{summary['median']:.2f} ({summary['p20']:.2f} to {summary['p80']:.2f})"


def _counts(
    part: dict[str, Any], title: str, places: dict[str, str], by: str, show: Callable[[dict[str, Any] | None], str]
) -> Grid:
    """Right answers of each method: all, and by place as ``show`` writes them."""

    def row(entry: dict[str, Any]) -> list[str]:
        whole = entry["found"] if entry["status"] == "ok" else None  # else it is of other questions than the others'
        shown = {"all": _share(whole), **{place: show(entry[by].get(place)) for place in places}}
        return [_evidence(part, place, entry, text) for place, text in shown.items()]

    columns = ["all", *places.values()]
    return _table(f"{title}{_unless_evidence(part)}", part["methods"], *_with_pairs(part, columns, row))


def _needle(part: dict[str, Any], data: dict[str, Any]) -> Grid:
    settings = part["settings"]
    title = f"Needles found (95 % interval): depths {settings['depths']}, {settings['seeds']} seeds"
    return _counts(
        part, title, {str(length): f"{length} tokens" for length in settings["lengths"]}, "by_length", _share
    )


def _task(part: dict[str, Any], data: dict[str, Any]) -> Grid:
    settings = part["settings"]
    title = (
        f"{settings['title']} (95 % interval): {settings['questions']} questions about {settings['exercises']} texts"
    )
    # A group's few texts would give it an interval of nearly all.
    groups = [group for group in part["evidence"] if group != "all"]
    return _counts(part, title, {group: f"{group} {settings['unit']}" for group in groups}, "by_group", _count)


def _divergence(part: dict[str, Any], data: dict[str, Any]) -> Grid:
    settings = part["settings"]
    title = (
        f"Continuations of {settings['new_tokens']:,} tokens, read {settings['step']} at a time: {settings['prompts']} "
        f"prompts of {settings['context']:,}, sampled at temperature {settings['temperature']:g}"
    )
    columns = [
        "greedy text departs after (median)",
        *(f"{kind}: {what}" for kind in ("greedy", "sampled") for what in ("KL mean", "slope per 1,000 tokens")),
    ]

    def row(entry: dict[str, Any]) -> list[str]:
        if entry["curves"] is None:
            return []
        median, within = entry["departure"]["median"], entry["departure"]["within"]
        cells = [f"not within {within:,}" if median is None else f"{median:,} tokens"]
        for curve in entry["curves"].values():
            cells += [_mean(curve["mean"], ".2g"), _mean(curve["slope"], "+.2g")]
        return cells

    return _table(title, part["methods"], columns, row)


def _positions(part: dict[str, Any], data: dict[str, Any]) -> Grid:
    """The KL divergence along sampled continuations."""
    settings = part["settings"]
    count, bins = settings["new_tokens"], settings["bins"]
    ends = [sum(count // bins + (at < count % bins) for at in range(last + 1)) for last in range(bins)]

    def row(entry: dict[str, Any]) -> list[str]:
        return [] if entry["curves"] is None else [f"{each['mean']:.2g}" for each in entry["curves"]["sampled"]["bins"]]

    title = "Mean KL divergence along sampled continuations, up to token"
    return _table(title, part["methods"], [f"{end:,}" for end in ends], row)


def _routing(part: dict[str, Any], data: dict[str, Any]) -> Grid:
    title = f"Routing: {part['settings']['windows']} windows of {part['settings']['context']:,}, mean over layers"

    def row(entry: dict[str, Any]) -> list[str]:
        if entry["flips"] is None:
            return []
        last = list(entry["layers"].values())
        worst = max(layer["relative_error"] for layer in last)
        return [
            _mean(entry["flips"]),
            _mean(entry["cosine"], ".5f"),
            _mean(entry["relative_error"]),
            f"{worst:.4f}",
        ]

    return _table(title, part["methods"], ["keys flipped", "cosine", "relative error", "... worst layer"], row)


def _transfer(part: dict[str, Any], data: dict[str, Any]) -> Grid:
    texts = dict.fromkeys(entry["evaluated_on"] for entry in part["entries"])
    size = f"windows of {part['settings']['context']:,}"
    title = f"Transfer: mean KL, and how many times that of the text's own calibration, {size}"
    table = Grid("method", "calibrated on", *(f"on {text.replace('_', ' ')}" for text in texts), title=title, text=2)
    rows: dict[tuple[str, str], dict[str, str]] = {}
    notes = []
    for entry in part["entries"]:
        place, text = (entry["method"], entry["calibrated_on"]), entry["evaluated_on"]
        cells = rows.setdefault(place, dict.fromkeys(texts, ""))
        if entry["status"] == "ok":
            ratio = "" if entry["ratio"] is None else f" {entry['ratio']:.2f}x"
            cells[text] = f"{entry['figures']['kl_mean']:.5f}{ratio}"
        else:
            notes.append((*place, f"on {text}: {entry['status']}"))
    for place, cells in rows.items():
        if any(cells.values()):
            table.add_row(*place, *cells.values())
    for note in notes:
        table.add_note(*note)
    return table


def _qa(part: dict[str, Any], data: dict[str, Any]) -> Grid:
    def row(entry: dict[str, Any]) -> list[str]:
        if entry["f1"] is None:
            return []
        own = entry if entry["status"] == "ok" else {"f1": None, "exact": None}  # else it is of other questions
        return [
            _evidence(part, "f1", entry, _mean(own["f1"], ".3f")),
            _evidence(part, "exact", entry, _share(own["exact"])),
            _mean(entry["agreement_f1"], ".3f"),
            _share(entry["agreement_exact"]),
        ]

    columns = ["F1", "exact", "F1 with dense's answer", "dense's answer"]
    title = f"Question answering: {part['settings']['questions']} questions{_unless_evidence(part)}"
    return _table(title, part["methods"], *_with_pairs(part, columns, row, "exact"))


def _memory(part: dict[str, Any], data: dict[str, Any]) -> Grid:
    lengths = [str(length) for length in part["settings"]["lengths"]]

    def row(entry: dict[str, Any]) -> list[str]:
        cells = []
        for length in lengths:
            rung = entry["rungs"][length]
            held, formula = rung["bytes"], rung["predicted_bytes"]
            mark = "" if formula is None or formula == held else f" ({formula:,} predicted)"
            cells.append("" if held is None else f"{held:,}{mark}")
        return cells

    return _table("Bytes held at some numbers of tokens", part["methods"], lengths, row)


def _speed(part: dict[str, Any], data: dict[str, Any]) -> Grid:
    settings = part["settings"]
    columns = []
    for batch in settings["batches"]:
        columns += [f"prefill ms, batch {batch}", "/ dense", "decode ms", "/ dense", "tokens/s"]
    title = f"{settings['context']:,} tokens, {settings['threads']} threads: median (20th to 80th percentile)"

    def row(entry: dict[str, Any]) -> list[str]:
        cells = []
        for rung in entry["batches"].values():
            if rung["decode_ms"] is None:
                cells += [""] * 5
                continue
            cells += [
                _times(rung["prefill_ms"]),
                f"{rung['prefill_ratio']:.2f}",
                _times(rung["decode_ms"]),
                f"{rung['decode_ratio']:.2f}",
                f"{rung['tokens_per_second']:.1f}",
            ]
        return cells

    return _table(title, part["methods"], columns, row)


def _speculative(part: dict[str, Any], data: dict[str, Any]) -> Grid:
    settings = part["settings"]

    def row(entry: dict[str, Any]) -> list[str]:
        if entry["tokens_per_call"] is None:
            return []
        cells = [_share(entry["acceptance"]), f"{entry['tokens_per_call']:.2f}", _times(entry["ratio"])]
        return [*cells, _share(entry["same_text"])]

    title = f"Speculative decoding, draft: {settings['draft']}, {settings['proposals']} tokens at a time"
    columns = ["accepted", "tokens per call", "time / plain decoding", "same text as plain"]
    return _table(title, part["methods"], columns, row)


_TABLES: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], Grid], ...]] = {
    "fidelity": (_fidelity, _spread),
    "divergence": (_divergence, _positions),
    "needle": (_needle,),
    "records": (_task,),
    "lookup": (_task,),
    "tools": (_task,),
    "routing": (_routing,),
    "transfer": (_transfer,),
    "qa": (_qa,),
    "memory": (_memory,),
    "speed": (_speed,),
    "speculative": (_speculative,),
}
