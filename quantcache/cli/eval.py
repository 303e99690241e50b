"""``quantcache eval``."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from quantcache.cli.session import (
    DebugFlag,
    DeviceOption,
    DtypeOption,
    JsonFlag,
    ModelArgument,
    RevisionOption,
    TrustOption,
    load_calibration,
    load_model,
    position_limit,
    progress_bar,
    read_text,
    session,
    write_json,
)
from quantcache.errors import QuantCacheError

if TYPE_CHECKING:
    from quantcache.artifact import Calibration

METHODS = "dense,spectral-2,spectral-3,spectral-4,turboquant-mse-2,turboquant-mse-3,turboquant-mse-4"
CONTEXT = 2048
QUICK_TOKENS = 4096


def evaluate(
    model: ModelArgument,
    text: Annotated[Path, typer.Option(metavar="FILE", help="Text to evaluate on, never one calibrated on.")],
    calibration: Annotated[
        str | None, typer.Option("--calibration", "-c", metavar="ARTIFACT", help="For the spectral methods.")
    ] = None,
    methods: Annotated[str, typer.Option(help="Comma-separated: dense, spectral-B, turboquant-mse-B.")] = METHODS,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens in a window. Default: 2048 or the limit.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of text to use at most.")] = 16_384,
    residual: Annotated[int, typer.Option(min=0, help="Recent tokens that every method keeps.")] = 64,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens that every method keeps.")] = 4,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens fed at once.")] = 64,
    quick: Annotated[bool, typer.Option("--quick", help=f"Use {QUICK_TOKENS} tokens at most.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Also write the JSON here.")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Measure how far compressed caches move a model's predictions.

    The text is fed in chunks through the real cache of every method, and compared with the dense cache.

    Example: quantcache eval wiki11m -c calibration/ --text held_out.txt --quick
    """
    with session(json, debug) as run:
        names = list(dict.fromkeys(name.strip() for name in methods.split(",") if name.strip()))
        if not names:
            raise ValueError("--methods names no method")
        if output is not None and not output.resolve().parent.is_dir():
            raise FileNotFoundError(f"there is no folder {output.resolve().parent}")
        content = read_text(text)
        constants = None if calibration is None else load_calibration(calibration)
        digest = hashlib.sha256(content.encode()).hexdigest()
        if constants is not None:
            refuse_calibration_text(constants, digest, text)

        from quantcache.evaluation import measure_fidelity, needs_statistics, parse_methods, text_statistics

        loaded, tokenizer = load_model(
            model, device=device, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
        )
        if constants is not None:
            constants.check_compatible(loaded.config)
        limit = position_limit(loaded)
        context = context or min(CONTEXT, limit or CONTEXT)
        if limit is not None and context > limit:
            raise ValueError(f"--context {context} exceeds the model's limit of {limit} positions")
        wanted = min(tokens, QUICK_TOKENS) if quick else tokens
        if wanted < context:
            raise ValueError(
                f"{wanted} tokens are less than one window of {context}: raise --tokens or lower --context"
            )
        statistics = text_statistics(loaded, tokenizer) if needs_statistics(names) else None
        if statistics is not None and digest in statistics.text_sha256:
            raise QuantCacheError(f"{text} is the text that pca, oscar and rank are fitted to: evaluate on another one")
        parsed = parse_methods(names, loaded.config, constants, sinks, residual, statistics=statistics)
        # Four bytes and more of text make a token; 64 leave room for any tokenizer without reading all of a long file.
        ids = tokenizer(content[: 64 * wanted], return_tensors="pt", verbose=False).input_ids[0]
        ids = ids[: wanted // context * context]
        started = time.perf_counter()
        with progress_bar() as bar:
            task = bar.add_task("measuring", total=len(ids) // context * context)
            results = measure_fidelity(
                loaded,
                ids,
                parsed,
                context=context,
                chunk=chunk,
                sink_length=sinks,
                on_progress=lambda count: bar.advance(task, count),
            )
        data = {
            "model": model,
            "calibration": calibration,
            "context": context,
            "tokens": len(ids) // context * context,
            "residual": residual,
            "sinks": sinks,
            "chunk": chunk,
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "device": str(loaded.device),
            "text": {"name": text.name, "sha256": digest},
            "seconds": time.perf_counter() - started,
            "methods": {name: result.to_dict() for name, result in results.items()},
        }
        failures = [f"{name}: {result.status}" for name, result in results.items() if result.status != "ok"]
        if len(failures) == len(results):
            raise QuantCacheError(f"no method could be measured; {failures[0]}")
        if output is not None:
            write_json(output, data)
        run.finish(data, _table(data))


def refuse_calibration_text(calibration: Calibration, digest: str, text: Path) -> None:
    """Refuse to evaluate on the text of the calibration.

    Args:
        calibration: The calibration.
        digest: SHA-256 of the evaluation text.
        text: Its file, for the error.

    Raises:
        QuantCacheError: They are the same text.
    """
    if digest in calibration.metadata.recipe.get("text_sha256", ()):
        raise QuantCacheError(f"{text} is the text that was calibrated on: evaluate on another one")


def _table(data: dict[str, Any]) -> Table:
    table = Table(
        "method",
        "bits/elt",
        "bits in all",
        "KL mean",
        "KL p99",
        "top-1 agreement",
        "perplexity",
        "cache bytes",
        title=f"{data['model']}: {data['tokens']:,} tokens in windows of {data['context']:,}, "
        f"residual {data['residual']}, sinks {data['sinks']}, {data['dtype']}",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for name, result in data["methods"].items():
        if result["status"] != "ok":
            table.add_row(name, result["status"])
            continue
        table.add_row(
            f"{name} (simulated)" if result["simulated"] else name,
            f"{result['bits_per_element']:.3f}",
            f"{result['bits_per_element_total']:.3f}",
            f"{result['kl_mean']:.5f}",
            f"{result['kl_p99']:.4f}",
            f"{result['top1_agreement']:.2%}",
            f"{result['perplexity']:.3f}",
            f"{result['cache_bytes']:,}",
        )
    return table
