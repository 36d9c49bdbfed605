"""Every family in docs/models.md against one device: 4 gloo ranks, fp32, awkward documents."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from seqpar.adapters.tiny import TINY_FAMILIES, tiny_model, tiny_stream
from seqpar.batch import shard
from seqpar.errors import SeqparError
from seqpar.parallelize import parallelize
from seqpar.parity import ParityReport, check_parity
from seqpar.parity_ranks import DEFAULT_LENGTHS
from tests.ranks import run_ranks
from tests.small_hybrid import small_hybrid
from tests.tolerances import MODEL_GRADIENT, MODEL_LOSS

pytest.importorskip("transformers")

OWN = "a model of one's own"
CASES = [
    (family, layout) for family in [*TINY_FAMILIES, OWN] for layout in ("contiguous", "zigzag")
]
LENGTHS = {"contiguous": DEFAULT_LENGTHS, "zigzag": (3, 40, 1, 6)}


def _reports(rank: int) -> dict[tuple[str, str], ParityReport | SeqparError]:
    found: dict[tuple[str, str], ParityReport | SeqparError] = {}
    for family, layout in CASES:
        model = small_hybrid() if family == OWN else tiny_model(family)
        parallelize(model, dist.group.WORLD)
        stream = tiny_stream(model, LENGTHS[layout])
        batch = shard(stream, dist.group.WORLD, layout=layout)  # type: ignore[arg-type]
        try:
            found[family, layout] = check_parity(
                model, batch, loss_tolerance=MODEL_LOSS, gradient_tolerance=MODEL_GRADIENT
            )
        except SeqparError as error:
            found[family, layout] = error
    return found


@pytest.fixture(scope="module")
def reports() -> dict[tuple[str, str], ParityReport | SeqparError]:
    results = run_ranks(4, _reports, timeout_s=150)
    assert [set(result) for result in results] == [set(CASES)] * 4
    return results[0]


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_a_wrapped_model_equals_one_device(
    reports: dict[tuple[str, str], ParityReport | SeqparError], family: str, layout: str
) -> None:
    report = reports[family, layout]
    assert isinstance(report, ParityReport), str(report)
    assert report.ok
    assert report.loss_error <= MODEL_LOSS
    assert len(report.gradient_errors) > 5
    assert report.gradient_error <= MODEL_GRADIENT
    assert 3.5 < report.loss < 12  # log(61) is 4.1: not a mean over nothing
