"""Which wrapped models can be compared with one device, and how others are refused.

Two runs of a model must compute the same: from the same weights on every rank, without masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from seqpar.comm import all_gather, all_reduce_sum
from seqpar.errors import ParityError, UnsupportedModelError
from seqpar.wrap import is_parallelized

__all__ = ["check_comparable", "check_drew_nothing", "check_same_weights", "random_state"]


def check_comparable(model: nn.Module) -> None:
    """Refuse a model that is not wrapped, is sharded, or has layers that draw masks."""
    name = type(model).__name__
    if not is_parallelized(model):
        raise UnsupportedModelError(name, "it is not wrapped", "call seqpar.parallelize first")
    if any(type(parameter).__name__ == "DTensor" for parameter in model.parameters()):
        raise UnsupportedModelError(
            name, "its parameters are sharded", "call check_parity before fully_shard"
        )
    random = [n for n, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0]
    if model.training and random:
        raise UnsupportedModelError(
            f"{random[0]} (Dropout)", "two runs draw different masks", "call model.eval() first"
        )


def random_state(model: nn.Module) -> list[Tensor]:
    """On the CPU, and on the CUDA devices that the model is on."""
    devices = {p.device for p in model.parameters() if p.is_cuda}
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def check_drew_nothing(
    model: nn.Module, before: Sequence[Tensor], groups: Sequence[ProcessGroup]
) -> None:
    """Refuse, on all ranks, a model that drew random numbers on any of them.

    Args:
        before: `random_state` before the model ran.
    """
    now = random_state(model)
    drew = any(not torch.equal(x, y) for x, y in zip(before, now, strict=True))
    count = torch.tensor(int(drew), device=next(model.parameters()).device)
    for group in groups:
        count = all_reduce_sum(count, group)
    if int(count):
        raise UnsupportedModelError(
            type(model).__name__,
            "it draws random numbers (dropout, or noise on experts), other ones in each run",
            "call model.eval() first",
        )


def check_same_weights(model: nn.Module, groups: Sequence[ProcessGroup]) -> None:
    """Compare every parameter's sum of squares with the first rank's."""
    named = dict(model.named_parameters())
    if not named or not groups:
        return
    own = torch.stack([p.detach().double().square().sum() for p in named.values()])
    differs = torch.zeros(len(named), dtype=torch.int64, device=own.device)
    for group in groups:
        # The same weights summed by other numbers of threads differ in the last digits.
        differs += (~torch.isclose(all_gather(own, group), own, rtol=1e-9, atol=0)).any(0)
    for group in groups:
        differs = all_reduce_sum(differs, group)
    first = next((name for name, count in zip(named, differs.tolist(), strict=True) if count), None)
    if first is not None:
        raise ParityError(
            f"the ranks hold different weights, first in {first}: call torch.manual_seed before "
            "the model is built, or load the same checkpoint on every rank"
        )
