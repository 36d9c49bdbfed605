"""`seqpar launch`: run a job file, or a script, and end with the script's exit code."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from seqpar.errors import JobSpecError, LaunchError
from seqpar.launch.spec import JobSpec, load_job, script_job


def command(
    target: Annotated[Path, typer.Argument(help="A job file (.yaml), or a script.")],
    args: Annotated[list[str] | None, typer.Argument(help="Arguments of the script.")] = None,
    nproc: Annotated[int | None, typer.Option(help="Number of ranks.")] = None,
    engine: Annotated[str | None, typer.Option(help="local or ray.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run, and of its folder.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value over the file; repeatable.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Submit to a cluster's dashboard: http://head:8265.")
    ] = None,
    detach: Annotated[bool, typer.Option(help="With --address: do not wait for the end.")] = False,
    resume: Annotated[bool, typer.Option(help="Continue the run's last checkpoint.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be started; start nothing.")
    ] = False,
    emit: Annotated[
        str | None, typer.Option(help="Print the job for kuberay or slurm; start nothing.")
    ] = None,
    nodes: Annotated[int, typer.Option(help="With --emit: number of nodes.")] = 1,
    image: Annotated[str, typer.Option(help="With --emit kuberay: the image of every pod.")] = "",
    volume_claim: Annotated[
        str, typer.Option(help="With --emit kuberay: the claim that holds the script.")
    ] = "seqpar-job",
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Run a job file, or a script, on local processes or on Ray.

    seqpar launch job.yaml --set nproc=2

    seqpar launch --nproc 4 script.py -- --steps 10
    """
    given = {"nproc": nproc, "engine": engine, "name": name}
    options = {key: value for key, value in given.items() if value is not None}
    spec = read_target(target, args or [], options, overrides or [])
    if emit is not None:
        print(emitted(spec, emit, nodes=nodes, image=image, volume_claim=volume_claim))
    elif address is not None:
        submit(spec, address, detach=detach)
    else:
        run(spec, resume=resume, dry_run=dry_run, as_json=as_json)


def run(spec: JobSpec, *, resume: bool, dry_run: bool, as_json: bool) -> None:
    """Place the job, and run it here or show what would be run."""
    from seqpar.launch.jobs import run_job
    from seqpar.launch.placement import place

    placement = place(spec)
    if dry_run:
        show(placement.describe(), as_json)
        return
    try:
        outcome = run_job(placement, resume=resume)
    except LaunchError as error:
        for note in getattr(error, "__notes__", []):
            print(note, file=sys.stderr)
        raise
    if as_json:
        print(json.dumps(outcome))


def emitted(spec: JobSpec, form: str, *, nodes: int, image: str, volume_claim: str) -> str:
    """The job as a manifest or batch script."""
    from seqpar.launch.emit import kuberay_manifest, slurm_script

    if form == "slurm":
        return slurm_script(spec, nodes=nodes)
    if form != "kuberay":
        raise JobSpecError(f"--emit {form!r}: it is kuberay or slurm")
    if not image:
        raise JobSpecError("--emit kuberay needs --image, with Ray, torch and seqpar in it")
    return kuberay_manifest(spec, image=image, nodes=nodes, volume_claim=volume_claim)


def submit(spec: JobSpec, address: str, *, detach: bool) -> None:
    """Submit to a cluster, and unless detached show its output and end with its exit code."""
    from seqpar.launch.submit import RemoteJobs

    jobs = RemoteJobs(address)
    job = jobs.submit(spec)
    print(f"submitted {job}; seqpar status|logs|stop {job} --address {address}", file=sys.stderr)
    if detach:
        print(job)
        return
    for text in jobs.follow(job):
        sys.stdout.write(text)
        sys.stdout.flush()
    code = jobs.status(job)["exit_code"]
    raise typer.Exit(1 if code is None else code if code >= 0 else 128 - code)


def read_target(
    target: Path, args: list[str], options: dict[str, Any], overrides: list[str]
) -> JobSpec:
    """A job file by its ending, anything else is a script."""
    if target.suffix in (".yaml", ".yml"):
        if args:
            raise JobSpecError(
                f"a job file takes no arguments, found {args}: use --set args=[...], "
                "and give options before the file"
            )
        return load_job(target, [f"{key}={value}" for key, value in options.items()] + overrides)
    return script_job(target, args[1:] if args[:1] == ["--"] else args, options, overrides)


def show(description: dict[str, Any], as_json: bool) -> None:
    """A placement as JSON or as a table."""
    if as_json:
        print(json.dumps(description))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("what", title="Would start (nothing was started)")
    table.add_column("value", overflow="fold")
    for key, value in description.items():
        if key == "ranks":
            value = ", ".join(f"{rank['rank']} on {rank['device']}" for rank in value)
        elif key == "command":
            value = " ".join(value)
        elif key == "environment":
            value = "\n".join(f"{name}={text}" for name, text in value.items())
        table.add_row(key, "none" if value is None else escape(str(value)))
    Console().print(table)
