"""Pictures of plans and simulations; needs matplotlib (the `plot` extra)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqpar.errors import MissingExtraError, PlanError
from seqpar.planners.baselines import LABELS

if TYPE_CHECKING:
    from seqpar.planners.plan import ScatterPlan
    from seqpar.planners.problem import ScatterProblem
    from seqpar.planners.simulate import Simulation

__all__ = ["check_plot_path", "plot_plan", "plot_simulation"]


def check_plot_path(path: str) -> None:
    """Say before anything is planned that a picture cannot be written there.

    Raises:
        MissingExtraError: matplotlib is not installed.
        PlanError: a folder, a file in a folder that does not exist, or an unknown ending.
    """
    _pyplot()
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    file = Path(path)
    ending = file.suffix.removeprefix(".").lower()
    if file.is_dir():
        raise PlanError(f"cannot write the plot to {path}: it is a folder; name a file in it")
    if not file.parent.is_dir():
        raise PlanError(f"cannot write the plot to {path}: there is no folder {file.parent}")
    if ending not in known:
        raise PlanError(
            f"cannot write the plot to {path}: its ending says the format, one of "
            + ", ".join(sorted(known))
        )


def plot_plan(plan: ScatterPlan, problem: ScatterProblem, path: str) -> None:
    """A Gantt chart: devices by time, one block a group, its degree written in it.

    Colour tells the degree; the dark frame of a micro-batch ends at its makespan; the dashed line
    is the step's lower bound. The format follows the file's ending (png, svg, pdf).

    Raises:
        MissingExtraError: matplotlib is not installed.
        PlanError: the file cannot be written.
    """
    pyplot = _pyplot()
    degrees = sorted({g.degree for batch in plan.micro_batches for g in batch.groups})
    colours = dict(zip(degrees, pyplot.get_cmap("viridis")(_spread(len(degrees))), strict=True))
    devices = problem.cluster.devices
    figure, axes = pyplot.subplots(figsize=(11, 5), layout="constrained")
    start = 0.0
    for batch in plan.micro_batches:
        axes.axvline(start + batch.makespan_ms, color="0.2", linewidth=0.8)
        for group in batch.groups:
            axes.barh(
                group.ranks[0],
                group.predicted_ms,
                left=start,
                height=group.degree,
                align="edge",
                color=colours[group.degree],
                edgecolor="white",
                linewidth=0.4,
            )
            if group.degree * 24 >= devices:
                middle = (start + group.predicted_ms / 2, group.ranks[0] + group.degree / 2)
                text = f"{group.degree}: {len(group.sequences)} seq"
                axes.annotate(text, middle, ha="center", va="center", color="white", fontsize=7)
        start += batch.makespan_ms
    if plan.step_lower_bound_ms:
        axes.axvline(plan.step_lower_bound_ms, color="tab:red", linestyle="--", linewidth=1)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colours[degree]) for degree in degrees]
    names = [f"degree {degree}" for degree in degrees]
    axes.legend(handles, names, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes.set(
        xlim=(0, start),
        ylim=(devices, 0),
        xlabel="ms",
        ylabel="device",
        title=f"{len(problem.lengths)} sequences, {plan.makespan_ms:.0f} ms; the step's lower "
        f"bound (dashed) {plan.step_lower_bound_ms:.0f} ms",
    )
    _save(pyplot, figure, path)


def plot_simulation(simulation: Simulation, path: str) -> None:
    """Tokens a second and speed-up over each baseline, by cluster size.

    Raises:
        MissingExtraError: matplotlib is not installed.
        PlanError: the file cannot be written.
    """
    pyplot = _pyplot()
    rows = simulation.rows
    sizes = [row.devices for row in rows]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    rates = [row.forecast.tokens_per_second for row in rows]
    means = [rate.mean for rate in rates]
    left.errorbar(
        sizes, means, yerr=_widths(rates), elinewidth=0.8, capsize=2, marker="o", label="planned"
    )
    for name, label in LABELS.items():
        known = [(row, row.forecast.speedup[name]) for row in rows if name in row.forecast.speedup]
        if not known:
            continue
        xs = [row.devices for row, _ in known]
        slower = [row.forecast.tokens_per_second.mean / speedup.mean for row, speedup in known]
        left.plot(xs, slower, marker=".", linestyle="--", label=label)
        speedups = [speedup for _, speedup in known]
        values = [speedup.mean for speedup in speedups]
        right.errorbar(
            xs,
            values,
            yerr=_widths(speedups),
            elinewidth=0.8,
            capsize=2,
            marker="o",
            label=f"over {label}",
        )
    left.set(xscale="log", yscale="log", xlabel="devices", ylabel="tokens a second")
    right.axhline(1.0, color="0.5", linewidth=0.8)
    right.set(xscale="log", xlabel="devices", ylabel="speed-up of the plan")
    for axes in (left, right):
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.legend()
    _save(pyplot, figure, path)


def _widths(estimates: list[Any]) -> list[float]:
    finite = float("inf")
    return [e.plus_minus if e.plus_minus < finite else 0.0 for e in estimates]


def _spread(count: int) -> list[float]:
    return [0.05 + 0.8 * i / max(1, count - 1) for i in range(count)]


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot", "drawing a plan") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(pyplot: Any, figure: Any, path: str) -> None:
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise PlanError(f"cannot write the plot to {path}: {error}") from error
    finally:
        pyplot.close(figure)
