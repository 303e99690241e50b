"""Tables of the fidelity records: all methods, the short one of the README, contexts, quantized weights.

Parts of a record may come from runs of their own. A table takes each from the newest record that holds it, puts side by
side only what was measured alike, and names every record that it shows.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from quantcache.common.env import machine

NO_RECORD = "No record yet."

Record = dict[str, Any]
Results = dict[str, dict[str, Any]]
Parts = dict[str, tuple[Path, Record]]
"""By part of a suite, the file (relative to the checkout) and content of the newest record that holds it."""


def origin(path: Path, record: Record, page: Path) -> str:
    """Machine, commit and link, for the end of a caption.

    Args:
        path: The record's file, relative to the checkout.
        record: The record.
        page: The page, relative to the checkout.

    Returns:
        Markdown.
    """
    link = Path(*[".."] * (len(page.parts) - 1), path).as_posix()
    return f"{machine(record['environment'])}, commit {record['commit'][:10]}, [record]({link})."


def origins(parts: Parts, names: list[str], page: Path) -> str:
    """:func:`origin` of every record that some parts are from."""
    found = {path: origin(path, record, page) for path, record in (parts[name] for name in names)}
    return " ".join(found.values())


def results_of(parts: Parts, name: str) -> Results:
    """The methods of a part."""
    results: Results = parts[name][1]["metrics"][name]
    return results


def alike(one: Record, other: Record) -> bool:
    """Whether two records may stand in one table: the same model, text and calibration, sinks and chunks.

    Args:
        one: A record.
        other: Another.

    Returns:
        True where nothing that both of them state differs.
    """
    pairs = [_conditions(record["settings"]) for record in (one, other)]
    return all(pairs[0][key] == pairs[1][key] for key in pairs[0].keys() & pairs[1].keys())


def _conditions(settings: dict[str, Any]) -> dict[str, Any]:
    found = {key: settings[key] for key in ("model_sha256", "dtype", "chunk", "sinks", "codec") if key in settings}
    found["text"] = {key: settings["evaluation"].get(key) for key in ("source", "text_sha256")}
    given = settings["calibration"]
    found["calibration"] = {key: value for key, value in given.items() if key not in ("seconds", "yardstick")}
    # Divergences are measured anew now and then; costs follow from the codes.
    for point in (given.get("yardstick") or {}).get("points", []):
        found[f"cost at {point['bits']:g} bits"] = point["cost"]
    return found


def beside(parts: Parts, base: str, names: list[str]) -> list[str]:
    """Those of some parts that there are, and that were measured like another."""
    return [name for name in names if name in parts and alike(parts[base][1], parts[name][1])]


def residual(parts: Parts, name: str) -> int | None:
    """The recent tokens kept in a part; None for what each method's authors recommend."""
    kept: int | None = parts[name][1]["settings"]["parts"][name]["residual"]
    return kept


def with_residual(parts: Parts, base: str, names: list[str]) -> list[str]:
    """:func:`beside`, of parts that keep as many recent tokens as the other."""
    return [name for name in beside(parts, base, names) if residual(parts, name) == residual(parts, base)]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table; rows may be short, their last cells empty."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join([*row, *[""] * (len(header) - len(row))]).rstrip() + " |" for row in rows]
    return "\n".join(lines)


def stem(name: str) -> str:
    """The family of a method: its name without the number."""
    head, _, number = name.rpartition("-")
    return head if head and number.replace(".", "", 1).isdigit() else name


def maker(name: str) -> str:
    """Whose method it is: the family, KVarN's pairs of widths together."""
    return "kvarn" if name.startswith("kvarn") else stem(name)


def shown(name: str, entry: dict[str, Any]) -> str:
    """A method's name as tables print it."""
    return f"{name} (simulated)" if entry["simulated"] else name


def number(entry: dict[str, Any] | None, figure: str, form: str) -> str:
    """One figure of a method; its status where there is none."""
    if entry is None:
        return ""
    return format(entry[figure], form) if entry["status"] == "ok" else entry["status"]


def lengths(entry: dict[str, Any]) -> str:
    """Sinks and residual of a method."""
    sinks, residual = entry.get("sink_length"), entry.get("residual_length")
    return "its own" if sinks is None else f"{sinks}, {residual}"


def windows(settings: dict[str, Any], part: str | None = None) -> str:
    """How much text was read, and in what pieces: by a part if one is named."""
    if part is not None:
        how = settings["parts"][part]
        settings = {"context": how["context"], "windows": how["tokens"] // how["context"]}
    return f"{settings['windows']} window{'s' * (settings['windows'] != 1)} of {settings['context']:,} tokens"


def text_name(settings: dict[str, Any]) -> str:
    """What the evaluation text is."""
    source = settings["evaluation"]["source"]
    return "WikiText-2's test text" if "wikitext2" in source else "held-out Wikipedia text"


def about(record: Record, part: str) -> str:
    """The model, the text and the windows of a part, for captions."""
    settings = record["settings"]
    return (
        f"{settings['model']} in {settings['dtype']}, {windows(settings, part)} "
        f"of {text_name(settings)}, fed {settings['chunk']} at a time"
    )


def fidelity_rows(default: Results, others: dict[str, Results]) -> str:
    """Rows of methods: bits, what each costs, and the mean KL with other recent tokens kept exact, by heading."""
    header = [
        "method",
        "bits per element",
        "with sinks and recent tokens",
        "mean KL",
        "top-1 agreement",
        "perplexity",
        *(f"mean KL, {heading}" for heading in others),
    ]
    rows = []
    for name, entry in default.items():
        if entry["status"] != "ok":
            rows.append([name, entry["status"]])
            continue
        rows.append(
            [
                shown(name, entry),
                f"{entry['bits_per_element']:.3f}",
                f"{entry['bits_per_element_total']:.3f}",
                f"{entry['kl_mean']:.5f}",
                f"{entry['top1_agreement']:.2%}",
                f"{entry['perplexity']:.2f}",
                *(number(results.get(name), "kl_mean", ".5f") for results in others.values()),
            ]
        )
    return markdown(header, rows)


def short(results: Results) -> Results:
    """Ours, and each rival's smallest setting with at least as many bits as ours of 3.

    Args:
        results: All methods.

    Returns:
        The choice, in the order of the record; what could not be run stays.
    """
    ours = results.get("spectral-3")
    floor = ours["bits_per_element"] if ours and ours["status"] == "ok" else 3.0
    chosen: Results = {}
    for name, entry in results.items():
        if entry.get("family") == "floor":
            continue
        if entry.get("family") != "rival" or entry["status"] != "ok":
            chosen[name] = entry
            continue
        rivals = {n: e for n, e in results.items() if maker(n) == maker(name) and e["status"] == "ok"}
        enough = {n: e for n, e in rivals.items() if e["bits_per_element"] >= floor} or rivals
        if name == min(enough, key=lambda n: (enough[n]["bits_per_element"], enough[n]["kl_mean"])):
            chosen[name] = entry
    return chosen


def fidelity_table(parts: Parts, page: Path) -> str:
    """The README's table: the dense cache, ours, and the setting of each rival that is nearest to our 3 bits."""
    if "residual_0" not in parts:
        return NO_RECORD
    settings, results = parts["residual_0"][1]["settings"], results_of(parts, "residual_0")
    header = ["cache", "bits per element", "mean KL", "p99 KL", "same top token", "perplexity", "over spectral-3"]
    cells = [("bits_per_element", ".3f"), ("kl_mean", ".5f"), ("kl_p99", ".4f")]
    cells += [("top1_agreement", ".1%"), ("perplexity", ".2f")]
    chosen = {name: entry for name, entry in short(results).items() if entry["status"] == "ok"}
    own = chosen["spectral-3"]["kl_mean"]
    rivals = [name for name, entry in chosen.items() if entry["family"] == "rival"]
    rows = []
    for name in [*(n for n in chosen if n not in rivals), *sorted(rivals, key=lambda n: chosen[n]["kl_mean"])]:
        entry = chosen[name]
        figures = (number(entry, *cell) for cell in cells)
        rows.append([shown(name, entry), *figures, _times(entry["kl_mean"] / own)])
    caption = (
        "spectral-B is quantcache at B bits on average; quanto, hqq and fp8 are transformers' own quantized caches. Of "
        "every other method the smallest setting is shown that has at least as many bits as spectral-3, "
        "[simulated](docs/fidelity.md#the-methods) where it says so. The last column: mean KL over that of spectral-3. "
        f"Bits include scales; dense is {settings['dtype']} here. Text is read {settings['chunk']} tokens at a time, "
        "which see each other as they are. All before them are read from codes; the first "
        f"{settings['sinks']} are kept as they are, except by transformers' own caches. KL: how far predictions move "
        "from those with the dense cache, in nats per token "
        f"(0: not at all). {settings['model']}, {windows(settings, 'residual_0')} of {text_name(settings)}; calibrated "
        f"on {settings['calibration']['tokens']:,} tokens of other text. {origins(parts, ['residual_0'], page)}"
    )
    return markdown(header, rows) + f"\n\n{caption}"


def _times(ratio: float) -> str:
    """Two digits, or all before the point; nothing for 0."""
    return f"{ratio:{'.2g' if ratio < 100 else ',.0f'}}x" if ratio else ""


def all_table(parts: Parts, page: Path) -> str:
    """All methods with the same sinks and residual."""
    if "residual_64" not in parts:
        return NO_RECORD
    record = parts["residual_64"][1]
    headings = {"residual_0": "no residual", "residual_256": "residual 256"}
    context = windows(record["settings"], "residual_64")
    near = beside(parts, "residual_64", list(headings))
    shown_too = [name for name in near if windows(parts[name][1]["settings"], name) == context]
    others = {headings[name]: results_of(parts, name) for name in shown_too}
    sinks = record["settings"]["sinks"]
    caption = (
        f"{about(record, 'residual_64')}; {sinks} sinks and 64 recent tokens exact where a method can keep them "
        "(transformers' own quantized caches keep no sinks, and code everything anew whenever their residual is "
        f"full). {origins(parts, ['residual_64', *shown_too], page)}"
    )
    return fidelity_rows(results_of(parts, "residual_64"), others) + f"\n\n{caption}"


def own_table(parts: Parts, page: Path) -> str:
    """All methods with the sinks and the residual that their authors recommend."""
    if "recommended" not in parts:
        return NO_RECORD
    header = [
        "method",
        "sinks, residual",
        "bits per element",
        "with sinks and recent tokens",
        "mean KL",
        "p99 KL",
        "max KL",
        "top-1 agreement",
    ]
    rows = []
    for name, entry in results_of(parts, "recommended").items():
        if entry["status"] != "ok":
            rows.append([name, "", entry["status"]])
            continue
        cells = [("bits_per_element", ".3f"), ("bits_per_element_total", ".3f"), ("kl_mean", ".5f")]
        cells += [("kl_p99", ".4f"), ("kl_max", ".3f"), ("top1_agreement", ".2%")]
        rows.append([shown(name, entry), lengths(entry), *(number(entry, *cell) for cell in cells)])
    caption = about(parts["recommended"][1], "recommended")
    return markdown(header, rows) + f"\n\n{caption}. {origins(parts, ['recommended'], page)}"


def contexts_table(parts: Parts, page: Path) -> str:
    """Mean KL over the context length, and on WikiText-2."""
    if "residual_64" not in parts:
        return NO_RECORD
    settings = parts["residual_64"][1]["settings"]
    near = with_residual(parts, "residual_64", [name for name in parts if name.startswith("context_")])
    # WikiText-2 is another text: its column stands for itself.
    wikitext = results_of(parts, "wikitext2") if "wikitext2" in parts else None
    if not near and wikitext is None:
        return NO_RECORD
    columns = {int(key.removeprefix("context_")): key for key in near}
    columns[settings["parts"]["residual_64"]["context"]] = "residual_64"
    keys = [columns[context] for context in sorted(columns)]
    header = ["method", "bits per element", *(f"mean KL at {context:,}" for context in sorted(columns))]
    if wikitext:
        header += ["mean KL, WikiText-2", "perplexity, WikiText-2"]
    rows = []
    metrics = {key: results_of(parts, key) for key in keys}
    names = [name for name in metrics["residual_64"] if all(name in metrics[key] for key in keys)]
    for name in names:
        entry = metrics["residual_64"][name]
        row = [shown(name, entry), number(entry, "bits_per_element", ".3f")]
        row += [number(metrics[key][name], "kl_mean", ".5f") for key in keys]
        # Why a method has no figure is said once.
        row = [row[0], *("" if cell == before and ":" in cell else cell for before, cell in itertools.pairwise(row))]
        if wikitext:
            found = wikitext.get(name)
            row.append(number(found, "kl_mean", ".5f"))
            if found and found["status"] == "ok":
                row.append(f"{found['perplexity']:.2f} ± {found['perplexity_stderr']:.2f}")
        rows.append(row)
    lengths = {parts[name][1]["settings"]["parts"][name]["tokens"] for name in keys}
    text = f"{min(lengths):,} tokens" if len(lengths) == 1 else f"{min(lengths):,} to {max(lengths):,} tokens"
    caption = f"{text} of {text_name(settings)} at every context, residual 64. "
    if wikitext:
        part = parts["wikitext2"][1]["settings"]["parts"]["wikitext2"]
        caption += (
            f"WikiText-2: {part['tokens']:,} tokens of the test set, windows of {part['context']:,} tokens that slide "
            f"by {part['stride']}, each predicting its last {part['stride']} (the first one all). "
        )
    shown_parts = keys + ["wikitext2"] * (wikitext is not None)
    return markdown(header, rows) + f"\n\n{caption}{origins(parts, shown_parts, page)}"


def weights_table(parts: Parts, page: Path) -> str:
    """Ours on models with quantized weights."""
    if "residual_64" not in parts:
        return NO_RECORD
    record = parts["residual_64"][1]
    near = with_residual(parts, "residual_64", [name for name in parts if name.startswith("weights_")])
    kinds = {key.removeprefix("weights_").removeprefix("quanto-"): key for key in near}
    if not kinds:
        return NO_RECORD
    metrics = {key: results_of(parts, key) for key in ("residual_64", *near)}
    names = list(metrics[near[0]])
    columns = {f"{record['settings']['dtype']} weights": "residual_64", **{f"{k} weights": v for k, v in kinds.items()}}
    rows = []
    for name in names:
        row = [name]
        for key in columns.values():
            entry = metrics[key].get(name)
            measured = entry and entry["status"] == "ok"
            row.append(
                f"{entry['kl_mean']:.5f}, {entry['perplexity']:.2f}" if measured else number(entry, "kl_mean", "")
            )
        rows.append(row)
    caption = (
        "Mean KL to the dense cache of the same model, and perplexity. Weights by optimum-quanto unless it says "
        "otherwise; one calibration, of "
        f"the unquantized model, residual 64. {about(record, 'residual_64')}. {origins(parts, list(metrics), page)}"
    )
    return markdown(["method", *columns], rows) + f"\n\n{caption}"
