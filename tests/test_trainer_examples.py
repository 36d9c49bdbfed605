"""The Trainer's and accelerate's examples: the same losses however ranks share streams."""

from __future__ import annotations

import importlib.util
import math
import os
import tempfile
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from seqpar.adapters.tiny import tiny_model
from seqpar.batch import pack, shard
from seqpar.loaders import SequenceParallelLoader, TrainerLoader, collate_documents
from seqpar.loss import token_loss, trainer_loss
from seqpar.wrap import parallelize
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


def _evaluated(rank: int) -> float:
    """The Trainer's loss of 30 documents: it pads the last batch with the first two of them."""
    from transformers import TrainingArguments

    warnings.simplefilter("ignore")
    os.environ.update(LOCAL_WORLD_SIZE="4", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    example = _example("trainer_llama")
    with tempfile.TemporaryDirectory() as folder:
        options = {"report_to": [], "disable_tqdm": True, "remove_unused_columns": False}
        arguments = TrainingArguments(folder, use_cpu=True, **options)
        trainer = example.SequenceParallelTrainer(
            model=parallelize(tiny_model("llama"), mesh["sp"]),
            args=arguments,
            eval_dataset=HELD_OUT,
            data_collator=collate_documents,
            compute_loss_func=trainer_loss,
        )
        trainer.mesh = mesh
        return float(trainer.evaluate()["eval_loss"])


HELD_OUT = [{"input_ids": torch.arange(2 + 5 * n % 23) % 50 + 3} for n in range(30)]


def test_evaluation_gives_the_mean_of_its_steps_means() -> None:
    results = run_ranks(4, _evaluated)
    model, documents = parallelize(tiny_model("llama"), None), [x["input_ids"] for x in HELD_OUT]
    of_ranks = [documents[8 * n : 8 * n + 8] for n in range(4)]
    of_ranks[3] += documents[:2]
    means = []
    for together in ((0, 2), (1, 3)):  # ranks 0 and 1 take turns, and ranks 2 and 3
        batch = shard(pack([d for rank in together for d in of_ranks[rank]]), None)
        means.append(token_loss(model(**batch.inputs).logits, batch).item())
    for result in results:
        assert math.isclose(result, sum(means) / 2, rel_tol=1e-5)


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


def _groups_that_read_unequally(rank: int) -> list[tuple[float, float]]:
    """Group 0 reads two batches, group 1 five: the loss of each step, and a gradient's norm."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    model = parallelize(tiny_model("llama"), mesh["sp"])
    outer = torch.nn.parallel.DistributedDataParallel(model)
    loader = SequenceParallelLoader(UNEQUAL[rank], mesh["sp"], layout="zigzag", mesh=mesh)
    steps = []
    for batch in loader:
        loss = token_loss(outer(**batch.inputs).logits, batch, mesh=mesh)
        loss.backward()
        steps.append((loss.item(), model.model.embed_tokens.weight.grad.norm().item()))
        model.zero_grad()
    return steps


UNEQUAL = [[[[3, 4, 5]]], [[[6, 7]]], [[[8, 9, 10], [11, 12]], [[13, 14]]], [[[15, 16]]] * 3]
"""By rank, batches, documents. Ranks 0 and 1 share a group, 2 and 3 another."""
STEPS = [
    [[3, 4, 5], [8, 9, 10], [11, 12]], [[6, 7], [15, 16]], [[13, 14]], [[15, 16]], [[15, 16]]
]  # fmt: skip


def test_a_group_without_rows_goes_on_without_targets() -> None:
    results = run_ranks(4, _groups_that_read_unequally)
    assert results[1:] == results[:1] * 3
    for documents, (loss, norm) in zip(STEPS, results[0], strict=True):
        model = tiny_model("llama")
        batch = shard(pack(documents), None)
        expected = token_loss(parallelize(model, None)(**batch.inputs).logits, batch)
        expected.backward()
        gradient = model.model.embed_tokens.weight.grad
        assert math.isclose(loss, expected.item(), rel_tol=1e-5)
        assert math.isclose(norm, gradient.norm().item(), rel_tol=1e-4)
