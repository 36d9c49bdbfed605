"""Host side of the output pass: which descriptors, strides and tiles each role gets.

Legend: B batch, T tokens, H heads, DX and DZ the dims of the roles x, y and z (output_pass.py).
"""

from __future__ import annotations

import triton
from torch import Tensor

from seqpar.kernels.lightning.decays import Decays
from seqpar.kernels.lightning.output_pass import output_pass_kernel
from seqpar.kernels.lightning.segments import Segments
from seqpar.kernels.lightning.state_pass import can_be_flat, descriptor, precision
from seqpar.kernels.lightning.tuning import Config, padded

__all__ = ["output_pass"]


def output_pass(
    roles: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    decays: Decays,
    segments: Segments,
    config: Config,
    *,
    states: Tensor | None,
    scanned: bool = False,
    initial: Tensor | None = None,
    final: Tensor | None = None,
    reverse: bool,
    transposed: bool,
    of: Tensor | None = None,
    dreach: Tensor | None = None,
) -> None:
    """Write w into `out`, contiguous [B, T, H, DZ], and what leaves each sequence into `final`.

    `states` [M, H, K, V] is what each segment adds to a passing state, or, if `scanned`, what
    enters it. `transposed` says that states lie in memory as [DZ, DX] rather than [DX, DZ]. With
    `dreach` [tiles of DZ, H, B * T] it also gets each tile's part of the gradient of the running
    log decays, for which `of` is the tensor whose gradient w is.
    """
    x, y, z = roles
    heads, dim_x, dim_z = x.shape[2], x.shape[3], z.shape[3]
    rows = x.shape[0] * x.shape[1]
    tile_x, tile_z = padded(dim_x), config.value_tile
    flat = can_be_flat(x, y, z) and (of is None or can_be_flat(of))
    d_z = descriptor(z, config.chunk, tile_z, flat=flat)
    grid = (segments.count * heads, triton.cdiv(dim_z, tile_z))
    output_pass_kernel[grid](
        descriptor(x, config.chunk, tile_x, flat=flat),
        descriptor(y, config.chunk, tile_x, flat=flat),
        d_z,
        d_z if of is None else descriptor(of, config.chunk, tile_z, flat=flat),
        descriptor(out, config.chunk, tile_z, flat=flat),
        out,
        decays.per_head,
        decays.descriptor(config.chunk),
        decays.reach,
        0 if decays.reach is None else decays.reach.stride(0),
        decays.totals,
        dreach,
        states,
        initial,
        final,
        segments.bounds,
        segments.sequence,
        segments.first,
        segments.by_length,
        heads,
        rows,
        dim_x,
        dim_z,
        1 if transposed else dim_z,
        dim_x if transposed else 1,
        DECAY=decays.kind,
        REVERSE=reverse,
        GRAD=dreach is not None,
        FLAT=flat,
        SCAN=states is not None and not scanned,
        C=config.chunk,
        BX=tile_x,
        BZ=tile_z,
        STAGES=config.num_stages,
        PRECISION=precision(x.dtype),
        num_warps=config.num_warps,
    )
