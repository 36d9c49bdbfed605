"""The pictures of docs/softmax.md show what the operators do, and are up to date."""

from __future__ import annotations

import runpy
from collections import Counter
from pathlib import Path

import pytest

from seqpar.layout import SequenceLayout
from seqpar.ops.softmax_tiles import Mask
from tests.ops.softmax_reference import visible

DOCS = Path(__file__).parents[1] / "docs"
DRAWN = runpy.run_path(str(DOCS / "draw_softmax.py"))


@pytest.mark.parametrize("name", DRAWN["PICTURES"])
def test_a_picture_is_what_its_script_draws(name: str) -> None:
    message = "run: python docs/draw_softmax.py"
    assert (DOCS / f"softmax-{name}.svg").read_text() == DRAWN["PICTURES"][name]().svg(), message


@pytest.mark.parametrize("mask", [Mask(), Mask(window=3), Mask(causal=False)], ids=str)
def test_each_visible_pair_is_drawn_once_by_the_rank_of_its_query(mask: Mask) -> None:
    layout = SequenceLayout.zigzag((0, 5, 16), 4)
    drawn = list(DRAWN["pairs"](layout, mask))
    sees = visible(layout.cu_seqlens, causal=mask.causal, window=mask.window)
    assert Counter((q, k) for q, k, _, _ in drawn) == Counter(map(tuple, sees.nonzero().tolist()))
    assert all(q in layout.stream_positions(rank).tolist() for q, _, rank, _ in drawn)
