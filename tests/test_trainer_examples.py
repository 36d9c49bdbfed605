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
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from seqpar.errors import DataError
from seqpar.loaders import SequenceParallelLoader, TrainerLoader, collate_documents, stream_of
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


def _shuffled_epochs(rank: int) -> list[list[list[int]]]:
    """A DataLoader as distributed training builds it: shuffled anew by epoch, each row once."""
    rows = [{"input_ids": list(range(10 * n, 10 * n + 3 + n % 4))} for n in range(8)]
    sampler = DistributedSampler(rows, num_replicas=2, rank=rank, shuffle=True, seed=3)
    loader = DataLoader(rows, batch_size=2, sampler=sampler, collate_fn=collate_documents)  # type: ignore[arg-type]
    trainer_loader = TrainerLoader(loader, dist.group.WORLD)
    assert len(trainer_loader) == 4
    assert trainer_loader.dataset is rows
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append([inputs["input_ids"][0].tolist() for inputs in trainer_loader])
    return epochs


def test_any_data_loader_gives_every_row_once_an_epoch() -> None:
    first, second = run_ranks(2, _shuffled_epochs)
    expected = sorted(token for n in range(8) for token in range(10 * n, 10 * n + 3 + n % 4))
    for ours, theirs in zip(first, second, strict=True):
        assert len(ours) == len(theirs) == 4
        assert sorted(token for batch in (*ours, *theirs) for token in batch) == expected
    assert first[0] != first[1]  # another epoch, another order


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
