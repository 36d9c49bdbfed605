"""Prints when the launches of some calls wait for the launches before them.

    TRITON_INTERPRET=0 python -m tests.kernels.early_launches

Launches are recorded and not carried out: it needs no GPU. Tensors are never read.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from seqpar.kernels.launch import Launch
from seqpar.kernels.lightning import (
    attend,
    key_value_summary,
    launch_output,
    lightning_attention,
    state_pass,
)
from seqpar.kernels.lightning import plan as plan_module

WAITS: list[str] = []


def record(launch: Any, *tensors: torch.Tensor) -> None:
    """In the place of `Launch.__call__`."""
    name = launch._kernel.fn.__name__.removesuffix("_kernel")
    early, late = (launch._fixed.get(x, False) for x in ("EARLY", "LATE"))
    assert not (early and late)
    when = "for states" if early else "last" if late else "first"
    WAITS.append(f"{name}: {when}")


def taken() -> list[str]:
    found = WAITS.copy()
    WAITS.clear()
    return found


def main() -> None:
    Launch.__call__ = record  # type: ignore[method-assign, assignment]
    plan_module.Plan.on_triton = property(lambda _: True, lambda _, value: None)  # type: ignore[assignment]
    plan_module._num_sms = lambda _: 132  # an H200's
    plan_module.runs_by_hand = lambda _: True
    for module in (launch_output, state_pass):
        module.can_overlap = lambda _: True
    found = {}
    for name, shape in (
        ("cut", (1, 8192, 32, 128)),
        ("whole", (4, 64, 33, 128)),
        ("deep", (1, 65536, 4, 128)),
    ):
        slopes = -torch.ones(shape[2])
        q, k, v = (torch.empty(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        o, _ = lightning_attention(q, k, v, log_decay=slopes)
        found[name] = taken()
        torch.autograd.grad(o, (q, k, v), torch.empty_like(o))
        found[f"{name}, backward"] = taken()
        with torch.no_grad():
            attend(q, k, v, key_value_summary(k, v, log_decay=slopes), log_decay=slopes)
        found[f"{name}, attend"] = taken()
        learned = torch.zeros(shape[:3], requires_grad=True)
        o, state = lightning_attention(q, k, v, log_decay=learned, return_final_state=True)
        given = (torch.empty_like(o), torch.empty_like(state))
        taken()
        torch.autograd.grad((o, state), (q, k, v, learned), given)
        found[f"{name}, learned"] = taken()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
