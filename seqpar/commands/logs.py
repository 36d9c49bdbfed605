"""`seqpar logs`: what a job's ranks have printed."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer


def command(
    job: Annotated[str, typer.Argument(help="A run's name or folder; with --address, a job's id.")],
    rank: Annotated[int, typer.Option(help="Which rank's log.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the end.")] = False,
    address: Annotated[str | None, typer.Option(help="Dashboard of a cluster.")] = None,
) -> None:
    """Print or follow a job's logs."""
    if address:
        from seqpar.launch.submit import RemoteJobs

        jobs = RemoteJobs(address)
        for text in jobs.follow(job) if follow else [jobs.logs(job)]:
            sys.stdout.write(text)
            sys.stdout.flush()
        return
    from seqpar.launch.watch import find_run, follow_log, run_status

    run = find_run(job)
    for data in follow_log(run, rank):
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        if not data:
            if not follow or run_status(run)["state"] != "running":
                return
            time.sleep(0.2)
