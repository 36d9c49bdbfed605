"""Lightning attention on CPU against the float64 references: outputs, states, every gradient."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from seqpar.errors import KernelInputError
from seqpar.kernels.lightning import (
    attend,
    attend_backward,
    key_value_summary,
    lightning_attention,
    lightning_step,
    query_grad,
    query_grad_summary,
)
from seqpar.kernels.lightning.reference import quadratic_attention, recurrent_attention
from tests.tolerances import assert_close, relative_error

DECAYS = ("none", "fixed", "token")
LENGTHS = (1, 63, 64, 65, 200)


def make_inputs(
    *,
    decay: str,
    batch: int = 2,
    tokens: int = 150,
    heads: int = 3,
    key_dim: int = 16,
    value_dim: int = 24,
    dtype: torch.dtype = torch.float64,
    sequences: int | None = None,
    seed: int = 0,
    strongest: float = -0.7,
) -> dict[str, Tensor | None]:
    """q, k, v, log_decay and initial_state; decays reach from 1 to exp(strongest)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    exact = dtype == torch.float64
    float_dtype = torch.float64 if exact else torch.float32
    log_decay: Tensor | None = None
    if decay == "fixed":
        log_decay = torch.linspace(0.0, strongest, heads, dtype=float_dtype)
    elif decay == "token":
        uniform = torch.rand(batch, tokens, heads, generator=generator, dtype=torch.float64)
        log_decay = (uniform * strongest).to(float_dtype)
    states = batch if sequences is None else sequences
    return {
        "q": (normal(batch, tokens, heads, key_dim) * key_dim**-0.5).to(dtype),
        "k": normal(batch, tokens, heads, key_dim).to(dtype),
        "v": normal(batch, tokens, heads, value_dim).to(dtype),
        "log_decay": log_decay,
        "initial_state": normal(states, heads, key_dim, value_dim).to(float_dtype),
    }


def packed(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def leaves(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Copies that ask for gradients, in float64 for the reference."""
    out: dict[str, Tensor | None] = {}
    for name, value in inputs.items():
        constant = name == "log_decay" and value is not None and value.ndim == 1
        out[name] = None if value is None else value.detach().clone().requires_grad_(not constant)
    return out


def check_against_reference(
    inputs: dict[str, Tensor | None], *, cu_seqlens: Tensor | None = None, dtype: torch.dtype
) -> None:
    """Outputs, final states and every gradient of the public function against autograd in fp64."""
    ours, theirs = leaves(inputs), leaves(inputs)
    o, final = lightning_attention(**ours, cu_seqlens=cu_seqlens, return_final_state=True)
    ref_o, ref_final = recurrent_attention(**theirs, cu_seqlens=cu_seqlens)
    assert o.dtype == inputs["v"].dtype
    assert final is not None
    assert_close(o, ref_o, what="o", dtype=dtype)
    assert_close(final, ref_final, what="final_state", dtype=dtype, dim=0)
    generator = torch.Generator().manual_seed(1)
    do = torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype)
    dfinal = torch.randn(final.shape, generator=generator, dtype=torch.float64).to(final.dtype)
    torch.autograd.backward([o, final], [do, dfinal])
    torch.autograd.backward([ref_o, ref_final], [do.double(), dfinal.double()])
    for name, leaf in ours.items():
        if leaf is not None and leaf.requires_grad:
            dim = 0 if name == "initial_state" else 1
            assert leaf.grad is not None
            assert_close(leaf.grad, theirs[name].grad, what=f"d{name}", dtype=dtype, dim=dim)


@pytest.mark.parametrize("decay", DECAYS)
def test_the_two_references_agree(decay: str) -> None:
    inputs = make_inputs(decay=decay, batch=1, tokens=40, sequences=3, strongest=-3.0)
    cu_seqlens = packed((1, 30, 9))
    one = recurrent_attention(**inputs, cu_seqlens=cu_seqlens)
    other = quadratic_attention(**inputs, cu_seqlens=cu_seqlens)
    for a, b in zip(one, other, strict=True):
        assert relative_error(a, b) < 1e-13


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_outputs_states_and_gradients(decay: str, tokens: int) -> None:
    check_against_reference(make_inputs(decay=decay, tokens=tokens), dtype=torch.float64)


@pytest.mark.parametrize("decay", DECAYS)
def test_gradients_without_an_initial_state(decay: str) -> None:
    inputs = make_inputs(decay=decay, tokens=90)
    inputs["initial_state"] = None
    check_against_reference(inputs, dtype=torch.float64)


@pytest.mark.parametrize("decay", DECAYS)
def test_packed_documents(decay: str) -> None:
    lengths = (1, 5, 64, 70, 129, 2)
    inputs = make_inputs(decay=decay, batch=1, tokens=sum(lengths), sequences=len(lengths))
    check_against_reference(inputs, cu_seqlens=packed(lengths), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", DECAYS)
def test_lower_precisions(decay: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(decay=decay, dtype=dtype, tokens=130)
    check_against_reference(inputs, dtype=dtype)


@pytest.mark.parametrize("decay", ["fixed", "token"])
def test_decays_that_underflow_within_a_chunk_stay_finite(decay: str) -> None:
    check_against_reference(make_inputs(decay=decay, strongest=-60.0), dtype=torch.float64)


def test_a_log_decay_of_minus_infinity_resets_the_state() -> None:
    inputs = make_inputs(decay="token", batch=1, tokens=100, dtype=torch.float32)
    reset = inputs["log_decay"].clone()
    reset[:, 40] = -torch.inf
    o, _ = lightning_attention(**{**inputs, "log_decay": reset})
    tail = {n: inputs[n][:, 40:] for n in ("q", "k", "v", "log_decay")}
    alone, _ = lightning_attention(**tail)
    assert relative_error(o[:, 40:], alone) < 5e-6


@pytest.mark.parametrize("num_resets", [8, 48])
def test_resets_within_a_chunk_cost_no_accuracy(num_resets: int) -> None:
    inputs = make_inputs(decay="token", tokens=64, strongest=-0.02, dtype=torch.float32)
    generator = torch.Generator().manual_seed(2)
    at = torch.randperm(64, generator=generator)[:num_resets]
    inputs["log_decay"][:, at] = -float("inf")
    ours, theirs = leaves(inputs), leaves(inputs)
    o, final = lightning_attention(**ours, return_final_state=True)
    ref_o, ref_final = recurrent_attention(**theirs)
    do = torch.randn(o.shape, generator=generator)
    torch.autograd.backward([o, final], [do, final.detach()])
    torch.autograd.backward([ref_o, ref_final], [do.double(), final.detach().double()])
    assert relative_error(o, ref_o) < 1e-6
    assert relative_error(final, ref_final) < 1e-6
    for name in ("q", "k", "v"):
        assert relative_error(ours[name].grad, theirs[name].grad) < 1e-6, name


@pytest.mark.parametrize("decay", DECAYS)
def test_autocast_does_not_reach_inside(decay: str) -> None:
    inputs = make_inputs(decay=decay, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        check_against_reference(inputs, dtype=torch.float32)


def test_a_later_token_changes_nothing_before_it() -> None:
    inputs = make_inputs(decay="token", batch=1)
    changed = {**inputs, "k": inputs["k"].clone(), "v": inputs["v"].clone()}
    changed["k"][:, 100] = 7.0
    changed["v"][:, 100] = -5.0
    before, after = lightning_attention(**inputs)[0], lightning_attention(**changed)[0]
    assert torch.equal(before[:, :100], after[:, :100])
    assert not torch.allclose(before[:, 100:], after[:, 100:])


@pytest.mark.parametrize("packed_stream", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
def test_the_pieces_make_the_whole(decay: str, packed_stream: bool) -> None:
    lengths = (3, 100, 47)
    cu_seqlens = packed(lengths) if packed_stream else None
    batch = 1 if packed_stream else 2
    inputs = make_inputs(decay=decay, batch=batch, sequences=3 if packed_stream else None)
    entry = inputs.pop("initial_state")
    q, k, v, log_decay = (inputs[n] for n in ("q", "k", "v", "log_decay"))
    options = {"log_decay": log_decay, "cu_seqlens": cu_seqlens}
    ours = leaves({**inputs, "initial_state": entry})
    ref_o, ref_final = recurrent_attention(**ours, cu_seqlens=cu_seqlens)
    summary = key_value_summary(k, v, **options)
    through = summary.log_transition.exp()[..., None, None]
    assert_close(summary.final_state + through * entry, ref_final, what="exit state", dim=0)
    o = attend(q, k, v, summary, **options, entry_state=entry)
    assert_close(o, ref_o, what="o")
    do, dexit = torch.randn_like(o), torch.randn_like(entry)
    torch.autograd.backward([ref_o, ref_final], [do, dexit])
    grad_summary = query_grad_summary(q, do, **options)
    dentry = grad_summary.final_state + grad_summary.log_transition.exp()[..., None, None] * dexit
    assert_close(dentry, ours["initial_state"].grad, what="dentry", dim=0)
    grads = attend_backward(
        q, k, v, do, summary, grad_summary, **options, entry_state=entry, exit_state_grad=dexit
    )
    for name, grad in zip(("q", "k", "v", "log_decay"), grads, strict=True):
        if name != "log_decay" or decay == "token":
            assert_close(grad, ours[name].grad, what=f"d{name}")
    assert (grads[3] is None) == (decay != "token")


@pytest.mark.parametrize("decay", DECAYS)
def test_decoding_continues_from_a_prefill(decay: str) -> None:
    inputs = make_inputs(decay=decay, tokens=70, dtype=torch.float32)
    whole, final = lightning_attention(**inputs, return_final_state=True)
    per_token = decay == "token"

    def part(start: int, stop: int) -> dict[str, Tensor | None]:
        cut = {n: inputs[n][:, start:stop] for n in ("q", "k", "v")}
        log_decay = inputs["log_decay"]
        return {**cut, "log_decay": log_decay[:, start:stop] if per_token else log_decay}

    _, state = lightning_attention(
        **part(0, 66), initial_state=inputs["initial_state"], return_final_state=True
    )
    with torch.autocast("cpu", torch.bfloat16):
        o_one, state = lightning_step(**part(66, 67), state=state)
    o_few, state = lightning_step(**part(67, 70), state=state)
    assert_close(torch.cat([o_one, o_few], 1), whole[:, 66:], what="decoded")
    assert_close(state, final, what="state", dim=0)


def test_nothing_in_is_nothing_out() -> None:
    inputs = make_inputs(decay="token", tokens=0)
    o, final = lightning_attention(**inputs, return_final_state=True)
    assert o.shape == inputs["v"].shape
    assert torch.equal(final, inputs["initial_state"])
    inputs = make_inputs(decay="token", tokens=0, batch=1, sequences=0)
    o, final = lightning_attention(
        **inputs, cu_seqlens=torch.zeros(1, dtype=torch.int32), return_final_state=True
    )
    assert final.shape[0] == 0


BAD = {
    "keys of another shape": {"k": torch.zeros(1, 8, 2, 5)},
    "fewer tokens in v": {"v": torch.zeros(1, 7, 2, 4)},
    "key dim over 256": {"q": torch.zeros(1, 8, 2, 300), "k": torch.zeros(1, 8, 2, 300)},
    "mixed dtypes": {"v": torch.zeros(1, 8, 2, 4, dtype=torch.bfloat16)},
    "integers": {n: torch.zeros(1, 8, 2, 4, dtype=torch.int32) for n in "qkv"},
    "three dims": {n: torch.zeros(8, 2, 4) for n in "qkv"},
    "another device": {"v": torch.zeros(1, 8, 2, 4, device="meta")},
    "decay of another shape": {"log_decay": torch.zeros(3)},
    "decay in bfloat16": {"log_decay": torch.zeros(2, dtype=torch.bfloat16)},
    "a decay that is no logarithm": {"log_decay": torch.tensor([-0.1, 0.9])},
    "a token's decay that grows": {"log_decay": torch.full((1, 8, 2), 1e-3)},
    "a fixed decay that learns": {"log_decay": torch.zeros(2, requires_grad=True)},
    "bounds not from 0": {"cu_seqlens": torch.tensor([1, 8], dtype=torch.int32)},
    "bounds not to T": {"cu_seqlens": torch.tensor([0, 7], dtype=torch.int32)},
    "bounds that run back": {"cu_seqlens": torch.tensor([0, 5, 3, 8], dtype=torch.int32)},
    "an empty document": {"cu_seqlens": torch.tensor([0, 3, 3, 8], dtype=torch.int32)},
    "float bounds": {"cu_seqlens": torch.tensor([0.0, 8.0])},
    "packed rows": {
        **{n: torch.zeros(2, 8, 2, 4) for n in "qkv"},
        "cu_seqlens": torch.tensor([0, 8], dtype=torch.int32),
    },
    "no bounds": {"cu_seqlens": torch.zeros(0, dtype=torch.int32)},
    "a state for other heads": {"initial_state": torch.zeros(1, 3, 4, 4)},
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused(what: str) -> None:
    good = {n: torch.zeros(1, 8, 2, 4) for n in "qkv"}
    with pytest.raises(KernelInputError):
        lightning_attention(**{**good, **BAD[what]})


def test_pieces_of_other_inputs_are_refused() -> None:
    q, k, v = (torch.zeros(1, 8, 2, 4) for _ in range(3))
    decay = torch.tensor([-0.1, -0.2])
    bounds = torch.tensor([0, 8], dtype=torch.int32)
    half = [x.bfloat16() for x in (q, k, v)]
    others = {
        "tokens is 6, theirs is 8": ([x[:, :6] for x in (q, k, v)], {"log_decay": decay}),
        "decay_dims is 0, theirs is 1": ([q, k, v], {}),
        "dtype is torch.bfloat16": (half, {"log_decay": decay}),
        "bounds is": ([q, k, v], {"log_decay": decay, "cu_seqlens": bounds}),
    }
    good = key_value_summary(k, v, log_decay=decay)
    good_grad = query_grad_summary(q, v, log_decay=decay)
    for words, (other, options) in others.items():
        summary = key_value_summary(*other[1:], **options)
        grad_summary = query_grad_summary(other[0], other[2], **options)
        with pytest.raises(KernelInputError, match=words):
            attend(q, k, v, summary, log_decay=decay)
        with pytest.raises(KernelInputError, match=words):
            query_grad(q, k, v, v, summary, log_decay=decay)
        with pytest.raises(KernelInputError, match=words):
            attend_backward(q, k, v, v, summary, good_grad, log_decay=decay)
        with pytest.raises(KernelInputError, match=words):
            attend_backward(q, k, v, v, good, grad_summary, log_decay=decay)
    with pytest.raises(KernelInputError, match="entry_state has shape"):
        query_grad(q, k, v, v, good, log_decay=decay, entry_state=torch.zeros(1, 2, 4, 5))


def test_no_tokens_decay_nothing() -> None:
    k = torch.zeros(2, 0, 2, 4)
    summary = key_value_summary(k, k, log_decay=torch.tensor([-torch.inf, -1.0]))
    assert not summary.log_transition.any()


def test_the_example_of_the_page_runs() -> None:
    page = Path(__file__).parents[2] / "docs" / "lightning.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    inputs = make_inputs(decay="token")
    del inputs["initial_state"]
    made = dict(inputs)
    exec(block, made)
    o, state = lightning_attention(**inputs, return_final_state=True)
    assert torch.equal(made["o"], o)
    assert torch.equal(made["state"], state)
