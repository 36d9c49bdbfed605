"""`seqpar stop`: end a job and everything it started."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    job: Annotated[str, typer.Argument(help="A run's name or folder; with --address, a job's id.")],
    address: Annotated[str | None, typer.Option(help="Dashboard of a cluster.")] = None,
    timeout_s: Annotated[float, typer.Option(help="How long to wait for its end.")] = 60.0,
) -> None:
    """Stop a job and everything it started."""
    if address:
        from seqpar.launch.submit import RemoteJobs

        stopped = RemoteJobs(address).stop(job)
    else:
        from seqpar.launch.watch import find_run, stop_run

        stopped = stop_run(find_run(job), timeout_s=timeout_s)
    print("stopped" if stopped else "had ended before")
