"""The Trainer's and accelerate's examples: the same losses however ranks share streams."""

from __future__ import annotations

import importlib.util
import math
import os
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

from seqpar.errors import DataError
from seqpar.loaders import SequenceParallelLoader, collate_documents, stream_of
from tests.ranks import run_ranks

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = ("trainer_llama", "accelerate_llama")


def _example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _curves(rank: int) -> dict[str, dict[int, dict[str, list[float]]]]:
    warnings.simplefilter("ignore")  # other packages' notices
    # torchrun would set these too; the process group exists, so nobody connects to the port.
    os.environ.update(LOCAL_WORLD_SIZE="4", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    return {
        name: {sp: _example(name).main(["--sp", str(sp)]) for sp in (1, 2, 4)} for name in NAMES
    }


@pytest.fixture(scope="module")
def curves() -> dict[str, dict[int, dict[str, list[float]]]]:
    return run_ranks(4, _curves, timeout_s=150)[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", ["loss", "grad_norm"])
def test_an_example_trains_alike_on_any_split(
    curves: dict[str, dict[int, dict[str, list[float]]]], name: str, what: str
) -> None:
    alone = curves[name][1][what]  # ordinary data parallelism
    assert len(alone) == 4
    if what == "loss":
        assert alone[-1] < alone[0] - 0.3
    for sp in (2, 4):
        pairs = zip(curves[name][sp][what], alone, strict=True)
        assert all(math.isclose(a, b, rel_tol=1e-4) for a, b in pairs), (sp, curves[name][sp][what])


def _uneven_loaders(rank: int) -> list[list[list[int]]]:
    """Rank 0 reads one batch, rank 1 three: every row is used once, by both."""
    rows = [[[1, 2, 3]], [[4, 5], [6, 7, 8, 9], [10]]][rank]
    seen = []
    for batch in SequenceParallelLoader([[row] for row in rows], dist.group.WORLD):
        seen.append(batch.ids[0].tolist())
    return seen


def test_ranks_take_turns_until_the_last_row() -> None:
    first, second = run_ranks(2, _uneven_loaders)
    whole = [a + b for a, b in zip(first, second, strict=True)]
    assert whole == [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10]]


def test_rows_of_every_kind_become_the_same_stream() -> None:
    documents = [[5, 6, 7], [8, 9]]
    padded = torch.tensor([[0, 5, 6, 7], [8, 9, 0, 0]])
    flat = torch.tensor([[5, 6, 7, 8, 9]])
    kinds = [
        documents,
        collate_documents([{"input_ids": document} for document in documents]),
        {"input_ids": padded, "attention_mask": (padded > 0).long(), "labels": padded},
        {"input_ids": flat, "position_ids": torch.tensor([[0, 1, 2, 0, 1]])},
    ]
    for rows in kinds:
        stream = stream_of(rows)
        assert stream.cu_seqlens == (0, 3, 5)
        assert stream.ids.tolist() == [[5, 6, 7, 8, 9]]
        assert stream.labels.tolist() == [[6, 7, -100, 9, -100]]
    with pytest.raises(DataError, match="needs input_ids"):
        stream_of({"text": ["a"]})
    with pytest.raises(DataError, match="example 0 has no input_ids"):
        collate_documents([{"text": "a"}])
