"""Every family in docs/models.md against one device: 4 gloo ranks, fp32, awkward documents."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from seqpar.adapters.tiny import TINY_FAMILIES, tiny_model, tiny_stream
from seqpar.batch import Batch, shard
from seqpar.errors import LayoutError, SeqparError
from seqpar.loss import chunked_token_loss, token_loss
from seqpar.parity import ParityReport, check_parity
from seqpar.parity_ranks import DEFAULT_LENGTHS
from seqpar.wrap import parallelize
from tests.ranks import run_ranks
from tests.small_hybrid import small_hybrid
from tests.tolerances import MODEL_GRADIENT, MODEL_LOSS, relative_error

pytest.importorskip("transformers")

OWN = "a model of one's own"
Reports = dict[tuple[str, str], ParityReport | Exception]
# One family of each kind runs with both layouts, the others with the harder one.
BOTH = {"bamba", "bert", "llama", "mamba2", "minimax", "mistral", "modernbert", "t5", OWN}
CASES = [
    (family, layout)
    for family in [*TINY_FAMILIES, OWN]
    for layout in ("contiguous", "zigzag")
    if layout == "zigzag" or family in BOTH
]
CHOICES = [
    *[("qwen3", {"strategy": name}) for name in ("ring", "ulysses", "usp", "gather")],
    ("ministral", {"strategy": "gather"}),
    *[("bamba", {"exchange": name}) for name in ("all_gather", "chain", "log_step", "all_to_all")],
]
LENGTHS = {"contiguous": DEFAULT_LENGTHS, "zigzag": (3, 40, 1, 6)}


def _reports(rank: int) -> Reports:
    found: Reports = {}
    for family, layout in CASES:
        model = small_hybrid() if family == OWN else tiny_model(family)
        parallelize(model, dist.group.WORLD)
        stream = tiny_stream(model, LENGTHS[layout])
        batch = shard(stream, dist.group.WORLD, layout=layout)  # type: ignore[arg-type]
        try:
            found[family, layout] = check_parity(
                model, batch, loss_tolerance=MODEL_LOSS, gradient_tolerance=MODEL_GRADIENT
            )
            if layout == "zigzag" and type(model).__name__.endswith("ForCausalLM"):
                _check_blockwise_head(model, batch)
            if family != OWN:
                assert list(model.state_dict()) == list(tiny_model(family).state_dict())
        except (SeqparError, AssertionError) as error:
            found[family, layout] = error
    for family, choice in CHOICES:
        model = parallelize(tiny_model(family), dist.group.WORLD, **choice)  # type: ignore[arg-type]
        batch = shard(tiny_stream(model, DEFAULT_LENGTHS), dist.group.WORLD)
        try:
            found[family, str(choice)] = check_parity(model, batch)
        except SeqparError as error:
            found[family, str(choice)] = error
    return found


def _check_blockwise_head(model: nn.Module, batch: Batch) -> None:
    """The loss that never holds logits is that of the logits, gradients of the head too."""
    head = model.get_output_embeddings().weight
    whole = token_loss(model(**batch.inputs).logits, batch)
    blocks = chunked_token_loss(model, batch)
    assert abs(blocks.item() / whole.item() - 1) < MODEL_LOSS
    gradients = [torch.autograd.grad(loss, head)[0] for loss in (blocks, whole)]
    assert relative_error(*gradients) < MODEL_GRADIENT


@pytest.fixture(scope="module")
def reports() -> Reports:
    results = run_ranks(4, _reports, timeout_s=150)
    cases = [*CASES, *((family, str(choice)) for family, choice in CHOICES)]
    assert all(set(result) == set(cases) for result in results)
    return {case: _worst([result[case] for result in results]) for case in cases}


def _worst(answers: list[ParityReport | Exception]) -> ParityReport | Exception:
    """The first rank's that failed, or the first rank's."""
    failed = (answer for answer in answers if not isinstance(answer, ParityReport))
    return next(failed, answers[0])


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_a_wrapped_model_equals_one_device(reports: Reports, family: str, layout: str) -> None:
    report = reports[family, layout]
    assert isinstance(report, ParityReport), str(report)
    assert report.ok
    assert report.loss_error <= MODEL_LOSS
    assert len(report.gradient_errors) > 5
    assert report.gradient_error <= MODEL_GRADIENT
    assert 3.5 < report.loss < 12  # log(61) is 4.1: not a mean over nothing


@pytest.mark.parametrize(("family", "choice"), CHOICES, ids=str)
def test_every_strategy_and_exchange_equals_one_device(
    reports: Reports, family: str, choice: dict[str, str]
) -> None:
    report = reports[family, str(choice)]
    assert isinstance(report, ParityReport), str(report)
    assert report.loss_error <= MODEL_LOSS
    assert report.gradient_error <= MODEL_GRADIENT


def test_unknown_strategies_are_refused_at_wrap_time() -> None:
    with pytest.raises(LayoutError, match="no strategy 'rings': one of auto, ring"):
        parallelize(small_hybrid(), None, strategy="rings")  # type: ignore[arg-type]
    with pytest.raises(LayoutError, match="no exchange 'gossip'"):
        parallelize(small_hybrid(), None, exchange="gossip")
