"""`seqpar plan LENGTHS`: the scatter plan of one step, with its bounds and baselines.

`seqpar plan --histogram H.json` says what to expect of a cluster before any data is read.
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from seqpar.errors import PlanError

if TYPE_CHECKING:
    from seqpar.planners import Cluster, CostModel, Planner
    from seqpar.planners.milp import ExactResult
    from seqpar.planners.workers import Workers


def command(
    lengths: Annotated[
        str | None,
        typer.Argument(
            help="Sequence lengths: one a line, a JSON list, or .npy.", metavar="LENGTHS"
        ),
    ] = None,
    devices: Annotated[int, typer.Option(help="Devices of the cluster.")] = 0,
    cost: Annotated[
        str, typer.Option(help="flexsp-7b, flexsp-13b, flexsp-30b, or a cost file (JSON).")
    ] = "",
    devices_per_node: Annotated[
        int, typer.Option(help="Devices that share a node (default: 8, or all if fewer).")
    ] = 0,
    memory_gib: Annotated[
        float, typer.Option(help="Memory of each device that plans may use (presets: 28).")
    ] = 0.0,
    degrees: Annotated[
        str, typer.Option(help="Allowed group sizes, as 1,2,4 (default: powers of two).")
    ] = "",
    context_tokens: Annotated[
        int, typer.Option(help="Longest document of the run: the fixed degree must hold it.")
    ] = 0,
    time_limit_ms: Annotated[float, typer.Option(help="Work allowed for planning.")] = 200.0,
    bound: Annotated[
        str, typer.Option(help="degree (milliseconds) or configuration (column generation).")
    ] = "degree",
    exact: Annotated[
        bool, typer.Option("--exact", help="Polish with the mixed-integer programme, offline.")
    ] = False,
    solver: Annotated[
        str, typer.Option(help="Of --exact: HiGHS, CBC, or any PuLP knows.")
    ] = "HiGHS",
    exact_seconds: Annotated[float, typer.Option(help="Of --exact, for each micro-batch.")] = 10.0,
    plot: Annotated[str, typer.Option(help="Draw a Gantt chart to this file.")] = "",
    histogram: Annotated[
        str, typer.Option(help="Expect from a length histogram (JSON) instead of planning lengths.")
    ] = "",
    sequences: Annotated[int, typer.Option(help="Of --histogram: sequences a batch.")] = 512,
    batches: Annotated[int, typer.Option(help="Of --histogram: batches to sample.")] = 8,
    target_tokens_per_second: Annotated[
        float, typer.Option(help="Of --histogram: say how many devices reach this rate.")
    ] = 0.0,
    workers: Annotated[
        int, typer.Option(help="Processes for what divides (default: one a core).", min=0)
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Plan one step: micro-batches, and in each the groups of devices that its sequences take."""
    from seqpar.planners import Planner, ScatterProblem
    from seqpar.planners.certificate import bound_plan
    from seqpar.planners.lengths import read_lengths
    from seqpar.planners.workers import Workers

    if bool(lengths) == bool(histogram):
        raise PlanError("give a file of lengths, or --histogram FILE: one of the two")
    if histogram and (plot or exact):
        raise PlanError(
            "--plot and --exact need a file of lengths: a histogram has no one plan "
            "(seqpar simulate --histogram draws its rates)"
        )
    if plot:
        from seqpar.planners.plot import check_plot_path

        check_plot_path(plot)
    model = load_cost(cost)
    cluster = make_cluster(devices, devices_per_node, memory_gib, degrees, cost)
    planner = Planner(time_limit_ms=time_limit_ms, bound=bound)
    with closing(Workers(workers or None)) as crew:
        if histogram:
            _forecast(
                histogram,
                cluster,
                model,
                sequences=sequences,
                batches=batches,
                context_tokens=context_tokens,
                planner=replace(planner, bound="none"),
                target=target_tokens_per_second,
                workers=crew,
                as_json=as_json,
            )
            return
        assert lengths is not None
        problem = ScatterProblem(read_lengths(lengths), cluster, model, context_tokens or None)
        plan = replace(planner, bound="none").plan(problem)
        checks: list[ExactResult] = []
        if exact:
            from seqpar.planners.milp import polish

            plan, checks = polish(
                problem, plan, solver=solver, time_limit_s=exact_seconds, workers=crew
            )
        if bound != "none":
            plan = bound_plan(problem, plan, kind=bound, workers=crew)
    if plot:
        from seqpar.planners.plot import plot_plan

        plot_plan(plan, problem, plot)
    if as_json:
        programme = {"exact": [check.to_json() for check in checks]} if exact else {}
        typer.echo(json.dumps(plan.to_json() | programme))
    else:
        from seqpar.commands.plan_tables import print_exact, print_plan

        print_plan(plan, problem)
        print_exact(checks, solver)


def load_cost(name: str) -> CostModel:
    """A preset by name, or a JSON cost file.

    Raises:
        PlanError: no name, or a file that cannot be read or is no cost model.
    """
    from seqpar.planners import CostModel
    from seqpar.planners.presets import preset, preset_names

    if not name:
        raise PlanError(f"say what it costs: --cost {', '.join(preset_names())}, or a cost file")
    if name in preset_names():
        return preset(name)
    if not Path(name).exists():
        presets = ", ".join(preset_names())
        raise PlanError(f"there is no cost file {name}; the presets are {presets}")
    return CostModel.load(name)


def make_cluster(
    devices: int, devices_per_node: int, memory_gib: float, degrees: str, cost: str
) -> Cluster:
    """The cluster that the options describe.

    Raises:
        PlanError: no devices, degrees that are not integers, or no memory with a cost file.
    """
    from seqpar.planners import Cluster
    from seqpar.planners.presets import MEMORY_GIB, preset_names

    if devices < 1:
        raise PlanError(
            f"say how many devices to plan for: --devices N, at least 1 (got {devices})"
        )
    if memory_gib < 0:
        raise PlanError(f"--memory-gib must be over 0, got {memory_gib}")
    if not memory_gib and cost not in preset_names():
        raise PlanError("say how much memory a plan may use of each device: --memory-gib")
    try:
        allowed = tuple(int(part) for part in degrees.split(",") if part.strip())
    except ValueError:
        raise PlanError(f"--degrees takes integers, as 1,2,4; got {degrees!r}") from None
    return Cluster(
        devices=devices,
        devices_per_node=devices_per_node or min(8, devices),
        memory_bytes=(memory_gib or MEMORY_GIB) * 1024**3,
        degrees=allowed,
    )


def _forecast(
    path: str,
    cluster: Cluster,
    model: CostModel,
    *,
    sequences: int,
    batches: int,
    context_tokens: int,
    planner: Planner,
    target: float,
    workers: Workers,
    as_json: bool,
) -> None:
    from seqpar.planners.forecast import forecast
    from seqpar.planners.histogram import LengthHistogram
    from seqpar.planners.sizing import devices_for

    lengths = LengthHistogram.load(path)
    expected = forecast(
        lengths,
        cluster,
        model,
        sequences=sequences,
        batches=batches,
        context_tokens=context_tokens or None,
        planner=planner,
        workers=workers,
    )
    needed = None
    if target or context_tokens:
        needed, _ = devices_for(
            lengths,
            cluster,
            model,
            tokens_per_second=target,
            document_tokens=context_tokens,
            sequences=sequences,
            planner=planner,
            workers=workers,
        )
    if as_json:
        typer.echo(json.dumps(expected.to_json() | {"devices_needed": needed}))
    else:
        from seqpar.commands.plan_tables import print_forecast

        print_forecast(expected, cluster.devices, needed)
