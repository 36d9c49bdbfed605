"""A compiled wrapped model: the same gradients, and graph breaks that are counted and known."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist

from seqpar.adapters.tiny import tiny_model, tiny_stream
from seqpar.batch import shard
from seqpar.loss import chunked_token_loss, token_loss
from seqpar.wrap import parallelize
from tests.ranks import run_ranks
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


def _compiled_on_ranks(rank: int) -> dict[str, list[float]]:
    """Relative errors of each parameter's gradient, compiled against not, on this rank."""
    warnings.simplefilter("ignore")
    found = {}
    for family in ("llama", "bamba"):  # bamba has every kind of exchange
        model = parallelize(tiny_model(family), dist.group.WORLD)
        eager: Any = copy.deepcopy(model)
        compiled = torch.compile(model, backend="aot_eager", dynamic=True)
        for lengths, layout in zip(LENGTHS, ("contiguous", "zigzag"), strict=True):
            batch = shard(tiny_stream(model, lengths), dist.group.WORLD, layout=layout)  # type: ignore[arg-type]
            for called in (compiled, eager):
                token_loss(called(**batch.inputs).logits, batch).backward()
        pairs = zip(model.parameters(), eager.parameters(), strict=True)
        found[family] = [relative_error(ours.grad, plain.grad) for ours, plain in pairs]
    return found


@pytest.mark.slow
def test_compiled_on_two_ranks_and_backward_too() -> None:
    for found in run_ranks(2, _compiled_on_ranks, timeout_s=120):
        for family, errors in found.items():
            assert len(errors) > 5
            assert max(errors) < MODEL_GRADIENT, family
