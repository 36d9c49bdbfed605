"""The public functions in Triton, whole and in halves, against float64: interpreted, or on a GPU.

Every kind of decay, documents of awkward lengths, states in and out with gradients through both,
head dims that fit no tile; then resets, and decays that underflow.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
from seqpar.kernels.lightning import (
    attend,
    attend_backward,
    forward,
    key_value_summary,
    lightning_attention,
    query_grad_summary,
)
from seqpar.kernels.lightning.reference import recurrent_attention
from tests.kernels.test_lightning import DECAYS, leaves, make_inputs, packed
from tests.tolerances import assert_close, relative_error

LENGTHS = (1, 33, 300, 64)
"""With one head the third is cut, interpreted or not."""
Results = dict[str, Tensor]
Run = Callable[..., Results]


def random_like(*tensors: Tensor) -> list[Tensor]:
    """Normal numbers on the CPU, the same every time, of the tensors' shapes and dtypes."""
    numbers = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=numbers).to(x.dtype) for x in tensors]


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
    decay: str, documents: bool, dims: tuple[int, int], run: Run, triton_device: str
) -> None:
    check(run, triton_device, decay, dims, torch.float32, documents=documents)


@pytest.mark.parametrize("run", [whole, in_halves])
@pytest.mark.parametrize("decay", DECAYS)
def test_sequences_in_many_segments(
    decay: str, run: Run, triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What enters segments is summed by a launch of its own there; here from two segments on."""
    monkeypatch.setattr(forward, "_MOST_IN_LINE", 1)
    check(run, triton_device, decay, (16, 64), torch.float32, documents=True)


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
    decay: str, dims: tuple[int, int], dtype: torch.dtype, run: Run, triton_device: str
) -> None:
    check(run, triton_device, decay, dims, dtype, documents=True)


def check(
    run: Run, device: str, decay: str, dims: tuple[int, int], dtype: torch.dtype,
    *, documents: bool,
) -> None:  # fmt: skip
    inputs = make_inputs(
        decay=decay, key_dim=dims[0], value_dim=dims[1], dtype=dtype, strongest=-0.02,
        **{"batch": 1, "tokens": sum(LENGTHS), "heads": 1, "sequences": len(LENGTHS)}
        if documents else {"batch": 2, "tokens": 130, "heads": 2},
    )  # fmt: skip
    if decay == "fixed":
        inputs["log_decay"] -= 0.01
    cu_seqlens = packed(LENGTHS) if documents else None
    do, dexit = random_like(inputs["v"], inputs["initial_state"])
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
def test_resets_in_triton(share: float, run: Run, triton_device: str) -> None:
    """Log decays of -inf. Sums within a chunk are float32, so each reset costs some accuracy."""
    inputs = make_inputs(decay="token", tokens=200, strongest=-0.05, dtype=torch.float32)
    numbers = torch.Generator().manual_seed(3)
    resets = torch.rand(inputs["log_decay"].shape, generator=numbers) < share
    inputs["log_decay"][resets] = -torch.inf
    do, dexit = random_like(inputs["v"], inputs["initial_state"])
    references = expected(inputs, None, do, dexit)
    here = {name: x.to(triton_device) for name, x in inputs.items()}
    found = run(here, None, do.to(triton_device), dexit.to(triton_device))
    for name, reference in references.items():
        if name == "dlog_decay":  # nothing is learned from a reset
            found[name], reference = found[name].cpu()[~resets], reference[~resets]
        most = 1e-4 if name == "dlog_decay" else 3e-5
        assert relative_error(found[name], reference) < most, name


@pytest.mark.parametrize("decay", ["fixed", "token"])
def test_what_segments_leave_out_is_decayed_away(decay: str, triton_device: str) -> None:
    """Decays that take some hundred tokens to get there, in segments longer than that; those per
    token strong in one half of each segment and weak in the other.
    """
    inputs = make_inputs(
        decay=decay, batch=1, tokens=1500, heads=2, key_dim=8, value_dim=8, dtype=torch.float32,
    )  # fmt: skip
    inputs["log_decay"] = torch.tensor([-0.04, -0.08])
    if decay == "token":
        is_strong = torch.arange(1500) % 500 < 250
        strength = torch.where(is_strong, -0.5, -0.01)
        inputs["log_decay"] = torch.stack([strength, strength.flip(0)], -1)[None]
    do, dexit = random_like(inputs["v"], inputs["initial_state"])
    references = expected(inputs, None, do, dexit)
    here = {name: x.to(triton_device) for name, x in inputs.items()}
    found = in_halves(here, None, do.to(triton_device), dexit.to(triton_device))
    for name in ("o", "exit", "dq", "dk", "dv", "dinitial_state"):
        assert relative_error(found[name], references[name]) < 2e-6, name


@pytest.mark.parametrize("decay", DECAYS)
def test_nan_in_one_document_stays_there(decay: str, triton_device: str) -> None:
    """Part-filled chunks reach into the document behind, and must take nothing from it."""
    lengths, dims = (40, 50, 33), (64, 64)
    if triton_device == "cuda":  # by hand
        lengths, dims = (700, 90, 333), (128, 128)
    inputs = make_inputs(
        decay=decay, batch=1, tokens=sum(lengths), heads=2, key_dim=dims[0], value_dim=dims[1],
        sequences=3, dtype=torch.bfloat16 if triton_device == "cuda" else torch.float32,
    )  # fmt: skip
    here = {name: x if x is None else x.to(triton_device) for name, x in inputs.items()}
    broken = slice(lengths[0], lengths[0] + lengths[1])
    do, dexit = (x.to(triton_device) for x in random_like(inputs["v"], inputs["initial_state"]))
    good = whole(here, packed(lengths), do, dexit)
    for x in (here["q"], here["k"], here["v"], do):
        x[:, broken] = torch.nan
    found = whole(here, packed(lengths), do, dexit)
    for name, before in good.items():
        by_state = name in ("exit", "dinitial_state")
        rows = [slice(0, 1), slice(2, 3)] if by_state else [
            slice(0, broken.start), slice(broken.stop, None)]  # fmt: skip
        for row in rows:
            of = (row,) if by_state else (slice(None), row)
            assert torch.equal(found[name][of], before[of]), name
        assert found[name].isnan().any()


@pytest.mark.parametrize("run", [whole, in_halves])
def test_the_decays_gradient_cancels_in_half_precision(run: Run, triton_device: str) -> None:
    """States multiplied as one number of half precision, not two, gave three times this error."""
    inputs = make_inputs(
        decay="token", batch=1, tokens=800, heads=1, key_dim=16, value_dim=16,
        dtype=torch.float16, strongest=-0.1,
    )  # fmt: skip
    do, dexit = random_like(inputs["v"], inputs["initial_state"])
    reference = expected(inputs, None, do, dexit)["dlog_decay"]
    here = {name: x.to(triton_device) for name, x in inputs.items()}
    found = run(here, None, do.to(triton_device), dexit.to(triton_device))
    assert relative_error(found["dlog_decay"], reference) < 3e-4
