"""Halos and the short convolution against one device, over every layout and document bounds."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from seqpar import comm
from seqpar.errors import LayoutError
from seqpar.layout import SequenceLayout
from seqpar.ops.halo import halo_grad_steps, halo_steps, left_halo, short_convolution
from tests.ops.cases import BOUNDS, layouts
from tests.ranks import run_ranks
from tests.simulator import simulate
from tests.tolerances import assert_close

CHANNELS, TAPS = 6, 4


def _one_device(x: Tensor, weight: Tensor, bias: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """torch's own convolution, document by document."""
    parts = []
    for start, stop in itertools.pairwise(bounds):
        padded = functional.pad(x[:, start:stop].mT, (TAPS - 1, 0))
        parts.append(functional.conv1d(padded, weight[:, None], bias, groups=CHANNELS).mT)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("width", [1, 3, 9])
def test_halo_holds_the_tokens_left_of_each_span(name: str, width: int) -> None:
    bounds = BOUNDS[name]
    stream = torch.randn(2, bounds[-1], 3, dtype=torch.float64)
    for world_size in (1, 2, 3, 8):
        for layout in layouts(bounds, world_size).values():
            ranks = range(world_size)
            shards = [layout.shard(stream, r) for r in ranks]
            halos = simulate([halo_steps(shards[r], width, layout, r) for r in ranks])
            grads = [torch.randn_like(halo) for halo in halos]
            counts = [layout.tokens_on(r) for r in ranks]
            back = simulate([halo_grad_steps(grads[r], counts[r], width, layout, r) for r in ranks])
            expected_grad = torch.zeros_like(stream)
            for rank in ranks:
                for index, span in enumerate(layout.spans[rank]):
                    held = layout.halo(span, width)
                    pad = width - held.num_tokens
                    assert not halos[rank][:, index, :pad].any()
                    expected = stream[:, held.start : held.stop]
                    assert torch.equal(halos[rank][:, index, pad:], expected)
                    expected_grad[:, held.start : held.stop] += grads[rank][:, index, pad:]
            assert torch.allclose(layout.unshard(back), expected_grad, rtol=1e-12, atol=1e-12)


def _convolve(
    rank: int, cases: list[tuple[SequenceLayout, Tensor, Tensor, Tensor, Tensor]]
) -> list[tuple[Tensor, ...]]:
    results = []
    for layout, x, weight, bias, dy in cases:
        leaves = [t.clone().requires_grad_() for t in (layout.shard(x, rank), weight, bias)]
        with comm.count_traffic() as traffic:
            y = short_convolution(*leaves, layout=layout, group=dist.group.WORLD, check=False)
            forward = traffic.received_bytes
            grads = torch.autograd.grad(y, leaves, layout.shard(dy, rank))
        token_bytes = x[:, 0].numel() * x.element_size()
        tokens_in, tokens_back = _tokens_moved(layout, rank)
        assert forward == tokens_in * token_bytes
        assert traffic.received_bytes - forward == tokens_back * token_bytes
        assert set(traffic.operations) <= {"exchange"}
        results.append((y.detach(), *grads))
    return results


def _tokens_moved(layout: SequenceLayout, rank: int) -> tuple[int, int]:
    """(halo tokens that come here, own tokens in the halos of other ranks)."""
    moved = [
        (owner, taker, part.num_tokens)
        for taker, spans in enumerate(layout.spans)
        for span in spans
        for owner, part in layout.owners(layout.halo(span, TAPS - 1))
        if owner != taker
    ]
    comes = sum(count for _, taker, count in moved if taker == rank)
    return comes, sum(count for owner, _, count in moved if owner == rank)


def test_convolution_over_ranks_equals_one_device() -> None:
    cases, expected = [], []
    for dtype in (torch.float32, torch.bfloat16):
        for bounds in BOUNDS.values():
            weight, bias = torch.randn(CHANNELS, TAPS), torch.randn(CHANNELS)
            x = torch.randn(2, bounds[-1], CHANNELS).to(dtype)
            dy = torch.randn_like(x)
            leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
            y = _one_device(*leaves, bounds)
            grads = torch.autograd.grad(y, leaves, dy.double())
            for layout in layouts(bounds, 3).values():
                cases.append((layout, x, weight, bias, dy))
                expected.append((y.detach(), *grads))
    results = run_ranks(3, _convolve, cases)
    for index, (layout, x, *_) in enumerate(cases):
        y, dx, dweight, dbias = expected[index]
        parts = [results[rank][index] for rank in range(3)]
        assert_close(layout.unshard([p[0] for p in parts]), y, what="y")
        assert_close(layout.unshard([p[1] for p in parts]), dx, what="dx")
        for position, ref in ((2, dweight), (3, dbias)):
            total = torch.stack([p[position] for p in parts]).sum(0)
            shape = (CHANNELS, -1)
            assert_close(total.view(shape), ref.view(shape), what="dw", dtype=x.dtype, dim=0)


def test_what_does_not_fit_is_refused() -> None:
    layout = SequenceLayout.contiguous((0, 6), 1)
    x = torch.randn(1, 6, CHANNELS)
    with pytest.raises(LayoutError, match="the 6 tokens"):
        left_halo(x[:, :5], width=2, layout=layout, group=None)
    with pytest.raises(LayoutError, match="width"):
        left_halo(x, width=0, layout=layout, group=None)
    with pytest.raises(LayoutError, match="has 1"):
        left_halo(x, width=1, layout=SequenceLayout.contiguous((0, 6), 2), group=None)
    for shape in ((CHANNELS + 1, TAPS), (CHANNELS, 1, TAPS), (CHANNELS, 0)):
        with pytest.raises(LayoutError, match="weight"):
            short_convolution(x, torch.randn(shape), layout=layout, group=None)
