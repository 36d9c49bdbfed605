"""Sums of partial results: outputs by their log-sum-exps, gradients by addition.

Legend: B batch, T tokens, H heads, V value dim (or K key dim).

Both sums take partial results for a range of rows (gradients: and heads) at a time, and follow one
rule: what nothing overlaps is copied; one overlapping part waits, so that two terms end in a single
pass that rounds once, straight into the result's dtype; from the third term on the sum is kept in
float32 (float64 for float64 parts). A part handed in belongs to the sum from then on; one that is
lent is only read, and until the result has been taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from seqpar.ops.softmax_add import write_sum
from seqpar.ops.softmax_merge import merge_lse_

__all__ = ["PartialOutput", "RowSum", "wide_dtype"]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Region(NamedTuple):
    """Rows and heads that a part covers."""

    start: int
    stop: int
    head_start: int
    head_stop: int

    def overlaps(self, other: _Region) -> bool:
        return (
            self.start < other.stop
            and other.start < self.stop
            and self.head_start < other.head_stop
            and other.head_start < self.head_stop
        )

    def of(self, x: Tensor) -> Tensor:
        return x[:, self.start : self.stop, self.head_start : self.head_stop]


class _Written:
    """Regions that hold a value; neighbours are joined."""

    def __init__(self) -> None:
        self._regions: list[_Region] = []

    def overlaps(self, region: _Region) -> bool:
        return any(region.overlaps(other) for other in self._regions)

    def add(self, region: _Region) -> None:
        if self._regions:
            last = self._regions[-1]
            if last.stop == region.start and last[2:] == region[2:]:
                self._regions[-1] = last._replace(stop=region.stop)
                return
        self._regions.append(region)


class _Part(NamedTuple):
    region: _Region
    values: Tensor
    is_lent: bool

    def under(self, region: _Region) -> Tensor:
        """What of it lies in a region that it covers."""
        rows, heads = self.region.start, self.region.head_start
        return self.values[
            :,
            region.start - rows : region.stop - rows,
            region.head_start - heads : region.head_stop - heads,
        ]


class _Layer:
    """Parts of a sum, none of which overlaps another."""

    def __init__(self) -> None:
        self.parts: list[_Part] = []
        self._written = _Written()

    def takes(self, part: _Part) -> bool:
        if self._written.overlaps(part.region):
            return False
        self._written.add(part.region)
        self.parts.append(part)
        return True


class RowSum:
    """The sum of gradients [B, n, h, K] placed on ranges of a [B, T, H, K] tensor.

    Args:
        like: what the sum is the gradient of: gives shape, dtype and device.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._layers = (_Layer(), _Layer())
        self._wide: Tensor | None = None
        self._result: Tensor | None = None

    def add(
        self, part: Tensor, *, start: int = 0, head_start: int = 0, is_lent: bool = False
    ) -> None:
        """Add a part whose first row and head are the given ones."""
        assert self._result is None, "the sum has been taken"
        if not part.numel():
            return
        region = _Region(start, start + part.shape[1], head_start, head_start + part.shape[2])
        if self._wide is None:
            if any(layer.takes(_Part(region, part, is_lent)) for layer in self._layers):
                return
            self._wide = self._combined(wide_dtype(part.dtype))
            self._layers = (_Layer(), _Layer())
        region.of(self._wide).add_(part)

    def result(self) -> Tensor:
        """The sum [B, T, H, K] in `like`'s dtype; zero where nothing was added. Ends the sum."""
        if self._result is None:
            if self._wide is None:
                self._result = self._combined(self._like.dtype)
            else:
                self._result = self._wide.to(self._like.dtype)
            self._layers, self._wide = (_Layer(), _Layer()), None  # their memory is free again
        return self._result

    def _combined(self, dtype: torch.dtype) -> Tensor:
        """The layers' sum: into a part that covers all, if there is one, else into new memory."""
        parts = [part for layer in self._layers for part in layer.parts]
        whole = [x for x in parts if x.values.shape == self._like.shape and not x.is_lent]
        if whole:
            total = whole[0].values.to(dtype)
            for part in parts:
                if part is not whole[0]:
                    region = part.region.of(total)
                    write_sum(region, [region, part.values])
            return total
        total = torch.empty(self._like.shape, dtype=dtype, device=self._like.device)
        for cell, terms in _cells(parts, total):
            write_sum(cell, terms)
        return total


def _cells(parts: Sequence[_Part], total: Tensor) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """The total cut at all edges of parts: what is under a cell covers it, at most two parts."""
    rows, heads = {0, total.shape[1]}, {0, total.shape[2]}
    for part in parts:
        rows |= {part.region.start, part.region.stop}
        heads |= {part.region.head_start, part.region.head_stop}
    for start, stop in itertools.pairwise(sorted(rows)):
        inside = [p for p in parts if p.region.start < stop and start < p.region.stop]
        for head_start, head_stop in itertools.pairwise(sorted(heads)):
            cell = _Region(start, stop, head_start, head_stop)
            terms = [part.under(cell) for part in inside if part.region.overlaps(cell)]
            yield cell.of(total), terms


class PartialOutput:
    """Softmax attention merged from outputs over disjoint keys.

    Args:
        q: [B, T, H, K] queries: give B, T, H, the dtype of the result and the device.
        value_dim: V.
    """

    def __init__(self, q: Tensor, value_dim: int) -> None:
        self._q = q
        self._shape = torch.Size((*q.shape[:3], value_dim))
        self._out: Tensor | None = None
        self._lse: Tensor | None = None
        self._written = _Written()
        self._waiting: tuple[_Region, Tensor, Tensor] | None = None

    def add(self, out: Tensor, lse: Tensor, *, start: int = 0) -> None:
        """Add a part: out [B, n, H, V] and lse [B, n, H] of the rows from `start`."""
        if not out.numel():
            return
        region = _Region(start, start + out.shape[1], 0, out.shape[2])
        if self._out is None and out.shape == self._shape:
            self._out, self._lse = out, lse
            self._written.add(region)
            return
        self._begin(out)
        assert self._out is not None
        assert self._lse is not None
        if not self._written.overlaps(region):
            region.of(self._out).copy_(out)
            region.of(self._lse).copy_(lse)
            self._written.add(region)
        elif self._waiting is None and self._out.dtype == self._q.dtype:
            self._waiting = region, out, lse
        else:
            self._widen()
            self._merge_now(region, out, lse)

    def result(self) -> tuple[Tensor, Tensor]:
        """out [B, T, H, V] in q's dtype and lse [B, T, H]; rows without keys: 0 and -inf."""
        self._begin(self._q)
        self._merge_waiting()
        assert self._out is not None
        assert self._lse is not None
        return self._out.to(self._q.dtype), self._lse

    def _begin(self, part: Tensor) -> None:
        if self._out is None:
            self._out = torch.zeros(self._shape, dtype=part.dtype, device=part.device)
            self._lse = torch.full(
                self._shape[:3], -torch.inf, dtype=wide_dtype(part.dtype), device=part.device
            )

    def _widen(self) -> None:
        assert self._out is not None
        self._out = self._out.to(wide_dtype(self._out.dtype))
        self._merge_waiting()

    def _merge_waiting(self) -> None:
        if self._waiting is not None:
            self._merge_now(*self._waiting)
            self._waiting = None

    def _merge_now(self, region: _Region, out: Tensor, lse: Tensor) -> None:
        assert self._out is not None
        assert self._lse is not None
        merge_lse_(region.of(self._out), region.of(self._lse), out, lse)
        self._written.add(region)
