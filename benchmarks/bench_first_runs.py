"""What the first run of new document lengths costs a training step, and where it goes.

    python benchmarks/bench_first_runs.py --cost hybrid_plan.json --out first.json   # two GPUs
    python benchmarks/bench_first_runs.py --tiny --out /tmp/first.json               # CPU ranks

Every batch of a long-tailed set brings lengths that no batch before had. After a warm-up (the
shapes that calibration measures), each of a few batches runs at degree 1 and at degree 2, twice
each: what the first run has that the second has not is its cost. By rank: kernels compiled and
their time, operators that took longer on the host, the allocator's calls to the driver.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from first_run_watch import Watch, difference
from hybrid_job import HybridJob, long_tailed, run_on_ranks

from seqpar import comm
from seqpar.calibration import every_rank_busy, measured_shapes
from seqpar.data import DocumentSampler
from seqpar.errors import PlanError
from seqpar.planners import Cluster, CostModel, ScatterPlan, ScatterProblem, preset
from seqpar.planners.baselines import fixed_degree
from seqpar.report import hardware, versions


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("first_runs.json"))
    parser.add_argument("--cost", type=Path, help="results of bench_hybrid_plan.py, for its costs")
    parser.add_argument("--tiny", action="store_true", help="a small model, on CPU ranks too")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64_000, help="of a step")
    parser.add_argument("--seconds", type=float, default=60.0, help="begin nothing after that")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


class FirstRuns:
    """One rank's part: shapes, one after the other, each run twice and told of."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.job = HybridJob(tiny=options.tiny)
        self.watch = Watch(cuda=self.job.cuda)
        self.rows: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        self.warm_up()
        self.new_lengths()
        return {
            "hardware": hardware(),
            "versions": versions(),
            "command": " ".join(["benchmarks/bench_first_runs.py", *sys.argv[1:]]),
            "parameters": self.job.parameters,
            "rows": self.rows,
            "summary": summary(self.rows),
            "seconds": self.job.seconds,
        }

    def warm_up(self) -> None:
        """What calibration measures, in its order."""
        generator = torch.Generator().manual_seed(0)
        for degree in (1, 2):
            longest = 2048 if self.options.tiny else 24_576
            for lengths in ((64 * degree,), *measured_shapes(degree, longest)):
                copies = self.job.ranks // degree
                documents = [
                    torch.randint(self.job.config.vocab_size, (n,), generator=generator)
                    for n in lengths * copies
                ]
                plan = every_rank_busy(self.job.ranks, degree, len(lengths))
                self.compare(f"warm-up, degree {degree}", plan, documents)

    def new_lengths(self) -> None:
        tokens = 8_000 if self.options.tiny else self.options.tokens
        documents = long_tailed(
            self.job.config,
            median=60 if self.options.tiny else 1500,
            context_tokens=tokens // 3,
            seed=self.options.seed,
        )
        lengths = [len(document) for document in documents]
        sampler = DocumentSampler(lengths, budget_tokens=tokens, seed=self.options.seed)
        cluster = Cluster(devices=self.job.ranks, memory_bytes=self.job.memory_bytes())
        cost = self.cost()
        for step in range(self.options.steps):
            drawn = [documents[i] for i in sampler.draw()]
            problem = ScatterProblem(tuple(map(len, drawn)), cluster, cost)
            for degree in (1, 2) if step % 2 == 0 else (2, 1):
                try:
                    plan = fixed_degree(problem, degree)
                except PlanError:  # the longest document does not fit
                    continue
                self.compare(f"step {step}, degree {degree}", plan, drawn)

    def cost(self) -> CostModel:
        if self.options.cost is None:
            return replace(
                preset("flexsp-7b"),
                memory_bytes_per_token=1.0,
                memory_fixed_bytes=0.0,
                memory_sharded_bytes=0.0,
            )
        return CostModel.from_json(json.loads(self.options.cost.read_text())["cost"])

    def compare(self, name: str, plan: ScatterPlan, documents: list[torch.Tensor]) -> None:
        if self.job.is_past(self.options.seconds):
            return
        first = self.watch(lambda: self.once(plan, documents), profiled=name.startswith("step 0"))
        found = difference(first, self.watch(lambda: self.once(plan, documents)))
        row = {
            "name": name,
            "degrees": [[g.degree for g in m.groups] for m in plan.micro_batches],
            "documents": len(documents),
            "tokens": sum(map(len, documents)),
            "ranks": self.of_all_ranks(found),
        }
        self.rows.append(row)
        self.job.say(_line(row))

    def once(self, plan: ScatterPlan, documents: list[torch.Tensor]) -> float:
        self.job.optimizer.zero_grad(set_to_none=True)
        return self.job.executor.forward_backward(plan, documents).step_ms

    def of_all_ranks(self, found: dict[str, Any]) -> list[dict[str, Any]]:
        sources = range(self.job.ranks)
        return [comm.broadcast_object(found, self.job.world, source=rank) for rank in sources]


def _line(row: dict[str, Any]) -> str:
    found = max(row["ranks"], key=lambda rank: rank["compile_ms"])
    more = found["host_ms_more"] | found["operator_ms"]
    longer = ", ".join(f"{name} {ms:.0f}" for name, ms in more.items())
    return (
        f"{row['name']}, {row['documents']} documents of {row['tokens']:,} tokens, "
        f"{row['degrees']}: {found['first_ms']:.0f} ms, then {found['second_ms']:.0f}; compiled "
        f"{found['compiled']} in {found['compile_ms']:.0f} ms (then {found['second_compiled']}); "
        f"longer on the host, ms: {longer}; {found['allocator']}"
    )


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the warm-up and of the steps: what first runs took beyond the second, and of what."""
    found = {}
    for part in ("warm-up", "step"):
        slowest = [
            max(row["ranks"], key=lambda rank: rank["compile_ms"])
            for row in rows
            if row["name"].startswith(part)
        ]
        found[part] = {
            "runs": len(slowest),
            "first_beyond_second_ms": sum(x["first_ms"] - x["second_ms"] for x in slowest),
            "second_ms": sum(x["second_ms"] for x in slowest),
            "compilations": sum(sum(x["compiled"].values()) for x in slowest),
            "compile_ms": sum(x["compile_ms"] for x in slowest),
        }
    return found


def main() -> None:
    options = parse_arguments()
    run_on_ranks(Path(__file__), options.out, lambda: FirstRuns(options))


if __name__ == "__main__":
    main()
