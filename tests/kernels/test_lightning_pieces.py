"""The public functions in Triton, whole and in halves, against float64: interpreted, or on a GPU.

Every kind of decay, documents of awkward lengths, states in and out with gradients through both,
head dims that fit no tile; then resets, and decays that underflow.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
from seqpar.kernels.lightning import (
    attend,
    attend_backward,
    key_value_summary,
    lightning_attention,
    query_grad_summary,
)
from seqpar.kernels.lightning.reference import recurrent_attention
from tests.kernels.test_lightning import DECAYS, leaves, make_inputs, packed
from tests.tolerances import assert_close, relative_error

LENGTHS = (1, 33, 170, 64)
Results = dict[str, Tensor]


def expected(
    inputs: dict[str, Tensor | None], cu_seqlens: Tensor | None, do: Tensor, dexit: Tensor
) -> Results:
    """Outputs, exit states and gradients in float64."""
    theirs = leaves(inputs)
    o, final = recurrent_attention(**theirs, cu_seqlens=cu_seqlens)
    torch.autograd.backward([o, final], [do.double(), dexit.double()])
    grads = {f"d{name}": x.grad for name, x in theirs.items() if x is not None}
    return {"o": o, "exit": final, **{name: x for name, x in grads.items() if x is not None}}


def whole(
    inputs: dict[str, Tensor | None], cu_seqlens: Tensor | None, do: Tensor, dexit: Tensor
) -> Results:
    """By the one function, and autograd."""
    ours = leaves(inputs)
    o, final = lightning_attention(**ours, cu_seqlens=cu_seqlens, return_final_state=True)
    torch.autograd.backward([o, final], [do, dexit])
    grads = {f"d{name}": x.grad for name, x in ours.items() if x is not None}
    return {"o": o, "exit": final, **{name: x for name, x in grads.items() if x is not None}}


def in_halves(
    inputs: dict[str, Tensor | None], cu_seqlens: Tensor | None, do: Tensor, dexit: Tensor
) -> Results:
    """By the pieces, states put together as a caller between them would."""
    q, k, v, log_decay, entry = inputs.values()
    options = {"log_decay": log_decay, "cu_seqlens": cu_seqlens}
    summary = key_value_summary(k, v, **options)
    o = attend(q, k, v, summary, **options, entry_state=entry)
    grad_summary = query_grad_summary(q, do, **options)
    dq, dk, dv, dlog_decay = attend_backward(
        q, k, v, do, summary, grad_summary, **options, entry_state=entry, exit_state_grad=dexit
    )
    through, back = (x.log_transition.exp()[..., None, None] for x in (summary, grad_summary))
    found = {
        "o": o, "exit": summary.final_state + through * entry, "dq": dq, "dk": dk, "dv": dv,
        "dinitial_state": grad_summary.final_state + back * dexit,
    }  # fmt: skip
    return found if dlog_decay is None else {**found, "dlog_decay": dlog_decay}


@pytest.mark.parametrize("run", [whole, in_halves])
@pytest.mark.parametrize("dims", [(16, 64), (20, 35)], ids=["whole", "padded"])
@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("decay", DECAYS)
def test_public_functions_in_triton(
    decay: str, documents: bool, dims: tuple[int, int], run: object, triton_device: str
) -> None:
    check(run, triton_device, decay, dims, torch.float32, documents=documents)


@pytest.mark.gpu
@pytest.mark.parametrize("run", [whole, in_halves])
@pytest.mark.parametrize(
    ("dims", "dtype"),
    [
        ((128, 128), torch.bfloat16),
        ((16, 256), torch.float16),
        ((200, 72), torch.float16),
        ((256, 256), torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("decay", DECAYS)
def test_other_dims_and_dtypes_on_a_gpu(
    decay: str, dims: tuple[int, int], dtype: torch.dtype, run: object, triton_device: str
) -> None:
    check(run, triton_device, decay, dims, dtype, documents=True)


def check(
    run: object, device: str, decay: str, dims: tuple[int, int], dtype: torch.dtype,
    *, documents: bool,
) -> None:  # fmt: skip
    inputs = make_inputs(
        decay=decay, batch=1 if documents else 2, tokens=sum(LENGTHS), heads=2, key_dim=dims[0],
        value_dim=dims[1], sequences=len(LENGTHS) if documents else None, dtype=dtype,
    )  # fmt: skip
    cu_seqlens = packed(LENGTHS) if documents else None
    do = torch.randn(inputs["v"].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    dexit = torch.randn(inputs["initial_state"].shape, generator=torch.Generator().manual_seed(2))
    references = expected(inputs, cu_seqlens, do, dexit)
    here = {name: None if x is None else x.to(device) for name, x in inputs.items()}
    found = run(here, cu_seqlens, do.to(device), dexit.to(device))
    assert found.keys() == references.keys()
    for name, reference in references.items():
        if name == "dlog_decay" and dtype != torch.float32:
            assert relative_error(found[name], reference) < 5e-3
            continue
        dim = 0 if name in ("exit", "dinitial_state") else 1
        assert_close(found[name], reference, what=name, dtype=dtype, dim=dim)


@pytest.mark.parametrize("run", [whole, in_halves])
@pytest.mark.parametrize("share", [0.03, 0.5])
def test_resets_in_triton(share: float, run: object, triton_device: str) -> None:
    """Log decays of -inf. Sums within a chunk are float32, so each reset costs some accuracy."""
    inputs = make_inputs(decay="token", tokens=200, strongest=-0.05, dtype=torch.float32)
    numbers = torch.Generator().manual_seed(3)
    resets = torch.rand(inputs["log_decay"].shape, generator=numbers) < share
    inputs["log_decay"][resets] = -torch.inf
    do, dexit = torch.randn(inputs["v"].shape), torch.randn(inputs["initial_state"].shape)
    references = expected(inputs, None, do, dexit)
    here = {name: x.to(triton_device) for name, x in inputs.items()}
    found = run(here, None, do.to(triton_device), dexit.to(triton_device))
    for name, reference in references.items():
        if name == "dlog_decay":  # nothing is learned from a reset
            found[name], reference = found[name].cpu()[~resets], reference[~resets]
        assert relative_error(found[name], reference) < 3e-5, name
