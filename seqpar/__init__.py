"""seqpar: distributed long-sequence parallelism on torch, Triton, PuLP and Ray.

Names are imported when they are first used, so that planning needs no torch and `seqpar --help`
answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seqpar.balance import balanced_layout
    from seqpar.batch import Batch, PackedStream, pack, shard
    from seqpar.errors import SeqparError
    from seqpar.layout import SequenceLayout
    from seqpar.loss import lm_head_loss_sum, token_loss
    from seqpar.mesh import GroupPool, init_mesh
    from seqpar.ops.softmax import softmax_attention
    from seqpar.ops.state import state_attention
    from seqpar.parallelize import parallelize, unparallelize
    from seqpar.parity import check_parity
    from seqpar.planners import Cluster, CostModel, Planner, ScatterPlan, ScatterProblem

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Cluster",
    "CostModel",
    "GroupPool",
    "PackedStream",
    "Planner",
    "ScatterPlan",
    "ScatterProblem",
    "SeqparError",
    "SequenceLayout",
    "__version__",
    "balanced_layout",
    "check_parity",
    "init_mesh",
    "lm_head_loss_sum",
    "pack",
    "parallelize",
    "shard",
    "softmax_attention",
    "state_attention",
    "token_loss",
    "unparallelize",
]

_HOMES = {
    "Batch": "batch",
    "Cluster": "planners",
    "CostModel": "planners",
    "GroupPool": "mesh",
    "PackedStream": "batch",
    "Planner": "planners",
    "ScatterPlan": "planners",
    "ScatterProblem": "planners",
    "SeqparError": "errors",
    "SequenceLayout": "layout",
    "balanced_layout": "balance",
    "check_parity": "parity",
    "init_mesh": "mesh",
    "lm_head_loss_sum": "loss",
    "pack": "batch",
    "parallelize": "parallelize",
    "shard": "batch",
    "softmax_attention": "ops.softmax",
    "state_attention": "ops.state",
    "token_loss": "loss",
    "unparallelize": "parallelize",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'seqpar' has no attribute {name!r}")
    value = getattr(import_module(f"seqpar.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
