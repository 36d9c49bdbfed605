"""How many devices a target needs, by a length histogram."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from seqpar.errors import PlanError
from seqpar.planners.anytime import Planner
from seqpar.planners.cost import CostModel
from seqpar.planners.forecast import Forecast, forecast, longest_document
from seqpar.planners.histogram import LengthHistogram
from seqpar.planners.problem import Cluster
from seqpar.planners.workers import Workers

__all__ = ["devices_for"]

MAX_DEVICES = 4096


def devices_for(
    histogram: LengthHistogram,
    cluster: Cluster,
    cost: CostModel,
    *,
    tokens_per_second: float = 0.0,
    document_tokens: int = 0,
    sequences: int = 512,
    batches: int = 4,
    planner: Planner | None = None,
    workers: Workers | None = None,
) -> tuple[int, Forecast]:
    """The fewest devices, in whole nodes, that reach a rate and hold a document.

    Sizes are doubled until one does, and those in between bisected.

    Raises:
        PlanError: no target, or not reached with 4,096 devices.
    """
    if not tokens_per_second > 0 and document_tokens < 1:
        raise PlanError("say what to reach: tokens_per_second, document_tokens, or both")

    def expect(sized: Cluster) -> Forecast:
        return forecast(
            histogram,
            sized,
            cost,
            sequences=sequences,
            batches=batches,
            planner=planner,
            workers=workers,
        )

    target = _Target(cluster, cost, expect, tokens_per_second, document_tokens)
    low, high = 0, 1
    while (found := target.reached_by(high)) is None:
        low, high = high, 2 * high
        if high * cluster.devices_per_node > MAX_DEVICES:
            raise PlanError(
                f"{low * cluster.devices_per_node} devices reach {target.best_rate:.0f} "
                f"tokens a second, not {tokens_per_second:.0f} (documents to {document_tokens} "
                "tokens): enlarge the batch, or the device's memory"
            )
    while high - low > 1:
        middle = (low + high) // 2
        fewer = target.reached_by(middle)
        low, high = (middle, high) if fewer is None else (low, middle)
        found = fewer or found
    return high * cluster.devices_per_node, found


@dataclass
class _Target:
    """What is to be reached, and the best rate seen so far."""

    cluster: Cluster
    cost: CostModel
    expect: Callable[[Cluster], Forecast]
    tokens_per_second: float
    document_tokens: int
    best_rate: float = 0.0

    def reached_by(self, nodes: int) -> Forecast | None:
        """The forecast of so many nodes if it reaches the target."""
        sized = replace(self.cluster, devices=nodes * self.cluster.devices_per_node, degrees=())
        if self.cost.tokens_per_device(sized.memory_bytes, sized.devices) < 1:
            return None
        if longest_document(sized, self.cost) < self.document_tokens:
            return None
        expected = self.expect(sized)
        rate = expected.tokens_per_second.mean
        self.best_rate = max(self.best_rate, rate)
        return expected if rate >= self.tokens_per_second else None
