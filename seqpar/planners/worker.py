"""A process that runs functions for this one.

It is a fresh interpreter that runs `worker_main`, started without multiprocessing: that would
import the training script, and torch with it, or fork a process that has CUDA threads.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import IO, Any, TypeVar

from seqpar.errors import PlanError

__all__ = ["Worker", "send"]

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
                send(process.stdin, (function, args))
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


def _start() -> subprocess.Popen[bytes]:
    """A fresh interpreter with this one's import path."""
    return subprocess.Popen(
        [sys.executable, "-m", "seqpar.planners.worker_main"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
    )


def send(pipe: IO[bytes], value: object) -> None:
    """Pickle a value into a pipe."""
    pipe.write(pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL))  # all of it, or nothing
    pipe.flush()
