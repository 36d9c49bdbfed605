"""Plans and launches: what a call shares with others of its shape, and what Triton compiles."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from seqpar.errors import KernelInputError
from seqpar.kernels.lightning import key_value_summary
from seqpar.kernels.lightning.plan import plan_of
from tests.kernels.test_lightning import make_inputs, packed

COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from seqpar.kernels.direct_launch import _checked_sizes
from seqpar.kernels.lightning.state_pass import segment_states_kernel as kernel

constants = {
    "d_reach": None, "p_reach": None, "p_by_segment": None, "stride_reach": 0, "DECAY": 1,
    "REVERSE": False, "FLAT": True, "C": 64, "BK": 64, "BV": 64, "STAGES": 2, "PRECISION": "tf32",
    "OVERLAP": True, "LATE": False,
}
kinds = {"d": "tensordesc<bf16[64,64]>", "p": "*fp32"}
signature = {
    name: "constexpr" if name in constants else kinds.get(name.split("_")[0], "i32")
    for name in kernel.arg_names
}
signature |= {"p_table": "*i32"}
compiled = compile(ASTSource(kernel, signature, constants, {}), target=GPUTarget("cuda", 90, 32))
print(_checked_sizes(compiled))
"""
COMPILE_IN_GROUPS = """
from triton.backends.compiler import GPUTarget
from triton.compiler import compile
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout
from seqpar.kernels.direct_launch import _checked_sizes
from seqpar.kernels.lightning.output_pass_groups import output_pass_groups_kernel as kernel

constants = {
    "p_decay": None, "p_initial": None, "p_final": None, "OVERLAP": True, "DECAY": 2,
    "REVERSE": False, "SCAN": True, "C": 64, "BX": 128, "STAGES": 3, "EARLY": True,
    "LATE": False,
}
layout = repr(NVMMASharedLayout(128, 16, 2))
wide, half = (f"tensordesc<bf16[64, {columns}],{layout}>" for columns in (128, 64))
kinds = {"p": "*fp32", "d": half}
signature = {
    name: "constexpr" if name in constants else kinds.get(name.split("_")[0], "i32")
    for name in kernel.arg_names
}
signature |= {"d_x": wide, "d_y": wide, "p_w": "*bf16", "p_table": "*i32"}
compiled = compile(
    GluonASTSource(kernel, signature, constants),
    target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "launch_pdl": True},
)
ptx = compiled.asm["ptx"]
assert "setmaxnreg" in ptx and compiled.metadata.shared <= 232448
waits, lets_in = (ptx.count(f"griddepcontrol.{x}") for x in ("wait", "launch_dependents"))
assert waits == lets_in == 2, (waits, lets_in)  # each group; the warp that copies does not
assert ptx.index("griddepcontrol.wait") < ptx.index("griddepcontrol.launch_dependents")
print(compiled.metadata.num_warps, len(_checked_sizes(compiled)))
constants |= {"EARLY": False, "LATE": True}
compiled = compile(
    GluonASTSource(kernel, signature, constants),
    target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "launch_pdl": True},
)
ptx = compiled.asm["ptx"]
assert ptx.count("griddepcontrol.wait") == ptx.count("griddepcontrol.launch_dependents") == 1
behind = ptx[ptx.index("griddepcontrol.wait"):].split("ret;")[0]
assert not any(x in behind for x in ("ld.global", "st.global", "cp.", "wgmma")), behind
"""
COMPILE_WITH_SUMS = """
from triton.backends.compiler import GPUTarget
from triton.compiler import compile
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout
from seqpar.kernels.direct_launch import _checked_sizes
from seqpar.kernels.lightning.output_pass_sums import output_pass_sums_kernel as kernel

common = {
    "p_initial": None, "p_final": None, "stride_x": 1, "stride_z": 128, "OVERLAP": True,
    "SCAN": True, "C": 64, "BX": 128, "STAGES": 3,
}
layout = repr(NVMMASharedLayout(128, 16, 2))
wide, half = (f"tensordesc<bf16[64, {columns}],{layout}>" for columns in (128, 64))
kinds = {"d": half, "p": "*fp32"}
for passing in (  # dq; dk; dk where no gradient reaches a state that leaves a segment
    {"REVERSE": False, "LATE": False, "p_decay_grad": None},
    {"REVERSE": True, "LATE": True},
    {"REVERSE": True, "LATE": True, "p_exits": None},
):
    constants = common | passing
    signature = {
        name: "constexpr" if name in constants else kinds.get(name.split("_")[0], "i32")
        for name in kernel.arg_names
    }
    signature |= {"p_w": "*bf16", "p_table": "*i32", "d_x": wide, "d_y": wide}
    compiled = compile(
        GluonASTSource(kernel, signature, constants),
        target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "launch_pdl": True},
    )
    ptx = compiled.asm["ptx"]
    assert "setmaxnreg" in ptx and compiled.metadata.shared <= 232448
    assert ptx.count("griddepcontrol.wait") == ptx.count("griddepcontrol.launch_dependents") == 1
    behind = ptx[ptx.index("griddepcontrol.wait"):].split("ret;")[0]
    for x in ("ld.global", "st.global", "cp.", "wgmma") if passing["LATE"] else ():
        assert x not in behind, behind
    print(compiled.metadata.num_warps, len(_checked_sizes(compiled)))
"""
DESCRIPTOR = (128, 4, 4, 8, 8)
"""A tensor map, two numbers of rows and columns, two strides."""


def _compiled(script: str) -> str:
    """What a process says that compiles for Hopper: Triton is interpreted in this one."""
    pytest.importorskip("triton", reason="Triton is not installed")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_parameters_lie_as_direct_launches_expect_them() -> None:
    scratch = (8, 8)
    expected = (*DESCRIPTOR, *DESCRIPTOR, *[8] * 3, *[4] * 4, *scratch)
    assert _compiled(COMPILE).strip() == str(expected)


def test_launch_structures_lie_as_the_driver_expects_them() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from seqpar.kernels.direct_launch import LaunchConfig, _LaunchAttribute

    assert ctypes.sizeof(_LaunchAttribute) == 72
    assert _LaunchAttribute.value.offset == 8
    assert ctypes.sizeof(LaunchConfig) == 56
    assert LaunchConfig.stream.offset == 32


def test_the_pass_in_two_groups_compiles_for_hopper_without_a_gpu() -> None:
    """Two groups of four warps, and four of which one copies."""
    said = _compiled(COMPILE_IN_GROUPS)
    warps, parameters = said.split()[:2]
    assert (int(warps), int(parameters)) == (12, 4 * len(DESCRIPTOR) + 10 + 2)


def test_the_pass_with_sums_compiles_for_hopper_without_a_gpu() -> None:
    """Three groups of four warps, and four of which two decay and one carries. Tensors besides the
    five in windows, numbers and scratch:
    `decay_grad` is none of dq's, `exits` may be missing."""
    said = [tuple(map(int, line.split())) for line in _compiled(COMPILE_WITH_SUMS).splitlines()]
    count = 5 * len(DESCRIPTOR) + 12 + 2
    assert said == [(16, count - 1), (16, count), (16, count - 1)]


def test_calls_of_one_shape_share_a_plan() -> None:
    one, other = (make_inputs(decay="fixed", seed=seed) for seed in (0, 1))
    plans = [
        plan_of(x["k"], x["v"], log_decay=x["log_decay"], cu_seqlens=None) for x in (one, other)
    ]
    assert plans[0] is plans[1]
    longer = make_inputs(decay="fixed", tokens=151)
    plan = plan_of(longer["k"], longer["v"], log_decay=longer["log_decay"], cu_seqlens=None)
    assert plan is not plans[0]


def test_bounds_are_looked_at_in_every_call() -> None:
    x = make_inputs(decay="none", batch=1, tokens=100)
    bounds = packed((60, 40))
    plan = plan_of(x["k"], x["v"], log_decay=None, cu_seqlens=bounds)
    assert plan.state_shape[0] == 2
    bounds[1] = 70  # in place: the same tensor, another packing
    assert plan_of(x["k"], x["v"], log_decay=None, cu_seqlens=bounds).bounds == (0, 70, 100)
    bounds[1] = 0
    with pytest.raises(KernelInputError, match="must increase"):
        plan_of(x["k"], x["v"], log_decay=None, cu_seqlens=bounds)


@pytest.mark.parametrize("decay", ["none", "fixed", "token"])
@pytest.mark.parametrize("lengths", [None, (3, 100, 47)])
def test_transitions_are_the_sums_of_log_decays(
    decay: str, lengths: tuple[int, ...] | None
) -> None:
    x = make_inputs(decay=decay, batch=2 if lengths is None else 1)
    cu_seqlens = None if lengths is None else packed(lengths)
    summary = key_value_summary(x["k"], x["v"], log_decay=x["log_decay"], cu_seqlens=cu_seqlens)
    per_token = torch.zeros(x["k"].shape[:3], dtype=torch.float64)
    if x["log_decay"] is not None:
        per_token += x["log_decay"]
    documents = list(per_token) if lengths is None else torch.split(per_token[0], lengths)
    expected = torch.stack([document.sum(0) for document in documents])
    torch.testing.assert_close(summary.log_transition.double(), expected)
