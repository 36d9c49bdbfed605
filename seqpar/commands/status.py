"""`seqpar status`: how a job is, and each of its ranks."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer


def command(
    job: Annotated[str, typer.Argument(help="A run's name or folder; with --address, a job's id.")],
    address: Annotated[str | None, typer.Option(help="Dashboard of a cluster.")] = None,
    watch: Annotated[bool, typer.Option(help="Keep the view up to date until the end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the status as JSON.")] = False,
) -> None:
    """Show a job: its state, and each rank's step, rate, memory and last sign of life."""
    if address:
        from seqpar.launch.submit import RemoteJobs

        print(json.dumps(RemoteJobs(address).status(job)))
        return
    from seqpar.launch.watch import find_run, run_status, status_view

    run = find_run(job)
    if as_json:
        print(json.dumps(run_status(run)))
        return
    from rich.console import Console
    from rich.live import Live

    if not watch:
        Console().print(status_view(run_status(run)))
        return
    with Live(status_view(run_status(run)), refresh_per_second=4) as live:
        while run_status(run)["state"] == "running":
            time.sleep(0.5)
            live.update(status_view(run_status(run)))
