"""``quantcache export``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from quantcache.cli.loading import find_model, load_calibration, own_calibration, quiet_unless_watched
from quantcache.cli.metrics import read_metrics
from quantcache.cli.options import (
    CalibrationOption,
    CardOption,
    DebugFlag,
    JsonFlag,
    ModelArgument,
    PrivateOption,
    PushOption,
    RevisionOption,
    check_private,
)
from quantcache.cli.session import session
from quantcache.common.choices import Basis
from quantcache.common.errors import HubError
from quantcache.common.grid import Prose
from quantcache.common.progress import progress_bar


def export(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write; new or empty.")],
    calibration: CalibrationOption = None,
    basis: Annotated[
        Basis, typer.Option(help="spectral for SpectralCache; flat for quantizers with one step per token.")
    ] = "spectral",
    push_to_hub: PushOption = None,
    private: PrivateOption = False,
    records: CardOption = None,
    verify: Annotated[bool, typer.Option(help="Load the model, then the export, and compare their logits.")] = True,
    revision: RevisionOption = None,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Write a model with the value basis of its calibration folded into its weights.

    The result loads in plain transformers and computes what the model computes; SpectralCache does less work on it.

    Examples:
        quantcache export wiki11m -c calibration/ -o wiki11m-spectral
        quantcache export wiki11m -c calibration/ -o wiki11m-flat --basis flat
    """
    with session(json, debug) as run:
        check_private(private, push_to_hub)
        rows = None if records is None else read_metrics(records, model, str(output), push_to_hub)
        source = find_model(model, revision)

        from quantcache.artifact import hub
        from quantcache.export import export_checkpoint
        from quantcache.export.exporter import STALE

        if push_to_hub is not None:
            hub.check_push(push_to_hub)
        constants = load_calibration(calibration or own_calibration(model))
        started = time.perf_counter()
        with quiet_unless_watched(), progress_bar() as bar:
            task = bar.add_task("exporting", total=None)
            report = export_checkpoint(
                source,
                constants,
                output,
                basis=basis,
                verify=verify,
                revision=revision,
                repo_id=push_to_hub,
                metrics=rows,
                on_progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
            )
        url = None
        if push_to_hub is not None:
            try:
                message = f"Export in {basis} basis"
                url = hub.push_folder(output, push_to_hub, message=message, private=private or None, replacing=STALE)
            except HubError as error:
                raise HubError(f"{error}; the export is kept in {output}") from error
        result: dict[str, Any] = {
            "model": model,
            "base_model": report.base_model,
            "output": str(output),
            "url": url,
            "basis": basis,
            "layers": report.layers,
            "tensors": report.tensors,
            "shards": report.shards,
            "keys_scaled": report.keys_scaled,
            "value_mean": "weights" if report.mean_in_weights else "cache",
            "left_out": report.left_out,
            "logits": None if report.difference is None else report.difference.to_dict(),
            "seconds": time.perf_counter() - started,
        }
        where = " and ".join(str(place) for place in (output, url) if place)
        lines = [f"{where}: {report.layers} layers in {basis} basis ({result['seconds']:.0f} s)"]
        if report.difference is not None:
            lines.append(f"logits {report.difference}")
        if report.left_out:
            lines.append(f"left out, since they are not rewritten: {', '.join(report.left_out)}")
        run.finish(result, *map(Prose, lines))
