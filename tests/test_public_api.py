"""The public face is pinned: a name comes or goes on purpose, with this test."""

from __future__ import annotations

import subprocess
import sys

import seqpar

PUBLIC = {
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
}


def test_public_names_are_pinned_and_resolve() -> None:
    assert set(seqpar.__all__) == PUBLIC
    assert all(getattr(seqpar, name) is not None for name in PUBLIC)
    assert dir(seqpar) == sorted(PUBLIC)


def test_importing_seqpar_and_its_planners_loads_nothing_heavy() -> None:
    heavy = ["torch", "ray", "numba", "matplotlib", "transformers", "pulp", "highspy"]
    code = (
        "import sys, seqpar, seqpar.planners; "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
