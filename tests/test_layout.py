"""Layouts: every constructor, awkward sizes, and what is derived from them."""

from __future__ import annotations

import pytest
import torch

from seqpar.errors import LayoutError
from seqpar.layout import IGNORE_INDEX, SequenceLayout, Span

BOUNDS = [(0,), (0, 1), (0, 1, 2, 3), (0, 7, 8, 30, 31), (0, 64), (0, 5, 129, 130, 131, 257)]


def _layouts(bounds: tuple[int, ...]) -> list[SequenceLayout]:
    layouts = [SequenceLayout.contiguous(bounds, w) for w in (1, 2, 3, 8)]
    layouts += [SequenceLayout.zigzag(bounds, w) for w in (1, 2, 3, 8)]
    n = bounds[-1]
    layouts.append(SequenceLayout(bounds, ((), (Span(0, n),), ())))
    if n >= 5:
        layouts.append(SequenceLayout(bounds, (((1, 3), (4, n)), ((0, 1),), ((3, 4),))))
    return layouts


ALL = [layout for bounds in BOUNDS for layout in _layouts(bounds)]


@pytest.mark.parametrize("layout", ALL)
def test_unshard_inverts_shard_and_positions_agree(layout: SequenceLayout) -> None:
    n = layout.num_tokens
    stream = torch.randn(2, n, 3)
    shards = [layout.shard(stream, rank) for rank in range(layout.world_size)]
    assert torch.equal(layout.unshard(shards), stream)

    documents = torch.repeat_interleave(
        torch.arange(layout.num_documents), torch.tensor(layout.cu_seqlens).diff()
    )
    starts = torch.tensor(layout.cu_seqlens)[documents]
    for rank in range(layout.world_size):
        held = layout.stream_positions(rank)
        assert torch.equal(layout.document_ids(rank), documents[held])
        assert torch.equal(layout.position_ids(rank), held - starts[held])
        assert torch.equal(shards[rank], stream[:, held])


@pytest.mark.parametrize("layout", ALL)
def test_runs_tile_the_local_tensor(layout: SequenceLayout) -> None:
    for rank in range(layout.world_size):
        held = layout.stream_positions(rank).tolist()
        documents = layout.document_ids(rank).tolist()
        position = 0
        for run in layout.runs(rank):
            assert run.local_start == position
            assert held[position : run.local_stop] == list(range(run.start, run.stop))
            assert set(documents[position : run.local_stop]) == {run.document}
            position = run.local_stop
        assert position == len(held)
        assert layout.local_cu_seqlens(rank)[-1] == position


@pytest.mark.parametrize("layout", ALL)
def test_chain_follows_the_stream(layout: SequenceLayout) -> None:
    position = 0
    bounds = set(layout.cu_seqlens)
    for link in layout.chain:
        assert link.span.start == position
        assert link.carries_in == (link.span.start not in bounds)
        assert link.carries_out == (link.span.stop not in bounds)
        inner = set(range(link.span.start + 1, link.span.stop))
        assert link.passes_through == (not inner & bounds)
        position = link.span.stop
    assert position == layout.num_tokens


@pytest.mark.parametrize("layout", ALL)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 4])
def test_visible_keys_are_the_union_of_what_queries_see(
    layout: SequenceLayout, causal: bool, window: int | None
) -> None:
    for link in layout.chain:
        seen = set()
        for q in range(*link.span):
            for k in range(layout.num_tokens):
                same = layout._document_of(q) == layout._document_of(k)
                near = window is None or abs(q - k) < window
                if same and near and (k <= q or not causal):
                    seen.add(k)
        keys = layout.visible_keys(link.span, causal=causal, window=window)
        assert (min(seen), max(seen) + 1) == keys


def test_halo_stops_at_the_document() -> None:
    layout = SequenceLayout.contiguous((0, 3, 10), 4)
    halos = [layout.halo(link.span, 3) for link in layout.chain]
    assert [link.span for link in layout.chain] == [(0, 2), (2, 5), (5, 7), (7, 10)]
    assert halos == [(0, 0), (0, 2), (3, 5), (4, 7)]
    assert layout.owners(Span(1, 6)) == ((0, (1, 2)), (1, (2, 5)), (2, (5, 6)))


def test_labels_never_cross_a_document() -> None:
    layout = SequenceLayout.contiguous((0, 3, 4, 6), 2)
    labels = layout.next_token_labels(torch.arange(10, 16)[None])
    assert labels.tolist() == [[11, 12, IGNORE_INDEX, IGNORE_INDEX, 15, IGNORE_INDEX]]


@pytest.mark.parametrize(
    ("bounds", "spans", "message"),
    [
        ((0, 4, 4), (((0, 4),),), "document 1 has no token"),
        ((1, 4), (((0, 4),),), "start at 0"),
        ((0, 4, 2), (((0, 2),),), "must increase"),
        ((0, 4), (((0, 3),),), "end at token 3"),
        ((0, 4), (((0, 3),), ((2, 4),)), "overlap"),
        ((0, 4), (((0, 1),), ((2, 4),)), "gap"),
        ((0, 4), (((2, 4), (0, 2)),), "run forward"),
        ((0, 4), (), "at least 1 rank"),
        ((0, 2.5, 4), (((0, 4),),), "cu_seqlens must be whole numbers, got .*2.5"),
        (torch.tensor([0.0, 4.0]), (((0, 4),),), "cu_seqlens must be whole numbers"),
        (4, (((0, 4),),), "cu_seqlens must be whole numbers, got 4"),
        ((0, 4), (((0, 2.5),), ((2.5, 4),)), "a span's bounds must be whole numbers, got .*2.5"),
    ],
)
def test_what_does_not_fit_is_refused(bounds: tuple, spans: tuple, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        SequenceLayout(bounds, spans)


def test_a_world_size_is_a_whole_number() -> None:
    for make in (SequenceLayout.contiguous, SequenceLayout.zigzag):
        with pytest.raises(LayoutError, match="world_size must be whole"):
            make((0, 4), 2.0)  # type: ignore[arg-type]


def test_whole_numbers_become_ints_whatever_holds_them() -> None:
    """So that equal layouts have equal hashes, which ranks compare."""
    plain = SequenceLayout((0, 4), (((0, 2),), ((2, 4),)))
    of_tensors = SequenceLayout(torch.tensor([0, 4]), torch.tensor([[[0, 2]], [[2, 4]]]))
    assert plain == of_tensors
    assert hash(plain) == hash(of_tensors)


def test_a_tensor_that_does_not_fit_is_refused() -> None:
    layout = SequenceLayout.contiguous((0, 6), 2)
    with pytest.raises(LayoutError, match="6 tokens on dim 1"):
        layout.shard(torch.zeros(1, 5), 0)
    with pytest.raises(LayoutError, match="3 tokens"):
        layout.unshard([torch.zeros(1, 3), torch.zeros(1, 2)])
