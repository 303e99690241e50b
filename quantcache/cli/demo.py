"""``quantcache demo``."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.text import Text

from quantcache.cli.loading import find_model, load_calibration, own_calibration
from quantcache.cli.options import CalibrationOption, DebugFlag, JsonFlag, NamedOption, named_model
from quantcache.cli.pages import WrongUsage
from quantcache.cli.reaching import expect_model
from quantcache.cli.session import session
from quantcache.common.grid import Grid, Prose
from quantcache.common.sources import MODEL_HELP
from quantcache.data import BUNDLED_MODEL


def demo(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=BUNDLED_MODEL)] = None,
    named: NamedOption = None,
    calibration: CalibrationOption = None,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Calibrate the bundled model, compress its cache and show what that costs. Needs no network.

    Any other model must chat and have a calibration: it reads an article, and answers questions about it from a dense
    and a packed cache.

    Examples:
        quantcache demo
        quantcache demo smollm2-135m
    """
    with session(json, debug) as run:
        model = named_model(model, named) or BUNDLED_MODEL
        if model == BUNDLED_MODEL:
            if calibration is not None:
                raise WrongUsage(f"the demo calibrates {BUNDLED_MODEL} itself: leave --calibration out")
            from quantcache.evaluation.demo import run_demo

            data = run_demo()
            run.finish(data, *_table(data), _texts(data))
            return
        expect_model(model)
        constants = load_calibration(calibration or own_calibration(model))
        source = find_model(model)

        from quantcache.evaluation.chat_demo import run_chat_demo

        data = run_chat_demo(model, source, constants)
        run.finish(data, *_chat_table(data), _chat(data))


def _chat_table(data: dict[str, Any]) -> tuple[Grid, Prose]:
    tokens, dense, packed = data["cached_tokens"], data["dense"], data["spectral"]
    slow = " Dense attention runs in bfloat16 here, which many CPUs do slowly." if data["device"] == "cpu" else ""
    title = f"{data['model']} in {data['dtype']} has read the article {data['article']!r}"
    table = Grid("", "dense cache", "spectral cache", title=title)
    table.add_row(
        "bytes", f"{dense['bytes']:,}", f"{packed['bytes']:,} ({dense['bytes'] / packed['bytes']:.2f}× smaller)"
    )
    table.add_row("bits per encoded element", "16", f"{data['bits_per_element']:.3f}")
    table.add_row("including sinks and recent tokens", "16", f"{data['bits_per_element_total']:.3f}")
    for what in ("reading", "answering"):
        speeds = [side[f"{what}_tokens_per_second"] for side in (dense, packed)]
        table.add_row(f"tokens per second, {what}", *("" if speed is None else f"{speed:.1f}" for speed in speeds))
    caption = (
        f"Sizes: {tokens:,} cached tokens; the calibration's constants ({data['constants_bytes']:,} bytes) are shared "
        f"by all caches. Speeds are those of this run on this machine.{slow} It took {data['seconds']:.0f} s."
    )
    return table, Prose(f"\n{caption}")


def _chat(data: dict[str, Any]) -> Text:
    text = Text()
    for asked in data["questions"]:
        text.append(f"\n{asked['question']}\n", style="bold")
        for kind in ("dense", "spectral"):
            verdict = "right" if asked[f"right_{kind}"] else f"wrong, it is {', '.join(asked['fact'])}"
            answer = " ".join(asked[f"answer_{kind}"].split())
            text.append(f"  {kind} cache: {answer} [{verdict}]\n")
    return text


def _table(data: dict[str, Any]) -> tuple[Grid, Prose]:
    tokens = data["cached_tokens"]
    title = f"{data['model']} in {data['dtype']}, calibrated on {data['calibration_tokens']:,} tokens"
    table = Grid("", "dense cache", "spectral cache", title=title)
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
    caption = (
        f"Sizes: {tokens:,} cached tokens; the calibration's constants ({data['constants_bytes']:,} bytes) are shared "
        f"by all caches. Fidelity: {data['evaluated_tokens']:,} tokens of other text in windows of "
        f"{data['context']:,}, read through the caches. It took {data['seconds']:.0f} s."
    )
    return table, Prose(f"\n{caption}")


def _texts(data: dict[str, Any]) -> Text:
    text = Text()
    for name in ("dense", "spectral"):
        text.append(f"\nText, {name} cache: ", style="bold")
        text.append(" ".join(data[f"text_{name}"].split()))
        text.append("\n")
    return text
