"""What a backward pass of attention works on, as one value; what it and a forward pass give.

Legend: B batch, T query tokens, S key tokens, H query heads, G key/value heads, K key dim, V value
dim.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Operands", "TileGradients", "TileOutputs"]

TileOutputs = list[tuple[int, Tensor, Tensor]]
"""By tile: (first row, out [B, n, H, V], lse [B, n, H])."""

TileGradients = tuple[list[tuple[int, Tensor]], list[tuple[int, Tensor, Tensor]]]
"""(first row, dq [B, n, H, K]) and (first key, dk [B, m, G, K], dv [B, m, G, V])."""


class Operands(NamedTuple):
    """Operands of a backward pass.

    Attributes:
        dout: [B, T, H, V], the gradient of the whole output.
        q: [B, T, H, K]; k: [B, S, G, K]; v: [B, S, G, V].
        out: [B, T, H, V] and lse: [B, T, H], merged over *all* keys, not these alone.
    """

    dout: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor

    def part(self, rows: slice, keys: slice) -> Operands:
        """Of a range of query tokens and a range of keys."""
        k, v = self.k[:, keys], self.v[:, keys]
        dout, q, out, lse = (x[:, rows] for x in (self.dout, self.q, self.out, self.lse))
        return Operands(dout, q, k, v, out, lse)

    def of_heads(self, start: int, stop: int) -> Operands:
        """Of a range of key/value heads and the query heads that read them."""
        per_group = self.q.shape[2] // self.k.shape[2]
        rows = slice(start * per_group, stop * per_group)
        dout, q, out, lse = (x[:, :, rows] for x in (self.dout, self.q, self.out, self.lse))
        return Operands(dout, q, self.k[:, :, start:stop], self.v[:, :, start:stop], out, lse)

    def with_keys(self, k: Tensor, v: Tensor) -> Operands:
        """The same queries on other keys and values."""
        return self._replace(k=k, v=v)
