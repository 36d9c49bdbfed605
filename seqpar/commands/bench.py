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

CUDA_DEVICES = {"lightning": 1, "decode": 1, "softmax": 2, "state": 2, "wrap": 2}
"""How many CUDA devices a benchmark needs; those not named here run on CPU."""

ARGUMENTS = {"wrap": ["--out", "benchmarks/results/h200-x2/wrap.json"]}


def command(
    names: Annotated[
        list[str] | None, typer.Argument(help="Benchmarks by name, such as planner; all if none.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what became of each as JSON.")
    ] = False,
) -> None:
    """Run benchmarks: each prints a table and writes JSON under benchmarks/results/.

    Benchmarks are part of the source tree, not of the installed package. One that needs more CUDA
    devices than there are is left out, and said so.
    """
    import torch

    known = sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))
    if not known:
        raise JobSpecError(f"no benchmarks at {FOLDER}: run from a clone of the source")
    for name in names or []:
        if name not in known:
            raise JobSpecError(f"no benchmark {name!r}: choose from {', '.join(known)}")
    devices = torch.cuda.device_count()
    outcomes: dict[str, int | str] = {}
    for name in names or known:
        needed = CUDA_DEVICES.get(name, 0)
        if devices < needed:
            outcomes[name] = f"left out: needs {needed} CUDA devices, found {devices}"
        else:
            outcomes[name] = _run(name, needed, quiet=as_json)
        if not as_json:
            print(f"== {name}: {outcomes[name]}", flush=True)
    if as_json:
        print(json.dumps(outcomes))
    raise typer.Exit(max((code for code in outcomes.values() if isinstance(code, int)), default=0))


def _run(name: str, ranks: int, *, quiet: bool) -> int:
    """The benchmark's exit code; one of several ranks is started by torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    words = [*(torchrun if ranks > 1 else []), "-m", f"benchmarks.bench_{name}"]
    words += ARGUMENTS.get(name, [])
    output = subprocess.DEVNULL if quiet else None
    return subprocess.run([sys.executable, *words], cwd=FOLDER.parent, stdout=output).returncode
