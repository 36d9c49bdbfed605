"""Checkpoints: what is loaded is what was saved, on any number of ranks, or the one before."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from seqpar.errors import CheckpointError
from seqpar.launch.checkpoint import CheckpointStore
from seqpar.launch.manifest import find_fault, read_manifest
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"
)


def model_and_optimizer(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
        loss = model(x).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def test_training_goes_on_exactly_where_it_was_saved(tmp_path):
    model, optimizer = model_and_optimizer(0)
    train(model, optimizer, range(3))
    with CheckpointStore(tmp_path, run_id="a") as store:
        extra = {"data": {"epoch": 1, "offset": 7}, "rng": torch.get_rng_state(), "degrees": [1, 2]}
        store.save_async(3, state_of(model, optimizer), extra)
        expected = train(model, optimizer, range(3, 6))  # while the save is under way

    again, its_optimizer = model_and_optimizer(1)
    train(again, its_optimizer, range(1))  # the optimizer has state to be filled
    store = CheckpointStore(tmp_path, run_id="a")
    found = store.latest_complete()
    assert found is not None
    state = state_of(again, its_optimizer)
    loaded = store.load(found, state)
    again.load_state_dict(state["model"])
    its_optimizer.load_state_dict(state["optimizer"])
    assert found.step == 3
    assert loaded["data"] == {"epoch": 1, "offset": 7}
    assert torch.equal(loaded["rng"], extra["rng"])
    assert train(again, its_optimizer, range(3, 6)) == expected


def save_steps(folder: Path, steps: list[int], *, run_id: str = "a", keep: int = 2) -> None:
    with CheckpointStore(folder, run_id=run_id, keep=keep) as store:
        for step in steps:
            store.save_async(step, {"w": torch.full((64,), float(step))}, {"step": step})


def loaded_step(folder: Path, *, run_id: str = "a") -> int | None:
    store = CheckpointStore(folder, run_id=run_id)
    found = store.latest_complete()
    if found is None:
        return None
    state = {"w": torch.zeros(64)}
    extra = store.load(found, state)
    assert extra["step"] == found.step
    assert torch.equal(state["w"], torch.full((64,), float(found.step)))
    return found.step


def test_the_newest_are_kept_and_the_rest_go(tmp_path):
    save_steps(tmp_path, [1, 2, 3, 4])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]
    assert loaded_step(tmp_path) == 4


def truncate(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    os.truncate(path, path.stat().st_size - 1)


def flip_a_bit(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def drop_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def cut_manifest(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 40)


def drop_extra(folder: Path) -> None:
    (folder / "extra-0.pt").unlink()


@pytest.mark.parametrize("tear", [truncate, flip_a_bit, drop_manifest, cut_manifest, drop_extra])
def test_a_torn_checkpoint_is_recognised_and_the_one_before_is_used(tmp_path, tear, caplog):
    save_steps(tmp_path, [1, 2])
    tear(tmp_path / "step-00000002")
    assert loaded_step(tmp_path) == 1
    assert "step-00000002 is passed over" in caplog.text


def test_a_save_that_was_cut_off_is_not_there_and_is_done_again(tmp_path):
    save_steps(tmp_path, [1])
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000002.part")
    assert loaded_step(tmp_path) == 1
    save_steps(tmp_path, [2])
    assert loaded_step(tmp_path) == 2


def test_a_torn_checkpoint_of_the_same_step_is_replaced(tmp_path):
    save_steps(tmp_path, [1, 2])
    truncate(tmp_path / "step-00000002")
    save_steps(tmp_path, [2])
    assert loaded_step(tmp_path) == 2


def test_another_runs_checkpoints_are_neither_used_nor_removed(tmp_path):
    save_steps(tmp_path, [10, 20], run_id="before")
    assert loaded_step(tmp_path, run_id="a") is None
    save_steps(tmp_path, [1, 2, 3], run_id="a")
    assert loaded_step(tmp_path, run_id="a") == 3
    assert loaded_step(tmp_path, run_id="before") == 20


@contextmanager
def files_no_larger_than(size_bytes: int) -> Iterator[None]:
    """The kernel refuses what goes beyond, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_checkpoint_before_and_training_goes_on(tmp_path):
    save_steps(tmp_path, [1])
    store = CheckpointStore(tmp_path, run_id="a")
    with files_no_larger_than(4096):
        store.save_async(2, {"w": torch.ones(10_000)}, {"step": 2})
        with pytest.raises(CheckpointError, match="step 2 was not written"):
            store.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    store.save_async(3, {"w": torch.full((64,), 3.0)}, {"step": 3})
    store.close()
    assert loaded_step(tmp_path) == 3


class Unwritable:
    """Fails to be written as a full disk does."""

    def __reduce__(self):
        raise OSError(28, "No space left on device")


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/seqpar-evil",)


class Reaching:
    """What Python 3.11.0 to 3.11.3 write for an enum's member, of something that is no enum."""

    def __reduce__(self):
        return getattr, (torch.Size, "__init_subclass__")


def test_metadata_of_a_python_that_pickles_enums_by_getattr_is_read(tmp_path, monkeypatch):
    save_steps(tmp_path, [1])
    by_getattr = lambda member, protocol: (getattr, (type(member), member.name))  # noqa: E731
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", by_getattr)
    save_steps(tmp_path, [2])
    found = CheckpointStore(tmp_path, run_id="a").latest_complete()
    assert found is not None
    assert b"getattr" in (found.folder / ".metadata").read_bytes()
    assert loaded_step(tmp_path) == 2


def test_metadata_may_get_no_other_attribute(tmp_path):
    save_steps(tmp_path, [1])
    store = CheckpointStore(tmp_path, run_id="a")
    found = store.latest_complete()
    assert found is not None
    (found.folder / ".metadata").write_bytes(pickle.dumps(Reaching()))
    with pytest.raises(CheckpointError, match="__init_subclass__"):
        store.load(found, {"w": torch.zeros(64)})


@pytest.mark.parametrize("name", [".metadata", "extra-0.pt"])
def test_nothing_in_a_checkpoint_is_run(tmp_path, name):
    save_steps(tmp_path, [1])
    store = CheckpointStore(tmp_path, run_id="a")
    found = store.latest_complete()
    assert found is not None
    (found.folder / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError):
        store.load(found, {"w": torch.zeros(64)})
    assert not Path("/tmp/seqpar-evil").exists()


def test_a_state_that_is_not_in_the_checkpoint_is_refused(tmp_path):
    save_steps(tmp_path, [1])
    store = CheckpointStore(tmp_path, run_id="a")
    found = store.latest_complete()
    assert found is not None
    with pytest.raises(CheckpointError, match="does not hold this state"):
        store.load(found, {"other": torch.zeros(64)})


def test_keeping_none_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="keep is 0"):
        CheckpointStore(tmp_path, keep=0)


ROWS = torch.arange(24.0).reshape(12, 2)


def save_on_ranks(rank: int, folder: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = {"sharded": distribute_tensor(ROWS.clone(), mesh, [Shard(0)]), "same": ROWS[0].clone()}
    with CheckpointStore(folder, run_id="a") as store:
        store.save_async(5, state, {"rank": rank, "rng": torch.tensor([rank])})
        for _ in range(20):  # the training's own messages, while the save's are under way
            dist.all_reduce(torch.ones(8))


def load_on_ranks(rank: int, folder: str) -> tuple[int, torch.Tensor, torch.Tensor, dict]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = {"sharded": distribute_tensor(torch.zeros(12, 2), mesh, [Shard(0)]), "same": ROWS[1]}
    store = CheckpointStore(folder, run_id="a")
    found = store.latest_complete()
    assert found is not None
    extra = store.load(found, state)
    sharded = state["sharded"]
    assert isinstance(sharded, DTensor)
    return found.step, sharded.full_tensor(), state["same"], extra


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_another_number_of_ranks_loads_the_same_state(tmp_path, ranks):
    run_ranks(2, save_on_ranks, str(tmp_path))
    for rank, (step, sharded, same, extra) in enumerate(
        run_ranks(ranks, load_on_ranks, str(tmp_path))
    ):
        assert step == 5
        assert torch.equal(sharded, ROWS)
        assert torch.equal(same, ROWS[0])
        assert extra["rank"] == (rank if rank < 2 else 0)


def save_with_one_failing(rank: int, folder: str) -> str:
    with CheckpointStore(folder, run_id="a") as store:
        store.save_async(1, {"w": torch.ones(3)}, {"fine": 1})
        store.save_async(2, {"w": torch.ones(3)}, {"x": Unwritable() if rank == 1 else 1})
        try:
            store.wait()
        except CheckpointError as error:
            return str(error)
    return ""


def test_a_failure_on_one_rank_is_told_on_all_and_leaves_the_one_before(tmp_path):
    for message in run_ranks(2, save_with_one_failing, str(tmp_path)):
        assert "step 2 was not written: rank 1: OSError" in message
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    manifest = read_manifest(tmp_path / "step-00000001")
    assert manifest is not None
    assert {"extra-0.pt", "extra-1.pt", ".metadata"} < set(manifest.files)
    assert find_fault(tmp_path / "step-00000001", run_id="a") is None
