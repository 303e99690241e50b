"""Tables of the fidelity records: all methods, the short one of the README, contexts, and the claim."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CLAIM_RATIO = 0.5
CLAIM_SPAN = 1.0
"""A rival takes part in the claim where it has a setting with at least as many bits as ours, and at most one more."""

Record = dict[str, Any]
Results = dict[str, dict[str, Any]]


def machine(record: Record) -> str:
    """What a record was measured on."""
    cpu, gpus = record["environment"]["cpu"], record["environment"]["gpus"]
    return gpus[0]["name"] if gpus else f"{cpu['name']} ({cpu['cores']} cores)"


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
    return f"{machine(record)}, commit {record['commit'][:10]}, [record]({link})."


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table; rows may be short, their last cells empty."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join([*row, *[""] * (len(header) - len(row))]).rstrip() + " |" for row in rows]
    return "\n".join(lines)


def stem(name: str) -> str:
    """The family of a method: its name without the number."""
    head, _, number = name.rpartition("-")
    return head if head and number.replace(".", "", 1).isdigit() else name


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


def windows(settings: dict[str, Any]) -> str:
    """How much text was read, and in what pieces."""
    return f"{settings['windows']} window{'s' * (settings['windows'] != 1)} of {settings['context']:,} tokens"


def text_name(settings: dict[str, Any]) -> str:
    """What the evaluation text is."""
    source = settings["evaluation"]["source"]
    return "WikiText-2's test text" if "wikitext2" in source else "held-out Wikipedia text"


def about(record: Record) -> str:
    """The text, the windows and the calibration, for captions."""
    settings = record["settings"]
    return (
        f"{settings['model']} in {settings['dtype']}, {windows(settings)} "
        f"of {text_name(settings)}, fed {settings['chunk']} at a time"
    )


def fidelity_rows(default: Results, bare: Results) -> str:
    """Rows of methods: bits, and what each costs with and without recent tokens kept exact."""
    header = [
        "method",
        "bits per element",
        "with sinks and recent tokens",
        "mean KL",
        "top-1 agreement",
        "perplexity",
        "mean KL, no residual",
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
                number(bare.get(name), "kl_mean", ".5f"),
            ]
        )
    return markdown(header, rows)


def short(results: Results, bits: float = 3.0) -> Results:
    """Ours, and each rival's smallest setting with at least as many bits as ours.

    Args:
        results: All methods.
        bits: Our bits, without gains.

    Returns:
        The choice, in the order of the record; what could not be run stays.
    """
    ours = results.get(f"spectral-{bits:g}")
    floor = ours["bits_per_element"] if ours and ours["status"] == "ok" else bits
    chosen: Results = {}
    for name, entry in results.items():
        if entry.get("family") == "floor":
            continue
        if entry.get("family") != "rival" or entry["status"] != "ok":
            chosen[name] = entry
            continue
        rivals = {n: e for n, e in results.items() if stem(n) == stem(name) and e["status"] == "ok"}
        enough = {n: e for n, e in rivals.items() if e["bits_per_element"] >= floor} or rivals
        if name == min(enough, key=lambda n: (enough[n]["bits_per_element"], enough[n]["kl_mean"])):
            chosen[name] = entry
    return chosen


def fidelity_table(path: Path, record: Record, page: Path) -> str:
    """The README's table: the dense cache, ours, and the setting of each rival that is nearest to our 3 bits."""
    settings, results = record["settings"], record["metrics"]["residual_0"]
    header = ["cache", "bits per element", "mean KL", "p99 KL", "same top token", "perplexity", "over spectral-3"]
    cells = [("bits_per_element", ".3f"), ("kl_mean", ".5f"), ("kl_p99", ".4f")]
    cells += [("top1_agreement", ".1%"), ("perplexity", ".2f")]
    chosen = {name: entry for name, entry in short(results).items() if entry["status"] == "ok"}
    own = chosen["spectral-3"]["kl_mean"]
    rivals = [name for name, entry in chosen.items() if entry["family"] == "rival"]
    rows = []
    for name in [*(n for n in chosen if n not in rivals), *sorted(rivals, key=lambda n: chosen[n]["kl_mean"])]:
        entry = chosen[name]
        times = f"{entry['kl_mean'] / own:.1f}x" if entry["kl_mean"] else ""
        rows.append([shown(name, entry), *(number(entry, *cell) for cell in cells), times])
    caption = (
        "spectral-B is quantcache at B bits on average; quanto, hqq and fp8 are transformers' own quantized caches, "
        "of every other method the setting with the fewest bits that are at least those of spectral-3, "
        "[simulated](docs/fidelity.md#the-methods) where it says so. Bits include scales; "
        f"dense is {settings['dtype']} here. Every token but the first {settings['sinks']} is read from codes: nothing "
        "recent is kept exact. KL: how far predictions move from those with the dense cache, in nats per token "
        f"(0: not at all). {settings['model']}, {windows(settings)} of {text_name(settings)}; calibrated on "
        f"{settings['calibration']['tokens']:,} tokens of other text. {origin(path, record, page)}"
    )
    return markdown(header, rows) + f"\n\n{caption}"


def all_table(path: Path, record: Record, page: Path) -> str:
    """All methods with the same sinks and residual."""
    caption = (
        f"{about(record)}; {record['settings']['sinks']} sinks and 64 recent tokens exact where a method can keep them "
        "(transformers' own quantized caches keep no sinks, and code everything anew whenever their residual is "
        f"full). {origin(path, record, page)}"
    )
    return fidelity_rows(record["metrics"]["residual_64"], record["metrics"]["residual_0"]) + f"\n\n{caption}"


def own_table(path: Path, record: Record, page: Path) -> str:
    """All methods with the sinks and the residual that their authors recommend."""
    if "recommended" not in record["metrics"]:
        return "Not in the newest record."
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
    for name, entry in record["metrics"]["recommended"].items():
        if entry["status"] != "ok":
            rows.append([name, "", entry["status"]])
            continue
        cells = [("bits_per_element", ".3f"), ("bits_per_element_total", ".3f"), ("kl_mean", ".5f")]
        cells += [("kl_p99", ".4f"), ("kl_max", ".3f"), ("top1_agreement", ".2%")]
        rows.append([shown(name, entry), lengths(entry), *(number(entry, *cell) for cell in cells)])
    return markdown(header, rows) + f"\n\n{about(record)}. {origin(path, record, page)}"


def contexts_table(path: Path, record: Record, page: Path) -> str:
    """Mean KL over the context length, and on WikiText-2."""
    settings, metrics = record["settings"], record["metrics"]
    columns = {int(key.removeprefix("context_")): key for key in metrics if key.startswith("context_")}
    columns[settings["context"]] = "residual_64"
    keys = [columns[context] for context in sorted(columns)]
    header = ["method", "bits per element", *(f"mean KL at {context:,}" for context in sorted(columns))]
    wikitext = metrics.get("wikitext2")
    if wikitext:
        header += ["mean KL, WikiText-2", "perplexity, WikiText-2"]
    rows = []
    names = [name for name in metrics["residual_64"] if all(name in metrics[key] for key in keys)]
    for name in names:
        entry = metrics["residual_64"][name]
        row = [shown(name, entry), number(entry, "bits_per_element", ".3f")]
        row += [number(metrics[key][name], "kl_mean", ".5f") for key in keys]
        if wikitext:
            found = wikitext.get(name)
            row.append(number(found, "kl_mean", ".5f"))
            if found and found["status"] == "ok":
                row.append(f"{found['perplexity']:.2f} ± {found['perplexity_stderr']:.2f}")
        rows.append(row)
    lengths = {part["tokens"] for name, part in settings["parts"].items() if name in keys}
    text = f"{min(lengths):,} tokens" if len(lengths) == 1 else f"{min(lengths):,} to {max(lengths):,} tokens"
    caption = f"{text} of {text_name(settings)} at every context, residual 64. "
    if wikitext:
        part = settings["parts"]["wikitext2"]
        caption += (
            f"WikiText-2: {part['tokens']:,} tokens of the test set, windows of {part['context']:,} tokens that slide "
            f"by {part['stride']}, each predicting its last {part['stride']} (the first one all). "
        )
    return markdown(header, rows) + f"\n\n{caption}{origin(path, record, page)}"


def weights_table(path: Path, record: Record, page: Path) -> str:
    """Ours on models with quantized weights."""
    metrics = record["metrics"]
    kinds = {key.removeprefix("weights_").removeprefix("quanto-"): key for key in metrics if key.startswith("weights_")}
    if not kinds:
        return "Not in the newest record."
    names = list(metrics[next(iter(kinds.values()))])
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
        f"the unquantized model, residual 64. {about(record)}. {origin(path, record, page)}"
    )
    return markdown(["method", *columns], rows) + f"\n\n{caption}"


def claim(results: Results) -> dict[str, dict[str, tuple[str, float] | None]]:
    """Our mean KL over that of each rival's smallest setting with at least as many bits, within one bit.

    Args:
        results: Methods that were measured alike.

    Returns:
        By our method and the rival's family: the rival's setting and the ratio; None where no setting is in reach.
    """
    measured = {name: entry for name, entry in results.items() if entry["status"] == "ok"}
    families = dict.fromkeys(stem(name) for name, entry in measured.items() if entry["family"] == "rival")
    found: dict[str, dict[str, tuple[str, float] | None]] = {}
    for ours, entry in measured.items():
        if entry["family"] != "ours" or not 2 <= float(ours.rpartition("-")[2]) <= 4:
            continue
        bits = entry["bits_per_element"]
        found[ours] = {}
        for family in families:
            near = {
                name: rival
                for name, rival in measured.items()
                if stem(name) == family and bits <= rival["bits_per_element"] <= bits + CLAIM_SPAN
            }
            lowest = min(near, key=lambda name: near[name]["bits_per_element"], default=None)
            found[ours][family] = lowest and (lowest, entry["kl_mean"] / near[lowest]["kl_mean"])
    return found


def claim_table(path: Path, record: Record, page: Path) -> str:
    """Whether the claim is met, rival by rival."""
    parts = []
    for key, title in (("residual_0", "No residual"), ("residual_64", "Residual 64")):
        ratios = claim(record["metrics"][key])
        families = list(dict.fromkeys(family for row in ratios.values() for family in row))
        rows = []
        for family in families:
            row = [family]
            for ours in ratios:
                pair = ratios[ours][family]
                verdict = pair and ("met" if pair[1] <= CLAIM_RATIO else "**not met**")
                row.append(f"{pair[0]}: {pair[1]:.2f}, {verdict}" if pair else "none in reach")
            rows.append(row)
        pairs = [pair for row in ratios.values() for pair in row.values() if pair]
        met = sum(ratio <= CLAIM_RATIO for _, ratio in pairs)
        parts.append(f"{title}: met in {met} of {len(pairs)} comparisons.\n\n{markdown(['rival', *ratios], rows)}")
    caption = (
        "The claim that is tested: from 2 to 4 bits, our mean KL is at most half that of each rival's smallest setting "
        "with at least as many bits (and at most one bit more), codes and scales counted. Cells: that setting, and our "
        "mean KL divided by its. Settings are those of the table of all methods: pca and rank take any number of bits "
        "and are set to "
        f"ours, the others take whole bits. {about(record)}. {origin(path, record, page)}"
    )
    return "\n\n".join([*parts, caption])
