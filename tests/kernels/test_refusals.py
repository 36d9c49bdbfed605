"""Every public function of the kernels refuses what it cannot take, in one sentence that helps."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from seqpar.errors import KernelInputError
from seqpar.kernels.lightning import (
    DecodingState,
    attend,
    attend_backward,
    key_value_summary,
    lightning_attention,
    lightning_step,
    query_grad,
    query_grad_summary,
)
from seqpar.kernels.merge_lse import merge_lse

Function = Callable[..., Any]

DECAY = torch.tensor([-0.1, -0.2])
Q, K = torch.ones(1, 8, 2, 4), torch.ones(1, 8, 2, 4)
V, DO = torch.ones(1, 8, 2, 6), torch.ones(1, 8, 2, 6)
STATE = torch.ones(1, 2, 4, 6)
SUMMARY = key_value_summary(K, V, log_decay=DECAY)
GRAD_SUMMARY = query_grad_summary(Q, DO, log_decay=DECAY)
LSE = torch.zeros(1, 8, 2)


def decoding_state_step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor | None
) -> Tensor:
    """Made and carried on: what does not fit is refused by one or the other."""
    return DecodingState(state, dtype=torch.float32).step(q, k, v, log_decay=log_decay)


CALLS: dict[Function, dict[str, Any]] = {
    lightning_attention: {"q": Q, "k": K, "v": V, "log_decay": DECAY, "initial_state": STATE},
    key_value_summary: {"k": K, "v": V, "log_decay": DECAY},
    attend: {
        "q": Q, "k": K, "v": V, "summary": SUMMARY, "log_decay": DECAY, "entry_state": STATE,
    },
    query_grad_summary: {"q": Q, "do": DO, "log_decay": DECAY},
    query_grad: {
        "q": Q, "k": K, "v": V, "do": DO, "summary": SUMMARY, "log_decay": DECAY,
        "entry_state": STATE,
    },
    attend_backward: {
        "q": Q, "k": K, "v": V, "do": DO, "summary": SUMMARY, "grad_summary": GRAD_SUMMARY,
        "log_decay": DECAY, "entry_state": STATE, "exit_state_grad": STATE, "query_grad": Q,
    },
    lightning_step: {"q": Q, "k": K, "v": V, "state": STATE, "log_decay": DECAY},
    decoding_state_step: {"q": Q, "k": K, "v": V, "state": STATE, "log_decay": DECAY},
    merge_lse: {"out": V, "lse": LSE, "new_out": DO, "new_lse": LSE},
}  # fmt: skip

WRONG: dict[str, Callable[[Tensor], object]] = {
    "nothing": lambda _: None,
    "a number": lambda _: 1.0,
    "a list": Tensor.tolist,
    "an array": Tensor.numpy,
    "integers": Tensor.long,
    "booleans": Tensor.bool,
    "complex numbers": lambda x: x.to(torch.complex64),
    "bfloat16 alone": Tensor.bfloat16,
    "a dim less": lambda x: x[0],
    "a dim more": lambda x: x[None],
    "one too few": lambda x: x[:, :-1] if x.ndim > 1 else x[:-1],
    "no columns": lambda x: x[..., :0],
    "twice as many rows": lambda x: torch.cat([x, x]),
    "another device": lambda x: x.to("meta"),
    "sparse": Tensor.to_sparse,
    "nested": lambda x: torch.nested.nested_tensor(list(x), layout=torch.strided),
}
OPTIONAL = {"log_decay", "initial_state", "entry_state", "exit_state_grad", "query_grad"}
TAKES_ANY_FLOAT = {"new_out"}

BOUNDS: dict[str, Any] = {
    "a list": [0, 8],
    "a number": 8,
    "floats": torch.tensor([0.0, 8.0]),
    "booleans": torch.tensor([False, True]),
    "two dims": torch.tensor([[0, 8]], dtype=torch.int32),
    "no dim": torch.tensor(8, dtype=torch.int32),
    "nothing in it": torch.zeros(0, dtype=torch.int32),
    "values nowhere": torch.zeros(2, dtype=torch.int32, device="meta"),
    "not from 0": torch.tensor([1, 8], dtype=torch.int32),
    "not to T": torch.tensor([0, 7], dtype=torch.int32),
    "beyond T": torch.tensor([0, 9], dtype=torch.int32),
    "run back": torch.tensor([0, 5, 3, 8], dtype=torch.int32),
    "negative": torch.tensor([0, -3, 8], dtype=torch.int32),
    "an empty document": torch.tensor([0, 3, 3, 8], dtype=torch.int32),
}


def refused(function: Function, **changed: object) -> str:
    """What the function says to its arguments with these in place of the good ones."""
    with pytest.raises(KernelInputError) as found:
        function(**{**CALLS[function], **changed})
    words = str(found.value)
    assert "\n" not in words
    return words


@pytest.mark.parametrize("function", CALLS, ids=lambda f: f.__name__)
def test_good_input_is_taken(function: Function) -> None:
    function(**CALLS[function])


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("function", CALLS, ids=lambda f: f.__name__)
def test_wrong_tensors_are_refused(function: Function, what: str) -> None:
    for name, good in CALLS[function].items():
        takes_it = (what == "nothing" and name in OPTIONAL) or (
            what == "bfloat16 alone" and name in TAKES_ANY_FLOAT
        )
        impossible = what == "nested" and good is DECAY  # of single numbers there is none
        if isinstance(good, Tensor) and not takes_it and not impossible:
            refused(function, **{name: WRONG[what](good)})


@pytest.mark.parametrize("what", BOUNDS)
@pytest.mark.parametrize(
    "function",
    [lightning_attention, key_value_summary, attend, query_grad_summary, attend_backward],
    ids=lambda f: f.__name__,
)
def test_wrong_bounds_are_refused(function: Function, what: str) -> None:
    assert "cu_seqlens" in refused(function, cu_seqlens=BOUNDS[what])


@pytest.mark.parametrize(
    ("function", "name", "wrong"),
    [
        (function, name, wrong)
        for function, (name, other) in itertools.product(
            (attend, query_grad, attend_backward),
            (("summary", GRAD_SUMMARY), ("grad_summary", SUMMARY)),
        )
        if name in CALLS[function]
        for wrong in (None, STATE, other)
    ],
)
def test_summaries_of_the_other_kind_are_refused(
    function: Function, name: str, wrong: object
) -> None:
    """Backward's states in forward's place have the right shape, and would give wrong numbers."""
    assert refused(function, **{name: wrong}).startswith(f"{name} must be what ")


def test_the_words_name_the_argument_and_the_remedy() -> None:
    assert refused(lightning_attention, q=Q.bfloat16()) == (
        "dtypes differ: q is torch.bfloat16, k is torch.float32; cast one of them"
    )
    assert refused(lightning_attention, v=V.to("meta")) == (
        "devices differ: v is on meta, k on cpu; move one"
    )
    assert refused(query_grad_summary, do=DO[:, 1:]).startswith("q and do must be [B, T, H, K]")
    assert refused(attend, k=[1.0]) == "k is of type list; pass a dense tensor"
    assert refused(attend, entry_state=STATE.bfloat16()) == (
        "entry_state has dtype torch.bfloat16; cast it to torch.float32"
    )


@pytest.mark.parametrize("pending", [0, 3, 32, -1, 8.0, "8", [8]])
def test_a_decoding_state_is_refused_another_number_of_tokens(pending: object) -> None:
    with pytest.raises(KernelInputError, match=r"^pending is .* must be None or one of"):
        DecodingState(STATE, dtype=torch.float32, pending=pending)


@pytest.mark.parametrize("dtype", [None, "float32", torch.int32, torch.complex64])
def test_a_decoding_state_is_refused_what_is_no_dtype_of_inputs(dtype: object) -> None:
    with pytest.raises(KernelInputError, match="dtype"):
        DecodingState(STATE, dtype=dtype)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({n: torch.ones(3, 1, 2, 4) for n in "qkv"}, "batch of q, k and v is 3, but this state"),
        ({n: torch.ones(1, 1, 3, 4) for n in "qkv"}, "heads of q, k and v is 3, but this state"),
        ({"v": torch.ones(1, 8, 2, 5)}, "value_dim of q, k and v is 5, but this state was made"),
        ({n: torch.ones(1, 1, 2, 6).half() for n in "qkv"}, "key_dim of q, k and v is 6, but"),
        ({n: CALLS[lightning_step][n].half() for n in "qkv"}, "dtype of q, k and v is torch.fl"),
    ],
)
def test_steps_of_other_sizes_leave_a_decoding_state_as_it_was(
    changed: dict[str, Tensor], words: str
) -> None:
    state = DecodingState(STATE, dtype=torch.float32)
    with pytest.raises(KernelInputError, match=f"^{words}"):
        state.step(**{"q": Q, "k": K, "v": V, **changed})
    assert torch.equal(state.state(), STATE)


def test_more_tokens_than_can_be_counted_are_refused() -> None:
    x = torch.empty(1, 1, 1, 4).expand(1, (1 << 29) + 1, 1, 4)
    with pytest.raises(KernelInputError, match="call in parts"):
        lightning_attention(x, x, x)
