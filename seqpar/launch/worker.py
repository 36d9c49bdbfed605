"""What every rank runs first: `python worker.py script.py args`, or `-m module args`.

Standard library only, so that a rank starts as fast as its script does. It ties the rank's life to
its launcher's, sends its output to its log, beats once a second so that others see it live, says
what its main thread is doing, records the traceback if the script raises, and then runs the script
as `__main__`. The script needs nothing of it and runs the same under torchrun.

Read from the environment, set by the engines: SEQPAR_RUN_DIR, RANK, TORCHELASTIC_RESTART_COUNT,
TORCHELASTIC_ERROR_FILE, SEQPAR_LOG_FILE (absent: the output stays where it is), SEQPAR_PARENT_PID.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import linecache
import os
import re
import runpy
import signal
import socket
import sys
import threading
import time
import traceback
from itertools import islice
from pathlib import Path
from types import FrameType, TracebackType

BEAT_INTERVAL_S = 1.0
IDLE_SHARE = 0.001
EXIT_GRACE_S = 3.0
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask Linux to kill this process when its launcher dies; leave at once if it has already."""
    parent = os.environ.get("SEQPAR_PARENT_PID")
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent and int(parent) != os.getppid():
        os._exit(1)


def send_output_to(path: str) -> None:
    """Append standard output and error, of this process and its children, to one file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def write_atomically(path: Path, content: dict[str, object]) -> None:
    """Replace `path` by JSON in one rename, so that a reader sees the old or the new, whole.

    Where there is no space for a new file the old one is overwritten, which needs none: a reader
    may then see it half-written.
    """
    text = json.dumps(content)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        if not path.exists():
            raise
        with path.open("r+") as file:
            file.write(text)
            file.truncate()


def waiting_in(frame: FrameType | None) -> str | None:
    """The collective that a thread waits in: the outermost torch.distributed call on its stack, or
    the call `work.wait()` of one that was posted before, which leaves no such frame."""
    found = posted_wait(frame)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        name = frame.f_code.co_name
        if module.startswith("torch.distributed.") and name not in ("wrapper", "<module>"):
            found = name
        frame = frame.f_back
    return found


def posted_wait(frame: FrameType | None) -> str | None:
    """`<function>: <call>` if the innermost frame is at a call `...wait(...)` outside Python code.

    Waits of the standard library (threading, subprocess) have frames of their own below the call.
    """
    if frame is None or frame.f_lasti < 0:
        return None
    positions = next(islice(frame.f_code.co_positions(), frame.f_lasti // 2, None))
    line, _, start, end = positions
    if line is None:
        return None
    text = linecache.getline(frame.f_code.co_filename, line, frame.f_globals)[start:end]
    return f"{frame.f_code.co_name}: {text}" if re.search(r"\.wait\(", text) else None


class Pulse(threading.Thread):
    """Writes `ranks/rank-<r>.alive` each second: time, pid, and where the main thread is."""

    def __init__(self, folder: Path, rank: int, attempt: int) -> None:
        super().__init__(name="seqpar-pulse", daemon=True)
        self.path = folder / f"rank-{rank}.alive"
        self.fixed: dict[str, object] = {
            "rank": rank,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "attempt": attempt,
            "world": int(os.environ.get("WORLD_SIZE", "1")),
        }
        self.main_thread = threading.main_thread().ident
        self.place: tuple[int, int] | None = None
        self.since = time.monotonic()
        self.cpu_s = 0.0
        self.ended = threading.Event()

    def run(self) -> None:
        while True:
            with contextlib.suppress(OSError):  # a full disk must not end the rank
                self.beat()
            if self.ended.wait(BEAT_INTERVAL_S):
                return

    def stop(self) -> None:
        """End before the interpreter does: a thread cut off in its exit can abort the process."""
        self.ended.set()
        self.join()
        with contextlib.suppress(OSError):
            self.beat()

    def beat(self) -> None:
        frame = sys._current_frames().get(self.main_thread or 0)
        write_atomically(
            self.path,
            {
                **self.fixed,
                "time": time.time(),
                "idle_s": round(self.idle_seconds(frame), 3),
                "where": f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else None,
                "collective": waiting_in(frame),
                "ended": self.ended.is_set(),
            },
        )

    def idle_seconds(self, frame: FrameType | None) -> float:
        """How long the main thread has been at this instruction without using the processor.

        A loop may be seen at one instruction for ever; what it cannot do is use no processor time.
        """
        place = (id(frame), frame.f_lasti) if frame else None
        cpu_s = main_thread_cpu_s(self.main_thread)
        now = time.monotonic()
        if place != self.place or cpu_s - self.cpu_s > IDLE_SHARE * (now - self.since):
            self.place, self.since, self.cpu_s = place, now, cpu_s
        return now - self.since


def main_thread_cpu_s(thread: int | None) -> float:
    """Processor seconds that a thread has used; 0 where the system cannot say."""
    if thread is None or not hasattr(time, "pthread_getcpuclockid"):
        return 0.0
    return time.clock_gettime(time.pthread_getcpuclockid(thread))


def record_failure(error: BaseException) -> None:
    """Leave the traceback in TORCHELASTIC_ERROR_FILE, in the form that torch's agent reads."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    ended = isinstance(error, SystemExit)  # sys.exit(7) says all in its code
    error = error.with_traceback(of_the_script(error.__traceback__))
    trace = "" if ended else "".join(traceback.format_exception(error))
    info = {"py_callstack": trace, "timestamp": str(int(time.time()))}
    message = {"message": f"{type(error).__name__}: {error}", "extraInfo": info}
    with contextlib.suppress(OSError):
        content = {"message": message, "time": time.time(), "rank": int(os.environ["RANK"])}
        write_atomically(Path(path), content)


def of_the_script(trace: TracebackType | None) -> TracebackType | None:
    """A traceback from the script's first frame on, without this file's and runpy's; whole if the
    script has none in it."""
    found = trace
    while found and found.tb_frame.f_code.co_filename in (__file__, "<frozen runpy>"):
        found = found.tb_next
    return found or trace


def leave_within(seconds: float) -> None:
    """End the process even if a thread of the script waits for peers, as in a collective."""
    timer = threading.Timer(seconds, os._exit, (1,))
    timer.daemon = True
    timer.start()


def run_script(command: list[str]) -> None:
    """Run `script.py args` or `-m module args` as `__main__`, as `python` itself would."""
    if command[0] == "-m":
        sys.argv = command[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path.insert(0, str(Path(command[0]).absolute().parent))
        runpy.run_path(command[0], run_name="__main__")


def main() -> None:
    die_with_parent()
    rank = int(os.environ["RANK"])
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if log := os.environ.get("SEQPAR_LOG_FILE"):
        send_output_to(log)
    ranks = Path(os.environ["SEQPAR_RUN_DIR"]) / "ranks"
    ranks.mkdir(parents=True, exist_ok=True)
    stacks = (ranks / f"rank-{rank}.stack-{attempt}").open("w")
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    pulse = Pulse(ranks, rank, attempt)
    pulse.start()
    try:
        run_script(sys.argv[1:])
    except BaseException as error:
        if not (isinstance(error, SystemExit) and not error.code):
            record_failure(error)
            leave_within(EXIT_GRACE_S)
        raise
    finally:
        pulse.stop()


if __name__ == "__main__":
    main()
