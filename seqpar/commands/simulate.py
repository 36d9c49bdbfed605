"""`seqpar simulate`: play lengths through the planner and its baselines, on any cluster size."""

from __future__ import annotations

import json
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer

from seqpar.errors import PlanError

if TYPE_CHECKING:
    from seqpar.planners.simulate import Simulation


def command(
    lengths: Annotated[
        str | None,
        typer.Argument(
            help="Sequence lengths: one a line, a JSON list, or .npy.", metavar="LENGTHS"
        ),
    ] = None,
    cost: Annotated[
        str, typer.Option(help="flexsp-7b, flexsp-13b, flexsp-30b, or a cost file (JSON).")
    ] = "",
    histogram: Annotated[str, typer.Option(help="A length histogram (JSON) instead.")] = "",
    devices: Annotated[
        str, typer.Option(help="Cluster sizes, as 64,256,1024; at most 4096.")
    ] = "64,256,1024",
    devices_per_node: Annotated[int, typer.Option(help="Devices that share a node.")] = 8,
    memory_gib: Annotated[
        float, typer.Option(help="Memory of each device that plans may use (presets: 28).")
    ] = 0.0,
    batches: Annotated[int, typer.Option(help="Batches to play at each size.")] = 4,
    sequences_per_device: Annotated[float, typer.Option(help="Sets the batch size.")] = 8.0,
    context_tokens: Annotated[
        int, typer.Option(help="Longest document of the run: longer ones are dropped.")
    ] = 0,
    noise: Annotated[
        float, typer.Option(help="How far group times are off their prediction: 0.1 for 10%.")
    ] = 0.0,
    time_limit_ms: Annotated[float, typer.Option(help="Work allowed for each plan.")] = 200.0,
    plot: Annotated[str, typer.Option(help="Draw rates and speed-ups to this file.")] = "",
    workers: Annotated[
        int, typer.Option(help="Processes that share the batches (default: one a core).", min=0)
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Play a length file or histogram through the planner and baselines on modelled clusters."""
    from seqpar.commands.plan import load_cost, make_cluster
    from seqpar.planners import Planner
    from seqpar.planners.histogram import LengthHistogram
    from seqpar.planners.lengths import read_lengths
    from seqpar.planners.simulate import batches_of, simulate
    from seqpar.planners.workers import Workers

    if bool(lengths) == bool(histogram):
        raise PlanError("give a file of lengths, or --histogram FILE: one of the two")
    if plot:
        from seqpar.planners.plot import check_plot_path

        check_plot_path(plot)
    try:
        sizes = [int(part) for part in devices.split(",") if part.strip()]
    except ValueError:
        raise PlanError(f"--devices takes integers, as 64,256; got {devices!r}") from None
    source = LengthHistogram.load(histogram) if histogram else read_lengths(lengths or "")
    model = load_cost(cost)
    cluster = make_cluster(max([1, *sizes]), devices_per_node, memory_gib, "", cost)
    with closing(Workers(workers or None)) as crew:
        result = simulate(
            batches_of(source, batches=batches),
            cluster,
            model,
            devices=sizes,
            sequences_per_device=sequences_per_device,
            context_tokens=context_tokens or None,
            noise=noise,
            planner=Planner(time_limit_ms=time_limit_ms),
            workers=crew,
        )
    if plot:
        from seqpar.planners.plot import plot_simulation

        plot_simulation(result, plot)
    if as_json:
        typer.echo(json.dumps(result.to_json()))
    else:
        _print(result)


SHORT = {"fixed_degree": "fixed", "best_degree_per_batch": "best", "megatron_dynamic": "rule"}


def _has(result: Simulation, name: str) -> bool:
    return any(name in row.forecast.speedup for row in result.rows)


def _print(result: Simulation) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from seqpar.planners.baselines import LABELS

    names = {name: short for name, short in SHORT.items() if _has(result, name)}
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        title="simulated steps: means over batches, and how many times as fast as\n"
        + ", ".join(f"{LABELS[name]} ({short})" for name, short in names.items()),
    )
    headings = ["devices", "step ms", "tokens/s", "idle", "gap", "plan ms"]
    headings += ["noisy"] if result.noise else []
    for heading in (*headings, *names.values()):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in result.rows:
        expected = row.forecast
        cells = [
            str(row.devices),
            f"{expected.step_ms.mean:.0f}",
            f"{expected.tokens_per_second.mean:,.0f}",
            f"{expected.idle_share.mean:.1%}",
            f"{row.gap.mean:.1%}",
            f"{row.solve_ms.mean:.0f}",
        ]
        if row.noisy_step_ms:
            cells.append(f"{row.noisy_step_ms.mean:.0f}")
        for name in names:
            found = expected.speedup.get(name)
            cells.append(f"{found.mean:.2f}" if found else "-")
        table.add_row(*cells)
    Console().print(table)
