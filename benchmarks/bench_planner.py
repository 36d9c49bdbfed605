"""Planner benchmark: certified gaps, speed, scale, other solvers, and FlexSP's published cells.

    python -m benchmarks.bench_planner [--only quality scale background peers cells] [--batches 3]

Prints tables and writes benchmarks/results/<hardware>/planner.json. Every figure is of this run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.busy_step import busy_step_ms
from seqpar.errors import PlanError
from seqpar.planners import Cluster, Planner, ScatterProblem, preset
from seqpar.planners.baselines import fixed_degree
from seqpar.planners.batch import SortedBatch
from seqpar.planners.cascade import pack_micro_batch
from seqpar.planners.certificate import bound_plan
from seqpar.planners.histogram import LengthHistogram
from seqpar.planners.microbatch import blaster_cuts
from seqpar.planners.milp import solve_exact
from seqpar.planners.packing import makespan
from seqpar.planners.presets import MEMORY_GIB
from seqpar.planners.process import PlannerProcess

HERE = Path(__file__).resolve().parent
CONTEXTS = {"192K": 192 * 1024, "384K": 384 * 1024}
PUBLISHED = {  # FlexSP over DeepSpeed-Ulysses, arXiv 2412.01523, main result figure
    ("flexsp-7b", "192K"): {"github": 1.45, "commoncrawl": 1.50, "wikipedia": 1.72},
    ("flexsp-13b", "192K"): {"github": 1.40, "commoncrawl": 1.35, "wikipedia": 1.59},
    ("flexsp-30b", "192K"): {"github": 1.44, "commoncrawl": 1.54, "wikipedia": 1.64},
    ("flexsp-7b", "384K"): {"github": 1.26, "commoncrawl": 1.42, "wikipedia": 1.46},
    ("flexsp-13b", "384K"): {"github": 1.29, "commoncrawl": 1.37, "wikipedia": 1.43},
    ("flexsp-30b", "384K"): {"github": 1.22, "commoncrawl": 1.33, "wikipedia": 1.53},
}


def cluster(devices: int) -> Cluster:
    return Cluster(devices=devices, devices_per_node=8, memory_bytes=MEMORY_GIB * 2**30)


def lognormal(median: float, sigma: float) -> Callable[[int, int, int], list[int]]:
    def sample(count: int, seed: int, limit: int) -> list[int]:
        rng = np.random.default_rng(seed)
        drawn = np.zeros(0, dtype=np.int64)
        while len(drawn) < count:
            more = rng.lognormal(math.log(median), sigma, 2 * count).astype(np.int64)
            drawn = np.concatenate([drawn, more[(more >= 1) & (more <= limit)]])
        return [int(length) for length in drawn[:count]]

    return sample


def distributions(histogram: Path) -> dict[str, Callable[[int, int, int], list[int]]]:
    """The two synthetic distributions, and the Wikipedia histogram if the file is there."""
    found = {"commoncrawl": lognormal(1400, 1.45), "github": lognormal(1000, 1.7)}
    if histogram.exists():
        wikipedia = LengthHistogram.load(str(histogram))
        found["wikipedia"] = lambda n, s, limit: wikipedia.sample(n, seed=s, max_tokens=limit)
    return found


def problems(
    sources: dict[str, Callable[[int, int, int], list[int]]],
    *,
    model: str,
    batches: int,
    count: int = 512,
    devices: int = 64,
) -> list[tuple[str, str, ScatterProblem]]:
    """(distribution, context, problem); what exceeds the context or the cluster is dropped."""
    cost, where = preset(model), cluster(devices)
    longest = max(line.capacity for line in ScatterProblem((1,), where, cost).degree_costs)
    made = []
    for context, tokens in CONTEXTS.items():
        for name, sample in sources.items():
            for seed in range(batches):
                lengths = tuple(sample(count, seed, min(tokens, longest)))
                made.append((name, context, ScatterProblem(lengths, where, cost)))
    return made


def quality(sources: Any, batches: int) -> dict[str, Any]:
    """Certified gaps of every micro-batch, and the time of a step and of a first plan."""
    rows, gaps, degree_gaps, solve, cpu, first = [], [], [], [], [], []
    for name, context, problem in problems(sources, model="flexsp-7b", batches=batches):
        first.append(next(Planner().plans(problem)).solve_ms)
        before = time.thread_time()
        plan = Planner(bound="none").plan(problem)
        cpu.append((time.thread_time() - before) * 1e3)
        plan = bound_plan(problem, plan)
        certified = bound_plan(problem, plan, kind="configuration")
        solve.append(plan.solve_ms)
        gaps += [batch.gap for batch in certified.micro_batches]
        degree_gaps += [batch.gap for batch in plan.micro_batches]
        rows.append(
            {
                "lengths": name,
                "context": context,
                "micro_batches": len(plan.micro_batches),
                "makespan_ms": plan.makespan_ms,
                "degree_gap": plan.gap,
                "configuration_gap": certified.gap,
                "step_gap": plan.step_gap,
                "solve_ms": plan.solve_ms,
                "degree_bound_ms": plan.bound_ms,
                "configuration_bound_ms": certified.bound_ms,
            }
        )
        show(rows[-1])
    summary = {
        "micro_batches": len(gaps),
        "mean_configuration_gap": statistics.fmean(gaps),
        "p95_configuration_gap": float(np.percentile(gaps, 95)),
        "worst_configuration_gap": max(gaps),
        "mean_degree_gap": statistics.fmean(degree_gaps),
        "median_solve_ms": statistics.median(solve),
        "worst_solve_ms": max(solve),
        "median_solve_cpu_ms": statistics.median(cpu),
        "load_average": os.getloadavg()[0],
        "median_first_plan_ms": statistics.median(first),
        "worst_first_plan_ms": max(first),
    }
    show(summary)
    return {"summary": summary, "rows": rows}


def scale(sources: Any) -> list[dict[str, Any]]:
    """1,024 devices and 8,192 sequences: when a plan is valid, and what two seconds reach."""
    rows = []
    for name, context, problem in problems(
        sources, model="flexsp-7b", batches=1, count=8192, devices=1024
    ):
        start, cpu = time.perf_counter(), time.thread_time()
        first = next(Planner(time_limit_ms=2000).plans(problem))
        first_s, first_cpu_s = time.perf_counter() - start, time.thread_time() - cpu
        cpu = time.thread_time()
        plan = Planner(time_limit_ms=2000).plan(problem)
        solve_cpu_s = time.thread_time() - cpu - plan.bound_ms / 1e3
        rows.append(
            {
                "lengths": name,
                "context": context,
                "first_plan_s": first_s,
                "first_plan_cpu_s": first_cpu_s,
                "first_plan_degree_gap": bound_plan(problem, first).gap,
                "solve_s": plan.solve_ms / 1e3,
                "solve_cpu_s": solve_cpu_s,
                "load_average": os.getloadavg()[0],
                "bound_s": plan.bound_ms / 1e3,
                "degree_gap": plan.gap,
                "step_gap": plan.step_gap,
                "over_best_degree": plan.baselines["best_degree_per_batch"] / plan.makespan_ms,
            }
        )
        show(rows[-1])
    return rows


def peers(sources: Any, *, seconds: float, cp_sat: Sequence[str] | None) -> dict[str, Any]:
    """FlexSP's programme per micro-batch of its own blaster, by solver, beside seqpar's groups.

    By distribution: rows by micro-batch, and the step's sums.
    """
    answers: dict[str, Any] = {}
    for name, context, problem in problems(sources, model="flexsp-7b", batches=1):
        if context != "192K":
            continue
        rows = []
        batch = SortedBatch.of(problem)
        fewest = -(-sum(batch.tokens) // (64 * problem.tokens_per_device))
        cuts = blaster_cuts(batch, fewest + 1)
        totals: dict[str, float] = {}
        for first, stop in pairwise(cuts):
            members = list(range(first, stop))
            found = _peer_row(batch, members, seconds, cp_sat)
            for solver, (ms, _) in found.items():
                totals[solver] = totals.get(solver, 0.0) + ms
            rows.append({"sequences": len(members)} | _flat(found))
            show(rows[-1])
        whole = Planner(repeatable=True).plan(problem)
        step = {"seqpar_joint_ms": whole.makespan_ms} | {
            solver: ms if math.isfinite(ms) else None for solver, ms in totals.items()
        }
        show({"lengths": name} | step)
        answers[name] = {"seconds": seconds, "micro_batches": rows, "step_ms": step}
    return answers


def _peer_row(
    batch: SortedBatch, members: list[int], seconds: float, cp_sat: Sequence[str] | None
) -> dict[str, tuple[float, float]]:
    """solver -> (ms of what it found, seconds it took); infinite where it found nothing."""
    start = time.perf_counter()
    packing = pack_micro_batch(batch, members)
    own = makespan(batch, packing) if packing else math.inf
    found = {"seqpar": (own, time.perf_counter() - start)}
    for solver in ("HiGHS", "CBC"):
        result = solve_exact(batch, members, solver=solver, time_limit_s=seconds)
        found[solver] = (result.makespan_ms, result.solve_ms / 1e3)
    if cp_sat:
        found["CP-SAT"] = _cp_sat(batch, members, seconds, cp_sat)
    return found


def _cp_sat(
    batch: SortedBatch, members: list[int], seconds: float, interpreter: Sequence[str]
) -> tuple[float, float]:
    """The same bucketed programme in OR-tools' CP-SAT, in a process of its own."""
    task = {
        "lengths": [batch.tokens[k] for k in members],
        "devices": batch.devices,
        "lines": [list(line) for line in batch.degree_lines],
        "seconds": seconds,
    }
    done = subprocess.run(
        [*interpreter, str(HERE / "cp_sat.py")],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        check=True,
    )
    answer = json.loads(done.stdout)
    return answer["makespan_ms"] or math.inf, answer["seconds"]


def _flat(found: dict[str, tuple[float, float]]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for solver, (ms, seconds) in found.items():
        flat[f"{solver}_ms"] = ms if math.isfinite(ms) else None
        flat[f"{solver}_s"] = seconds
    return flat


def cells(sources: Any, batches: int, models: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Modelled speed-up over degree 64 and over the best degree per batch, FlexSP's cells."""
    answers: dict[str, list[dict[str, Any]]] = {}
    for model in models:
        rows = answers.setdefault(model, [])
        grouped: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
        for name, context, problem in problems(sources, model=model, batches=batches):
            plan = Planner(bound="none", repeatable=True).plan(problem)
            all_devices = fixed_degree(problem, 64).makespan_ms
            one_degree = plan.baselines["best_degree_per_batch"]
            times = (plan.makespan_ms, all_devices, one_degree)
            grouped.setdefault((name, context), []).append(times)
        for (name, context), times in grouped.items():
            ours, all_devices, one_degree = zip(*times, strict=True)
            speedup, error = ratio_of_sums(all_devices, ours)
            rows.append(
                {
                    "model": model,
                    "context": context,
                    "lengths": name,
                    "batches": len(ours),
                    "over_degree_64": speedup,
                    "standard_error": error,
                    "published_over_deepspeed": PUBLISHED[model, context][name],
                    "over_best_degree_per_batch": ratio_of_sums(one_degree, ours)[0],
                }
            )
            show(rows[-1])
    return answers


def ratio_of_sums(upper: Sequence[float], lower: Sequence[float]) -> tuple[float, float]:
    """Σ upper / Σ lower, and its standard error over batches, by leaving out each in turn."""
    count, above, below = len(lower), math.fsum(upper), math.fsum(lower)
    without = [(above - a) / (below - b) for a, b in zip(upper, lower, strict=True)]
    spread = statistics.pvariance(without) * (count - 1)
    return above / below, math.sqrt(spread)


def background(sources: Any) -> dict[str, float]:
    """What planning next to it does to a busy step (busy_step.py): alone, with plans being made all
    the while in a thread of its process, and in a process of their own.
    """
    _, _, problem = problems(sources, model="flexsp-7b", batches=1)[0]
    planner = Planner(bound="none")
    with closing(PlannerProcess(planner)) as planning:
        ways = {
            "alone": None,
            "planning_in_a_thread": lambda: planner.plan(problem),
            "planning_in_a_process": lambda: planning.plan(problem),
        }
        found = {}
        for name, plan in ways.items():
            found[f"{name}_ms"], found[f"{name}_lock_wait_ms"] = busy_step_ms(plan)
    found["load_average"] = os.getloadavg()[0]
    show(found)
    return found


def show(row: dict[str, Any]) -> None:
    print("  ".join(f"{key}={_short(value)}" for key, value in row.items()), flush=True)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _has_ortools(interpreter: Sequence[str]) -> bool:
    code = "import ortools.sat.python.cp_model"
    return subprocess.run([*interpreter, "-c", code], capture_output=True).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = ("quality", "scale", "background", "peers", "cells")
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--cell-batches", type=int, default=48, help="of each of FlexSP's cells")
    names = ("commoncrawl", "github", "wikipedia")
    parser.add_argument("--lengths", nargs="+", choices=names, default=list(names))
    presets = ("flexsp-7b", "flexsp-13b", "flexsp-30b")
    parser.add_argument("--models", nargs="+", choices=presets, default=list(presets))
    parser.add_argument("--seconds", type=float, default=10.0, help="limit of each peer solver")
    parser.add_argument("--histogram", type=Path, default=HERE / "data" / "wikipedia.json")
    parser.add_argument("--cp-sat-python", default=sys.executable, help="has ortools")
    parser.add_argument("--hardware", default=f"cpu-{os.cpu_count()}-cores")
    options = parser.parse_args()
    sources = {
        name: sample
        for name, sample in distributions(options.histogram).items()
        if name in options.lengths
    }
    interpreter = [options.cp_sat_python]
    path = HERE / "results" / options.hardware / "planner.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results["machine"] = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    results["python"] = platform.python_version()
    for part in options.only:
        print(f"== {part}", flush=True)
        if part == "quality":
            results[part] = quality(sources, options.batches)
        elif part == "scale":
            results[part] = scale(sources)
        elif part == "background":
            results[part] = background(sources)
        elif part == "peers":
            cp_sat = interpreter if _has_ortools(interpreter) else None
            found = peers(sources, seconds=options.seconds, cp_sat=cp_sat)
            results[part] = results.get(part, {}) | found
        else:
            found = cells(sources, options.cell_batches, options.models)
            results[part] = {**results.get(part, {}), **found}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except PlanError as error:
        sys.exit(str(error))
