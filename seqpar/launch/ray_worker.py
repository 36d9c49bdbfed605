"""What runs inside each Ray Train worker: the rank as a child process, watched until it ends.

The script is a process of its own, so that it starts as it would under torchrun (its own main
thread, signal handlers and collectives), its exit code and log are its own, and it dies with the
Ray worker. Rank 0's worker holds the store that the ranks meet on, as torchrun's agent does: the
port is bound before anyone is told of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.train
from ray.train.collective import broadcast_from_rank_zero

from seqpar.launch.failure import is_echo
from seqpar.launch.placement import rank_command
from seqpar.launch.rundir import RunDir
from seqpar.launch.supervise import serve_request

__all__ = ["RankEndedError", "run_rank"]

PEER_DELAY_S = 0.5
ECHO_WAIT_S = 30.0
"""How long a rank that lost its peer keeps silent: Ray needs up to 20 s to see a node's death."""
POLL_INTERVAL_S = 0.2


class RankEndedError(Exception):
    """A rank's script ended badly; travels from the worker to the launcher."""

    def __init__(self, rank: int, exit_code: int, ended: float, trace: str, reason: str) -> None:
        super().__init__(rank, exit_code, ended, trace, reason)
        self.rank = rank
        self.exit_code = exit_code
        self.ended = ended
        self.trace = trace
        self.reason = reason


def run_rank(config: dict[str, Any]) -> None:
    """Ray Train's train function: `config` is the job as `seqpar.launch.ray` sends it."""
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    one_host = context.get_local_world_size() == world_size
    host = "127.0.0.1" if one_host else ray.util.get_node_ip_address()
    run_dir = RunDir(Path(config["run_dir"]))
    listener = socket.create_server((host, config["port"])) if rank == 0 else None
    meeting = None
    if listener is not None:
        port = listener.getsockname()[1]
        meeting = {"host": host, "port": port, "attempt": run_dir.next_attempt()}
    meeting = broadcast_from_rank_zero(meeting)
    environment = {
        **os.environ,
        **config["environment"],
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "GROUP_RANK": str(context.get_node_rank()),
        "MASTER_ADDR": meeting["host"],
        "MASTER_PORT": str(meeting["port"]),
        "TORCHELASTIC_RESTART_COUNT": str(meeting["attempt"]),
        "TORCHELASTIC_MAX_RESTARTS": str(config["restarts"]),
        "TORCHELASTIC_RUN_ID": config["environment"]["SEQPAR_RUN_ID"],
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_ERROR_FILE": str(run_dir.error_file(meeting["attempt"], rank)),
        "GLOO_SOCKET_IFNAME": interface_of(host),
        "SEQPAR_LOG_FILE": str(run_dir.log(rank)),
        "SEQPAR_PARENT_PID": str(os.getpid()),
    }
    process = subprocess.Popen(
        rank_command(config["script"]),
        env=environment,
        cwd=config["cwd"],
        start_new_session=True,
    )
    try:
        with held_store(listener):
            exit_code = wait(process, run_dir, rank, meeting["attempt"])
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what the rank left behind in its session
        run_dir.mark_ended(rank)
    if exit_code:
        raise rank_exit(run_dir, rank, meeting["attempt"], exit_code)


def wait(process: subprocess.Popen[bytes], run_dir: RunDir, rank: int, attempt: int) -> int:
    """Wait for the rank's end, and serve what its supervisor asks of it; the exit code."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(POLL_INTERVAL_S)
        serve_request(run_dir, rank, attempt, process.pid)


@contextlib.contextmanager
def held_store(listener: socket.socket | None) -> Any:
    """Serve the ranks' store on a listening socket, for as long as the context is open."""
    if listener is None:
        yield
        return
    from torch._C._distributed_c10d import (
        TCPStore,
    )  # only rank 0 pays for it

    host, port = listener.getsockname()[:2]
    store = TCPStore(
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    yield
    del store


def rank_exit(run_dir: RunDir, rank: int, attempt: int, exit_code: int) -> RankEndedError:
    """The failure of a rank; one that is a dead peer's echo is reported last, if at all."""
    ended = time.time()
    trace = ""
    with contextlib.suppress(OSError, json.JSONDecodeError, KeyError):
        record = json.loads(run_dir.error_file(attempt, rank).read_text())
        trace, ended = record["message"]["extraInfo"]["py_callstack"], record["time"]
    if is_echo(trace):
        time.sleep(ECHO_WAIT_S)  # Ray ends this worker when it learns of the cause
    elif exit_code > 0:
        time.sleep(PEER_DELAY_S)
    return RankEndedError(rank, exit_code, ended, trace, run_dir.end_reason(rank, attempt))


def interface_of(address: str) -> str:
    """The network interface that owns an address: gloo otherwise guesses from the host name."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return name
    return ""
