"""What a training run shows on rank 0's terminal: plan, progress, results.

On a terminal the progress is one live line; in a log it is one line a step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from seqpar.data import PlannedStep
from seqpar.planners import ScatterPlan
from seqpar.training import StepResult

__all__ = ["TrainingConsole", "degree_mix"]


def degree_mix(plan: ScatterPlan) -> str:
    """How many groups of each degree the plan has, for example "12 x 1, 1 x 4"."""
    counts = Counter(g.degree for m in plan.micro_batches for g in m.groups)
    return ", ".join(f"{counts[degree]} x {degree}" for degree in sorted(counts))


class TrainingConsole:
    """Rank 0's screen; on the other ranks everything is silent.

    Use it as a context manager around the training loop.
    """

    def __init__(self, *, total_steps: int, visible: bool) -> None:
        self.console = Console(quiet=not visible, soft_wrap=True, highlight=False)
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=self.console,
            disable=not (visible and self.console.is_terminal),
        )
        self._task = self._progress.add_task("", total=total_steps)

    def __enter__(self) -> TrainingConsole:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        self.console.print(text)

    def show_plan(self, planned: PlannedStep, lengths: Sequence[int]) -> None:
        """The plan of one step as a table: a row for each group."""
        plan = planned.plan
        table = Table(title=f"plan of step {planned.step}: {len(planned.documents)} documents")
        for heading in ("micro-batch", "ranks", "degree", "documents", "tokens", "longest"):
            table.add_column(heading, justify="right")
        table.add_column("predicted", justify="right")
        for index, micro_batch in enumerate(plan.micro_batches):
            for group in micro_batch.groups:
                held = [lengths[sequence] for sequence in group.sequences]
                ranks = ",".join(map(str, group.ranks))
                table.add_row(
                    str(index),
                    ranks,
                    str(group.degree),
                    str(len(held)),
                    f"{sum(held):,}",
                    f"{max(held):,}",
                    f"{group.predicted_ms:,.0f} ms",
                )
        self.console.print(table)
        self.say(
            f"predicted {plan.makespan_ms:,.0f} ms; no plan with these micro-batches is under "
            f"{plan.lower_bound_ms:,.0f} ms (gap at most {plan.gap:.1%})"
        )

    def show_step(self, planned: PlannedStep, result: StepResult) -> None:
        """Loss, tokens per second and the plan's mix of degrees."""
        speed = result.num_tokens / result.step_ms * 1e3
        text = (
            f"loss {result.loss:.3f}  {speed:,.0f} tokens/s  degrees {degree_mix(planned.plan)}  "
            f"{result.step_ms:,.0f} ms (predicted {planned.plan.makespan_ms:,.0f})"
        )
        self._progress.update(self._task, completed=planned.step + 1, description=text)
        if not self.console.is_terminal:
            self.say(f"step {planned.step:3d}  {text}")
