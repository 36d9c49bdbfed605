"""Host side of the output pass: which descriptors, strides and tiles each role gets.

Legend: B batch, T tokens, H heads, DX and DZ the dims of the roles x, y and z (output_pass.py).
"""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from seqpar.kernels.lightning.decays import Decays
from seqpar.kernels.lightning.output_pass import output_pass_kernel
from seqpar.kernels.lightning.segments import Segments
from seqpar.kernels.lightning.state_pass import precision
from seqpar.kernels.lightning.tuning import Config, padded

__all__ = ["can_pair", "output_pass"]

_MAX_PLANE_BYTES = 1 << 39


def output_pass(
    roles: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    decays: Decays,
    segments: Segments,
    config: Config,
    *,
    second: tuple[Tensor, Tensor, Tensor] | None = None,
    entries: Tensor | None,
    initial: Tensor | None,
    final: Tensor | None = None,
    reverse: bool,
    transposed: bool,
    of: Tensor | None = None,
    dreach: Tensor | None = None,
) -> None:
    """Write w into `out`, contiguous [B, T, H, DZ], and what leaves each sequence into `final`.

    With `second`, for which `can_pair` holds, its w goes to out[1] and that of `roles` to out[0],
    [2, B, T, H, D]; `second` reads the states transposed. `transposed` says that states lie in
    memory as [DZ, DX] rather than [DX, DZ]. With `dreach` [tiles of DZ, H, B * T] it also gets
    each tile's part of the gradient of the running log decays, for which `of` is the tensor whose
    gradient w is.
    """
    x, _, z = roles
    heads, dim_x, dim_z = x.shape[2], x.shape[3], z.shape[3]
    rows = x.shape[0] * x.shape[1]
    tile_x, tile_z = padded(dim_x), config.value_tile
    tiles = (tile_x, tile_x, tile_z)
    num_roles = 1 if second is None else 2
    d_x, d_y, d_z = (
        _planes(one, None if second is None else second[i], config.chunk, tiles[i])
        for i, one in enumerate(roles)
    )
    d_out = TensorDescriptor(
        out,
        [num_roles, rows, heads, dim_z],
        [rows * heads * dim_z, heads * dim_z, dim_z, 1],
        [1, config.chunk, 1, tile_z],
    )
    grid = (num_roles * segments.count * heads, triton.cdiv(dim_z, tile_z))
    output_pass_kernel[grid](
        d_x,
        d_y,
        d_z,
        d_z if of is None else _planes(of, None, config.chunk, tile_z),
        d_out,
        out,
        decays.per_head,
        decays.descriptor(config.chunk),
        decays.reach,
        0 if decays.reach is None else decays.reach.stride(0),
        decays.totals,
        dreach,
        entries,
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
        _flips(roles, second),
        DECAY=decays.kind,
        REVERSE=reverse,
        GRAD=dreach is not None,
        ROLES=num_roles,
        C=config.chunk,
        BX=tile_x,
        BZ=tile_z,
        STAGES=config.num_stages,
        PRECISION=precision(x.dtype),
        num_warps=config.num_warps,
    )


def can_pair(roles: tuple[Tensor, ...], second: tuple[Tensor, ...], config: Config) -> bool:
    """Whether two roles can share one launch: one tile each, alike in shape and strides.

    A descriptor reaches both tensors of a role as the planes of one array, so that every program
    uses the same descriptors; the array begins at the lower address.
    """
    return all(
        one.shape == other.shape
        and one.stride() == other.stride()
        and config.value_tile >= one.shape[3]
        and abs(other.data_ptr() - one.data_ptr()) < _MAX_PLANE_BYTES
        for one, other in zip(roles, second, strict=True)
    )


def _flips(roles: tuple[Tensor, ...], second: tuple[Tensor, ...] | None) -> int:
    """A bit for each role whose second tensor lies below the first."""
    if second is None:
        return 0
    below = [other.data_ptr() < one.data_ptr() for one, other in zip(roles, second, strict=True)]
    return sum(1 << i for i, flipped in enumerate(below) if flipped)


def _planes(one: Tensor, other: Tensor | None, chunk: int, columns: int) -> Any:
    """A [1, chunk, 1, columns] window on [planes, B * T, H, D]; zero outside."""
    batch, tokens, heads, dim = one.shape
    planes, apart = 1, batch * tokens * one.stride(1)
    if other is not None:
        one, other = sorted((one, other), key=Tensor.data_ptr)
        planes, apart = 2, (other.data_ptr() - one.data_ptr()) // one.element_size()
    return TensorDescriptor(
        one,
        [planes, batch * tokens, heads, dim],
        [apart, one.stride(1), one.stride(2), 1],
        [1, chunk, 1, columns],
    )
