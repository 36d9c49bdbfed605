"""A compiled wrapped model: the same gradients, and graph breaks that are counted and known."""

from __future__ import annotations

import copy

import pytest
import torch

from seqpar.adapters.tiny import tiny_model, tiny_stream
from seqpar.batch import shard
from seqpar.loss import chunked_token_loss, token_loss
from seqpar.wrap import parallelize
from tests.tolerances import MODEL_GRADIENT, relative_error

pytest.importorskip("transformers")

LENGTHS = ((13, 1, 29, 7), (5, 6, 7, 8, 9))

BREAKS = {
    "llama": {"Wrapping.context", "_attend"},
    "minimax": {"Wrapping.context", "_attend", "_lightning"},
    "bamba": {"Wrapping.context", "_attend", "_convolution", "_state"},
}
"""Where a compiled call leaves its graphs: the call's layout, and each exchange."""

GRAPHS = {"llama": 10, "minimax": 13, "bamba": 17}
"""Whatever the layouts and the number of layers of a kind: layers share code."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "chunked"), [*((family, False) for family in GRAPHS), ("llama", True)]
)
def test_compile_breaks_at_exchanges_and_not_for_new_layouts(family: str, chunked: bool) -> None:
    """What is compiled is the same on any number of ranks: exchanges stay outside the graphs."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = parallelize(tiny_model(family), None)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager", dynamic=True)
    graphs = []
    for lengths in LENGTHS:
        batch = shard(tiny_stream(model, lengths), None)
        for called in (compiled, eager):
            if chunked:
                chunked_token_loss(called, batch).backward()
            else:
                token_loss(called(**batch.inputs).logits, batch).backward()
        graphs.append(counters["stats"]["unique_graphs"])
    for ours, plain in zip(model.parameters(), eager.parameters(), strict=True):
        assert relative_error(ours.grad, plain.grad) < MODEL_GRADIENT
    places = {reason.partition("<function ")[2].split()[0] for reason in counters["graph_break"]}
    assert places == BREAKS[family] | ({"lm_head_loss_sum"} if chunked else set())
    assert graphs == [GRAPHS[family] + chunked] * 2  # another layout is not another compilation
