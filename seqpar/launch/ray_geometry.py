"""What Ray's controller is told: how many ranks, on lost nodes too, and what spends restarts.

Ray Train's elastic policy takes any number of workers between two bounds, and after a node is lost
asks for the old number until a timeout. Here the number is the largest that the job's geometry
allows on the nodes that are alive; and a lost node spends none of the job's restarts. Both hang on
Ray Train's own policy classes, which are not public: checked with Ray 2.60.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy

from seqpar.launch.spec import JobSpec

__all__ = ["GeometryPolicy", "NodeLossPolicy", "RankConfig"]


class GeometryPolicy(ElasticScalingPolicy):  # type: ignore[misc]
    """Elastic within the job's geometry, on nodes that are alive."""

    def __init__(self, scaling_config: Any, spec: JobSpec) -> None:
        super().__init__(scaling_config)
        self.spec = spec

    def _get_reserved_resources(self) -> Any:
        reserved = super()._get_reserved_resources()
        if reserved is None:
            return None
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        return {node: resources for node, resources in reserved.items() if node in alive}

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        return self.spec.largest_allowed(super()._count_possible_workers(reserved_resources))


class NodeLossPolicy(DefaultFailurePolicy):  # type: ignore[misc]
    """Restarts after a lost node are not counted: it was not the job that failed."""

    def make_decision(self, training_failed_error: Any) -> Any:
        failures = getattr(training_failed_error, "worker_failures", {}).values()
        if any(is_node_loss(failure) for failure in failures):
            return FailureDecision.RETRY
        return super().make_decision(training_failed_error)


def is_node_loss(failure: BaseException) -> bool:
    """Whether a worker died because its node did."""
    text = str(failure)
    return isinstance(failure, ray.exceptions.RayActorError) and (
        "node has died" in text or "node died" in text or "NODE_DIED" in text
    )


class NoProcessGroup(Backend):  # type: ignore[misc]
    """Ray's own processes form no process group: the ranks, their children, do."""

    share_cuda_visible_devices = True


class RankConfig(BackendConfig):  # type: ignore[misc]
    """In place of TorchConfig: the controller and the workers then need not import torch."""

    @property
    def backend_cls(self) -> type[Backend]:
        return NoProcessGroup
