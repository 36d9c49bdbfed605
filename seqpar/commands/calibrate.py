"""`seqpar calibrate`: measure this machine and write the cost file that plans use."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from seqpar.calibration_ranks import MachineCalibration


def command(
    out: Annotated[str, typer.Option(help="Where to write the cost file.")] = "cost.json",
    ranks: Annotated[
        int, typer.Option(help="Processes to measure on (default: CUDA devices, or 2).", min=0)
    ] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda (default: cuda if there is one).")] = "",
    dim: Annotated[int, typer.Option(help="Width of the hybrid decoder.", min=16)] = 256,
    layers: Annotated[int, typer.Option(help="Its layers.", min=1)] = 4,
    heads: Annotated[int, typer.Option(help="Its heads.", min=1)] = 4,
    softmax_every: Annotated[
        int, typer.Option(help="Every n-th layer is softmax, the others keep a state.", min=1)
    ] = 4,
    longest_tokens: Annotated[
        int | None,
        typer.Option(
            help="Longest document that one rank is timed with (default: 4,096 on CPU; on CUDA "
            "as long as its work needs to show).",
            min=256,
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="float32 or bfloat16 (default: bfloat16 on cuda, else float32).")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything measured.")] = False,
) -> None:
    """Measure compute by length, collectives by size and degree, and memory a token; fit costs.

    The file serves `seqpar plan --cost FILE --memory-gib G`.
    """
    import torch

    from seqpar.calibration_ranks import CalibrationJob, calibrate_machine
    from seqpar.errors import PlanError

    found = torch.cuda.device_count()
    chosen = device or ("cuda" if found else "cpu")
    if chosen not in ("cpu", "cuda"):
        raise PlanError(f"--device is cpu or cuda, got {device!r}")
    if chosen == "cuda" and not found:
        raise PlanError("there is no CUDA device here: leave --device out, or say --device cpu")
    if dim % heads:
        raise PlanError(f"--heads must divide --dim: {heads} does not divide {dim}")
    precision = precision or ("bfloat16" if chosen == "cuda" else "float32")
    if precision not in ("float32", "bfloat16"):
        raise PlanError(f"--precision is float32 or bfloat16, got {precision!r}")
    job = CalibrationJob(
        ranks=ranks or (found if chosen == "cuda" else 2),
        device=chosen,
        dim=dim,
        layers=layers,
        heads=heads,
        softmax_every=softmax_every,
        longest_tokens=longest_tokens,
        precision=precision,
        talk=True,
    )
    if not os.access(Path(out).parent, os.W_OK):  # said before the measuring, not after
        raise PlanError(f"cannot write the cost file {out}: no such folder, or no right to write")
    result = calibrate_machine(job)
    try:
        with open(out, "w", encoding="utf-8") as file:
            json.dump(result.calibration.cost.to_json(), file, indent=1)
    except OSError as error:
        raise PlanError(f"cannot write the cost file {out}: {error.strerror}") from error
    if as_json:
        typer.echo(json.dumps(result.to_json()))
    else:
        _print(result, out)


def _print(result: MachineCalibration, out: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(result.calibration.summary())
    cost = result.calibration.cost
    table = Table(title="fitted constants")
    for heading in ("constant", "value", "standard error"):
        table.add_column(heading, justify="left" if heading == "constant" else "right")
    values = {
        "quadratic": sum(layer.quadratic_ms for layer in cost.layers),
        "linear": sum(layer.linear_ms for layer in cost.layers),
        "fixed": cost.fixed_ms,
        **{f"latency_{link.degree}": link.latency_ms for link in cost.links},
    }
    for name, value in values.items():
        error = cost.errors.get(name)
        table.add_row(name, f"{value:.3g} ms", "-" if error is None else f"{error:.2g}")
    table.add_row("memory a token", f"{cost.memory_bytes_per_token / 2**10:.1f} KiB", "-")
    table.add_row("memory, fixed", f"{cost.memory_fixed_bytes / 2**30:.3f} GiB", "-")
    console.print(table)
    for row in result.collectives:
        console.print(
            f"all-to-all of {row.message_bytes:,} bytes a rank at degree {row.degree}: "
            f"{row.ms:.3f} ms, {row.gib_per_s:.2f} GiB/s"
        )
    console.print(f"{result.seconds:.1f} s in all; wrote {out}")
