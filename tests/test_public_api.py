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
}


def test_public_names_are_pinned_and_resolve() -> None:
    assert set(seqpar.__all__) == PUBLIC
    assert all(getattr(seqpar, name) is not None for name in PUBLIC)
    assert dir(seqpar) == sorted(PUBLIC)


def test_no_module_hides_a_public_name() -> None:
    """A package's submodule becomes its attribute, whatever `__getattr__` would have said."""
    code = (
        "import importlib, types, seqpar; "
        "[importlib.import_module(f'seqpar.{home}') for home in seqpar._HOMES.values()]; "
        "print([n for n in seqpar._HOMES if isinstance(getattr(seqpar, n), types.ModuleType)])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_importing_seqpar_and_its_planners_loads_nothing_heavy() -> None:
    heavy = ["torch", "ray", "numba", "matplotlib", "transformers", "pulp", "highspy"]
    code = (
        "import sys, seqpar, seqpar.planners; "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_training_needs_no_package_that_is_only_for_some() -> None:
    """As in `make demo` and a plain installation: no Triton, transformers, Ray or matplotlib."""
    missing = ["triton", "transformers", "ray", "matplotlib", "liger_kernel", "megatron", "peft"]
    code = (
        "import sys, importlib; "
        f"sys.modules.update(dict.fromkeys({missing})); "
        "import seqpar; [getattr(seqpar, name) for name in dir(seqpar)]; "
        "[importlib.import_module(f'seqpar.{name}') for name in "
        "('training', 'calibration', 'comparison', 'feedback', 'models', 'report', 'cli')]"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
