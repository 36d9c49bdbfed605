"""The Triton kernels against the float64 references: interpreted here, compiled on a GPU.

The interpreter is slow and cannot multiply bfloat16 matrices, so the sizes are small and half
precision is float16; tests marked `gpu` run bfloat16 and the real tile sizes.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seqpar.kernels.lightning import lightning_attention
from seqpar.kernels.lightning import plan as plan_module
from seqpar.kernels.lightning.plan import Plan, plan_of
from seqpar.kernels.lightning.reference import recurrent_attention
from tests.kernels.test_lightning import DECAYS, leaves, make_inputs, packed
from tests.tolerances import assert_close, relative_error

triton = pytest.importorskip("triton", reason="Triton is not installed")
from seqpar.kernels.launch import Launch  # noqa: E402
from seqpar.kernels.lightning.backward import backward_triton  # noqa: E402
from seqpar.kernels.lightning.forward import (  # noqa: E402
    attend_triton,
    forward_triton,
    summary_triton,
)
from seqpar.kernels.lightning.step import step_triton  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_device(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if x is None else x.to(DEVICE) for name, x in inputs.items()}


def check(
    inputs: dict[str, Tensor | None],
    *,
    cu_seqlens: Tensor | None = None,
    dtype: torch.dtype,
    decay_grad_error: float | None = None,
) -> None:
    """Outputs, exit states and every gradient of the Triton path against autograd in fp64."""
    theirs = leaves(inputs)
    ref_o, ref_final = recurrent_attention(**theirs, cu_seqlens=cu_seqlens)
    generator = torch.Generator().manual_seed(1)
    do = torch.randn(ref_o.shape, generator=generator, dtype=torch.float64).to(dtype)
    dfinal = torch.randn(ref_final.shape, generator=generator)
    torch.autograd.backward([ref_o, ref_final], [do.double(), dfinal.double()])
    here = on_device(inputs)
    q, k, v, log_decay, initial = here.values()
    plan = plan_of(k, v, queries=q, log_decay=log_decay, cu_seqlens=cu_seqlens)
    o, final, states = forward_triton(plan, q, k, v, log_decay, initial, return_final=True)
    assert_close(o, ref_o, what="o", dtype=dtype)
    assert_close(final, ref_final, what="final_state", dtype=dtype, dim=0)
    grads = backward_triton(
        plan, (q, k, v, do.to(DEVICE)), log_decay, initial, dfinal.to(DEVICE),
        states=states, grad_states=None, decay_grad=True, entry_grad=True,
    )  # fmt: skip
    for name, grad in zip(theirs, grads, strict=True):
        reference = theirs[name].grad if theirs[name] is not None else None
        if reference is not None:
            dim = 0 if name == "initial_state" else 1
            assert grad is not None, name
            if name == "log_decay" and decay_grad_error is not None:
                assert relative_error(grad, reference) < decay_grad_error
            else:
                assert_close(grad, reference, what=f"d{name}", dtype=dtype, dim=dim)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_outputs_states_and_gradients(decay: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(decay=decay, batch=2, tokens=70, heads=2, dtype=dtype, value_dim=32)
    check(inputs, dtype=dtype)


@pytest.mark.parametrize("decay", DECAYS)
def test_packed_documents_in_several_segments(decay: str) -> None:
    lengths = (1, 33, 200, 31)
    inputs = make_inputs(
        decay=decay, batch=1, tokens=sum(lengths), heads=1, sequences=4, dtype=torch.float32
    )
    check(inputs, cu_seqlens=packed(lengths), dtype=torch.float32)


def test_head_dims_that_no_tile_fits() -> None:
    inputs = make_inputs(
        decay="fixed", batch=1, tokens=40, heads=2, key_dim=18, value_dim=35, dtype=torch.float32
    )
    check(inputs, dtype=torch.float32)


@pytest.mark.parametrize("decay", ["fixed", "token"])
def test_decays_that_underflow_within_a_chunk_stay_finite(decay: str) -> None:
    inputs = make_inputs(
        decay=decay, batch=1, tokens=200, heads=1, dtype=torch.float32, strongest=-60.0
    )
    # Where hardly anything crosses a token, its decay's gradient is a difference of large sums.
    check(inputs, dtype=torch.float32, decay_grad_error=1e-4)


@pytest.mark.parametrize("decay", ["fixed", "token"])
def test_a_log_decay_that_is_nan_stays_one(decay: str) -> None:
    """It is no reset: all that it decays and that is in reach is NaN, and nothing else is."""
    inputs = make_inputs(
        decay=decay, batch=1, tokens=400, heads=2, strongest=-0.02, dtype=torch.float32
    )
    q, k, v, log_decay, _ = on_device(inputs).values()
    at = 1 if decay == "fixed" else 7
    log_decay[(0,) if decay == "fixed" else (0, at, 0)] = float("nan")
    plan = plan_of(k, v, queries=q, log_decay=log_decay, cu_seqlens=None)
    assert plan.cut.segments.count > 1
    o, final, _ = forward_triton(plan, q, k, v, log_decay, None, return_final=True)
    assert o[0, at:, 0].isnan().all()
    assert final[0, 0].isnan().all()
    assert o[0, :at, 0].isfinite().all() or decay == "fixed"
    assert o[0, :, 1].isfinite().all()
    assert final[0, 1].isfinite().all()


def test_a_float16_state_may_exceed_the_range_of_float16() -> None:
    inputs = make_inputs(decay="none", batch=1, tokens=130, heads=1, dtype=torch.float16)
    inputs["initial_state"] *= 3e5
    inputs["q"] *= 1e-3
    q, k, v, log_decay, initial = on_device(inputs).values()
    plan = plan_of(k, v, queries=q, log_decay=log_decay, cu_seqlens=None)
    o, _, _ = forward_triton(plan, q, k, v, log_decay, initial, return_final=False)
    assert_close(o, recurrent_attention(**inputs)[0], what="o")


@pytest.mark.parametrize("decay", DECAYS)
def test_the_pieces_make_the_whole(decay: str) -> None:
    inputs = make_inputs(decay=decay, batch=1, tokens=280, heads=1, dtype=torch.float32)
    theirs = leaves(inputs)
    ref_o, ref_final = recurrent_attention(**theirs)
    q, k, v, log_decay, entry = on_device(inputs).values()
    plan = plan_of(k, v, queries=q, log_decay=log_decay, cu_seqlens=None)
    final, states = summary_triton(plan, k, v, log_decay, reverse=False)
    total = {"none": 0.0, "fixed": None, "token": None}[decay]
    if total is None:
        total = (log_decay * 280 if log_decay.ndim == 1 else log_decay.sum((0, 1))).double()
        total = total.exp()[:, None, None]
    else:
        total = 1.0
    assert_close(final.double() + total * entry, ref_final, what="exit", dim=0, dtype=q.dtype)
    o = attend_triton(plan, q, k, v, states, entry)
    assert_close(o, ref_o, what="o", dtype=q.dtype)
    do, dexit = torch.randn_like(o), torch.randn_like(entry)
    torch.autograd.backward([ref_o, ref_final], [do.double().cpu(), dexit.double().cpu()])
    _, grad_states = summary_triton(plan, q, do, log_decay, reverse=True)
    grads = backward_triton(
        plan, (q, k, v, do), log_decay, entry, dexit,
        states=states, grad_states=grad_states, decay_grad=True, entry_grad=True,
    )  # fmt: skip
    for name, grad in zip(theirs, grads, strict=True):
        if theirs[name] is not None and theirs[name].grad is not None:
            dim = 0 if name == "initial_state" else 1
            assert_close(grad, theirs[name].grad, what=f"d{name}", dtype=q.dtype, dim=dim)


@pytest.mark.parametrize("decay", DECAYS)
def test_decoding_steps(decay: str) -> None:
    inputs = make_inputs(decay=decay, tokens=3, dtype=torch.float32)
    q, k, v, log_decay, state = on_device(inputs).values()
    kept = state.clone()
    plan = plan_of(k, v, queries=q, log_decay=log_decay, cu_seqlens=None)
    o, new_state = step_triton(plan, q, k, v, state, log_decay)
    ref_o, ref_state = recurrent_attention(**inputs)
    assert_close(o, ref_o, what="o")
    assert_close(new_state, ref_state, what="state", dim=0)
    assert torch.equal(state, kept)


@pytest.mark.gpu
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dims", [(128, 128), (64, 64), (256, 256), (96, 80), (20, 128)])
def test_bfloat16_at_real_sizes(decay: str, dims: tuple[int, int]) -> None:
    lengths = (5, 700, 1, 1294)
    inputs = make_inputs(
        decay=decay, batch=1, tokens=2000, heads=2, key_dim=dims[0], value_dim=dims[1],
        sequences=4, dtype=torch.bfloat16,
    )  # fmt: skip
    check(inputs, cu_seqlens=packed(lengths), dtype=torch.bfloat16, decay_grad_error=5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("lengths", [(1,), (64,), (65, 1, 1, 63, 128, 2), (1500, 1, 37)])
def test_by_hand_at_awkward_lengths(decay: str, learns: bool, lengths: tuple[int, ...]) -> None:
    """Documents of one token, part-filled chunks, one and several segments, states in and out."""
    inputs = make_inputs(
        decay=decay, batch=1, tokens=sum(lengths), heads=3, key_dim=128, value_dim=128,
        sequences=len(lengths), dtype=torch.bfloat16,
    )  # fmt: skip
    cu_seqlens = packed(lengths)
    ours = leaves({name: x if x is None else x.cuda() for name, x in inputs.items()})
    theirs = leaves(inputs)
    if decay == "token" and not learns:
        ours["log_decay"].requires_grad_(False)
        theirs["log_decay"].requires_grad_(False)
    found = outputs_and_gradients(ours, cu_seqlens)
    o, final = recurrent_attention(**theirs, cu_seqlens=cu_seqlens)
    wanted = {name: x for name, x in theirs.items() if x is not None and x.requires_grad}
    do, dfinal = (x.cpu().double() for x in found[:2])
    grads = torch.autograd.grad([o, final], list(wanted.values()), [do, dfinal])
    assert_close(found[0], o, what="o", dtype=torch.bfloat16)
    assert_close(found[1], final, what="final", dtype=torch.bfloat16, dim=0)
    for name, mine, reference in zip(wanted, found[2:], grads, strict=True):
        if name == "log_decay":
            assert relative_error(mine, reference) < 5e-3
            continue
        dim = 0 if name == "initial_state" else 1
        assert_close(mine, reference, what=f"d{name}", dtype=torch.bfloat16, dim=dim)


@pytest.mark.gpu
@pytest.mark.parametrize("decay", DECAYS)
def test_which_pass_runs_by_hand(decay: str) -> None:
    """One pass, and one with sums for the decays' gradient; other head dims in Triton."""
    named = {}
    for value_dim in (64, 128):
        ours = public_case(decay, value_dim)
        outputs_and_gradients(ours)
        launches = [x for x in plan_for(ours).cut.launches.values() if isinstance(x, Launch)]
        named[value_dim] = {launch._kernel.fn.__name__ for launch in launches}
    groups = {"output_pass_groups_kernel"}
    learning = {"output_pass_sums_kernel"}
    assert named[128] >= groups
    assert not named[64] & (groups | learning)
    assert (named[128] >= learning) == (decay == "token")
    assert "output_pass_kernel" not in named[128]
    assert "output_pass_kernel" in named[64]


@pytest.mark.gpu
def test_the_public_function_on_a_gpu() -> None:
    inputs = make_inputs(decay="token", tokens=500, key_dim=64, value_dim=64, dtype=torch.float32)
    here = {name: x.cuda().requires_grad_() for name, x in inputs.items()}
    theirs = leaves(inputs)
    o, final = lightning_attention(**here, return_final_state=True)
    ref_o, ref_final = recurrent_attention(**theirs)
    (o.square().sum() + final.sum()).backward()
    (ref_o.square().sum() + ref_final.sum()).backward()
    for name, leaf in here.items():
        dim = 0 if name == "initial_state" else 1
        assert_close(leaf.grad, theirs[name].grad, what=name, dim=dim)


@pytest.mark.gpu
@pytest.mark.parametrize("decay", DECAYS)
def test_the_public_function_on_a_gpu_without_an_initial_state(decay: str) -> None:
    inputs = make_inputs(decay=decay, tokens=500, key_dim=64, value_dim=64, dtype=torch.float32)
    inputs["initial_state"] = None
    here = {name: x if x is None else x.cuda() for name, x in inputs.items()}
    ours, theirs = leaves(here), leaves(inputs)
    lightning_attention(**ours)[0].square().sum().backward()
    recurrent_attention(**theirs)[0].square().sum().backward()
    for name, leaf in ours.items():
        if leaf is not None and leaf.requires_grad:
            assert_close(leaf.grad, theirs[name].grad, what=name)


def outputs_and_gradients(
    ours: dict[str, Tensor | None], cu_seqlens: Tensor | None = None
) -> tuple[Tensor, ...]:
    """o, the final state and every gradient, through the public function."""
    o, final = lightning_attention(**ours, cu_seqlens=cu_seqlens, return_final_state=True)
    wanted = [x for x in ours.values() if x is not None and x.requires_grad]
    grads = torch.autograd.grad([o, final], wanted, [o.detach(), final.detach()])
    return (o.detach(), final.detach(), *grads)


def public_case(decay: str, value_dim: int = 128) -> dict[str, Tensor | None]:
    """The pass by hand takes value dims of 128, the one in Triton the others."""
    inputs = make_inputs(
        decay=decay, tokens=3000, key_dim=128, value_dim=value_dim, dtype=torch.bfloat16
    )
    return leaves({name: x if x is None else x.cuda() for name, x in inputs.items()})


def plan_for(inputs: dict[str, Tensor | None]) -> Plan:
    return plan_of(
        inputs["k"], inputs["v"], queries=inputs["q"], log_decay=inputs["log_decay"],
        cu_seqlens=None,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("decay", DECAYS)
def test_the_pass_in_triton_where_there_is_one_by_hand(
    decay: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "runs_by_hand", lambda _: False)
    lengths = (5, 700, 1, 1295)
    inputs = make_inputs(
        decay=decay, batch=1, tokens=2001, heads=2, key_dim=128, value_dim=128, sequences=4,
        dtype=torch.bfloat16,
    )  # fmt: skip
    check(inputs, cu_seqlens=packed(lengths), dtype=torch.bfloat16, decay_grad_error=5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("value_dim", [64, 128])
@pytest.mark.parametrize("strongest", [-0.01, -0.1, -0.7])
def test_errors_of_the_decays_gradient_do_not_add_up_along_a_sequence(
    value_dim: int, strongest: float
) -> None:
    inputs = make_inputs(
        decay="token", batch=1, tokens=20000, heads=4, key_dim=128, value_dim=value_dim,
        dtype=torch.bfloat16, strongest=strongest,
    )  # fmt: skip
    ours = leaves({name: x if x is None else x.cuda() for name, x in inputs.items()})
    theirs = leaves({n: x if x is None else x.double().cuda() for n, x in inputs.items()})
    do = torch.randn(1, 20000, 4, value_dim, device="cuda", dtype=torch.bfloat16)
    for given in (ours, theirs):
        o, _ = lightning_attention(**given)
        o.backward(do.to(o.dtype))
    assert relative_error(ours["log_decay"].grad, theirs["log_decay"].grad) < 3e-3


def test_decays_learn_where_a_token_takes_nearly_all_from_itself() -> None:
    """That part must not pass through the sums: its rounding was 2e-4 of the gradient here."""
    inputs = make_inputs(decay="token", tokens=200, heads=1, key_dim=64, value_dim=64)
    q, k, v, log_decay, _ = (None if x is None else x.float() for x in inputs.values())
    assert log_decay is not None
    log_decay = -5.0 - 0.5 * torch.rand(log_decay.shape, generator=torch.Generator().manual_seed(2))
    theirs = [x.double().requires_grad_() for x in (q, k, v, log_decay)]
    ref_o, _ = recurrent_attention(*theirs[:3], log_decay=theirs[3])
    do = torch.randn(ref_o.shape, generator=torch.Generator().manual_seed(1))
    (expected,) = torch.autograd.grad(ref_o, theirs[3:], do.double())
    q, k, v, do, log_decay = (x.to(DEVICE) for x in (q, k, v, do, log_decay))
    plan = plan_of(k, v, queries=q, log_decay=log_decay, cu_seqlens=None)
    found = backward_triton(
        plan, (q, k, v, do), log_decay, None, None,
        states=None, grad_states=None, decay_grad=True, entry_grad=False,
    )  # fmt: skip
    assert found.log_decay is not None
    assert relative_error(found.log_decay.cpu(), expected) < 2e-5
