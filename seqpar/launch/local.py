"""The local engine: torch's elastic agent, as a library, on this machine.

The agent starts the ranks, watches them, stops all when one fails and starts them again while the
budget lasts. What is ours: a rendezvous whose store listens on loopback only, on a port that is
held from the moment it is chosen; rank 0's output on the terminal; and who failed first, in words.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
)

from seqpar.launch.failure import Failure
from seqpar.launch.placement import LOOPBACK, Placement
from seqpar.launch.rundir import RunDir
from seqpar.launch.stopping import stop_error
from seqpar.launch.supervise import Supervisor
from seqpar.launch.terminal import Relay

__all__ = ["run_local"]


class LoopbackRendezvous(RendezvousHandler):
    """One agent, one host: a new store on a loopback socket for every attempt."""

    def __init__(self, run_id: str, timeout_s: float, port: int) -> None:
        self.run_id = run_id
        self.port = port
        self.timeout = timedelta(seconds=timeout_s)
        self.store: TCPStore | None = None

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_backend(self) -> str:
        return "seqpar-loopback"

    def next_rendezvous(self) -> RendezvousInfo:
        self.store = None  # a port that is given is free again before the next attempt takes it
        listener = socket.create_server((LOOPBACK, self.port))
        port = listener.getsockname()[1]
        self.store = TCPStore(
            LOOPBACK,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=self.timeout,
            master_listen_fd=listener.detach(),
        )
        address = RendezvousStoreInfo(LOOPBACK, port)
        return RendezvousInfo(PrefixStore("agent", self.store), 0, 1, address)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        self.store = None

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self.run_id

    def shutdown(self) -> bool:
        self.store = None
        return True


class RankLogs(LogsSpecs):
    """Rank 0 writes to the relay, the others to their logs (opened by the worker, appended to)."""

    def __init__(self, run_dir: RunDir, relay: Relay) -> None:
        super().__init__(log_dir=str(run_dir.logs))
        self.run_dir = run_dir
        self.relay = relay

    @property
    def root_log_dir(self) -> str:
        return str(self.run_dir.logs)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        nothing = dict.fromkeys(envs, "")
        errors: dict[int, str] = {}
        for rank, env in envs.items():
            attempt = int(env["TORCHELASTIC_RESTART_COUNT"])
            errors[rank] = str(self.run_dir.error_file(attempt, rank))
            env["TORCHELASTIC_ERROR_FILE"] = errors[rank]
            if rank != 0:
                env["SEQPAR_LOG_FILE"] = str(self.run_dir.log(rank))
        return LogsDest(
            stdouts={**nothing, 0: self.relay.path},
            stderrs={**nothing, 0: self.relay.path},
            tee_stdouts=dict(nothing),
            tee_stderrs=dict(nothing),
            error_files=errors,
        )


class RecordingAgent(LocalElasticAgent):
    """torch's agent, which also notes in the run's events who failed first in each attempt."""

    def __init__(self, spec: WorkerSpec, logs: RankLogs, grace_s: int) -> None:
        if "shutdown_timeout" in inspect.signature(LocalElasticAgent).parameters:
            super().__init__(spec, logs, shutdown_timeout=grace_s)
        else:
            super().__init__(spec, logs)  # torch 2.11: always 30 s
        self.run_dir = logs.run_dir

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if result.is_failed():
            failure = first_failure(result)
            restarts = self._remaining_restarts > 0
            self.run_dir.record(
                "failed", rank=failure.rank, reason=failure.words(), restarts=restarts
            )
        return result


def run_local(placement: Placement) -> None:
    """Run the job here and return when its script has succeeded on every rank.

    Raises:
        RankFailedError: a rank died and no restart is left; carries its rank and exit code.
        LaunchError: the launcher was told to stop, or the job's time was up.
    """
    run_dir = RunDir(placement.run_dir)
    relay = Relay(run_dir.log(0))
    supervisor = Supervisor(placement, run_dir, holds_ranks=True)
    agent = _agent(placement, RankLogs(run_dir, relay))
    try:
        with _environment(placement), _quiet_agent(), supervisor:
            result = agent.run()
    except SignalException as received:
        number = int(received.sigval)
        raise stop_error(placement, number, out_of_time=supervisor.out_of_time) from None
    finally:
        for pid in supervisor.pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)  # what a rank left behind in its session
        relay.close()
    if result.is_failed():
        failure = first_failure(result)
        raise supervisor.explain(failure).error(placement, run_dir)


def _agent(placement: Placement, logs: RankLogs) -> RecordingAgent:
    interpreter, *arguments = placement.worker_command()
    spec = WorkerSpec(
        role="rank",
        local_world_size=placement.num_ranks,
        entrypoint=interpreter,
        args=tuple(arguments),
        rdzv_handler=LoopbackRendezvous(
            placement.run_id, placement.spec.start_timeout_s, placement.spec.port or 0
        ),
        max_restarts=placement.spec.restarts,
        monitor_interval=0.1,
        local_addr=LOOPBACK,
    )
    grace_s = max(1, round(placement.spec.stop_grace_s))
    return RecordingAgent(spec, logs, grace_s)


@contextmanager
def _environment(placement: Placement) -> Iterator[None]:
    """The agent hands its own environment on to the ranks: set the job's for as long as it runs."""
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    added = {
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", loopback),
        "SEQPAR_PARENT_PID": str(os.getpid()),
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
        **placement.environment(),
    }
    before = dict(os.environ)
    os.environ.update(added)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _quiet_agent() -> Iterator[None]:
    """The agent's own log lines say less than the error that ends the job."""
    logger = logging.getLogger("torch.distributed.elastic")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def first_failure(result: RunResult) -> Failure:
    """Which rank failed first; `result.failures` is in the order in which the agent saw them."""
    found = [
        _read(rank, failure, first_seen=position == 0)
        for position, (rank, failure) in enumerate(result.failures.items())
    ]
    return min(found, key=lambda failure: failure.blame)


def _read(rank: int, failure: ProcessFailure, *, first_seen: bool) -> Failure:
    data = failure.error_file_data if isinstance(failure.error_file_data, dict) else {}
    message = data.get("message", {})
    info = message.get("extraInfo", {}) if isinstance(message, dict) else {}
    return Failure(
        rank=rank,
        exit_code=failure.exitcode,
        time=float(data.get("time", failure.timestamp)),
        traceback=info.get("py_callstack", ""),
        first_seen=first_seen,
    )
