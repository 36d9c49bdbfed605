"""Few configurations: what is compiled and how long a first call takes depends on them."""

from __future__ import annotations

import itertools

import torch

from seqpar.kernels.lightning.tuning import (
    Config,
    configuration,
    for_groups,
    for_states,
    with_gradient,
)

MOST = 12
"""Of one kernel."""


def test_no_kernel_has_more_than_twelve_configurations() -> None:
    dims = range(1, 257)
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    every = {
        configuration(key_dim, value_dim, dtype, by_hand=by_hand)
        for key_dim, value_dim, dtype, by_hand in itertools.product(
            dims, dims, dtypes, (False, True)
        )
    }
    in_triton = {config for config in every if not config.by_hand}
    by_hand = every - in_triton
    kernels: dict[str, set[Config]] = {
        "output pass": in_triton | {with_gradient(config) for config in in_triton},
        "state pass": {for_states(c, decays_differ=x) for c in every for x in (False, True)},
        "pass in groups": {for_groups(config) for config in by_hand},
        "pass with sums": {with_gradient(config) for config in by_hand},
    }
    assert {name: len(found) for name, found in kernels.items() if len(found) > MOST} == {}
    assert len(kernels["output pass"]) > 1
