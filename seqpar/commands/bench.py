"""`seqpar bench`: run the benchmarks that this machine can run, each with its peers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from seqpar.errors import JobSpecError

FOLDER = Path(__file__).parents[2] / "benchmarks"


def command(
    names: Annotated[
        list[str] | None, typer.Argument(help="Benchmarks by name, such as planner; all if none.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print name and exit code of each as JSON.")
    ] = False,
) -> None:
    """Run benchmarks: each prints a table and writes JSON under benchmarks/results/.

    Benchmarks are part of the source tree, not of the installed package. One that needs a GPU
    says so and ends with exit code 0.
    """
    known = {path.stem.removeprefix("bench_"): path for path in sorted(FOLDER.glob("bench_*.py"))}
    if not known:
        raise JobSpecError(f"no benchmarks at {FOLDER}: run from a clone of the source")
    for name in names or []:
        if name not in known:
            raise JobSpecError(f"no benchmark {name!r}: choose from {', '.join(known)}")
    codes = {}
    for name in names or known:
        if not as_json:
            print(f"== {name}", flush=True)
        output = subprocess.DEVNULL if as_json else None
        codes[name] = subprocess.run([sys.executable, str(known[name])], stdout=output).returncode
    if as_json:
        print(json.dumps({"exit_codes": codes}))
    raise typer.Exit(max(codes.values()))
