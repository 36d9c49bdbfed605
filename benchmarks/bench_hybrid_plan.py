"""Planned steps of a hybrid model of 1.0 billion parameters, measured: against their prediction
and against one degree for every document.

    python benchmarks/bench_hybrid_plan.py --out hybrid_plan.json            # two GPUs
    python benchmarks/bench_hybrid_plan.py --tiny --out /tmp/hybrid.json     # the same on CPU

On two ranks: seqpar calibrates the model (compute, exchange, memory), draws steps from a
long-tailed set of documents whose longest fit no single device, and plans them in a process of
its own while the step before runs. Every step's batch is run by its plan and by each fixed degree
that can hold it, in turns. Then `seqpar calibrate` measures this machine on one rank and on two.

What is said of every step: predicted and measured ms, the groups' own error, what the step waited
for its plan, and the memory left. Results are JSON; the table is printed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from seqpar import comm, init_mesh
from seqpar.calibration import Calibration, calibrate_model
from seqpar.data import DocumentSampler, PlannedStep, PlannedSteps, limit_documents
from seqpar.errors import PlanError
from seqpar.feedback import CostFeedback
from seqpar.mesh import GroupPool
from seqpar.models import Decoder, DecoderConfig, hybrid
from seqpar.planners import Cluster, CostModel, Planner, ScatterPlan, ScatterProblem
from seqpar.planners.baselines import fixed_degree
from seqpar.planners.process import PlannerProcess
from seqpar.report import hardware, versions
from seqpar.training import PlanExecutor, StepResult

MEMORY_SHARE = 0.8
"""Of a device's memory that plans may use: layouts balance tokens to 3%, and an allocator that
fragments gives everything back before it fails, which takes seconds."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("hybrid_plan.json"))
    parser.add_argument("--tiny", action="store_true", help="a small model, on CPU ranks too")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=55.0, help="begin no step after that")
    parser.add_argument("--layout", choices=["balanced", "zigzag"], default="balanced")
    parser.add_argument("--seed", type=int, default=0)
    parts = ("steps", "machine")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    return parser.parse_args()


def model_config(*, tiny: bool) -> DecoderConfig:
    """Eighteen layers of width 2,048, every fourth softmax: 1.0 billion parameters."""
    return hybrid(
        vocab_size=256 if tiny else 16_384,
        dim=64 if tiny else 2048,
        num_layers=4 if tiny else 18,
        num_heads=4 if tiny else 16,
        hidden=96 if tiny else 5504,
        softmax_every=4,
        softmax_heads=4 if tiny else 16,
        softmax_kv_heads=2 if tiny else 4,
        softmax_head_dim=16 if tiny else 128,
        softmax_strategy="ring",
    )


class Bench:
    """One rank's part: the model, what it costs, and the measured steps."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.began = time.perf_counter()
        self.options = options
        init_mesh(sp=int(os.environ["WORLD_SIZE"]))
        self.world = dist.group.WORLD
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.cuda = "nccl" in dist.get_backend()
        self.device = torch.device("cuda", torch.cuda.current_device()) if self.cuda else None
        self.device = self.device or torch.device("cpu")
        self.config = model_config(tiny=options.tiny)
        torch.manual_seed(0)
        with self.device:
            model = Decoder(self.config)
        self.executor = PlanExecutor(
            model,
            GroupPool(),
            world=self.world,
            device=self.device,
            layout=options.layout,
            autocast=torch.bfloat16 if self.cuda else None,
        )
        self.optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=self.cuda)
        self.rows: list[dict[str, Any]] = []
        self.say(f"{self.parameters / 1e9:.2f} billion parameters on {self.ranks} ranks")

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.executor.model.parameters())

    def run(self) -> dict[str, Any]:
        calibration = self.calibrate()
        self.feedback = CostFeedback(calibration.cost)
        cluster = Cluster(devices=self.ranks, memory_bytes=self.memory_bytes())
        capacity = calibration.cost.tokens_per_device(cluster.memory_bytes, self.ranks)
        documents = self.documents(capacity)
        self.lengths = [len(document) for document in documents]
        budget = int(1.8 * self.ranks * capacity)
        if self.options.tiny:
            budget = min(budget, 24_576)
        self.say(
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
                group=self.world,
            )
            for _ in range(self.options.steps):
                if self.is_late():
                    break
                planned = next(steps)
                tokens = [documents[i] for i in planned.documents]
                rivals = self.rivals(problem([len(d) for d in tokens], calibration.cost))
                self.measure(planned, tokens, rivals, calibration.cost)
            steps.close()
        return self.results(calibration, capacity, budget)

    def calibrate(self) -> Calibration:
        """The model's costs; what rank 0 fitted is what all keep."""
        self.executor.forward_backward(_alone(self.ranks), [torch.arange(64)] * self.ranks)
        self.optimizer.step()  # makes Adam's moments: memory that is not for activations
        self.optimizer.zero_grad(set_to_none=True)
        found = calibrate_model(
            self.executor,
            degrees=[1, 2],
            vocab_size=self.config.vocab_size,
            longest_tokens=2048 if self.options.tiny else 24_576,
        )
        found = comm.broadcast_object(found, self.world)
        self.say(found.summary())
        for row, first_ms in zip(found.measurements, found.first_ms, strict=True):
            predicted = found.cost.group_ms(row.lengths, row.degree)
            self.say(
                f"  degree {row.degree}, {len(row.lengths)} documents of {sum(row.lengths):,} "
                f"tokens: {row.ms:.1f} ms (first {first_ms:.0f}), fitted "
                f"{predicted / row.ms - 1:+.1%}"
            )
        return found

    def memory_bytes(self) -> float:
        """What activations and gradients may take of every device."""
        if not self.cuda:
            return 2.0**28
        total = torch.cuda.get_device_properties(self.device).total_memory
        free = MEMORY_SHARE * total - torch.cuda.memory_allocated()
        of_ranks = comm.all_gather(torch.tensor(free, device=self.device), self.world)
        return of_ranks.min().item()

    def documents(self, capacity: int) -> list[torch.Tensor]:
        """Lognormal lengths, one in a hundred fifty times as long; split where no group holds them.

        The longest need both devices.
        """
        rng = np.random.default_rng(self.options.seed)
        median = 60 if self.options.tiny else 1500
        lengths = rng.lognormal(math.log(median), 1.3, 600)
        lengths[::100] *= 50
        whole = [
            torch.from_numpy(rng.integers(self.config.vocab_size, size=max(2, int(n))))
            for n in lengths
        ]
        context = 4096 if self.options.tiny else int(1.6 * capacity)
        return limit_documents(whole, context_tokens=context, over_limit="split")

    def rivals(self, problem: ScatterProblem) -> dict[str, ScatterPlan]:
        found = {}
        for degree in (1, 2):
            try:
                found[f"degree {degree}"] = fixed_degree(problem, degree)
            except PlanError:  # the step's longest document does not fit
                continue
        return found

    def is_late(self) -> bool:
        late = time.perf_counter() - self.began > self.options.seconds
        return bool(comm.broadcast_object(late, self.world))

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
        for name in names[turn:] + names[:turn]:
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
            self.optimizer.zero_grad(set_to_none=True)
            first = self.executor.forward_backward(contenders[name], documents)
            self.optimizer.zero_grad(set_to_none=True)
            result = self.executor.forward_backward(contenders[name], documents)
            row[name] = self.compared(contenders[name], documents, result, calibrated)
            row[name]["first_ms"] = first.step_ms
            if name == "planned":
                start = self.now()
                self.optimizer.step()
                row["optimizer_ms"] = (self.now() - start) * 1e3
                self.feedback.observe(planned, result, self.lengths)
        self.rows.append(row)
        self.show(row, names)

    def compared(
        self,
        plan: ScatterPlan,
        documents: list[torch.Tensor],
        result: StepResult,
        calibrated: CostModel,
    ) -> dict[str, Any]:
        """What was predicted and what was measured, of the step and of its groups."""
        lengths = [len(document) for document in documents]
        by_calibration, errors = 0.0, []
        for micro_batch, times in zip(plan.micro_batches, result.group_ms, strict=True):
            expected = [
                calibrated.group_ms([lengths[i] for i in g.sequences], g.degree)
                for g in micro_batch.groups
            ]
            by_calibration += max(expected)
            errors += [e / ms - 1 for e, ms in zip(expected, times, strict=True)]
        total = torch.cuda.get_device_properties(self.device).total_memory if self.cuda else 1
        peak = torch.cuda.max_memory_allocated() if self.cuda else 0
        return {
            "measured_ms": result.step_ms,
            "groups_end_ms": max(s[1] for spans in result.group_spans_ms for s in spans),
            "predicted_ms": plan.makespan_ms,
            "calibrated_ms": by_calibration,
            "group_errors": errors,
            "degrees": [[g.degree for g in m.groups] for m in plan.micro_batches],
            "group_ms": result.group_ms,
            "loss": result.loss,
            "peak_memory_share": peak / total,
            "allocation_retries": _allocation_retries() if self.cuda else 0,
        }

    def results(self, calibration: Calibration, capacity: int, budget: int) -> dict[str, Any]:
        return {
            "hardware": hardware(),
            "versions": versions(),
            "command": " ".join(["benchmarks/bench_hybrid_plan.py", *sys.argv[1:]]),
            "parameters": self.parameters,
            "ranks": self.ranks,
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
            "seconds": time.perf_counter() - self.began,
        }

    def show(self, row: dict[str, Any], names: list[str]) -> None:
        parts = [
            f"{name}: {row[name]['measured_ms']:.0f} ms (predicted "
            f"{row[name]['predicted_ms'] / row[name]['measured_ms'] - 1:+.1%}, "
            f"{row[name]['degrees']}, first {row[name]['first_ms']:.0f} ms, memory "
            f"{row[name]['peak_memory_share']:.0%}, retries {row[name]['allocation_retries']})"
            for name in names
        ]
        self.say(
            f"step {row['step']}: {row['tokens']:,} tokens, longest {row['longest']:,}; "
            + "; ".join(parts)
            + f"; waited {row['wait_ms']:.1f} of {row['plan_ms']:.0f} ms for the plan"
        )

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(f"[{time.perf_counter() - self.began:5.1f} s] {text}", flush=True)


def _allocation_retries() -> int:
    """How often the allocator has had to give back what it kept, which takes seconds."""
    retries: int = torch.cuda.memory_stats()["num_alloc_retries"]
    return retries


def _alone(ranks: int) -> ScatterPlan:
    """One document on every rank."""
    from seqpar.planners import Group, MicroBatch

    groups = tuple(Group((rank,), 1, "local", (rank,), 1.0, 64) for rank in range(ranks))
    return ScatterPlan((MicroBatch(1.0, groups),))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Over all steps but the first; empty if there was no other."""
    counted = rows[1:]
    if not counted:
        return {}
    planned = [row["planned"] for row in counted]
    found: dict[str, Any] = {
        "steps": len(counted),
        "mean_prediction_error": _mean_error(planned, "predicted_ms"),
        "mean_calibration_error": _mean_error(planned, "calibrated_ms"),
        "worst_prediction_error": max(
            abs(p["predicted_ms"] / p["measured_ms"] - 1) for p in planned
        ),
        "planned_ms": [p["measured_ms"] for p in planned],
        "waited_ms": max(row["wait_ms"] for row in counted),
    }
    fixed = [name for name in ("degree 1", "degree 2") if all(name in row for row in counted)]
    for name in fixed:
        times = [row[name]["measured_ms"] for row in counted]
        found[f"{name}, ms"] = times
        found[f"over {name}"] = sum(times) / sum(found["planned_ms"])
    return found


def _mean_error(planned: list[dict[str, Any]], name: str) -> float:
    return statistics.fmean(abs(p[name] / p["measured_ms"] - 1) for p in planned)


def calibrate_machine(out: Path, ranks: int, *, tiny: bool) -> dict[str, Any]:
    """`seqpar calibrate` as a user runs it, with its wall-clock time."""
    start = time.perf_counter()
    words = ["calibrate", "--ranks", str(ranks), "--json", "--out", f"{out}.cost-{ranks}.json"]
    words += ["--dim", "64", "--longest-tokens", "512"] if tiny else []
    done = subprocess.run(
        [sys.executable, "-m", "seqpar.cli", *words], capture_output=True, text=True, timeout=60
    )
    wall = time.perf_counter() - start
    if done.returncode:
        return {"ranks": ranks, "wall_s": wall, "error": done.stderr[-2000:]}
    return {"ranks": ranks, "wall_s": wall, **json.loads(done.stdout)}


def launch(options: argparse.Namespace) -> None:
    """Start the ranks, then measure the machine, and write what was found after each."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "OMP_NUM_THREADS": "1"}
    if "steps" in options.parts:
        subprocess.run(
            [sys.executable, *command, *sys.argv[1:]], env=os.environ | environment, check=True
        )
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    for ranks in (1, 2) if "machine" in options.parts else ():
        found = calibrate_machine(options.out, ranks, tiny=options.tiny)
        results.setdefault("machine", []).append(found)
        print(f"seqpar calibrate --ranks {ranks}: {found['wall_s']:.1f} s", flush=True)
        print(found.get("error", ""), flush=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results.get("summary", {}), indent=1))


def main() -> None:
    options = parse_arguments()
    if "RANK" not in os.environ:
        launch(options)
        return
    bench = Bench(options)
    results = bench.run()
    if bench.rank == 0:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    bench.executor.pool.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
