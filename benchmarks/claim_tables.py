"""The claim table of a fidelity record: ours against every rival in reach, against fp8, and against its prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fidelity_tables import (
    NO_RECORD,
    Parts,
    Record,
    Results,
    about,
    beside,
    markdown,
    origin,
    origins,
    residual,
    results_of,
    stem,
    text_name,
    windows,
)

CLAIM_RATES = (2.0, 2.5, 3.0, 4.0)
CLAIM_RATIO = 0.5
CLAIM_SPAN = 1.0
"""A rival takes part in the claim where it has a setting with at least as many bits as ours, and at most one more."""

OTHER_TEXTS = {"wikipedia": "held-out Wikipedia text", "wikitext2": "WikiText-2's test text"}
"""Parts that are measured on another text than the rest of their record."""

PREDICTED_WITHIN = 2.0
"""Predictions are to be at most so many times the measured divergence, and at least its so many-th part."""

PREDICTION = ["method", "predicted KL", "measured KL", "predicted / measured", f"within {PREDICTED_WITHIN:g}x"]


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


def claim_table(parts: Parts, page: Path) -> str:
    """Whether the claim is met: what it says, the verdicts of every residual and context, and each rival's, folded."""
    residuals = [name for name in parts if name.startswith("residual_")]
    names = sorted(residuals, key=_number) + sorted((n for n in parts if n.startswith("context_")), key=_number)
    if not names:
        return NO_RECORD
    said = (
        "From 2 to 4 bits, our mean KL is at most half that of each rival's smallest setting with at least as many "
        "bits and at most one bit more; and at 3 bits it is at most that of fp8, which takes 8. Bits count codes and "
        "scales."
    )
    verdicts, details = [], []
    for name in names:
        ratios, results = claim(results_of(parts, name)), results_of(parts, name)
        title = _title(parts, name)
        verdicts.append([title, *_verdict(ratios, results)])
        details.append(f"{title}:\n\n{_rivals(ratios)}")
    summary = markdown(["", "comparisons", "met", "largest ratio", "over fp8, spectral-3"], verdicts)
    folded = "\n\n".join(
        [
            "<details><summary>Rival by rival</summary>",
            "Cells: the rival's setting, and our mean KL divided by its. Settings are those of the table of all "
            "methods: pca and rank take any number of bits and are set to ours, the others take whole bits. A cell is "
            "empty where a rival has no setting in reach, and a rival without any has no row.",
            *details,
            "</details>",
        ]
    )
    by_record: dict[Path, list[str]] = {}
    for name in names:
        by_record.setdefault(parts[name][0], []).append(name)
    captions = []
    for path, own in by_record.items():
        record = parts[own[0]][1]
        which = f"{', '.join(_title(parts, name) for name in own)}: " if len(by_record) > 1 else ""
        captions.append(f"{which}{about(record, own[0])}. {origin(path, record, page)}")
    predicted = _predictions(parts, page) if "residual_64" in parts else []
    return "\n\n".join([said, summary, " ".join(captions), folded, *predicted])


def _number(name: str) -> int:
    return int(name.rpartition("_")[2])


def _ratio(ratio: float) -> str:
    """Two digits behind the point, and no 0.00 for what is not nothing."""
    return f"{ratio:.2f}" if ratio >= 0.005 else "< 0.01"


def _title(parts: Parts, name: str) -> str:
    kept = residual(parts, name)
    kind = f"residual {kept}" if kept else "no residual"
    return f"Context {_number(name):,}, {kind}" if name.startswith("context_") else kind.capitalize()


def _verdict(ratios: dict[str, dict[str, tuple[str, float] | None]], results: Results) -> list[str]:
    """Comparisons of one part, how many meet the claim, the largest ratio, and that over fp8."""
    found = [pair[1] for row in ratios.values() for pair in row.values() if pair]
    met = sum(ratio <= CLAIM_RATIO for ratio in found)
    row = [str(len(found)), str(met) if met == len(found) else f"**{met}**", _ratio(max(found)) if found else ""]
    ours, fp8 = (results.get(name, {"status": ""}) for name in ("spectral-3", "fp8"))
    if ours["status"] == fp8["status"] == "ok":
        ratio = ours["kl_mean"] / fp8["kl_mean"]
        row.append(f"{_ratio(ratio)}, {'met' if ratio <= 1 else '**not met**'}")
    return row


def _rivals(ratios: dict[str, dict[str, tuple[str, float] | None]]) -> str:
    """The table of one part: every rival that is in reach of some rate."""
    families = dict.fromkeys(family for row in ratios.values() for family, pair in row.items() if pair)
    columns = sorted({*ratios, *(f"spectral-{rate:g}" for rate in CLAIM_RATES)}, key=lambda n: float(n.split("-")[-1]))
    rows = []
    for family in families:
        row = [family]
        for ours in columns:
            pair = ratios[ours][family] if ours in ratios else None
            bold = "**" if pair and pair[1] > CLAIM_RATIO else ""
            row.append(
                "not measured" if ours not in ratios else f"{bold}{pair[0]}: {_ratio(pair[1])}{bold}" if pair else ""
            )
        rows.append(row)
    return markdown(["rival", *columns], rows)


def predictions(settings: dict[str, Any]) -> dict[str, float]:
    """The divergence that the calibration of a fidelity record predicts, by method.

    Args:
        settings: The record's.

    Returns:
        What the record says; where it was made before records did, what the calibration measured of itself at two
        rates, through which its predictions go.
    """
    if "predicted_kl" in settings:
        return {name: kl for name, kl in settings["predicted_kl"].items() if kl is not None}
    points = (settings["calibration"].get("yardstick") or {}).get("points", [])
    return {f"spectral-{point['bits']:g}": point["kl"] for point in points}


def _predictions(parts: Parts, page: Path) -> list[str]:
    """Predicted beside measured divergence, on every text: the default residual is what predictions are for."""
    settings, rows = parts["residual_64"][1]["settings"], []
    others = beside(parts, "residual_64", list(OTHER_TEXTS))
    texts = {"residual_64": text_name(settings), **{part: OTHER_TEXTS[part] for part in others}}
    for part, text in texts.items():
        results = results_of(parts, part)
        for name, predicted in (predictions(parts[part][1]["settings"]) or predictions(settings)).items():
            if results.get(name, {"status": ""})["status"] == "ok":
                rows.append([text, *_prediction(name, predicted, results[name])])
    if not rows:
        return []
    how = [
        f"{texts[part][0].upper()}{texts[part][1:]}: {windows(parts[part][1]['settings'], part)}. "
        f"{origins(parts, [part], page)}"
        for part in others
    ]
    told = "What the calibration predicts for text of its own kind, Wikipedia's, residual 64:"
    return ["\n\n".join([told, markdown(["text", *PREDICTION], rows), *how])]


def _prediction(name: str, predicted: float, measured: dict[str, Any]) -> list[str]:
    """A row of :data:`PREDICTION`."""
    ratio = predicted / measured["kl_mean"]
    verdict = "met" if 1 / PREDICTED_WITHIN <= ratio <= PREDICTED_WITHIN else "**not met**"
    return [name, f"{predicted:.5f}", f"{measured['kl_mean']:.5f}", f"{ratio:.2f}", verdict]


def predictions_table(path: Path, record: Record, page: Path) -> str:
    """What a calibration on WikiText-2 predicts for WikiText-2."""
    settings, results = record["settings"], record["metrics"]
    rows = [_prediction(name, predicted, results[name]) for name, predicted in predictions(settings).items()]
    caption = (
        f"Calibrated on {settings['calibration']['tokens']:,} tokens of WikiText-2's validation text; measured on "
        f"{settings['windows']} windows of {settings['context']:,} tokens of its test text, residual "
        f"{settings['residual']}. {origin(path, record, page)}"
    )
    return f"{markdown(PREDICTION, rows)}\n\n{caption}"
