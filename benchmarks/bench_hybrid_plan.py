"""Planned steps of a hybrid model of 1.0 billion parameters, measured: against their prediction
and against one degree for every document.

    python benchmarks/bench_hybrid_plan.py --out hybrid_plan.json            # two GPUs
    python benchmarks/bench_hybrid_plan.py --tiny --out /tmp/hybrid.json     # the same on CPU

On two ranks: seqpar calibrates the model (compute, exchange, memory), draws steps from a
long-tailed set of documents whose longest fit no single device, and plans them in a process of
its own while the step before runs. Every step's batch is run by its plan and by each fixed degree
that can hold it, in turns.

What is said of every step: predicted and measured ms, the groups' own error, what the step waited
for its plan, and the memory left. Results are JSON; the table is printed.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from hybrid_job import HybridJob, long_tailed, run_on_ranks
from hybrid_rows import compared, described, summary

from seqpar import comm
from seqpar.calibration import Calibration, calibrate_model
from seqpar.data import DocumentSampler, PlannedStep, PlannedSteps
from seqpar.errors import PlanError
from seqpar.feedback import CostFeedback
from seqpar.planners import Cluster, CostModel, Planner, ScatterPlan, ScatterProblem
from seqpar.planners.baselines import fixed_degree
from seqpar.planners.process import PlannerProcess
from seqpar.report import hardware, versions


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("hybrid_plan.json"))
    parser.add_argument("--tiny", action="store_true", help="a small model, on CPU ranks too")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=55.0, help="begin no step after that")
    parser.add_argument("--layout", choices=["balanced", "zigzag"], default="balanced")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--median", type=int, help="tokens of a document (default: 1500)")
    return parser.parse_args()


class Bench:
    """One rank's part: what the model costs, and the measured steps."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.job = HybridJob(tiny=options.tiny, layout=options.layout)
        self.rows: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        calibration = self.calibrate()
        self.feedback = CostFeedback(calibration.cost)
        cluster = Cluster(devices=self.job.ranks, memory_bytes=self.job.memory_bytes())
        capacity = calibration.cost.tokens_per_device(cluster.memory_bytes, self.job.ranks)
        documents = self.documents(capacity)
        self.lengths = [len(document) for document in documents]
        budget = int(1.8 * self.job.ranks * capacity)
        if self.options.tiny:
            budget = min(budget, 24_576)
        self.job.say(
            f"{capacity:,} tokens a device; {len(documents)} documents of {min(self.lengths)} to "
            f"{max(self.lengths):,} tokens, {budget:,} tokens a step"
        )
        sampler = DocumentSampler(self.lengths, budget_tokens=budget, seed=self.options.seed)

        def problem(lengths: list[int], cost: CostModel) -> ScatterProblem:
            return ScatterProblem(tuple(lengths), cluster, cost, context_tokens=max(self.lengths))

        with closing(PlannerProcess(Planner(time_limit_ms=50))) as planning:
            steps = PlannedSteps(
                sampler,
                lambda _, lengths: planning.plan(problem(list(lengths), self.feedback.cost)),
                group=self.job.world,
            )
            for _ in range(self.options.steps):
                if self.job.is_past(self.options.seconds):
                    break
                planned = next(steps)
                tokens = [documents[i] for i in planned.documents]
                rivals = self.rivals(problem([len(d) for d in tokens], calibration.cost))
                self.measure(planned, tokens, rivals, calibration.cost)
            steps.close()
        return self.results(calibration, capacity, budget)

    def calibrate(self) -> Calibration:
        """The model's costs; what rank 0 fitted is what all keep."""
        found = calibrate_model(
            self.job.executor,
            degrees=[1, 2],
            vocab_size=self.job.config.vocab_size,
            longest_tokens=2048 if self.options.tiny else 24_576,
        )
        found = comm.broadcast_object(found, self.job.world)
        self.job.say(found.summary())
        for row, first_ms in zip(found.measurements, found.first_ms, strict=True):
            predicted = found.cost.group_ms(row.lengths, row.degree)
            self.job.say(
                f"  degree {row.degree}, {len(row.lengths)} documents of {sum(row.lengths):,} "
                f"tokens: {row.ms:.1f} ms (first {first_ms:.0f}), fitted "
                f"{predicted / row.ms - 1:+.1%}"
            )
        return found

    def documents(self, capacity: int) -> list[torch.Tensor]:
        """The longest need both devices."""
        return long_tailed(
            self.job.config,
            median=self.options.median or (60 if self.options.tiny else 1500),
            context_tokens=4096 if self.options.tiny else int(1.6 * capacity),
            seed=self.options.seed,
        )

    def rivals(self, problem: ScatterProblem) -> dict[str, ScatterPlan]:
        found = {}
        for degree in (1, 2):
            try:
                found[f"degree {degree}"] = fixed_degree(problem, degree)
            except PlanError:  # the step's longest document does not fit
                continue
        return found

    def measure(
        self,
        planned: PlannedStep,
        documents: list[torch.Tensor],
        rivals: dict[str, ScatterPlan],
        calibrated: CostModel,
    ) -> None:
        """One batch by its plan and by every rival, twice each; who goes first takes turns.

        The first run of a batch may meet new shapes, which is told apart (`first_ms`).
        """
        contenders = {"planned": planned.plan, **rivals}
        names = list(contenders)
        turn = planned.step % len(names)
        row: dict[str, Any] = {
            "step": planned.step,
            "documents": len(documents),
            "tokens": sum(map(len, documents)),
            "longest": max(map(len, documents)),
            "plan_ms": planned.plan_ms,
            "wait_ms": planned.wait_ms,
        }
        executor, optimizer = self.job.executor, self.job.optimizer
        for name in names[turn:] + names[:turn]:
            if self.job.cuda:
                torch.cuda.reset_peak_memory_stats()
            optimizer.zero_grad(set_to_none=True)
            first = executor.forward_backward(contenders[name], documents)
            optimizer.zero_grad(set_to_none=True)
            result = executor.forward_backward(contenders[name], documents)
            row[name] = compared(contenders[name], documents, result, calibrated, self.job.device)
            row[name]["first_ms"] = first.step_ms
            if name == "planned":
                start = self.job.now()
                optimizer.step()
                row["optimizer_ms"] = (self.job.now() - start) * 1e3
                self.feedback.observe(planned, result, self.lengths)
        self.rows.append(row)
        self.job.say(described(row, names))

    def results(self, calibration: Calibration, capacity: int, budget: int) -> dict[str, Any]:
        return {
            "hardware": hardware(),
            "versions": versions(),
            "command": " ".join(["benchmarks/bench_hybrid_plan.py", *sys.argv[1:]]),
            "parameters": self.job.parameters,
            "ranks": self.job.ranks,
            "layout": self.options.layout,
            "tokens_per_device": capacity,
            "budget_tokens": budget,
            "cost": calibration.cost.to_json(),
            "calibration_seconds": calibration.seconds,
            "measurements": [row._asdict() for row in calibration.measurements],
            "first_ms": calibration.first_ms,
            "corrected_cost": self.feedback.cost.to_json(),
            "rows": self.rows,
            "summary": summary(self.rows),
            "seconds": self.job.seconds,
        }


def main() -> None:
    options = parse_arguments()
    run_on_ranks(Path(__file__), options.out, lambda: Bench(options))


if __name__ == "__main__":
    main()
