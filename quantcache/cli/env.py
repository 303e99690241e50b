"""``quantcache env``."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Group
from rich.table import Table

from quantcache.cli.options import DebugFlag, JsonFlag
from quantcache.cli.session import session


def env(
    check: Annotated[bool, typer.Option("--check", help="Also compare every kernel with plain torch.")] = False,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Show versions and hardware, as they go into every record."""
    with session(json, debug) as run:
        from quantcache.common.env import environment

        record = environment()
        table = Table(show_header=False, box=None)
        for name, value in record["versions"].items():
            table.add_row(name, value or "not installed")
        cpu, git = record["cpu"], record["git"]
        table.add_row("platform", record["platform"])
        table.add_row("cpu", f"{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads, {cpu['capability']}")
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
        run.finish(record, Group(table, "", _kernel_table(record["kernels"])))


def _kernel_table(found: list[dict[str, Any]]) -> Table:
    """Outcomes of the kernels' trials, for people."""
    table = Table("backend", "device", "case", "operation", "difference", "allowed", "")
    for each in found:
        if each["operation"] is None:
            table.add_row(each["backend"], each["device"], "", "", "", "", f"not used: {each['problem']}")
            continue
        difference = "" if each["difference"] is None else f"{each['difference']:.1e}"
        figures = (each["case"], each["operation"], difference, f"{each['allowed']:.1e}")
        table.add_row(each["backend"], each["device"], *figures, each["problem"] or "ok")
    return table
