"""FlexSP's bucketed programme in OR-tools' CP-SAT, for comparison; reads a task on stdin.

A process of its own, because OR-tools and highspy cannot always be loaded into one.
"""

from __future__ import annotations

import json
import sys
import time

from ortools.sat.python import cp_model

from seqpar.planners.buckets import optimal_buckets

SCALE = 100  # CP-SAT counts in integers: hundredths of a millisecond


def main() -> None:
    task = json.load(sys.stdin)
    start = time.perf_counter()
    lengths, lines = task["lengths"], task["lines"]
    buckets = optimal_buckets(lengths, 16)
    model = cp_model.CpModel()
    groups = [line for line in lines for _ in range(task["devices"] // line[0])]
    end = model.new_int_var(0, 10**9, "C")
    chosen = [model.new_bool_var(f"m_{p}") for p in range(len(groups))]
    count = {}
    for p, (_, _, quadratic, linear, fixed, capacity) in enumerate(groups):
        work, tokens = [], []
        for q, (longest, inside) in enumerate(buckets):
            if longest > capacity:
                continue
            count[q, p] = model.new_int_var(0, len(inside), f"A_{q}_{p}")
            ms = quadratic * longest**2 + linear * longest
            work.append(round(ms * SCALE) * count[q, p])
            tokens.append(longest * count[q, p])
        model.add(sum(work) + round(fixed * SCALE) * chosen[p] <= end)
        model.add(sum(tokens) <= capacity * chosen[p])
    model.add(sum(g[0] * m for g, m in zip(groups, chosen, strict=True)) <= task["devices"])
    for q, (_, inside) in enumerate(buckets):
        model.add(sum(count[q, p] for p in range(len(groups)) if (q, p) in count) == len(inside))
    model.minimize(end)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = task["seconds"]
    solver.parameters.num_workers = 2
    status = solver.solve(model)
    answer = {"makespan_ms": None, "seconds": time.perf_counter() - start}
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        answer["makespan_ms"] = exact_ms(solver, count, groups, buckets, lengths)
    answer["seconds"] = time.perf_counter() - start
    json.dump(answer, sys.stdout)


def exact_ms(solver, count, groups, buckets, lengths):
    """The makespan with the sequences' own lengths, dealt to the groups as the model counts."""
    waiting = [[lengths[i] for i in inside] for _, inside in buckets]
    slowest = 0.0
    for p, (_, _, quadratic, linear, fixed, _) in enumerate(groups):
        ms, used = fixed, False
        for q in range(len(buckets)):
            amount = solver.value(count[q, p]) if (q, p) in count else 0
            for length in waiting[q][:amount]:
                ms += quadratic * length**2 + linear * length
                used = True
            waiting[q] = waiting[q][amount:]
        slowest = max(slowest, ms) if used else slowest
    return slowest


if __name__ == "__main__":
    main()
