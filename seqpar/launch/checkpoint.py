"""Checkpoints that are either whole or not there: asynchronous, atomic, checked when read.

Saving copies the state to host memory (the only part that training waits for); a thread then
writes it with torch.distributed.checkpoint into a hidden folder, digests what this rank wrote,
and rank 0 adds the manifest and renames the folder into place. A crash at any moment leaves the
checkpoint before. Loading verifies every digest and falls back to the newest whole one.

    store = CheckpointStore(folder)
    if found := store.latest_complete():
        extra = store.load(found, state)          # state is filled in place, resharded if need be
    ...
    store.save_async(step, state, {"data": position, "rng": torch.get_rng_state()})
    store.close()                                 # waits for the last one
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException  # derives from BaseException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from seqpar.errors import CheckpointError
from seqpar.launch.manifest import (
    Manifest,
    SafePlanner,
    SafeReader,
    digest_files,
    find_fault,
    read_manifest,
    sync_folder,
)

__all__ = ["Checkpoint", "CheckpointStore"]

logger = logging.getLogger("seqpar.checkpoint")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk: its step, folder and the number of ranks that wrote it."""

    step: int
    folder: Path
    world_size: int


class CheckpointStore:
    """The checkpoints of one run in one folder. Collective: every rank makes one, and every rank
    calls `save_async`, `latest_complete` and `load` alike, in the same order.

    Saving uses a gloo group of its own, so that its messages never meet the training's. `keep`
    complete checkpoints stay; older ones of this run go. Those of other runs in the same folder are
    neither found nor removed, unless one of the same step is saved.

    Without torch.distributed it works on one process.
    """

    def __init__(
        self, folder: str | Path, *, run_id: str = "", keep: int = 2, timeout_s: float = 600.0
    ) -> None:
        if keep < 1:
            raise CheckpointError(f"keep is {keep}: at least 1 checkpoint has to stay")
        self.folder = Path(folder)
        self.run_id = run_id
        self.keep = keep
        distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.group: dist.ProcessGroup | None = None
        if distributed:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self.rank = dist.get_rank() if distributed else 0
        self.world_size = dist.get_world_size() if distributed else 1
        self.folder.mkdir(parents=True, exist_ok=True)
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="seqpar-checkpoint")
        self.pending: Future[None] | None = None
        self.stager = FileSystemWriter(self.folder)

    def save_async(self, step: int, state_dict: dict[str, Any], extra: dict[str, Any]) -> None:
        """Copy the state to host memory and write it in the background.

        `state_dict` holds tensors (DTensors too) and plain values in nested dicts; equal tensors of
        several ranks are written once. `extra` is this rank's own: data position, random state,
        geometry, plan; plain values and tensors. One save is under way at a time: this waits for
        the one before, and a failure of that one (a full disk) is logged, for training goes on.
        """
        with contextlib.suppress(CheckpointError):
            self.wait()
        staged = self.stager.stage(state_dict)
        self.pending = self.thread.submit(self._write, step, staged, _to_host(extra))

    def wait(self) -> None:
        """Wait for the save under way.

        Raises:
            CheckpointError: it failed; the checkpoint before it is untouched.
        """
        pending, self.pending = self.pending, None
        if pending is None:
            return
        try:
            pending.result()
        except CheckpointError as error:
            logger.error("%s", error)
            raise

    def latest_complete(self) -> Checkpoint | None:
        """The newest whole checkpoint of this run, or None. Rank 0 looks, all get its answer."""
        found = self._find() if self.rank == 0 else None
        if self.group is None:
            return found
        answer = [found]
        dist.broadcast_object_list(answer, src=0, group=self.group)
        return answer[0]

    def load(self, checkpoint: Checkpoint, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Fill `state_dict` in place and return this rank's `extra`.

        The number of ranks may differ from the one that saved: tensors are resharded, and a rank
        that had no part in the saving gets rank 0's `extra`.

        Raises:
            CheckpointError: the checkpoint does not hold this state.
        """
        try:
            load_distributed(
                state_dict,
                storage_reader=SafeReader(checkpoint.folder),
                planner=SafePlanner(),
                process_group=self.group,
                no_dist=self.group is None,
            )
            rank = self.rank if self.rank < checkpoint.world_size else 0
            extra = torch.load(checkpoint.folder / f"extra-{rank}.pt", weights_only=True)
        except (Exception, CheckpointException) as error:
            raise CheckpointError(
                f"{checkpoint.folder} does not hold this state: {_reason(error)}; "
                "load it into the model and optimizer that saved it"
            ) from error
        assert isinstance(extra, dict)
        return extra

    def close(self) -> None:
        """Wait for the save under way and end the thread; a failure of that save is raised."""
        try:
            self.wait()
        finally:
            self.thread.shutdown()

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self.thread.shutdown(wait=False)

    def _find(self) -> Checkpoint | None:
        for step, folder in sorted(_checkpoints(self.folder), reverse=True):
            fault = find_fault(folder, run_id=self.run_id)
            if fault is None:
                manifest = read_manifest(folder)
                assert manifest is not None
                return Checkpoint(step, folder, manifest.world_size)
            logger.warning("checkpoint %s is passed over: %s", folder, fault)
        return None

    def _write(self, step: int, state_dict: dict[str, Any], extra: dict[str, Any]) -> None:
        """All of a save but the copy; the same outcome on every rank."""
        hidden = self.folder / f".step-{step:08d}.part"
        try:
            faults = self._all_ranks(self._empty(hidden))
            if not faults:
                files, faults = self._gather(*self._write_own(hidden, state_dict, extra))
                faults = self._all_ranks(faults or self._commit(step, hidden, files))
        except (Exception, CheckpointException) as error:
            faults = [_reason(error)]
        if faults:
            if self.rank == 0:
                shutil.rmtree(hidden, ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint of step {step} was not written: {faults[0]}; "
                f"the one before stays; is there space in {self.folder}?"
            )

    def _write_own(
        self, hidden: Path, state_dict: dict[str, Any], extra: dict[str, Any]
    ) -> tuple[dict[str, tuple[int, str]], str | None]:
        """Write this rank's part; its files and their digests, or what went wrong."""
        fault = None
        try:
            with (hidden / f"extra-{self.rank}.pt").open("wb") as file:
                torch.save(extra, file)
                file.flush()
                os.fsync(file.fileno())
        except Exception as error:  # the others are about to meet in a collective: go there first
            fault = f"rank {self.rank}: {_reason(error)}"
        try:
            writer = FileSystemWriter(hidden, sync_files=True)
            alone = self.group is None
            save_distributed(
                state_dict, storage_writer=writer, process_group=self.group, no_dist=alone
            )
            return digest_files(hidden, self._own_files(hidden)), fault
        except (Exception, CheckpointException) as error:
            return {}, fault or f"rank {self.rank}: {_reason(error)}"

    def _own_files(self, hidden: Path) -> list[str]:
        names = rf"__{self.rank}_.*|extra-{self.rank}\.pt" + (r"|\.metadata" * (self.rank == 0))
        found = (path.name for path in hidden.iterdir())
        return sorted(name for name in found if re.fullmatch(names, name))

    def _gather(
        self, written: dict[str, tuple[int, str]], fault: str | None
    ) -> tuple[dict[str, tuple[int, str]], list[str]]:
        if self.group is None:
            return written, [fault] if fault else []
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, (written, fault), group=self.group)
        files = {name: entry for part, _ in parts for name, entry in part.items()}
        return files, [fault for _, fault in parts if fault]

    def _all_ranks(self, faults: list[str]) -> list[str]:
        """Rank 0's list, on every rank."""
        if self.group is None:
            return faults
        answer = [faults]
        dist.broadcast_object_list(answer, src=0, group=self.group)
        return answer[0]

    def _empty(self, hidden: Path) -> list[str]:
        """Make the folder that all write to; rank 0 alone."""
        if self.rank:
            return []
        try:
            shutil.rmtree(hidden, ignore_errors=True)
            hidden.mkdir(parents=True)
        except OSError as error:
            return [_reason(error)]
        return []

    def _commit(self, step: int, hidden: Path, files: dict[str, tuple[int, str]]) -> list[str]:
        """Manifest, rename, and the removal of what is no longer kept; rank 0 alone."""
        if self.rank:
            return []
        final = self.folder / f"step-{step:08d}"
        try:
            Manifest(step, self.run_id, self.world_size, files).write(hidden)
            if final.exists():  # an earlier attempt's, torn or redone
                shutil.rmtree(final)
            os.replace(hidden, final)
            sync_folder(self.folder)
            self._prune()
        except OSError as error:
            return [_reason(error)]
        return []

    def _prune(self) -> None:
        own = [
            folder
            for _, folder in sorted(_checkpoints(self.folder))
            if (manifest := read_manifest(folder)) and manifest.run_id == self.run_id
        ]
        for folder in own[: -self.keep]:
            shutil.rmtree(folder, ignore_errors=True)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    found = [(re.fullmatch(r"step-(\d+)", path.name), path) for path in folder.iterdir()]
    return [(int(match[1]), path) for match, path in found if match and path.is_dir()]


def _reason(error: BaseException) -> str:
    """An error in one line; torch's CheckpointException by the first rank's cause."""
    if isinstance(error, CheckpointException) and error.failures:
        return _reason(error.failures[min(error.failures)][0])
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def _to_host(value: Any) -> Any:
    """A copy of nested plain values with every tensor in host memory."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _to_host(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_host(inner) for inner in value)
    return value
