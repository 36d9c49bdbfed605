"""Documents are drawn once an epoch, resumably; plans reach every rank in one message."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from seqpar.data import DocumentSampler, limit_documents
from seqpar.errors import DataError

LENGTHS = [1, 700, 30, 999, 4, 4, 250, 61, 1000, 12]


def test_every_document_is_drawn_once_an_epoch_within_the_budget() -> None:
    sampler = DocumentSampler(LENGTHS, budget_tokens=1000, seed=3)
    drawn: list[int] = []
    while sampler.position < 5 * len(LENGTHS):
        step = sampler.draw()
        assert 0 < sum(LENGTHS[i] for i in step) <= 1000
        drawn += step
    for epoch in range(5):
        of_epoch = drawn[epoch * len(LENGTHS) : (epoch + 1) * len(LENGTHS)]
        assert Counter(of_epoch) == Counter(range(len(LENGTHS)))
    assert drawn[:10] != drawn[10:20], "epochs are shuffled anew"


@pytest.mark.parametrize("steps_before", [0, 1, 7])
def test_a_position_resumes_exactly(steps_before: int) -> None:
    whole = DocumentSampler(LENGTHS, budget_tokens=1200, seed=5)
    expected = [whole.draw() for _ in range(20)]
    first = DocumentSampler(LENGTHS, budget_tokens=1200, seed=5)
    before = [first.draw() for _ in range(steps_before)]
    again = DocumentSampler(LENGTHS, budget_tokens=1200, seed=5, position=first.position)
    assert before + [again.draw() for _ in range(20 - steps_before)] == expected


def test_documents_over_the_limit_are_split_or_dropped() -> None:
    documents = [torch.arange(n) for n in (0, 1, 10, 25)]
    split = limit_documents(documents, context_tokens=10, over_limit="split")
    assert [len(d) for d in split] == [1, 10, 10, 10, 5]
    assert torch.equal(torch.cat(split[2:]), documents[3])
    dropped = limit_documents(documents, context_tokens=10, over_limit="drop")
    assert [len(d) for d in dropped] == [1, 10]


def test_unusable_documents_are_refused() -> None:
    with pytest.raises(DataError, match="no document left"):
        limit_documents([torch.arange(5)], context_tokens=4, over_limit="drop")
    with pytest.raises(DataError, match="at least 1"):
        limit_documents([torch.arange(5)], context_tokens=0, over_limit="split")
    with pytest.raises(DataError, match="document 1 has no token"):
        DocumentSampler([3, 0], budget_tokens=5, seed=0)
    with pytest.raises(DataError, match="raise the budget or split"):
        DocumentSampler([3, 9], budget_tokens=5, seed=0)
    with pytest.raises(DataError, match="no documents"):
        DocumentSampler([], budget_tokens=5, seed=0)
