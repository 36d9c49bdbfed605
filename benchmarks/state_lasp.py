"""The public LASP kernels' rings (OpenNLPLab/LASP), as forms of benchmarks/bench_state.py."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from state_timing import Setup, forward_backward, synchronize
from torch import Tensor

from seqpar import comm

__all__ = ["lasp_forms"]


def lasp_forms(
    setup: Setup, checkout: Path, leaves: list[Tensor], do: Tensor, decay: Tensor
) -> dict[str, Callable[[], None]]:
    """The public LASP kernels' rings, those that run here; its layout is [B, H, T, D]."""
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    try:
        import lasp
        from lasp.utils import initialize_lasp, sequence_parallel_is_initialized

        if not sequence_parallel_is_initialized():
            initialize_lasp(1, setup.world_size)
    except Exception as error:
        setup.say(f"LASP cannot be loaded: {error!r}")
        return {}
    q, k, v, do_ = (x.detach().transpose(1, 2).contiguous() for x in (*leaves, do))
    heads_first = [x.requires_grad_() for x in (q, k, v)]
    slopes = -decay.view(-1, 1, 1)
    state = (1, setup.heads, setup.dim, setup.dim)

    def form(name: str) -> Callable[[], None]:
        function = getattr(lasp, name)

        def output() -> Tensor:
            buffers = [torch.empty(state, device=setup.device) for _ in range(2)]
            return function(*heads_first, slopes, *buffers)

        return forward_backward(output, heads_first, do_)

    found = {}
    for name in ("lasp_fuse", "lasp_fuse_parallel"):
        if _lasp_runs(setup, name, (*heads_first, slopes, do_)):
            found[f"{name} (OpenNLPLab)"] = form(name)
    return found


def _lasp_runs(setup: Setup, name: str, tensors: tuple[Tensor, ...]) -> bool:
    """Whether its kernels run on every rank, tried without its ring: a failure there would hang."""
    q, k, v, slopes, do = (x.detach() for x in tensors)
    problem = ""
    try:
        module = importlib.import_module(f"lasp.{name}")
        state = torch.zeros(1, setup.heads, setup.dim, setup.dim, device=setup.device)
        if name == "lasp_fuse":
            module.lasp_forward(q, k, v, slopes, state)
            module.lasp_backward(q, k, v, slopes, do, state, state.clone())
        else:
            _, blocks, _ = module.lasp_forward(q, k, v, slopes, state, 256, 64)
            module.lasp_backward(q, k, v, slopes, do, blocks, state, state.clone(), 256, 64)
        synchronize(setup)
    except Exception as error:
        problem = f"{type(error).__name__}: {str(error)[:300]}"
    failed = torch.tensor([bool(problem)], device=setup.device)
    if not comm.all_gather(failed, setup.group).any():
        return True
    setup.say(f"{name} does not run here: {problem!r}")
    return False
