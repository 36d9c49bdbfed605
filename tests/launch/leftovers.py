"""What a job may leave behind: processes, listening ports, files of shared memory."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")
LISTENING = "0A"
"""The state of a listening socket in /proc/net/tcp."""
TRAIN_ACTORS = ("RayTrainWorker", "TrainController", "SynchronizationActor", "PreemptionWatcher")


def processes_of(run_dir: Path) -> dict[int, int]:
    """The attempt of every living rank of a run, by process id."""
    found = {}
    for process in psutil.process_iter(["environ", "status"]):
        environment = process.info["environ"] or {}
        if environment.get("SEQPAR_RUN_DIR") != str(run_dir) or "RANK" not in environment:
            continue
        if process.info["status"] != psutil.STATUS_ZOMBIE:
            found[process.pid] = int(environment["TORCHELASTIC_RESTART_COUNT"])
    return found


def train_actors(raylets: Iterable[int]) -> list[str]:
    """Ray Train's own processes that live below these raylets."""
    found = []
    for raylet in raylets:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(raylet).children(recursive=True):
                words = " ".join(child.cmdline())
                found += [words] if any(name in words for name in TRAIN_ACTORS) else []
    return found


def ports_of(pids: Iterable[int]) -> set[int]:
    """Ports that the processes listen on, and the one that ranks among them met on."""
    found = set()
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            sockets = process.net_connections("tcp")
            found |= {s.laddr.port for s in sockets if s.status == psutil.CONN_LISTEN}
            if port := process.environ().get("MASTER_PORT"):
                found.add(int(port))
    return found


def listening(prefixes: Iterable[Sequence[str]]) -> set[int]:
    """All ports that somebody listens on, on the hosts whose commands start with the prefixes."""
    found = set()
    for prefix in prefixes:
        words = [*prefix, "cat", "/proc/net/tcp", "/proc/net/tcp6"]
        table = subprocess.run(words, capture_output=True, text=True).stdout
        rows = [line.split() for line in table.splitlines()]
        found |= {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == LISTENING}
    return found


def shared_memory() -> set[Path]:
    """The files of shared memory."""
    return set(SHARED_MEMORY.iterdir()) if SHARED_MEMORY.is_dir() else set()


def unused_shared_memory(before: set[Path]) -> set[Path]:
    """Files of shared memory that were not there before and that no living process has mapped."""
    new = shared_memory() - before
    if not new:
        return new
    used = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            used |= {word for word in maps.read_text().split() if word.startswith("/dev/shm/")}
    return {path for path in new if str(path) not in used and path.exists()}
