"""``quantcache demo``."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from quantcache.cli.session import DebugFlag, JsonFlag, session


def demo(json: JsonFlag = False, debug: DebugFlag = False) -> None:
    """Compress the cache of the bundled model and show what it costs. Needs no network."""
    with session(json, debug) as run:
        from quantcache.evaluation.demo import run_demo

        data = run_demo()
        run.finish(data, _table(data), _texts(data))


def _table(data: dict[str, Any]) -> Table:
    tokens = data["cached_tokens"]
    table = Table(
        "",
        "dense cache",
        "spectral cache",
        title=f"{data['model']} in {data['dtype']}, calibrated on {data['calibration_tokens']:,} tokens",
        caption=f"Sizes: {tokens:,} cached tokens; the calibration's constants ({data['constants_bytes']:,} bytes) are "
        f"shared by all caches. Fidelity: {data['evaluated_tokens']:,} tokens of other text in windows of "
        f"{data['context']:,}, read through the caches. It took {data['seconds']:.0f} s.",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    dense, packed = data["dense_bytes"], data["cache_bytes"]
    table.add_row(
        "bytes per token", f"{dense / tokens:,.0f}", f"{packed / tokens:,.0f} ({dense / packed:.2f}× smaller)"
    )
    table.add_row("bits per encoded element", "16", f"{data['bits_per_element']:.3f}")
    table.add_row("including sinks and recent tokens", "16", f"{data['bits_per_element_total']:.3f}")
    table.add_row("mean KL divergence, nats", "", f"{data['kl_mean']:.5f}")
    table.add_row("same most likely token", "", f"{data['top1_agreement']:.2%}")
    table.add_row("perplexity", f"{data['perplexity_dense']:.3f}", f"{data['perplexity_spectral']:.3f}")
    found = ("no", "yes")
    table.add_row(
        f"finds the planted code {data['needle']}", found[data["needle_found_dense"]], found[data["needle_found"]]
    )
    return table


def _texts(data: dict[str, Any]) -> Text:
    text = Text()
    for name in ("dense", "spectral"):
        text.append(f"\nText, {name} cache: ", style="bold")
        text.append(" ".join(data[f"text_{name}"].split()))
        text.append("\n")
    return text
