"""`seqpar plan LENGTHS`: the scatter plan of one step, with its bounds and baselines."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from seqpar.planners import Cluster, CostModel, ScatterPlan, ScatterProblem


def command(
    lengths: Annotated[
        str, typer.Argument(help="Sequence lengths: one a line, a JSON list, or .npy.")
    ],
    devices: Annotated[int, typer.Option(help="Devices of the cluster.")],
    cost: Annotated[
        str, typer.Option(help="flexsp-7b, flexsp-13b, flexsp-30b, or a cost file (JSON).")
    ],
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
        int, typer.Option(help="Longest document of the run; the fixed degree must hold it.")
    ] = 0,
    time_limit_ms: Annotated[float, typer.Option(help="Work allowed for planning.")] = 200.0,
    bound: Annotated[
        str, typer.Option(help="degree (milliseconds) or configuration (column generation).")
    ] = "degree",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Plan one step: micro-batches, and in each the groups of devices that its sequences take."""
    from seqpar.planners import Planner, ScatterProblem
    from seqpar.planners.lengths import read_lengths

    sizes = read_lengths(lengths)
    model = load_cost(cost)
    problem = ScatterProblem(
        sizes,
        make_cluster(devices, devices_per_node, memory_gib, degrees, cost),
        model,
        context_tokens or None,
    )
    plan = Planner(time_limit_ms=time_limit_ms, bound=bound).plan(problem)
    if as_json:
        typer.echo(json.dumps(plan.to_json()))
    else:
        print_plan(plan, problem)


def load_cost(name: str) -> CostModel:
    """A preset by name, or a JSON cost file."""
    from seqpar.planners import CostModel
    from seqpar.planners.presets import preset, preset_names

    return preset(name) if name in preset_names() else CostModel.load(name)


def make_cluster(
    devices: int, devices_per_node: int, memory_gib: float, degrees: str, cost: str
) -> Cluster:
    """The cluster that the options describe.

    Raises:
        PlanError: degrees that are not integers, or no memory given with a cost file.
    """
    from seqpar.errors import PlanError
    from seqpar.planners import Cluster
    from seqpar.planners.presets import MEMORY_GIB, preset_names

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
        devices_per_node=devices_per_node or min(8, max(1, devices)),
        memory_bytes=(memory_gib or MEMORY_GIB) * 1024**3,
        degrees=allowed,
    )


def print_plan(plan: ScatterPlan, problem: ScatterProblem) -> None:
    """A table of the micro-batches, then the bounds and the baselines."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{len(problem.lengths)} sequences on {problem.cluster.devices} devices")
    for heading in ("micro-batch", "ms", "gap", "groups", "tokens", "fullest device"):
        table.add_column(heading, justify="right" if heading != "groups" else "left")
    for index, batch in enumerate(plan.micro_batches):
        degrees = sorted((group.degree for group in batch.groups), reverse=True)
        mix = " ".join(f"{d}×{degrees.count(d)}" for d in dict.fromkeys(degrees))
        fullest = max(g.tokens / g.degree for g in batch.groups) / problem.tokens_per_device
        table.add_row(
            str(index),
            f"{batch.makespan_ms:.1f}",
            f"{batch.gap:.2%}",
            mix,
            str(sum(group.tokens for group in batch.groups)),
            f"{fullest:.0%}",
        )
    console.print(table)
    console.print(
        f"step {plan.makespan_ms:.1f} ms, planned in {plan.solve_ms:.1f} ms ({plan.source}). "
        f"No plan with these micro-batches takes less than {plan.lower_bound_ms:.1f} ms "
        f"({plan.bound} bound, gap {plan.gap:.2%}); no plan at all less than "
        f"{plan.step_lower_bound_ms:.1f} ms."
    )
    for name, ms in sorted(plan.baselines.items(), key=lambda entry: entry[1]):
        console.print(f"  {name}: {ms:.1f} ms, {ms / plan.makespan_ms:.2f} times the plan")
