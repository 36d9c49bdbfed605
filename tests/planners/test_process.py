"""Plans from other processes are the same plans, and cost this process no time."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from seqpar.errors import InfeasiblePlanError, PlanError
from seqpar.planners import Planner, ScatterProblem
from seqpar.planners.certificate import bound_plan
from seqpar.planners.problem import Cluster
from seqpar.planners.process import PlannerProcess
from seqpar.planners.worker import Worker
from seqpar.planners.workers import Workers
from tests.planners.test_clock import many_micro_batches
from tests.planners.test_plan import SMALL, flexsp_problem


def long_problem_of(cost: object) -> ScatterProblem:
    return ScatterProblem((90_000,), Cluster(devices=4, memory_bytes=16384.0), SMALL)


def test_the_other_process_gives_the_same_plan_and_its_time_is_not_ours() -> None:
    problem = flexsp_problem(1)
    planner = Planner(time_limit_ms=60, repeatable=True)
    with closing(PlannerProcess(planner)) as planning:
        assert planning.plan(problem) == planner.plan(problem)
        before = time.process_time()
        plans = [planning.plan(problem) for _ in range(5)]
        ours_ms = (time.process_time() - before) * 1e3
    solve_ms = sum(plan.solve_ms + plan.bound_ms for plan in plans)
    assert ours_ms < 0.1 * solve_ms, f"{ours_ms:.1f} ms here for {solve_ms:.0f} ms of planning"


def test_errors_come_back_and_a_process_that_died_is_named() -> None:
    worker = Worker()
    with pytest.raises(InfeasiblePlanError, match="90000 tokens") as caught:
        worker.call(long_problem_of, SMALL)
    assert caught.value.needed_tokens == 90_000
    pid = worker.call(os.getpid)
    assert pid != os.getpid()
    killer = threading.Timer(0.3, os.kill, (pid, signal.SIGKILL))
    killer.start()
    with pytest.raises(PlanError, match=r"exit code -9"):
        worker.call(time.sleep, 30)
    assert worker.call(os.getpid) != pid, "the next call starts another"
    last = worker.call(os.getpid)
    worker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(last, 0)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt: shells start what they put in the background without it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_call_leaves_no_answer_behind() -> None:
    worker = Worker()
    worker.call(os.getpid)
    here = threading.main_thread().ident
    threading.Timer(0.3, signal.pthread_kill, (here, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        worker.call(time.sleep, 30)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        worker.call(lambda: None)
    assert worker.call(len, "abc") == 3
    worker.close()


def test_the_process_ends_with_its_owner() -> None:
    code = (
        "import os, time\n"
        "from seqpar.planners.worker import Worker\n"
        "worker = Worker()\n"
        "print(worker.call(os.getpid), flush=True)\n"
        "os._exit(1)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid = int(found.stdout)
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} outlived its owner")


def test_the_planning_process_imports_no_torch() -> None:
    worker = Worker()
    worker.call(Planner(time_limit_ms=5).plan, flexsp_problem(1, count=20))
    assert not worker.call(eval, "'torch' in __import__('sys').modules")
    worker.close()


def test_workers_change_no_plan_and_no_bound() -> None:
    problem = many_micro_batches(3000, devices=16)
    with closing(Workers(2)) as workers:
        serial = Planner(time_limit_ms=100, repeatable=True).plan(problem)
        shared = Planner(time_limit_ms=100, repeatable=True, workers=workers).plan(problem)
        assert shared == serial
        small = flexsp_problem(1, count=60)
        plan = Planner(time_limit_ms=20, repeatable=True).plan(small)
        bounded = bound_plan(small, plan, kind="configuration", workers=workers)
        assert bounded == bound_plan(small, plan, kind="configuration")
        assert workers.map(len, ["a", "bc", ""]) == [1, 2, 0]
    with pytest.raises(PlanError, match="at least 1"):
        Workers(0)
