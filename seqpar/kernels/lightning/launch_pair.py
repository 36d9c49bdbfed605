"""Host side of the launch that makes dk and dv together (output_pair.py).

Legend: B batch, T tokens, H heads, D head dim, M segments.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from seqpar.kernels.launch import Launch, Window
from seqpar.kernels.lightning.decays import Decays
from seqpar.kernels.lightning.plan import Cut
from seqpar.kernels.lightning.state_pass import can_be_flat
from seqpar.kernels.lightning.tuning import Config
from seqpar.kernels.overlap import can_overlap

__all__ = ["can_pair", "output_pair"]


def can_pair(config: Config, *tensors: Tensor) -> bool:
    """Whether one launch makes dk and dv of these inputs."""
    return config.by_hand and can_be_flat(*tensors)


def output_pair(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    dk: Tensor,
    dv: Tensor,
    decays: Decays,
    cut: Cut,
    config: Config,
    *,
    states: Tensor | None,
    scanned: bool,
    initial: Tensor | None,
    final: Tensor | None,
) -> None:
    """Write dk and dv of `inputs`, q, k, v and do; the rest as for `output_pass`, in reverse."""
    q, k, v, do = inputs
    optional = (states, initial, final)
    key = ("pair", scanned, *(x.stride() for x in inputs), *(x is None for x in optional))
    launch = cut.launches.get(key)
    if launch is None:
        names = ("p_states", "p_initial", "p_final")
        missing = {name: None for name, given in zip(names, optional, strict=True) if given is None}
        scan = states is not None and not scanned
        launch = cut.launches[key] = _pair_launch(q, cut, config, decays, missing, scan)
    given = (
        q, k, v, do, dk, dv, dk, dv, decays.per_head, decays.reach, decays.by_segment,
        states, initial, final,
    )  # fmt: skip
    launch(*[tensor for tensor in given if tensor is not None])


def _pair_launch(
    q: Tensor, cut: Cut, config: Config, decays: Decays, missing: dict[str, None], scan: bool
) -> Launch:
    from seqpar.kernels.lightning.output_pair import output_pair_kernel

    heads, dim = q.shape[2:]
    fixed: dict[str, Any] = {
        "p_table": cut.segments.table, "H": heads, "length": cut.segments.longest,
        "stride_reach": 0 if decays.reach is None else decays.reach.stride(0),
        "DECAY": decays.kind, "SCAN": scan, "C": config.chunk,
        "D": dim, "STAGES": config.num_stages,
    }  # fmt: skip
    fixed |= missing
    unused = ("p_reach", "p_by_segment") if decays.reach is None else ("p_decay",)
    fixed |= dict.fromkeys(unused)
    window = Window(config.chunk, dim, flat=True, for_gluon=True)
    return Launch(
        output_pair_kernel,
        (cut.segments.count * heads * 2,),
        fixed=fixed,
        windows=dict.fromkeys(("d_q", "d_k", "d_v", "d_do", "d_dk", "d_dv"), window),
        num_warps=config.num_warps,
        overlap=can_overlap(q.device),
    )
