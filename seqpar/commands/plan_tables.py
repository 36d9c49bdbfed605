"""What `seqpar plan` prints for people: a plan's micro-batches, a histogram's forecast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seqpar.planners import ScatterPlan, ScatterProblem
    from seqpar.planners.forecast import Forecast
    from seqpar.planners.milp import ExactResult


def print_plan(plan: ScatterPlan, problem: ScatterProblem) -> None:
    """A table of the micro-batches, then the bounds and the baselines."""
    from rich.console import Console
    from rich.table import Table

    from seqpar.planners.baselines import LABELS

    console = Console()
    table = Table(title=f"{len(problem.lengths)} sequences on {problem.cluster.devices} devices")
    headings = ["micro-batch", "ms", "gap", "groups", "sequences", "tokens", "memory"]
    strategies = sorted({g.strategy for b in plan.micro_batches for g in b.groups} - {"local"})
    headings += ["strategies"] if len(strategies) > 1 else []
    for heading in headings:
        wide = heading in ("groups", "strategies")
        table.add_column(heading, justify="left" if wide else "right", no_wrap=not wide)
    for index, batch in enumerate(plan.micro_batches):
        degrees = sorted((group.degree for group in batch.groups), reverse=True)
        fullest = max(g.tokens / g.degree for g in batch.groups) / problem.tokens_per_device
        used = {g.strategy for g in batch.groups} & set(strategies)
        cells = [
            str(index),
            f"{batch.makespan_ms:.1f}",
            f"{batch.gap:.2%}" if plan.bound != "none" else "-",
            " ".join(f"{d}×{degrees.count(d)}" for d in dict.fromkeys(degrees)),
            str(sum(len(group.sequences) for group in batch.groups)),
            f"{sum(group.tokens for group in batch.groups):,}",
            f"{fullest:.0%}",
        ]
        table.add_row(*cells, *([", ".join(sorted(used))] if len(strategies) > 1 else []))
    console.print(table)
    console.print(
        f"step {plan.makespan_ms:.1f} ms, planned in {plan.solve_ms:.1f} ms "
        f"({plan.source}{', cut short by the clock' if plan.cut_short else ''})."
    )
    if plan.bound != "none":
        console.print(
            f"No plan with these micro-batches takes less than {plan.lower_bound_ms:.1f} ms "
            f"({plan.bound} bound, gap {plan.gap:.2%}); no plan at all less than "
            f"{plan.step_lower_bound_ms:.1f} ms."
        )
    for name, ms in sorted(plan.baselines.items(), key=lambda entry: entry[1]):
        console.print(f"  {LABELS[name]}: {ms:.1f} ms, {ms / plan.makespan_ms:.2f} times the plan")


def print_exact(checks: Sequence[ExactResult], solver: str) -> None:
    """What the exact programme found for each micro-batch, and how far it is from its bound."""
    from rich.console import Console

    console = Console()
    for check in checks:
        found = "nothing" if check.packing is None else f"{check.makespan_ms:.1f} ms"
        gap = "none told" if check.gap is None else f"{check.gap:.2%}"
        lengths = "exact lengths" if check.exact_lengths else "lengths rounded up"
        console.print(
            f"  {solver}, {check.sequences} sequences: {found} in {check.solve_ms / 1e3:.1f} s, "
            f"its own gap {gap} ({lengths})"
        )


def print_forecast(expected: Forecast, devices: int, needed: int | None) -> None:
    """What to expect, each figure with its 95% interval."""
    from rich.console import Console
    from rich.table import Table

    from seqpar.planners.baselines import LABELS

    rows = {
        "step, ms": (expected.step_ms, ".0f"),
        "tokens a second": (expected.tokens_per_second, ",.0f"),
        "micro-batches": (expected.micro_batches, ".1f"),
        "memory headroom": (expected.memory_headroom, ".1%"),
        "idle device time": (expected.idle_share, ".1%"),
        **{f"over {LABELS[name]}": (found, ".2f") for name, found in expected.speedup.items()},
    }
    table = Table(
        title=f"{devices} devices, {expected.batches} sampled batches of {expected.sequences}"
    )
    for heading in ("", "mean", "± (95%)"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, (estimate, form) in rows.items():
        table.add_row(name, format(estimate.mean, form), format(estimate.plus_minus, form))
    console = Console()
    console.print(table)
    shares = ", ".join(f"{d}: {share:.0%}" for d, share in expected.degree_share.items())
    console.print(f"busy device time by degree: {shares}")
    console.print(f"longest document that fits: {expected.longest_tokens:,} tokens")
    if expected.left_out_share:
        console.print(f"documents left out as too long: {100 * expected.left_out_share:.2g}%")
    if needed is not None:
        console.print(f"devices needed for the target: {needed}")
