"""``quantcache env``."""

from __future__ import annotations

from rich.table import Table

from quantcache.cli.session import DebugFlag, JsonFlag, session


def env(json: JsonFlag = False, debug: DebugFlag = False) -> None:
    """Show versions and hardware, as they go into every record."""
    with session(json, debug) as run:
        from quantcache.env import environment

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
        run.finish(record, table)
