"""``quantcache export``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from quantcache.cli.loading import find_model, load_calibration, quiet_unless_watched
from quantcache.cli.metrics import MetricsOption, read_metrics
from quantcache.cli.options import CalibrationOption, DebugFlag, JsonFlag, ModelArgument, RevisionOption
from quantcache.cli.session import progress_bar, session
from quantcache.common.errors import HubError


def export(
    model: ModelArgument,
    calibration: CalibrationOption,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write; new or empty.")],
    basis: Annotated[
        str, typer.Option(help="spectral (for SpectralCache) or flat (for quantizers with one step per token).")
    ] = "spectral",
    push_to_hub: Annotated[str | None, typer.Option(metavar="REPO", help="Hub repository to push to.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    metrics: MetricsOption = None,
    verify: Annotated[bool, typer.Option(help="Load the model, then the export, and compare their logits.")] = True,
    revision: RevisionOption = None,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Write a model with the value basis of its calibration folded into its weights.

    The result loads in plain transformers and computes what the model computes; SpectralCache does less work on it.

    Example: quantcache export wiki11m -c calibration/ -o wiki11m-spectral
    """
    with session(json, debug) as run:
        rows = None if metrics is None else read_metrics(metrics)
        source = find_model(model)

        from quantcache.artifact import hub
        from quantcache.export import export_checkpoint

        if push_to_hub is not None:
            hub.check_push(push_to_hub)
        constants = load_calibration(calibration)
        started = time.perf_counter()
        with quiet_unless_watched(), progress_bar() as bar:
            task = bar.add_task("exporting", total=None)
            report = export_checkpoint(
                source,
                constants,
                output,
                basis=basis,  # type: ignore[arg-type]
                verify=verify,
                revision=revision,
                repo_id=push_to_hub,
                metrics=rows,
                on_progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
            )
        url = None
        if push_to_hub is not None:
            try:
                url = hub.push_folder(output, push_to_hub, message=f"Export in {basis} basis", private=private or None)
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
        run.finish(result, *lines)
