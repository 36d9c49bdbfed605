"""Planning in processes of its own, so that its time is nobody else's.

A planner in a thread of the training process holds Python's interpreter lock for most of its time,
and the step that launches kernels meanwhile waits for it. Here the problem is sent to a process
that imports no torch and does nothing but plan; who waits for the answer holds no lock.

The processes are fresh interpreters that run this module, started without multiprocessing: that
would import the training script, and torch with it, or fork a process that has CUDA threads.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import IO, Any, TypeVar

from seqpar.errors import PlanError
from seqpar.planners.anytime import Planner
from seqpar.planners.plan import ScatterPlan
from seqpar.planners.problem import ScatterProblem

__all__ = ["PlannerProcess", "Worker"]

Result = TypeVar("Result")

CLOSE_TIMEOUT_S = 5.0


class Worker:
    """A process that runs functions for this one; it starts with the first and ends with `close`.

    It ends too when this process does. Functions, arguments and results must pickle.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._one_at_a_time = threading.Lock()

    def call(self, function: Callable[..., Result], *args: Any) -> Result:
        """`function(*args)` over there; threads that call it take turns.

        Waiting for the answer, it does not hold the interpreter lock.

        Raises:
            PlanError: the process died; and whatever the function raises.
        """
        with self._one_at_a_time:
            process = self._process = self._process or _start()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                _send(process.stdin, (function, args))
                is_error, answer = pickle.load(process.stdout)
            except (EOFError, OSError, pickle.UnpicklingError) as error:
                code = self._end()
                raise PlanError(
                    f"the planning process ended (exit code {code}) before it answered: it was "
                    "killed, or ran out of memory"
                ) from error
            except BaseException:  # the next answer must not be this call's
                process.kill()
                self._end()
                raise
        if is_error:
            raise answer
        result: Result = answer
        return result

    def close(self) -> None:
        """End the process; a later call starts another."""
        with self._one_at_a_time:
            self._end()

    def _end(self) -> int | None:
        process, self._process = self._process, None
        if process is None:
            return None
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what a dead process did not read
                pipe.close()  # a living one sees the end of its input, and ends
        try:
            return process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


class PlannerProcess:
    """A planner in another process; its plans are those of `planner.plan` in this one.

    The process starts with the first plan and ends with `close`; `contextlib.closing` makes a
    `with` block of that.

    Args:
        planner: how to plan.
    """

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self._worker = Worker()

    def plan(self, problem: ScatterProblem) -> ScatterPlan:
        """`planner.plan(problem)`, in the other process; threads that call it take turns.

        Raises:
            PlanError: whatever planning raises, and if the process has died.
        """
        return self._worker.call(self.planner.plan, problem)

    def close(self) -> None:
        """End the process; a later `plan` starts another."""
        self._worker.close()


def _start() -> subprocess.Popen[bytes]:
    """A fresh interpreter with this one's import path."""
    return subprocess.Popen(
        [sys.executable, "-m", "seqpar.planners.process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
    )


def _send(pipe: IO[bytes], value: object) -> None:
    pipe.write(pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL))  # all of it, or nothing
    pipe.flush()


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer (function, arguments) with (is it an error, result or error) until the input ends."""
    while True:
        try:
            function, args = pickle.load(requests)
        except EOFError:
            return
        try:
            answer = False, function(*args)
        except Exception as error:
            answer = True, error
        _send(answers, answer)


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started us
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever is printed must not mix with the answers
    with contextlib.suppress(BrokenPipeError):
        _serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    _main()
