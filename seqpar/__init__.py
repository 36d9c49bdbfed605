"""seqpar: distributed long-sequence parallelism on torch, Triton, PuLP and Ray.

Names are imported when they are first used, so that planning needs no torch and `seqpar --help`
answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seqpar.balance import balanced_layout
    from seqpar.batch import (
        Batch,
        PackedStream,
        pack,
        shard,
        unshard,
    )
    from seqpar.errors import SeqparError
    from seqpar.gradients import reduce_gradients, seed_ranks
    from seqpar.head_loss import lm_head_loss_sum
    from seqpar.layout import SequenceLayout
    from seqpar.loaders import SequenceParallelLoader
    from seqpar.loss import chunked_token_loss, count_targets, mean_over_mesh, token_loss
    from seqpar.mesh import GroupPool, init_mesh
    from seqpar.offload import offload_checkpoints
    from seqpar.ops.softmax import softmax_attention
    from seqpar.ops.state import state_attention
    from seqpar.parity import check_parity
    from seqpar.planners import Cluster, CostModel, Planner, ScatterPlan, ScatterProblem
    from seqpar.rows import documents_of_padded, documents_of_positions
    from seqpar.tiles import tile_layers, tile_tokens
    from seqpar.wrap import parallelize, unparallelize

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
    "SequenceParallelLoader",
    "__version__",
    "balanced_layout",
    "check_parity",
    "chunked_token_loss",
    "count_targets",
    "documents_of_padded",
    "documents_of_positions",
    "init_mesh",
    "lm_head_loss_sum",
    "mean_over_mesh",
    "offload_checkpoints",
    "pack",
    "parallelize",
    "reduce_gradients",
    "seed_ranks",
    "shard",
    "softmax_attention",
    "state_attention",
    "tile_layers",
    "tile_tokens",
    "token_loss",
    "unparallelize",
    "unshard",
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
    "SequenceParallelLoader": "loaders",
    "balanced_layout": "balance",
    "check_parity": "parity",
    "chunked_token_loss": "loss",
    "count_targets": "loss",
    "documents_of_padded": "rows",
    "documents_of_positions": "rows",
    "init_mesh": "mesh",
    "lm_head_loss_sum": "head_loss",
    "mean_over_mesh": "loss",
    "offload_checkpoints": "offload",
    "pack": "batch",
    "parallelize": "wrap",
    "reduce_gradients": "gradients",
    "seed_ranks": "gradients",
    "shard": "batch",
    "softmax_attention": "ops.softmax",
    "state_attention": "ops.state",
    "tile_layers": "tiles",
    "tile_tokens": "tiles",
    "token_loss": "loss",
    "unparallelize": "wrap",
    "unshard": "batch",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'seqpar' has no attribute {name!r}")
    value = getattr(import_module(f"seqpar.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
