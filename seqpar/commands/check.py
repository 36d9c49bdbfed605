"""`seqpar check`: a wrapped model against one device."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer


def command(
    model: Annotated[
        str,
        typer.Argument(
            help="A family (llama, LlamaConfig, minimax, ...) or package.module:function; modules "
            "are looked for in this folder too."
        ),
    ],
    ranks: Annotated[int, typer.Option(help="Sequence-parallel ranks.", min=1)] = 4,
    lengths: Annotated[
        str, typer.Option(help="Tokens of each document, with commas between.")
    ] = "13,1,29,2,7",
    strategy: Annotated[str, typer.Option(help="How softmax layers exchange.")] = "auto",
    exchange: Annotated[str, typer.Option(help="How state layers exchange.")] = "auto",
    layout: Annotated[str, typer.Option(help="contiguous, zigzag or balanced.")] = "contiguous",
    device: Annotated[str, typer.Option(help="cpu (gloo) or cuda (NCCL).")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compare loss and every parameter's gradient of a wrapped model with one device.

    Exit code 1 if they differ: the message names the first module that diverges.
    """
    from seqpar.errors import DataError, ParityError
    from seqpar.parity_ranks import ParityJob, check_on_ranks

    try:
        parts = tuple(int(part) for part in lengths.split(","))
    except ValueError:
        raise DataError(f"--lengths takes whole numbers with commas, got {lengths!r}") from None
    if os.getcwd() not in sys.path:  # as `python -m` would have it, on every rank
        sys.path.insert(0, os.getcwd())
    job = ParityJob(model, ranks, parts, strategy, exchange, layout, device)  # type: ignore[arg-type]
    try:
        report = check_on_ranks(job)
    except ParityError as error:
        if not as_json:
            raise
        print(json.dumps({"model": model, "ok": False, "error": str(error)}))
        raise typer.Exit(1) from None
    print(json.dumps(as_dict(model, report)) if as_json else f"{model}: {report.summary()}")


def as_dict(model: str, report: Any) -> dict[str, Any]:
    """The report as plain values."""
    return {
        "model": model,
        "ok": report.ok,
        "loss_error": report.loss_error,
        "gradient_error": report.gradient_error,
        "worst_parameter": report.worst_parameter,
        **asdict(report),
    }
