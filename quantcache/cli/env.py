"""``quantcache env``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from quantcache.cli.options import DebugFlag, JsonFlag
from quantcache.cli.session import session
from quantcache.common.grid import Grid


def env(
    check: Annotated[
        bool, typer.Option("--check", help="Also compare every kernel with plain torch.", show_default=False)
    ] = False,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Show versions and hardware, as they go into every record.

    Examples:
        quantcache env
        quantcache env --check
    """
    with session(json, debug) as run:
        from quantcache.common.env import environment

        record = environment()
        table = Grid("", "", fold=True)
        for name, value in record["versions"].items():
            table.add_row(name, value or "not installed")
        cpu, git = record["cpu"], record["git"]
        table.add_row("platform", record["platform"])
        table.add_row("cpu", f"{cpu['name']}, {cpu['cores']} cores, {cpu['capability']}")
        table.add_row("threads", f"torch uses {cpu['threads']}")
        table.add_row("memory", f"{record['memory_bytes'] / 2**30:.1f} GiB" if record["memory_bytes"] else "unknown")
        for gpu in record["gpus"]:
            table.add_row("gpu", f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, driver {gpu['driver']}")
        if not record["gpus"]:
            table.add_row("gpu", "none")
        if git:
            table.add_row("git", f"{git['commit'] or 'no commit'}{' with changes' if git['dirty'] else ''}")
        if not check:
            run.finish(record, table)
            return
        from quantcache.evaluation.kernel_check import check_kernels

        record["kernels"] = check_kernels()
        run.finish(record, table, "", _kernel_table(record["kernels"]))


def _kernel_table(found: list[dict[str, Any]]) -> Grid:
    """Outcomes of the kernels' trials, for people."""
    table = Grid("backend", "device", "case", "operation", "difference", "allowed", "outcome", text=4, fold=True)
    for each in found:
        if each["operation"] is None:
            table.add_note(f"{each['backend']} on {each['device']}", f"not used: {each['problem']}")
            continue
        difference = "" if each["difference"] is None else f"{each['difference']:.1e}"
        figures = (each["case"], each["operation"], difference, f"{each['allowed']:.1e}")
        table.add_row(each["backend"], each["device"], *figures, each["problem"] or "ok")
    return table
