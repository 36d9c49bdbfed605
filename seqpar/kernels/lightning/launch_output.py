"""Host side of the output pass: which windows, strides and tiles each role gets.

Legend: B batch, T tokens, H heads, DX and DZ the dims of the roles x, y and z (output_pass.py).
"""

from __future__ import annotations

import inspect
from typing import Any, Literal, NamedTuple

import triton
from torch import Tensor

from seqpar.kernels.launch import Launch, Window
from seqpar.kernels.lightning.decays import Decays
from seqpar.kernels.lightning.output_pass import output_pass_kernel
from seqpar.kernels.lightning.plan import Cut
from seqpar.kernels.lightning.state_pass import can_be_flat, precision
from seqpar.kernels.lightning.tuning import Config, for_groups, padded
from seqpar.kernels.overlap import can_overlap

__all__ = ["Entering", "Learning", "Waits", "is_by_hand", "output_pass"]

Waits = Literal["first", "for states", "last"]
"""When a pass waits for the launches before it (overlap.py): before all it does; after it has begun
to fetch its inputs, which the launch before, one of the same call, does not write, and before it
reads states; or at its end, where the launch before is another pass of the same call, from the same
states."""


class Entering(NamedTuple):
    """What the programs of an output pass find out the states from that enter their segments."""

    states: Tensor | None
    """[M, H, K, V] float32: what each segment adds or, if `scanned`, what enters it."""
    initial: Tensor | None
    """[S, H, K, V] float32: what enters the sequences, or None."""
    scanned: bool = False


class Learning(NamedTuple):
    """What a pass that makes the gradient of `of` gives towards the gradient of decays."""

    of: Tensor
    dots: Tensor
    """[tiles of DZ, H, B * T] float32: of each token, `of` times its gradient; with `decay_grad`
    what the pass forward in time wrote, to be read."""
    exits: Tensor | None
    """[M, H, K, V] float32: the state that leaves each segment. The pass forward in time writes it,
    the pass backward in time reads it. None where no gradient reaches any of them."""
    crossing: Tensor | None = None
    """[tiles of DZ, M, H] float32, backward in time in Triton: `exits` times their gradients."""
    decay_grad: Tensor | None = None
    """[B, T, H] float32, backward in time by hand: the gradient of decays per token itself."""


def is_by_hand(config: Config, *tensors: Tensor) -> bool:
    """Whether a pass over these tensors, and others like them, is one of those by hand."""
    return config.by_hand and can_be_flat(*tensors)


def output_pass(
    roles: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    decays: Decays,
    cut: Cut,
    config: Config,
    entering: Entering,
    *,
    final: Tensor | None = None,
    reverse: bool,
    transposed: bool,
    learning: Learning | None = None,
    waits: Waits = "first",
) -> None:
    """Write w into `out`, contiguous [B, T, H, DZ], and what leaves each sequence into `final`.

    `transposed` says that states lie in memory as [DZ, DX] rather than [DX, DZ]. With `learning`,
    its tensors are written too.
    """
    x, y, z = roles
    states, initial, scanned = entering
    of, dots, exits, crossing, decay_grad = (None,) * 5 if learning is None else learning
    optional = (of, dots, crossing, decay_grad, exits, states, initial, final)
    key = (
        reverse, transposed, scanned, waits, x.stride(), y.stride(), z.stride(),
        *(tensor is None for tensor in optional), None if of is None else of.stride(),
    )  # fmt: skip
    launch = cut.launches.get(key)
    if launch is None:
        names = (
            "d_u", "p_dots", "p_crossing", "p_decay_grad", "p_exits", "p_states", "p_initial",
            "p_final",
        )  # fmt: skip
        missing = {name: None for name, given in zip(names, optional, strict=True) if given is None}
        launch = _output_launch(
            roles, out, of, cut, config, decays, missing=missing, reverse=reverse,
            transposed=transposed, scan=states is not None and not scanned,
            waits=waits,
        )  # fmt: skip
        cut.launches[key] = launch
    given = {
        "d_x": x, "d_y": y, "d_z": z, "d_u": of, "d_w": out, "p_w": out,
        "p_decay": decays.per_head, "d_reach": decays.reach, "p_reach": decays.reach,
        "p_by_segment": decays.by_segment, "p_dots": dots, "p_crossing": crossing,
        "p_decay_grad": decay_grad, "p_exits": exits, "p_states": states, "p_initial": initial,
        "p_final": final,
    }  # fmt: skip
    launch(*[tensor for name in launch.names if (tensor := given[name]) is not None])


def _output_launch(
    roles: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    of: Tensor | None,
    cut: Cut,
    config: Config,
    decays: Decays,
    *,
    missing: dict[str, None],
    reverse: bool,
    transposed: bool,
    scan: bool,
    waits: Waits,
) -> Launch:
    x, y, z = roles
    batch, tokens, heads, dim_x = x.shape
    dim_z, segments = z.shape[3], cut.segments
    tile_x, tile_z = padded(dim_x), config.value_tile
    flat = can_be_flat(x, y, z, out) and (of is None or can_be_flat(of))
    by_hand = config.by_hand and flat
    assert by_hand or "p_decay_grad" in missing, "only passes by hand make the decays' gradient"
    if by_hand:
        config = for_groups(config)
    fixed: dict[str, Any] = {
        "p_table": segments.table, "H": heads, "N": batch * tokens,
        "M": segments.count, "DX": dim_x, "DZ": dim_z, "length": segments.longest,
        "stride_x": 1 if transposed else dim_z, "stride_z": dim_x if transposed else 1,
        "stride_reach": 0 if decays.reach is None else decays.reach.stride(0),
        "DECAY": decays.kind, "REVERSE": reverse, "GRAD": of is not None, "FLAT": flat,
        "SCAN": scan, "C": config.chunk, "BX": tile_x, "BZ": tile_z, "STAGES": config.num_stages,
        "PRECISION": precision(x.dtype), "EARLY": waits == "for states" and can_overlap(x.device),
        "LATE": waits == "last" and can_overlap(x.device),
    }  # fmt: skip
    fixed |= missing
    unused = ("d_reach", "p_reach", "p_by_segment") if decays.reach is None else ("p_decay",)
    fixed |= dict.fromkeys(unused)
    wide, narrow = (
        Window(config.chunk, tile, flat=flat, for_gluon=by_hand)
        for tile in (tile_x, tile_z // 2 if by_hand else tile_z)
    )
    windows = {"d_x": wide, "d_y": wide, "d_z": narrow, "d_u": narrow, "d_w": narrow}
    windows["d_reach"] = Window(1, config.chunk, flat=True)
    kernel = _kernel_of(by_hand=by_hand, sums=of is not None)
    taken = inspect.signature(kernel.fn).parameters
    return Launch(
        kernel,
        (segments.count * heads, triton.cdiv(dim_z, tile_z)),
        fixed={name: value for name, value in fixed.items() if name in taken},
        windows={n: w for n, w in windows.items() if n in taken and n not in fixed},
        num_warps=config.num_warps,
        overlap=can_overlap(x.device),
    )


def _kernel_of(*, by_hand: bool, sums: bool) -> Any:
    if by_hand and sums:
        from seqpar.kernels.lightning.output_pass_sums import output_pass_sums_kernel

        return output_pass_sums_kernel
    if by_hand:
        from seqpar.kernels.lightning.output_pass_groups import output_pass_groups_kernel

        return output_pass_groups_kernel
    return output_pass_kernel
