"""The gradient of decays per token on a GPU: by hand in dk's pass, in Triton in kernels of its own.

Without a GPU Triton's are interpreted (test_lightning_triton.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from seqpar.kernels.lightning import lightning_attention
from seqpar.kernels.lightning import plan as plan_module
from seqpar.kernels.lightning.plan import Plan, Problem
from tests.kernels.test_lightning import leaves, make_inputs, packed
from tests.tolerances import relative_error

CASES = {
    "cut": (2, 1500, 2, None),
    "whole": (2, 130, 70, None),
    "documents": (1, 1600, 2, (1, 64, 65, 2, 1, 130, 1337)),
}
"""B, T, H and the documents' lengths."""


def inputs_of(case: str, *, states: bool) -> tuple[dict[str, Tensor | None], Tensor | None]:
    """On the GPU, in bfloat16; `states`: some enter the sequences."""
    batch, tokens, heads, lengths = CASES[case]
    inputs = make_inputs(
        decay="token", batch=batch, tokens=tokens, heads=heads, key_dim=128, value_dim=128,
        sequences=None if lengths is None else len(lengths), dtype=torch.bfloat16, strongest=-0.1,
    )  # fmt: skip
    if not states:
        inputs["initial_state"] = None
    cu_seqlens = None if lengths is None else packed(lengths)
    return {name: x if x is None else x.cuda() for name, x in inputs.items()}, cu_seqlens


def decay_grad(
    given: dict[str, Tensor | None], cu_seqlens: Tensor | None, *, states: bool
) -> Tensor:
    """Of random gradients of the outputs and, with `states`, of the states that leave."""
    o, final = lightning_attention(**given, cu_seqlens=cu_seqlens, return_final_state=True)
    generator = torch.Generator().manual_seed(1)
    do, dfinal = (torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in (o, final))
    outputs, grads = ([o, final], [do, dfinal]) if states else ([o], [do])
    (found,) = torch.autograd.grad(outputs, [given["log_decay"]], grads)
    return found


def names_of_launches(plan: Plan) -> set[str]:
    kept = plan.cut.launches.values()
    launches = [y for x in kept for y in (x if isinstance(x, tuple) else (x,))]
    return {launch._kernel.fn.__name__ for launch in launches}


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Plan]]:
    """The plans that a test's calls make, none of them made before."""
    found: list[Plan] = []

    def made(problem: Problem) -> Plan:
        found.append(Plan(problem))
        return found[-1]

    monkeypatch.setattr(plan_module, "_plan", made)
    plan_module._checked.cache_clear()
    yield found
    plan_module._checked.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", ["by hand", "in Triton"])
def test_decays_learn_both_ways(
    way: str, case: str, states: bool, plans: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits every time, whatever memory held, and within bfloat16 of float64."""
    if way == "in Triton":
        monkeypatch.setattr(plan_module, "runs_by_hand", lambda _: False)
    given, cu_seqlens = inputs_of(case, states=states)
    ours = leaves(given)
    found = decay_grad(ours, cu_seqlens, states=states)
    assert found.is_contiguous()
    (plan,) = plans
    assert (plan.cut.segments.num_cut > 0) == (case != "whole")
    kernels = {"block_sums_kernel", "decay_gradient_kernel"}
    assert names_of_launches(plan) & kernels == (set() if way == "by hand" else kernels)
    exact = leaves({name: x if x is None else x.double() for name, x in given.items()})
    assert relative_error(found, decay_grad(exact, cu_seqlens, states=states)) < 4e-3
    for _ in range(8):
        poisoned = [torch.full((1 << size,), torch.nan, device="cuda") for size in range(10, 23)]
        del poisoned
        assert torch.equal(decay_grad(ours, cu_seqlens, states=states), found)
