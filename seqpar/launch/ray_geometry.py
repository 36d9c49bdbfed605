"""What Ray's controller is told: how many ranks, on lost nodes too, and what spends restarts.

Ray Train's elastic policy takes any number of workers between two bounds, and after a node is lost
asks for the old number until a timeout. Here the number is the largest that the job's geometry
allows on the nodes that are alive; and a lost node spends none of the job's restarts. Both hang on
Ray Train's own policy classes, which are not public: checked with Ray 2.60.
"""

from __future__ import annotations

import re
import socket
import time
from pathlib import Path
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import NoopDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy

from seqpar.launch.rundir import RunDir
from seqpar.launch.spec import JobSpec

__all__ = ["GeometryPolicy", "NodeLossPolicy", "RankConfig"]

CONNECT_TIMEOUT_S = 1.0


class GeometryPolicy(ElasticScalingPolicy):  # type: ignore[misc]
    """As many ranks as the job's geometry allows on the nodes that are alive.

    It waits, up to `start_timeout_s`, until the cluster has that many free: a group that has just
    ended frees its places a moment later, and nodes that are joining are worth waiting for.
    """

    def __init__(self, scaling_config: Any, spec: JobSpec) -> None:
        super().__init__(scaling_config)
        self.spec = spec
        self.waiting_since: float | None = None
        self.has_run = False

    def make_decision_for_non_running_worker_group(self) -> Any:
        now = time.monotonic()
        if self.waiting_since is None:
            self.waiting_since = now
        decision = super().make_decision_for_non_running_worker_group()
        ranks = getattr(decision, "num_workers", 0)
        if ranks < self.goal() and now - self.waiting_since < self.spec.start_timeout_s:
            return NoopDecision()
        if ranks:
            self.waiting_since, self.has_run = None, True
        return decision

    def goal(self) -> int:
        """The largest allowed number of ranks that alive nodes can hold, if nothing else runs;
        the full number at the start, when nodes may still be joining."""
        if not self.has_run:
            return self.spec.nproc
        return self._count_possible_workers(reachable_nodes())

    def _get_reserved_resources(self) -> Any:
        reserved = super()._get_reserved_resources()
        if reserved is None:
            return None
        there = reachable_nodes()
        return {node: resources for node, resources in reserved.items() if node in there}

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        return self.spec.largest_allowed(super()._count_possible_workers(reserved_resources))


class NodeLossPolicy(DefaultFailurePolicy):  # type: ignore[misc]
    """Restarts after a lost node are not counted: it was not the job that failed."""

    def __init__(self, failure_config: Any, run_dir: Path) -> None:
        super().__init__(failure_config)
        self.run_dir = run_dir

    def make_decision(self, training_failed_error: Any) -> Any:
        failures = getattr(training_failed_error, "worker_failures", {})
        lost = [rank for rank, failure in failures.items() if is_node_loss(failure)]
        decision = FailureDecision.RETRY if lost else super().make_decision(training_failed_error)
        words = {str(rank): one_line(failure) for rank, failure in failures.items()}
        RunDir(self.run_dir).record(
            "failed",
            lost_nodes_of_ranks=lost,
            restarts=decision == FailureDecision.RETRY,
            failures=words or one_line(training_failed_error),
        )
        return decision


def one_line(error: BaseException) -> str:
    """An error's text, short enough for an event."""
    return " ".join(str(error).split())[:400]


def is_node_loss(failure: BaseException) -> bool:
    """Whether a Ray worker is gone because its node is: the error names the node."""
    found = re.search(r"node_id='([0-9a-f]+)'", str(failure))
    return found is not None and found[1] not in reachable_nodes()


def reachable_nodes() -> dict[str, dict[str, float]]:
    """Resources of the nodes that answer, by node id.

    Ray itself calls a node alive for up to 20 s after it is gone; a closed port tells at once.
    """
    return {
        node["NodeID"]: node["Resources"]
        for node in ray.nodes()
        if node["Alive"] and answers(node["NodeManagerAddress"], node["NodeManagerPort"])
    }


def answers(host: str, port: int) -> bool:
    """Whether something listens there."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True


class NoProcessGroup(Backend):  # type: ignore[misc]
    """Ray's own processes form no process group: the ranks, their children, do."""

    share_cuda_visible_devices = True


class RankConfig(BackendConfig):  # type: ignore[misc]
    """In place of TorchConfig: the controller and the workers then need not import torch."""

    @property
    def backend_cls(self) -> type[Backend]:
        return NoProcessGroup
