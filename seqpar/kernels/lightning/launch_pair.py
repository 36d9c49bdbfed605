"""Host side of the launch that makes dk and dv together (output_pass_hopper.py).

Legend: B batch, T tokens, H heads, D head dim, M segments.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from seqpar.kernels.launch import Launch, Window
from seqpar.kernels.lightning.decays import Decays
from seqpar.kernels.lightning.launch_output import Learning, in_two_groups
from seqpar.kernels.lightning.plan import Cut
from seqpar.kernels.lightning.state_pass import can_be_flat
from seqpar.kernels.lightning.tuning import Config, with_gradient
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
    learning: Learning | None = None,
) -> None:
    """Write dk and dv of `inputs`, q, k, v and do; the rest as for `output_pass`, in reverse.

    `learning`: of k; only in two groups.
    """
    q, k, v, do = inputs
    of, dots, exits, crossing = (None,) * 4 if learning is None else learning
    optional = {"p_states": states, "p_initial": initial, "p_final": final}
    halves: tuple[Tensor | None, ...] = ()
    if config.groups is not None:
        halves = (q, do, of)
        optional |= {"d_half_k": of, "p_dots": dots, "p_crossing": crossing, "p_exits": exits}
    missing = dict.fromkeys(name for name, given in optional.items() if given is None)
    key = ("pair", scanned, *(x.stride() for x in inputs), *missing)
    launch = cut.launches.get(key)
    if launch is None:
        tiles = config if of is None else with_gradient(config)
        scan = states is not None and not scanned
        launch = cut.launches[key] = _pair_launch(q, cut, tiles, decays, missing, scan)
    given = (
        q, k, v, do, *halves, dk, dv, dk, dv, decays.per_head, decays.reach, decays.by_segment,
        dots, crossing, exits, states, initial, final,
    )  # fmt: skip
    launch(*[tensor for tensor in given if tensor is not None])


def _pair_launch(
    q: Tensor, cut: Cut, config: Config, decays: Decays, missing: dict[str, None], scan: bool
) -> Launch:
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
    windows = dict.fromkeys(("d_q", "d_k", "d_v", "d_do", "d_dk", "d_dv"), window)
    if config.groups is not None:
        half = Window(config.chunk, dim // 2, flat=True, for_gluon=True)
        windows |= dict.fromkeys(("d_half_q", "d_half_do", "d_half_k", "d_dk", "d_dv"), half)
        fixed |= in_two_groups(config.groups, dim)
        fixed |= {"GRAD": "d_half_k" not in missing, "N": q.shape[0] * q.shape[1]}
        fixed |= {"M": cut.segments.count}
    return Launch(
        _kernel_of(in_groups=config.groups is not None),
        (cut.segments.count * heads * 2,),
        fixed=fixed,
        windows={name: window for name, window in windows.items() if name not in missing},
        num_warps=config.num_warps if config.groups is None else 4,
        overlap=can_overlap(q.device),
    )


def _kernel_of(*, in_groups: bool) -> Any:
    if in_groups:
        from seqpar.kernels.lightning.output_pass_groups import output_pair_groups_kernel

        return output_pair_groups_kernel
    from seqpar.kernels.lightning.output_pass_hopper import output_pair_hopper_kernel

    return output_pair_hopper_kernel
